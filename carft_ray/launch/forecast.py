"""What a search will take: trials at a time, time, GPU hours, disk. From a probe, or a study that has trained.

The probe prepares for a share of the sets and runs real trainings of two epochs on it, in the executor of the search
and as many at a time (``evaluation.probe``). A training of E epochs on N images is then forecast as

    rest + E (N image + save) + looks look + A (mix + R / r recalibrate + V / v evaluate) + V / v table

with V validation images (v in the share), R training images from which BatchNorm's statistics come (r; mostly none) and
A alphas; ``image`` belongs to the kind of training (plain, targets from
the store, frozen model beside it) and to its batch size, between the smallest and the largest of which a step's time is
a straight line. What the space varies enters by its expectation: ``NUM_SEARCHES`` searches with values drawn as random
search draws them are laid onto the slots, first come first served; the forecast is their mean, the range goes from
their 10th to their 90th percentile, and further by how much the probes differed. No training is taken to be cut.
"""

import contextlib
import heapq
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from carft_ray import files
from carft_ray.data.sets import cache_dir
from carft_ray.data.shared.shared_images import find_shared, without_shared
from carft_ray.errors import ClusterError, InterruptedRunError, Problem
from carft_ray.launch.events import Event, TrialFinished
from carft_ray.launch.preparation import fill_nodes, run_prepare
from carft_ray.launch.ray_cluster.cluster import Capacity, running_ray
from carft_ray.launch.runtime import RUNNER, Runner, Runtime, fill, make_runtime
from carft_ray.launch.signals import interruptions_as
from carft_ray.launch.trainings import run_trainings
from carft_ray.layout import CONFIRM, PREPARATION, PREPARED, RAY_LOG, STOP, TARGETS
from carft_ray.recipe.schedule import has_intermediate_value, num_recalibrated, possible_values
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.draws import drawn, middle
from carft_ray.recipe.spaces.grid import num_trials
from carft_ray.recipe.spaces.space import apply
from carft_ray.study.identity import claim
from carft_ray.study.outcome import TrialRow, read_result
from carft_ray.study.rows import ZERO_SHOT, rows_by_kind
from carft_ray.study.study import open_study

NUM_SEARCHES = 200
LEAST_DOUBT = 0.1  # of every forecast: the machine is never quite as it was
OUTSIDE_S = 4.0  # before Ray starts and after it has ended: imports, table, figure
PROBE = "probe.json"
VIEWS = ("seed", "crop_scale", "context_scale", "precision")  # a training with others finds no stored targets
CHECKPOINT_WEIGHTS = 3  # weights and the two moments of AdamW
NUM_CHECKPOINTS = 2  # of a running training

Kind = Literal["plain", "stored", "online"]


@dataclass(frozen=True)
class Measured:
    """What is known of the trainings of a search.

    Attributes:
        source: ``probe`` or ``study``.
        took_s: Seconds that measuring took.
        before_s: Seconds until the first training begins, Ray included.
        after_s: Seconds from the end of the last training to the end of the command.
        first_s: What the first training of a slot takes besides itself: process, model and sets.
        next_s: The same for each further one.
        training_s: Forecast of a training, by its values over ``train``.
        doubt: Relative uncertainty of every time.
        disk: Bytes by what they hold, at the end of the search; ``while it runs`` more in between.
    """

    source: Literal["probe", "study"]
    took_s: float
    before_s: float
    after_s: float
    first_s: float
    next_s: float
    training_s: Callable[[Mapping[str, Any]], float]
    doubt: float
    disk: dict[str, int] = field(default_factory=dict)


