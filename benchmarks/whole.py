"""Whole searches: against their trainings alone, and against the script of ``benchmarks.peers.careful``.

quickstart   seconds of ``carft-ray search search_spaces/quickstart.yaml`` from the start of the command to its end,
             against as many trainings of plain steps on a batch that lies in memory, two at a time: two processes
             make some, the rest is computed
script       the recipe ``search_spaces/folders.yaml`` on the sandbox's PNG files, without baselines, against the
             script with as many trainings of the same model, loss, epochs and space; the whole commands, nothing in
             a cache. The objective is that of the best training on the same validation sets, which each side has
             chosen by it.
"""

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import Row
from benchmarks.steps import RECIPE, ROOT, open_task, resident_training
from carft_ray import files
from carft_ray.data.synthetic.sandbox import TEMPLATES, export_images
from carft_ray.layout import RESULT
from carft_ray.model.pretrained import SANDBOX_WEIGHTS
from carft_ray.recipe.loading import load_recipe

FOLDERS = ROOT / "search_spaces" / "folders.yaml"
AT_A_TIME = 2
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
    results = [files.read_json(path) for path in study.glob(f"trials/*/*/{RESULT}")]
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


def quickstart_row() -> Row:
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
    name = f"quickstart's search / {number} resident-batch trainings ({search_s:.0f} s, {trainings_s:.0f} s)"
    return Row(name, search_s / trainings_s, SEARCH_TARGET)


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
    return [
        Row(
            f"time of {what} / script ({ours.seconds:.0f} s, {script.seconds:.0f} s)",
            ours.seconds / script.seconds,
            target,
        ),
        Row(f"objective - script's, {what}, points ({best})", 100 * (ours.objective - script.objective), 0.0, False),
    ]


def inline_rows(full: bool) -> list[Row]:
    """Measures trials in processes of Ray Tune."""
    return script_rows("inline", NUM_FULL if full else NUM_INLINE, INLINE_TARGET)


def nested_rows(full: bool) -> list[Row]:
    """Measures trials as groups of Ray Train."""
    return script_rows("ray-train", NUM_FULL if full else NUM_NESTED, NESTED_TARGET)
