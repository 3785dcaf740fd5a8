"""The statistics of selection on simulated studies with known true scores: ``python -m benchmarks.statistics``

Each study has 40 trials on an ID and two OOD sets (500, 300, 300 images, weights .5, .25, .25). An answer of
configuration c with seed q on image k is right when

    sqrt(.90) u_k + sqrt(.06) v_ck + sqrt(.04) e_ckq < Phi^-1(a_c) sqrt(1 + s_b^2) + b_cq,     b ~ N(0, s_b^2)

with u, v, e standard normal: then the population accuracy is a_c exactly, and the mean over seeds on fixed images is
Phi((Phi^-1(a_c) sqrt(1 + s_b^2) - sqrt(.90) u - sqrt(.06) v) / sqrt(.04 + s_b^2)). The search sees one seed per trial
and takes the largest objective; the best is then trained with fresh seeds. There is no alpha here. What is checked is
the product's own code (``intervals``, ``selection`` of ``results.statistics``), with the naive maximum
next to it. "Truth" is one of two: the population, or the mean over seeds on these very images.

Then pairs of equal configurations, whose difference is 0, are compared with 2, 3, 5 and 10 seeds on 30, 160 and 1,000
images: answers of two seeds that differ on 0, 1 or 5 % of the images, and seeds whose accuracy has a standard deviation
of 0 or 1 point. Every setting must be covered, and no interval may be a point.

Last, two configurations of equal accuracy on small sets: of each image their answers differ with a probability of 5 to
50 %, in either direction equally likely, without noise between seeds. For one set with one seed, or with three whose
answers are the same, the share of false alarms is a sum over all outcomes. An ID and an OOD set with one seed, and one
set with three seeds that each differ on other images, are drawn: 500 pairs per setting. At most 6.5 % may show a
difference, p below .05; with one seed, 50 % and 8 images or more, at least 2 % must, else the interval is wider than it
need be.

Then sets that show the same images (`--shared-images` runs only these): an ID set, and as OOD set its images under
corruptions, whose correctness correlates by .6. A configuration's answers on an image, clean and corrupted, are drawn
together. Another configuration, or another seed, draws them anew on a share of the images, so all are equal. With one
and with three seeds the 95 % interval of the objective must cover the truth in at least 93 %, and two configurations
may show a difference in at most 6 %. In brackets is the result of taking both sets as independent.

Then claims (`--claims` runs only these): how often `test` says "improves on every baseline" although this is false. In
each of 4,000 studies, the best of 40 trials is compared on new images with baselines at a known distance from its
truth: as values, with three to five fresh seeds, and as a model, the search's training with one of the same luck b. The
rule is wrong most often if one baseline is equal and all others are far below. At most 2.5 % of the claims about equal
baselines may be made, plus two Monte Carlo standard errors. The interval of a difference must cover the truth in at
least 93 %. Searches, confirms, and tests of values with fewer than three seeds must never claim anything. Printed are
the power, and what a confirm on the validation images measures. ``evidence.judged`` applies the rule to intervals of
``objective_difference``; ``evidence.compare`` also calculates the intervals of every set, which would take too long.

Exit code 1 when a check misses. Synthetic throughout.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
from scipy import special

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.results.evidence import Kind, Subject, judged
from carft_ray.results.statistics.intervals import (
    Interval,
    crossed,
    objective_difference,
    objective_interval,
    paired_differences,
)
from carft_ray.results.statistics.selection_bias import correct_best, ranking_noise

SIZES = {"id_val": 500, "ood_1": 300, "ood_2": 300}
WEIGHTS = {"id_val": 0.5, "ood_1": 0.25, "ood_2": 0.25}
SPEC = ObjectiveSpec("weighted_mean", "id_val", ("ood_1", "ood_2"), 0.5)
NUM_STUDIES = 1000
NUM_TRIALS = 40
TOP = 3  # configurations that are confirmed
SHARED, OWN, REST = math.sqrt(0.90), math.sqrt(0.06), math.sqrt(0.04)
SEED_SD, SEEDS = 0.03, 5
EQUAL_SEED_SD = 0.012
NUM_PAIRS = 2000  # per setting
PAIR_SEEDS, PAIR_IMAGES, PAIR_FLIPS, PAIR_SEED_SDS = (2, 3, 5, 10), (30, 160, 1000), (0.0, 0.01, 0.05), (0.0, 0.03)
PAIR_ACCURACY, PAIR_LEAST = 0.7, 0.935
SMALL_IMAGES, SMALL_SHARES = (5, 8, 10, 20, 50), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
SMALL_PAIRS = 500  # per setting, of what is drawn
SMALL_MOST, SMALL_LEAST = 0.065, 0.02  # false alarms of a test at 5 %
SHARED_SIZES = ((200, 200), (1000, 1000), (5000, 5000), (1000, 500))  # ID images; how many of them the OOD set has
SHARED_ACCURACIES, SHARED_CORRELATION = (0.8, 0.7), 0.6  # clean and corrupted
SHARED_ANEW = 0.2  # images that another seed answers anew; another configuration, half of them
SHARED_LEAST, SHARED_MOST = 0.93, 0.06
CLAIM_STUDIES, CLAIM_SEEDS = 4000, (3, 4, 5)
CLAIM_MOST, CLAIM_COVERED = 0.025, 0.93
BASELINES = {  # how much lower their true accuracies are than the winner's, on every set
    "equal": 0.0,
    "equal too": 0.0,
    "zero-shot": 0.0,
    "1 point below": 0.01,
    "2 points below": 0.02,
    "far below": 0.1,
    "farther below": 0.12,
}
FAR = ("far below", "farther below")
FALSE_CLAIMS = {  # baselines of one document
    "one of three baselines equal": ("equal", *FAR),
    "zero-shot equal, two baselines far below": ("zero-shot", *FAR),
    "both of two baselines equal": ("equal", "equal too"),
}
TRUE_CLAIMS = {"1 point": ("1 point below", *FAR), "2 points": ("2 points below", *FAR)}
# kind, subject and fresh seeds of documents that may claim nothing
SILENT = [
    (kind, subject, num_seeds)
    for kind, subject, num_seeds in itertools.product(get_args(Kind), get_args(Subject), range(SEEDS + 1))
    if kind != "test" or (subject == "values" and num_seeds < 3)
]
NOMINAL = (0.93, 0.97)  # what a coverage of 95 % may come to in 1,000 studies

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Check:
    """A number that must be between two ends.

    Attributes:
        text: What it is.
        value: The number, a fraction; shown in percent or points.
        least: Lower end.
        most: Upper end.
    """

    text: str
    value: float
    least: float
    most: float

    @property
    def passed(self) -> bool:
        """Whether it does; not-a-number does not."""
        return bool(self.least <= self.value <= self.most)

    def line(self) -> str:
        """Returns the line PASS or FAIL."""
        word = "PASS" if self.passed else "FAIL"
        return f"{word}  {self.text}: {100 * self.value:.2f} (from {100 * self.least:.2f} to {100 * self.most:.2f})"


@dataclass(frozen=True, eq=False)
class Images:
    """The luck of one drawing of the images: ``u`` [n] and, per configuration, ``v`` [configurations, n], by set."""

    u: dict[str, FloatArray]
    v: dict[str, FloatArray]


def true_accuracies(rng: np.random.Generator, num_trials: int) -> dict[str, FloatArray]:
    """Returns the population accuracy of every configuration by set, [trials]."""
    uniform = rng.random((num_trials, 2))
    near = np.clip(rng.normal((0.35, 0.5), 0.15, (num_trials, 2)), 0, 1)
    x1, x2 = np.where(np.arange(num_trials)[:, None] < num_trials // 2, uniform, near).T
    bad = np.where(rng.random(num_trials) < 0.1, rng.uniform(0.05, 0.3, num_trials), 0.0)
    loss = 0.04 * (x2 - 0.5) ** 2 + 0.06 * np.maximum(0, x1 - 0.6) ** 2 + bad
    best = (0.80 + 0.03 * np.sqrt(x1), 0.62 - 0.05 * x1**2, 0.55 - 0.07 * x1**2)
    return {name: accuracy - loss for name, accuracy in zip(SIZES, best, strict=True)}


def draw_images(rng: np.random.Generator, num_configurations: int) -> Images:
    """Returns the luck of new images."""
    u = {name: rng.standard_normal(n) for name, n in SIZES.items()}
    return Images(u, {name: rng.standard_normal((num_configurations, n)) for name, n in SIZES.items()})


def answers(
    rng: np.random.Generator, accuracies: dict[str, float], images: Images, c: int, shifts: FloatArray, seed_sd: float
) -> dict[str, BoolArray]:
    """Returns the correctness of configuration c with r trainings, bool [r, n] by set; their luck b is ``shifts``."""
    found = {}
    for name, n in SIZES.items():
        limit = quantile(accuracies[name]) * math.sqrt(1 + seed_sd**2) + shifts[:, None]
        fixed = SHARED * images.u[name] + OWN * images.v[name][c]
        found[name] = fixed + REST * rng.standard_normal((len(shifts), n)) < limit
    return found


def quantile(accuracy: float) -> float:
    """Returns Phi^-1."""
    return float(special.ndtri(accuracy))


def mean_on_these_images(accuracies: dict[str, float], images: Images, c: int, seed_sd: float) -> float:
    """Returns the objective's mean over seeds for fixed images, in closed form."""
    total = 0.0
    for name, weight in WEIGHTS.items():
        limit = quantile(accuracies[name]) * math.sqrt(1 + seed_sd**2)
        fixed = SHARED * images.u[name] + OWN * images.v[name][c]
        total += weight * float(special.ndtr((limit - fixed) / math.sqrt(REST**2 + seed_sd**2)).mean())
    return total


