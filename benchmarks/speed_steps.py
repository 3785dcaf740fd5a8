"""What the loop and the KL term add to a step, what the alpha curve costs, and how soon a training begins.

The quickstart's model, images and recipe, one thread; processor time where nothing else is said. All sides take turns.

    loop    a plain step (CE, clipping, AdamW, written out here) over and over on one batch that lies in memory, against
            a step of the product's loop with ``kl_weight`` 0: views, order, reports, checks
    kl      a step of CAR-FT against such a step of the loop: targets that are stored, and computed in each step
    curve   the alpha curve of a training (predictions at every alpha that it needs, the choice, and writing them)
            against everything up to its fine-tuned weights; measured by running the training again, which finds its
            weights and makes the curve alone
    first   wall time from the start of a process to the first step of a training, against a process that opens the
            model and does nothing; caches are warm. With the recipe's epochs, and with as many as make 10 million
            targets
"""

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.rows import ROOT, Row, apart, median_row
from carft_ray.data.views import view_batch
from carft_ray.model.classifier import build_classifier
from carft_ray.model.clip import load_clip
from carft_ray.model.heads import cached_heads
from carft_ray.recipe.loading import apply, load_recipe
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training import run
from carft_ray.training.loop import fine_tune
from carft_ray.training.optimizer import build_optimizer
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs, load_shared_inputs

RECIPE = ROOT / "search_spaces" / "quickstart.yaml"
CPU = torch.device("cpu")
NUM_PAIRS = 10_000_000  # of image and visit
LOOP_TARGET, STORED_TARGET, ONLINE_TARGET, FIRST_TARGET, CURVE_TARGET = 0.97, 1.03, 1.36, 1.5, 0.35
ONE_THREAD = ("resources.cpus_per_worker=1", "resources.targets=stored")
# the first writes the targets and is not measured; then low, middle and high in the recipe's range of learning rates
LEARNING_RATES = (5e-4, 2e-4, 7e-4, 2.5e-3)


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained, with the heads."""

    inputs: SharedInputs
    heads: dict[str, Tensor]
    train: TrainConfig

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.inputs.train) / self.train.batch_size)


def open_task(settings: Sequence[str] = ()) -> Task:
    """Opens the quickstart's model and sets."""
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE, settings)
    inputs = load_shared_inputs(recipe)
    heads = cached_heads(recipe, inputs.clip, inputs.class_names, inputs.templates, CPU)
    return Task(inputs, heads, recipe.train)


def resident_steps(task: Task) -> Iterator[None]:
    """Makes a plain step each time that it is asked for the next."""
    clip, source, train = task.inputs.clip, task.inputs.train, task.train
    rows = np.arange(train.batch_size)
    views = view_batch(source, rows, source.sample_ids[rows], 0, 0, train.crop_scale, clip.image_size)
    pixels, labels = torch.from_numpy(views), torch.from_numpy(source.labels[rows])
    model = build_classifier(clip, task.heads["class_head"], train, CPU).train()
    optimizer = build_optimizer(model, train)
    while True:
        cross_entropy(model(pixels)[1], labels).backward()  # type: ignore[no-untyped-call]  # torch has no types there
        nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def resident_training(num_trainings: int, num_steps: int) -> list[float]:
    """Makes trainings of plain steps, in a process of its own; returns the seconds of each."""
    task, found = open_task(), []
    for _ in range(num_trainings):
        steps = resident_steps(task)
        began = time.perf_counter()
        for _ in range(num_steps):
            next(steps)
        found.append(time.perf_counter() - began)
    return found


def loop_times(task: Task, train: TrainConfig, store: Path | None = None) -> tuple[float, float]:
    """Returns processor times of the loop: of everything up to the end of the first epoch, and of a step after it."""
    seen, began = dict[int, float](), time.process_time()
    context = RunContext(progress=lambda row: seen.update({int(row["step"]): time.process_time()}))
    heads, source = task.heads, task.inputs.train
    fine_tune(task.inputs.clip, heads["class_head"], heads["context_head"], source, train, context, target_store=store)
    first, last = task.steps_per_epoch, max(seen)
    return seen[first] - began, (seen[last] - seen[first]) / (last - first)


