"""Trainings of a benchmark: planned beforehand, run two at a time, kept on disk, and never run twice.

A training is ``training.run.run_training`` as the product runs it; afterwards its model is read on the test
sets at the alphas that the plan asks for. The test roles are opened here and nowhere else outside a benchmark.

    folder/prepared/                 what all trainings share (``prepare``)
    folder/zero_shot_test.parquet
    folder/trainings/<name>-<hash>/attempt-N/{result.json, predictions/validation.parquet}, predictions/test.parquet
                                       or diverged.txt

``folder`` is named by a hash of model, prompts, sets and recipe, so results of other weights are never mixed in.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from carft_ray import files
from carft_ray.data.cache import cache_dir
from carft_ray.data.cached_sets import Keeping, image_set
from carft_ray.data.class_names import class_folders
from carft_ray.data.sets import open_source
from carft_ray.data.source import ImageSet
from carft_ray.errors import CarftError, DivergedError, InterruptedRunError, Problem
from carft_ray.evaluation.predictions import concat, read_predictions, write_predictions
from carft_ray.launch.stop import stop_on_signal
from carft_ray.layout import ATTEMPT, PREDICTIONS, RESULT, WEIGHTS
from carft_ray.model.classifier import build_classifier
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import FloatParameter
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.evaluate import Mixtures, predict_all
from carft_ray.training.loop import StoppedRun
from carft_ray.training.run import prepare, run_training
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs, load_shared_inputs
from carft_ray.training.soup import run_soup

ID_TEST = "id_test"
DIVERGED = "diverged.txt"
CPU = torch.device("cpu")


def space_of(recipe: Recipe) -> dict[str, FloatParameter]:
    """Returns the search space, of which the floats count."""
    return {name: part for name, part in recipe.search.space.items() if isinstance(part, FloatParameter)}


@dataclass(frozen=True)
class Planned:
    """A training to run.

    Attributes:
        name: For people.
        values: Over the recipe's ``train``.
        test_alphas: Where it is read on the test sets; none: only on validation.
        keeps_weights: Whether its weights stay.
        soup: Of a soup (``training.soup.run_soup``): what it is made of, with members in the folder of the trainings.
    """

    name: str
    values: Mapping[str, Any]
    test_alphas: tuple[float, ...] = ()
    keeps_weights: bool = False
    soup: Mapping[str, Any] | None = None

    @property
    def folder_name(self) -> str:
        """Name and a hash of everything, so that a changed plan is a new training."""
        words = re.findall(r"[a-z0-9.]+", self.name.lower())
        return "-".join([*words, _digest([dict(self.values), self.test_alphas, *([self.soup] if self.soup else [])])])

    @property
    def cost(self) -> float:
        """About how many passes over 7,000 images it takes; for the time left."""
        return (
            (len(self.soup["members"]) if self.soup else 8)
            + (5 if self.values.get("alpha") is None else 1)
            + len(self.test_alphas)
        )


@dataclass(frozen=True)
class Bench:
    """Where the trainings of a benchmark live and what they share; goes to worker processes."""

    recipe: Recipe
    folder: Path

    @property
    def prepared_dir(self) -> Path:
        """What ``prepare`` made."""
        return self.folder / "prepared"

    @property
    def stop_path(self) -> Path:
        """Exists while the trainings are asked to stop."""
        return self.folder / "stop"

    @property
    def zero_shot_test_path(self) -> Path:
        """Predictions of the zero-shot model on the test sets."""
        return self.folder / "zero_shot_test.parquet"

    def training_dir(self, planned: Planned) -> Path:
        """Returns the folder of a training."""
        return self.folder / "trainings" / planned.folder_name

    def is_finished(self, planned: Planned) -> bool:
        """Returns whether a training has been run to its end and read on the test sets where that is planned."""
        folder = self.training_dir(planned)
        read = (_place(folder) / RESULT).exists() and (not planned.test_alphas or _test_path(folder).exists())
        return read or (folder / DIVERGED).exists()


@dataclass(frozen=True)
class Finished:
    """A finished training, opened when something of it is asked for."""

    planned: Planned
    folder: Path

    @property
    def diverged(self) -> bool:
        """Whether it left the finite numbers; it then has no result."""
        return (self.folder / DIVERGED).exists()

    @cached_property
    def result(self) -> dict[str, Any]:
        """Content of ``result.json``."""
        content: dict[str, Any] = json.loads((_place(self.folder) / RESULT).read_text())
        return content

    @cached_property
    def validation(self) -> pa.Table:
        """Predictions on the validation sets."""
        return read_predictions(_place(self.folder) / PREDICTIONS)

    @cached_property
    def test(self) -> pa.Table:
        """Predictions on the test sets."""
        return read_predictions(_test_path(self.folder))


def _place(folder: Path) -> Path:
    """Returns the folder of the last attempt at a training."""
    return folder / f"{ATTEMPT}{max(1, len(list(folder.glob(f'{ATTEMPT}*'))))}"


def open_bench(recipe: Recipe, out: Path, reads_tests: bool = True) -> Bench:
    """Prepares what all trainings share, reads zero-shot on the test sets, and returns where everything lives.

    Args:
        recipe: With ``id_test`` and ``ood_test`` if they are read.
        out: Folder of the benchmark; git ignores what is in it.
        reads_tests: Whether test sets are read.
    """
    torch.set_num_threads(1)
    inputs = load_shared_inputs(recipe)
    tests = _test_sets(recipe, inputs) if reads_tests else []
    parts = [inputs.key, *(getattr(recipe, part).model_dump(mode="json") for part in ("data", "train", "search"))]
    bench = Bench(recipe, out / _digest(parts))
    bench.folder.mkdir(parents=True, exist_ok=True)
    files.write_text(out / ".gitignore", "*\n")
    prepare(recipe, bench.prepared_dir, lambda text: print(text, file=sys.stderr))
    if tests and not bench.zero_shot_test_path.exists():
        heads = load_tensors(bench.prepared_dir / "heads.safetensors")
        classifier = build_classifier(inputs.clip, heads["class_head"], recipe.train, CPU)
        table = predict_all(classifier, tests, 0.0, recipe.evaluate.batch_size, RunContext())
        write_predictions(bench.zero_shot_test_path, table)
    return bench


class Clock:
    """Tells what is done and about how long the rest takes, over several calls of ``run_all``.

    Args:
        total: Cost of everything, trainings planned later included.
    """

    def __init__(self, total: float) -> None:
        self.total, self.began = total, time.monotonic()
        self.found = self.run = 0.0  # cost of the trainings that were there, and of those run since

    def finished(self, planned: Planned) -> None:
        """Counts a training that was run, and says so."""
        self.run += planned.cost
        elapsed, left = time.monotonic() - self.began, max(0.0, self.total - self.found - self.run)
        share, time_left = 1 - left / self.total, elapsed / self.run * left
        print(f"[{_minutes(elapsed)}] {share:4.0%}  {planned.name}, about {_minutes(time_left)} left", file=sys.stderr)


def run_all(bench: Bench, plans: Sequence[Planned], processes: int, clock: Clock) -> list[Finished]:
    """Runs the trainings that are not finished, in worker processes of one thread each, and opens all of them.

    Ctrl-C lets the running trainings write a checkpoint; the same call resumes them.

    Raises:
        InterruptedRunError: Stopped on request.
        CarftError: A training failed.
    """
    bench.stop_path.unlink(missing_ok=True)
    todo = [planned for planned in plans if not bench.is_finished(planned)]
    clock.found += sum(planned.cost for planned in plans if planned not in todo)
    context = multiprocessing.get_context("spawn")
    with (
        stop_on_signal(lambda name: files.write_text(bench.stop_path, f"{name}\n")),
        ProcessPoolExecutor(min(processes, max(1, len(todo))), context, _begin_worker) as pool,
    ):
        futures = {pool.submit(run_one, bench, planned): planned for planned in todo}
        try:
            for future in as_completed(futures):
                if future.result():
                    clock.finished(futures[future])
        except BrokenProcessPool as error:  # the signal may have gone to the workers too
            if not bench.stop_path.exists():
                rule, step = "a worker process was killed", "The same command continues; is there enough memory?"
                raise CarftError(Problem("", rule, next_step=step)) from error
        except BaseException:
            files.write_text(bench.stop_path, "error\n")  # what runs writes a checkpoint, what waits is not begun
            raise
    if bench.stop_path.exists():
        bench.stop_path.unlink()
        raise InterruptedRunError(Problem("", "stopped on request", next_step="The same command continues."))
    return [Finished(planned, bench.training_dir(planned)) for planned in plans]


def run_one(bench: Bench, planned: Planned) -> bool:
    """Runs one training in this process; False: it was stopped."""
    if bench.stop_path.exists():
        return False
    recipe, folder = apply(bench.recipe, planned.values), bench.training_dir(planned)
    attempt = 1 + len(list(folder.glob(f"{ATTEMPT}*")))
    context = RunContext(should_stop=bench.stop_path.exists)
    try:
        if planned.soup is None:
            run_training(recipe, folder, bench.prepared_dir, context, attempt)
        else:
            run_soup(planned.soup, recipe, folder, bench.prepared_dir, context, attempt)
    except StoppedRun:
        return False
    except DivergedError as error:
        files.write_text(folder / DIVERGED, f"{error}\n")
        return True
    if planned.test_alphas and not _test_path(folder).exists():
        write_predictions(_test_path(folder), predict_tests(recipe, bench, folder, planned.test_alphas))
    if not planned.keeps_weights:
        (_place(folder) / WEIGHTS).unlink(missing_ok=True)  # 5 MB, read for the last time
    return True


def predict_tests(recipe: Recipe, bench: Bench, folder: Path, alphas: Sequence[float]) -> pa.Table:
    """Returns the predictions of a finished training for the test sets of a recipe."""
    inputs = load_shared_inputs(recipe)
    heads = load_tensors(bench.prepared_dir / "heads.safetensors")
    mixtures, tests = Mixtures(inputs.clip, heads["class_head"], recipe.train, CPU), _test_sets(recipe, inputs)
    batch_size = recipe.evaluate.batch_size
    with mixtures.between(lambda: load_tensors(_place(folder) / WEIGHTS)) as mixed:
        return concat([predict_all(mixed(alpha), tests, alpha, batch_size, RunContext()) for alpha in alphas])


def _test_sets(recipe: Recipe, inputs: SharedInputs) -> list[ImageSet]:
    """Opens the test sets, ``id_test`` first, from the cache of decoded sets that all trainings share."""
    if recipe.data.id_test is None or not recipe.data.ood_test:
        raise ValueError("the recipe must have id_test and ood_test")
    clip, folder, classes = inputs.clip, cache_dir(recipe), class_folders(recipe)
    specs = {ID_TEST: recipe.data.id_test, **recipe.data.ood_test}
    sources = {name: open_source(spec, name, classes) for name, spec in specs.items()}
    return [image_set(source, clip.to_input, clip.input_key, Keeping(folder)) for source in sources.values()]


def _begin_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it however it ends (a killed parent leaves waiting children)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end_with(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()


def _test_path(folder: Path) -> Path:
    return folder / "predictions" / "test.parquet"


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
