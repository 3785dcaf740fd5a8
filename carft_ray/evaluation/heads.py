"""Class head and context head of a model, embedded once on a machine: every command takes them from the cache.

The key holds all that decides their bits: weights, architecture, token ids (and with them tokenizer, context length,
templates and class words), the device, its threads and its precision, and the versions of the libraries.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from carft_ray import environment
from carft_ray.data.caching import cache
from carft_ray.data.sets import cache_dir
from carft_ray.errors import StorageError
from carft_ray.evaluation.origin import device_name
from carft_ray.files import fsync_file
from carft_ray.learning.heads import BATCH_SIZE, build_heads
from carft_ray.learning.models.clip import Clip
from carft_ray.recipe.schema import Recipe
from carft_ray.words import time_left

FORMAT_VERSION = 1
IN_CACHE = "the heads are in the cache"  # what is told then

_log = logging.getLogger(__name__)
Say = Callable[[str], None]


def cached_heads(
    recipe: Recipe,
    clip: Clip,
    class_names: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    say: Say = lambda text: None,
) -> dict[str, Tensor]:
    """Returns ``class_head`` [C, D] and ``context_head`` [T, D] of ``build_heads``, on the CPU, from the cache or new.

    The same bits with and without the cache. Several processes may ask at once; one embeds, the others wait for it.

    Args:
        recipe: Names folder and limit of the cache, and the model.
        clip: The model.
        class_names: C words.
        templates: T sentences, each with ``{}`` for the class.
        device: Where they are embedded, with the threads that torch has now.
        say: Told what is done, and how long it will take where it takes more than a moment.

    Returns:
        The heads. Where the cache cannot be written, they are embedded for this call alone, after a warning.
    """
    number = len(templates) * len(class_names)
    embedded: dict[str, Tensor] = {}

    def embed() -> dict[str, Tensor]:
        if not embedded:
            say(f"embedding {number} sentences for the heads")
            told = time_left(say, "embedding sentences")
            heads = build_heads(clip.model.to(device), clip.tokenizer, class_names, templates, on_progress=told)
            clip.model.to("cpu")
            embedded.update(class_head=heads[0].cpu(), context_head=heads[1].cpu())
        return embedded

    def build(path: Path) -> dict[str, Any]:
        rows_MD = torch.cat(list(embed().values())).numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows_MD.reshape(-1)), rows_MD.shape[1])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema({"row": column.type})) as writer:
            writer.write_batch(pa.record_batch({"row": column}))
        fsync_file(path)
        return {"kind": "heads", "name": recipe.model.name, "source": f"{number} sentences"}

    def read(reader: Any) -> dict[str, Tensor]:
        column = reader.get_batch(0)["row"]
        rows_MD = torch.from_numpy(np.array(column.flatten()).reshape(len(column), -1))
        if len(rows_MD) != len(class_names) + len(templates):
            raise ValueError("it holds other heads than its name says")
        return {"class_head": rows_MD[: len(class_names)].clone(), "context_head": rows_MD[len(class_names) :].clone()}

    folder = cache_dir(recipe)
    try:
        heads = cache.entry(folder, _key(clip, class_names, templates, device), read, build, recipe.data.cache_gb)
    except StorageError as error:  # a cache that others have filled may be only read
        _log.warning("The heads are not kept for the next command: %s", error)
        return embed()
    if not embedded:
        say(f"{IN_CACHE}: {number} sentences")
    return heads


def _key(clip: Clip, class_names: Sequence[str], templates: Sequence[str], device: torch.device) -> str:
    tokens = hashlib.blake2b(digest_size=16)
    for template in templates:
        ids_CL = clip.tokenizer([template.replace("{}", name) for name in class_names])
        tokens.update(f"{ids_CL.dtype} {tuple(ids_CL.shape)} ".encode() + ids_CL.numpy().tobytes())
    computed = [device_name(device), torch.get_float32_matmul_precision(), BATCH_SIZE]
    if device.type == "cpu":
        computed += [environment.cpu_model(), torch.get_num_threads()]
    versions = environment.versions_of(("torch", "open_clip_torch", "transformers", "timm"))
    # neither the architecture's options nor its modules tell everything: an activation may be in one of them alone
    model = [clip.weights_hash, clip.config["model_cfg"], re.sub(" at 0x[0-9a-f]+", "", repr(clip.model))]
    return cache.key_of(["heads", FORMAT_VERSION, model, tokens.hexdigest(), computed, versions])
