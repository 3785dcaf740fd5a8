"""Recovery of trainings that an earlier search left running: it was killed or stopped, or its machine was lost.

What has ended is recorded; the rest is queued for another attempt, which resumes from its newest checkpoint.
"""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from carft_ray.layout import RESULT
from carft_ray.recipe.schema.recipe import ResourcesConfig
from carft_ray.store.attempt_files import read_result
from carft_ray.study import typed
from carft_ray.study.attributes import SET_ASIDE, SPENT, STUCK
from carft_ray.study.rows import row_of, trainings
from carft_ray.study.running import left_behind
from carft_ray.study.study import Study
from carft_ray.study.training import Kind, TrialRow


def recover_running(study: Study) -> list[TrialRow]:
    """Takes over what an earlier search left RUNNING: records what has ended, queues the rest for another attempt.

    Returns:
        Rows of what was recorded.
    """
    study.log.check()
    study.enter("baseline", study.recipe.search.baselines)
    ended = recover(study, "baseline") + recover(study, "trial")
    study.notes += study.journal.take_in(study.sources)
    study.knows_all = True
    study.retention.keep_best()
    return ended


def recover_given(study: Study, trainings: Mapping[str, dict[str, Any]], kind: Kind = "confirm") -> list[TrialRow]:
    """As ``recover_running``, for trainings with given values: only these run until the study is opened again.

    Args:
        study: The study.
        trainings: Values over the recipe's ``train`` by name; those that are finished already are left alone.
        kind: Of the trainings.
    """
    study.asks = False
    if kind not in study.journal.studies:
        study.journal.open(kind)
    study.enter(kind, trainings)
    return recover(study, kind, trainings)


def recover(study: Study, kind: Kind, wanted: Container[str] | None = None) -> list[TrialRow]:
    """Records or queues what is RUNNING in one of the Optuna studies; None wants everything."""
    _spend_left_behind(study)
    for each in trainings(study.journal.studies[kind]):
        told = row_of(kind, each)
        study.retention.ended(told)  # of what was told right before a kill, all files are there
        if told.outcome == "complete":
            study.log.store.has_ended(told.attempt_name)
    ended = []
    for spec in study.journal.running(kind):
        if wanted is not None and spec.name not in wanted:
            continue
        if row := study.settle(spec) if spec.attempt else None:
            ended.append(row)
            continue
        if study.journal.attribute(spec, SET_ASIDE):  # this is another search
            study.journal.note(spec, {SET_ASIDE: None, STUCK: None})
        if spec not in study.waiting:
            study.waiting.append(spec)
    return ended


def _spend_left_behind(study: Study) -> None:
    """Notes what the attempts took that ran when a driver was killed, whatever they belonged to."""
    left = left_behind(study.log)
    further: tuple[Kind, ...] = ("confirm", "soup")
    closed = [kind for kind in further if kind not in study.journal.studies and study.journal.has(kind)]
    study.journal.open(*closed)
    for spec in [spec for kind in study.journal.studies for spec in study.journal.running(kind)]:
        if spec.attempt and str(spec.attempt) not in (study.journal.attribute(spec, SPENT) or {}):
            found = left.get((spec.training, spec.attempt))
            seconds, gpus = found or _of_result(spec.place(study.study_dir), study.recipe.resources)
            if seconds:
                study.journal.note(spec, study.spent(spec, seconds, gpus))
    for kind in closed:  # a search does not continue them
        del study.journal.studies[kind]


def _of_result(place: Path, resources: ResourcesConfig) -> tuple[float, float]:
    """Returns seconds and GPUs of an attempt that has left a result in its folder; zeros for none.

    Args:
        place: The folder.
        resources: Of the recipe.

    Raises:
        StorageError: The result holds what it cannot.
    """
    result, _ = read_result(place) or ({}, "")
    typed.checked(typed.Took, result, str(place / RESULT))
    made_on = result.get("environment") or {}
    each = 1.0 if resources.gpus_per_worker is None else resources.gpus_per_worker
    gpus = each * made_on.get("num_workers", 1) if made_on.get("device", "cpu") != "cpu" else 0.0
    return float(result.get("elapsed_s") or 0.0), gpus
