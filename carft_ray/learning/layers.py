"""The layers of an image tower by depth: what freezing and layer-wise learning rates count.

Layer 0 is the stem (patch embedding or first convolutions, positions, class token), then comes one layer for each
block, and last what stands after the blocks: attention pooling and the projection to the embedding. A norm between the
last block and the projection belongs to the last block. timm's layer decay (after BEiT, arXiv 2106.08254) and
open_clip's ``lock`` count in the same way.
"""

import re
from collections.abc import Sequence
from types import SimpleNamespace

from torch import nn

_BLOCKS, _LAST = 1.0, 2.0  # first number of a depth; the stem has 0
_TRUNK, _AFTER_TRUNK = "trunk.", "behind the trunk: "


def layer_groups(visual: nn.Module) -> list[list[str]]:
    """Returns the names of all parameters of an image tower by layer, from the stem to the projection.

    Args:
        visual: Image tower of an open_clip model: its ViT, its ResNet or a timm model. In any other module each direct
            child is a layer, after one of the module's own parameters.

    Returns:
        One list for each layer, in the order of ``named_parameters``; each parameter stands in one of them.
    """
    names = [name for name, _ in visual.named_parameters()]
    if hasattr(visual, "trunk"):
        depths = _timm_depths(visual, names)
    elif hasattr(visual, "transformer"):
        depths = _vit_depths(visual, names)
    elif hasattr(visual, "attnpool"):
        depths = {name: _resnet_depth(name) for name in names}
    else:
        children = [name for name, _ in visual.named_children()]
        depths = {name: (1.0 + children.index(name.split(".")[0]) if "." in name else 0.0,) for name in names}
    return [[name for name in names if depths[name] == depth] for depth in sorted(set(depths.values()))]


def layer_label(names: Sequence[str]) -> str:
    """Returns a short name of a layer: the modules that its parameters stand in, as far as they share them."""
    roots: dict[str, list[list[str]]] = {}
    for name in names:
        pieces = name.split(".")
        roots.setdefault(".".join(pieces[: 1 + name.startswith(_TRUNK)]), []).append(pieces[:-1] or pieces)
    return ", ".join(root if len(inside) == 1 else _shared(inside) or root for root, inside in roots.items())


def _shared(modules: list[list[str]]) -> str:
    count = next((i for i, pieces in enumerate(zip(*modules, strict=False)) if len(set(pieces)) > 1), None)
    return ".".join(min(modules, key=len)[:count])


def _vit_depths(visual: nn.Module, names: list[str]) -> dict[str, tuple[float, ...]]:
    blocks = {name: float(found[1]) for name in names if (found := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    # the norm stands before the projection of a class token, and after attention pooling
    after_blocks = (_BLOCKS, max(blocks.values())) if getattr(visual, "attn_pool", None) is None else (_LAST,)

    def depth(name: str) -> tuple[float, ...]:
        if name in blocks:
            return (_BLOCKS, blocks[name])
        if name.startswith("ln_post."):
            return after_blocks
        return (_LAST,) if name == "proj" or name.startswith("attn_pool") else (0.0,)

    return {name: depth(name) for name in names}


def _resnet_depth(name: str) -> tuple[float, ...]:
    if found := re.match(r"layer(\d+)\.(\d+)\.", name):
        return (_BLOCKS, float(found[1]), float(found[2]))
    return (_LAST,) if name.startswith("attnpool.") else (0.0,)


def _timm_depths(visual: nn.Module, names: list[str]) -> dict[str, tuple[float, ...]]:
    """Lets timm count its trunk; what open_clip puts behind it stands with what timm's patterns leave over."""
    from timm.models import group_parameters

    seen = {n: n.removeprefix(_TRUNK) if n.startswith(_TRUNK) else _AFTER_TRUNK + n for n in names}
    tower = SimpleNamespace(named_parameters=lambda: [(name, None) for name in seen.values()])
    matcher = visual.trunk.group_matcher(coarse=False)  # type: ignore[union-attr,operator]  # untyped
    layers = group_parameters(tower, matcher, reverse=True)
    return {name: (float(layers[seen[name]]),) for name in names}
