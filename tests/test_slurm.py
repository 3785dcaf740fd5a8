"""cluster/slurm.sh with stand-ins of `srun` and `scontrol`: what it starts, how it ends, a study on two real nodes."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed_searches import wait_until

from carft_ray.study.snapshot import snapshot

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cluster" / "slurm.sh"
BIN = Path(sys.executable).parent

SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'localhost\\nother\\n'; else echo "$*" >> "$STUBS/scontrol.txt"; fi
"""
# runs the command here, as on another node: with a folder for temporary files of its own
SRUN = """#!/bin/bash
echo ${*//[$'\\n']/ } >> "$STUBS/srun.txt"
while [ "${1#--}" != "$1" ]; do shift; done
exec "${@//\\/tmp\\/r$SLURM_JOB_ID//tmp/r${SLURM_JOB_ID}n}"
"""
STAND_INS = {  # of what the script starts: quick ones
    "ray": '#!/bin/bash\necho "$$ $*" >> "$STUBS/ray.txt"\n[ -z "$RAY_ENDS" ] || exit 1\ntrap "exit 1" TERM\n'
    "while :; do sleep 0.05; done\n",
    "carft-ray": '#!/bin/bash\necho "$*" > "$STUBS/search.txt"\ncp "$RAY_AUTH_TOKEN_PATH" "$STUBS/token"\n'
    'stat -c %a "$RAY_AUTH_TOKEN_PATH" > "$STUBS/mode"\n[ -z "$CODE" ] || exit $CODE\ntrap "exit 130" TERM\n'
    'touch "$STUBS/running"\nwhile :; do sleep 0.05; done\n',
}


def free_job_id():
    """A number of a job whose three ports nobody has."""
    for number in random.Random().sample(range(100_000, 900_000), 50):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(20000 + number % 4000 * 3, 20003 + number % 4000 * 3):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return number
    raise AssertionError("no free ports")


class Job:
    """What Slurm gives a job, and the job; ``stubs`` is the folder of the stand-ins and of what they write."""

    def __init__(self, folder, stand_ins=STAND_INS, **settings):
        self.stubs, self.id, self.folder = folder / "stubs", free_job_id(), folder
        for each in (self.stubs, folder / "home"):
            each.mkdir(exist_ok=True)
        for name, text in {"scontrol": SCONTROL, "srun": SRUN, **stand_ins}.items():
            (self.stubs / name).write_text(text)
            (self.stubs / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        of_slurm = {"SLURM_JOB_ID": str(self.id), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        paths = {"HOME": f"{folder}/home", "STUBS": str(self.stubs), "PYTHONPATH": str(ROOT)}
        paths["PATH"] = f"{self.stubs}:{BIN}:{os.environ['PATH']}"
        more = {"SLURM_CPUS_PER_TASK": "1", "RAY_AUTH_TOKEN": "of somebody else", **settings}
        self.environment = {**kept, **of_slurm, **paths, **more}

    @contextlib.contextmanager
    def running(self, *words):
        """Runs the script; whatever the test does, nothing of it is left."""
        command, given = [str(SCRIPT), *map(str, words)], {"env": self.environment, "cwd": self.folder}
        with open(self.folder / "job.out", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **given)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def written(self, name):
        path = self.stubs / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def output(self):
        return (self.folder / "job.out").read_text()

    def nothing_is_left(self, study):
        assert not Path(f"/tmp/r{self.id}").exists()
        assert list(study.parent.glob(".ray-token-*")) == []


def test_it_is_not_begun_without_slurm_or_without_a_study(tmp_path):
    for words, more in ((("recipe.yaml", "study"), {"SLURM_JOB_ID": ""}), (("recipe.yaml",), {})):
        job = Job(tmp_path, **more)
        with job.running(*words) as process:
            assert process.wait(60) == 2
    assert job.output.count("start it as: sbatch cluster/slurm.sh RECIPE STUDY") == 2
    assert job.written("ray.txt") == []


def test_what_it_starts_and_that_the_exit_code_is_the_search_s(tmp_path):
    job = Job(tmp_path, CODE="7")
    study = tmp_path / "studies" / "one"
    with job.running("recipe.yaml", study, "--set", "search.trials=3 ") as process:
        assert process.wait(60) == 7, job.output
    port = 20000 + job.id % 4000 * 3
    head, worker = sorted(job.written("ray.txt"), key=lambda line: "--head" not in line)
    assert f"start --head --port {port} --dashboard-host 127.0.0.1 --dashboard-port {port + 1}" in head
    assert f"--temp-dir /tmp/r{job.id} " in head
    assert f"start --address localhost:{port} --num-cpus 1" in worker
    [srun] = job.written("srun.txt")
    assert srun.startswith("--nodes=1 --ntasks=1 --exclude=localhost --cpus-per-task=1 bash -c ")
    address = f"--address localhost:{port} --set resources.wait_for_nodes=10m --set search.trials=3 "
    assert job.written("search.txt") == [f"search recipe.yaml --study {study} {address}"]
    assert job.written("mode") == ["600"]
    assert len((job.stubs / "token").read_text()) == 64
    assert job.written("scontrol.txt") == []
    job.nothing_is_left(study)
    for line in (head, worker):  # none of the processes is left
        assert not Path("/proc", line.split()[0]).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "end_in_s", "requeued"),
    [
        (signal.SIGUSR1, None, True),  # asked for by the script itself
        (signal.SIGTERM, 60, True),  # a site that sends this one at the limit
        (signal.SIGTERM, 7200, False),  # scancel; or a preemption, after which Slurm requeues by itself
    ],
)
def test_at_the_time_limit_it_stops_the_search_and_requeues(number, end_in_s, requeued, tmp_path):
    end = {} if end_in_s is None else {"SLURM_JOB_END_TIME": str(int(time.time()) + end_in_s)}
    job = Job(tmp_path, **end)
    with job.running("recipe.yaml", tmp_path / "study") as process:
        wait_until((job.stubs / "running").exists, "the search runs")
        process.send_signal(number)
        process.send_signal(number)  # a second one changes nothing
        assert process.wait(60) == 130, job.output
    assert job.written("scontrol.txt") == ([f"requeue {job.id}"] if requeued else [])
    job.nothing_is_left(tmp_path / "study")


