"""Searches that are submitted to a real head with a token: from the first line of the log to the exit code."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import crash_host
import pytest
import short_training
from bucket_server import impatient

from carft_ray.results.reading.study_view import read_study
from carft_ray.study.mirror import NUMBERS

pytestmark = [pytest.mark.slow, pytest.mark.nodes]

ROOT = Path(__file__).resolve().parents[1]
WITHIN_S = 600


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def cluster():
    """The environment of a user of a head that runs, with its address in ``ADDRESS`` and a recipe in its home."""
    home = Path(tempfile.mkdtemp(prefix="cs", dir="/tmp"))
    short_training.make(home)
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("t" * 40)
    port, dashboard, agent, client = free_ports(4)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**kept, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": str(home / "cache"), "ADDRESS": f"http://127.0.0.1:{dashboard}"}
    words = f"--head --block --disable-usage-stats --num-cpus 2 --object-store-memory 80000000 --temp-dir {home}/t"
    words += f" --port {port} --dashboard-port {dashboard} --dashboard-agent-listen-port {agent}"
    words += f" --ray-client-server-port {client} --min-worker-port 0 --max-worker-port 0 --include-log-monitor false"
    log = open(home / "head.log", "wb")  # noqa: SIM115
    with log:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words.split()]
        head = subprocess.Popen(
            command, env={**environment, "RAY_AUTH_MODE": "token"}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        end = time.monotonic() + 120
        while not healthy(environment["ADDRESS"]):
            assert head.poll() is None, (home / "head.log").read_text()
            assert time.monotonic() < end, (home / "head.log").read_text()
            time.sleep(0.5)
        yield environment
    finally:
        for process in [head.pid, *session(head.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        head.wait()
        shutil.rmtree(home, ignore_errors=True)


def healthy(address):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"{address}/api/gcs_healthz", timeout=5).status == 200
    return False


def session(leader):
    """The process groups of a session: workers of Ray have their own."""
    found = subprocess.run(["ps", "-s", str(leader), "-o", "pgid="], capture_output=True, text=True)
    return {int(number) for number in found.stdout.split()}


def start(cluster, *words, **more):
    command = [sys.executable, "-m", "carft_ray.cli", *words, "--address", cluster["ADDRESS"]]
    pipe, environment = subprocess.PIPE, {**cluster, **more}
    return subprocess.Popen(command, env=environment, cwd=cluster["HOME"], stdout=pipe, stderr=pipe, text=True)


def call(cluster, *words, **more):
    process = start(cluster, *words, **more)
    try:
        out, err = process.communicate(timeout=WITHIN_S)
    finally:
        process.kill()
    assert "Traceback (" not in err
    return process.returncode, out, err


def test_a_search_runs_on_the_cluster_with_the_code_of_here_and_its_log_and_exit_code_come_back(cluster):
    words = ("submit", "recipe.yaml", "--study", "first", "--executor", "inline")
    here = Path(cluster["HOME"]) / "here"  # another code than that of the cluster: the job compares it
    shutil.copytree(ROOT / "carft_ray", here / "carft_ray", ignore=shutil.ignore_patterns("__pycache__"))
    with open(here / "carft_ray/words.py", "a") as file:
        file.write("# changed\n")
    code, out, err = call(cluster, *words, RAY_ADDRESS="http://127.0.0.1:9", PYTHONPATH=str(here))
    assert code == 0, out + err
    study = Path(cluster["HOME"]) / "first"
    assert "Running entrypoint" in out
    assert "2/2" in out
    assert re.search(r"Next:\n.*\n", out)  # the last lines, too
    assert read_study(study).num_finished == 2
    (kept,) = study.with_name("first.recipe").iterdir()
    assert (kept / "recipe.yaml").is_file()
    # what cannot be: the study is that of another recipe
    code, out, err = call(cluster, *words, "--set", "train.epochs=2")
    assert code == 3
    assert "train.epochs" in out
    assert "exit code 3" in err


def test_a_job_is_left_followed_stopped_and_resumed(cluster):
    study = Path(cluster["HOME"]) / "second"
    words = ("submit", "recipe.yaml", "--study", "second", "--executor", "inline", "--set", "search.trials=100")
    long = ("--set", "train.epochs=60")  # a training that is nearly at its end when the stop comes would end
    code, _, err = call(cluster, *words, *long, "--no-wait")
    assert code == 0, err
    process = start(cluster, "submit", "--attach", "second")
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "1/100" in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WITHIN_S)
    finally:
        process.kill()
    assert process.returncode == 130, "".join(lines) + err
    assert "carft-ray submit --attach carft-second-" in err
    code, out, _ = call(cluster, "cluster", "stop", "second", "--json")
    found = json.loads(out)
    assert (code, found["status"], found["wanted"]) == (0, "STOPPED", 100)
    assert 1 <= found["finished"] < 100
    code, out, err = call(cluster, "submit", "--attach", "second")
    assert code == 130
    assert "Resume with: carft-ray submit --resume" in err
    assert "saving checkpoints" in out  # it had the time
    code, out, err = call(cluster, "submit", "--resume", "second", "--trials", str(found["finished"] + 3))
    assert code == 0, out + err
    view = read_study(study)
    assert view.num_finished == found["finished"] + 3
    assert [row.attempt for row in view.rows if row.attempt > 1]  # what was stopped went on from its checkpoint
    code, out, _ = call(cluster, "cluster", "jobs", "--json")
    jobs = {job["id"]: job["status"] for job in json.loads(out)["jobs"] if job["study"] == str(study)}
    assert sorted(jobs.values()) == ["STOPPED", "SUCCEEDED"]


def test_a_search_on_a_study_in_a_bucket_is_submitted_stopped_from_here_and_resumed(cluster, monkeypatch, tmp_path):
    with impatient(monkeypatch, tmp_path) as server:
        address, keys = server.address("third"), [word for name in server.environment for word in ("--env", name)]
        words = ("submit", "recipe.yaml", "--study", address, "--executor", "inline", "--set", "train.epochs=60")
        code, _, err = call(cluster, *words, "--set", "search.trials=100", "--no-wait", *keys, **server.environment)
        assert code == 0, err
        end = time.monotonic() + WITHIN_S
        while sum(b'"outcome"' in data for name, data in server.objects().items() if "/log/0" in name) < 3:  # zero shot
            assert time.monotonic() < end
            time.sleep(0.5)
        assert crash_host.call(["stop", address]) == 0
        code, out, err = call(cluster, "submit", "--attach", address)
        assert (code, "saving checkpoints" in out) == (130, True), out + err
        finished = read_study(address, NUMBERS).num_finished
        assert 1 <= finished < 100
        more = ("--trials", str(finished + 2), *keys)
        code, out, err = call(cluster, "submit", "--resume", address, *more, **server.environment)
        assert code == 0, out + err
        view = read_study(address, NUMBERS)
        assert view.num_finished == finished + 2
        assert [row.attempt for row in view.rows if row.attempt > 1]
        code, out, _ = call(cluster, "cluster", "stop", address, "--json", **server.environment)
        found = json.loads(out)
        assert (code, found["asked"], found["finished"], found["study"]) == (0, False, finished + 2, address)


def test_a_wrong_token_is_told_in_one_message(cluster):
    code, out, err = call(cluster, "cluster", "jobs", RAY_AUTH_TOKEN="wrong")
    assert (code, out) == (5, "")
    assert ": the one from RAY_AUTH_TOKEN" in err
