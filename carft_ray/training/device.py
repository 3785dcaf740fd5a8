"""Where a worker computes."""

import torch

from carft_ray.recipe.schema.recipe import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """Returns where a worker computes: the GPU that it was given, else the CPU."""
    use_gpu = recipe.resources.gpus_per_worker != 0 and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")
