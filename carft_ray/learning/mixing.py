"""Weights between and around two models: mixing, new BatchNorm statistics of mixed weights, and the running average.

Mixing (WiSE-FT, arXiv 2109.01903): theta_alpha = (1 - alpha) * theta_0 + alpha * theta.

Mixed weights have other activations than either end, and the BatchNorm statistics of the start do not fit them (REPAIR,
arXiv 2211.08403; SWA does the same for its average, arXiv 1803.05407). The mean over batches of the batch mean and of
the unbiased batch variance takes their place, layer by layer in one pass: ``momentum=None`` of torch's BatchNorm. Every
worker runs the same images in the same batches, so statistics depend neither on the number of workers nor on the memory
of a device.

The exponential moving average of the weights over the steps of a training is

    average[t] = sum over i = 0..t of d^(t - i) w[i]  /  sum over i = 0..t of d^(t - i)        d = ema_decay

w[0] are the zero-shot weights and count as one step like the others: divided by the sum of its weights the average is
not pulled to its start (the bias correction of Adam, arXiv 1412.6980). Step by step it is

    average[t] = average[t - 1] + (1 - d) / (1 - d^(t + 1)) * (w[t] - average[t - 1])
"""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from carft_ray.data.source import PixelArray, Source
from carft_ray.learning.classifier import ImageClassifier
from carft_ray.learning.memory import explained_shortage
from carft_ray.learning.models.clip import Clip
from carft_ray.recipe.schedule import RECALIBRATION_BATCH, num_recalibrated

State = Mapping[str, Tensor]


def mix_weights(zero_shot_state: State, fine_tuned_state: State, alpha: float) -> dict[str, Tensor]:
    """Returns the mixed state; at 0 and 1 bit for bit the end models.

    All floating tensors are mixed, class head and BatchNorm statistics included. Integer buffers and tensors that are
    the same at both ends (constant tables, statistics of a BatchNorm in eval mode) are copied from ``zero_shot_state``.

    Args:
        zero_shot_state: Name -> tensor of the model that training started from.
        fine_tuned_state: The same names and shapes after training.
        alpha: Weight of ``fine_tuned_state``, in [0, 1].

    Raises:
        ValueError: ``alpha`` is outside [0, 1], or names or shapes differ.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"0 <= alpha <= 1 must hold, but got alpha={alpha}")
    odd = sorted(zero_shot_state.keys() ^ fine_tuned_state.keys()) or [
        name for name, tensor in zero_shot_state.items() if tensor.shape != fine_tuned_state[name].shape
    ]
    if odd:
        raise ValueError(f"both states must have the same names and shapes, but these differ: {', '.join(odd[:5])}")
    return {name: _mix(zero_shot_state[name], fine_tuned_state[name], alpha) for name in zero_shot_state}


def _mix(zero_shot: Tensor, fine_tuned: Tensor, alpha: float) -> Tensor:
    if not zero_shot.is_floating_point() or alpha == 0 or torch.equal(zero_shot, fine_tuned):
        return zero_shot.clone()
    if alpha == 1:
        return fine_tuned.clone()
    return (1 - alpha) * zero_shot + alpha * fine_tuned


def load_mixture(
    classifier: ImageClassifier, zero_shot: State, fine_tuned: State, alpha: float, views_NHWC: PixelArray | None = None
) -> None:
    """Gives a classifier the weights mixed at ``alpha``, with statistics from ``clean_views`` where they are given."""
    classifier.load_state_dict(mix_weights(zero_shot, fine_tuned, alpha))
    recalibrate(classifier, views_NHWC)


def clean_views(clip: Clip, source: Source, num_batches: int) -> PixelArray | None:
    """Returns training images as evaluations see images, uint8 [N, S, S, 3]: those with the lowest sample ids.

    Sample ids are hashes, so the classes are mixed. None where ``num_batches`` (``train.recalibrate_batches``) is 0.

    Raises:
        DataError: An image cannot be read.
    """
    if not num_batches:
        return None
    order = np.argsort(source.sample_ids, kind="stable")[: num_recalibrated(num_batches, len(source))]
    return np.stack([np.array(clip.to_input(Image.fromarray(source.pixels(index)))) for index in order.tolist()])


def recalibrate(classifier: ImageClassifier, views_NHWC: PixelArray | None) -> None:
    """Computes the running statistics of all BatchNorm layers anew, in place; the classifier is in eval mode then.

    Args:
        classifier: With the weights that the statistics are for.
        views_NHWC: ``clean_views``, N >= 1; None: nothing is done.

    Raises:
        OutOfMemoryError: A batch does not fit; fewer images at a time would give other statistics.
    """
    if views_NHWC is None:
        return
    classifier.eval()
    norms = [m for m in classifier.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    device, image_size = classifier.class_head.device, views_NHWC.shape[1]
    for norm in norms:
        norm.num_batches_tracked = torch.tensor(0, device=device)  # the mean counts from here
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad(), explained_shortage("train.recalibrate_batches", RECALIBRATION_BATCH, image_size, device):
            for start in range(0, len(views_NHWC), RECALIBRATION_BATCH):
                classifier.features(torch.from_numpy(views_NHWC[start : start + RECALIBRATION_BATCH]).to(device))
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
            norm.eval()


def update_average(average: State, weights: State, decay: float, step: int) -> None:
    """Takes the weights after step ``step`` (from 1) into the average, in place; on a GPU in a few kernels."""
    share = (1 - decay) / (1 - decay ** (step + 1))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], share)
