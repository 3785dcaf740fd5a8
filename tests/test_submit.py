"""Searches that are submitted to a cluster: what is sent, to whom, what comes back. The dashboard is a stand-in."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import stub_dashboard

from carft_ray import __version__, environment
from carft_ray.cli.submit import BUCKET_KEYS
from carft_ray.errors import UsageError
from carft_ray.launch.jobs import jobs, server, upload
from carft_ray.recipe.loading import load_recipe

RECIPE = """
data:
  train: {source: webdataset, path: /far/shards, label: cls, class_names: names.txt, exclude: lists/bad.csv}
  id_val: {source: webdataset, path: val.tar, label: cls, class_names: names.txt, exclude: more/bad.csv}
prompts: {templates: "file:templates.txt"}
train: {batch_size: 4}
search: {space: {kl_weight: {low: 1, high: 2}}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A recipe with small files, a home without a token, and no cluster in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (*server.REDIRECTIONS, server.TOKEN, server.TOKEN_PATH, "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jobs, "POLL_S", 0.05)
    (tmp_path / "r.yaml").write_text(RECIPE)
    texts = {"names.txt": "cat\ndog\n", "templates.txt": "a photo of a {}\na {}\n", "val.tar": "images"}
    for name, text in {**texts, "lists/bad.csv": "1\n", "more/bad.csv": "2\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def dashboard():
    with stub_dashboard.serving() as found:
        yield found


@pytest.fixture
def submit(run, dashboard):
    def call(*words, address=True):
        given = ("--address", dashboard.address) if address else ()
        return run("submit", *words, *given)

    return call


def told(text):
    """A message on one line, as it would be in a wide terminal."""
    return " ".join(text.split())


def test_the_recipe_that_is_sent_is_the_same_recipe_with_its_lists_next_to_it(here, tmp_path_factory):
    recipe = load_recipe(here / "r.yaml", ["search.trials=3"])
    sent = upload.search_upload(recipe, Path("studies/first"), ["--change-space"], here)
    folder = tmp_path_factory.mktemp("unpacked")
    sent.write(folder)
    names = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert names == sent.files
    assert {*names} == {"recipe.yaml", "files/0-bad.csv", "files/1-bad.csv"}
    assert (names["files/0-bad.csv"], names["files/1-bad.csv"]) == ("1\n", "2\n")
    again = load_recipe(folder / "recipe.yaml")
    assert again.prompts.templates == ("a photo of a {}", "a {}")  # the file itself is not needed any more
    assert (again.search, again.train) == (recipe.search, recipe.train)
    assert again.data.train.path == "/far/shards"
    assert again.data.id_val.path == str(here / "val.tar")
    assert again.data.train.class_names == again.data.id_val.class_names == ("cat", "dog")
    assert again.data.id_val.exclude == str(folder / "files/1-bad.csv")
    assert sent.paths == (Path("/far/shards"), here / "val.tar")
    kept = f"{here}/studies/first.recipe/{sent.command.split('first.recipe/')[1][:8]}"
    command = f"exec python -m carft_ray.cli search {kept}/recipe.yaml --study {here}/studies/first --address auto"
    assert sent.command == f"mkdir -p {kept} && cp -R ./. {kept} || exit 5; {command} --change-space"
    source = environment.code()["source"]
    check = "python -m carft_ray.launch.jobs.package"
    assert sent.entrypoint(installed=False) == f"{check} {source} || exit 5; {sent.command}"
    assert sent.entrypoint(installed=True) == f"{check} || exit 5; {sent.command}"
    assert upload.search_upload(recipe, Path("studies/first"), ["--change-space"], here) == sent
    (here / "names.txt").write_text("dog\ncat\n")
    assert upload.search_upload(recipe, Path("studies/first"), ["--change-space"], here).command != sent.command
    (here / "more/bad.csv").unlink()  # then it is one of the cluster
    sent = upload.search_upload(recipe, here / "study", [], here)
    assert sent.paths[-1] == here / "more/bad.csv"
    assert f"exclude: {here}/more/bad.csv" in sent.files["recipe.yaml"]
    sent = upload.search_upload(recipe, here / "a study; rm", ["--again", "it's me"], here)
    words = shlex.split(sent.command)  # paths with spaces stay one word for the shell
    assert (words[words.index("--study") + 1], words[-1]) == (f"{here}/a study; rm", "it's me")
    assert jobs.job_id(here / "a study; rm").startswith("carft-a-study-rm-")


@pytest.mark.slow
def test_a_study_in_a_bucket_keeps_its_recipe_in_the_cache_of_the_head(here, submit, monkeypatch):
    for name in BUCKET_KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    address = "s3://bucket/studies/first"
    code, out, err = submit("r.yaml", "--study", f"{address}/", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["study"] == address
    assert found["job"] == jobs.job_id(address) != jobs.job_id(here / "first")
    assert "an-id" not in out + err
    assert "Without them there, add --env AWS_ACCESS_KEY_ID." in told(err)
    copied = found["entrypoint"].partition("; ")[2].replace("exec python -m carft_ray.cli", "echo")
    home = {"HOME": f"{here}/a home", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["sh", "-c", copied], env=home, cwd=here / "more", stdout=subprocess.PIPE, text=True, check=True
    )
    kept = next(here.glob("a home/.cache/carft-ray/recipes/*"))
    assert (kept / "bad.csv").read_text() == "2\n"
    assert done.stdout == f"search {kept}/recipe.yaml --study {address} --address auto\n"
    code, out, _ = submit("--resume", address, "--dry-run", "--json", "--env", "AWS_ACCESS_KEY_ID")
    assert f"resume {address} --address auto" in json.loads(out)["entrypoint"]
    code, _, err = submit("--resume", "s3://No Bucket/first", "--dry-run")
    assert (code, "must be a bucket and perhaps a prefix" in told(err)) == (2, True)
    assert "an-id" not in out


@pytest.mark.slow
def test_a_dry_run_prints_all_that_would_be_sent_and_sends_nothing(here, dashboard, submit):
    words = ("r.yaml", "--study", "study", "--dry-run", "--set", "search.trials=3")
    code, out, err = submit(*words, "--set", "tracking.wandb.project=mine")
    assert code == 0
    assert "Without one there, add --env WANDB_API_KEY" in told(err)
    assert dashboard.headers == []
    for text in (dashboard.address, jobs.job_id(here / "study"), "trials: 3", "files/0-bad.csv: 2"):
        assert text in out
    assert "exec python -m carft_ray.cli search" in out
    assert "path: /far/shards is_here: false" in told(out)
    assert "absolute as seen from here" in told(err)
    assert "Nothing was sent." in err
    assert f"py_modules: - {environment.PACKAGE_DIR}" in told(out)
    code, out, _ = submit(*words, "--json", "--installed")
    found = json.loads(out)
    assert code == 0
    assert found["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}
    assert found["not_sent"][0] == {"path": "/far/shards", "is_here": False}
    assert found["files"]["files/1-bad.csv"] == 2
    assert dashboard.headers == []


@pytest.mark.slow
def test_a_search_is_submitted_with_this_package_followed_to_its_end_and_its_exit_code_is_ours(
    here, dashboard, submit, monkeypatch
):
    for redirection in server.REDIRECTIONS:
        monkeypatch.setenv(redirection, "http://127.0.0.1:9")
    dashboard.pieces = [f"line {n}\n" for n in range(7)]
    dashboard.polls, dashboard.without_log = 5, (2, 3, 5)  # when the log cannot be had
    code, out, err = submit("r.yaml", "--study", "study")
    assert (code, out) == (0, "".join(dashboard.pieces))
    (name,) = dashboard.jobs
    assert name == jobs.job_id(here / "study")
    assert f"Submitted {name} to {dashboard.address}." in told(err)
    job, sent = dashboard.jobs[name], dashboard.sent()
    assert job["metadata"] == {"study": str(here / "study"), "version": __version__}
    assert job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    assert {"recipe.yaml", "files/0-bad.csv", "files/1-bad.csv"} <= set(sent)
    for path in environment.PACKAGE_DIR.rglob("*.py"):
        assert sent[f"carft_ray/{path.relative_to(environment.PACKAGE_DIR)}"] == path.read_bytes()
    assert f"carft_ray-{__version__}.dist-info/METADATA" in sent
    assert not any("__pycache__" in name for name in sent)
    assert submit("r.yaml", "--study", "other", "--no-wait", "--installed")[0] == 0
    assert "py_modules" not in dashboard.jobs[jobs.job_id(here / "other")]["runtime_env"]
    dashboard.end = {"status": "FAILED", "driver_exit_code": -9, "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR"}
    assert submit("r.yaml", "--study", "study", "--json")[0] == 137
    assert [*dashboard.jobs][-1] == f"{name}-2"  # the first had ended


NO_ENVIRONMENT = "Failed to set up runtime environment.\nNo space left on device\n"
NEVER_RAN = {"status": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": NO_ENVIRONMENT}


@pytest.mark.slow
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
    found, _, err = submit("r.yaml", "--study", "study")
    assert found == code
    assert text.format(here=here, address=dashboard.address) in told(err)
    assert "already runs" in err
    assert [*dashboard.jobs] == ["carft-by-hand"]
    assert dashboard.packages == {}


@pytest.mark.slow
def test_resume_sends_the_command_alone(here, dashboard, submit):
    words = ("--resume", "study", "--trials", "+4", "--wall-time", "8h", "--warm-start", "other", "--no-wait")
    code, _, err = submit(*words, "--installed")
    assert code == 0
    (job,) = dashboard.jobs.values()
    options = f"--set budget.wall_time=8h --trials +4 --warm-start {here}/other"
    assert job["entrypoint"].endswith(f"exec python -m carft_ray.cli resume {here}/study --address auto {options}")
    assert dashboard.packages == {}
    assert f"carft-ray submit --attach {jobs.job_id(here / 'study')} --address {dashboard.address}" in err


@pytest.mark.slow
def test_attach_takes_a_job_or_a_study_json_has_the_end_and_ctrl_c_leaves_the_job(here, dashboard, submit, monkeypatch):
    dashboard.add("one", here / "study")
    code, out, err = submit("--attach", "study", "--json")
    found = json.loads(out)
    assert (code, found["id"], found["status"], found["exit_code"]) == (0, "one", "SUCCEEDED", 0)
    assert "second line" in err
    assert submit("--attach", "one")[:2] == (0, "first line\nsecond line\n")  # also when it has ended
    code, _, err = submit("--attach", "two")
    assert code == 5
    assert "no such job or study: two" in told(err)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupted)
    code, _, err = submit("r.yaml", "--study", "third")
    assert code == 130
    name = jobs.job_id(here / "third")
    assert f"Attach with: carft-ray submit --attach {name} --address {dashboard.address}" in told(err)
    assert dashboard.stopped == []


@pytest.mark.parametrize(
    ("words", "code", "rules"),
    [
        ((), 2, ["must be given one of: a recipe, --resume, --attach"]),
        (("r.yaml", "--study", "x", "--attach", "y"), 2, ["must be given one of"]),
        (("r.yaml",), 2, ["must be given --study too"]),
        (("--resume", "x", "--study", "y"), 2, ["must be given a recipe too"]),
        (("r.yaml", "--study", "x", "--trials", "3"), 2, ["must stand with --resume"]),
        (("r.yaml", "--study", "x", "--set", "train.epochs=0", "--executor", "fast"), 3, ["epochs", ".executor"]),
    ],
)
def test_what_cannot_be_is_refused_before_the_cluster_is_asked(here, dashboard, submit, words, code, rules):
    found, _, err = submit(*words)
    assert found == code
    assert [rule for rule in rules if rule not in told(err)] == []
    assert dashboard.headers == []


# the server


@pytest.mark.slow
def test_the_token_is_found_where_ray_finds_it_and_sent(here, dashboard, submit, monkeypatch):
    dashboard.token = "right"
    code, _, err = submit("--attach", "x")
    assert code == 5
    assert "wants the token of the cluster: none" in told(err)
    assert "ray get-auth-token" in err
    (here / "home/.ray").mkdir(parents=True)
    (here / "home/.ray/auth_token").write_text("right\n")
    assert submit("r.yaml", "--study", "study")[0] == 0
    (here / "t").write_text("wrong")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "t"))
    code, _, err = submit("--attach", "x")
    assert code == 5
    assert f": the one from {here}/t" in told(err)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    assert submit("r.yaml", "--study", "study")[0] == 0
    assert set(dashboard.headers) == {None, "Bearer right", "Bearer wrong"}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (here / "t").unlink()
    code, _, err = submit("--attach", "x")
    assert code == 2
    assert "No such file" in err


@pytest.mark.slow
def test_a_head_that_hangs_or_is_none_is_told_in_one_message(here, dashboard, run, monkeypatch):
    def message(address, *words):
        code, _, err = run("cluster", "jobs", "--address", address, *words)
        assert code in (2, 5)
        return told(err)

    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patience:
        patience.setattr(server, "SILENCE_S", 0.2)
        port = silent.getsockname()[1]
        assert ": silence for 0.2 s" in message(f"127.0.0.1:{port}")
    assert f"no dashboard of a Ray answers at http://127.0.0.1:{port}: Connection refused" in message(
        f"127.0.0.1:{port}"
    )
    assert "must be like http://127.0.0.1:8265" in message("ray://head:10001")
    assert "must be like" in message("auto")
    assert "no dashboard of a Ray answers" in message("http://no-such-host.invalid:8265")
    dashboard.version = "1.8.0"
    assert "Ray version 1.8.0 is running on the cluster" in message(dashboard.address)
    dashboard.version = None
    assert "no dashboard of a Ray answers" in message(dashboard.address)


@pytest.mark.slow
def test_a_head_that_is_away_for_a_moment_is_asked_again_and_one_that_stays_away_or_forgets_the_job_is_told(
    here, dashboard, submit, monkeypatch
):
    dashboard.add("one", here / "study")
    dashboard.polls, dashboard.away = 8, range(2, 6)
    code, out, _ = submit("--attach", "one")
    assert (code, out) == (0, "first line\nsecond line\n")
    monkeypatch.setattr(jobs, "HEAD_MAY_BE_AWAY_S", 0.1)
    dashboard.add("two", here / "study")
    dashboard.polls, dashboard.away = 1000, range(3, 1000)
    code, _, err = submit("--attach", "two")
    assert code == 5
    assert "no longer answers" in err
    assert "carft-ray submit --attach two" in told(err)
    dashboard.add("three", here / "study")
    dashboard.away, dashboard.forgets = (), range(3, 1000)
    code, _, err = submit("--attach", "three")
    assert code == 5
    assert "no longer knows the job" in told(err)
    assert "The same command again resumes the study" in told(err)


# the package


def begin(*words, **environ):
    command = [sys.executable, "-m", "carft_ray.launch.jobs.package", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ})
    return done.returncode, told(done.stderr)


@pytest.mark.slow
def test_a_job_begins_with_the_code_that_was_sent_and_its_libraries_or_says_what_it_lacks(tmp_path):
    source = environment.code()["source"]
    assert begin(source) == begin() == (0, "")
    code, err = begin("0123456789abcdef")
    assert code == 5
    assert f"must run the code that was sent, 0123456789abcdef, but got {source} of {environment.PACKAGE_DIR}" in err
    about = tmp_path / "carft_ray-0.1.0.dist-info"  # comes first, as the folder that was sent
    about.mkdir()
    needs = "Requires-Dist: no-such-library>=2\nRequires-Dist: torch\nRequires-Dist: nor-this; extra == 'hf'\n"
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: carft-ray\nVersion: 0.1.0\n{needs}")
    path = os.pathsep.join([str(tmp_path), str(environment.PACKAGE_DIR.parent)])
    code, err = begin(source, PYTHONPATH=path)
    assert code == 5
    assert "lacks no-such-library Install it on all nodes" in err


# carft-ray cluster


@pytest.mark.slow
def test_the_jobs_of_a_cluster_are_listed_with_their_studies_and_their_logs_shown(here, dashboard, run):
    code, _, err = run("cluster", "jobs", "--address", dashboard.address)
    assert code == 0
    assert "No job was submitted" in err
    dashboard.add("one", here / "study", status="FAILED", driver_exit_code=6, end_time=1_700_000_065_000)
    dashboard.add("two", "", metadata={})
    code, out, _ = run("cluster", "jobs", "--address", dashboard.address)
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines[1:]] == [["two", "running"], ["one", "failed"]]
    assert (lines[2][2], lines[2][-1]) == ("6", str(here / "study"))
    found = json.loads(run("cluster", "jobs", "--address", dashboard.address, "--json")[1])
    assert [job["id"] for job in found["jobs"]] == ["two", "one"]
    code, out, _ = run("cluster", "logs", "study", "--address", dashboard.address)  # of the newest job of a study
    assert (code, out) == (0, "first line\nsecond line\n")
    found = json.loads(run("cluster", "logs", "one", "--address", dashboard.address, "--json")[1])
    assert (found["id"], found["log"]) == ("one", "first line\nsecond line\n")


@pytest.mark.slow
def test_stop_waits_for_the_end_and_says_how_to_resume_or_where_to_look(here, dashboard, run, monkeypatch):
    dashboard.add("one", here / "study")
    code, _, err = run("cluster", "stop", "study", "--address", dashboard.address)
    assert code == 0
    assert dashboard.stopped == ["one"]
    assert "one has ended." in err
    assert f"carft-ray submit --resume {here}/study --address {dashboard.address}" in told(err)
    code, _, err = run("cluster", "stop", "one", "--address", dashboard.address)
    assert code == 0
    assert "Nothing to stop: one has ended (stopped)." in told(err)
    assert dashboard.stopped == ["one"]

    monkeypatch.setattr("carft_ray.launch.jobs.jobs.STOP_WAIT_S", 0.2)
    dashboard.is_deaf, dashboard.polls = True, 1000
    dashboard.add("two", here / "other")
    code, _, err = run("cluster", "stop", "two", "--address", dashboard.address)
    assert code == 5
    assert "error: two: must end within 0.3 s of being asked to stop, but got it still runs" in told(err)
    assert f"See: carft-ray cluster jobs --address {dashboard.address}" in told(err)


SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n"


@pytest.mark.parametrize(
    ("key", "way"), [("class_names", "absolute"), ("class_names", "link"), ("exclude", "relative"), ("exclude", "link")]
)
def test_a_file_that_a_strangers_recipe_names_outside_its_folder_is_not_sent(here, dashboard, submit, key, way):
    secret = here / "home" / ".ssh" / "id_rsa"
    secret.parent.mkdir(parents=True)
    secret.write_text(SECRET)
    (here / "strange").mkdir()
    (here / "strange" / "list.txt").symlink_to(secret)
    named = {"absolute": str(secret), "relative": "../home/.ssh/id_rsa", "link": "list.txt"}[way]
    other = {"class_names": "exclude: [1]", "exclude": "class_names: [cat, dog]"}[key]
    text = RECIPE.replace("class_names: names.txt, exclude: lists/bad.csv", f"{key}: {named}, {other}", 1)
    text = text.replace(", exclude: more/bad.csv", "").replace("class_names: names.txt", "class_names: [cat, dog]")
    (here / "strange" / "r.yaml").write_text(text.replace("file:templates.txt", "simple"))
    for more in ([], ["--dry-run"]):
        code, out, err = submit("strange/r.yaml", "--study", "study", *more)
        assert code == 2
        assert f"must lie in the folder of the recipe, {here}/strange, to be sent to the cluster" in told(err)
        assert "Then add --send " in told(err)
        assert "id_rsa" in err
        assert "c2VjcmV0" not in out + err
    assert (dashboard.headers, dashboard.jobs) == ([], {})


def test_a_list_outside_the_folder_of_the_recipe_is_sent_where_it_is_asked_for(here, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    (here / "names.txt").rename(lists / "names.txt")
    (here / "lists/bad.csv").write_text("path,sample_id,note\na.png,18446744073709551615,of mine\n")
    (here / "r.yaml").write_text(RECIPE.replace("names.txt", str(lists / "names.txt")))
    recipe = load_recipe(here / "r.yaml")
    for send in ([lists / "names.txt"], [lists]):
        sent = upload.search_upload(recipe, here / "study", [], here, send)
        assert sent.files["files/0-bad.csv"] == "18446744073709551615\n"  # what was read, and no other column
        assert "names.txt" not in sent.files["recipe.yaml"]
        assert "- cat" in sent.files["recipe.yaml"]
    with pytest.raises(UsageError, match=r"names.txt: must lie in the folder of the recipe"):
        upload.search_upload(recipe, here / "study", [], here, [here / "lists"])


def test_variables_are_given_by_name_and_their_values_reach_the_job_alone(here, dashboard, submit, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a secret key")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    words = ("r.yaml", "--study", "study", "--env", "WANDB_API_KEY", "--env", "NCCL_SOCKET_IFNAME")
    code, out, err = submit(*words, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["runtime_env"]["env_vars"]["WANDB_API_KEY"] == "(its value here)"
    assert "a secret key" not in out + err
    code, out, err = submit(*words, "--no-wait")
    assert code == 0
    assert "a secret key" not in out + err
    (sent,) = dashboard.jobs.values()
    assert sent["runtime_env"]["env_vars"] == {
        "WANDB_API_KEY": "a secret key",
        "NCCL_SOCKET_IFNAME": "eth0",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
    }
    del sent["runtime_env"]["env_vars"]
    assert "a secret key" not in json.dumps(sent, default=str)
    assert not any("a secret key" in path.read_text(errors="ignore") for path in here.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_API_KEY", "WANDB_API_KEY"), ("HF_TOKEN=hf_secret", "HF_TOKEN"), ("", "''")]
    + [(name, name) for name in ("RAY_JOB_STOP_WAIT_TIME_S", "RAY_TRAIN_METRICS_ENABLED")],  # set by carft-ray
)
def test_a_variable_that_cannot_be_given_is_refused_before_the_cluster_is_asked(
    here, dashboard, submit, monkeypatch, name, value
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "1")
    code, _, err = submit("r.yaml", "--study", "study", "--env", name)
    assert code == 2
    rule = "must be the name of a variable that is set here, and that carft-ray does not set itself"
    assert f"--env: {rule}, but got {value} " in told(err)
    assert "hf_secret" not in err
    assert dashboard.headers == []
