"""What a search will take: trials at a time, time, GPU hours, disk. From short trainings.

Two short trainings for each slot that the search can use are prepared and run as those of a search
(``training.probe``). The second one of a slot shows what a process saves that is used again, and reads the targets that
the first one has stored. A training of E epochs then takes

    fixed + E epoch + looks look

with ``look`` an evaluation during the training. What the space varies enters by its expectation: ``NUM_SEARCHES``
searches with values drawn as random search draws them are laid onto the slots, first come first served; the forecast is
their mean, the range is from their 10th to their 90th percentile, and further by how much the short trainings differed.
No training is taken to be cut.
"""

import heapq
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from carft_ray import files
from carft_ray.data.cache import cache_dir
from carft_ray.data.copies.shared_images import find_shared
from carft_ray.errors import ClusterError, InterruptedRunError, Problem
from carft_ray.launch.preparation import fill_nodes
from carft_ray.launch.ray_cluster.concurrency import Capacity
from carft_ray.launch.runtime import RUNNER, Say, there
from carft_ray.launch.session import computing, prepare
from carft_ray.launch.stop import interruption
from carft_ray.launch.trainings import run_trainings
from carft_ray.layout import KEPT_CHECKPOINTS
from carft_ray.recipe.schedule import has_intermediate_value
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.shared_targets import decide_targets, num_stored_visits
from carft_ray.recipe.space.grid import num_trials
from carft_ray.recipe.trial_values import drawn, middle
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import result_of
from carft_ray.study.recovery import recover_confirm

NUM_SEARCHES = 200
LEAST_DOUBT = 0.1  # of every forecast: the machine is never quite as it was
OUTSIDE_S = 5.0  # before Ray starts and after the last training: imports; the end of Ray, table, figure
CONFIRMED, SEEDS = 3, 3  # of `confirm`, unless it is told otherwise: trials beside the baselines, seeds of each


@dataclass(frozen=True)
class Measured:
    """What is known of the trainings of a search.

    Attributes:
        took_s: Seconds that measuring took.
        prepare_s: Seconds from the start of Ray until the first training begins.
        training_s: Forecast of a training, by its values over ``train``.
        doubt: Relative uncertainty of every time.
        first_s: What the first training of a slot takes besides itself: process, model, sets, targets.
        next_s: The same for each further one.
        alone: Which share of its time a training takes with nothing beside it: less than 1 where slots share cores.
        sizes: Bytes: ``weights`` and ``predictions`` of a training, ``targets`` of an epoch, further ones in all.
        step: What ``micro_batch_to_begin_with`` found on a GPU, the smallest one.
    """

    took_s: float
    prepare_s: float
    training_s: Callable[[Mapping[str, Any]], float]
    doubt: float
    first_s: float = 0.0
    next_s: float = 0.0
    alone: float = 1.0
    sizes: dict[str, float] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)


