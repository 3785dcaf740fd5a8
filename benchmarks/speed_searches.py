"""Whole commands and searches.

    startup     seconds of ``carft-ray --help`` and of ``carft-ray validate`` against those of Python that does nothing
    files       a file of a study to a worker and back through Ray, on one machine, against a plain copy of it, flushed.
                Memory is what the worker has taken more at its peak
    overhead    searches of the sandbox with trainings made short (one epoch): seconds between the ends of two trials,
                one at a time, less the ``elapsed_s`` of the second; (peak memory with several at a time - with one) /
                further trials. Memory is the proportional set size of the search and all its child processes (pages
                that several share are counted once), read twice a second; Linux only
    quickstart  seconds of ``carft-ray search search_spaces/quickstart.yaml`` from the start of the command to its end,
                against as many trainings of plain steps on a batch that lies in memory, two at a time: two processes
                make some, the rest is computed
    script      the recipe ``search_spaces/folders.yaml`` on the sandbox's PNG files, without baselines, against
                ``benchmarks.peers.careful`` with as many trainings of the same model, loss, epochs and space; the whole
                commands, nothing in a cache. The objective is that of the best training on the same validation sets,
                which each side has chosen by it

Synthetic images.
"""

import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ray

from benchmarks.rows import ROOT, Row, descendants, let_workers_import, median_row, peak_mb
from benchmarks.speed_steps import RECIPE, open_task, resident_training
from carft_ray import files
from carft_ray.data.sandbox import TEMPLATES, export_images
from carft_ray.launch.workers.file_transfer import THREADS, FileServer, StudyFiles
from carft_ray.launch.workers.mailbox import started_here
from carft_ray.layout import RESULT
from carft_ray.model.pretrained import SANDBOX_WEIGHTS
from carft_ray.recipe.loading import load_recipe

FOLDERS = ROOT / "search_spaces" / "folders.yaml"
AT_A_TIME = 2
MOVED = "trials/t/attempt-1/step-00000010/weights"
STARTUPS = ("--help", "validate search_spaces/quickstart.yaml")
EXECUTORS = ("inline", "ray-train")
NUM_TRIALS, NUM_QUICK = 8, 3
INLINE_S, RAY_TRAIN_S, FURTHER_MB = 0.5, 2.0, 900.0  # targets
SETTINGS = (
    "train.epochs=1",
    "evaluate.every_epochs=0",
    "search.baselines={}",
    "resources.cpus_per_worker=0.1",  # admits all of them at once on any machine
)
LOOK_EVERY_S = 0.5
SEARCH_TARGET, INLINE_TARGET, NESTED_TARGET = 1.5, 0.6, 0.4
NUM_FULL, NUM_INLINE, NUM_NESTED = 16, 8, 4  # trainings of the script


class Ended(NamedTuple):
    """A search that has ended."""

    seconds: float
    objective: float


def searched(recipe: Path, study: Path, settings: Sequence[str], environment: Mapping[str, str]) -> Ended:
    """Runs a search of the product in a process of its own; the objective is the one measured at the chosen alpha.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    command = [sys.executable, "-m", "carft_ray.cli", "search", str(recipe), "--study", str(study), "--json"]
    seconds, _ = _run([*command, *(word for each in settings for word in ("--set", each))], environment)
    results = [files.read_json(path.parent, path.name) for path in study.glob(f"trials/*/*/{RESULT}")]
    return Ended(seconds, max(result["metrics"]["objective"] for result in results))


def by_script(images: Path, folder: Path, num_trials: int, nested: bool) -> Ended:
    """Runs the script.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    texts = folder / "templates.txt"
    texts.write_text("\n".join(TEMPLATES))
    words = [str(images), "--model", str(SANDBOX_WEIGHTS), "--templates", str(texts), "--trials", str(num_trials)]
    command = [sys.executable, "-m", "benchmarks.peers.careful", *words, *(["--nested"] if nested else [])]
    seconds, printed = _run(command, {})
    return Ended(seconds, json.loads(printed.splitlines()[-1])["objective"])


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, str]:
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return time.monotonic() - began, done.stdout


