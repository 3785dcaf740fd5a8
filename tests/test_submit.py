"""Searches that are submitted to a cluster: to whom, and what comes back. The dashboard is a stand-in."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from dashboard_stand_in import answering, ended, settle, told

from carft_ray import __version__, environment
from carft_ray.launch.cluster import jobs


@pytest.fixture
def dashboard():
    with answering() as dashboard:
        yield dashboard


@pytest.fixture
def here(tmp_path, monkeypatch):
    return settle(tmp_path, monkeypatch)


@pytest.fixture
def submit(run, dashboard):
    return ended(run, "submit", dashboard)


@pytest.mark.slow
def test_a_search_is_submitted_with_this_package_followed_to_its_end_and_its_exit_code_is_ours(
    here, dashboard, submit, monkeypatch
):
    for redirection in jobs.REDIRECTIONS:
        monkeypatch.setenv(redirection, "http://127.0.0.1:9")
    dashboard.pieces = [f"line {n}\n" for n in range(7)]
    dashboard.polls, dashboard.without_log = 5, (2, 3, 5)  # when the log cannot be had
    out, err = submit(0, "r.yaml", "--study", "study")
    assert out == "".join(dashboard.pieces)
    (name,) = dashboard.jobs
    assert name == jobs.job_id(here / "study")
    assert f"Submitted {name} to {dashboard.address}. Its study" in told(err)
    job, sent = dashboard.jobs[name], dashboard.sent()
    assert job["metadata"] == {"study": str(here / "study"), "version": __version__}
    assert job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    assert {"recipe.yaml", "files/0-bad.csv", "files/1-bad.csv"} <= set(sent)
    for path in environment.PACKAGE_DIR.rglob("*.py"):
        assert sent[f"carft_ray/{path.relative_to(environment.PACKAGE_DIR)}"] == path.read_bytes()
    assert f"carft_ray-{__version__}.dist-info/METADATA" in sent
    assert not any("__pycache__" in name for name in sent)
    submit(0, "r.yaml", "--study", "other", "--no-wait", "--installed")
    assert "py_modules" not in dashboard.jobs[jobs.job_id(here / "other")]["runtime_env"]
    dashboard.end = {"status": "FAILED", "driver_exit_code": -9, "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR"}
    submit(137, "r.yaml", "--study", "study", "--json")
    assert [*dashboard.jobs][-1] == f"{name}-2"  # the first had ended


NEVER_RAN = {"status": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILURE"}
NEVER_RAN["message"] = "Failed to set up runtime environment.\nNo space left on device\n"


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        ({"status": "STOPPED"}, 130, "carft-ray submit --resume {here}/study --address {address}"),
        ({"status": "FAILED", "driver_exit_code": 6}, 6, "exit code 6"),
        (NEVER_RAN, 5, "must run to its end, but got Failed to set up runtime environment. No space left on device"),
    ],
)
def test_a_study_whose_job_runs_is_followed_to_its_end_and_nothing_is_submitted(
    here, dashboard, submit, end, code, text
):
    dashboard.add("carft-by-hand", here / "study")
    dashboard.end = end
    _, err = submit(code, "r.yaml", "--study", "study")
    assert text.format(here=here, address=dashboard.address) in told(err)
    assert "already runs" in err
    assert [*dashboard.jobs] == ["carft-by-hand"]
    assert dashboard.packages == {}


def test_resume_sends_the_command_alone(here, dashboard, submit):
    words = ("--resume", "study", "--trials", "+4", "--wall-time", "8h", "--warm-start", "other", "--no-wait")
    _, err = submit(0, *words, "--installed")
    (job,) = dashboard.jobs.values()
    options = f"--set budget.wall_time=8h --trials +4 --warm-start {here}/other"
    assert job["entrypoint"].endswith(f"exec python -m carft_ray.cli resume {here}/study --address auto {options}")
    assert dashboard.packages == {}
    assert f"carft-ray submit --attach {jobs.job_id(here / 'study')} --address {dashboard.address}" in err


@pytest.mark.slow
def test_attach_takes_a_job_or_a_study_json_has_the_end_and_ctrl_c_leaves_the_job(here, dashboard, submit, monkeypatch):
    dashboard.add("one", here / "study")
    out, err = submit(0, "--attach", "study", "--json")
    found = json.loads(out)
    assert (found["id"], found["status"], found["exit_code"]) == ("one", "SUCCEEDED", 0)
    assert "second line" in err
    assert f"Stop it with: ray job stop one --address {dashboard.address}" in told(err)
    assert submit(0, "--attach", "one")[0] == "first line\nsecond line\n"  # also when it has ended
    _, err = submit(5, "--attach", "two")
    assert "no such job or study: two" in told(err)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupted)
    _, err = submit(130, "r.yaml", "--study", "third")
    name = jobs.job_id(here / "third")
    assert f"Attach with: carft-ray submit --attach {name} --address {dashboard.address}" in told(err)
    assert dashboard.stopped == []


NO_VARIABLE = "must be the name of a variable that is set here, and that carft-ray does not set itself, but got"
NEW = "r.yaml --study x"


@pytest.mark.parametrize(
    ("line", "code", "rules"),
    [
        ("", 2, ["needs exactly one of: a recipe, --resume, --attach"]),
        (f"{NEW} --attach y", 2, ["needs exactly one of"]),
        ("--attach y --no-wait", 2, ["--no-wait: can only be used with a recipe or --resume"]),
        ("--attach y --set train.epochs=1 --trust", 2, ["--set: can only be used with a recipe or --resume"]),
        ("r.yaml", 2, ["needs --study as well"]),
        ("--resume x --study y", 2, ["needs a recipe as well"]),
        (f"{NEW} --trials 3", 2, ["can only be used with --resume"]),
        (f"{NEW} --set train.epochs=0 --executor fast", 3, ["epochs", ".executor"]),
        (f"{NEW} --env WANDB_API_KEY", 2, [f"{NO_VARIABLE} WANDB_API_KEY "]),
        (f"{NEW} --env HF_TOKEN=hf_secret", 2, [f"{NO_VARIABLE} HF_TOKEN "]),
        (f"{NEW} --env ''", 2, [f"{NO_VARIABLE} '' "]),
        (f"{NEW} --env RAY_JOB_STOP_WAIT_TIME_S", 2, [NO_VARIABLE]),  # set by carft-ray
        (f"{NEW} --env RAY_TRAIN_METRICS_ENABLED", 2, [NO_VARIABLE]),
    ],
)
def test_what_cannot_be_is_refused_before_the_cluster_is_asked(here, dashboard, submit, monkeypatch, line, code, rules):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "1")
    _, err = submit(code, *shlex.split(line))
    assert [rule for rule in rules if rule not in told(err)] == []
    assert "hf_secret" not in err
    assert dashboard.headers == []


# the server


@pytest.mark.slow
def test_the_token_is_found_where_ray_finds_it_and_sent(here, dashboard, submit, monkeypatch):
    dashboard.token = "right"
    _, err = submit(5, "--attach", "x")
    assert "requires the token of the cluster: none" in told(err)
    assert "ray get-auth-token" in err
    (here / "home/.ray").mkdir(parents=True)
    (here / "home/.ray/auth_token").write_text("right\n")
    submit(0, "r.yaml", "--study", "study")
    (here / "t").write_text("wrong")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "t"))
    _, err = submit(5, "--attach", "x")
    assert f": the one from {here}/t" in told(err)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    submit(0, "r.yaml", "--study", "study")
    assert set(dashboard.headers) == {None, "Bearer right", "Bearer wrong"}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (here / "t").unlink()
    _, err = submit(2, "--attach", "x")
    assert "No such file" in err


def test_a_head_that_hangs_or_is_none_is_told_in_one_message(here, dashboard, run, monkeypatch):
    def message(address):
        code, _, err = run("submit", "--attach", "x", "--address", address)
        assert code in (2, 5)
        return told(err)

    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patience:
        patience.setattr(jobs, "SILENCE_S", 0.2)
        port = silent.getsockname()[1]
        assert ": silence for 0.2 s" in message(f"127.0.0.1:{port}")
    none = "no Ray dashboard answers"
    assert f"{none} at http://127.0.0.1:{port}: Connection refused" in message(f"127.0.0.1:{port}")
    for address in ("ray://head:10001", "auto"):
        assert "must be like http://127.0.0.1:8265" in message(address)
    assert none in message("http://no-such-host.invalid:8265")
    for version, said in (("1.8.0", "Ray version 1.8.0 is running on the cluster"), (None, none)):
        dashboard.version = version
        assert said in message(dashboard.address)


@pytest.mark.slow
def test_a_head_that_is_away_for_a_moment_is_asked_again_and_one_that_stays_away_or_forgets_the_job_is_told(
    here, dashboard, submit, monkeypatch
):
    dashboard.add("one", here / "study")
    dashboard.polls, dashboard.away = 8, range(2, 6)
    out, _ = submit(0, "--attach", "one")
    assert out == "first line\nsecond line\n"
    monkeypatch.setattr(jobs, "HEAD_MAY_BE_AWAY_S", 0.1)
    dashboard.add("two", here / "study")
    dashboard.polls, dashboard.away = 1000, range(3, 1000)
    _, err = submit(5, "--attach", "two")
    assert "no longer answers" in err
    assert "carft-ray submit --attach two" in told(err)
    dashboard.add("three", here / "study")
    dashboard.away, dashboard.forgets = (), range(3, 1000)
    _, err = submit(5, "--attach", "three")
    assert "no longer knows the job" in told(err)
    assert "The same command again resumes the study" in told(err)


def test_submit_waits_for_the_agent_of_the_head_and_names_its_port_where_there_is_none(
    here, dashboard, submit, monkeypatch
):
    dashboard.without_agent = 3
    _, err = submit(0, "r.yaml", "--study", "study", "--installed")
    assert told(err).count("The agent of the head, which starts jobs, is not running yet; waiting 60 s at most.") == 1
    assert [*dashboard.jobs] == [jobs.job_id(here / "study")]
    monkeypatch.setattr(jobs, "AGENT_WITHIN_S", 0.2)
    dashboard.without_agent = 10**6
    _, err = submit(5, "r.yaml", "--study", "other", "--installed")
    assert "must have an agent that starts jobs; it had none for 0.2 s" in told(err)
    assert "Another Ray on the head probably uses its port, 52365." in told(err)
    assert "ray start --head --dashboard-agent-listen-port 52366" in told(err)
    assert len(dashboard.jobs) == 1


@pytest.mark.slow
def test_the_commands_of_ray_that_submit_prints_list_a_job_print_its_log_and_stop_it(
    here, dashboard, submit, monkeypatch
):
    dashboard.token, dashboard.polls = "right", 1000
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "a secret key")
    _, err = submit(0, "r.yaml", "--study", "study", "--installed", "--no-wait", "--env", "HF_TOKEN")
    logs, stop, listing = re.findall(r"(?m)^  (env -u RAY_ADDRESS RAY_AUTH_MODE=token ray job .*)", err)
    name, path = jobs.job_id(here / "study"), f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def printed(command):
        return subprocess.check_output(command, shell=True, text=True, env={**os.environ, "PATH": path})

    found = printed(listing)
    assert name in found
    assert str(here / "study") in found
    assert "a secret key" in found, "as docs/clusters.md warns"
    assert "first line" in printed(logs)
    assert "stopped" in printed(stop)
    assert dashboard.stopped == [name]
    _, err = submit(130, "--attach", "study")
    assert "carft-ray submit --resume" in err
    _, err = submit(5, "--attach", "other")
    assert f"See: env -u RAY_ADDRESS RAY_AUTH_MODE=token ray job list --address {dashboard.address}" in told(err)


def test_a_command_of_ray_names_the_token_only_if_there_is_one(here, dashboard, submit):
    _, err = submit(5, "--attach", "other")
    assert f"See: ray job list --address {dashboard.address}" in told(err)


def test_resume_passes_on_that_the_paths_of_the_study_are_trusted(here, dashboard, submit):
    out, _ = submit(0, "--resume", "s3://bucket/study", "--trust-paths", "--dry-run")
    assert "resume s3://bucket/study --address auto --trust-paths" in out