def search(
    rng: np.random.Generator, truth: dict[str, FloatArray], images: Images, shifts: FloatArray, seed_sd: float
) -> dict[str, BoolArray]:
    """Returns the correctness of all trials of a search, bool [trials, n] by set; one seed each, its luck b in
    ``shifts``."""
    num_trials = len(shifts)
    found = {}
    for name, n in SIZES.items():
        limit = special.ndtri(truth[name])[:, None] * math.sqrt(1 + seed_sd**2) + shifts[:, None]
        luck = SHARED * images.u[name] + OWN * images.v[name][:num_trials] + REST * rng.standard_normal((num_trials, n))
        found[name] = luck < limit
    return found


def objective_of(correct: dict[str, BoolArray]) -> FloatArray:
    """Returns the objective per row."""
    total: FloatArray = np.sum([w * correct[name].mean(axis=1) for name, w in WEIGHTS.items()], axis=0)
    return total


def one_study(rng: np.random.Generator, num_trials: int) -> dict[str, float]:
    """Returns what one simulated study with noisy seeds says about the winner, and whether intervals covered."""
    truth = true_accuracies(rng, num_trials)
    images = draw_images(rng, num_trials)
    correct = search(rng, truth, images, rng.normal(0, SEED_SD, num_trials), SEED_SD)
    values = objective_of(correct)
    top = np.argsort(-values, kind="stable")[: min(TOP, num_trials)]
    of = [{name: float(truth[name][c]) for name in SIZES} for c in top]
    population = [sum(w * accuracies[name] for name, w in WEIGHTS.items()) for accuracies in of]
    shifts = rng.normal(0, SEED_SD, (len(top), SEEDS))
    confirmed = [answers(rng, of[i], images, c, shifts[i], SEED_SD) for i, c in enumerate(top)]
    intervals = [crossed(each, WEIGHTS) for each in confirmed]
    fresh = crossed(answers(rng, of[0], draw_images(rng, 1), 0, shifts[0], SEED_SD), WEIGHTS)
    image, seed = ranking_noise(SPEC, [float(value) for value in values], correct, confirmed)
    corrected = correct_best([float(value) for value in values], image + (seed or 0.0))["value"]
    half = 1.96 * math.sqrt(sum(w**2 * float(correct[name][top[0]].var()) / SIZES[name] for name, w in WEIGHTS.items()))
    naive, best = float(values[top[0]]), max(range(len(top)), key=lambda i: intervals[i].mean)
    here = [mean_on_these_images(accuracies, images, int(c), SEED_SD) for accuracies, c in zip(of, top, strict=True)]
    return {
        "naive_bias": naive - population[0],
        "naive_covers": float(abs(naive - population[0]) <= half),
        "fresh_covers": covers(fresh.ends, population[0]),
        "same_covers": covers(intervals[0].ends, population[0]),
        "same_bias": intervals[0].mean - population[0],
        "reused_bias": intervals[best].mean - here[best],
        "corrected_bias": corrected - population[0],
    }


