"""The bootstrap of the selection: the search's choice, made again on resampled images and scored on those left out.

Bootstrap bias-corrected selection (BBC, Tsamardinos et al. 2018). Images are drawn with replacement within each set,
one draw per set for all candidates and alphas, so luck that all share stays shared. It corrects the luck of images, not
that of seeds. Constraints are part of the choice, as in the search: of alpha (violations between evaluated alphas are
interpolated; nothing is evaluated anew) and of the winner.

Shape letters: B resamples, N candidates, A alphas of one candidate, n images of one set, P points of all candidates, F
of them on a front. Accuracies are fractions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from carft_ray.data.source import IntArray
from carft_ray.evaluation.alpha import AlphaChoices, choose_alphas
from carft_ray.evaluation.constraints import Gaps, Limit
from carft_ray.evaluation.metrics import NUM_BINS
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import BoolArray, FloatArray
from carft_ray.study.front import TIE, FrontRule, non_dominated

NUM_RESAMPLES = 1000
_CHUNK = 8_000_000  # image draws held at a time
_MET = 1e-6  # a violation that is rounding: calibration gaps are summed in float32


@dataclass(frozen=True, eq=False)
class Candidate:
    """A training among which the search chose.

    Attributes:
        name: Of the trial.
        alphas: What its alpha was chosen from by ``evaluation.alpha``, rising, 0 as the anchor; a single one is fixed.
        correct: Per set, bool [A, n].
        gaps: Per set whose calibration is constrained.
    """

    name: str
    alphas: tuple[float, ...]
    correct: Mapping[str, BoolArray]
    gaps: Mapping[str, Gaps] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Resamples:
    """The selection made B times.

    Attributes:
        names: Of the candidates.
        in_bag: Objective of each candidate at the alpha chosen on the images drawn, [B, N].
        out_of_bag: The same choice scored on the images not drawn, [B, N].
        alphas: The alpha chosen, [B, N].
        accuracies: Per candidate and set the accuracies on the images drawn, [B, A].
        missed: By how much the choice misses the constraints in all, on the images drawn, [B, N].
        outside: Per candidate and set the accuracies on the images not drawn, [B, A].
        missed_at: Per candidate by how much each alpha misses the constraints, on the images drawn, [B, A].
    """

    names: tuple[str, ...]
    in_bag: FloatArray
    out_of_bag: FloatArray
    alphas: FloatArray
    accuracies: tuple[dict[str, FloatArray], ...]
    missed: FloatArray
    outside: tuple[dict[str, FloatArray], ...]
    missed_at: tuple[FloatArray, ...]


@dataclass(frozen=True)
class Win:
    """How often a candidate won, as a share of the resamples, and its median alpha then."""

    name: str
    share: float
    alpha: float


def resample(
    candidates: Sequence[Candidate],
    spec: ObjectiveSpec,
    lowest: float,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    bounds: Sequence[Limit] = (),
) -> Resamples:
    """Makes the choice of alpha of every candidate again on resampled images.

    A resample that left no image of a set out is drawn anew.

    Args:
        candidates: In the order of the search; all with the sets of ``spec``, the same images in the same order.
        spec: The objective.
        lowest: Lowest alpha that may be chosen; a single alpha is taken whatever it is.
        num_resamples: B.
        seed: Of the draws.
        bounds: The constraints, on sets of ``spec``; their bounds are the same in every resample.

    Raises:
        ValueError: There is no candidate, or a set has fewer than two images.
    """
    if not candidates:
        raise ValueError("the bootstrap needs at least one candidate")
    rng = np.random.default_rng(seed)
    by_set = {}
    for name in spec.sets:
        correct, gaps = [each.correct[name] for each in candidates], [each.gaps.get(name) for each in candidates]
        by_set[name] = _sums(rng, correct, gaps, num_resamples)
    choices, scores, accuracies, outside, missed_at = [], [], [], [], []
    for index, candidate in enumerate(candidates):
        own = {name: found[index] for name, found in by_set.items()}
        violations = [
            limit.bound - own[limit.set_name].drawn
            if limit.measure == "accuracy"
            else own[limit.set_name].errors - limit.bound
            for limit in bounds
        ]
        choices.append(_choose(candidate, spec, lowest, own, violations))
        accuracies.append({name: found.drawn for name, found in own.items()})
        outside.append({name: found.left_out for name, found in own.items()})
        scores.append((choices[-1].readers * spec.values(outside[-1])).sum(axis=1))
        missed_at.append(np.sum([np.zeros_like(own[spec.id_set].drawn), *np.maximum(violations, 0)], axis=0))
    return Resamples(
        names=tuple(candidate.name for candidate in candidates),
        in_bag=np.stack([choice.values for choice in choices], axis=1),
        out_of_bag=np.stack(scores, axis=1),
        alphas=np.stack([choice.alphas for choice in choices], axis=1),
        accuracies=tuple(accuracies),
        missed=np.stack([choice.missed for choice in choices], axis=1),
        outside=tuple(outside),
        missed_at=tuple(missed_at),
    )


def resampled_accuracies(correct: Mapping[str, BoolArray], num_resamples: int = NUM_RESAMPLES) -> dict[str, FloatArray]:
    """Returns per set the accuracies on images drawn with replacement, one draw per set for all rows.

    Args:
        correct: Per set, bool [rows, n]; n at least 2.
        num_resamples: B.

    Returns:
        Per set [B, rows].

    Raises:
        ValueError: A set has fewer than two images.
    """
    rng = np.random.default_rng(0)
    found = {}
    for name, x in correct.items():
        num_right = [counts @ x.T.astype(np.float32) for counts in _counts(rng, x.shape[1], num_resamples)]
        found[name] = np.concatenate(num_right).astype(np.float64) / x.shape[1]  # whole numbers below 2^24: exact
    return found


def share_meeting(
    winner: Candidate, spec: ObjectiveSpec, bounds: Sequence[Limit], num_resamples: int = NUM_RESAMPLES
) -> float:
    """Returns the share of resamples in which a candidate with one alpha meets all constraints.

    Args:
        winner: With the alpha that it has.
        spec: The objective.
        bounds: The constraints.
        num_resamples: B.
    """
    return float((resample([winner], spec, 0.0, num_resamples, bounds=bounds).missed <= _MET).mean())


def meeting(candidates: Sequence[Candidate], bounds: Sequence[Limit]) -> list[Candidate]:
    """Returns the candidates with those alphas alone that meet all constraints as measured; without any, it is gone."""
    found = []
    for candidate in candidates:
        met: BoolArray = np.ones(len(candidate.alphas), np.bool_)
        for limit in bounds:
            values = candidate.correct[limit.set_name].mean(axis=1)
            if limit.measure == "ece":
                gaps = candidate.gaps[limit.set_name]
                values = _calibration(gaps.columns().sum(axis=0, dtype=np.float64)[None], gaps)[0]
            met &= np.array([limit.violation(float(value)) <= _MET for value in values])
        if met.any():
            alphas = tuple(np.asarray(candidate.alphas)[met].tolist())
            correct = {name: array[met] for name, array in candidate.correct.items()}
            gaps_met = {name: gaps.take(met) for name, gaps in candidate.gaps.items()}
            found.append(Candidate(candidate.name, alphas, correct, gaps_met))
    return found


def bbc(resamples: Resamples) -> tuple[float, list[Win]]:
    """Returns the mean out-of-bag objective of the resamples' winners, and how often which candidate won (most first).

    The winner of a resample has the largest in-bag objective of those that miss the constraints least there, the
    earliest of equals.
    """
    least = resamples.missed <= resamples.missed.min(axis=1, keepdims=True) + _MET
    winners: IntArray = np.where(least, resamples.in_bag, -np.inf).argmax(axis=1)
    rows = np.arange(len(winners))
    value = float(resamples.out_of_bag[rows, winners].mean())
    wins = []
    for index in np.unique(winners):
        won = winners == index
        wins.append(Win(resamples.names[index], float(won.mean()), float(np.median(resamples.alphas[won, index]))))
    return value, sorted(wins, key=lambda win: -win.share)


def incumbent_values(resamples: Resamples) -> list[float]:
    """Returns per t = 1..N the mean out-of-bag objective of the resamples' winners among the first t candidates.

    The last is ``bbc``. (The mean out-of-bag value of one fixed candidate would be its measured value again.)
    """
    rows = np.arange(len(resamples.in_bag))
    incumbent = np.zeros(len(rows), np.int64)
    values = []
    for t in range(resamples.in_bag.shape[1]):
        behind = resamples.missed[:, t] - resamples.missed[rows, incumbent]
        higher = resamples.in_bag[:, t] > resamples.in_bag[rows, incumbent]
        incumbent = np.where((behind < -_MET) | ((behind <= _MET) & higher), t, incumbent)
        values.append(float(resamples.out_of_bag[rows, incumbent].mean()))
    return values


@dataclass(frozen=True)
class Overtuning:
    """How much an incumbent fell behind an earlier one on images that did not choose it (arXiv 2506.19540).

    Attributes:
        values: T(i(t)) per t.
        absolute: max_{t' <= t} T(i(t')) - T(i(t)) per t.
        relative: The same over max_{t' <= t} T(i(t')) - T(i(1)); None where that is not above 0.
    """

    values: tuple[float, ...]
    absolute: tuple[float, ...]
    relative: tuple[float | None, ...]


def overtuning(values: Sequence[float]) -> Overtuning:
    """Returns the overtuning curve of the incumbents' honest values: ``incumbent_values``, or confirmed ones."""
    best = np.maximum.accumulate(np.asarray(values, np.float64))
    absolute = best - values
    gains = best - values[0]
    relative = [float(lost / gain) if gain > 0 else None for lost, gain in zip(absolute, gains, strict=True)]
    return Overtuning(tuple(values), tuple(float(lost) for lost in absolute), tuple(relative))


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


