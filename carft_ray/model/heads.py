"""Class head and context head from a recipe's sentences: embedded once on a machine, then read in the cache.

The key holds all that decides their bits: weights, architecture, token ids (and with them tokenizer, context length,
templates and class words), the device, its threads and its precision, and the versions of the libraries.

Shape letters: T templates (contexts), C classes, D embedding width, M = C + T, L tokens of a sentence.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from carft_ray import environment
from carft_ray.data import cache
from carft_ray.data.cache import cache_dir
from carft_ray.data.file_index import write_file
from carft_ray.data.sandbox import TEMPLATES
from carft_ray.errors import StorageError
from carft_ray.model.classifier import at_least_float32
from carft_ray.model.clip import Clip, model_key, tokenizer_hash
from carft_ray.model.device import computed_on
from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.schema.model import PromptsConfig
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.words import time_left

FORMAT_VERSION = 1
BATCH_SIZE = 512  # sentences of one pass through the text tower; another one may change last bits
_log = logging.getLogger(__name__)
Say = Callable[[str], None]


def templates(prompts: PromptsConfig) -> tuple[str, ...]:
    """Returns the sentences with ``{}`` that a recipe's prompts name.

    'openai' are the 80 ImageNet templates of CLIP, 'simple' the 7 of its notebook, both as open_clip has them; the name
    of a benchmark means its own.
    """
    if not isinstance(prompts.templates, str):
        return prompts.templates
    if prompts.templates in BENCHMARKS:
        return BENCHMARKS[prompts.templates].templates
    if prompts.templates == "sandbox":
        return TEMPLATES
    named = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    return tuple(template("{}") for template in named[prompts.templates])


def build_heads(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Returns ``(class_head [C, D], context_head [T, D])``, unit rows, float32 or wider.

    Each sentence is embedded and normalised; the class head averages the sentences of a class over the templates,
    the context head averages those of a template over the classes; both are normalised again (the protocol of CLIP's
    zero-shot classifier, and the same for contexts).

    Args:
        model: An open_clip model with ``encode_text``.
        tokenizer: Its tokenizer.
        class_names: C words; equal ones are allowed (ImageNet has two such pairs).
        templates: T sentences, each with ``{}`` for the class.
        on_progress: Called with the numbers of sentences done and in all, after each pass.
    """
    device = next(model.parameters()).device
    class_sums_CD = torch.zeros(())
    context_rows_D: list[Tensor] = []
    with torch.no_grad():
        for template in templates:
            sentences = [template.replace("{}", name) for name in class_names]
            parts = []
            for i in range(0, len(sentences), BATCH_SIZE):
                tokens = tokenizer(sentences[i : i + BATCH_SIZE]).to(device)
                parts.append(at_least_float32(model.encode_text(tokens)))  # type: ignore[operator]  # open_clip is untyped
                before = len(context_rows_D) * len(sentences)
                on_progress(before + min(i + BATCH_SIZE, len(sentences)), len(templates) * len(sentences))
            text_CD = functional.normalize(torch.cat(parts), dim=-1)
            class_sums_CD = class_sums_CD.to(text_CD) + text_CD
            context_rows_D.append(text_CD.mean(0))
    class_head_CD = functional.normalize(class_sums_CD / len(templates), dim=-1)
    return class_head_CD, functional.normalize(torch.stack(context_rows_D), dim=-1)


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
        say: Called with what is done, and how long it will take where it takes more than a moment.

    Returns:
        The heads. Where the cache cannot be written, they are embedded for this call alone, after a warning.
    """
    number = len(templates) * len(class_names)
    embedded: dict[str, Tensor] = {}

    def embed() -> dict[str, Tensor]:
        if not embedded:
            say(f"embedding {number} sentences for the heads")
            on_progress = time_left(say, "embedding sentences")
            try:
                heads = build_heads(clip.model.to(device), clip.tokenizer, class_names, templates, on_progress)
            finally:
                clip.model.to("cpu")
            embedded.update(class_head=heads[0].cpu(), context_head=heads[1].cpu())
        return embedded

    def build(path: Path) -> None:
        rows_MD = torch.cat(list(embed().values())).numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows_MD.reshape(-1)), rows_MD.shape[1])
        about = cache.about(kind="heads", name=recipe.model.name, source=f"{number} sentences")
        write_file(path, pa.table({"row": column}).replace_schema_metadata(about))

    def read(reader: Any) -> dict[str, Tensor]:
        column = reader.get_batch(0)["row"]
        rows_MD = torch.from_numpy(np.array(column.flatten()).reshape(len(column), -1))
        return {"class_head": rows_MD[: len(class_names)].clone(), "context_head": rows_MD[len(class_names) :].clone()}

    folder = cache_dir(recipe)
    try:
        heads = cache.entry(folder, _key(clip, class_names, templates, device), read, build, recipe.data.cache_gb)
    except StorageError as error:  # a cache that others have filled may be only read
        _log.warning("The heads are not kept for the next command: %s", error)
        return embed()
    if not embedded:
        say(f"the heads are in the cache: {number} sentences")
    return heads


def _key(clip: Clip, class_names: Sequence[str], templates: Sequence[str], device: torch.device) -> str:
    words = cache.key_of([list(class_names), list(templates)])
    versions = environment.versions_of(("torch", "open_clip_torch", "transformers", "timm"))
    computed = [BATCH_SIZE, *computed_on(device), versions]
    return cache.key_of(["heads", FORMAT_VERSION, model_key(clip), tokenizer_hash(clip), words, computed])