def covers(ends: tuple[float, float], truth: float) -> float:
    """Returns 1 where the interval holds the truth, else 0."""
    return float(ends[0] <= truth <= ends[1])


def equal_pair(rng: np.random.Generator) -> Interval:
    """Returns the paired interval of two configurations of the same true accuracies."""
    truth = {name: float(accuracy[0]) for name, accuracy in true_accuracies(rng, 1).items()}
    images = draw_images(rng, 2)
    one, two = (answers(rng, truth, images, c, rng.normal(0, EQUAL_SEED_SD, SEEDS), EQUAL_SEED_SD) for c in range(2))
    return crossed(paired_differences(one, two), WEIGHTS)


def pair_intervals(
    rng: np.random.Generator, num_pairs: int, num_seeds: int, num_images: int, flips: float, seed_sd: float
) -> list[Interval]:
    """Returns the paired intervals of configurations of the same accuracy.

    Two seeds differ on the share ``flips`` of the images at a threshold of 0 (the correlation is then cos(pi flips),
    Sheppard 1899); configurations and images interact with 1.5 times that variance. ``seed_sd`` is that of b; 0.03 are
    about 1 point of accuracy.
    """
    rest = 1 - math.cos(math.pi * flips)
    own = 1.5 * rest if flips else OWN**2
    limit = quantile(PAIR_ACCURACY) * math.sqrt(1 + seed_sd**2)
    found = []
    for _ in range(num_pairs):
        shared = math.sqrt(1 - own - rest) * rng.standard_normal(num_images)
        one, two = (
            shared
            + math.sqrt(own) * rng.standard_normal(num_images)
            + math.sqrt(rest) * rng.standard_normal((num_seeds, num_images))
            < limit + seed_sd * rng.standard_normal((num_seeds, 1))
            for _ in range(2)
        )
        found.append(crossed(paired_differences({"": one}, {"": two}), {"": 1.0}))
    return found