def forecast(recipe: Recipe, capacity: Capacity, measured: Measured) -> dict[str, Any]:
    """Returns what a whole search will take, as plain data; seconds, hours and bytes.

    Each of ``trial_s``, ``search_s``, ``cpu_hours`` and ``gpu_hours`` is (expected, low, high).
    """
    rng = np.random.default_rng(0)
    trials, baselines = num_trials(recipe), list(recipe.search.baselines.values())
    spans, works, each = [], [], []
    for _ in range(NUM_SEARCHES):
        values = [*baselines, *(drawn(recipe.search.space, rng) for _ in range(trials))]
        jobs = [measured.training_s(one) for one in values]
        each += jobs[len(baselines) :]
        spans.append(makespan(jobs, capacity.concurrency, measured.first_s, measured.next_s))
        slots = min(capacity.concurrency, len(jobs))
        works.append(sum(jobs) + slots * measured.first_s + (len(jobs) - slots) * measured.next_s)
    fixed = measured.before_s + measured.after_s
    cpu_s = capacity.num_workers * capacity.cpus_per_worker
    gpu_s = capacity.num_workers * capacity.gpus_per_worker
    return {
        "concurrency": capacity.concurrency,
        "limited_by": capacity.reason,
        "num_trials": trials,
        "num_baselines": len(baselines),
        "num_workers": capacity.num_workers,
        "gpus_per_worker": capacity.gpus_per_worker,
        "prepare_s": round(measured.before_s, 1),
        "trial_s": _range([one + measured.next_s for one in each], measured.doubt),
        "search_s": _range([span + fixed for span in spans], measured.doubt),
        "cpu_hours": _range([work * cpu_s / 3600 for work in works], measured.doubt),
        "gpu_hours": _range([work * gpu_s / 3600 for work in works], measured.doubt),
        "disk_bytes": measured.disk,
        "measured": {"by": measured.source, "took_s": round(measured.took_s, 1), "doubt": round(measured.doubt, 3)},
    }


def makespan(jobs: Sequence[float], slots: int, first_s: float, next_s: float) -> float:
    """Returns how long jobs take that are begun in their order, each on the slot that is free first.

    Args:
        jobs: Seconds of each.
        slots: How many run at a time.
        first_s: Added to the first job of a slot.
        next_s: Added to each further one.
    """
    free = [(0.0, True)] * max(1, min(slots, len(jobs)))
    for job in jobs:
        at, fresh = heapq.heappop(free)
        heapq.heappush(free, (at + job + (first_s if fresh else next_s), False))
    return max(at for at, _ in free) if jobs else 0.0


def _range(values: Sequence[float], doubt: float) -> tuple[float, float, float]:
    low, high = np.percentile(values, [10, 90])
    mean = statistics.fmean(values)
    # relative, to an end that never becomes negative however large the doubt
    return tuple(float(f"{each:.6g}") for each in (mean, low / (1 + doubt), high * (1 + doubt)))  # type: ignore[return-value]


def measure_by_probe(
    recipe: Recipe,
    address: str | None = None,
    beside: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    runner: Runner | None = None,
) -> tuple[Capacity, Measured]:
    """Prepares and trains a little, as the search will; leaves nothing behind but decoded sets in the cache.

    Args:
        recipe: The recipe.
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        beside: Folder that every node of the cluster sees; None: the temporary folder of this machine.
        say: Told what is being done.
        runner: What is run; by default ``evaluation.probe``.

    Raises:
        InterruptedRunError: Ctrl-C.
        ClusterError: There is no Ray, a training does not fit, or a probe failed.
        HoldOutError, RecipeError, DataError, StorageError: As ``run_search``.
    """
    began = time.monotonic()
    with _temporary(beside) as folder, interruptions_as(_interrupted, folder / STOP):
        shared = find_shared(recipe, cache_dir(recipe), say)
        recipe = without_shared(recipe, shared)
        checked = time.monotonic()
        say("starting Ray")
        with running_ray(address, folder / RAY_LOG, folder / STOP) as nodes:
            ray_s = time.monotonic() - checked
            plan = make_runtime(recipe, folder / "study", nodes, runner or Runner(probe_prepare, probe_training, fill))
            found = _probe(plan, say)
            ended = time.monotonic()
        after_s = time.monotonic() - ended
    before_s = OUTSIDE_S / 2 + (checked - began) + ray_s + found["prepare_s"]
    doubt = max(LEAST_DOUBT, found["spread"])
    measured = Measured(
        "probe",
        time.monotonic() - began,
        before_s,
        after_s + OUTSIDE_S / 2,
        found["first_s"],
        found["next_s"],
        _training_s(recipe, found),
        doubt,
        _disk(recipe, plan.capacity, found),
    )
    return plan.capacity, measured


