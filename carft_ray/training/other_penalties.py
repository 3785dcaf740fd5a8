"""The penalties of the loss beside CAR-FT's: what keeps the student near the frozen model.

    loss = CE + share * (kl_weight * KL + class_kl_weight * K + feature_weight * F + text_weight * T) + l2_sp_weight * W

With f and f0 the unit features of student and frozen model on the same view, z the student's class logits, C0 the
zero-shot class head and s the logit scale, as means over the global batch:

    KL = KL of contexts (``car_ft_loss``)         share = 1, or with ``penalty_schedule`` 1 - step / number of steps
    K  = KL(softmax(s f0 C0) || softmax(z))       distillation of the class logits, at temperature 1
    F  = 1 - <f, f0> = |f - f0|^2 / 2             distillation of the features
    T  = 1/(2M) sum over m of (s <f - f0, t_m>)^2     Lipsum-FT, arXiv 2404.00860
    W  = 1/2 sum over the image tower of (theta - theta_0)^2      L2-SP, arXiv 1802.01483

The t_m are unit features of M texts of random tokens, drawn anew in each step from seed and step alone. The differences
are written out, so that a penalty of identical models is 0 to the bit. A penalty with weight 0 is never computed.

Shape letters: B images, C classes, T contexts, M texts, L tokens of a text, D embedding width, r rank of LoRA.
"""

from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from carft_ray.data.philox import STREAM_TEXT, words
from carft_ray.model.classifier import at_least_float32
from carft_ray.model.clip import Clip, known_tokens
from carft_ray.model.device import compute_dtype
from carft_ray.model.lora import LowRank
from carft_ray.recipe.schema.train import TrainConfig

NUM_TEXTS, NUM_TOKENS = 80, 8  # of Lipsum-FT


class Reference(NamedTuple):
    """What the penalties compare a worker's part of a batch with; None: no penalty needs it."""

    contexts_BT: Tensor | None = None  # the frozen model's probabilities, in any precision
    features_BD: Tensor | None = None  # its unit features f0
    logits_BC: Tensor | None = None  # s f0 C0
    texts_MD: Tensor | None = None  # s t_m, the same for all images

    def part(self, rows: slice) -> "Reference":
        """Returns what belongs to some of the images."""
        contexts_BT, features_BD, logits_BC = (None if each is None else each[rows] for each in self[:3])
        return Reference(contexts_BT, features_BD, logits_BC, self.texts_MD)


def share_at(train: TrainConfig, step: int, num_steps: int) -> float:
    """Returns the factor of all penalties but L2-SP in update ``step`` (from 0)."""
    return 1.0 if train.penalty_schedule == "constant" else 1 - step / num_steps


def feature_sums(train: TrainConfig, features_BD: Tensor, logits_BC: Tensor, reference: Reference) -> list[Tensor]:
    """Returns the sums over the images of K, F and T, those with a weight (``TrainConfig.feature_terms``).

    Args:
        train: Its weights.
        features_BD: The student's image embeddings, normalised here.
        logits_BC: The student's class logits.
        reference: Of these images.
    """

    _, features0_BD, logits0_BC, texts_MD = reference
    if features0_BD is None or logits0_BC is None:
        return []
    sums = []
    with torch.autocast(features_BD.device.type, enabled=False):
        moved_BD = functional.normalize(at_least_float32(features_BD), dim=-1) - features0_BD
        if train.class_kl_weight:
            log_p_BC, log_p0_BC = (functional.log_softmax(z_BC, dim=-1) for z_BC in (logits_BC, logits0_BC))
            sums.append(functional.kl_div(log_p_BC, log_p0_BC, reduction="sum", log_target=True))
        if train.feature_weight:
            sums.append(moved_BD.square().sum() / 2)
        if texts_MD is not None:
            sums.append((moved_BD @ texts_MD.T).square().sum() / (2 * len(texts_MD)))
    return sums


