"""All that we use of Optuna's private names, each with what it is for; ``pyproject.toml`` bounds the releases above.

Where a release has another name in its place, the message says which release and which name; ``tests/test_privates.py``
pins what each does. ``samplers`` overrides one private method besides, ``QMCSampler._find_sample_id``.
"""

from contextlib import AbstractContextManager
from pkgutil import resolve_name

import optuna
from optuna.trial import FrozenTrial

from carft_ray.environment import private_name


def running_trial(study: optuna.Study, frozen: FrozenTrial) -> optuna.trial.Trial:
    """Returns an unfinished trial of the storage, to draw and finish it: ``Study.ask`` gives new ones only."""
    return optuna.trial.Trial(study, trial_id(frozen))


def trial_id(frozen: FrozenTrial) -> int:
    """Returns the id of a trial in its storage, which is no number within its study."""
    found: int = private_name("optuna", "FrozenTrial._trial_id", lambda: frozen._trial_id)
    return found


def on_one_thread() -> AbstractContextManager[None]:
    """Returns a block in which the GP sampler computes on one thread."""
    name = "optuna._gp.thread_limiting.limit_threads_in_optimization"
    block: AbstractContextManager[None] = private_name("optuna", name, lambda: resolve_name(name))()
    return block
