"""The mixtures of a training, and running a classifier over decoded sets, shared out over its workers, exactly.

What a table of predictions holds of class logits is made on the device where they are; no logit leaves it. Nothing
waits for the device before the end of a set, when 40 bytes an image leave it.

Shape letters: B images, C classes, G groups of classes, F classes that are in a group.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from carft_ray.data.source import ImageSet
from carft_ray.evaluation.predictions import LAST_RANK, OF_LOGITS, concat, predictions_table
from carft_ray.model.classifier import ImageClassifier, arranged, build_classifier
from carft_ray.model.clip import Clip
from carft_ray.model.mixing import State, mix_into
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.out_of_memory import explained_shortage, in_batches
from carft_ray.training.prefetch import images_ahead
from carft_ray.training.ranks import gather
from carft_ray.training.run_context import RunContext

Answers = Callable[[Tensor, Tensor], Tensor]


class Mixtures:
    """The mixtures of one training, one after the other in the same classifier.

    Outside of ``between`` the classifier shares the weights of ``clip`` and takes no memory of its own. Within, a GPU
    holds the classifier and one copy of the zero-shot weights.

    Each of its methods raises ``OutOfMemoryError`` where these do not fit.

    Args:
        clip: The model that training starts from.
        class_head_CD: Unit rows [C, D].
        train: The values of the training.
        device: Where to compute.

    Attributes:
        zero_shot: The zero-shot state, on the CPU.
    """

    def __init__(self, clip: Clip, class_head_CD: Tensor, train: TrainConfig, device: torch.device) -> None:
        self._device = device
        with self._explained():
            self._classifier = build_classifier(clip, class_head_CD, train, device)
        tower = {f"visual.{name}": tensor for name, tensor in clip.model.visual.state_dict().items()}  # type: ignore[union-attr]  # open_clip is untyped
        own = self._classifier.state_dict()
        self.zero_shot = {name: tower.get(name, own[name]).to("cpu", own[name].dtype) for name in own}
        self._classifier.load_state_dict(self.zero_shot, assign=True)

    @contextlib.contextmanager
    def between(self, fine_tuned: Callable[[], State]) -> Iterator[Callable[[float], ImageClassifier]]:
        """Gives a function that mixes the weights at an alpha and returns the classifier, the same one each time.

        Args:
            fine_tuned: Returns the state at alpha 1, on the CPU or the device.
        """
        with self._explained():
            end = fine_tuned()
            try:
                start = {name: tensor.to(self._device) for name, tensor in self.zero_shot.items()}
                self._classifier.load_state_dict({name: tensor.clone() for name, tensor in start.items()}, assign=True)
                arranged(self._classifier)
                mixed = self._classifier.state_dict()

                def at(alpha: float) -> ImageClassifier:
                    mix_into(mixed, start, end, alpha)
                    return self._classifier

                yield at
            finally:
                self._classifier.load_state_dict(self.zero_shot, assign=True)

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained_shortage("mixing", 0, 0, self._device)


def usual_batch(device: torch.device) -> int:
    """Returns the images of a forward pass of an evaluation.

    Measured on a CPU with EfficientNet-Lite0 at 112 pixels, two threads: 32 images at a time take 2.6 ms each, 128 take
    4.2 ms, since the system gives and takes back larger tensors page by page.
    """
    return 32 if device.type == "cpu" else 512


def predict(
    classifier: ImageClassifier, image_set: ImageSet, alpha: float, batch_size: int | None, context: RunContext
) -> pa.Table:
    """Returns the predictions for the images of a set, the same table on every worker.

    Worker r of w evaluates the images r, r + w, r + 2 w, ...; the parts are put together by position,
    so counts are exact whatever w is.

    Args:
        classifier: On the device where it is to run.
        image_set: N decoded images of the model's input size.
        alpha: Written into the table.
        batch_size: Images per forward pass, fewer where they do not fit into memory; None: ``usual_batch``.
        context: Rank and number of workers.

    Raises:
        DivergedError: A logit is not finite.
        OutOfMemoryError: One image does not fit.
        ValueError: With groups, a label is no first class.
    """
    device, groups = classifier.class_head.device, image_set.groups
    positions = np.arange(context.rank, len(image_set), context.world_size)
    ids, labels = image_set.sample_ids[positions], image_set.labels[positions]
    if groups is not None and not np.isin(labels, [group[0] for group in groups]).all():
        raise ValueError("labels must be the first class of a group")
    answer = answers if groups is None else answers_between(groups, device)
    batch_size = batch_size or usual_batch(device)
    side, ahead = image_set.images_NHWC.shape[1], device.type != "cpu"
    classifier.eval()
    with (
        explained_shortage("evaluation", min(batch_size, max(1, len(positions))), side, device),
        torch.inference_mode(),
        images_ahead(image_set.images_NHWC, positions, device, ahead) as images_of,
    ):
        labels_N = torch.from_numpy(labels).to(device)

        def answers_to(batch: np.ndarray) -> Tensor:
            context.should_stop()  # a sign of life: a long evaluation is no training that hangs
            start = int(np.searchsorted(positions, batch[0]))
            return answer(classifier(images_of(batch))[1], labels_N[start : start + len(batch)])

        parts = in_batches(answers_to, positions, batch_size, side, device)
        answers_N5 = torch.cat([labels_N.new_zeros(0, len(OF_LOGITS)).double(), *parts]).cpu().numpy()
    table = predictions_table(image_set.name, alpha, ids, labels, answers_N5)
    all_positions, tables = zip(*gather(context, (positions, table)), strict=True)
    return concat(tables).take(pa.array(np.argsort(np.concatenate(all_positions))))


def predict_all(
    classifier: ImageClassifier,
    sets: Sequence[ImageSet],
    alpha: float,
    batch_size: int | None,
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


def answers(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the columns ``predictions.OF_LOGITS`` of class logits, float64 [B, 5], without waiting for the device.

    The prediction is the class with the largest logit; equal logits, as float32, are ordered by class index. So the
    result depends on the logits alone. Probabilities are taken in float64 with the largest logit subtracted.

    Args:
        logits_BC: Where one is not finite, ``nll`` is NaN.
        labels_B: True classes, each in 0 .. C - 1, on the same device.
    """
    logits_BC, labels_B1 = logits_BC.float(), labels_B[:, None]
    true_B1 = logits_BC.gather(1, labels_B1)
    classes_C = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    rank_B = 1 + ((logits_BC > true_B1) | ((logits_BC == true_B1) & (classes_C < labels_B1))).sum(dim=1)
    largest_B, prediction_B = logits_BC.max(dim=1)  # the first of equals
    odds_BC = (logits_BC.double() - largest_B.double()[:, None]).exp_()  # p_c over the largest p
    sum_B = odds_BC.sum(dim=1)
    nll_B = sum_B.log() + (largest_B.double() - true_B1[:, 0].double())
    nll_B = torch.where(logits_BC.isfinite().all(dim=1), nll_B, torch.nan)
    sum_p2_B = odds_BC.square_().sum(dim=1) / (sum_B * sum_B)
    rank_B = torch.where(rank_B <= LAST_RANK, rank_B, 0)
    return torch.stack([prediction_B.double(), rank_B.double(), 1 / sum_B, nll_B, sum_p2_B], dim=1)


def answers_between(groups: Sequence[Sequence[int]], device: torch.device) -> Answers:
    """Returns ``answers`` for images that are classified between groups of classes.

    A group scores the largest logit of its classes and is named by its first class, in labels and predictions
    (``ImageSet.groups``). All other logits count only where they are not finite.
    """
    named_G = torch.tensor([group[0] for group in groups], device=device)
    classes_F = torch.tensor([index for group in groups for index in group], device=device)
    group_of_F = torch.repeat_interleave(torch.tensor([len(group) for group in groups])).to(device)

    def between(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        number = len(logits_BC)
        lowest_BG = logits_BC.new_full((number, len(groups)), -torch.inf)
        largest_BG = lowest_BG.scatter_reduce(1, group_of_F.expand(number, -1), logits_BC[:, classes_F], "amax")
        largest_BG[:, 0].masked_fill_(~logits_BC.isfinite().all(dim=1), torch.nan)
        found_B5 = answers(largest_BG, (labels_B[:, None] == named_G).int().argmax(dim=1))
        found_B5[:, 0] = named_G[found_B5[:, 0].long()].double()
        return found_B5

    return between
