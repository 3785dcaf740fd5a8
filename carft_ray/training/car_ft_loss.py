"""The loss of CAR-FT; ``other_penalties`` has the other terms.

    loss = 1/B * sum_b CE(class_logits[b], y[b]) + kl_weight * 1/B * sum_b KL(p0[b] || p[b])       B: the global batch

Sums over samples are divided by the size of the global batch, so the gradient is the same for any split into workers
and micro-batches. With all weights 0 the frozen model never runs and the loss is that of plain fine-tuning. Source of
the KL term: CAR-FT, arXiv 2211.16175 (the abstract); the formula is written out here:

    z[b, t] = s * <f[b], context_head[t]>        p = softmax over t        f normalised, float32 or wider
    KL      = 1/B * sum_b sum_t p0[b, t] * (log p0[b, t] - log p[b, t])    p0: the frozen model on the same view

Shape letters: B images, D embedding width, T contexts.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from carft_ray.model.classifier import at_least_float32
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.other_penalties import Reference, feature_sums


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


@dataclass(frozen=True)
class Loss:
    """The loss of one worker's part of a global batch, in micro-batches."""

    context_head_TD: Tensor
    context_scale: float
    train: TrainConfig

    @property
    def names(self) -> tuple[str, ...]:
        """What ``backward`` sums."""
        return ("ce", "kl", "context_entropy", *self.train.feature_terms)

    def backward(
        self,
        model: nn.Module,
        pixels_BHWC: Tensor,
        labels_B: Tensor,
        reference: Reference,
        factor: float,
        share: float = 1.0,
    ) -> Tensor:
        """Adds the gradient of this part; returns its sums (``names``), float64, with neither weight nor share.

        Args:
            model: Gives embeddings and class logits.
            pixels_BHWC: Views, uint8.
            labels_B: Of the images.
            reference: The frozen model's answers to these views (``targets``).
            factor: Number of workers / size of the global batch: the workers' gradients are averaged by
                ``DistributedDataParallel``, so the number of workers makes that the sum over the batch that is wanted.
            share: Of all penalties (``other_penalties.share_at``).
        """
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=labels_B.device)
        micro_batch = self.train.micro_batch or max(len(labels_B), 1)
        starts = range(0, max(len(labels_B), 1), micro_batch)
        for start in starts:
            part = slice(start, start + micro_batch)
            waits = isinstance(model, DistributedDataParallel) and start != starts[-1]
            with model.no_sync() if waits else nullcontext():  # type: ignore[operator]  # waits: it is a DDP
                loss_sum, values = self._sums(model, pixels_BHWC[part], labels_B[part], reference.part(part), share)
                (loss_sum * factor).backward()  # type: ignore[no-untyped-call]
            sums += values
        return sums

    def _sums(
        self, model: nn.Module, pixels_BHWC: Tensor, labels_B: Tensor, reference: Reference, share: float
    ) -> tuple[Tensor, Tensor]:
        if len(labels_B) == 0:  # a last batch with fewer images than workers: take part with gradient 0
            blank_BHWC = pixels_BHWC.new_zeros(1, *pixels_BHWC.shape[1:])
            none = torch.zeros(len(self.names), dtype=torch.float64, device=pixels_BHWC.device)
            return model(blank_BHWC)[1].sum() * 0, none
        features_BD, logits_BC = model(pixels_BHWC)
        ce = functional.cross_entropy(logits_BC, labels_B, reduction="sum", label_smoothing=self.train.label_smoothing)
        zero_shot_BT = reference.contexts_BT
        with torch.set_grad_enabled(zero_shot_BT is not None):
            log_p_BT = context_distribution(features_BD, self.context_head_TD, self.context_scale)
        kl = torch.zeros_like(ce)
        if zero_shot_BT is not None:
            kl = context_kl(log_p_BT, zero_shot_BT, log_target=False).sum()
        entropy = context_entropy(log_p_BT.detach()) * len(labels_B)
        others = feature_sums(self.train, features_BD, logits_BC, reference)
        values = torch.stack([value.detach().double() for value in (ce, kl, entropy, *others)])
        loss = ce if zero_shot_BT is None else ce + share * self.train.kl_weight * kl
        for name, value in zip(self.train.feature_terms, others, strict=True):
            loss = loss + share * getattr(self.train, f"{name}_weight") * value
        return loss, values