def pair_checks(rng: np.random.Generator, num_pairs: int) -> list[Check]:
    """Returns, per number of seeds, the lowest coverage of 0 over the settings, and the share of intervals that are
    points."""
    checks, points = [], []
    for num_seeds in PAIR_SEEDS:
        coverages = {}
        for setting in itertools.product(PAIR_IMAGES, PAIR_FLIPS, PAIR_SEED_SDS):
            intervals = pair_intervals(rng, num_pairs, num_seeds, *setting)
            coverages[setting] = float(np.mean([covers(each.ends, 0.0) for each in intervals]))
            points += [low >= high for low, high in (each.ends for each in intervals)]
        worst = min(coverages, key=lambda setting: coverages[setting])
        where = f"{worst[0]} images, {100 * worst[1]:g} % flips, seed sd {worst[2]:g}"
        text = f"equal configurations, {num_seeds} seeds: lowest coverage in {len(coverages)} settings, % ({where})"
        checks.append(Check(text, coverages[worst], PAIR_LEAST, 1.0))
    return [*checks, Check("    intervals without width, %", float(np.mean(points)), 0, 0)]


@functools.cache
def shows_difference(counts: tuple[tuple[int, int, int], ...], num_seeds: int) -> bool:
    """Tells whether the paired interval shows a difference on sets of equal weight, all seeds giving the same answers.

    Args:
        counts: Per set its images, on how many of them the first configuration alone is right, and the second alone.
        num_seeds: Seeds.
    """
    values = {
        str(place): np.tile(np.repeat([1.0, -1.0, 0.0], [better, worse, n - better - worse]), (num_seeds, 1))
        for place, (n, better, worse) in enumerate(counts)
    }
    return crossed(values, dict.fromkeys(values, 1 / len(values))).p_value < 0.05