@dataclass(frozen=True, eq=False)
class _Sums:
    """Means of one candidate over the images of one set.

    Attributes:
        num_images: n.
        drawn: Accuracies on the images drawn, [B, A].
        left_out: Accuracies on those left out, [B, A].
        pairs: Number of images drawn that both alphas of a pair have right, [B, A (A + 1) / 2], whole numbers; pairs
            in the order of ``numpy.triu_indices``.
        errors: Calibration errors on the images drawn, [B, A]; empty without gaps.
    """

    num_images: int
    drawn: FloatArray
    left_out: FloatArray
    pairs: npt.NDArray[np.float32]
    errors: FloatArray

    @property
    def both_right(self) -> FloatArray:
        """Share of the images drawn that two alphas have right, [B, A, A]."""
        first, second = np.triu_indices(self.drawn.shape[1])
        place_AA = np.zeros((self.drawn.shape[1],) * 2, int)
        place_AA[first, second] = place_AA[second, first] = np.arange(len(first))
        shares: FloatArray = np.take(self.pairs.astype(np.float64) / self.num_images, place_AA, axis=1)
        return shares


def _choose(
    candidate: Candidate,
    spec: ObjectiveSpec,
    lowest: float,
    sums: Mapping[str, _Sums],
    violations: Sequence[FloatArray],
) -> AlphaChoices:
    """Returns the alpha choices of a candidate on B resamples.

    The noise is that of ``evaluation.alpha.objective_covariance``: a set adds w_a w_b (E x_a x_b - E x_a E x_b) /
    (n - 1).
    """
    drawn = {name: found.drawn for name, found in sums.items()}
    objectives_BA = spec.values(drawn)
    violations_BKA = np.stack(violations, axis=1) if violations else None
    if len(candidate.alphas) == 1:
        lowest = min(lowest, candidate.alphas[0])
    slopes = spec.slopes(drawn)
    noise_BAA = np.zeros((*objectives_BA.shape, objectives_BA.shape[1]))
    for name, found in sums.items():
        x, w = found.drawn, slopes[name]
        covariance = found.both_right - x[:, :, None] * x[:, None, :]
        noise_BAA += w[:, :, None] * w[:, None, :] * covariance / (found.num_images - 1)
    return choose_alphas(candidate.alphas, objectives_BA, lowest, noise_BAA, violations_BKA)