def quickstart_rows(full: bool, scale: bool = False) -> list[Row]:
    """Measures the quickstart's search."""
    recipe = load_recipe(RECIPE)
    number = recipe.search.trials + len(recipe.search.baselines)
    task = open_task()  # its sets are in the cache then
    num_steps = recipe.train.epochs * task.steps_per_epoch
    with tempfile.TemporaryDirectory(prefix="carft-whole-") as folder:
        search_s = searched(RECIPE, Path(folder) / "study", [], {}).seconds
    with ProcessPoolExecutor(AT_A_TIME, multiprocessing.get_context("spawn")) as pool:
        # the middle one of three runs beside another one from its begin to its end
        jobs = [pool.submit(resident_training, 3, num_steps) for _ in range(AT_A_TIME)]
        training_s = statistics.mean(job.result()[1] for job in jobs)
    trainings_s = training_s * math.ceil(number / AT_A_TIME)
    name = f"quickstart's search / {number} resident-batch trainings"
    return [Row(name, search_s / trainings_s, SEARCH_TARGET, detail=f"{search_s:.0f} s, {trainings_s:.0f} s")]


def script_rows(executor: str, num_trials: int, target: float) -> list[Row]:
    """Measures a search of the product against the script's.

    Args:
        executor: 'inline' or 'ray-train'.
        num_trials: Trainings of each.
        target: Of the ratio of times.
    """
    with tempfile.TemporaryDirectory(prefix="carft-whole-") as temporary:
        folder = Path(temporary).resolve()
        (folder / "recipes").mkdir()
        recipe, images = folder / "recipes" / "folders.yaml", folder / "sandbox_png"
        recipe.write_text(FOLDERS.read_text())  # its sets lie beside its folder
        export_images(images)
        settings = [f"search.trials={num_trials}", "search.baselines={}", f"resources.executor={executor}"]
        settings += ["data.id_test=null", "data.ood_test={}"]
        script = by_script(images, folder, num_trials, executor == "ray-train")
        ours = searched(recipe, folder / "study", settings, {"XDG_CACHE_HOME": str(folder / "cache")})
    what = f"{num_trials} trainings, {'nested' if executor == 'ray-train' else 'inline'}"
    best = f"{100 * ours.objective:.2f} and {100 * script.objective:.2f} %"
    seconds, points = ours.seconds / script.seconds, 100 * (ours.objective - script.objective)
    shown = f"{ours.seconds:.0f} s, {script.seconds:.0f} s"
    return [
        Row(f"time of {what} / script", seconds, target, detail=shown),
        Row(f"objective - script's, {what}, points", points, 0.0, False, detail=best),
    ]


def inline_rows(full: bool, scale: bool = False) -> list[Row]:
    """Measures trials in processes of Ray Tune."""
    return script_rows("inline", NUM_FULL if full else NUM_INLINE, INLINE_TARGET)


def nested_rows(full: bool, scale: bool = False) -> list[Row]:
    """Measures trials as groups of Ray Train."""
    return script_rows("ray-train", NUM_FULL if full else NUM_NESTED, NESTED_TARGET)


@dataclass(frozen=True)
class Measured:
    """One search.

    Attributes:
        peak_mb: Largest proportional set size of all its processes.
        overhead_s: Seconds per trial between trainings; of a search with one trial at a time.
    """

    peak_mb: float
    overhead_s: float


