"""The layers of an image tower, what of it trains, and how it computes: frozen layers, LoRA, gradient checkpointing.

Layer 0 is the stem (patch embedding or first convolutions, positions, class token), then comes one layer for each
block, and last what follows the blocks: attention pooling and the projection to the embedding. A norm between the last
block and the projection belongs to the last block. timm's layer decay (after BEiT, arXiv 2106.08254) and open_clip's
``lock`` count in the same way.

Only the model shows whether a tower can do what ``train`` asks: ``recipe_problems`` is asked before a study trains.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from carft_ray.errors import Problem, RecipeError
from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.lora import add_corrections, matrices
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import CategoricalParameter, Parameter
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.recipe.space import is_active

# fields of `train` that an image tower may be unable to follow, alone or together
TOWER_FIELDS = ("freeze_layers", "lora_rank", "grad_checkpointing", "head_lr_factor")
COMPILED_FROM = 1000  # steps of a training, below which ``compile: auto`` is off: compiling takes minutes

logger = logging.getLogger(__name__)
half_built: list[Path] = []  # libraries that this process has set aside: torch remembers what it could not load

_TRUNK, _AFTER_TRUNK = "trunk.", "behind the trunk: "
# Layers in timm's notation: names of the stem, then patterns of blocks, ordered by their numbers. Others come last.
_VIT_STEM = r"(?!transformer\.resblocks\.|ln_post\.|proj$|attn_pool)"
_WITH_LAST_BLOCK = (99999,)  # in timm's notation: no layer of its own
_VIT_BLOCKS = (r"transformer\.resblocks\.(\d+)\.", None)
_RESNET = {"stem": r"(?!layer\d+\.\d+\.|attnpool\.)", "blocks": [(r"layer(\d+)\.(\d+)\.", None)]}


def layer_groups(visual: nn.Module) -> list[list[str]]:
    """Returns the names of all parameters of an image tower by layer, from the stem to the projection.

    Args:
        visual: Image tower of an open_clip model: its ViT, its ResNet or a timm model. In any other module each direct
            child is a layer, after one of the module's own parameters.

    Returns:
        One list for each layer, in the order of ``named_parameters``; each parameter is in one of them.
    """
    from timm.models import group_parameters

    names = [name for name, _ in visual.named_parameters()]
    seen = {name: name for name in names}
    if hasattr(visual, "trunk"):  # what open_clip puts behind it comes last, with what timm's patterns leave over
        seen = {n: n.removeprefix(_TRUNK) if n.startswith(_TRUNK) else _AFTER_TRUNK + n for n in names}
    tower = SimpleNamespace(named_parameters=lambda: [(name, None) for name in seen.values()])
    layers = group_parameters(tower, _matcher(visual), reverse=True)
    return [[name for name in names if layers[seen[name]] == layer] for layer in sorted(set(layers.values()))]


def _matcher(visual: nn.Module) -> dict[str, Any]:
    """Returns the patterns of a tower's layers, as ``timm.models.group_parameters`` takes them."""
    if hasattr(visual, "trunk"):
        return dict(visual.trunk.group_matcher(coarse=False))  # type: ignore[union-attr,operator]
    if hasattr(visual, "transformer"):
        # the norm comes before the projection of a class token, and after attention pooling
        norm = [(r"ln_post\.", _WITH_LAST_BLOCK)] if getattr(visual, "attn_pool", None) is None else []
        return {"stem": _VIT_STEM, "blocks": [_VIT_BLOCKS, *norm]}
    if hasattr(visual, "attnpool"):
        return _RESNET
    children = [name for name, _ in visual.named_children()]
    return {"stem": r"[^.]+$", "blocks": [(rf"{re.escape(name)}\.", (i,)) for i, name in enumerate(children)]}


def shape_tower(classifier: ImageClassifier, train: TrainConfig) -> None:
    """Makes trainable, in place, what the recipe says of the image tower.

    Raises:
        RecipeError: The tower cannot do it.
    """
    visual = classifier.visual
    if problems := tower_problems(visual, train):
        raise RecipeError(problems)
    for name in _frozen(visual, train):
        visual.get_parameter(name).requires_grad_(False)
    if train.lora_rank is not None:
        scale = 1.0 if train.lora_alpha is None else train.lora_alpha / train.lora_rank
        add_corrections(visual, _adapted(visual, train.freeze_layers), train.lora_rank, scale, train.seed)
    if train.grad_checkpointing:
        visual.set_grad_checkpointing(True)  # type: ignore[operator]  # open_clip is untyped