def _sums(
    rng: np.random.Generator, correct: Sequence[BoolArray], gaps: Sequence[Gaps | None], num_resamples: int
) -> list[_Sums]:
    """Returns the means of every candidate over resamples of one set."""
    num_images = correct[0].shape[1]
    found: list[list[tuple[npt.NDArray[Any], ...]]] = [[] for _ in correct]
    for counts in _counts(rng, num_images, num_resamples):
        out = (counts == 0).astype(np.float32)
        num_out = out.sum(axis=1, keepdims=True, dtype=np.float64)
        pairs, left_out = _products(counts, [_both(x_An) for x_An in correct]), _products(out, correct)
        for parts, x_An, each, of_pairs, right in zip(found, correct, gaps, pairs, left_out, strict=True):
            first, second = np.triu_indices(len(x_An))
            drawn = of_pairs[:, first == second].astype(np.float64) / num_images
            errors = np.zeros((len(counts), 0))
            if each is not None:
                errors = _calibration((counts @ each.columns()).astype(np.float64), each)
            parts.append((drawn, right.astype(np.float64) / num_out, of_pairs, errors))
    return [_Sums(num_images, *(np.concatenate(part) for part in zip(*parts, strict=True))) for parts in found]


def _both(x_An: BoolArray) -> BoolArray:
    """Returns per pair of alphas which images both have right, [A (A + 1) / 2, n]."""
    first, second = np.triu_indices(len(x_An))
    both: BoolArray = x_An[first] & x_An[second]
    return both


