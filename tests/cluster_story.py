"""A search that is submitted to a cluster: a node is killed, one joins, one is drained, the head dies and comes back.

No node but the head sees the study: what trainings read and write of it goes through Ray.

    python cluster_story.py FOLDER [EXECUTOR]

Real trainings of the command line, each a second or two per epoch of a few; ``story`` raises when a trial is missing,
trained twice, or has lost what its checkpoints had.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_searches as searches
import short_training

import cluster
from carft_ray.study.snapshot import snapshot

NUM_TRIALS, EPOCHS = 10, 160  # more than end meanwhile on a busy machine
DEADLINE_S = 20
TIMEOUT_S = 1200  # of a busy machine
RESUMES = re.compile(r"attempt (\d+): starts on .*? from step (\d+)")


def cli(first, *words, **options):
    """Runs a command with what reaches the cluster; returns it when it has ended."""
    command = [sys.executable, "-m", "carft_ray.cli", *map(str, words)]
    return subprocess.run(command, env=first.environment, capture_output=True, text=True, timeout=TIMEOUT_S, **options)


def search(first, recipe, study_dir, executor):
    """Submits the search, and follows it in a session of its own; what it prints goes into a file beside the study."""
    settings = [f"resources.{key}={value}" for key, value in searches.RESOURCES[executor].items()]
    command = [sys.executable, "-m", "carft_ray.cli", "submit", str(recipe), "--study", str(study_dir)]
    command += ["--address", first.dashboard, *(word for one in settings for word in ("--set", one))]
    with open(study_dir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, env=first.environment, stdout=log, stderr=log, start_new_session=True)


def story(folder, executor="inline"):
    """Tells the story once in a new folder; returns what each part took, in seconds."""
    recipe, study_dir = short_training.make(folder / "images"), folder / "head" / "study"
    study_dir.parent.mkdir()
    text = recipe.read_text().replace("epochs: 3", f"epochs: {EPOCHS}").replace("trials: 2", f"trials: {NUM_TRIALS}")
    recipe.write_text(text)
    took, began = {}, time.monotonic()

    def part(name):
        nonlocal began
        took[name], began = round(time.monotonic() - began, 1), time.monotonic()
        print(f"{name}: {took[name]} s", flush=True)

    def running(number):
        def found():
            assert process.poll() is None, f"the search has ended: {study_dir.with_suffix('.log').read_text()}"
            return len(searches.running_pids(study_dir, needs="attempt-*/step-*/state.json")) >= number

        searches.wait_until(found, f"{number} trainings run and have a checkpoint", TIMEOUT_S)

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where a job finds its Python
    with cluster.head(RAY_gcs_rpc_server_reconnect_timeout_s="10", PATH=path) as first:
        without = {"hidden": (study_dir.parent,)}
        with cluster.node(first, **without) as lost, cluster.node(first, **without) as drained:
            part("head and two nodes")
            done = cli(first, "doctor", recipe, "--quick", "--address", first.address)
            assert done.returncode == 0, done.stdout + done.stderr
            part("doctor")
            process = search(first, recipe, study_dir, executor)
            try:
                running(2)
                part("two trainings run")
                status = json.loads(cli(first, "status", study_dir, "--json").stdout)
                assert status["running"], status
                lost.kill()
                running(1)
                part("a node is killed")
                with cluster.node(first, **without) as joined:
                    running(2)
                    part("a node has joined")
                    drained.drain(DEADLINE_S)
                    left = lambda: len(searches.running_pids(study_dir)) < 2 or searches.ended(process)  # noqa: E731
                    searches.wait_until(left, "the training leaves the drained node", TIMEOUT_S)
                    drained.kill()
                    running(1)
                    part("a node was drained")
                    before = searches.results(study_dir)
                    first.kill()
                    joined.kill()
                    process.wait(TIMEOUT_S)
                    assert process.returncode == 5, study_dir.with_suffix(".log").read_text()
                    part("the head has gone, and the search with it")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(TIMEOUT_S)
        with (
            cluster.head(like=first, PATH=path) as second,
            cluster.node(second, **without),
            cluster.node(second, **without),
        ):
            process = search(second, recipe, study_dir, executor)
            try:
                process.wait(TIMEOUT_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            assert process.returncode == 0, study_dir.with_suffix(".log").read_text()
            part("the same command on a new head")
            searches.wait_for_no_groups(second.address, second.environment)
            check(study_dir, before)
            assert "2 of 2 nodes do not see" in study_dir.with_suffix(".log").read_text()
            done = cli(second, "export", study_dir, "--to", folder / "export")
            assert done.returncode == 0, done.stdout + done.stderr
            part("export")
    return took


def check(study_dir, before):
    """Raises when a trial is missing, was trained twice or lost what it had ``before``."""
    rows = searches.whole_trials(study_dir, NUM_TRIALS)
    assert {row.outcome for row in rows + snapshot(study_dir).baselines} == {"complete"}, rows
    now = searches.results(study_dir)
    assert {name for name, content in before.items() if now[name] != content} == set()
    continued = 0
    for folder in [study_dir / "trials" / row.name for row in rows]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1)), folder
        log = (folder / "log.txt").read_text()
        starts = [int(step) for _, step in RESUMES.findall(log)]
        assert starts == sorted(starts), log
        continued += bool(starts)
        assert "MB came through Ray" in log
    assert continued >= 2, "trainings that were continued from a checkpoint"


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    story(Path(sys.argv[1]).resolve(), *sys.argv[2:3])