def compiles(train: TrainConfig, num_images: int, device: torch.device) -> bool:
    """Returns what ``train.compile`` means for a training set of so many images on a device: ``auto`` is resolved."""
    if train.compile != "auto":
        return train.compile
    num_steps = train.epochs * math.ceil(num_images / train.batch_size)
    return device.type == "cuda" and num_steps >= COMPILED_FROM and has_compiler(device)


def has_compiler(device: torch.device) -> bool:
    """Tells whether torch can compile for a device, by compiling a sum of sines."""
    try:
        torch.compile(lambda numbers: numbers.sin().sum(), dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # of torch, of a compiler that is missing or fails, or of what it has built
        if set_aside_half_built():
            torch.compiler.reset()
            return has_compiler(device)
        logger.warning("train.compile is off: torch cannot compile here: %s", str(error).strip().partition("\n")[0])
        return False
    return True


def set_aside_half_built() -> list[Path]:
    """Renames libraries in the cache of torch's compiler that a kill has left half written; a new process builds them.

    Returns:
        Where they were; those that cannot be renamed are none.
    """
    folder, found = os.environ.get("TORCHINDUCTOR_CACHE_DIR"), list[Path]()  # torch sets it when it first compiles
    for path in Path(folder).glob("**/*.so") if folder else ():
        with contextlib.suppress(OSError):
            if not _is_whole(path):
                os.replace(path, path.with_suffix(".half"))
                found.append(path)
    half_built.extend(found)
    return found


def _is_whole(library: Path) -> bool:
    """Tells whether a library has its end: in ELF the table of sections, whose place the header names (elf(5))."""
    with library.open("rb") as file:
        head, size = file.read(64), os.fstat(file.fileno()).st_size
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":  # else it is of another system
        return size > 0
    (offset,), (entry, count) = struct.unpack_from("<Q", head, 0x28), struct.unpack_from("<HH", head, 0x3A)
    return bool(offset + entry * count <= size)


def compile_tower(classifier: ImageClassifier, micro_batch: int, grad_checkpointing: bool) -> None:
    """Has the tower of a training compiled at its first step, for passes of ``micro_batch`` images, in place.

    A pass of fewer images is filled up with blank ones: one shape is compiled, and the numbers of a training depend
    neither on the step at which it resumes nor on what else the process has compiled.
    """
    torch.compiler.reset()  # a process compiles a function 8 times; then torch computes without a word as it is
    # torch splits a compiled tower of several workers, to send gradients early; older releases refuse to do so with
    # blocks whose activations are computed again (pytorch#104674)
    torch._dynamo.config.optimize_ddp = not grad_checkpointing
    compile_passes(classifier, micro_batch)


def compile_passes(classifier: ImageClassifier, num_images: int) -> None:
    """Has a tower compiled at its first pass, for passes of so many images, in place, beside what is compiled."""
    classifier.fixed_batch = num_images
    classifier.visual.compile(dynamic=False)


def layer_factors(visual: nn.Module, layer_decay: float) -> dict[str, float]:
    """Returns the learning rate of each parameter of a tower, relative to that of the class head.

    Layer l of n (from 0) has ``layer_decay ** (n - l)``; the class head is layer n. Source: BEiT, arXiv 2106.08254, and
    timm's ``param_groups_layer_decay``, for which a classifier's last norm belongs to its head, too.
    """
    if layer_decay == 1:
        return {name: 1.0 for name, _ in visual.named_parameters()}
    layers = layer_groups(visual)
    return {name: layer_decay ** (len(layers) - index) for index, layer in enumerate(layers) for name in layer}


def tower_problems(visual: nn.Module, train: TrainConfig) -> list[Problem]:
    """Returns what a tower cannot do of what ``train`` asks."""
    problems = []

    def refuse(field: str, rule: str, next_step: str = "") -> None:
        value = str(getattr(train, field)).lower()
        problems.append(Problem(f"train.{field}", rule, value, next_step=next_step))

    num_layers, frozen = len(layer_groups(visual)), train.freeze_layers
    if frozen > num_layers:
        refuse("freeze_layers", f"must be at most {num_layers}, the number of layers of the image tower")
    elif frozen == num_layers and train.head_lr_factor == 0:
        refuse("freeze_layers", f"must be at most {num_layers - 1} with head_lr_factor 0, or nothing trains")
    if train.lora_rank is not None and frozen <= num_layers:
        adapted = _adapted(visual, frozen)
        smallest = min((min(matrix.shape) for matrix in adapted.values()), default=0)
        if not _adapted(visual, 0):
            rule = "must be null: the blocks of this image tower have no Linear layers"
            refuse("lora_rank", rule, "train.freeze_layers trains a part of any tower.")
        elif not adapted:
            rule = f"must be null with freeze_layers {frozen}: no Linear layer is left in a block that trains"
            refuse("lora_rank", rule)
        elif train.lora_rank > smallest:
            refuse("lora_rank", f"must be at most {smallest}, the smallest side of a matrix")
    if train.grad_checkpointing and not any(hasattr(module, "grad_checkpointing") for module in visual.modules()):
        step = "To need less memory, write a smaller train.micro_batch; the gradient stays the same."
        refuse("grad_checkpointing", "must be false: this image tower has no gradient checkpointing", step)
    return problems


def _adapted(visual: nn.Module, frozen: int) -> dict[str, Tensor]:
    """Returns the matrices of the blocks over the frozen layers; the stem and what follows the blocks have none."""
    blocks = range(max(1, frozen), len(layers := layer_groups(visual)) - 1)
    return matrices(visual, [name for index in blocks for name in layers[index]])


def num_trained(visual: nn.Module, train: TrainConfig) -> int:
    """Returns how many numbers of a tower train: all, those of layers that are not frozen, or those of LoRA."""
    if train.lora_rank is not None:
        return sum(train.lora_rank * sum(matrix.shape) for matrix in _adapted(visual, train.freeze_layers).values())
    frozen = set(_frozen(visual, train))
    return sum(parameter.numel() for name, parameter in visual.named_parameters() if name not in frozen)


def _frozen(visual: nn.Module, train: TrainConfig) -> list[str]:
    """Returns the names of the parameters in frozen layers."""
    return list(itertools.chain(*layer_groups(visual)[: train.freeze_layers])) if train.freeze_layers else []


def training_bytes(num_weights: int, num_trained: int, train: TrainConfig) -> int:
    """Returns the memory of a training without activations, in float32.

    The weights of the tower and of the frozen one; for every weight that trains its gradient and the two moments of
    AdamW, its average if there is one, and its start with L2-SP.
    """
    copies = 3 + (train.ema_decay is not None) + (train.l2_sp_weight > 0 and train.lora_rank is None)
    return 4 * (2 * num_weights + copies * num_trained)


def recipe_problems(visual: nn.Module, recipe: Recipe) -> list[Problem]:
    """Returns what a tower cannot do of what a recipe may ask: as it is, at the ends of its space, in a baseline.

    Each value is named once, by its key in the recipe.
    """
    problems: dict[Problem, None] = {}
    for values, place in _trainings(recipe):
        for problem in tower_problems(visual, recipe.train.model_copy(update=values)):
            name = problem.place.removeprefix("train.")
            problems[dataclasses.replace(problem, place=f"{place}.{name}" if name in values else problem.place)] = None
    return list(problems)


def _may_be_active(parameter: Parameter, values: Mapping[str, Any]) -> bool:
    """Tells whether a parameter may be drawn beside values of others; else a trial has the recipe's value of it."""
    known = {name: allowed for name, allowed in parameter.when.items() if name in values}
    return is_active(parameter.model_copy(update={"when": known}), values)


def _trainings(recipe: Recipe) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields values over ``train`` that trainings of the recipe may have, with their key path."""
    searched = {name: recipe.search.space[name] for name in TOWER_FIELDS if name in recipe.search.space}
    ends: list[list[Any]] = []
    for name, parameter in searched.items():
        is_choice = isinstance(parameter, CategoricalParameter)
        values = [*parameter.choices] if is_choice else [parameter.low, parameter.high]  # type: ignore[union-attr]
        ends.append([*values, getattr(recipe.train, name)] if parameter.when else values)
    for chosen in itertools.product(*ends):
        trial = dict(zip(searched, chosen, strict=True))
        own = {name: value == getattr(recipe.train, name) for name, value in trial.items()}
        if all(own[name] or _may_be_active(parameter, trial) for name, parameter in searched.items()):
            yield trial, "search.space"
    for name, given in recipe.search.baselines.items():
        yield {key: value for key, value in given.items() if key in TOWER_FIELDS}, f"search.baselines.{name}"