def probe_prepare(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """``evaluation.probe.probe_prepare``, imported where it runs: the driver holds no torch."""
    from carft_ray.evaluation import probe

    return probe.probe_prepare(recipe, folder, say)


def probe_training(recipe: Recipe, out_dir: Path, prepared_dir: Path, context: Any, attempt: int) -> dict[str, Any]:
    """``evaluation.probe.probe_training``, imported where it runs."""
    from carft_ray.evaluation import probe

    return probe.probe_training(recipe, out_dir, prepared_dir, context, attempt)


def _interrupted() -> InterruptedRunError:
    return InterruptedRunError(Problem("", "stopped; nothing is left behind"))


@contextlib.contextmanager
def _temporary(beside: Path | None) -> Iterator[Path]:
    if beside is not None:
        with files.writing(beside):
            beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".carft-plan-", dir=beside)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _probe(plan: Runtime, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the probes; returns their times, means over those of the last wave."""
    recipe, capacity, study_dir = plan.recipe, plan.capacity, plan.study_dir
    num_waves = 1 if plan.nested else 2  # a process is used again inline: the second wave shows what that saves
    values = middle(recipe.search.space)
    trainings = _trainings(recipe)
    batches = [one["batch_size"] for one in trainings.values()]
    names = [f"probe-{wave}-{number}" for wave in range(num_waves) for number in range(capacity.concurrency)]
    ends: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, TrialFinished):
            ends.append(time.monotonic())

    with open_study(study_dir, recipe) as study:
        given = {"trainings": trainings, "largest_batch": max(batches), "peers": capacity.concurrency}
        files.write_json(study_dir / PROBE, given)
        say("preparing for a share of the sets")
        began = time.monotonic()
        filling_s = fill_nodes(plan, say)  # the sets stay in the caches: the search will not build them again
        prepared = run_prepare(replace(plan, is_filled=True), say)
        prepared_s = time.monotonic() - began
        study.recover_confirm(dict.fromkeys(names, values))
        say(f"training a little, {capacity.concurrency} at a time ({capacity.reason})")
        began = time.monotonic()
        if run_trainings(study, plan, on_event):
            raise _interrupted()
        _check(study.rows("confirm"))
    results = [(read_result(study_dir / CONFIRM / name) or {})["probe"] for name in names]
    wave = capacity.concurrency
    at = [statistics.fmean(ends[i : i + wave]) - began for i in range(0, len(names), wave)]
    results = results[-wave:]  # what a process does once is no part of the trainings that follow
    totals = [one["inside_s"] for one in results]
    first_s = max(0.0, at[0] - statistics.fmean(totals))
    next_s = first_s if num_waves == 1 else max(0.0, at[1] - at[0] - statistics.fmean(totals))
    parts = {
        name: {key: statistics.fmean(one["trainings"][name][key] for one in results) for key in each}
        for name, each in results[0]["trainings"].items()
    }
    others = [key for key in results[0] if key not in ("inside_s", "trainings")]
    return {
        "first_s": first_s,
        "next_s": next_s,
        "parts": parts,
        "trainings": trainings,
        "spread": statistics.stdev(totals) / statistics.fmean(totals) if len(totals) > 1 else 0.0,
        **{key: statistics.fmean(one[key] for one in results) for key in others},
        "prepared": prepared,
        "prepare_s": prepared_s - filling_s - prepared["inside_s"] + _prepare_s(recipe, prepared),
    }


def _check(rows: Sequence[TrialRow]) -> None:
    for row in rows:
        if row.outcome != "complete":
            step = "A training would end in the same way; run it by `carft-ray train` to see all of it."
            raise ClusterError(Problem("plan", f"the probe has failed: {row.reason}", next_step=step))


def kind_of(recipe: Recipe, values: Mapping[str, Any]) -> Kind:
    """Returns how a training gets the frozen model's context distributions: not at all, stored, or computed then."""
    train = apply(recipe, values).train
    if train.kl_weight == 0:
        return "plain"
    views = any(name in recipe.search.space for name in VIEWS[1:3])
    other = any(getattr(train, name) != getattr(recipe.train, name) for name in VIEWS)
    return "online" if views or other else "stored"


def _trainings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Returns the values of the trainings that a probe runs: each kind at the smallest and the largest batch."""
    rng, centre = np.random.default_rng(0), middle(recipe.search.space)
    likely = [*recipe.search.baselines.values(), *(drawn(recipe.search.space, rng) for _ in range(50)), centre]
    kinds = dict.fromkeys(kind_of(recipe, values) for values in likely)
    given = [values.get("batch_size", recipe.train.batch_size) for values in recipe.search.baselines.values()]
    batches = sorted({*given, *possible_values(recipe, "batch_size")})
    typical = {name: value for name, value in centre.items() if name not in ("epochs", "kl_weight", "batch_size")}
    kl_weight = next((one["kl_weight"] for one in likely if one.get("kl_weight")), recipe.train.kl_weight or 1.0)
    how: dict[Kind, dict[str, Any]] = {
        "plain": {"kl_weight": 0.0},
        "stored": {"kl_weight": kl_weight},
        "online": {"kl_weight": kl_weight, "seed": recipe.train.seed + 1},
    }
    micro = recipe.train.micro_batch
    return {
        f"{kind}-{batch}": {**typical, **how[kind], "batch_size": batch, "micro_batch": micro and min(micro, batch)}
        for kind in kinds
        for batch in dict.fromkeys((batches[0], batches[-1]))
    }


def _training_s(recipe: Recipe, found: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], float]:
    """Returns the forecast of a training by its values, without what the executor adds."""
    prepared, parts = found["prepared"], found["parts"]
    times = prepared["num_validation"] / found["num_evaluated"]
    alpha_s = found["mix_s"] + _more_images(recipe, prepared) * found["recalibrate_s"] + times * found["evaluate_s"]
    share_s = found["mix_s"] + found["recalibrate_s"] + found["evaluate_s"]
    sizes: dict[str, list[int]] = {}  # by kind
    for name in parts:
        kind, _, batch = name.rpartition("-")
        sizes.setdefault(kind, []).append(int(batch))

    def training_s(values: Mapping[str, Any]) -> float:
        epochs = values.get("epochs", recipe.train.epochs)
        batch: int = values.get("batch_size", recipe.train.batch_size)
        wanted = kind_of(recipe, values)
        kind = wanted if wanted in sizes else next(iter(sizes))
        low, high = f"{kind}-{sizes[kind][0]}", f"{kind}-{sizes[kind][-1]}"
        image_s = between(batch, sizes[kind][0], sizes[kind][-1], parts[low]["image_s"], parts[high]["image_s"])
        part = parts[low]
        looks = sum(
            has_intermediate_value(recipe.evaluate.every_epochs, recipe.search.pruner, epoch, epochs)
            for epoch in range(1, epochs + 1)
        )
        rest_s = max(0.0, part["rest_s"] - part["num_alphas"] * share_s - found["table_s"])
        trained_s = epochs * (prepared["num_train"] * image_s + part["save_s"]) + looks * part["look_s"]
        return float(rest_s + trained_s + part["num_alphas"] * alpha_s + times * found["table_s"])

    return training_s


def _more_images(recipe: Recipe, prepared: Mapping[str, Any]) -> float:
    """Returns how many times the images of the probe a training takes for its statistics of BatchNorm."""
    num_batches = recipe.train.recalibrate_batches
    if not num_batches:
        return 1.0
    whole, share = (num_recalibrated(num_batches, int(prepared[name])) for name in ("num_train", "num_stored"))
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
    stored_s = num_visits(recipe) * prepared["store_s"] * prepared["num_train"] / prepared["num_stored"]
    once_s = prepared["open_s"] + prepared["origin_s"] + prepared["heads_s"]
    return float(once_s + times * prepared["zero_shot_s"] + stored_s)


def num_visits(recipe: Recipe) -> int:
    """Returns how many epochs of targets the store of a search holds."""
    space = recipe.search.space
    if any(name in space for name in VIEWS[1:3]) or (recipe.train.kl_weight == 0 and "kl_weight" not in space):
        return 0
    parameter = space.get("epochs")
    return int(getattr(parameter, "high", recipe.train.epochs))


def _disk(recipe: Recipe, capacity: Capacity, found: Mapping[str, Any]) -> dict[str, int]:
    prepared, num_baselines = found["prepared"], len(recipe.search.baselines)
    trials = num_trials(recipe)
    kept = min(recipe.search.keep_checkpoints, trials) + num_baselines
    times = prepared["num_validation"] / found["num_evaluated"]
    targets = num_visits(recipe) * prepared["num_train"] * prepared["num_contexts"] * 2
    averages = recipe.train.ema_decay is not None or "ema_decay" in recipe.search.space
    in_checkpoint = CHECKPOINT_WEIGHTS + averages  # more than a training with frozen layers or LoRA needs
    running = capacity.concurrency * (NUM_CHECKPOINTS * in_checkpoint + 1) * found["weights_bytes"]
    return {
        "weights": int(kept * found["weights_bytes"]),
        "predictions": int((trials + num_baselines) * times * found["predictions_bytes"]),
        "targets": int(targets),
        "cache": int(prepared["cache_bytes"]),
        "while it runs": int(running),
    }


def measure_by_study(recipe: Recipe, study_dir: Path, address: str | None = None) -> tuple[Capacity, Measured] | None:
    """Returns what the finished trainings of a study took; None when none of its trials is complete.

    A search may run on it. Disk is what its folder holds, with weights and predictions of the trials to come.

    Raises:
        RecipeError: It is the study of another recipe.
        ClusterError: There is no Ray, or a training does not fit.
        StorageError: The study cannot be read.
    """
    began = time.monotonic()
    claim(study_dir, recipe, ("narrow", "widen"))  # of a study that is there it writes nothing
    rows = rows_by_kind(study_dir)
    ended = [row for row in rows["trial"] if row.outcome == "complete"]
    if not ended:
        return None
    seconds = {row.name: row.spent_s or row.elapsed_s or 0.0 for row in (*ended, *rows["baseline"])}
    beside = {row.name: seconds[row.name] for row in rows["baseline"] if row.name != ZERO_SHOT}
    drawn_s = [seconds[row.name] for row in ended]
    by_values = {_key(recipe.search.baselines.get(name, {})): value for name, value in beside.items() if value}
    rng = np.random.default_rng(0)

    def training_s(values: Mapping[str, Any]) -> float:
        return by_values.get(_key(values)) or float(rng.choice(drawn_s))

    with _temporary(None) as folder, interruptions_as(_interrupted, folder / STOP):
        with running_ray(address, folder / RAY_LOG, folder / STOP) as nodes:
            ray_s = time.monotonic() - began
            plan = make_runtime(recipe, study_dir, nodes, RUNNER)
        after_s = time.monotonic() - began - ray_s
    mean_s = statistics.fmean(drawn_s)
    doubt = max(LEAST_DOUBT, statistics.stdev(drawn_s) / mean_s / math.sqrt(len(drawn_s)) if len(drawn_s) > 1 else 0.3)
    before_s = ray_s + _seen_preparing_s(study_dir) + OUTSIDE_S / 2
    disk = _disk_of(recipe, study_dir, len(ended))
    took_s = time.monotonic() - began
    return plan.capacity, Measured("study", took_s, before_s, after_s + OUTSIDE_S / 2, 0, 0, training_s, doubt, disk)


def _key(values: Mapping[str, Any]) -> str:
    return repr(sorted(values.items()))


def _seen_preparing_s(study_dir: Path) -> float:
    """Returns the seconds that the files of the preparation lie apart, from the heads to the last targets."""
    folder = study_dir / PREPARED
    made = [*folder.glob("heads.*"), folder / PREPARATION, *folder.glob(f"{TARGETS}/*/*.npy")]
    times = [path.stat().st_mtime for path in made if path.is_file()]
    return max(times) - min(times) if times else 0.0


def _disk_of(recipe: Recipe, study_dir: Path, num_ended: int) -> dict[str, int]:
    def size(pattern: str) -> tuple[int, int]:
        sizes = [path.stat().st_size for path in study_dir.glob(pattern) if path.is_file()]
        return sum(sizes), len(sizes)

    trials, num_baselines = num_trials(recipe), len(recipe.search.baselines)
    weights, num_weights = size("*/*/fine_tuned.safetensors")
    predictions, num_predictions = size("*/*/predictions/*.parquet")
    kept = min(recipe.search.keep_checkpoints, trials) + num_baselines
    return {
        "weights": kept * weights // max(1, num_weights),
        "predictions": (trials + num_baselines) * predictions // max(1, num_predictions),
        "targets": size(f"{PREPARED}/{TARGETS}/**/*.npy")[0],
    }


def beyond_budget(recipe: Recipe, found: Mapping[str, Any]) -> str:
    """Returns which limit of the recipe's budget the search will reach, in a sentence; empty for none."""
    search_s, hours = found["search_s"][0], found["gpu_hours"][0]
    limits = recipe.budget
    if limits.wall_time is not None and search_s > limits.wall_time:
        return f"budget.wall_time ({limits.wall_time:g} s) will end it after about {limits.wall_time / search_s:.0%}."
    if limits.gpu_hours is not None and hours > limits.gpu_hours:
        return f"budget.gpu_hours ({limits.gpu_hours:g}) will end it after about {limits.gpu_hours / hours:.0%}."
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
    if per_hour is not None:
        return tuple(round(seconds / 3600 * per_hour, 4) for seconds in found["search_s"])
    return None
