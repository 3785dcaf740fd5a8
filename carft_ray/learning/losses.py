"""The loss of CAR-FT.

Source: CAR-FT, arXiv 2211.16175 (the abstract); the formula is written out here:

    z[b, t] = s * <f[b], context_head[t]>        p = softmax over t        f normalised, float32 or wider
    KL      = 1/B * sum_b sum_t p0[b, t] * (log p0[b, t] - log p[b, t])    p0: the frozen model on the same view

Shape letters: B images, D embedding width, T contexts.
"""

import torch
from torch import Tensor
from torch.nn import functional


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns ``tensor`` in float32, or as it is when it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def context_distribution(features_BD: Tensor, context_head_TD: Tensor, logit_scale: float) -> Tensor:
    """Returns the log-probabilities of the contexts, ``log p`` [B, T].

    Args:
        features_BD: Image embeddings [B, D], normalised here.
        context_head_TD: One unit vector per context prompt [T, D].
        logit_scale: The factor s inside the softmax. Without it the KL is about 1e-4 and does nothing.

    Runs outside autocast in float32 or wider: bf16 logits of size 16 to 32 have steps of 0.125.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD: Tensor = functional.normalize(at_least_float32(features_BD), dim=-1)
        z_BT: Tensor = logit_scale * unit_BD @ context_head_TD.to(unit_BD.dtype).T
        return functional.log_softmax(z_BT, dim=-1)


def context_kl(log_p_BT: Tensor, zero_shot_BT: Tensor, log_target: bool = True) -> Tensor:
    """Returns KL(p0 || p) of every image [B], natural logarithms; the KL of the loss is its mean over the batch.

    Exactly 0 where both are the same log-probabilities, bit for bit.

    Args:
        log_p_BT: Log-probabilities of the model being trained [B, T].
        zero_shot_BT: ``log p0`` of the frozen model on the same views [B, T].
        log_target: False where these are probabilities instead, stored in any precision. They are renormalised here:
            fp16 values do not sum to 1, and the KL would become negative (-3e-4 was measured).
    """
    if not log_target:
        zero_shot_BT = zero_shot_BT.to(log_p_BT.dtype)
        zero_shot_BT = zero_shot_BT / zero_shot_BT.sum(-1, keepdim=True)
    return functional.kl_div(log_p_BT, zero_shot_BT, reduction="none", log_target=log_target).sum(-1)


def context_entropy(log_p_BT: Tensor) -> Tensor:
    """Returns the mean entropy of the context distributions in nats, a scalar."""
    return -(log_p_BT.exp() * log_p_BT).sum(-1).mean()
