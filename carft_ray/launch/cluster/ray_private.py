"""All that we use of Ray's private names, each with what it is for; ``pyproject.toml`` bounds the releases above.

Where a release has another name in its place, the message says which release and which name; ``tests/test_privates.py``
pins what each does.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from carft_ray.environment import private_name

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Arrow types that ``ray.data`` registers when it is imported, as ``ray.tune`` and ``ray.train`` do (Ray 2.55 to 2.60)
_EXTENSIONS = ("arrow_pickled_object", "arrow_tensor", "arrow_tensor_v2", "arrow_variable_shaped_tensor")


def forget_pickled_columns() -> list[str]:
    """Takes from Arrow the types with which Ray's import lets a file run code, and returns their names.

    A value of ``ray.data.arrow_pickled_object`` is unpickled as soon as it is asked for; the schema of a tensor may be,
    too, where the environment allows it. Afterwards such columns hold plain bytes and lists in this process. A module
    that Ray imports later registers its type anew, so call it where images are about to be read.
    """
    found = []
    for name in (f"ray.data.{each}" for each in _EXTENSIONS):
        with contextlib.suppress(pa.ArrowKeyError):
            pa.unregister_extension_type(name)
            found.append(name)
    return found


def _named(name: str) -> Any:
    return private_name("ray", name, lambda: resolve_name(name))


@contextlib.contextmanager
def without_news_of_workers() -> Iterator[None]:
    """Within the block, Ray's driver prints no '(raylet) A worker died': the switch of its debugger."""
    worker = private_name("ray", "ray._private.worker", lambda: ray._private.worker)
    private_name("ray", "ray._private.worker._worker_logs_enabled", lambda: worker._worker_logs_enabled)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = True


def read_authentication_anew() -> None:
    """Makes Ray read its mode of authentication and its token anew: it reads each once for a process.

    Other settings of Ray's own, ``RAY_...`` in the environment, are read anew with it. No Ray may be connected.
    """
    _named("ray._raylet.Config.initialize")("")
    _named("ray._raylet.AuthenticationTokenLoader").instance().reset_cache()


@contextlib.contextmanager
def on_this_machine_only() -> Iterator[None]:
    """Within the block, ``ray.init`` starts a Ray that listens on 127.0.0.1 only, its agent on a free port.

    Otherwise it listens on all interfaces, its metrics without the token, and its agent takes the port (52365) that a
    ``ray start`` beside it needs. ``ray.init`` has no argument for the agent and replaces 127.0.0.1 by another address.

    A signal to the process group of this process does not reach it: otherwise Ray ends before its trainings have
    written their checkpoints. When this process ends, the kernel ends it.
    """
    module, plain = _named("ray._private.parameter"), _named("ray._private.parameter.RayParams")
    starting, popen = _named("ray._private.services"), _named("ray._private.services.ConsolePopen")

    def ours(**given: Any) -> Any:
        return plain(**given | {"node_ip_address": "127.0.0.1", "dashboard_agent_listen_port": 0})

    module.RayParams, starting.ConsolePopen = ours, partial(popen, process_group=0)
    try:
        yield
    finally:
        module.RayParams, starting.ConsolePopen = plain, popen


def draining_nodes() -> Mapping[str, int]:
    """Returns the nodes that Ray drains: by its name of each the deadline, milliseconds since 1970, 0 without one."""
    found: Mapping[str, int] = _named("ray._private.state.state.get_draining_nodes")()
    return found


def resources_of_nodes() -> tuple[Mapping[str, Mapping[str, float]], Mapping[str, Mapping[str, float]]]:
    """Returns what is free on each node, and what there is, by Ray's name of the node.

    What there is has a name for each placement group besides: ``CPU_group_ID``, with its share of the node. While a
    group is made or removed the two may tell of different moments.
    """
    state = "ray._private.state"
    return _named(f"{state}.available_resources_per_node")(), _named(f"{state}.total_resources_per_node")()


def job_client(address: str, headers: dict[str, str], silence_s: float) -> "JobSubmissionClient":
    """Returns the client of a dashboard whose calls end after a silence; Ray's own waits without an end.

    Raises:
        OSError: Nobody answers.
        ray.exceptions.AuthenticationError: The token is wrong.
    """
    from ray.job_submission import JobSubmissionClient

    private_name("ray", "JobSubmissionClient._do_request", lambda: JobSubmissionClient._do_request)

    class Client(JobSubmissionClient):
        def _do_request(self, *given: Any, **named: Any) -> Any:
            return super()._do_request(*given, timeout=silence_s, **named)

    return Client(address, headers=headers)


@contextlib.contextmanager
def one_trial_dies() -> Iterator[None]:
    """Within the block, Tune takes a process that the memory monitor has ended for one trial that has died.

    The exception is no ``RayActorError``, and at what it does not know Tune ends its whole run (read in Ray 2.60).
    """
    manager = _named("ray.air.execution._internal.actor_manager.RayActorManager")
    names = ("_actor_start_failed", "_actor_task_failed")
    before = {each: private_name("ray", f"RayActorManager.{each}", partial(getattr, manager, each)) for each in names}

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


def lean(trainer: Any) -> Any:
    """Changes a ``TorchTrainer``, in place, so that a group of one worker has three processes instead of six.

    Its controller runs in the process that calls ``fit``, which must be an actor's. Left out are the actors for Ray's
    data sets, which no training has, and for placement groups left behind, which ``launch.leaks`` removes.
    """
    names = ("_create_default_callbacks", "_initialize_and_run_controller")
    callbacks, _ = (private_name("ray", f"TorchTrainer.{name}", partial(getattr, trainer, name)) for name in names)
    controller_of = _named("ray.train.v2._internal.execution.controller.TrainController")
    without = ("DatasetsCallback", "DatasetsSetupCallback", "PlacementGroupCleanerCallback")

    def run(**arguments: Any) -> Any:
        controller = controller_of(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()

    trainer._create_default_callbacks = lambda: [each for each in callbacks() if type(each).__name__ not in without]
    trainer._initialize_and_run_controller = run
    return trainer
