"""What the attempts of a study have taken: seconds of each, and the GPUs that it held meanwhile.

A trial keeps it in the journal, attribute ``attempts_s``: attempt -> [seconds, GPUs]. The driver writes it when an
attempt ends, however it ends. For one that a killed driver has left, the next search takes the time from its first to
its last sign of life.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.recipe.schema import ResourcesConfig
from carft_ray.study.outcome import read_heartbeat, read_result

ATTRIBUTE = "attempts_s"


def seconds_of(attributes: Mapping[str, Any]) -> float:
    """Returns the seconds that the attempts of a trial took together."""
    return float(sum(seconds for seconds, _ in attributes.get(ATTRIBUTE, {}).values()))


def gpu_seconds_of(attributes: Mapping[str, Any]) -> float:
    """Returns GPUs x seconds of a trial's attempts."""
    return float(sum(seconds * gpus for seconds, gpus in attributes.get(ATTRIBUTE, {}).values()))


def left_behind(folder: Path, attempt: int, resources: ResourcesConfig) -> list[float]:
    """Returns [seconds, GPUs] of an attempt whose driver was killed, by what lies in its folder; zeros for no trace.

    Args:
        folder: Folder of the training.
        attempt: The attempt.
        resources: Of the recipe, for a training that came to its end.
    """
    alive = files.retried(folder, lambda: read_heartbeat(folder, attempt))
    if alive is not None:
        return [max(0.0, alive.last_step_ns / 1e9 - alive.began), alive.gpus]
    result = read_result(folder)
    if result is None:
        return [0.0, 0.0]
    made_on = result.get("environment") or {}
    on_gpu = made_on.get("device", "cpu") != "cpu"
    each = 1.0 if resources.gpus_per_worker is None else resources.gpus_per_worker
    return [float(result.get("elapsed_s") or 0.0), each * made_on.get("num_workers", 1) if on_gpu else 0.0]
