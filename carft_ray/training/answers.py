"""What a table of predictions holds of class logits, made on the device where they are: no logit leaves it.

Shape letters: B images, C classes, G groups of classes, F classes that are in a group.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from carft_ray.evaluation.predictions import LAST_RANK

Answers = Callable[[Tensor, Tensor], Tensor]


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