def false_alarms(num_images: int, share: float, num_seeds: int) -> float:
    """Returns how often two configurations of equal accuracy show a difference on one set, exactly."""
    total = 0.0
    for differing in range(num_images + 1):
        likely = math.comb(num_images, differing) * share**differing * (1 - share) ** (num_images - differing)
        for better in range(differing + 1):
            one = max(better, differing - better)  # as likely, and with the same answer, as the other way round
            if shows_difference(((num_images, one, differing - one),), num_seeds):
                total += likely * math.comb(differing, better) / 2**differing
    return total


def small_differences(rng: np.random.Generator, num_pairs: int, num_images: int, share: float) -> FloatArray:
    """Returns differences of correctness, [pairs, n]: 1 and -1 with half of ``share`` each, else 0."""
    return rng.choice([1.0, -1.0, 0.0], (num_pairs, num_images), p=[share / 2, share / 2, 1 - share])


def drawn_alarms(rng: np.random.Generator, num_pairs: int, num_images: int, share: float) -> tuple[float, float]:
    """Returns the false alarms of one seed on two sets, and of three seeds that differ on other images."""
    sets = [small_differences(rng, num_pairs, num_images, share) for _ in range(2)]
    counts = [np.stack([(x > 0).sum(axis=1), (x < 0).sum(axis=1)], axis=1).tolist() for x in sets]
    objective = [shows_difference(tuple((num_images, *each) for each in pair), 1) for pair in zip(*counts, strict=True)]
    seeds = [
        crossed({"": small_differences(rng, 3, num_images, share)}, {"": 1.0}).p_value < 0.05 for _ in range(num_pairs)
    ]
    return float(np.mean(objective)), float(np.mean(seeds))


def small_checks(rng: np.random.Generator, num_pairs: int) -> tuple[list[Check], list[str]]:
    """Returns the checks of small sets, and the table of false alarms behind them."""
    settings = [*itertools.product(SMALL_IMAGES, SMALL_SHARES)]
    drawn = {setting: drawn_alarms(rng, num_pairs, *setting) for setting in settings}
    found = {
        "one seed": {setting: false_alarms(*setting, 1) for setting in settings},
        "three seeds, same answers": {setting: false_alarms(*setting, 3) for setting in settings},
        "one seed, ID and OOD set": {setting: drawn[setting][0] for setting in settings},
        "three seeds, other answers": {setting: drawn[setting][1] for setting in settings},
    }
    checks, lines = [], []
    for name, alarms in found.items():
        images, share = worst = max(alarms, key=lambda setting: alarms[setting])
        text = f"small sets, {name}: most false alarms, % ({images} images, {100 * share:g} % differ)"
        checks.append(Check(text, alarms[worst], 0, SMALL_MOST))
        lines.append(
            f"False alarms, %, {name}; answers that differ: {', '.join(f'{100 * s:g}' for s in SMALL_SHARES)} %"
        )
        lines += [
            f"{n:5} images: " + " ".join(f"{100 * alarms[n, s]:5.2f}" for s in SMALL_SHARES) for n in SMALL_IMAGES
        ]
    half = {n: found["one seed"][n, 0.5] for n in SMALL_IMAGES if n >= 8}
    fewest = min(half, key=lambda n: half[n])
    text = f"    one seed, 50 % differ, 8 images or more: fewest, % ({fewest} images)"
    checks.append(Check(text, half[fewest], SMALL_LEAST, SMALL_MOST))
    return checks, lines


def answers_together(rng: np.random.Generator, num_images: int) -> BoolArray:
    """Returns correctness on images and on the same images under corruptions, bool [2, n], correlated."""
    a, b = SHARED_ACCURACIES
    both = a * b + SHARED_CORRELATION * math.sqrt(a * (1 - a) * b * (1 - b))
    outcome = rng.choice(4, num_images, p=[both, a - both, b - both, 1 - a - b + both])
    return np.stack([outcome < 2, outcome % 2 == 0])


