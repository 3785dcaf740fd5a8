"""The linear probe before a fine-tuning (LP-FT, arXiv 2202.10054): the class head alone, on the frozen image tower.

The features of all training images under the evaluation preprocessing are computed once, by all workers together. Each
worker then trains the head on all of them, from the zero-shot head, with AdamW, ``LEARNING_RATE``, and batch size,
weight decay, clipping, label smoothing and form of the schedule of the recipe; that of rank 0 counts. The fine-tuning
begins with this head and a schedule of its own. alpha mixes with the zero-shot head as ever.

Shape letters: N training images, B images of a batch, C classes, D embedding width.
"""

import contextlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from carft_ray.data.source import PixelArray, Source, in_order
from carft_ray.data.views import permutation
from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.clip import Clip
from carft_ray.recipe.schedule import learning_rate_at, num_warmup_steps
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from carft_ray.training.ranks import from_rank_0, gather
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

    def seen(index: int) -> PixelArray:
        return np.asarray(clip.to_input(Image.fromarray(source.pixels(index))).convert("RGB"))

    num_images, num_ranks, device = len(source), context.world_size, classifier.class_head.device
    parts: list[Tensor] = [classifier.class_head.detach().cpu()[:0]]  # of this rank: images rank, rank + num_ranks, ...
    mine = range(context.rank, num_images, num_ranks)
    with torch.no_grad(), contextlib.closing(in_order(seen, mine, max(num_threads, 1))) as images:
        for _ in range(math.ceil(num_images / (micro_batch * num_ranks))):  # as many on each rank
            end_if_asked()
            if batch := list(itertools.islice(images, micro_batch)):
                parts.append(classifier.features(torch.from_numpy(np.stack(batch)).to(device)).cpu())
    features_ND = parts[0].new_empty(num_images, parts[0].shape[1])
    for rank, part in enumerate(gather(context, torch.cat(parts))):
        features_ND[rank::num_ranks] = part

    no_tower, has_bias = nn.Identity(), classifier.class_bias is not None
    head = ImageClassifier(no_tower, classifier.class_head, 1.0, clip.mean, clip.std, has_bias).to(device)
    optimizer = build_optimizer(head, train.model_copy(update={"head_lr_factor": 1.0}))
    num_steps, step = train.probe_epochs * math.ceil(num_images / train.batch_size), 0
    warmup, labels_N = num_warmup_steps(train.warmup_steps, num_steps), torch.tensor(source.labels)
    for epoch in range(train.probe_epochs):
        end_if_asked()
        for rows in torch.split(torch.from_numpy(permutation(train.seed, epoch, num_images)), train.batch_size):
            set_learning_rate(optimizer, learning_rate_at(step, LEARNING_RATE, warmup, num_steps))
            logits_BC, labels_B = head.logits(features_ND[rows].to(device)), labels_N[rows].to(device)
            functional.cross_entropy(logits_BC, labels_B, label_smoothing=train.label_smoothing).backward()  # type: ignore[no-untyped-call]
            clip_gradients(list(head.parameters()), train.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    classifier.load_state_dict(from_rank_0(context, lambda: head.cpu().state_dict()), strict=False)
