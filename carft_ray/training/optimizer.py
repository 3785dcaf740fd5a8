"""AdamW with the parameter groups of the recipe, its learning rate by step, and clipping of gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.tower import layer_factors
from carft_ray.recipe.schema.train import TrainConfig

EPS = 1e-8
BETAS = (0.9, 0.999)


def build_optimizer(classifier: ImageClassifier, train: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW over the image tower and the class head.

    Each group holds ``lr_factor``: its learning rate is the scheduled one times this factor, which differs by layer
    with ``layer_decay``. ``decay: all`` decays every tensor, norms and biases included (the wise-ft family);
    ``decay: matrices`` spares those of fewer than two dimensions (as open_clip does). With L2-SP the tower has no
    decay, which would pull to another place.
    """

    def group(parameters: Sequence[Tensor], decays: bool, lr_factor: float) -> dict[str, Any]:
        weight_decay = train.weight_decay if decays else 0.0
        return {"params": parameters, "weight_decay": weight_decay, "lr_factor": lr_factor}

    decays_all = train.decay == "all"
    factors = layer_factors(classifier.visual, train.layer_decay)
    tower = [(factors[name], p) for name, p in classifier.visual.named_parameters() if p.requires_grad]
    groups = []
    for factor in dict.fromkeys(factor for factor, _ in tower):
        layer = [p for its, p in tower if its == factor]
        groups.append(group([p for p in layer if decays_all or p.ndim >= 2], not train.l2_sp_weight, factor))
        groups.append(group([p for p in layer if not decays_all and p.ndim < 2], False, factor))
    bias = [] if classifier.class_bias is None else [classifier.class_bias]
    if train.head_lr_factor == 0:
        for parameter in (classifier.class_head, *bias):
            parameter.requires_grad_(False)
    else:
        groups.append(group([classifier.class_head], True, train.head_lr_factor))
        groups.append(group(bias, decays_all, train.head_lr_factor))
    groups = [each for each in groups if each["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=BETAS, eps=EPS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the scheduled learning rate, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_factor"]


def clip_gradients(parameters: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """Clips the gradients to ``max_norm`` (None: not at all) and returns their norm before clipping, a scalar."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
