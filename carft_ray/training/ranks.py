"""What the workers of one training agree on before they compute. All ranks call every function here.

A rank that took another branch than the others would leave them in a collective until its time-out.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from carft_ray.errors import CarftError, MachineError
from carft_ray.files import MACHINE_ERRNOS
from carft_ray.training.run_context import RunContext

T = TypeVar("T")


def gather(context: RunContext, value: T) -> list[T]:
    """Returns the value of each rank, in their order; it must be picklable."""
    if context.world_size == 1:
        return [value]
    values: list[Any] = [None] * context.world_size
    dist.all_gather_object(values, value)
    return values


def from_rank_0(context: RunContext, make: Callable[[], T]) -> T:
    """Returns on every rank what ``make`` returns on rank 0, which alone calls it.

    Raises:
        Exception: What ``make`` raises, on every rank; where it cannot be pickled, a ``RuntimeError`` with its words.
    """
    if context.world_size == 1:
        return make()
    made: list[Any] = [None, None]
    failed: Exception | None = None
    if context.rank == 0:
        try:
            made[0] = make()
        except Exception as error:  # raised below, after the others have it
            known = (error, error.__cause__)  # a cause does not travel; nor is the other ranks' machine at fault
            of_machine = any(isinstance(each, OSError) and each.errno in MACHINE_ERRNOS for each in known)
            failed = MachineError(str(error), 0) if of_machine else error
            made[1] = _that_travels(failed)
    dist.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise failed or made[1]
    return made[0]  # type: ignore[no-any-return]


def _that_travels(error: Exception) -> Exception:
    """Returns an exception that the other ranks can open: without one they wait until their time-out."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a user's class; both raise what they like
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def on_all_ranks(context: RunContext, read: Callable[[], T]) -> T:
    """Returns what ``read`` returns on this rank, once it has succeeded on all.

    Raises:
        MachineError: Some ranks can read it and others cannot; the same message on every rank.
        CarftError, OSError: No rank can read it.
    """
    value, failed = None, None
    try:
        value = read()
    except (CarftError, OSError) as error:  # raised below, after the others know of it
        failed = error
    messages = gather(context, "" if failed is None else str(failed) or type(failed).__name__)
    if failed is not None and all(messages):
        raise failed
    first = next((rank for rank, message in enumerate(messages) if message), None)
    if first is not None:
        raise MachineError(f"rank {first} does not see the files that other ranks see: {messages[first]}", first)
    return value  # type: ignore[return-value]  # it was read