def shared_intervals(
    rng: np.random.Generator, num_pairs: int, num_seeds: int, sizes: tuple[int, int]
) -> dict[str, list[tuple[Interval, Interval]]]:
    """Returns the interval of an objective and of the difference of two equal configurations, as it is done and with
    both sets taken as independent."""
    num_images, num_corrupted = sizes
    images = {"id_val": np.arange(num_images, dtype=np.uint64), "ood": np.arange(num_corrupted, dtype=np.uint64)}
    specs = {name: ObjectiveSpec("weighted_mean", "id_val", ("ood",), images=each)
             for name, each in (("joined", images), ("independent", None))}  # fmt: skip

    def anew(before: BoolArray, share: float) -> BoolArray:
        return np.where(rng.random(num_images) < share, answers_together(rng, num_images), before)

    found: dict[str, list[tuple[Interval, Interval]]] = {name: [] for name in specs}
    for _ in range(num_pairs):
        first = answers_together(rng, num_images)
        pair = []
        for configuration in (first, anew(first, SHARED_ANEW / 2)):
            seeds = np.stack([anew(configuration, SHARED_ANEW) for _ in range(num_seeds)], axis=1)
            pair.append({"id_val": seeds[0], "ood": seeds[1, :, :num_corrupted]})
        for name, spec in specs.items():
            found[name].append((objective_interval(spec, pair[0]), objective_difference(spec, *pair)))
    return found


def shared_checks(
    rng: np.random.Generator, num_pairs: int, all_sizes: Sequence[tuple[int, int]] = SHARED_SIZES
) -> tuple[list[Check], list[str]]:
    """Returns the checks of sets that show the same images, and their table."""
    truth = sum(SHARED_ACCURACIES) / 2
    checks, lines = [], ["Sets that show the same images, %: joined, and in brackets as if they were independent"]
    for num_seeds, sizes in itertools.product((1, 3), all_sizes):
        found = shared_intervals(rng, num_pairs, num_seeds, sizes)
        coverage = {name: float(np.mean([covers(one.ends, truth) for one, _ in each])) for name, each in found.items()}
        alarms = {name: float(np.mean([gap.p_value < 0.05 for _, gap in each])) for name, each in found.items()}
        what = f"{sizes[0]} images, {sizes[1]} of them corrupted, {num_seeds} {'seed' if num_seeds == 1 else 'seeds'}"
        checks.append(Check(f"{what}: coverage, %", coverage["joined"], SHARED_LEAST, 1.0))
        checks.append(Check(f"{what}: false alarms, %", alarms["joined"], 0.0, SHARED_MOST))
        lines.append(
            f"    {what}: covers {100 * coverage['joined']:.1f} ({100 * coverage['independent']:.1f}), "
            f"false alarms {100 * alarms['joined']:.1f} ({100 * alarms['independent']:.1f})"
        )
    return checks, lines


def claims(kind: Kind, subject: Subject, num_seeds: int, gaps: Mapping[str, Interval]) -> bool:
    """Returns whether a document says "improves on every baseline".

    Args:
        kind: What has measured the winner and the baselines.
        subject: What was measured.
        num_seeds: Fresh seeds.
        gaps: The winner minus each baseline.
    """
    rows = [{"name": "winner", "role": "winner", "alpha": 1.0}, *({"name": name, "role": "baseline"} for name in gaps)]
    others = [{"other": name, "objective": gap.data()} for name, gap in gaps.items()]
    about = {"kind": kind, "subject": subject, "seeds": range(num_seeds), "winner": "winner", "rows": rows}
    return bool(judged({**about, "baselines": [], "others": others})["shown"])


