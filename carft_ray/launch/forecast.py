"""What a search will take: trials at a time, time, GPU hours, disk. From short trainings.

As many short trainings as the search can run at a time are prepared and run as those of a search (``training.timing``).
A training of E epochs then takes

    fixed + E epoch + looks look

with ``look`` an evaluation during the training. The search runs them in rounds of as many as fit. What the space varies
enters by its mean. ``left_out`` says what may make the search shorter or longer.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from carft_ray import files
from carft_ray.data.cache import cache_dir
from carft_ray.data.duplicates.shared_images import find_shared
from carft_ray.errors import ClusterError, InterruptedRunError, Problem, interruption
from carft_ray.launch.cluster.capacity import Capacity
from carft_ray.launch.command import Plan, computing, prepare
from carft_ray.launch.run_trainings import run_trainings
from carft_ray.launch.workers.preparation import fill_nodes
from carft_ray.launch.workers.runtime import Say, decide_targets, num_stored_visits
from carft_ray.launch.workers.worker import RUNNER, there
from carft_ray.layout import KEPT_CHECKPOINTS
from carft_ray.recipe.schedule import has_intermediate_value
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import PENALTIES
from carft_ray.recipe.space import drawn, middle, num_trials
from carft_ray.study.opening import open_study
from carft_ray.study.take_over import recover_given
from carft_ray.study.training import result_of

NUM_DRAWS = 1000  # of the values of a trial
OUTSIDE_S = 10.0  # imports, start and end of Ray, table, figure
CONFIRMED, SEEDS = 3, 3  # of `confirm`, unless it is told otherwise: trials beside the baselines, seeds of each


def forecast(recipe: Recipe, capacity: Capacity, measured: Mapping[str, float]) -> dict[str, Any]:
    """Returns what a whole search will take, as plain data; seconds, hours and bytes.

    Args:
        recipe: The recipe.
        capacity: How its trainings fit.
        measured: As ``measure`` returns it.
    """
    rng, space, given = np.random.default_rng(0), recipe.search.space, recipe.search.baselines.values()
    trials, baselines, start_s = num_trials(recipe), len(given), measured["start_s"]
    trial_s = statistics.fmean(_training_s(recipe, measured, drawn(space, rng.uniform)) for _ in range(NUM_DRAWS))
    baselines_s = sum(_training_s(recipe, measured, values) for values in given)
    slots = max(1, min(capacity.concurrency, trials + baselines))
    # a winner with penalties is trained without them, too
    penalised = recipe.train.function is None and any(
        name in space or getattr(recipe.train, name) for name in PENALTIES
    )
    held_hours = (trials * trial_s + baselines_s + slots * start_s) * capacity.num_workers / 3600

    def lasts_s(trials: int, seeds: int) -> float:
        mean_s = (trials * trial_s + baselines_s) / (trials + baselines)
        rounds = num_rounds((trials + baselines) * seeds, slots, measured["alone"])
        return round(OUTSIDE_S + measured["prepare_s"] + start_s + rounds * mean_s, 1)

    kept = min(recipe.search.keep_checkpoints, trials) + baselines
    soups = sum(2 if kind == "repeats" else 1 for kind in recipe.search.soups)
    disk = {
        "weights": (kept + soups) * measured["weights"],
        "predictions": (trials + baselines) * measured["predictions"],
        "targets": num_stored_visits(recipe) * measured["targets"],
        "cache": measured["cache"],
        "while it runs": slots * (KEPT_CHECKPOINTS * measured["checkpoint"] + measured["weights"]),
    }
    left_out = {
        "weights, price and hours of confirm": True,
        "failed trainings and further attempts": True,
        "searched values other than epochs": True,
        "trainings that the pruner ends early": recipe.search.pruner.name != "none",
        "nodes that join later": capacity.asked > 0,
        "time of soups": soups > 0,
    }
    return {
        "concurrency": capacity.concurrency,
        "limited_by": capacity.reason,
        "num_trials": trials,
        "num_baselines": baselines,
        "trial_s": round(trial_s, 1),
        "search_s": lasts_s(trials, 1),
        "confirm_s": lasts_s(min(CONFIRMED, trials) + int(penalised), SEEDS),
        "cpu_hours": round(held_hours * capacity.cpus_per_worker, 5),
        "gpu_hours": round(held_hours * capacity.gpus_per_worker, 5),
        "disk_bytes": {name: int(size) for name, size in disk.items()},
        "left_out": [text for text, applies in left_out.items() if applies],
    }


def num_rounds(trainings: int, slots: int, alone: float) -> float:
    """Returns how many times as long as one training all of them take, ``slots`` at a time.

    The last ones, if they leave slots free, are faster where slots share cores; ``alone`` is the limit of that.
    """
    full, rest = divmod(trainings, slots)
    return full + (max(alone, rest / slots) if rest else 0)


def _training_s(recipe: Recipe, measured: Mapping[str, float], values: Mapping[str, Any]) -> float:
    epochs = values.get("epochs", recipe.train.epochs)
    every, pruner = recipe.evaluate.every_epochs, recipe.search.pruner
    looks = sum(has_intermediate_value(every, pruner, epoch, epochs) for epoch in range(1, epochs + 1))
    return float(measured["fixed_s"] + epochs * measured["epoch_s"] + looks * measured["look_s"])


def _interrupted() -> InterruptedRunError:
    return interruption("stopped; nothing is left behind", "")


def measure(recipe: Recipe, address: str | None, parent: Path, say: Say) -> tuple[Capacity, dict[str, float]]:
    """Prepares and trains a little, as the search will; leaves nothing behind but what it adds to the cache.

    Args:
        recipe: The recipe.
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        parent: Folder in which one is made for them.
        say: Given a text of what is being done.

    Returns:
        How trainings fit; and the means of what ``training.timing`` measures, with ``prepare_s`` of the preparation,
        ``start_s`` of the first training of a slot besides itself (process, model, sets, the frozen model's targets),
        ``alone``, the share of its time that a training takes with nothing beside it (less than 1 if slots share
        cores), and the bytes of the ``targets`` of an epoch.

    Raises:
        InterruptedRunError: Ctrl-C.
        ClusterError: There is no Ray, a training does not fit, or one has failed.
        HoldOutError, RecipeError, DataError, StorageError: As ``run_search``.
    """
    with files.writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".carft-plan-", dir=parent, ignore_cleanup_errors=True) as folder,
        open_study(Path(folder) / "study", recipe) as study,
    ):
        shared = find_shared(recipe, cache_dir(recipe), say)
        runner = replace(RUNNER, train=partial(there, "carft_ray.training.timing:run_timed"))
        plan = Plan(recipe, study.study_dir, address, runner=runner, shared=shared)
        with computing(plan, study, _interrupted, say) as runtime:
            fill_nodes(runtime, say)  # not timed: the sets stay in the caches, and the search will not build them again
            begins = time.monotonic()
            prepared, capacity = prepare(study, runtime, say), runtime.capacity
            prepare_s = time.monotonic() - begins
            # a seed of its own: an earlier plan has not stored the frozen model's targets
            values = {**middle(recipe.search.space), "seed": time.time_ns() % 2**31}
            slots = max(1, min(capacity.concurrency, num_trials(recipe) + len(recipe.search.baselines)))
            recover_given(study, dict.fromkeys((f"short-{number}" for number in range(slots)), values))
            limit = capacity.reason if slots == capacity.concurrency else "the search has no more trainings"
            say(f"running short trainings, {slots} at a time ({limit})")
            fixed = replace(capacity, concurrency=slots, asked=0)  # nodes that come meanwhile are for the search
            decided, _ = decide_targets(runtime.recipe)
            runtime = replace(runtime, recipe=decided, capacity=fixed, attached=False)
            if run_trainings(study, runtime, lambda event: None):
                raise _interrupted()
            trained_s = time.monotonic() - begins - prepare_s
        rows = study.rows("confirm")
        if failed := [row.reason for row in rows if row.outcome != "complete"]:
            step = "A full training would fail in the same way; run it with `carft-ray train` to see all of it."
            raise ClusterError(Problem("plan", f"a short training has failed: {failed[0]}", next_step=step))
        results = [result_of(study.study_dir, row)["probe"] for row in rows]
    mean = {name: statistics.fmean(each[name] for each in results) for name in results[0]}
    # where targets are stored, the first training of a slot computes them
    epochs = values.get("epochs", recipe.train.epochs) if num_stored_visits(recipe) else 0
    computing_s = max(0.0, epochs * (mean["first_epoch_s"] - mean["epoch_s"]))
    return capacity, mean | {
        "prepare_s": prepare_s,
        "start_s": max(0.0, trained_s - mean["inside_s"]) + computing_s,
        "alone": 1.0 if capacity.gpus_per_worker else min(1.0, mean["busy"]),
        "targets": prepared["num_images"]["train"] * prepared["num_contexts"] * 2,  # float16
    }


def beyond_budget(recipe: Recipe, found: Mapping[str, Any]) -> str:
    """Returns which limit of the recipe's budget the search will reach, in a sentence; empty for none."""
    for name, unit, expected in (("wall_time", " s", found["search_s"]), ("gpu_hours", "", found["gpu_hours"])):
        limit = getattr(recipe.budget, name)
        if limit is not None and expected > limit:
            return f"budget.{name} ({limit:g}{unit}) will end the search after about {limit / expected:.0%}."
    return ""