def forecast(recipe: Recipe, capacity: Capacity, measured: Measured) -> dict[str, Any]:
    """Returns what a whole search will take, as plain data; seconds, hours and bytes.

    Each of ``trial_s``, ``search_s``, ``confirm_s``, ``cpu_hours`` and ``gpu_hours`` is (expected, low, high).
    """
    rng, ranges = np.random.default_rng(0), defaultdict[str, list[float]](list)
    trials, baselines = num_trials(recipe), list(recipe.search.baselines.values())
    slots, first_s, next_s = capacity.concurrency, measured.first_s, measured.next_s
    units = {"cpu_hours": capacity.cpus_per_worker, "gpu_hours": capacity.gpus_per_worker}
    for _ in range(NUM_SEARCHES):
        values = [*baselines, *(drawn(recipe.search.space, rng.uniform) for _ in range(trials))]
        jobs = [measured.training_s(one) for one in values]
        again = [*jobs[: len(baselines)], *jobs[-CONFIRMED:]] * SEEDS
        work_s = sum(jobs) + len(jobs) * next_s + min(slots, len(jobs)) * (first_s - next_s)
        ranges["trial_s"] += [job + next_s for job in jobs[len(baselines) :]]
        for name, each in (("search_s", jobs), ("confirm_s", again)):
            ranges[name].append(OUTSIDE_S + measured.prepare_s + makespan(each, slots, first_s, next_s, measured.alone))
        for name, number in units.items():
            ranges[name].append(work_s * capacity.num_workers * number / 3600)
    numbers = {
        "weights": min(recipe.search.keep_checkpoints, trials) + len(baselines),
        "predictions": trials + len(baselines),
        "targets": num_stored_visits(recipe),
    }
    return {
        "concurrency": capacity.concurrency,
        "limited_by": capacity.reason,
        "num_trials": trials,
        "num_baselines": len(baselines),
        "num_workers": capacity.num_workers,
        **{name: getattr(capacity, name) for name in ("gpus_per_worker", "cpus_per_worker")},
        "prepare_s": round(measured.prepare_s, 1),
        **{name: _range(values, measured.doubt) for name, values in ranges.items()},
        "step": measured.step,
        "disk_bytes": {name: int(numbers.get(name, 1) * size) for name, size in measured.sizes.items()},
        "measured": {"took_s": round(measured.took_s, 1), "doubt": round(measured.doubt, 3)},
    }


def makespan(jobs: Sequence[float], slots: int, first_s: float, next_s: float, alone: float = 1.0) -> float:
    """Returns how long jobs take that are begun in their order, each on the slot that is free first.

    Args:
        jobs: Seconds of each, with all slots in use.
        slots: How many run at a time.
        first_s: Added to the first job of a slot.
        next_s: Added to each further one.
        alone: Which share of its time a job takes alone. At the end, when slots become free, the others are faster.

    Slots for which there is no job count for nothing: ``measure_by_training`` uses none of them either.
    """
    free = [(0.0, True)] * max(1, min(slots, len(jobs)))
    for job in jobs:
        at, fresh = heapq.heappop(free)
        heapq.heappush(free, (at + job + (first_s if fresh else next_s), False))
    ends = [0.0, *sorted(at for at, _ in free)]
    used = [max(alone, number / len(free)) for number in range(len(free), 0, -1)]
    return sum((end - before) * share for (before, end), share in zip(pairwise(ends), used, strict=True))


def _range(values: Sequence[float], doubt: float) -> tuple[float, ...]:
    low, high = np.percentile(values, [10, 90])
    # relative, to an end that never becomes negative however large the doubt
    return tuple(float(f"{each:.6g}") for each in (statistics.fmean(values), low / (1 + doubt), high * (1 + doubt)))


def _interrupted() -> InterruptedRunError:
    return interruption("stopped; nothing is left behind", "")


