"""Running a classifier over decoded sets, shared out over the workers of a training, exactly."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from carft_ray.data.source import ImageSet
from carft_ray.evaluation.predictions import concat, predictions_table
from carft_ray.model.classifier import ImageClassifier
from carft_ray.training.out_of_memory import in_batches
from carft_ray.training.prefetch import images_ahead
from carft_ray.training.ranks import gather
from carft_ray.training.run_context import RunContext


def predict(
    classifier: ImageClassifier, image_set: ImageSet, alpha: float, batch_size: int, context: RunContext
) -> pa.Table:
    """Returns the predictions for the images of a set, the same table on every worker.

    Worker r of w evaluates the images r, r + w, r + 2 w, ...; the parts are put together by position,
    so counts are exact whatever w is.

    Args:
        classifier: On the device where it is to run.
        image_set: N decoded images of the model's input size.
        alpha: Written into the table.
        batch_size: Images per forward pass, fewer where they do not fit into memory.
        context: Rank and number of workers.
    """
    device = classifier.class_head.device
    positions = np.arange(context.rank, len(image_set), context.world_size)
    classifier.eval()

    def logits_of(batch: np.ndarray) -> np.ndarray:
        context.should_stop()  # a sign of life: a long evaluation is no training that hangs
        return np.asarray(classifier(images_of(batch))[1].float().cpu())

    ahead = device.type != "cpu"
    with torch.inference_mode(), images_ahead(image_set.images_NHWC, positions, device, ahead) as images_of:
        parts = in_batches(logits_of, positions, batch_size, image_set.images_NHWC.shape[1], device)
    logits_NC = np.concatenate(parts) if parts else np.zeros((0, len(classifier.class_head)), np.float32)
    ids, labels = image_set.sample_ids[positions], image_set.labels[positions]
    table = predictions_table(image_set.name, alpha, ids, labels, logits_NC, image_set.groups)
    all_positions, tables = zip(*gather(context, (positions, table)), strict=True)
    return concat(tables).take(pa.array(np.argsort(np.concatenate(all_positions))))


def predict_all(
    classifier: ImageClassifier,
    sets: Sequence[ImageSet],
    alpha: float,
    batch_size: int,
    context: RunContext,
) -> pa.Table:
    """Returns the predictions for several sets in one table.

    Args:
        classifier, alpha, batch_size, context: As for ``predict``.
        sets: One after the other.
    """
    return concat([predict(classifier, image_set, alpha, batch_size, context) for image_set in sets])


def subset(image_set: ImageSet, num_images: int) -> ImageSet:
    """Returns the ``num_images`` images with the lowest sample ids, all if there are fewer; ids are hashes."""
    if len(image_set) <= num_images:
        return image_set
    chosen = np.sort(np.argsort(image_set.sample_ids, kind="stable")[:num_images])
    arrays = {name: getattr(image_set, name)[chosen] for name in ("images_NHWC", "labels", "sample_ids")}
    return dataclasses.replace(image_set, **arrays)
