"""What every training of a study shares: model, prompts, training set, decoded validation sets."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from carft_ray.data.cache import cache_dir
from carft_ray.data.cached_sets import DecodedSource, Keeping, PackedSource, image_set, pays
from carft_ray.data.class_names import class_words
from carft_ray.data.corruptions import CorruptedSource
from carft_ray.data.decode_images import DECODERS
from carft_ray.data.listing import StoredSource
from carft_ray.data.sets import TRAIN, open_sets
from carft_ray.data.source import ImageSet, Source
from carft_ray.model.clip import Clip, load_clip
from carft_ray.model.heads import templates
from carft_ray.recipe.schema.data import SandboxSet, plain
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.training.loop import StoppedRun
from carft_ray.training.ranks import gather
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import TARGETS, store_dir
from carft_ray.words import time_left


@dataclass(frozen=True, eq=False)
class Start:
    """What every training of a study starts from; read-only.

    Attributes:
        clip: The model.
        class_names: Words for the classes, in label order.
        templates: Prompts, each with ``{}``; also the contexts.
    """

    clip: Clip
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SharedInputs(Start):
    """What every training of a study shares: the start, and the sets; read-only.

    Attributes:
        train: The training set.
        validation: ``id_val`` first, then the OOD validation sets, decoded.
        sources: All these sets by name, ``train`` first, as they are stored.
        key: Changes whenever any of this changes.
    """

    train: Source
    validation: tuple[ImageSet, ...]
    sources: Mapping[str, Source]
    key: str

    @property
    def num_images(self) -> dict[str, int]:
        """Images per set, ``train`` first."""
        return {"train": len(self.train), **{image_set.name: len(image_set) for image_set in self.validation}}


_loaded: dict[str, SharedInputs] = {}  # of the last recipe: a process that runs many trials opens everything once


def load_shared_inputs(
    recipe: Recipe,
    on_image: Callable[[str, int, int], None] = lambda name, done, total: None,
    prepared_dir: Path | None = None,
) -> SharedInputs:
    """Opens model, training set and validation sets; test roles are never touched.

    Args:
        recipe: The recipe.
        on_image: Called with (set, images done, images in all) while a set is built into the cache; see
            ``cached_sets.image_set``.
        prepared_dir: Folder of a preparation, whose sets are not listed again (``data.sets``).

    Raises:
        RecipeError, DataError: The model or a set cannot be opened.
    """
    parts = {name: getattr(recipe, name).model_dump(mode="json") for name in ("model", "data", "prompts")}
    asked = json.dumps(parts, sort_keys=True)
    if asked not in _loaded:
        clip = load_clip(recipe.model)
        sources = open_sets(recipe, prepared_dir)
        train, folder = sources[TRAIN], cache_dir(recipe)
        keeping = {name: Keeping(folder, recipe.data.cache_gb, partial(on_image, name)) for name in sources}
        if isinstance(plain(recipe.data.train), SandboxSet):  # drawing an image takes longer than training on it
            train = DecodedSource(train, keeping[TRAIN])
        elif isinstance(train, StoredSource | CorruptedSource) and _is_packed(recipe, train, folder):
            train = PackedSource(train, keeping[TRAIN], recipe.data.resize_short_side)

        validation = tuple(
            image_set(source, clip.to_input, clip.input_key, keeping[name])
            for name, source in sources.items()
            if name != TRAIN
        )
        names, prompts = class_words(recipe, train.class_names), templates(recipe.prompts)
        key = json.dumps([clip.weights_hash, names, prompts, [source.identity for source in sources.values()]])
        _loaded.clear()
        _loaded[asked] = SharedInputs(clip, names, prompts, train, validation, sources, key)
    return _loaded[asked]


def _is_packed(recipe: Recipe, train: StoredSource | CorruptedSource, folder: Path) -> bool:
    """Returns whether a training set is packed: a set under corruptions by default, since each one takes long."""
    if recipe.data.resize_short_side is not None or recipe.data.pack == "always":
        return True
    may_pay = isinstance(train, CorruptedSource) or pays(train.listing.home, train.listing.in_order, folder)
    return recipe.data.pack == "auto" and may_pay


def forget_inputs() -> None:
    """Frees what ``load_shared_inputs`` holds: the next call opens everything anew."""
    _loaded.clear()


def fill_cache(recipe: Recipe, prepared_dir: Path, say: Callable[[str], None]) -> None:
    """Opens model and sets as a training does, so that this machine's cache has all that a training reads.

    Args:
        recipe: The recipe.
        prepared_dir: As of ``load_shared_inputs``.
        say: Called with which set is built, and how long it will take where it takes more than a moment.

    Raises:
        RecipeError, DataError, StorageError: As ``load_shared_inputs``.
    """
    reports: dict[str, Callable[[int, int], None]] = {}

    def on_image(name: str, done: int, total: int) -> None:
        if not done and name not in reports:
            say(f"waiting for another process that builds {name} into the cache")
        if not done or name not in reports:
            reports[name] = time_left(say, f"building {name} into the cache")
        if done:
            reports[name](done, total)

    load_shared_inputs(recipe, on_image, prepared_dir)


def shared_inputs_of_worker(recipe: Recipe, context: RunContext, prepared_dir: Path) -> SharedInputs:
    """Opens model and sets in a worker of a training. While it builds a set into the cache, or waits for another
    process that does, it asks whether to stop, which is a sign of life.

    Args:
        recipe: The recipe.
        context: Of the worker; every rank calls this.
        prepared_dir: As of ``load_shared_inputs``.

    Raises:
        StoppedRun: Stopped on request, on all ranks; the entry that was being built is gone.
        RecipeError, DataError, StorageError: As ``load_shared_inputs``.
    """
    inputs, stopped = None, ""

    def on_image(name: str, done: int, total: int) -> None:
        if context.should_stop():
            raise StoppedRun(f"stopped on request while {name} was built into the cache")

    try:
        inputs = load_shared_inputs(recipe, on_image, prepared_dir)
    except StoppedRun as error:  # raised below, once the others have it
        stopped = str(error)
    stopped = next(filter(None, gather(context, stopped)), "")
    if inputs is None or stopped:
        raise StoppedRun(stopped)
    return inputs


def target_store(
    recipe: Recipe, inputs: SharedInputs, context_head_TD: torch.Tensor, device: torch.device
) -> Path | None:
    """Returns where the frozen model's targets are read and written; None where ``resources.targets`` stores none.

    Undecided (``auto``) is a training that no other one follows.
    """
    if recipe.resources.targets != "stored":
        return None
    source_key = json.dumps([inputs.train.identity, recipe.data.resize_short_side, DECODERS])
    folder = cache_dir(recipe) / TARGETS
    return store_dir(folder, source_key, inputs.clip, context_head_TD, recipe.train, device)