def measure(executor: str, concurrency: int, num_trials: int) -> Measured:
    """Runs a search of short trials in a process of its own.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    settings = [*SETTINGS, f"search.trials={num_trials}"]
    settings += [f"search.max_concurrent_trials={concurrency}", f"resources.executor={executor}"]
    with tempfile.TemporaryDirectory(prefix="carft-overhead-") as folder:
        study, printed = Path(folder) / "study", Path(folder) / "printed.txt"
        command = [sys.executable, "-m", "carft_ray.cli", "search", str(RECIPE), "--study", str(study)]
        command += [word for setting in settings for word in ("--set", setting)]
        with printed.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, memory_mb(process.pid))
                time.sleep(LOOK_EVERY_S)
        if process.returncode:
            raise RuntimeError(printed.read_text())
        ends = sorted(
            (path.stat().st_mtime, float(files.read_json(path.parent, path.name)["elapsed_s"]))
            for path in study.glob(f"trials/*/*/{RESULT}")
        )
    between = ends[-1][0] - ends[0][0] - sum(elapsed_s for _, elapsed_s in ends[1:])
    return Measured(peak, between / (len(ends) - 1))


def memory_mb(pid: int) -> float:
    """Returns the proportional set size of a process and its descendants in MB."""
    total = 0.0
    for process in (pid, *descendants(pid)):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(float(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000
    return total


def overhead_rows(full: bool, scale: bool = False) -> list[Row]:
    """Measures both executors, with fewer trials unless ``full``."""
    number = NUM_TRIALS if full else NUM_QUICK
    inline, nested = (measure(executor, 1, number) for executor in EXECUTORS)
    further = (measure("ray-train", number, number).peak_mb - nested.peak_mb) / (number - 1)
    return [
        Row("overhead of a trial, inline, s", inline.overhead_s, INLINE_S),
        Row("overhead of a trial after the first, ray-train, s", nested.overhead_s, RAY_TRAIN_S),
        Row("memory of a further ray-train trial, MB", further, FURTHER_MB, digits=0),
    ]


def startup_rows(full: bool, scale: bool = False) -> list[Row]:
    """Measures the commands' start, the sides in turn."""
    script = Path(sysconfig.get_path("scripts")) / "carft-ray"
    if not script.exists():
        raise RuntimeError(f"{script} is not there: python -m pip install -e .")
    sides = {"nothing": [sys.executable, "-c", "pass"]}
    sides |= {f"carft-ray {words}": [str(script), *words.split()] for words in STARTUPS}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range((9 if full else 5) + 1):
        for name, command in sides.items():
            seconds, _ = _run(command, {})
            if turn:  # the first fills the file caches
                found[name].append(seconds)
    nothing = found.pop("nothing")
    return [
        median_row(
            f"{name} / python -c pass",
            [mine / other for mine, other in zip(values, nothing, strict=True)],
            detail=f"{statistics.median(values):.2f} s",
        )
        for name, values in found.items()
    ]


def move(away: StudyFiles, folder: Path) -> dict[str, float]:
    """Gets a file of a study and sends it, in a worker; returns seconds and MB."""
    before, began = peak_mb(), time.perf_counter()
    away.get(away.entries("trials"), folder)
    got_s = time.perf_counter() - began
    (folder / "trials/t/attempt-1").rename(folder / "trials/t/attempt-2")
    began = time.perf_counter()
    away.send(folder, "trials/t/attempt-2/step-00000010")
    return {"got": got_s, "sent": time.perf_counter() - began, "memory": peak_mb() - before}


def file_rows(full: bool, scale: bool = False) -> list[Row]:
    """Measures a file of 350 MB, in full one of 1,024 MB as well."""
    let_workers_import()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    try:
        return [row for megabytes in ((350, 1024) if full else (350,)) for row in _moved(megabytes)]
    finally:
        ray.shutdown()


def _moved(megabytes: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="carft-move-") as name:
        study = Path(name, "study")
        source = study / MOVED
        source.parent.mkdir(parents=True)
        source.write_bytes(os.urandom(2**20) * megabytes)
        began = time.perf_counter()
        with open(shutil.copyfile(source, Path(name, "copy")), "rb") as copied:
            os.fsync(copied.fileno())
        copy_s = time.perf_counter() - began
        started, _actor = started_here(FileServer, "files", study, threads=THREADS)
        found = ray.get(ray.remote(move).remote(StudyFiles(started), Path(name, "node")))
    shown = {"got": f"{found['got']:.1f} s, worker {found['memory']:+.0f} MB", "sent": f"{found['sent']:.1f} s"}
    return [
        Row(f"a file of {megabytes} MB {how} through Ray / copied", found[how] / copy_s, detail=shown[how])
        for how in ("got", "sent")
    ]
