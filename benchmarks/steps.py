"""What the training loop and the KL term add to a step, and how soon a training begins.

The quickstart's model, images and recipe, one thread; processor time where nothing else is said. All sides take turns.

    loop    a plain step (CE, clipping, AdamW, written out here) over and over on one batch that lies in memory, against
            a step of the product's loop with ``kl_weight`` 0: views, order, reports, checks
    kl      a step of CAR-FT against such a step of the loop: targets that are stored, and computed in each step
    first   wall time from the start of a process to the first step of a training, against a process that opens the
            model and does nothing; caches are warm. With the recipe's epochs, and with as many as make 10 million
            targets
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
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

from benchmarks.rows import Row, median_row
from carft_ray.data.views import view_batch
from carft_ray.model.classifier import build_classifier
from carft_ray.model.clip import load_clip
from carft_ray.model.heads import cached_heads
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.training import run
from carft_ray.training.loop import fine_tune
from carft_ray.training.optimizer import build_optimizer
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs, load_shared_inputs

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "search_spaces" / "quickstart.yaml"
CPU = torch.device("cpu")
NUM_PAIRS = 10_000_000  # of image and visit
LOOP_TARGET, STORED_TARGET, ONLINE_TARGET, FIRST_TARGET = 0.97, 1.03, 1.36, 1.5


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


def loop_step_s(task: Task, kl_weight: float, store: Path | None = None) -> float:
    """Returns the processor time of a step of the loop, after its first epoch."""
    seen: dict[int, float] = {}
    context = RunContext(progress=lambda row: seen.update({int(row["step"]): time.process_time()}))
    heads, train = task.heads, task.train.model_copy(update={"kl_weight": kl_weight})
    source = task.inputs.train
    fine_tune(task.inputs.clip, heads["class_head"], heads["context_head"], source, train, context, target_store=store)
    first, last = task.steps_per_epoch, max(seen)
    return (seen[last] - seen[first]) / (last - first)


def step_rows(turns: int, epochs: int = 3, settings: Sequence[str] = ()) -> list[Row]:
    """Measures the loop and the KL term; the first turn, which fills the store, does not count."""
    task = open_task([f"train.epochs={epochs}", *settings])
    number, kl_weight = (epochs - 1) * task.steps_per_epoch, task.train.kl_weight
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
                "plain": loop_step_s(task, 0.0),
                "stored": loop_step_s(task, kl_weight, Path(folder)),
                "online": loop_step_s(task, kl_weight),
            }
            if turn:
                for name, value in seconds.items():
                    found[name].append(value)

    def ratios(above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(found[above], found[below], strict=True)]

    size = f"{1000 * statistics.median(found['plain']):.0f} ms, batch {task.train.batch_size}"
    return [
        median_row(
            f"loop / resident batch, steps per second ({size})", ratios("resident", "plain"), LOOP_TARGET, False
        ),
        median_row("CAR-FT step / plain step, targets stored", ratios("stored", "plain"), STORED_TARGET),
        median_row("CAR-FT step / plain step, targets online", ratios("online", "plain"), ONLINE_TARGET),
    ]


class _BegunError(Exception):
    """The first step is made."""


def first_step(prepared: Path | None, epochs: int) -> dict[str, float]:
    """Opens the model (``prepared`` None), or begins a training; returns when imports were done and when all was."""
    imported = time.time()
    settings = [f"train.epochs={epochs}", "resources.targets=stored"]
    recipe = load_recipe(RECIPE, settings)
    if prepared is None:
        load_clip(recipe.model)
        return {"imported": imported, "done": time.time()}

    def begun(*_: Any) -> None:
        raise _BegunError

    register_optimizer_step_post_hook(begun)
    with tempfile.TemporaryDirectory(prefix="carft-first-") as folder:
        try:
            run.run_training(recipe, Path(folder), prepared, RunContext())
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
                command = [sys.executable, "-m", "benchmarks.steps", "--begin", str(prepared) if epochs else "-"]
                began = time.time()
                done = subprocess.run(
                    [*command, "--epochs", str(epochs or 1)], cwd=ROOT, check=True, capture_output=True, text=True
                )
                times = json.loads(done.stdout.splitlines()[-1])
                if turn:
                    whole[name].append(times["done"] - began)
                    inner[name].append(times["done"] - times["imported"])
    opened, opened_s = (statistics.median(each["open"]) for each in (whole, inner))
    rows = []
    for name, images in (("short", cases["short"] * num_images), ("long", cases["long"] * num_images)):
        text = f"first step / opening the model, {images:,} targets"
        spread = f"({opened:.1f} s; {opened_s:.2f} s without the imports)"
        rows.append(median_row(f"{text} {spread}", [each / opened for each in whole[name]], FIRST_TARGET))
        rows.append(median_row(f"{text}, both without the imports", [each / opened_s for each in inner[name]], None))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all targets were reached, 1 not all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description="A step, and the first one.")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (%(default)s)")
    parser.add_argument("--begin", help=argparse.SUPPRESS)  # in a process of its own: folder of a preparation, or -
    parser.add_argument("--epochs", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.begin is not None:
        torch.set_num_threads(1)
        prepared = None if arguments.begin == "-" else Path(arguments.begin)
        print(json.dumps(first_step(prepared, arguments.epochs)))
        return 0
    found = [*step_rows(arguments.turns), *first_rows(arguments.turns)]
    print("\n".join(map(str, found)))
    return 0 if all(row.is_met for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
