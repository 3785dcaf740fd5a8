"""What the numbers of a training come from: contents of the sets, model, prompts, views, and where it was computed.

``prepare`` finds the part that all trainings of a study share, for the log; ``run_training`` adds the part of one
training to its ``result.json``. Test sets are never opened.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from carft_ray import environment
from carft_ray.data.cache import cache_dir
from carft_ray.data.listing import StoredSource
from carft_ray.data.records import records
from carft_ray.data.same_as_study import contents, images_of
from carft_ray.data.sets import open_sets
from carft_ray.data.source import image_digest, image_digests
from carft_ray.data.views import INTERPOLATION, VIEW_VERSION
from carft_ray.model.device import device_name
from carft_ray.recipe.schema.model import LOCAL_DIR
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.training.shared_inputs import SharedInputs, Start


def shared_origin(recipe: Recipe, inputs: SharedInputs, device: torch.device, is_compiled: bool) -> dict[str, Any]:
    """Returns what all trainings of a study share, as plain data: ``start_of``, and

    ``data`` (per set ``digest`` and ``num_images``), the views in ``augmentation``, and ``preparation`` (``device``,
    ``threads``, ``compile``: what ``auto`` means).

    Raises:
        DataError: An image cannot be read.
    """
    start = start_of(recipe, inputs, inputs.train.class_names)
    return {
        "data": set_contents(recipe, inputs),
        **start,
        "augmentation": {
            "view_version": VIEW_VERSION,
            "crop_scale": [recipe.train.crop_scale, 1.0],
            "interpolation": INTERPOLATION,
            **start["augmentation"],
        },
        "preparation": {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "compile": is_compiled,
        },
    }


def start_of(recipe: Recipe, start: Start, classes: Sequence[str]) -> dict[str, Any]:
    """Returns what of a provenance needs no image: ``classes``, ``class_names``, ``templates``, model and its input.

    ``model`` has ``weights_hash``, and of a model folder of the user's ``config_hash``: its architecture.
    ``augmentation`` has what the model says of its input: ``image_size``, ``mean``, ``std``, ``evaluation``.

    Args:
        recipe: The recipe.
        start: Model and prompts.
        classes: Class folders in label order.
    """
    clip = start.clip
    model = {"weights_hash": clip.weights_hash}
    if recipe.model.name.startswith(LOCAL_DIR):  # the architecture of others is that of open_clip's release
        whole = clip.config["model_cfg"]
        text = {key: value for key, value in whole["text_cfg"].items() if "tokenizer" not in key}  # they name places
        config = json.dumps({**whole, "text_cfg": text}, sort_keys=True, default=str)
        model["config_hash"] = image_digest(config.encode()).hex()[:16]
    return {
        "classes": list(classes),
        "class_names": list(start.class_names),
        "templates": list(start.templates),
        "model": model,
        "augmentation": {
            "image_size": clip.image_size,
            "mean": list(clip.mean),
            "std": list(clip.std),
            "evaluation": clip.input_key,
        },
    }


def set_contents(
    recipe: Recipe, inputs: SharedInputs | None = None, are_read: Callable[[str], bool] = lambda name: True
) -> dict[str, dict[str, Any]]:
    """Returns ``made_of.contents`` of train, id_val and every set of ood_val, or of those that are read.

    The digest of a set of files is that of the files. With ``inputs``, files that are known (``data.records``) are
    not read again; without, all are read now. Pictures of the sandbox are drawn by the package, which takes long: they
    are taken as ``inputs`` holds them; without, they are left out.

    Raises:
        DataError: A file cannot be read.
    """
    decoded = {} if inputs is None else {image_set.name: image_set for image_set in inputs.validation}
    found: dict[str, dict[str, Any]] = {}
    for name, source in (open_sets(recipe) if inputs is None else inputs.sources).items():
        if not are_read(name):
            continue
        images = images_of(source)
        if isinstance(images, StoredSource):
            known = images.hashes()
            if known is None and inputs is not None:
                known = records(images, cache_dir(recipe)).hashes()
            known = image_digests(images) if known is None else known
        elif inputs is None:
            continue
        elif name in decoded:
            known = [image_digest(pixels.tobytes()) for pixels in decoded[name].images_NHWC]
        else:
            known = image_digests(inputs.train)
        found[name] = contents(source, known)
    return found


def training_environment(device: torch.device, num_workers: int, is_compiled: bool) -> dict[str, Any]:
    """Returns with what one training was computed: code, torch, ``device``, ``threads``, ``num_workers``, ``compile``.

    Args:
        device: Where it ran.
        num_workers: Workers that shared it.
        is_compiled: Its image tower was compiled.
    """
    return {
        **environment.code(),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "num_workers": num_workers,
        "compile": is_compiled,
    }
