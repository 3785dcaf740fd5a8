"""Searches that are submitted to a real head with a token: from the first line of the log to the exit code."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import crash_host
import pytest
import short_training
from bucket_searches import ended
from bucket_server import impatient

import cluster
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.copy import NUMBERS

pytestmark = pytest.mark.nodes

ROOT = Path(__file__).resolve().parents[1]
WITHIN_S = 600
SEARCH = ("--executor", "inline", "--set", "train.epochs=60", "--set", "search.trials=100")  # long


@pytest.fixture(scope="module")
def head():
    """A head that runs, with a recipe in its HOME."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with cluster.head(2, PATH=path, PYTHONPATH=str(ROOT), RAY_AUTH_TOKEN_PATH="") as started:
        started.home = Path(started.environment["HOME"])
        short_training.make(started.home)
        yield started


def start(head, *words, **more):
    command = [sys.executable, "-m", "carft_ray.cli", *words, "--address", head.dashboard]
    pipe, environment = subprocess.PIPE, {**head.environment, **more}
    return subprocess.Popen(command, env=environment, cwd=head.home, stdout=pipe, stderr=pipe, text=True)


def call(head, *words, **more):
    process = start(head, *words, **more)
    try:
        out, err = process.communicate(timeout=WITHIN_S)
    finally:
        process.kill()
    assert "Traceback (" not in err
    return process.returncode, out, err


def test_a_search_runs_with_the_code_of_here_and_its_log_and_exit_code_come_back_and_a_wrong_token_is_told(head):
    words = ("submit", "recipe.yaml", "--study", "first", "--executor", "inline")
    here = head.home / "here"  # another code than that of the cluster: the job compares it
    shutil.copytree(ROOT / "carft_ray", here / "carft_ray", ignore=shutil.ignore_patterns("__pycache__"))
    with open(here / "carft_ray/words.py", "a") as file:
        file.write("# changed\n")
    code, out, err = call(head, *words, RAY_ADDRESS="http://127.0.0.1:9", PYTHONPATH=str(here))
    assert code == 0, out + err
    assert "Running entrypoint" in out
    assert "Next:\n" in out  # the last lines, too
    assert read_study(head.home / "first").num_finished == 2
    (kept,) = (head.home / "first.recipe").iterdir()
    assert (kept / "recipe.yaml").is_file()
    code, out, err = call(head, *words, "--set", "train.epochs=2")  # the study is that of another recipe
    assert (code, "train.epochs" in out, "exit code 3" in err) == (3, True, True)
    code, out, err = call(head, "submit", "--attach", "first", RAY_AUTH_TOKEN="wrong")
    assert (code, out, ": the one from RAY_AUTH_TOKEN" in err) == (5, "", True)


def test_a_job_is_left_followed_stopped_and_resumed(head):
    code, _, err = call(head, "submit", "recipe.yaml", "--study", "second", *SEARCH, "--no-wait")
    assert code == 0, err
    (stop,) = re.findall(r"(?m)^  (RAY_AUTH_MODE=token ray job stop .*)", err)
    process = start(head, "submit", "--attach", "second")
    try:
        assert any("1/100" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WITHIN_S)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "carft-ray submit --attach carft-second-" in err
    subprocess.run(stop, shell=True, env=head.environment, timeout=WITHIN_S, check=True)
    finished = read_study(head.home / "second").num_finished
    assert 1 <= finished < 100
    code, out, err = call(head, "submit", "--attach", "second")
    assert (code, "Resume with: carft-ray submit --resume" in err) == (130, True)
    assert "saving checkpoints" in out  # it had the time
    code, out, err = call(head, "submit", "--resume", "second", "--trials", str(finished + 3))
    assert code == 0, out + err
    check_resumed(read_study(head.home / "second"), finished + 3)


def check_resumed(view, num_finished):
    assert view.num_finished == num_finished
    assert [row.attempt for row in view.rows if row.attempt > 1]  # what was stopped went on from its checkpoint


def test_a_search_on_a_study_in_a_bucket_is_submitted_stopped_from_here_and_resumed(head, monkeypatch, tmp_path):
    with impatient(monkeypatch, tmp_path) as server:
        address, keys = server.address("third"), [word for name in server.environment for word in ("--env", name)]
        words = ("submit", "recipe.yaml", "--study", address, *SEARCH, "--no-wait", *keys)
        code, _, err = call(head, *words, **server.environment)
        assert code == 0, err
        cluster.wait_until(lambda: ended(server) >= 3, "zero-shot and two trials have ended", WITHIN_S)
        assert crash_host.call(["stop", address]) == 0
        code, out, err = call(head, "submit", "--attach", address)
        assert (code, "saving checkpoints" in out) == (130, True), out + err
        finished = read_study(address, NUMBERS).num_finished
        more = ("--trials", str(finished + 2), *keys)
        code, out, err = call(head, "submit", "--resume", address, *more, **server.environment)
        assert code == 0, out + err
        check_resumed(read_study(address, NUMBERS), finished + 2)
