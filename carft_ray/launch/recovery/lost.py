"""Failures of machines, distinguished from failures of a training's values by the text of an exception.

When one worker of a group dies, the others raise whatever their collective library makes of it. None of these, nor a
network disk that has gone, says anything of the values; a full disk or a missing permission is no failure of a machine.
"""

import re
from collections.abc import Iterator

from carft_ray.errors import MachineError
from carft_ray.files import MACHINE_ERRNOS
from carft_ray.learning.context import RunContext

UNKNOWN = -1

# by name: the driver, which imports this, holds no torch. Of torch.distributed, and of Ray
TYPES = {
    *("DistError", "DistBackendError", "DistNetworkError", "DistStoreError"),
    *("RayActorError", "NodeDiedError", "WorkerCrashedError", "ObjectLostError", "OwnerDiedError"),
    *("LocalRayletDiedError", "RaySystemError", "WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"),
}
# what gloo, NCCL and torch's process group say in exceptions of general types (RuntimeError, ValueError)
PEER = re.compile(
    r"connection (closed|reset|refused|aborted|timed out)|broken pipe|socket (timeout|error|closed)|closed by peer"
    r"|\bgloo\b|\bnccl|process group has not been initialized|invalid process group|timed out waiting"
    r"|process group .{0,40}(abort|destroy)|collective operation timeout|no route to host|network is unreachable"
    r"|transport endpoint",
    re.IGNORECASE,
)
DEVICE = re.compile(r"CUDA (driver )?error|CUDNN_STATUS_|CUBLAS_STATUS_|cuDNN error|device-side assert|NVML")


def lost_rank(error: BaseException, context: RunContext) -> int | None:
    """Returns the worker whose machine has failed, when an exception shows that a worker, node or disk has gone.

    Args:
        error: The exception; what it was raised from counts, too.
        context: Of the worker that met it. One that is alone has no peer to lose.

    Returns:
        Its rank; ``UNKNOWN`` for a peer that is not named. None: it is another exception.
    """
    for each in _chain(error):
        if isinstance(each, MachineError):
            return UNKNOWN if each.rank is None else each.rank
        if isinstance(each, OSError) and each.errno in MACHINE_ERRNOS:
            return context.rank
        if is_death(each):
            return UNKNOWN
        if context.world_size > 1 and isinstance(each, RuntimeError | ValueError) and PEER.search(str(each)):
            return UNKNOWN
    return None


def is_death(error: BaseException) -> bool:
    """Tells whether Ray or torch.distributed says that a process or its node has gone."""
    return any(kind.__name__ in TYPES for kind in type(error).__mro__)


def device_error_step(error: BaseException) -> int | None:
    """Returns the step at which a GPU has reported an error (0: in none), or None for another exception.

    Being out of memory is no such error; it is handled before.
    """
    if not any(type(each).__name__ == "AcceleratorError" or DEVICE.search(str(each)) for each in _chain(error)):
        return None
    notes = [note for each in _chain(error) for note in getattr(each, "__notes__", ())]
    steps = [int(found[1]) for note in notes if (found := re.match(r"at step (\d+) ", note))]
    return steps[0] if steps else 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
