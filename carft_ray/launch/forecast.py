"""What a search will take: trials at a time, time, GPU hours, disk. From a probe, or a study that has trained.

What the space varies enters by its expectation: ``NUM_SEARCHES`` searches with values drawn as random search draws them
are laid onto the slots, first come first served; the forecast is their mean, the range is from their 10th to their 90th
percentile, and further by how much the probes differed (``launch.probe``). No training is taken to be cut.
"""

import contextlib
import heapq
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from carft_ray import files
from carft_ray.errors import InterruptedRunError, Problem
from carft_ray.launch.ray_cluster.cluster import running_ray
from carft_ray.launch.ray_cluster.concurrency import Capacity
from carft_ray.launch.runtime import RUNNER, make_runtime
from carft_ray.launch.stop import interruptions_as
from carft_ray.layout import PREPARATION, PREPARED, RAY_LOG, STOP
from carft_ray.learning.target_blocks import visit_bytes
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.grid import num_trials
from carft_ray.recipe.spaces.shared_targets import num_stored_visits
from carft_ray.recipe.spaces.space import drawn
from carft_ray.study.identity import claim
from carft_ray.study.outcome import TrialRow
from carft_ray.study.rows import ZERO_SHOT, rows_by_kind
from carft_ray.words import counted

NUM_SEARCHES = 200
LEAST_DOUBT = 0.1  # of every forecast: the machine is never quite as it was
OUTSIDE_S = 4.0  # before Ray starts and after it has ended: imports, table, figure


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
        cores_needed: Of a worker, to make views as fast as its GPU takes them; 0: not known, or no GPU.
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
    cores_needed: float = 0.0


def forecast(recipe: Recipe, capacity: Capacity, measured: Measured) -> dict[str, Any]:
    """Returns what a whole search will take, as plain data; seconds, hours and bytes.

    Each of ``trial_s``, ``search_s``, ``cpu_hours`` and ``gpu_hours`` is (expected, low, high).
    """
    rng = np.random.default_rng(0)
    trials, baselines = num_trials(recipe), list(recipe.search.baselines.values())
    spans, works, each = [], [], []
    for _ in range(NUM_SEARCHES):
        values = [*baselines, *(drawn(recipe.search.space, rng.uniform) for _ in range(trials))]
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
        "cpus_per_worker": capacity.cpus_per_worker,
        "cores_needed": round(measured.cores_needed, 1) or None,
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


def interrupted() -> InterruptedRunError:
    """Returns what a signal becomes."""
    return InterruptedRunError(Problem("", "stopped; nothing is left behind"))


@contextlib.contextmanager
def temporary(parent: Path | None) -> Iterator[Path]:
    """Gives a folder that is gone after the block, in ``parent`` or the temporary folder of this machine."""
    if parent is not None:
        with files.writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".carft-plan-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()


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
    drawn_s = [_seconds(row) for row in ended]
    baselines = {row.name: _seconds(row) for row in rows["baseline"] if row.name != ZERO_SHOT and _seconds(row)}
    by_values = {_key(recipe.search.baselines.get(name, {})): seconds for name, seconds in baselines.items()}
    rng = np.random.default_rng(0)

    def training_s(values: Mapping[str, Any]) -> float:
        return by_values.get(_key(values)) or float(rng.choice(drawn_s))

    with temporary(None) as folder, interruptions_as(interrupted, folder / STOP):
        with running_ray(address, folder / RAY_LOG, folder / STOP) as nodes:
            ray_s = time.monotonic() - began
            capacity = make_runtime(recipe, study_dir, nodes, RUNNER).capacity
        after_s = time.monotonic() - began - ray_s
    mean_s = statistics.fmean(drawn_s)
    doubt = max(LEAST_DOUBT, statistics.stdev(drawn_s) / mean_s / math.sqrt(len(drawn_s)) if len(drawn_s) > 1 else 0.3)
    before_s = ray_s + _seen_preparing_s(study_dir) + OUTSIDE_S / 2
    disk, took_s = _disk_of(recipe, study_dir), time.monotonic() - began
    return capacity, Measured("study", took_s, before_s, after_s + OUTSIDE_S / 2, 0, 0, training_s, doubt, disk)


def _seconds(row: TrialRow) -> float:
    return row.spent_s or row.elapsed_s or 0.0


def _key(values: Mapping[str, Any]) -> str:
    return repr(sorted(values.items()))


def _seen_preparing_s(study_dir: Path) -> float:
    """Returns the seconds that the files of the preparation lie apart, from the heads on."""
    folder = study_dir / PREPARED
    made = [*folder.glob("heads.*"), folder / PREPARATION]
    times = [path.stat().st_mtime for path in made if path.is_file()]
    return max(times) - min(times) if times else 0.0


def _disk_of(recipe: Recipe, study_dir: Path) -> dict[str, int]:
    def size(pattern: str) -> tuple[int, int]:
        sizes = [path.stat().st_size for path in study_dir.glob(pattern) if path.is_file()]
        return sum(sizes), len(sizes)

    trials, num_baselines = num_trials(recipe), len(recipe.search.baselines)
    weights, num_weights = size("*/*/fine_tuned.safetensors")
    predictions, num_predictions = size("*/*/predictions/*.parquet")
    kept = min(recipe.search.keep_checkpoints, trials) + num_baselines
    # not the sizes of perhaps 100,000 files
    prepared = files.read_object(study_dir / PREPARED / PREPARATION) or {}
    num_train = prepared.get("num_images", {}).get("train", 0)
    return {
        "weights": kept * weights // max(1, num_weights),
        "predictions": (trials + num_baselines) * predictions // max(1, num_predictions),
        "targets": num_stored_visits(recipe) * visit_bytes(num_train, prepared.get("num_contexts", 0)),
    }


def beyond_budget(recipe: Recipe, found: Mapping[str, Any]) -> str:
    """Returns which limit of the recipe's budget the search will reach, in a sentence; empty for none."""
    limits = (("wall_time", " s", found["search_s"][0]), ("gpu_hours", "", found["gpu_hours"][0]))
    for name, unit, expected in limits:
        limit = getattr(recipe.budget, name)
        if limit is not None and expected > limit:
            return f"budget.{name} ({limit:g}{unit}) will end it after about {limit / expected:.0%}."
    return ""


def limited_by_input(recipe: Recipe, found: Mapping[str, Any]) -> str:
    """Returns that views, not the GPU, will limit a training, in a sentence; empty where they will not."""
    has, needed = recipe.resources.threads or max(1, int(found["cpus_per_worker"])), found["cores_needed"]
    if needed is None or needed <= has:
        return ""
    key = "threads" if recipe.resources.threads else "cpus_per_worker"
    cores = counted(math.ceil(needed), "core")
    return f"Views, not the GPU, will be the limit: a worker needs {cores} for them and has {has} (resources.{key})."


def price(found: Mapping[str, Any], per_gpu_hour: float | None, per_hour: float | None) -> tuple[float, ...] | None:
    """Returns (expected, low, high) of the money that a search costs; None without a price.

    Args:
        found: The forecast.
        per_gpu_hour: Of one GPU, while trainings hold it.
        per_hour: Of the whole machine or cluster, from the start of the search to its end.
    """
    search_hours = [seconds / 3600 for seconds in found["search_s"]]
    for rate, hours in ((per_gpu_hour, found["gpu_hours"]), (per_hour, search_hours)):
        if rate is not None:
            return tuple(round(each * rate, 4) for each in hours)
    return None
