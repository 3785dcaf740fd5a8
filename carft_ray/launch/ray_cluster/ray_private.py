"""All that we use of Ray's private names, each with what it is for; ``pyproject.toml`` bounds the releases above.

Where a release has another name in its place, the message says which release and which name; ``tests/test_privates.py``
pins what each does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

from carft_ray.errors import ClusterError, Problem


@contextlib.contextmanager
def without_news_of_workers() -> Iterator[None]:
    """Within the block, Ray's driver prints no '(raylet) A worker died': the switch of its debugger."""
    worker = _found("ray._private.worker", lambda: ray._private.worker)
    _found("ray._private.worker._worker_logs_enabled", lambda: worker._worker_logs_enabled)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = True


def available_resources_per_node() -> Mapping[str, Mapping[str, float]]:
    """Returns what nobody holds, by Ray's name of the node; the public call has the sum over nodes only."""
    name = "ray._private.state.available_resources_per_node"
    found: Mapping[str, Mapping[str, float]] = _found(name, lambda: ray._private.state.available_resources_per_node)()
    return found


@contextlib.contextmanager
def one_trial_dies() -> Iterator[None]:
    """Within the block, Tune takes a process that the memory monitor has ended for one trial that has died.

    The exception is no ``RayActorError``, and at what it does not know Tune ends its whole run (read in Ray 2.60).
    """
    manager = _found("ray.air.execution._internal.actor_manager.RayActorManager", _actor_manager)
    names = ("_actor_start_failed", "_actor_task_failed")
    before = {name: _found(f"RayActorManager.{name}", functools.partial(getattr, manager, name)) for name in names}

    def known(plain: Callable[..., None]) -> Callable[..., None]:
        def failed(manager: Any, *, exception: Exception, **tracked: Any) -> None:
            if isinstance(exception, ray.exceptions.OutOfMemoryError):
                exception = ray.exceptions.RayActorError(error_msg=str(exception))
            plain(manager, exception=exception, **tracked)

        return failed

    for name, plain in before.items():
        setattr(manager, name, known(plain))
    try:
        yield
    finally:
        for name, plain in before.items():
            setattr(manager, name, plain)


def _actor_manager() -> Any:
    from ray.air.execution._internal.actor_manager import RayActorManager

    return RayActorManager


def _found(name: str, find: Callable[[], Any]) -> Any:
    """Returns a private name of Ray.

    Raises:
        ClusterError: This release has no such name.
    """
    try:
        return find()
    except (AttributeError, ImportError) as error:
        step = "Install a release of Ray that pyproject.toml allows: pip install 'ray[default,train,tune]>=2.52,<2.61'"
        rule = f"must have {name}, which carft-ray uses"
        raise ClusterError(Problem("Ray", rule, f"release {ray.__version__}", next_step=step)) from error
