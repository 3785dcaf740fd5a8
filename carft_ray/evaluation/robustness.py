"""Effective robustness: OOD accuracy beyond what models of the same ID accuracy have (Taori et al. 2020).

    rho = acc_ood - expit(slope * logit(acc_id) + intercept)

with slope and intercept by ordinary least squares of logit(acc_ood) on logit(acc_id) over a named set of baseline
models. Accuracies are fractions, clipped to [1 / (2 n), 1 - 1 / (2 n)] with n the images of the set.

``effective_robustness`` is the word for a line through models without robustness interventions, from a reference file
(``read_reference``). The line through a study's own plain fine-tuning trials is another measure with another name,
``gain_over_ft_line``.
"""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.special import expit, logit

from carft_ray.errors import DataError, Problem
from carft_ray.untrusted import read_text

MIN_MODELS = 5
MIN_ID_RANGE = 0.05  # of ID accuracy that the models must span
CAVEAT = "With ImageNet as the only ID set, effective robustness favours CLIP-like pre-training (arXiv 2302.01381)."
OOD_PREFIX = "acc_ood/"

Accuracies = tuple[float, float]  # on the ID set, on one OOD set
Measure = Literal["effective_robustness", "gain_over_ft_line"]


@dataclass(frozen=True)
class Robustness:
    """How far a model is above the line.

    Attributes:
        measure: As of ``above_line``.
        models: Names of the models that the line goes through.
        id_range: Lowest and highest ID accuracy of these models; None without a model.
        value: rho; None where it is not defined.
        expected: OOD accuracy on the line at the model's ID accuracy; None where it is not defined.
        extrapolated: The model's ID accuracy is outside ``id_range``.
        reason: Why it is not defined; empty where it is.
        line: Slope and intercept on the logit scale; None where it is not defined.
    """

    measure: Measure
    models: tuple[str, ...]
    id_range: tuple[float, float] | None
    value: float | None
    expected: float | None
    extrapolated: bool
    reason: str = ""
    line: tuple[float, float] | None = None

    @property
    def words(self) -> str:
        """The value in points with all that must be said with it."""
        if self.value is None or self.id_range is None:
            return f"{self.measure} is not defined: {self.reason}"
        text = f"{self.measure} {100 * self.value:+.1f} points over {len(self.models)} models: {', '.join(self.models)}"
        low, high = self.id_range
        return text + (f"; extrapolated beyond their ID accuracies {low:.3f} to {high:.3f}" * self.extrapolated)


def above_line(
    measure: Measure, models: Mapping[str, Accuracies], model: Accuracies, num_images: tuple[int, int]
) -> Robustness:
    """Returns rho of a model against the line through other models.

    At least 5 models that span 5 points of ID accuracy are needed, else it is not defined.

    Args:
        measure: Which line: ``effective_robustness``: ``models`` have no robustness interventions;
            ``gain_over_ft_line``: they are the study's own trials with a KL weight of 0.
        models: Name -> (ID, OOD) accuracy.
        model: (ID, OOD) accuracy of the model.
        num_images: n of the ID set and of the OOD set.
    """
    names = tuple(models)
    id_accuracies = [id_accuracy for id_accuracy, _ in models.values()]
    id_range = (min(id_accuracies), max(id_accuracies)) if models else None
    outside = id_range is not None and not id_range[0] <= model[0] <= id_range[1]
    reason = ""
    if id_range is None or len(models) < MIN_MODELS:
        reason = f"it needs at least {MIN_MODELS} models, but got {len(models)}"
    elif id_range[1] - id_range[0] < MIN_ID_RANGE - 1e-9:
        span = 100 * (id_range[1] - id_range[0])
        reason = f"the models must span {100 * MIN_ID_RANGE:g} points of ID accuracy, but got {span:.1f}"
    if reason:
        return Robustness(measure, names, id_range, None, None, outside, reason)
    x, y = logit(np.array([_clip(pair, num_images) for pair in models.values()])).T
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    id_accuracy, ood_accuracy = _clip(model, num_images)
    expected = float(expit(y.mean() + slope * (logit(id_accuracy) - x.mean())))
    line = float(slope), float(y.mean() - slope * x.mean())
    return Robustness(measure, names, id_range, ood_accuracy - expected, expected, outside, line=line)


def _clip(pair: Accuracies, num_images: tuple[int, int]) -> Accuracies:
    (a, b), (n, m) = pair, num_images
    return min(max(a, 1 / (2 * n)), 1 - 1 / (2 * n)), min(max(b, 1 / (2 * m)), 1 - 1 / (2 * m))


def read_reference(path: Path) -> dict[str, dict[str, Accuracies]]:
    """Reads a reference file: CSV with the columns ``model``, ``acc_id`` and one ``acc_ood/<set>`` per OOD set.

    Returns:
        OOD set -> model -> (ID, OOD) accuracy, as fractions. A model with an empty cell is left out of that set.

    Raises:
        DataError: The file lacks a column, or a cell is no fraction (every bad cell is named), or it cannot be read.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        rows = [(reader.line_num, row) for row in reader]
        columns = tuple(reader.fieldnames or ())
    except OSError as error:
        raise DataError(Problem(str(path), "must be a readable CSV file", error.strerror or str(error))) from error
    except csv.Error as error:
        raise DataError(Problem(str(path), "must be a CSV file", str(error))) from error
    sets = [name for name in columns if name and name.startswith(OOD_PREFIX) and name != OOD_PREFIX]
    problems = []
    if "model" not in columns or "acc_id" not in columns or not sets:
        rule = f"must have the columns model, acc_id and one {OOD_PREFIX}<set> per OOD set"
        raise DataError(Problem(str(path), rule, ", ".join(str(name) for name in columns) or "an empty file"))
    found: dict[str, dict[str, Accuracies]] = {name.removeprefix(OOD_PREFIX): {} for name in sets}
    seen: set[str] = set()
    for line, row in rows:
        model = (row["model"] or "").strip()
        if not model or model in seen:
            problems.append(Problem(f"{path}:{line}: model", "must be a name, each once", repr(model)))
        seen.add(model)
        id_accuracy = _fraction(row["acc_id"], f"{path}:{line}: acc_id", problems)
        for name in sets:
            if (row[name] or "").strip():
                ood_accuracy = _fraction(row[name], f"{path}:{line}: {name}", problems)
                found[name.removeprefix(OOD_PREFIX)][model] = (id_accuracy, ood_accuracy)
    if problems:
        raise DataError(problems)
    return found


def _fraction(written: str | None, place: str, problems: list[Problem]) -> float:
    try:
        value = float(written or "")
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        step = "Percent? Divide by 100." if 1 < value <= 100 else ""
        problems.append(Problem(place, "must be a fraction from 0 to 1", repr(written or ""), next_step=step))
    return value
