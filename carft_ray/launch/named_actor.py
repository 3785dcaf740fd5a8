"""An actor of the driver's node, for whoever holds its name."""

import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "carft-ray"  # of Ray's names of actors: workers of Ray Train are in another one by default


class NamedActor:
    """The actor; travels to workers by its name.

    Tune keeps what it was given, and pickles it again with the next Ray of this process when it could not before; the
    handle of an actor that is gone would end the process there.

    Args:
        name: Of the actor.
        actor: Its first handle, which keeps it alive.
    """

    def __init__(self, name: str, actor: Any = None) -> None:
        self._name, self._actor, self._what = name, actor, name.rpartition("-")[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves the handle out."""
        return type(self), (self._name,)

    def begin(self, method: str, *given: Any) -> Any:
        """Calls a method; returns Ray's reference to what it will return.

        Raises:
            ConnectionError: There is no such actor, or Ray cannot carry the call: its store and the disk are full, say.
        """
        try:
            try:
                self._actor = self._actor or ray.get_actor(self._name, NAMESPACE)
            except ValueError as error:
                raise ConnectionError(f"the {self._what} is gone") from error
            return getattr(self._actor, method).remote(*given)
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the {self._what} cannot be asked: {type(error).__name__}") from error

    def result(self, begun: Any, timeout_s: float) -> Any:
        """Returns what a call that was begun returns.

        Raises:
            ConnectionError: There is no answer in time, or the actor's process has ended.
            Exception: What the method has raised.
        """
        try:
            return ray.get(begun, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", error) from None
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the {self._what} does not answer: {type(error).__name__}") from error


def started_here(make: type, name: str, *given: Any, threads: int = 1) -> tuple[str, Any]:
    """Starts an actor on this node; it ends with this driver, and Ray starts it again when its process dies.

    Args:
        make: Its class.
        name: What its name begins with.
        given: To the class.
        threads: Calls at a time.

    Returns:
        What a ``NamedActor`` takes.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"{name}-{uuid.uuid4().hex}"
    named: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    remote: Any = ray.remote
    return name, remote(**named, max_concurrency=threads, scheduling_strategy=here)(make).remote(*given)
