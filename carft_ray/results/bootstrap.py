"""The bootstrap of the selection: the search's choice, made again on resampled images and scored on those left out.

Bootstrap bias-corrected selection (BBC, Tsamardinos et al. 2018). Images are drawn with replacement within each set,
one draw per set for all candidates and alphas, so luck that all share stays shared. It corrects the luck of images, not
that of seeds.

Shape letters: B resamples, N candidates, A alphas of one candidate, n images of one set. Accuracies are fractions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from carft_ray.evaluation.alpha import AlphaChoices, choose_alphas
from carft_ray.evaluation.objective import ObjectiveSpec

NUM_RESAMPLES = 1000
_CHUNK = 8_000_000  # image draws held at a time

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A training among which the search chose.

    Attributes:
        name: Of the trial.
        alphas: What its alpha was chosen from by ``evaluation.alpha``, rising, 0 as the anchor; a single one is fixed.
        correct: Per set, bool [A, n].
    """

    name: str
    alphas: tuple[float, ...]
    correct: Mapping[str, BoolArray]


@dataclass(frozen=True, eq=False)
class Resamples:
    """The selection made B times.

    Attributes:
        names: Of the candidates.
        in_bag: Objective of each candidate at the alpha chosen on the images drawn, [B, N].
        out_of_bag: The same choice scored on the images not drawn, [B, N].
        alphas: The alpha chosen, [B, N].
        accuracies: Per candidate and set the accuracies on the images drawn, [B, A].
    """

    names: tuple[str, ...]
    in_bag: FloatArray
    out_of_bag: FloatArray
    alphas: FloatArray
    accuracies: tuple[dict[str, FloatArray], ...]


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
) -> Resamples:
    """Makes the choice of alpha of every candidate again on resampled images.

    A resample that left no image of a set out is drawn anew.

    Args:
        candidates: In the order of the search; all with the sets of ``spec``, the same images in the same order.
        spec: The objective.
        lowest: Lowest alpha that may be chosen; a single alpha is taken whatever it is.
        num_resamples: B.
        seed: Of the draws.

    Raises:
        ValueError: There is no candidate, or a set has fewer than two images.
    """
    names = (spec.id_set, *spec.ood_sets)
    if not candidates:
        raise ValueError("the bootstrap needs at least one candidate")
    rng = np.random.default_rng(seed)
    sums = {name: _both(rng, [candidate.correct[name] for candidate in candidates], num_resamples) for name in names}
    num_images = {name: candidates[0].correct[name].shape[1] for name in names}
    choices, outside, accuracies, column = [], [], [], 0
    for candidate in candidates:
        num_alphas = len(candidate.alphas)
        own, pairs = slice(column, column + num_alphas), slice(column + num_alphas, column + 2 * num_alphas - 1)
        column += 2 * num_alphas - 1
        drawn = {name: sums[name][0][:, own] for name in names}
        both_right = {name: sums[name][0][:, pairs] for name in names}
        choice = _choose(candidate, spec, lowest, drawn, both_right, num_images)
        out = spec.values({name: sums[name][1][:, own] for name in names})
        choices.append(choice)
        outside.append((choice.readers * out).sum(axis=1))
        accuracies.append(drawn)
    return Resamples(
        tuple(candidate.name for candidate in candidates),
        np.stack([choice.values for choice in choices], axis=1),
        np.stack(outside, axis=1),
        np.stack([choice.alphas for choice in choices], axis=1),
        tuple(accuracies),
    )


def resampled_accuracies(
    correct: Mapping[str, BoolArray], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, FloatArray]:
    """Returns per set the accuracies on images drawn with replacement, one draw per set for all rows.

    Args:
        correct: Per set, bool [rows, n]; n at least 2.
        num_resamples: B.
        seed: Of the draws.

    Returns:
        Per set [B, rows].

    Raises:
        ValueError: A set has fewer than two images.
    """
    if any(x.shape[1] < 2 for x in correct.values()):
        raise ValueError("the bootstrap needs at least two images of every set")
    rng = np.random.default_rng(seed)
    return {
        name: np.concatenate(
            [counts @ x.T.astype(np.float32) for counts in _counts(rng, x.shape[1], num_resamples)]
        ).astype(np.float64)  # whole numbers below 2^24: exact
        / x.shape[1]
        for name, x in correct.items()
    }


def bbc(resamples: Resamples) -> tuple[float, list[Win]]:
    """Returns the mean out-of-bag objective of the resamples' winners, and how often which candidate won (most first).

    The winner of a resample has the largest in-bag objective, the earliest of equals.
    """
    winners: IntArray = resamples.in_bag.argmax(axis=1)
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
        incumbent = np.where(resamples.in_bag[:, t] > resamples.in_bag[rows, incumbent], t, incumbent)
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


def _choose(
    candidate: Candidate,
    spec: ObjectiveSpec,
    lowest: float,
    drawn: Mapping[str, FloatArray],
    both_right: Mapping[str, FloatArray],
    num_images: Mapping[str, int],
) -> AlphaChoices:
    """Returns the alpha choices of a candidate on B resamples.

    The noise of neighbouring points a, b follows from E d^2 = w_a^2 E x_a + w_b^2 E x_b - 2 w_a w_b E x_a x_b.
    """
    objectives_BA = spec.values(drawn)
    if len(candidate.alphas) == 1:
        alpha_B = np.full(len(objectives_BA), candidate.alphas[0])
        return AlphaChoices(alpha_B, objectives_BA[:, 0], np.ones_like(objectives_BA))
    slopes = spec.slopes(drawn)
    variance = np.zeros(both_right[spec.id_set].shape)
    for name, x in drawn.items():
        w = slopes[name]
        squares = w**2 * x
        mean_square = squares[:, :-1] + squares[:, 1:] - 2 * w[:, :-1] * w[:, 1:] * both_right[name]
        mean = (w * x)[:, :-1] - (w * x)[:, 1:]
        variance += np.maximum(mean_square - mean**2, 0) / (num_images[name] - 1)
    return choose_alphas(candidate.alphas, objectives_BA, lowest, np.sqrt(variance.mean(axis=1)))


def _both(rng: np.random.Generator, correct: Sequence[BoolArray], num_resamples: int) -> tuple[FloatArray, FloatArray]:
    """Returns the means over the images drawn and over those left out, [B, rows], of one set.

    The rows are, candidate by candidate, its A alphas and its A - 1 pairs of neighbours (both right).
    """
    rows = np.concatenate([part for x_An in correct for part in (x_An, x_An[:-1] & x_An[1:])]).T.astype(np.float32)
    num_images = len(rows)
    if num_images < 2:
        raise ValueError("the bootstrap needs at least two images of every set")
    drawn, left_out = [], []
    for counts in _counts(rng, num_images, num_resamples):
        drawn.append((counts @ rows).astype(np.float64) / num_images)  # whole numbers below 2^24: exact
        out = (counts == 0).astype(np.float32)
        left_out.append((out @ rows).astype(np.float64) / out.sum(axis=1, keepdims=True, dtype=np.float64))
    return np.concatenate(drawn), np.concatenate(left_out)


def _counts(rng: np.random.Generator, num_images: int, num_resamples: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yields how often each image was drawn, [some resamples, n], until there are B; never all images."""
    size = max(1, _CHUNK // num_images)
    while num_resamples:
        rows = min(size, num_resamples)
        draws = rng.integers(0, num_images, (rows, num_images)) + num_images * np.arange(rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=rows * num_images).reshape(rows, num_images)
        counts = counts[(counts == 0).any(axis=1)]
        num_resamples -= len(counts)
        yield counts.astype(np.float32)
