"""AdamW with the parameter groups of the recipe, and clipping that does not depend on the form of the head.

The two forms of the class head are the same method: with W' = s * W (s the logit scale),

    folded(lr, wd, eps) == unit(lr / s, wd * s, eps * s)      gradient of W' = gradient of W divided by s

so `unit` gets these values, and its head gradient enters the norm divided by s.
"""

from typing import Any

import torch
from torch import Tensor, nn

from carft_ray.learning.classifier import ImageClassifier
from carft_ray.learning.models.tower import layer_factors
from carft_ray.recipe.fine_tuning import TrainConfig

EPS = 1e-8
BETAS = (0.9, 0.999)


def build_optimizer(classifier: ImageClassifier, train: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW over the image tower and the class head.

    Each group holds ``lr_factor``: its learning rate is the scheduled one times this factor, which differs by layer
    with ``layer_decay``. ``decay: all`` decays every tensor, norms and biases included (the wise-ft family);
    ``decay: matrices`` spares those of fewer than two dimensions (the habit of open_clip).
    """
    scale = classifier.logit_scale if classifier.form == "unit" else 1.0
    factors = layer_factors(classifier.visual, train.layer_decay)
    tower = [(factors[name], p) for name, p in classifier.visual.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys(factor for factor, _ in tower):
        layer = [p for its, p in tower if its == factor]
        decayed = layer if train.decay == "all" else [p for p in layer if p.ndim >= 2]
        spared = [] if train.decay == "all" else [p for p in layer if p.ndim < 2]
        groups += [
            {"params": decayed, "weight_decay": train.weight_decay, "eps": EPS, "lr_factor": factor},
            {"params": spared, "weight_decay": 0.0, "eps": EPS, "lr_factor": factor},
        ]
    if train.head_lr_factor == 0:
        classifier.class_head.requires_grad_(False)
        if classifier.class_bias is not None:
            classifier.class_bias.requires_grad_(False)
    else:
        head = {
            "weight_decay": train.weight_decay * scale,
            "eps": EPS * scale,
            "lr_factor": train.head_lr_factor / scale,
        }
        groups.append({"params": [classifier.class_head], **head})
        if classifier.class_bias is not None:
            decay = train.weight_decay if train.decay == "all" else 0.0
            bias = {"weight_decay": decay, "eps": EPS, "lr_factor": train.head_lr_factor}
            groups.append({"params": [classifier.class_bias], **bias})
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=BETAS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the scheduled learning rate, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_factor"]


def clip_gradients(classifier: ImageClassifier, max_norm: float | None) -> Tensor:
    """Clips the gradients to ``max_norm`` (None: not at all) and returns their norm before clipping, a scalar.

    The norm is that of the folded form, whichever form the head has.
    """
    parameters = [p for p in classifier.parameters() if p.grad is not None]
    gradients = [_folded_gradient(classifier, p) for p in parameters]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _folded_gradient(classifier: ImageClassifier, parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        raise ValueError("the parameter has no gradient")
    if parameter is classifier.class_head and classifier.form == "unit":
        return gradient / classifier.logit_scale
    return gradient