@pytest.mark.slow
def test_a_ray_that_ends_ends_the_job_and_is_no_reason_to_requeue(tmp_path):
    job = Job(tmp_path, RAY_ENDS="1")
    with job.running("recipe.yaml", tmp_path / "study") as process:
        assert process.wait(60) == 5, job.output
    assert "a part of Ray has ended" in job.output
    assert job.written("scontrol.txt") == []


SET = "{{{0}: {{source: sandbox, domain: {0}, split: {1}, num_per_class: 8}}}}"
SHORT = (  # few images and many epochs: a signal meets the middle of a training
    *("search.trials=2", "search.baselines={}", "train.epochs=16", "evaluate.every_epochs=16"),
    *(f"data.{role}.num_per_class={number}" for role, number in (("train", 16), ("id_val", 8), ("id_test", 8))),
    *("data.ood_val=" + SET.format("negative", "val"), "data.ood_test=" + SET.format("sketch", "test")),
)


@pytest.mark.nodes
def test_a_study_over_two_nodes_is_stopped_requeued_and_resumed(tmp_path):
    """Head and worker are real; at the limit a checkpoint is left, and the second start of the job goes on from it."""
    recipe, study = ROOT / "search_spaces" / "quickstart.yaml", tmp_path / "study"
    options = [word for each in SHORT for word in ("--set", each)]
    job = Job(tmp_path, stand_ins={}, RAY_USAGE_STATS_ENABLED="0")
    try:
        with job.running(recipe, study, *options) as process:
            wait_until(
                lambda: list(study.glob("trials/*/metrics.jsonl")) or process.poll() is not None, job.output, 300
            )
            assert process.poll() is None, job.output
            process.send_signal(signal.SIGUSR1)
            assert process.wait(200) == 130, job.output
        assert job.written("scontrol.txt") == [f"requeue {job.id}"]
        job.nothing_is_left(study)
        stopped = {row.name: row for row in snapshot(study).trials}
        assert "running" in {row.outcome for row in stopped.values()}
        assert list(study.glob("trials/*/attempt-*/step-*"))

        with job.running(recipe, study, *options) as process:
            assert process.wait(500) == 0, job.output
        job.nothing_is_left(study)
    finally:
        for folder in Path("/tmp").glob(f"r{job.id}*"):
            shutil.rmtree(folder, ignore_errors=True)
    rows = snapshot(study).trials
    assert [row.outcome for row in rows] == ["complete", "complete"]
    assert max(row.attempt for row in rows) > 1
    for row in rows:  # goes on: no step stands twice
        lines = (study / "trials" / row.name / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(set(steps))
    assert "2 nodes, head on localhost" in job.output
