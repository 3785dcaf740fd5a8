"""The micro-batch that fits into a device's memory: found by halving, once in a study, and used by all its trainings.

A training that runs out of memory is retried. The attempt that met it ends, the driver notes half of its micro-batch,
and the training continues from its checkpoint with what is noted. The global batch, and so the result, stays the same.

    log    {"kind": "fits", "device": "<model>, <precision>, <device>", "micro_batch": 16}    a model has one resolution

Another one fits with gradient checkpointing, a compiled tower, LoRA, frozen layers, an average or penalties that keep
more on the device, and where a training shares its GPU with others of the study: the key ends in these.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from carft_ray.errors import OutOfMemoryError
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.log import Log
from carft_ray.study.records import FITS, all_of
from carft_ray.study.training import Failure
from carft_ray.training.out_of_memory import micro_batch_of

# fields that decide whether a single image fits: the whole batch lies on the device, and so do weights and activations
MEMORY_FIELDS = ("batch_size", "precision", "freeze_layers", "lora_rank", "ema_decay", "teacher")


def fitted(recipe: Recipe, fits: Mapping[str, int], num_workers: int) -> int | None:
    """Returns the micro-batch that was found to fit on this process's device; None if the recipe's own is no larger.

    Args:
        recipe: Of a training, with its values.
        fits: What ``noted`` returns.
        num_workers: Workers that share a global batch.
    """
    found = fits.get(_key(recipe))
    return None if found is None or found >= micro_batch_of(recipe.train, num_workers) else found


def memory_failure(error: OutOfMemoryError, recipe: Recipe, values: Mapping[str, Any], attempt: int) -> Failure:
    """Returns how an attempt ends that ran out of memory.

    Args:
        error: What it met.
        recipe: As it was trained.
        values: Of the trial or baseline, over the study's recipe.
        attempt: Its number.

    Returns:
        ``memory``: the next attempt takes half. When one image does not fit, or a smaller micro-batch would not help:
        ``error`` where the values decide over memory (the trial is infeasible), else ``fatal``.
    """
    key = _key(recipe)
    if error.micro_batch > 1:
        half = error.micro_batch // 2
        short = f"{error.problems[0].rule}, but got {error.problems[0].value}"
        reason = f"out of memory: {short}; the next attempt uses a micro-batch of {half}"
        return Failure("memory", reason, attempt, error.exit_code, device=key, fits=half)
    decisive = [f"{name} {values[name]}" for name in MEMORY_FIELDS if name in values]
    if decisive:
        problem = replace(error.problems[0], value="", next_step="")
        return Failure("error", f"out of memory with {', '.join(decisive)}: {problem}", attempt, device=key)
    return Failure("fatal", str(error), attempt, error.exit_code, device=key)


def fits_record(failure: Failure) -> dict[str, Any]:
    """Returns the record of a shortage of memory, for the trainings that follow."""
    return {"kind": FITS, "device": failure.device, "micro_batch": failure.fits}


def noted(log: Log) -> dict[str, int]:
    """Returns the micro-batches that may fit, by device, as a log says it.

    If one image did not fit, what was noted before is void: something else may have filled the device.

    Raises:
        StorageError: A record is not what it may be.
    """
    found = dict[str, int]()
    for _, record in all_of(log, FITS):
        device, size = record["device"], record["micro_batch"]
        found[device] = min(size, found.get(device) or size)
    return {device: size for device, size in found.items() if size}


def _key(recipe: Recipe) -> str:
    model, train = recipe.model, recipe.train
    parts = [" ".join(filter(None, (model.name, model.pretrained))), train.precision, _device(recipe)]
    parts += ["checkpointed"] if train.grad_checkpointing else []
    parts += ["compiled"] if train.compile is True else []
    parts += [f"LoRA {train.lora_rank}"] if train.lora_rank is not None else []
    parts += [f"{train.freeze_layers} frozen"] if train.freeze_layers else []
    parts += ["averaged"] if train.ema_decay is not None else []
    parts += ["L2-SP"] if train.l2_sp_weight else []
    parts += ["frozen model on each batch"] if train.feature_terms else []
    parts += ["random texts"] if train.text_weight else []
    parts += ["moving teacher"] if train.moves_teacher else []
    share = recipe.resources.gpus_per_worker or 1
    parts += [f"{share:g} of a GPU"] if share < 1 else []
    return ", ".join(parts)


def _device(recipe: Recipe) -> str:
    if recipe.resources.gpus_per_worker != 0:  # a training on the CPU may have no torch yet
        from carft_ray.model.device import device_name, device_of

        return device_name(device_of(recipe))
    return "cpu"
