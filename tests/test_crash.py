"""Trainings that are killed, interrupted or out of space at every place where that can matter, and go on exactly.

All of them run in forks of one process (``crash_host.py``): importing everything once is what makes that affordable.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import short_training

HERE = Path(__file__).parent
NUM_SECOND_KILLS = 12
FILE_SIZES = [1 << power for power in range(8, 19)]  # bytes; the whole training needs files of up to 130 kB
SMALL_BATCHES = ["--set", "train.batch_size=1"]  # 20 steps an epoch: an interruption falls inside one

pytestmark = pytest.mark.slow


def host(folder, jobs):
    """Runs jobs in one process that forks; returns their folders by name."""
    path = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    path.write_text(json.dumps(jobs))
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "crash_host.py"), str(folder), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return {job["name"]: folder / job["name"] for job in jobs}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return short_training.make(tmp_path_factory.mktemp("crash"))


@pytest.fixture(scope="module")
def train(recipe):
    return ["train", str(recipe), "--out", "out"]


@pytest.fixture(scope="module")
def reference(recipe, train):
    """Folder and durable operations of a training that nothing disturbs."""
    folder = recipe.parent
    kinds = folder / "kinds.json"
    jobs = [
        {"name": "reference", "commands": [{"argv": train, "count_to": str(kinds)}]},
        {"name": "reference_small", "commands": [{"argv": [*train, *SMALL_BATCHES]}]},
    ]
    host(folder, jobs)
    return folder, json.loads(kinds.read_text())


@pytest.fixture(scope="module")
def killed(recipe, train, reference):
    """Trainings killed before, in and after every durable operation, each then resumed."""
    folder, kinds = reference
    resume = [*train, "--resume"]
    jobs = []
    for number, kind in enumerate(kinds, start=1):
        for moment in ("before", "after", *(["torn"] if kind == "append" else [])):
            commands = [{"argv": train, "kill": (number, moment)}, {"argv": resume}]
            jobs.append({"name": f"{number:03d}-{kind}-{moment}", "commands": commands})
    for number in range(1, len(kinds), len(kinds) // NUM_SECOND_KILLS):  # the resumed one is killed too
        again = 1 + number * 7 % 11
        commands = [
            {"argv": train, "kill": (number, "after")},
            {"argv": resume, "kill": (again, "after")},
            {"argv": resume},
        ]
        jobs.append({"name": f"{number:03d}-{kinds[number - 1]}-twice-{again}", "commands": commands})
    return host(folder, jobs)


def codes(folder):
    return json.loads((folder / "codes.json").read_text())


def log(folder, number):
    return (folder / f"log-{number}.txt").read_text()


def without(value, *keys):
    return {key: child for key, child in value.items() if key not in keys}


def result(folder):
    return without(json.loads((folder / "out" / "result.json").read_text()), "elapsed_s")


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [without(row, "images_per_s") for row in rows]


def files(folder):
    """Names of all files that a training leaves, with the number of those that have the time in their name."""
    names = [path.relative_to(folder) for top in ("out", "cache") for path in (folder / top).rglob("*")]
    return {name for name in names if name.parts[1] != "tensorboard"}


def same(folder, other):
    """Tells what differs between two finished trainings."""
    differing = []
    for name in ("fine_tuned.safetensors", "predictions/validation.parquet", "prepared/heads.safetensors"):
        if (folder / "out" / name).read_bytes() != (other / "out" / name).read_bytes():
            differing.append(name)
    differing += [view.__name__ for view in (result, metrics, files) if view(folder) != view(other)]
    return differing


def test_every_kill_struck_and_every_kind_of_operation_was_counted(reference, killed):
    kinds = Counter(reference[1])
    assert kinds["append"] == 3  # an epoch each
    assert kinds["rename"] >= 5
    assert kinds["replace"] >= 10
    assert kinds["fsync"] > 30
    assert len(killed) >= 2 * len(reference[1]) + NUM_SECOND_KILLS
    for folder in killed.values():
        assert set(codes(folder)[:-1]) == {-signal.SIGKILL}, log(folder, 0)


def test_a_training_killed_at_any_durable_operation_is_resumed_to_the_very_same_result(reference, killed):
    whole = reference[0] / "reference"
    failed = {name: log(folder, -1 + len(codes(folder))) for name, folder in killed.items() if codes(folder)[-1]}
    assert failed == {}
    assert {name: differing for name, folder in killed.items() if (differing := same(folder, whole))} == {}


def test_a_resumed_training_does_not_begin_again(reference, killed):
    """After the second checkpoint only the last epoch is trained."""
    kinds = reference[1]
    appended = [number for number, kind in enumerate(kinds, start=1) if kind == "append"]
    resumed = log(killed[f"{appended[2]:03d}-append-before"], 1)
    assert "epoch 3:" in resumed
    assert "epoch 2:" not in resumed
    assert "Traceback" not in resumed


def test_no_resumed_training_shows_a_traceback_or_a_warning(killed):
    for folder in killed.values():
        for number in range(len(codes(folder))):
            assert "Traceback" not in log(folder, number)
            assert "warning" not in log(folder, number).lower()
