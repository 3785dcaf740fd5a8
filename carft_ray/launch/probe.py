"""Measuring what the trainings of a search take: real trainings of two epochs on a share of the sets.

They run in the executor of the search and as many at a time (``evaluation.probe``). A training of E epochs on N images
is then forecast as

    rest + E (N image + save) + looks look + A (mix + R / r recalibrate + V / v evaluate) + V / v table

with V validation images (v in the share), R training images from which BatchNorm's statistics come (r; mostly none) and
A alphas; ``look`` is an evaluation during the training; ``image`` belongs to the kind of training (plain, targets from
the store, frozen model next to it) and to its batch size, between the smallest and the largest of which a step's time
is a straight line.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from carft_ray import files
from carft_ray.data.sets import cache_dir
from carft_ray.data.shared.shared_images import find_shared, without_shared
from carft_ray.errors import ClusterError, Problem
from carft_ray.launch.events import Event, TrialFinished
from carft_ray.launch.forecast import LEAST_DOUBT, OUTSIDE_S, Measured, interrupted, temporary
from carft_ray.launch.preparation import fill_nodes, run_prepare
from carft_ray.launch.ray_cluster.cluster import running_ray
from carft_ray.launch.ray_cluster.concurrency import Capacity
from carft_ray.launch.runtime import Runner, Runtime, fill, make_runtime
from carft_ray.launch.stop import interruptions_as
from carft_ray.launch.trainings import run_trainings
from carft_ray.layout import CONFIRM, RAY_LOG, STOP
from carft_ray.learning.target_blocks import visit_bytes
from carft_ray.recipe.schedule import has_intermediate_value, num_recalibrated, possible_values
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.grid import num_trials
from carft_ray.recipe.spaces.shared_targets import num_stored_visits, shared_views, views_of
from carft_ray.recipe.spaces.space import apply, drawn, middle
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import read_result
from carft_ray.study.recovery import recover_confirm

PROBE = "probe.json"
CHECKPOINT_WEIGHTS = 3  # weights and the two moments of AdamW
NUM_CHECKPOINTS = 2  # of a running training

Kind = Literal["plain", "stored", "online"]


@dataclass(frozen=True)
class Probed:
    """What the probes have found; seconds and bytes, means over those of the last wave.

    Attributes:
        prepared: As ``evaluation.probe.probe_prepare`` returns it.
        trainings: Parts of each kind of training at the smallest and the largest batch, by name.
        evaluation: Parts of an evaluation of the share, and its sizes.
    """

    prepared: Mapping[str, Any]
    trainings: Mapping[str, Mapping[str, float]]
    evaluation: Mapping[str, float]

    @property
    def times(self) -> float:
        """How many times the share all validation images are."""
        return float(self.prepared["num_validation"] / self.evaluation["num_evaluated"])


def measure_by_probe(
    recipe: Recipe,
    address: str | None = None,
    parent: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    runner: Runner | None = None,
) -> tuple[Capacity, Measured]:
    """Prepares and trains a little, as the search will; leaves nothing behind but decoded sets in the cache.

    Args:
        recipe: The recipe.
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        parent: Folder that every node of the cluster sees; None: the temporary folder of this machine.
        say: Given a text of what is being done.
        runner: What is run; by default ``evaluation.probe``.

    Raises:
        InterruptedRunError: Ctrl-C.
        ClusterError: There is no Ray, a training does not fit, or a probe failed.
        HoldOutError, RecipeError, DataError, StorageError: As ``run_search``.
    """
    began = time.monotonic()
    with temporary(parent) as folder, interruptions_as(interrupted, folder / STOP):
        recipe = without_shared(recipe, find_shared(recipe, cache_dir(recipe), say))
        say("starting Ray")
        with running_ray(address, folder / RAY_LOG, folder / STOP) as nodes:
            started_s = time.monotonic() - began
            runner = runner or Runner(probe_prepare, probe_training, fill)
            runtime = make_runtime(recipe, folder / "study", nodes, runner)
            found = _probe(runtime, started_s, say)
            ended = time.monotonic()
        after_s = time.monotonic() - ended
    return runtime.capacity, replace(found, took_s=time.monotonic() - began, after_s=after_s + OUTSIDE_S / 2)


def probe_prepare(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """``evaluation.probe.probe_prepare``, imported where it runs: the driver holds no torch."""
    from carft_ray.evaluation import probe

    return probe.probe_prepare(recipe, folder, say)


def probe_training(recipe: Recipe, out_dir: Path, prepared_dir: Path, context: Any, attempt: int) -> dict[str, Any]:
    """``evaluation.probe.probe_training``, imported where it runs."""
    from carft_ray.evaluation import probe

    return probe.probe_training(recipe, out_dir, prepared_dir, context, attempt)


def _probe(runtime: Runtime, started_s: float, say: Callable[[str], None]) -> Measured:
    """Returns what is measured while Ray runs, which took ``started_s`` to start: ``took_s``, ``after_s`` are 0."""
    recipe, capacity, study_dir = runtime.recipe, runtime.capacity, runtime.study_dir
    num_waves = 1 if runtime.nested else 2  # a process is used again inline: the second wave shows what that saves
    trainings, wave = _trainings(recipe), capacity.concurrency
    names = [f"probe-{number}-{place}" for number in range(num_waves) for place in range(wave)]
    ends: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, TrialFinished):
            ends.append(time.monotonic())

    with open_study(study_dir, recipe) as study:
        largest = max(values["batch_size"] for values in trainings.values())
        files.write_json(study_dir / PROBE, {"trainings": trainings, "largest_batch": largest, "peers": wave})
        say("preparing for a share of the sets")
        began = time.monotonic()
        filling_s = fill_nodes(runtime, say)  # the sets stay in the caches: the search will not build them again
        prepared = run_prepare(replace(runtime, is_filled=True), say)
        prepared_s = time.monotonic() - began
        recover_confirm(study, dict.fromkeys(names, middle(recipe.search.space)))
        say(f"training a little, {wave} at a time ({capacity.reason})")
        began = time.monotonic()
        if run_trainings(study, runtime, on_event):
            raise interrupted()
        for row in study.rows("confirm"):
            if row.outcome != "complete":
                step = "A training would end in the same way; run it by `carft-ray train` to see all of it."
                raise ClusterError(Problem("plan", f"the probe has failed: {row.reason}", next_step=step))
    results = [(read_result(study_dir / CONFIRM / name) or {})["probe"] for name in names]
    storing_s = [one.pop("storing_s") for one in results]  # which no training does
    results = results[-wave:]  # of the last wave: what a process does once is no part of the trainings that follow
    totals = [one.pop("inside_s") for one in results]
    parts = [one.pop("trainings") for one in results]
    before_s = [
        statistics.fmean(ends[i : i + wave]) - began - sum(storing_s[: i + wave]) / wave
        for i in range(0, len(names), wave)
    ]
    first_s = max(0.0, before_s[0] - statistics.fmean(totals))
    prepare_s = prepared_s - filling_s - prepared["inside_s"] + _prepare_s(recipe, prepared)
    spread = statistics.stdev(totals) / statistics.fmean(totals) if len(totals) > 1 else 0.0
    means = {name: _means([one[name] for one in parts]) for name in parts[0]}
    means_of_wave = _means(results)
    found = Probed(prepared, means, means_of_wave)
    return Measured(
        source="probe",
        took_s=0.0,
        before_s=OUTSIDE_S / 2 + started_s + prepare_s,
        after_s=0.0,
        first_s=first_s + _computing_s(recipe, found),
        next_s=first_s if num_waves == 1 else max(0.0, before_s[1] - before_s[0] - statistics.fmean(totals)),
        training_s=_training_s(recipe, found),
        doubt=max(LEAST_DOUBT, spread),
        disk=_disk(recipe, capacity, found),
        cores_needed=means_of_wave["view_s"] / means_of_wave["step_s"] if means_of_wave["step_s"] else 0.0,
    )


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def kind_of(recipe: Recipe, values: Mapping[str, Any]) -> Kind:
    """Returns how most trainings like it get the frozen model's targets: not at all, read, or computed then."""
    views = views_of(apply(recipe, values).train)
    if views is None:
        return "plain"
    return "stored" if recipe.resources.targets != "online" and views in shared_views(recipe) else "online"


