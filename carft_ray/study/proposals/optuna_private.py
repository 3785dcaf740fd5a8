"""All that we use of Optuna's private names, each with what it is for; ``pyproject.toml`` bounds the releases above.

Where a release has another name in its place, the message says which release and which name; ``tests/test_privates.py``
pins what each does. ``samplers`` overrides two private methods, ``QMCSampler._find_sample_id`` and
``BruteForceSampler._populate_tree``.
"""

from contextlib import AbstractContextManager
from pkgutil import resolve_name

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from carft_ray.environment import private_name


def running_trial(study: optuna.Study, frozen: FrozenTrial) -> optuna.trial.Trial:
    """Returns an unfinished trial of the storage, to draw and finish it: ``Study.ask`` gives new ones only."""
    return optuna.trial.Trial(study, trial_id(frozen))


def trial_id(trial: FrozenTrial | optuna.trial.Trial) -> int:
    """Returns the id of a trial in its storage, which is no number within its study."""
    found: int = private_name("optuna", "FrozenTrial._trial_id", lambda: trial._trial_id)
    return found


def frozen_trial(trial: optuna.trial.Trial) -> FrozenTrial:
    """Returns what is known of a trial that is being drawn, as samplers take it."""
    found: FrozenTrial = private_name("optuna", "Trial._cached_frozen_trial", lambda: trial._cached_frozen_trial)
    return found


def is_within(distribution: BaseDistribution, value: float) -> bool:
    """Tells whether a distribution can give this value."""
    contains = private_name("optuna", "BaseDistribution._contains", lambda: distribution._contains)
    try:
        return bool(contains(distribution.to_internal_repr(value)))
    except ValueError:  # of choices it is none
        return False


def on_one_thread() -> AbstractContextManager[None]:
    """Returns a block in which the GP sampler computes on one thread."""
    name = "optuna._gp.thread_limiting.limit_threads_in_optimization"
    block: AbstractContextManager[None] = private_name("optuna", name, lambda: resolve_name(name))()
    return block