def _products(weights: npt.NDArray[np.float32], several: Sequence[BoolArray]) -> Iterator[npt.NDArray[np.float32]]:
    """Yields the product of weights [rows, n] with each of several [columns, n]: whole numbers below 2^24, so exact.

    Many go into one multiplication: by themselves they are so narrow that the threads of BLAS cost more than they do.
    """
    together = max(1, _CHUNK // (max(weights.shape) * max(map(len, several))))
    for first in range(0, len(several), together):
        part = several[first : first + together]
        product = weights @ np.concatenate(part).T.astype(np.float32)
        yield from np.split(product, np.cumsum([len(each) for each in part])[:-1], axis=1)


def _calibration(sums: FloatArray, gaps: Gaps) -> FloatArray:
    """Returns the ECE [B, A] from the sums of gaps per alpha and bin, [B, A * bins]."""
    num_alphas, num_images = gaps.bins.shape
    errors: FloatArray = np.abs(sums.reshape(-1, num_alphas, NUM_BINS)).sum(axis=2) / num_images
    return errors


def _counts(rng: np.random.Generator, num_images: int, num_resamples: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yields how often each image was drawn, [some resamples, n], until there are B; never all images."""
    if num_images < 2:
        raise ValueError("the bootstrap needs at least two images of every set")
    size = max(1, _CHUNK // num_images)
    while num_resamples:
        rows = min(size, num_resamples)
        draws = rng.integers(0, num_images, (rows, num_images)) + num_images * np.arange(rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=rows * num_images).reshape(rows, num_images)
        counts = counts[(counts == 0).any(axis=1)]
        num_resamples -= len(counts)
        yield counts.astype(np.float32)
