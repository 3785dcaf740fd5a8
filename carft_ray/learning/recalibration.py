"""New running statistics for the BatchNorm layers of mixed weights.

Mixed weights have other activations than either end, and the statistics of the start do not fit them (REPAIR, arXiv
2211.08403; SWA does the same for its average, arXiv 1803.05407). The mean over batches of the batch mean and of the
unbiased batch variance takes their place, layer by layer in one pass: ``momentum=None`` of torch's BatchNorm.

Every worker goes over the same images in the same batches, so statistics depend neither on the number of workers nor
on the memory of a device.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from carft_ray.data.source import PixelArray, Source
from carft_ray.errors import OutOfMemoryError
from carft_ray.learning.classifier import ImageClassifier
from carft_ray.learning.memory import is_out_of_memory, shortage
from carft_ray.learning.models.clip import Clip
from carft_ray.recipe.schedule import RECALIBRATION_BATCH, num_recalibrated


def clean_views(clip: Clip, source: Source, num_batches: int) -> PixelArray:
    """Returns training images as evaluations see images, uint8 [N, S, S, 3]: those with the lowest sample ids.

    Sample ids are hashes, so the classes are mixed.

    Raises:
        DataError: An image cannot be read.
    """
    order = np.argsort(source.sample_ids, kind="stable")[: num_recalibrated(num_batches, len(source))]
    return np.stack([np.array(clip.to_input(Image.fromarray(source.pixels(index)))) for index in order.tolist()])


def recalibrate(classifier: ImageClassifier, views_NHWC: PixelArray) -> None:
    """Computes the running statistics of all BatchNorm layers anew, in place; the classifier is in eval mode then.

    Args:
        classifier: With the weights that the statistics are for.
        views_NHWC: ``clean_views``, N >= 1.

    Raises:
        OutOfMemoryError: A batch does not fit; fewer images at a time would give other statistics.
    """
    classifier.eval()
    norms = [m for m in classifier.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    device = classifier.class_head.device
    for norm in norms:
        norm.num_batches_tracked = torch.tensor(0, device=device)  # the mean counts from here
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for start in range(0, len(views_NHWC), RECALIBRATION_BATCH):
                classifier.features(torch.from_numpy(views_NHWC[start : start + RECALIBRATION_BATCH]).to(device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        image_size = views_NHWC.shape[1]
        raise OutOfMemoryError(
            shortage("train.recalibrate_batches", RECALIBRATION_BATCH, image_size, device)
        ) from error
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
            norm.eval()
