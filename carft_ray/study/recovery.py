"""Recovery of trainings that an earlier search left running: it was killed or stopped, or its machine was lost.

What has ended is recorded; the rest is queued for another attempt, which resumes from its newest checkpoint.
"""

from collections.abc import Container, Mapping
from typing import Any

from carft_ray.study import outcome
from carft_ray.study.outcome import Kind, TrialRow, TrialSpec
from carft_ray.study.rows import SET_ASIDE, SPENT, row_of, trainings
from carft_ray.study.study import STUCK, Study


def recover_running(study: Study) -> list[TrialRow]:
    """Takes over what an earlier search left RUNNING: records what has ended, queues the rest for another attempt.

    Returns:
        Rows of what was recorded.
    """
    study.log.check()
    study.enter("baseline", study.recipe.search.baselines)
    ended = recover(study, "baseline") + recover(study, "trial")
    study.notes += study.journal.take_in()
    trials = [row_of("trial", each) for each in trainings(study.journal.studies["trial"])]
    for row in study.rows("baseline") + trials:
        study.retention.ended(row)
    study.knows_all = True
    study.retention.note_best()
    return ended


def recover_confirm(study: Study, trainings: Mapping[str, dict[str, Any]]) -> list[TrialRow]:
    """As ``recover_running``, for the trainings of a confirm: only these run until the study is opened again.

    Args:
        trainings: Values over the recipe's ``train`` by name; those that are finished already are left alone.
    """
    study.asks = False
    study.journal.open("confirm")
    study.enter("confirm", trainings)
    return recover(study, "confirm", trainings)


def recover(study: Study, kind: Kind, wanted: Container[str] | None = None) -> list[TrialRow]:
    """Records or queues what is RUNNING in one of the Optuna studies; None wants everything."""
    ended = []
    for spec in study.journal.running(kind):
        if wanted is not None and spec.name not in wanted:
            continue
        _spend_left_behind(study, spec)
        failure = outcome.read_failure(spec.folder(study.study_dir), spec.attempt)
        mended = failure is not None and failure.outcome == "fatal"  # the user had the time to mend it
        if row := study.settle(spec) if spec.attempt and not mended else None:
            ended.append(row)
            continue
        if study.journal.attribute(spec, SET_ASIDE):  # this is another search
            study.journal.note(spec, {SET_ASIDE: None, STUCK: None})
        if spec not in study.waiting:
            study.waiting.append(spec)
    return ended


def _spend_left_behind(study: Study, spec: TrialSpec) -> None:
    if spec.attempt and str(spec.attempt) not in (study.journal.attribute(spec, SPENT) or {}):
        seconds, gpus = outcome.left_behind(spec.folder(study.study_dir), spec.attempt, study.recipe.resources)
        if seconds:
            study.spend(spec, seconds, gpus)
