"""Trainings that are killed, interrupted or out of space at every place where that can matter, and go on exactly.

Each day has its share of the kills, ``make crash-points`` makes all. All of them run in forks of one process
(``crash_host.py``): importing everything once is what makes that affordable.
"""

import json
import re
import shlex
import signal
from pathlib import Path

import crash_host
import pytest
import short_training

TRAIN = ["train", "../recipe.yaml", "--set", "search.alpha.grid=[0, 0.5, 1]", "--out", "out"]
SMALL_BATCHES = ["--set", "train.batch_size=1"]  # 20 steps an epoch: an interruption falls inside one

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    recipe = short_training.make(tmp_path_factory.mktemp("crash"))
    with crash_host.started(recipe.parent) as run:
        yield run


@pytest.fixture(scope="module")
def reference(host):
    """Folder and durable operations of a training that nothing disturbs, the latter also with late checkpoints."""
    jobs = [
        {"name": name, "commands": [{"argv": TRAIN, "count_to": "kinds.json", "writes": name}]}
        for name in ("soon", "late")
    ]
    done = host([*jobs, {"name": "small", "commands": [{"argv": [*TRAIN, *SMALL_BATCHES]}]}])
    soon, late = (done[name][0] for name in ("soon", "late"))
    assert differences(late, soon) == []
    return soon.parent, {place.name: json.loads((place / "kinds.json").read_text()) for place in (soon, late)}


def moments(kinds, number):
    """Returns when to kill at an operation. Before a rename, or a flush after one, is after the operation before it."""
    kind = kinds[number - 1]
    if kind == "append":
        return ("before", "torn", "after")
    flushes_new = kind == "fsync" and (number == 1 or kinds[number - 2] not in ("rename", "replace"))
    return ("before", "after") if flushes_new else ("after",)


def without(value, *keys):
    return {key: child for key, child in value.items() if key not in keys}


def inside(folder):
    return short_training.training_in(folder / "out")


def result(folder):
    content = json.loads((short_training.place_in(folder / "out") / "result.json").read_text())
    return without(content, "elapsed_s", "environment")


def metrics(folder):
    rows = [json.loads(line) for line in (inside(folder) / "metrics.jsonl").read_text().splitlines()]
    return [without(row, "images_per_s") for row in rows]


def files(folder):
    """Names of all that a training leaves, but its commits, what ran, its log, TensorBoard's files and notes of ids."""
    names = [path.relative_to(folder) for top in ("out", "cache") for path in (folder / top).rglob("*")]
    left_out = "log", "log.txt", "written"
    kept = [str(name) for name in names if "tfevents" not in name.name and not set(left_out) & set(name.parts)]
    return {re.sub(r"attempt-\d+", "attempt", name) for name in kept}


def differences(folder, other):
    """Names what differs between two finished trainings."""
    names = ("fine_tuned.safetensors", "predictions/validation.parquet", "../../../prepared/heads.safetensors")
    one, two = (short_training.place_in(each / "out") for each in (folder, other))
    found = [name for name in names if (one / name).read_bytes() != (two / name).read_bytes()]
    return found + [view.__name__ for view in (result, metrics, files) if view(folder) != view(other)]


@pytest.mark.timeout(5400)  # `make crash-points` kills around each write, on a slow and busy machine too
def test_a_training_killed_at_any_durable_operation_is_resumed_to_the_very_same_result(host, reference):
    """Some are killed again before that, and some write their checkpoints as late as they may."""
    folder, kinds = reference
    assert kinds["soon"] != kinds["late"]
    resume = [*TRAIN, "--resume"]
    jobs = []
    for number in range(1, len(kinds["soon"]) + 1):
        for name in kinds:
            for moment in moments(kinds[name], number):
                kill = {"argv": TRAIN, "kill": (number, moment), "writes": name}
                again = [{"argv": resume, "kill": (1 + number * 7 % 11, "after")}] if number % 8 == 0 else []
                commands = [kill, *again, {"argv": resume}]
                jobs.append({"name": f"{number:03d}-{name}-{moment}", "commands": commands})
    for name, (place, answers) in host(crash_host.share(jobs)).items():
        assert (answers[0]["code"], answers[-1]["code"]) == (-signal.SIGKILL, 0), (name, answers)
        assert not re.search("(?i)traceback|warning", "".join(answer["log"] for answer in answers)), name
        assert differences(place, folder / "soon") == [], name


@pytest.mark.parametrize(
    ("name", "part", "numbers", "says", "keeps"),
    [
        ("polite", "/photo/", [45], "stopped; it continues from step 30 (epoch 1 done)", 2),
        ("impatient", "/photo/", [45, 46], "stopped; it continues from step 20 (epoch 1 done)", 1),
        ("early", "/photo_val/", [3], "stopped; it continues from its beginning", 0),
    ],
)
def test_ctrl_c_ends_with_130_and_the_command_that_resumes(host, reference, name, part, numbers, says, keeps):
    """The first Ctrl-C in the middle of an epoch waits for a checkpoint; a second one, or one outside, does not.

    Before the training each of the 20 images is opened once, for its records.
    """
    train = [*TRAIN, *SMALL_BATCHES]
    place, (answer,) = host([{"name": name, "commands": [{"argv": train, "interrupt": (part, numbers)}]}])[name]
    assert (answer["code"], answer["remains"]) == (130, []), answer["log"]
    checkpoints = sorted(path.name for path in inside(place).glob("attempt-1/step-*"))
    assert checkpoints == ["step-00000020", "step-00000030"][:keeps]
    *before, said, step = answer["log"].splitlines()
    assert said == says
    command = shlex.split(step.removeprefix("    Resume with: carft-ray "))
    assert command == [*TRAIN[:4], *SMALL_BATCHES, "--out", "out", "--resume"]
    assert not any(word in line for line in before for word in ("error", "Traceback", "warning"))
    _, (answer,) = host([{"name": name, "commands": [{"argv": command}]}])[name]
    assert answer["code"] == 0, answer["log"]
    assert differences(place, reference[0] / "small") == []


def test_a_training_that_runs_out_of_space_says_so_once_leaves_nothing_half_written_and_goes_on(host, reference):
    """A limit on the size of files stands for a full disk: each write fails where the first byte does not fit."""
    jobs = [
        {"name": f"size-{size}", "commands": [{"argv": TRAIN, "file_size": size}, {"argv": [*TRAIN, "--resume"]}]}
        for size in (2**8, 2**11, 2**14, 2**17)  # bytes; the whole training needs files of up to 130 kB
    ]
    stopped_at = set()
    for name, (folder, (first, second)) in host(jobs).items():
        assert (first["code"], first["remains"]) == (5, []), (name, first["log"])
        told = rf"^error: (?:.*: )?({folder}/[^:]+): (.*)\n {{4}}(.*)$"
        [(path, rule, step)] = re.findall(told, first["log"], re.M)
        assert rule == "must be writable, but got File too large"
        assert step == "Raise the limit on file sizes (ulimit -f), then run the same command again."
        assert "Traceback" not in first["log"], first["log"]
        assert second["code"] == 0, second["log"]
        assert differences(folder, reference[0] / "soon") == [], name
        stopped_at.add(Path(path).name)
    assert len(stopped_at) >= 3, stopped_at