def measure_by_training(recipe: Recipe, address: str | None, parent: Path, say: Say) -> tuple[Capacity, Measured]:
    """Prepares and trains a little, as the search will; leaves nothing behind but what it adds to the cache.

    Args:
        recipe: The recipe.
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        parent: Folder in which one is made for them.
        say: Given a text of what is being done.

    Raises:
        InterruptedRunError: Ctrl-C.
        ClusterError: There is no Ray, a training does not fit, or one has failed.
        HoldOutError, RecipeError, DataError, StorageError: As ``run_search``.
    """
    began = time.time()
    with files.writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".carft-plan-", dir=parent, ignore_cleanup_errors=True) as folder,
        open_study(Path(folder) / "study", recipe) as study,
    ):
        shared = find_shared(recipe, cache_dir(recipe), say)
        runner, starts = replace(RUNNER, train=partial(there, "carft_ray.training.probe:run_probe")), time.time()
        with computing(study, recipe, runner, address, _interrupted, say, shared) as runtime:
            ready = time.time()
            fill_nodes(runtime, say)  # the sets stay in the caches: the search will not build them again
            filling_s = time.time() - ready
            prepared = prepare(study, runtime, say)
            begins, capacity = time.time(), runtime.capacity
            # a seed of its own: an earlier plan has not stored the frozen model's targets
            values = {**middle(recipe.search.space), "seed": time.time_ns() % 2**31}
            slots = min(capacity.concurrency, num_trials(recipe) + len(recipe.search.baselines))
            names = [f"short-{number}" for number in range(2 * slots)]
            recover_confirm(study, dict.fromkeys(names, values))
            limit = capacity.reason if slots == capacity.concurrency else "the search has no more trainings"
            say(f"training a little, {slots} at a time ({limit})")
            fixed = replace(capacity, concurrency=slots, asked=0)  # nodes that come meanwhile are for the search
            decided, _ = decide_targets(runtime.recipe)
            runtime = replace(runtime, recipe=decided, capacity=fixed, attached=False)
            if run_trainings(study, runtime, lambda event: None):
                raise _interrupted()
        rows = study.rows("confirm")
        if failed := [row.reason for row in rows if row.outcome != "complete"]:
            step = "A full training would fail in the same way; run it with `carft-ray train` to see all of it."
            raise ClusterError(Problem("plan", f"a short training has failed: {failed[0]}", next_step=step))
        results = [result_of(study.study_dir, row)["probe"] for row in rows]
    steps = [each.pop("step") for each in results]
    every, pruner = recipe.evaluate.every_epochs, recipe.search.pruner
    first, later = _means(results[:slots]), _means(results[slots:])
    # where targets are stored, the first training of a slot computes them
    epochs = values.get("epochs", recipe.train.epochs) if num_stored_visits(recipe) else 0
    computing_s = epochs * (first["epoch_s"] - later["epoch_s"])

    def training_s(values: Mapping[str, Any]) -> float:
        epochs = values.get("epochs", recipe.train.epochs)
        looks = sum(has_intermediate_value(every, pruner, epoch, epochs) for epoch in range(1, epochs + 1))
        return float(later["fixed_s"] + epochs * later["epoch_s"] + looks * later["look_s"])

    return capacity, Measured(
        took_s=time.time() - began,
        prepare_s=begins - starts - filling_s,
        first_s=max(0.0, first["ended"] - begins - first["inside_s"] + max(0.0, computing_s)),
        next_s=max(0.0, later["ended"] - first["ended"] - later["inside_s"]),
        alone=1.0 if capacity.gpus_per_worker else min(1.0, later["cpu_s"] / later["inside_s"]),
        training_s=training_s,
        doubt=max(LEAST_DOUBT, statistics.pstdev(each["inside_s"] for each in results[slots:]) / later["inside_s"]),
        step=min(steps, key=lambda step: step.get("micro_batch", 0)),
        sizes={
            "weights": later["weights"],
            "predictions": later["predictions"],
            "targets": prepared["num_images"]["train"] * prepared["num_contexts"] * 2,  # float16
            "cache": later["cache"],
            "while it runs": slots * (KEPT_CHECKPOINTS * later["checkpoint"] + later["weights"]),
        },
    )


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def beyond_budget(recipe: Recipe, found: Mapping[str, Any]) -> str:
    """Returns which limit of the recipe's budget the search will reach, in a sentence; empty for none."""
    limits = (("wall_time", " s", found["search_s"][0]), ("gpu_hours", "", found["gpu_hours"][0]))
    for name, unit, expected in limits:
        limit = getattr(recipe.budget, name)
        if limit is not None and expected > limit:
            return f"budget.{name} ({limit:g}{unit}) will end the search after about {limit / expected:.0%}."
    return ""


def price(found: Mapping[str, Any], per_gpu_hour: float | None, per_hour: float | None) -> tuple[float, ...] | None:
    """Returns (expected, low, high) of the money that a search costs; None without a price.

    Args:
        found: The forecast.
        per_gpu_hour: Of one GPU, while trainings hold it.
        per_hour: Of the whole machine or cluster, from the start of the search to its end.
    """
    if per_gpu_hour is not None:
        return tuple(round(hours * per_gpu_hour, 4) for hours in found["gpu_hours"])
    return None if per_hour is None else tuple(round(seconds / 3600 * per_hour, 4) for seconds in found["search_s"])