class RandomTexts:
    """The texts of Lipsum-FT: ``NUM_TOKENS`` tokens of the vocabulary each, where a tokenizer puts those of a sentence.

    Args:
        clip: The model; a copy of its text tower lies on the device.
        train: Seed and precision.
        device: Where the tower runs.
    """

    def __init__(self, clip: Clip, train: TrainConfig, device: torch.device) -> None:
        model = deepcopy(clip.model, {id(clip.model.visual): nn.Identity()})  # without the image tower
        self.model = model.to(device, torch.float64 if train.precision == "fp64" else torch.float32)
        self.logit_scale, self.seed, self.device = clip.logit_scale, train.seed, device
        self.autocast_dtype = compute_dtype(train, device)
        self.frame_L, word_L = clip.tokenizer(["", "a"]).numpy()  # start and end of a text, filled up
        self.place = int(np.argmax(self.frame_L != word_L))
        self.vocabulary = np.setdiff1d(known_tokens(clip), self.frame_L)

    def tokens(self, step: int) -> Tensor:
        """Returns the token ids of update ``step`` [M, L]: a function of seed and step."""
        number = min(NUM_TOKENS, len(self.frame_L) - self.place - 1)  # the end of a text stays
        drawn = words(self.seed, STREAM_TEXT, step, np.arange(NUM_TEXTS), NUM_TOKENS // 4).reshape(NUM_TEXTS, -1)
        ids = self.vocabulary[drawn[:, :number].astype(np.uint64) * np.uint64(len(self.vocabulary)) >> np.uint64(32)]
        frame_ML = np.broadcast_to(self.frame_L, (NUM_TEXTS, len(self.frame_L)))
        return torch.from_numpy(np.hstack([frame_ML[:, : self.place], ids, frame_ML[:, self.place : -number]]))

    @torch.no_grad()
    def of(self, step: int) -> Tensor:
        """Returns the unit features of the texts of update ``step`` times the logit scale, [M, D]."""
        dtype, tokens_ML = self.autocast_dtype, self.tokens(step)
        if self.device.type == "cuda":  # a copy from other memory waits for all that the device is to compute
            tokens_ML = tokens_ML.pin_memory()
        tokens_ML = tokens_ML.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            texts_MD = self.model.encode_text(tokens_ML)  # type: ignore[operator]  # untyped
        return self.logit_scale * functional.normalize(at_least_float32(texts_MD), dim=-1)


class Anchor:
    """The start of an image tower, to which L2-SP pulls it back; LoRA's corrections are the whole distance from it.

    Args:
        visual: The tower at its start, with what trains.
        weight: ``l2_sp_weight``.
    """

    def __init__(self, visual: nn.Module, weight: float) -> None:
        self.weight, self.device = weight, next(visual.parameters()).device
        self.corrections = [module for module in visual.modules() if isinstance(module, LowRank)]
        self.trained = [] if self.corrections else [each for each in visual.parameters() if each.requires_grad]
        self.starts = [parameter.detach().clone() for parameter in self.trained]

    @torch.no_grad()
    def pull(self) -> Tensor:
        """Adds the gradient of ``weight * W`` to the gradients; returns W, a scalar, float64.

        Of a correction c B A, |c B A|^2 is the sum of (c^2 B'B) * (A A'), two matrices [r, r].
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)

        def add(parameter: Tensor, gradient: Tensor, squared: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.add_(gradient, alpha=self.weight)
            total.add_(squared)

        for parameter, start in zip(self.trained, self.starts, strict=True):
            moved = parameter - start
            add(parameter, moved, moved.square().sum())
        for each in self.corrections:
            of_A_rr, of_B_rr = each.A @ each.A.T, each.scale**2 * each.B.T @ each.B
            squared = (of_A_rr * of_B_rr).sum() / 2  # once for each factor
            add(each.A, of_B_rr @ each.A, squared)
            add(each.B, each.scale**2 * each.B @ of_A_rr, squared)
        return total / 2
