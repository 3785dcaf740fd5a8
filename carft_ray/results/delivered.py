"""The model that a study delivers: a training or a soup, and its alpha. `test` measures it, and `export` writes it.

Before a `confirm` it is the best on validation of the trainings of the best values, at their alpha. After one those
with fresh seeds take part, too. So do soups of these trainings, each at its own alpha; a soup that measures no more
than the best training is not chosen. Each baseline delivers a model by the same rule. A read of the test sets fixes all
of them in its line of the ledger, with the SHA-256 of their weights, before it opens an image. From then on the
delivered model is the one of the last read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.evaluation.alpha_curve import point_at
from carft_ray.layout import CONFIRM, RESULT, SUMMARY, TEST_DIR, WEIGHTS
from carft_ray.results.confirm_plan import PlanRow, Stage, last_stage, read_plan, whole_rows
from carft_ray.results.evidence import AT_ONE, headline_lines, in_points, winner_of
from carft_ray.results.reading.finished import open_finished
from carft_ray.results.stored import read_compared
from carft_ray.results.toward_start import delivered_at
from carft_ray.study import typed
from carft_ray.study.ledger import fixed_in, read_folder, reads_of
from carft_ray.study.records import LEDGER
from carft_ray.study.rows import ZERO_SHOT, require_finished
from carft_ray.study.snapshot import Snapshot, snapshot
from carft_ray.study.training import TrialRow, result_of
from carft_ray.words import counted

Standing = Literal["tested", "fixed", "confirmed", "searched", "other"]
STANDING: dict[Standing, str] = {
    "tested": "the model that `test` has fixed and measured",
    "fixed": "the model that `test` has fixed, in a read that has not ended",
    "confirmed": "the best of the winner's trainings on validation, not tested",
    "searched": "the best model of the search, neither confirmed nor tested",
}
# a delivered model: ``name`` (of the training of the winner, else of the baseline), ``role``, ``trial`` (as `--trial`
# takes it; None of the zero-shot model), ``runs`` (its folder in the study, a list of none or one), ``alpha``,
# ``objective`` on validation, ``sha256`` of its fine-tuned weights, ``chosen_from``: the number of trainings that it is
# the best of
Model = dict[str, Any]


def delivered(study: Snapshot) -> tuple[Model, Standing]:
    """Returns the model that a study delivers, and what has been done with it.

    Raises:
        NoSuccessfulTrialError: No trial has finished.
        HoldOutError, StorageError: The study is damaged.
    """
    reads = reads_of(study.ledger)
    if reads and "rows" in reads[-1].details:
        details = fixed_in(reads[-1])
        if fixed := details.get("models") or ([] if details["confirmed"] else details["rows"]):
            of_earlier_releases = {"trial": fixed[0]["name"], "sha256": None, "chosen_from": 0}
            model = typed.checked(typed.Model, {**of_earlier_releases, **fixed[0]}, LEDGER)
            has_ended = files.exists(study.study_dir / read_folder(len(reads)) / SUMMARY)
            return model, "tested" if has_ended else "fixed"
    stages = read_plan(study.study_dir)
    if stages and (found := models_of_confirm(study, *stages)):
        return found[0], "confirmed"
    return models_of_search(study)[0], "searched"


def models_of_search(study: Snapshot) -> list[Model]:
    """Returns the models of a search, the best trial first, then its baselines: one training each.

    Raises:
        NoSuccessfulTrialError: No trial has finished.
        StorageError: A result is missing or damaged.
    """
    found = [(require_finished(study.study_dir, study.best), "winner")]
    found += [(row, "baseline") for row in study.baselines if row.objective is not None]
    models = []
    for first, role in found:
        trained = study.trainings_of(first)
        row = max(_kept(study.study_dir, trained), key=lambda row: row.objective or 0.0)
        num = study.num_finished if role == "winner" else len(trained) * (first.name != ZERO_SHOT)
        name = first.name if role == "baseline" else ""
        alpha = delivered_at(study, [row])
        model = _model(study.study_dir, row, role, alpha, _objective(study, row, alpha), num, name)
        members = study.trials if role == "winner" else trained
        models.append(_or_soup(study, model, row, members, first.name))
    return models


def models_of_confirm(study: Snapshot, first: Stage, second: Stage | None) -> list[Model]:
    """Returns the models after a confirm, the winner's first; none if the winner lacks a training with a fresh seed.

    The search's own training counts while the study keeps its weights; that of another study's winner does not.

    Raises:
        StorageError: A result is missing or damaged.
    """
    last, study_dir = second or first, study.study_dir
    if not any(row.role == "winner" and trained for row, trained in whole_rows(last, study.confirmations)):
        return []
    found = []
    for row, own, fresh in trained_rows(study, first, second):
        if row.training is None and own:
            found.append(_model(study_dir, own[0], row.role, 0.0, row.objective, 0))
        elif trained := [*own, *fresh]:
            counted = {each.name for each in fresh}
            if second and row.role == "winner":  # ``chosen_from`` has those that chose it
                counted -= first.trainings().keys()
            repeats = max(len(own), 1) - 1 if row.role == "baseline" else 0
            best, model = _best_of(study_dir, row, trained, row.chosen_from + repeats + len(counted))
            members = (*trained, *study.trials) if row.role == "winner" else trained
            found.append(_or_soup(study, model, best, members, row.name))
    return found


def trained_rows(
    study: Snapshot, first: Stage, second: Stage | None
) -> list[tuple[PlanRow, list[TrialRow], list[TrialRow]]]:
    """Returns the winner of a confirm, then its baselines, each with its trainings of the search and its fresh ones."""
    own = {row.name: study.trainings_of(row) for row in (*study.baselines, *study.trials) if row.outcome == "complete"}
    complete = {row.name: row for row in study.confirmations if row.outcome == "complete"}
    fresh: dict[str, list[TrialRow]] = {}
    for stage in filter(None, (first, second)):
        for row in stage.rows:
            fresh.setdefault(row.name, []).extend(complete[name] for name in stage.names(row) if name in complete)
    rows = sorted((second or first).rows, key=lambda row: row.role != "winner")
    models = [row for row in rows if row.role in ("winner", "baseline") and not row.name.endswith(AT_ONE)]
    return [(row, own.get(row.name, []), fresh[row.name]) for row in models]


def _kept(study_dir: Path, trained: Sequence[TrialRow]) -> Sequence[TrialRow]:
    """Returns the trainings whose weights the study has; all of them if it has none."""
    return [row for row in trained if files.exists(row.place(study_dir) / WEIGHTS)] or trained


def _best_of(study_dir: Path, row: PlanRow, trained: Sequence[TrialRow], number: int) -> tuple[TrialRow, Model]:
    """Returns the best of a configuration's trainings at its alpha, the first of equals."""
    kept = _kept(study_dir, trained)
    points = [(point_at(result_of(study_dir, each).get("curve") or (), row.alpha), each) for each in kept]
    measured = [(point["objective"], each) for point, each in points if point is not None]
    if not measured:
        place = kept[-1].place(study_dir) / RESULT
        raise typed.wrong(str(place), "its curve must have the alpha of the plan", row.alpha)
    objective, best = max(measured, key=lambda pair: pair[0])
    return best, _model(study_dir, best, row.role, row.alpha, objective, number, row.name)


