"""How important each searched parameter is for ID and for OOD accuracy: PED-ANOVA of Optuna (arXiv 2304.10255)."""

import warnings
from pathlib import Path

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from carft_ray.store.log import log_of
from carft_ray.study import rows
from carft_ray.study.attributes import MEASURED

MIN_TRIALS = 20  # complete trials from which on importances are given
METRICS = ("id_accuracy", "ood_accuracy")


def importances(study_dir: Path) -> dict[str, dict[str, float]]:
    """Returns per metric the importance of each parameter for being among the best tenth of it; they sum to 1.

    Args:
        study_dir: The study directory.

    Returns:
        ``id_accuracy`` and, where there is an OOD set, ``ood_accuracy``; empty below 20 complete trials, or where the
        trials do not differ.

    Raises:
        StorageError: The log is damaged.
    """
    with rows.readable(log_of(study_dir)) as storage:
        study = rows.stored(storage, rows.STUDY_NAMES["trial"])
        trials = [] if study is None else rows.trainings(study)
    complete = [(one, one.user_attrs.get(MEASURED, {})) for one in trials if one.state == TrialState.COMPLETE]
    found = {}
    for metric in METRICS:
        values = [(one, metrics[metric]) for one, metrics in complete if metric in metrics]
        if len(values) >= MIN_TRIALS and len({value for _, value in values}) > 1:
            found[metric] = _of_values(values)
    return {metric: shares for metric, shares in found.items() if shares}


def _of_values(values: list[tuple[FrozenTrial, float]]) -> dict[str, float]:
    """Returns the importances in a study of these trials alone, for values that are maximised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is named experimental
        study = optuna.create_study(direction="minimize")
        study.add_trials(
            [create_trial(params=one.params, distributions=one.distributions, value=-value) for one, value in values]
        )
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in shares.items()} if any(shares.values()) else {}