def step_rows(turns: int, epochs: int = 3, settings: Sequence[str] = ()) -> list[Row]:
    """Measures the loop and the KL term; the first turn, which fills the store, does not count."""
    task = open_task([f"train.epochs={epochs}", *settings])
    number, plain = (epochs - 1) * task.steps_per_epoch, task.train.model_copy(update={"kl_weight": 0.0})
    found: dict[str, list[float]] = {"resident": [], "plain": [], "stored": [], "online": []}
    with tempfile.TemporaryDirectory(prefix="carft-steps-") as folder:
        for turn in range(turns + 1):
            resident = resident_steps(task)
            next(resident)
            began = time.process_time()
            for _ in range(number):
                next(resident)
            seconds = {
                "resident": (time.process_time() - began) / number,
                "plain": loop_times(task, plain)[1],
                "stored": loop_times(task, task.train, Path(folder))[1],
                "online": loop_times(task, task.train)[1],
            }
            if turn:
                for name, value in seconds.items():
                    found[name].append(value)

    def ratios(above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(found[above], found[below], strict=True)]

    size = f"{1000 * statistics.median(found['plain']):.0f} ms, batch {task.train.batch_size}"
    return [
        median_row(
            "loop / resident batch, steps per second", ratios("resident", "plain"), LOOP_TARGET, False, detail=size
        ),
        median_row("CAR-FT step / plain step, targets stored", ratios("stored", "plain"), STORED_TARGET),
        median_row("CAR-FT step / plain step, targets online", ratios("online", "plain"), ONLINE_TARGET),
    ]


class _BegunError(Exception):
    """The first step is made."""


def first_step(prepared: str, epochs: int) -> dict[str, float]:
    """Opens the model (``prepared`` empty), or begins a training; returns when imports were done and when all was."""
    imported = time.time()
    torch.set_num_threads(1)
    settings = [f"train.epochs={epochs}", "resources.targets=stored"]
    recipe = load_recipe(RECIPE, settings)
    if not prepared:
        load_clip(recipe.model)
        return {"imported": imported, "done": time.time()}

    def begun(*_: Any) -> None:
        raise _BegunError

    register_optimizer_step_post_hook(begun)
    with tempfile.TemporaryDirectory(prefix="carft-first-") as folder:
        try:
            run.run_training(recipe, Path(folder), Path(prepared), RunContext())
        except _BegunError:
            return {"imported": imported, "done": time.time()}
    raise RuntimeError("the training ended without a step")


def first_rows(turns: int) -> list[Row]:
    """Measures the wait before the first step."""
    recipe = load_recipe(RECIPE, ["resources.targets=stored"])
    num_images = len(load_shared_inputs(recipe).train)
    cases = {"open": 0, "short": recipe.train.epochs, "long": math.ceil(NUM_PAIRS / num_images)}
    whole: dict[str, list[float]] = {name: [] for name in cases}
    inner: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="carft-first-") as folder:
        prepared = Path(folder) / "prepared"
        run.prepare(recipe, prepared)
        for turn in range(turns + 1):
            for name, epochs in cases.items():
                began = time.time()
                times = apart(first_step, str(prepared) if epochs else "", epochs or 1)
                if turn:
                    whole[name].append(times["done"] - began)
                    inner[name].append(times["done"] - times["imported"])
    opened, opened_s = (statistics.median(each["open"]) for each in (whole, inner))
    rows = []
    for name, images in (("short", cases["short"] * num_images), ("long", cases["long"] * num_images)):
        text = f"first step / opening the model, {images:,} targets"
        spread = f"{opened:.1f} s; {opened_s:.2f} s without the imports"
        rows.append(median_row(text, [each / opened for each in whole[name]], FIRST_TARGET, detail=spread))
        rows.append(median_row(f"{text}, both without the imports", [each / opened_s for each in inner[name]]))
    return rows


def curve_and_training(settings: Sequence[str] = ()) -> list[tuple[float, float]]:
    """Returns the seconds of processor time of the curve and of its training, one pair per measured training.

    Args:
        settings: Overrides of the quickstart recipe.
    """
    recipe = load_recipe(RECIPE, [*ONE_THREAD, *settings])
    found = []
    with tempfile.TemporaryDirectory(prefix="carft-curve-") as folder:
        prepared = Path(folder) / "prepared"
        run.prepare(recipe, prepared)
        opened = load_shared_inputs(recipe)
        for learning_rate in LEARNING_RATES:
            training, out = apply(recipe, {"learning_rate": learning_rate}), Path(folder) / f"{learning_rate:g}"
            started = time.process_time()
            run.run_training(training, out, prepared, RunContext(), opened=opened)
            ended = time.process_time()
            run.run_training(training, out, prepared, RunContext(), 2, opened=opened)  # from the weights of the first
            curve_s = time.process_time() - ended
            found.append((curve_s, ended - started - curve_s))
    return found[1:]


def curve_rows(settings: Sequence[str] = ()) -> list[Row]:
    """Returns the row "alpha curve / its training, quickstart": the mean of the trainings, and its range."""
    pairs = curve_and_training(settings)
    ratios = [curve_s / training_s for curve_s, training_s in pairs]
    mean = sum(curve_s for curve_s, _ in pairs) / sum(training_s for _, training_s in pairs)
    return [Row("alpha curve / its training, quickstart", mean, CURVE_TARGET, True, (min(ratios), max(ratios)))]