def _or_soup(study: Snapshot, model: Model, row: TrialRow, trained: Sequence[TrialRow], name: str) -> Model:
    """Returns the best soup of some trainings, if it measured more than the best of them, the model.

    Args:
        study: The study.
        model: The best training.
        row: The same.
        trained: Whose soups may be chosen; those of fewer members count, too.
        name: Of the baseline.
    """
    soups = soups_of(study, trained)
    if not soups:
        return model
    tried = sum(1 + num_tried(study, soup) for soup in soups)
    model = {**model, "chosen_from": model["chosen_from"] + tried}
    for soup in (soup for soup in soups if soup.violation <= row.violation):
        objective = _objective(study, soup, alpha := delivered_at(study, [soup]))
        if objective > model["objective"]:
            model = _model(study.study_dir, soup, model["role"], alpha, objective, model["chosen_from"], name)
    return model


def _objective(study: Snapshot, row: TrialRow, alpha: float) -> float:
    """Returns what a complete training or soup measured at an alpha."""
    point = None if alpha == row.alpha else point_at(result_of(study.study_dir, row).get("curve") or (), alpha)
    return float(point["objective"] if point else row.objective or 0.0)


def soups_of(study: Snapshot, trained: Iterable[TrialRow]) -> list[TrialRow]:
    """Returns the complete soups that have members of these trainings alone."""
    names = {row.attempt_name for row in trained}
    complete = [soup for soup in study.soups if soup.outcome == "complete" and soup.soup]
    return [soup for soup in complete if all(each["name"] in names for each in (soup.soup or {})["members"])]


def num_tried(study: Snapshot, soup: TrialRow) -> int:
    """Returns how many tries were measured on the way to a soup."""
    return len(result_of(study.study_dir, soup).get("soup", {}).get("tried", ()))


def members_words(result: Mapping[str, Any]) -> str:
    """Returns what a soup is the mean of, in words, by its result; empty of a training."""
    if "soup" not in result:
        return ""
    names = [name.split("/")[1] for name in result["soup"]["members"]]
    what = "Model Stock" if result["soup"]["kind"] == "model_stock" else "the mean of the weights"
    return f"{what} of {', '.join(names)}"


def _model(
    study_dir: Path, row: TrialRow, role: str, alpha: float, objective: float, number: int, name: str = ""
) -> Model:
    trial = row.called
    is_trained = row.name != ZERO_SHOT
    return {
        "name": trial if role == "winner" else name or row.name,
        "role": role,
        "trial": trial if is_trained else None,
        "runs": [row.training] if is_trained else [],
        "alpha": alpha,
        "objective": objective,
        "sha256": weights_of(study_dir, row) if is_trained else None,
        "chosen_from": number,
    }