def _trainings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Returns the values of the trainings that a probe runs: each kind at the smallest and the largest batch."""
    rng, centre = np.random.default_rng(0), middle(recipe.search.space)
    likely = [*recipe.search.baselines.values(), *(drawn(recipe.search.space, rng.uniform) for _ in range(50)), centre]
    kinds = dict.fromkeys(kind_of(recipe, values) for values in likely)
    if "stored" in kinds:
        kinds.setdefault("online")  # of those that are the first to need them
    given = [values.get("batch_size", recipe.train.batch_size) for values in recipe.search.baselines.values()]
    batches = {*given, *possible_values(recipe, "batch_size")}
    typical = {name: value for name, value in centre.items() if name not in ("epochs", "kl_weight", "batch_size")}
    kl_weight = next((one["kl_weight"] for one in likely if one.get("kl_weight")), recipe.train.kl_weight or 1.0)
    how: dict[Kind, dict[str, Any]] = {
        "plain": {"kl_weight": 0.0},
        "stored": {"kl_weight": kl_weight},
        "online": {"kl_weight": kl_weight},
    }
    micro = recipe.train.micro_batch
    return {
        f"{kind}-{batch}": {**typical, **how[kind], "batch_size": batch, "micro_batch": micro and min(micro, batch)}
        for kind in kinds
        for batch in dict.fromkeys((min(batches), max(batches)))
    }


def _computing_s(recipe: Recipe, found: Probed) -> float:
    """Returns what targets add to the first training of a slot, which finds none in the store."""
    values = middle(recipe.search.space)
    if kind_of(recipe, values) != "stored":
        return 0.0
    first, later = (_training_s(recipe, found, kind)(values) for kind in ("online", "stored"))
    return max(0.0, first - later)


def _training_s(recipe: Recipe, found: Probed, fixed: str = "") -> Callable[[Mapping[str, Any]], float]:
    """Returns the forecast of a training by its values, without what the executor adds.

    Args:
        recipe: The recipe.
        found: What the probes have found.
        fixed: Take every training for one of this kind.
    """
    once, times, num_train = found.evaluation, found.times, found.prepared["num_train"]
    alpha_s = once["mix_s"] + _more_images(recipe, found) * once["recalibrate_s"] + times * once["evaluate_s"]
    share_s = once["mix_s"] + once["recalibrate_s"] + once["evaluate_s"]
    sizes: dict[str, list[int]] = {}  # by kind
    for name in found.trainings:
        kind, _, batch = name.rpartition("-")
        sizes.setdefault(kind, []).append(int(batch))

    def training_s(values: Mapping[str, Any]) -> float:
        epochs = values.get("epochs", recipe.train.epochs)
        batch: int = values.get("batch_size", recipe.train.batch_size)
        wanted = fixed or kind_of(recipe, values)
        kind = wanted if wanted in sizes else next(iter(sizes))
        low, high = sizes[kind][0], sizes[kind][-1]
        part, largest = found.trainings[f"{kind}-{low}"], found.trainings[f"{kind}-{high}"]
        image_s = between(batch, low, high, part["image_s"], largest["image_s"])
        every, pruner = recipe.evaluate.every_epochs, recipe.search.pruner
        looks = sum(has_intermediate_value(every, pruner, epoch, epochs) for epoch in range(1, epochs + 1))
        rest_s = max(0.0, part["rest_s"] - part["num_alphas"] * share_s - once["table_s"])
        trained_s = epochs * (num_train * image_s + part["save_s"]) + looks * part["look_s"]
        return float(rest_s + trained_s + part["num_alphas"] * alpha_s + times * once["table_s"])

    return training_s


def _more_images(recipe: Recipe, found: Probed) -> float:
    """Returns how many times the images of the probe a training takes for its statistics of BatchNorm."""
    if not (num_batches := recipe.train.recalibrate_batches):
        return 1.0
    whole, share = (num_recalibrated(num_batches, int(found.prepared[name])) for name in ("num_train", "num_share"))
    return whole / share


def between(batch: int, low: int, high: int, low_image_s: float, high_image_s: float) -> float:
    """Returns seconds an image at a batch size, with the time of a step a straight line between two sizes."""
    if low == high:
        return low_image_s
    share = (batch - low) / (high - low)
    step_s = (1 - share) * low * low_image_s + share * high * high_image_s
    return step_s / batch


def _prepare_s(recipe: Recipe, prepared: Mapping[str, Any]) -> float:
    """Returns what the preparation of a search takes in its process, once the sets are in the cache."""
    times = prepared["num_validation"] / prepared["num_evaluated"]
    once_s = prepared["open_s"] + prepared["origin_s"] + prepared["heads_s"]
    return float(once_s + times * prepared["zero_shot_s"])


def _disk(recipe: Recipe, capacity: Capacity, found: Probed) -> dict[str, int]:
    trials, num_baselines = num_trials(recipe), len(recipe.search.baselines)
    weights_bytes = found.evaluation["weights_bytes"]
    kept = min(recipe.search.keep_checkpoints, trials) + num_baselines
    averages = recipe.train.ema_decay is not None or "ema_decay" in recipe.search.space
    in_checkpoint = CHECKPOINT_WEIGHTS + averages  # more than a training with frozen layers or LoRA needs
    return {
        "weights": int(kept * weights_bytes),
        "predictions": int((trials + num_baselines) * found.times * found.evaluation["predictions_bytes"]),
        "targets": num_stored_visits(recipe) * visit_bytes(found.prepared["num_train"], found.prepared["num_contexts"]),
        "cache": int(found.prepared["cache_bytes"]),
        "while it runs": int(capacity.concurrency * (NUM_CHECKPOINTS * in_checkpoint + 1) * weights_bytes),
    }