def claim_study(rng: np.random.Generator, num_trials: int) -> dict[tuple[str, str, int], float]:
    """Returns what one simulated study says, by (what, of which baselines, fresh seeds; 0: of models).

    ``claims``: whether the test claims an improvement on these baselines. ``covers``: whether the interval of the
    difference holds the truth. ``silent``: the share of the documents that may claim nothing and do. ``bias`` and
    ``above``: the difference from an equal baseline on the validation images, and whether its interval is above 0.
    """
    truth = true_accuracies(rng, num_trials)
    validation, test = draw_images(rng, num_trials + 1), draw_images(rng, len(BASELINES) + 1)
    shifts = rng.normal(0, SEED_SD, num_trials)
    best = int(objective_of(search(rng, truth, validation, shifts, SEED_SD)).argmax())

    def trained(
        images: Images, c: int, below: float, luck: FloatArray, seed_sd: float = SEED_SD
    ) -> dict[str, BoolArray]:
        return answers(rng, {name: float(truth[name][best]) - below for name in SIZES}, images, c, luck, seed_sd)

    def fresh() -> FloatArray:
        return rng.normal(0, SEED_SD, SEEDS)

    def gap(one: dict[str, BoolArray], other: dict[str, BoolArray], num_seeds: int = SEEDS) -> Interval:
        return objective_difference(SPEC, *({name: x[:num_seeds] for name, x in rows.items()} for rows in (one, other)))

    found: dict[tuple[str, str, int], float] = {}
    values, model = (trained(test, len(BASELINES), 0.0, luck) for luck in (fresh(), shifts[[best]]))
    gaps: dict[int, dict[str, Interval]] = {num_seeds: {} for num_seeds in (*CLAIM_SEEDS, 0)}
    for c, (name, below) in enumerate(BASELINES.items()):
        if name == "zero-shot":  # one model without noise of seeds, the same beside each of them
            one = trained(test, c, below, np.zeros(1), 0.0)
            other = {key: np.broadcast_to(array, (SEEDS, array.shape[1])) for key, array in one.items()}
        else:
            other = trained(test, c, below, fresh())
            gaps[0][name] = gap(model, trained(test, c, below, shifts[[best]]))
        for num_seeds in CLAIM_SEEDS:
            gaps[num_seeds][name] = gap(values, other, num_seeds)
            found["covers", name, num_seeds] = covers(gaps[num_seeds][name].ends, below)
    found["covers", "equal", 0] = covers(gaps[0]["equal"].ends, 0.0)
    for (which, names), num_seeds in itertools.product({**FALSE_CLAIMS, **TRUE_CLAIMS}.items(), gaps):
        if gaps[num_seeds].keys() >= {*names}:
            subject: Subject = "values" if num_seeds else "model"
            of = {name: gaps[num_seeds][name] for name in names}
            found["claims", which, num_seeds] = claims("test", subject, num_seeds, of)
    certain = {"far below": gaps[SEEDS]["far below"]}
    found["silent", "", 0] = float(np.mean([claims(*each, certain) for each in SILENT]))
    again = gap(trained(validation, best, 0.0, fresh()), trained(validation, num_trials, 0.0, fresh()))
    return {**found, ("bias", "", SEEDS): again.mean, ("above", "", SEEDS): float(again.ends[0] > 0)}


def claim_checks(
    rng: np.random.Generator, num_studies: int, num_trials: int = NUM_TRIALS
) -> tuple[list[Check], list[str]]:
    """Returns the checks of what a test claims, and its power."""
    studies = [claim_study(rng, num_trials) for _ in range(num_studies)]
    mean = {key: float(np.mean([study[key] for study in studies])) for key in studies[0]}
    most = CLAIM_MOST + 2 * math.sqrt(CLAIM_MOST * (1 - CLAIM_MOST) / num_studies)
    of = {num_seeds: f"values, {num_seeds} seeds" if num_seeds else "models" for num_seeds in (*CLAIM_SEEDS, 0)}
    checks = [
        Check(f"false claims, {which}; {of[num_seeds]}, %", mean["claims", which, num_seeds], 0.0, most)
        for which, num_seeds in itertools.product(FALSE_CLAIMS, of)
        if ("claims", which, num_seeds) in mean
    ]
    checks.append(Check("claims of documents that may claim nothing, %", mean["silent", "", 0], 0, 0))
    for num_seeds, text in of.items():
        coverage = {name: mean["covers", name, num_seeds] for name in BASELINES if ("covers", name, num_seeds) in mean}
        worst = min(coverage, key=lambda name: coverage[name])
        text = f"difference from a baseline; {text}: lowest coverage, % ({worst})"
        checks.append(Check(text, coverage[worst], CLAIM_COVERED, 1.0))
    lines = [
        f"Power, % of the studies that claim a true gain of {which}: "
        + ", ".join(f"{100 * mean['claims', which, num_seeds]:.1f} with {num_seeds} seeds" for num_seeds in CLAIM_SEEDS)
        for which in TRUE_CLAIMS
    ]
    bias, above = (100 * mean[what, "", SEEDS] for what in ("bias", "above"))
    lines.append(
        f"An equal baseline on the validation images, {SEEDS} fresh seeds: bias {bias:+.2f} points, the whole interval "
        f"is above 0 in {above:.1f} %."
    )
    return checks, [*lines, f"{num_studies} studies of {num_trials} trials, seed sd {SEED_SD}."]