def weights_of(study_dir: Path, row: TrialRow) -> str | None:
    """Returns the SHA-256 of the fine-tuned weights of a complete training, as its result has it."""
    recorded = result_of(study_dir, row).get("files", {}).get(WEIGHTS)
    return None if recorded is None else str(recorded["sha256"])


def require_weights_of(study_dir: Path, row: TrialRow, model: Model) -> None:
    """Raises a ``StorageError`` unless a training has the weights that the ledger has fixed."""
    if model["sha256"] is not None and (now := weights_of(study_dir, row)) != model["sha256"]:
        rule = f"must have the weights that the ledger has fixed, SHA-256 {str(model['sha256'])[:12]}"
        raise StorageError(Problem(str(row.place(study_dir) / WEIGHTS), rule, f"{now or 'none'}"[:12]))


@dataclass(frozen=True)
class Choice:
    """What `export` writes, and the best evidence about it.

    Attributes:
        trial: The training, as `--trial` takes it.
        alpha: Its mixing coefficient.
        standing: What has been done with this model.
        sha256: Of its fine-tuned weights.
        said: Which one it is, in a sentence.
        on: What ``accuracies`` were measured on, and of what; empty: nothing has measured it again.
        lines: What that shows.
        accuracies: By set, in percent with the 95 % interval.
        num_images: Of the test sets.
    """

    trial: str
    alpha: float
    standing: Standing
    sha256: str | None
    said: str
    on: str = ""
    lines: tuple[str, ...] = ()
    accuracies: Mapping[str, str] = field(default_factory=dict)
    num_images: Mapping[str, int] = field(default_factory=dict)


def chosen(study_dir: Path, trial: str | int | None, alpha: float | None) -> Choice:
    """Returns the model to export.

    Args:
        study_dir: The study directory.
        trial: As `--trial` has it; None: the model that the study delivers.
        alpha: As `--alpha` has it; None: that of the model.

    Raises:
        NoSuccessfulTrialError, UsageError: As ``open_finished``.
        HoldOutError, StorageError: The study is damaged, or has other weights than the ledger.
    """
    study = snapshot(study_dir)
    model, standing = delivered(study) if trial is None or study.best else (None, None)
    finished = open_finished(study_dir, model["trial"] if model and trial is None else trial, "--trial")
    is_it = model is not None and finished.name == model["trial"]
    own = model["alpha"] if model and is_it else finished.result["alpha"]
    used = own if alpha is None else alpha
    sha256 = None if finished.is_zero_shot else weights_of(study_dir, finished.row)
    of_soup = f" ({words})" if (words := members_words(finished.result)) else ""
    if model is None or standing is None or not is_it or used != own:
        words = f"{finished.name} at alpha {used:g}{of_soup}, not tested"
        other = f"; the study delivers {model['trial']} at alpha {model['alpha']:g}" if model else ""
        return Choice(finished.name, used, "other", sha256, f"{words}{other}")
    require_weights_of(study_dir, finished.row, model)
    said = STANDING[standing].replace("trainings", "trainings and soups" if of_soup else "trainings")
    about = Choice(finished.name, used, standing, sha256, f"{finished.name} at alpha {used:g}{of_soup}: {said}")
    return _with_evidence(study, about)


def _with_evidence(study: Snapshot, about: Choice) -> Choice:
    """Returns a choice with what a test has measured of the model, else a confirm of its values."""
    study_dir, found, num_images = study.study_dir, None, {}
    if about.standing == "tested":
        last_read = len(reads_of(study.ledger))
        if whole := read_compared(study_dir, read_folder(last_read)):
            found, num_images, on = whole.get("model") or whole, whole["sets"], f"the test sets (read {last_read})"
    elif about.standing == "confirmed" and (found := read_compared(study_dir, CONFIRM)):
        last = last_stage(study_dir)
        if last is None or (found["winner"], found["seeds"]) != (last.winner, list(last.seeds)):
            return about  # of an earlier comparison
        number = counted(len(found["seeds"]), "training")
        on = f"the validation sets, which were used for selection; not this file, but the mean of {number} of these "
        on += "values with fresh seeds"
    if not found:
        return about
    row = winner_of(found["rows"])
    is_it = (row["name"], row["alpha"], row.get("sha256", about.sha256)) == (about.trial, about.alpha, about.sha256)
    if about.standing == "tested" and not is_it:
        rule = "its winner must be the model that the ledger has fixed"
        raise typed.wrong(str(study_dir / TEST_DIR / SUMMARY), rule, row["name"])
    accuracies = {name: in_points(each["mean"], each["ends"]) for name, each in row["sets"].items()}
    lines = tuple(headline_lines(found))
    return replace(about, on=on, lines=lines, accuracies=accuracies, num_images=num_images)
