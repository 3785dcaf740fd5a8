"""The choice of a Pareto search made again on resampled images: front, rule and best point, scored on images left out.

The counterpart of ``bootstrap.bbc`` for two objectives. Shape letters: B resamples, P points, F of them on a front.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import FloatArray
from carft_ray.results.statistics.bootstrap import Candidate, Resamples
from carft_ray.study.front import TIE, FrontRule, non_dominated


@dataclass(frozen=True)
class FrontChoice:
    """What B choices have shown.

    Attributes:
        id_accuracy: Mean ID accuracy of the chosen points on the images left out.
        ood_accuracy: Mean OOD accuracy of the same.
        share_best: Share of the resamples in which the study's best point was chosen again.
        share_on_front: Share of them in which it was on the front.
    """

    id_accuracy: float
    ood_accuracy: float
    share_best: float
    share_on_front: float


def front_choice(
    candidates: Sequence[Candidate], resamples: Resamples, spec: ObjectiveSpec, rule: FrontRule, best: tuple[str, float]
) -> FrontChoice:
    """Makes the choice of a Pareto search again on every resample.

    Args:
        candidates: The trainings with all alphas that may be on the front.
        resamples: Of these candidates.
        spec: Its sets.
        rule: Which point of a front is the best.
        best: Name and alpha of the study's best point.
    """
    points = [(candidate.name, alpha) for candidate in candidates for alpha in candidate.alphas]
    own = points.index(best)
    inside, outside = (_pairs(parts, spec) for parts in (resamples.accuracies, resamples.outside))
    missed_BP = np.concatenate(resamples.missed_at, axis=1)
    scores, again, on_front = [], 0, 0
    for pairs_P2, left_out_P2, missed_P in zip(inside, outside, missed_BP, strict=True):
        taking_part = np.flatnonzero(missed_P <= missed_P.min() + TIE)
        front = taking_part[non_dominated(pairs_P2[taking_part])]
        pick = front[rule.index(pairs_P2[front])]
        scores.append(left_out_P2[pick])
        again += pick == own
        on_front += own in front
    id_accuracy, ood_accuracy = np.mean(scores, axis=0)
    return FrontChoice(float(id_accuracy), float(ood_accuracy), again / len(scores), on_front / len(scores))


def _pairs(parts: Sequence[dict[str, FloatArray]], spec: ObjectiveSpec) -> FloatArray:
    """Returns (ID, mean OOD accuracy) of every point per resample, [B, P, 2]."""
    id_BP = np.concatenate([part[spec.id_set] for part in parts], axis=1)
    ood_BP = np.concatenate([np.mean([part[name] for name in spec.ood_sets], axis=0) for part in parts], axis=1)
    pairs: FloatArray = np.stack([id_BP, ood_BP], axis=2)
    return pairs