def run(
    num_studies: int = NUM_STUDIES,
    num_trials: int = NUM_TRIALS,
    seed: int = 0,
    num_pairs: int = NUM_PAIRS,
) -> tuple[list[Check], list[str]]:
    """Returns the checks of the simulated studies, and further numbers."""
    streams = np.random.SeedSequence(seed).spawn(2 * num_studies)
    rngs = [np.random.default_rng(stream) for stream in streams]
    studies = [one_study(rng, num_trials) for rng in rngs[:num_studies]]
    of = {name: np.array([study[name] for study in studies]) for name in studies[0]}
    mean = {name: float(values.mean()) for name, values in of.items()}
    equal = [covers(equal_pair(rng).ends, 0.0) for rng in rngs[num_studies:]]
    reused = of["reused_bias"]
    reused_se = float(reused.std(ddof=1)) / math.sqrt(num_studies)
    checks = [
        Check("naive maximum with its binomial interval covers the population truth, %", mean["naive_covers"], 0, 0.75),
        Check(f"confirmed models on fresh images cover the population truth, % (seed sd {SEED_SD}, {SEEDS} seeds)",
              mean["fresh_covers"], *NOMINAL),
        Check("the same on the search's own images (image luck remains), %", mean["same_covers"], 0.90, 0.97),
        Check("    its bias, points (below 30 % of the naive)", mean["same_bias"], -1.0, 0.3 * mean["naive_bias"]),
        Check("best of k on the seeds that chose it: bias against the mean on these images, points (above 3 SE)",
              mean["reused_bias"], 3 * reused_se, 1.0),
        within("corrected: bias, points (within 15 % of the naive)", mean["corrected_bias"], 0.15 * mean["naive_bias"]),
        Check(f"paired interval of two equal configurations covers 0, % (seed sd {EQUAL_SEED_SD})",
              float(np.mean(equal)), *NOMINAL),
    ]  # fmt: skip
    checks += pair_checks(np.random.default_rng([seed, 1]), num_pairs)
    further = [
        f"Beside them, the naive maximum: bias {100 * mean['naive_bias']:+.2f} points.",
        f"{num_studies} studies of {num_trials} trials; a coverage of 95 % has a Monte Carlo standard error of "
        f"{100 * math.sqrt(0.95 * 0.05 / num_studies):.1f} points.",
    ]
    return checks, further


def within(text: str, value: float, most: float) -> Check:
    """Returns the check that a bias is small in either direction."""
    return Check(text, value, -most, most)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all checks pass, 1 one does not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description="Statistics of selection.")
    parser.add_argument("--studies", type=int, default=NUM_STUDIES, help=f"simulated studies ({NUM_STUDIES})")
    parser.add_argument("--trials", type=int, default=NUM_TRIALS, help=f"trials of each ({NUM_TRIALS})")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help=f"equal configurations per setting ({NUM_PAIRS})")
    parser.add_argument("--small-sets", action="store_true", help="only the comparisons on 5 to 50 images (15 s)")
    parser.add_argument("--shared-images", action="store_true", help="only sets that show the same images (3 min)")
    parser.add_argument("--claims", action="store_true", help="only what a test claims (2 min)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (0)")
    given = parser.parse_args(argv)
    if min(given.studies, given.trials, given.pairs) < 2:
        parser.error("--studies, --trials and --pairs must be at least 2")
    began = time.perf_counter()
    chosen = given.small_sets or given.shared_images or given.claims
    parts = []
    if not chosen:
        parts.append(run(given.studies, given.trials, given.seed, given.pairs))
    if given.small_sets or not chosen:
        parts.append(small_checks(np.random.default_rng([given.seed, 2]), SMALL_PAIRS))
    if given.shared_images or not chosen:
        parts.append(shared_checks(np.random.default_rng([given.seed, 3]), given.pairs))
    if given.claims or not chosen:
        parts.append(claim_checks(np.random.default_rng([given.seed, 4]), CLAIM_STUDIES))
    checks = [check for part, _ in parts for check in part]
    for check in checks:
        print(check.line())
    for line in (line for _, part in parts for line in part):
        print(line)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
