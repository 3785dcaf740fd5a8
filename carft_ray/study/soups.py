"""Which soups a study makes: means of the weights of its trainings, each a training without steps of its own.

| kind | members | weights |
|---|---|---|
| ``repeats`` | all trainings of the best values, and, of three or more, the best two | their mean |
| ``greedy`` | the best trainings, eight at most | a mean to which each is added if the objective rises |
| ``uniform`` | the same | their mean |
| ``model_stock`` | the same | Model Stock (``model.soups``) |

Members are trainings whose weights the study keeps, the best by expected objective first, of the same values the one
that measured most. A soup ``repeats`` of all is not made if the weights of one of them are gone.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from carft_ray import files
from carft_ray.layout import COMMITS, WEIGHTS
from carft_ray.store.copy import MODELS
from carft_ray.study import typed
from carft_ray.study.rows import rank
from carft_ray.study.snapshot import Snapshot
from carft_ray.study.study import Study
from carft_ray.study.take_over import recover
from carft_ray.study.training import TrialRow, TrialSpec, file_of, result_of

SoupKind = Literal["repeats", "greedy", "uniform", "model_stock"]
KINDS: tuple[SoupKind, ...] = get_args(SoupKind)
MOST = 8  # members of what is not made of repeats
Soup = dict[str, Any]  # a ``typed.Soup``
_MADE_BY: dict[SoupKind, str] = {"repeats": "mean", "uniform": "mean", "greedy": "greedy", "model_stock": "model_stock"}


def of_study(study: Snapshot, kinds: Iterable[SoupKind], groups: Sequence[Sequence[TrialRow]] = ()) -> dict[str, Soup]:
    """Returns the soups that a study should have, by name.

    Args:
        study: Its trainings have ended.
        kinds: Which ones.
        groups: Of a confirm, the trainings of the winner's values, then those of each baseline, of which only
            ``repeats`` are made; none: those of the best values of the search.

    Raises:
        StorageError: A result is missing or damaged.
    """
    if study.best is None or study.best.order is None:  # a Pareto search has no one objective
        return {}
    winners, *rivals = [most_first(group) for group in groups or [study.trainings_of(study.best)]]
    others = [row for row in sorted(study.trials, key=rank) if row not in winners and row.outcome == "complete"]
    ranked = [row for row in (*winners, *others) if row.violation <= winners[0].violation and _is_kept(study, row)]
    found = dict[str, Soup]()
    for kind in kinds:
        if kind == "repeats":
            for group in (winners, *rivals):
                kept = [row for row in group if _is_kept(study, row)]
                wholes = [kept] if len(kept) == len(group) else []
                for members in (*wholes, *([kept[:2]] if len(kept) > 2 or not wholes else [])):
                    found |= made_of(study, kind, members)
        else:
            found |= made_of(study, kind, ranked[:MOST])
    return found


def made_of(study: Snapshot, kind: SoupKind, members: Sequence[TrialRow]) -> dict[str, Soup]:
    """Returns the soup of some trainings by its name; none of fewer than two, since one training is its own soup.

    Args:
        study: The study.
        kind: Its kind.
        members: Complete trainings; tries are measured at the alpha of the first one.

    Raises:
        StorageError: A result is missing or damaged.
    """
    if len(members) < 2:
        return {}
    alpha = members[0].alpha or 1.0
    parts = []
    for row in members:
        result = result_of(study.study_dir, row)
        at: dict[str, float] = next((point for point in result.get("curve") or () if point["alpha"] == alpha), {})
        recorded = result.get("files", {}).get(WEIGHTS, {}).get("sha256", "")
        parts.append({"name": row.attempt_name, "sha256": recorded, "objective": at.get("objective")})
    train = {**result_of(study.study_dir, members[0])["train"], "alpha": None}
    soup = {"kind": _MADE_BY[kind], "members": parts, "alpha": alpha, "train": train}
    key = json.dumps([kind, [part["name"] for part in parts], alpha])
    return {f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:6]}": soup}


def most_first(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Returns the complete trainings of the same values, those first that measured most."""
    complete = [row for row in rows if row.outcome == "complete"]
    return sorted(complete, key=lambda row: (row.violation, -(row.objective or 0.0), row.training))


def _is_kept(study: Snapshot, row: TrialRow) -> bool:
    """Tells whether the study has the weights of a training, in its folder or its bucket."""
    name = f"{row.attempt_name}/{WEIGHTS}"
    return files.exists(study.study_dir / name) or name in study.log.store.known(row.training)


def enter(study: Study, wanted: Mapping[str, Soup]) -> None:
    """Queues soups, those that another command has begun among them; what is made is left alone.

    A soup that cannot be made any longer, since weights of a member are gone, has failed.

    Raises:
        StorageError: A soup names what is no training of the study, or other weights than it has.
    """
    if not wanted and not study.journal.has("soup"):
        return
    study.journal.open("soup")
    study.enter("soup", wanted)
    recover(study, "soup")
    rows = {row.attempt_name: row for row in study.snapshot().rows if row.outcome == "complete"}
    for spec in [spec for spec in study.waiting if spec.soup is not None]:
        if gone := _gone(study, spec, rows):
            study.waiting.remove(spec)
            study.fail(spec, f"the weights of {gone} are gone")


def _gone(study: Study, spec: TrialSpec, rows: Mapping[str, TrialRow]) -> str:
    """Checks the members of a soup, and has the study's folder hold their weights; names one whose weights are gone.

    Args:
        study: The study.
        spec: The soup.
        rows: Complete trainings by the name of their last attempt.

    Raises:
        StorageError: One is no complete training of the study, or its weights are others; or one is there twice.
    """
    study_dir, soup, gone = study.study_dir, spec.soup or {}, ""
    place, names = f"{study.log}/{COMMITS}: soup {spec.name}", [member["name"] for member in soup["members"]]
    if len({*names}) < len(names):
        raise typed.wrong(place, "each member must be there once", None)
    for member in soup["members"]:
        row = rows.get(member["name"])
        if row is None or row.kind == "soup":
            raise typed.wrong(place, "a member must be a complete training of the study", member["name"])
        recorded = result_of(study_dir, row).get("files", {}).get(WEIGHTS, {}).get("sha256")
        if recorded != member["sha256"]:
            raise typed.wrong(place, f"{row.name} must have the weights that the study has recorded", member["sha256"])
        study.log.store.bring(row.attempt_name, MODELS)
        if not files.exists(file_of(study_dir, row, WEIGHTS)):
            gone = gone or row.name
    return gone
