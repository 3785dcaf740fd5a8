"""Where a worker computes: the device, its name, and what of it decides the last bits."""

from typing import Any

import torch

from carft_ray import environment
from carft_ray.recipe.schema.recipe import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """Returns where a worker computes: the GPU that it was given, else the CPU."""
    use_gpu = recipe.resources.gpus_per_worker != 0 and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def computed_on(device: torch.device) -> list[Any]:
    """Returns what of a machine decides the last bits of what torch computes on a device, with its threads now."""
    if device.type == "cuda":
        return [device_name(device), torch.get_float32_matmul_precision()]
    return [environment.cpu_model(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def gpu_names() -> list[str]:
    """Returns the names of the GPUs that this process sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def device_name(device: torch.device) -> str:
    """Returns ``cpu`` or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
