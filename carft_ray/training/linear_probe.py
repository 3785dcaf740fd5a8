"""The linear probe before a fine-tuning (LP-FT, arXiv 2202.10054): the class head alone, on the frozen image tower.

The features of all training images under the evaluation preprocessing are computed once, by all workers together. Each
worker then trains the head on all of them, from the zero-shot head, with AdamW, ``LEARNING_RATE``, and batch size,
weight decay, clipping, label smoothing and form of the schedule of the recipe. The fine-tuning begins with this head
and a schedule of its own. alpha mixes with the zero-shot head as ever.

Shape letters: N training images, B images of a batch, C classes, D embedding width, S side of an image.
"""

import contextlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from carft_ray.data.source import PixelArray, Source, in_order
from carft_ray.data.views import permutation
from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.clip import Clip
from carft_ray.recipe.schedule import num_warmup_steps
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.optimizer import BETAS, EPS, clip_gradients, learning_rate_at
from carft_ray.training.ranks import gather
from carft_ray.training.run_context import RunContext

LEARNING_RATE = 1e-3


def probe(
    classifier: ImageClassifier,
    clip: Clip,
    source: Source,
    train: TrainConfig,
    context: RunContext,
    micro_batch: int,
    num_threads: int,
    end_if_asked: Callable[[], None],
) -> None:
    """Trains the class head of a classifier, in place, for ``probe_epochs``.

    Args:
        classifier: As a training starts, on its device.
        clip: Has the preprocessing.
        source: The training set.
        train: Hyperparameters.
        context: Rank and number of workers.
        micro_batch: Images of a forward pass.
        num_threads: Threads that decode images.
        end_if_asked: Called on all ranks now and then, also as a heartbeat; may raise.

    Raises:
        DataError: An image cannot be read.
    """
    features_ND = _features(classifier, clip, source, context, micro_batch, num_threads, end_if_asked)
    device, labels_N = classifier.class_head.device, torch.tensor(source.labels)
    trained = [each for each in (classifier.class_head, classifier.class_bias) if each is not None]
    head = [each.detach().clone().requires_grad_() for each in trained]
    decays = [train.weight_decay if train.decay == "all" or each.ndim > 1 else 0.0 for each in head]
    groups = [{"params": [each], "weight_decay": decay} for each, decay in zip(head, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    num_steps = train.probe_epochs * math.ceil(len(source) / train.batch_size)
    warmup, step = num_warmup_steps(train.warmup_steps, num_steps), 0
    for epoch in range(train.probe_epochs):
        end_if_asked()
        for rows in torch.split(torch.from_numpy(permutation(train.seed, epoch, len(source))), train.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, LEARNING_RATE, warmup, num_steps)
            logits_BC = functional.linear(features_ND[rows].to(device), *head)
            labels_B = labels_N[rows].to(device)
            functional.cross_entropy(logits_BC, labels_B, label_smoothing=train.label_smoothing).backward()  # type: ignore[no-untyped-call]
            clip_gradients(head, train.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    with torch.no_grad():
        for parameter, value in zip(trained, head, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def _features(
    classifier: ImageClassifier,
    clip: Clip,
    source: Source,
    context: RunContext,
    micro_batch: int,
    num_threads: int,
    end_if_asked: Callable[[], None],
) -> Tensor:
    """Returns the unit features of all images, on the CPU [N, D]; worker r of w computes those of r, r + w, ..."""

    def seen(index: int) -> PixelArray:
        return np.asarray(clip.to_input(Image.fromarray(source.pixels(index))).convert("RGB"))

    device, mine = classifier.class_head.device, range(context.rank, len(source), context.world_size)
    parts = [torch.zeros(0, classifier.class_head.shape[1], dtype=classifier.class_head.dtype)]
    with contextlib.closing(in_order(seen, mine, max(num_threads, 1))) as images:
        for _ in range(math.ceil(len(source) / (micro_batch * context.world_size))):  # as many on each rank
            end_if_asked()
            if batch := list(itertools.islice(images, micro_batch)):
                features_BD = classifier.features(torch.from_numpy(np.stack(batch)).to(device))
                parts.append(functional.normalize(features_BD, dim=-1).cpu())
    features_ND = parts[0].new_empty(len(source), parts[0].shape[1])
    for rank, part in enumerate(gather(context, torch.cat(parts))):
        features_ND[rank :: context.world_size] = part
    return features_ND
