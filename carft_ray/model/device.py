"""Where a worker computes: the device, its name, its precision, and what of it decides the last bits."""

import os
from typing import Any

import torch

from carft_ray import environment
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import TrainConfig


def device_of(recipe: Recipe) -> torch.device:
    """Returns where a worker computes: the GPU that it was given, else the CPU."""
    use_gpu = recipe.resources.gpus_per_worker != 0 and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def has_lost_gpu() -> bool:
    """Tells whether a torch that was built for CUDA finds no GPU in this process."""
    return torch.version.cuda is not None and not torch.cuda.is_available()


def limit_memory(share: float) -> None:
    """Keeps torch in this process to a share of its GPU's memory; does nothing for a whole GPU, or without one."""
    if share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def set_up(recipe: Recipe) -> None:
    """Has this process compute as the recipe says, whatever it computed before.

    Threads; products in the precision of their numbers, where torch would use TF32 for convolutions alone; with
    ``train.deterministic`` sums in one order, on a GPU too.
    """
    torch.set_num_threads(recipe.resources.threads_per_worker)
    torch.backends.cudnn.allow_tf32 = False  # for matrix products it is torch's own default
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    torch.use_deterministic_algorithms(recipe.train.deterministic)


def has_bf16(device: torch.device) -> bool:
    """Tells whether a device has units for bf16; torch emulates it on others, more slowly than it computes in fp32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(train: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Returns in what an image tower computes by autocast; None: in the precision of its weights.

    ``auto`` is bf16 on a device that has it, else fp32. There is no fp16, whose gradients would need a scale that
    changes from step to step.
    """
    is_bf16 = train.precision == "bf16" or (train.precision == "auto" and has_bf16(device))
    return torch.bfloat16 if is_bf16 else None


def precision_words(train: TrainConfig, device: torch.device) -> str:
    """Returns what to know of ``train.precision`` on a GPU without bf16; empty elsewhere."""
    if device.type != "cuda" or has_bf16(device) or train.precision not in ("auto", "bf16"):
        return ""
    meaning = "auto is fp32" if train.precision == "auto" else "bf16 is emulated and slow"
    return f"{meaning} on {device_name(device)}, which has no units for bf16 (NVIDIA has them from Ampere on)"


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
