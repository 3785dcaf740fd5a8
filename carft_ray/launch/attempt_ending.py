"""How an attempt without a verdict has ended: judged once, here, from all that is known of it."""

from dataclasses import dataclass
from typing import Literal

from carft_ray.errors import ClusterError
from carft_ray.launch.cluster.capacity import AtATime
from carft_ray.launch.cluster.ray_errors import STARTED_LATE, is_full_memory
from carft_ray.launch.workers.attempt import Attempt
from carft_ray.launch.workers.mailbox import PATIENCE_S
from carft_ray.study.training import Failure

SLEPT = f"the driver was silent for more than {PATIENCE_S:.0f} s"


@dataclass(frozen=True)
class Ending:
    """How an attempt has ended.

    Attributes:
        kind: ``stopped``: on request; the next search continues it. ``left``: it was asked to, or the driver was
            silent. ``memory``: a device has less than its micro-batch needs. ``error``: by an exception. ``full``: a
            node had no memory left beside other trainings. ``waits``: its nodes have not come yet. ``lost``: a machine
            has failed under it.
        reason: In one line.
        details: What is known besides.
        node: Ray's name of the node at fault; empty: it is not known, or none is.
    """

    kind: Literal["stopped", "left", "memory", "error", "full", "waits", "lost"]
    reason: str = ""
    details: str = ""
    node: str = ""


def ending_of(attempt: Attempt, gone: str, is_stopping: bool, has_slept: bool, at_a_time: AtATime) -> Ending:
    """Returns how an attempt without a verdict has ended.

    Args:
        attempt: The attempt.
        gone: Why its processes have ended before their time (first line) and what is known besides, if they have.
        is_stopping: Whether the search stops.
        has_slept: Whether the driver has, since the attempt began.
        at_a_time: Trainings at a time.
    """
    failure, leaves = attempt.failure, attempt.leaves or (SLEPT if has_slept else "")
    if is_stopping:
        return Ending("stopped")
    if failure is None and leaves and not gone:
        return Ending("left", leaves)
    if failure is not None and failure.outcome != "lost":
        return Ending("memory" if failure.outcome == "memory" else "error", failure.reason)
    reason, _, details = gone.partition("\n")
    if attempt.hung:
        reason, details = attempt.hung, "\n".join(filter(None, [attempt.stacks(), details]))
    reason, node = reason or "its process ended without a message", only_node(attempt)
    if failure is not None:
        reason, details, node = failure.reason, failure.details, failure.node
    addresses = ", ".join(dict.fromkeys(address for _, address in attempt.alive.nodes)) if attempt.alive else ""
    if addresses and addresses not in reason:
        reason = f"{reason} (on {addresses})"
    if is_full_memory(reason) and at_a_time.concurrency > 1:
        return Ending("full", reason)
    if at_a_time.capacity_now and attempt.alive is None and STARTED_LATE in reason:
        return Ending("waits", reason)
    return Ending("lost", reason, details, node)


def death_of(attempt: Attempt, gone: str, rank: int) -> tuple[Failure | None, str]:
    """Returns how an attempt was lost with one of its ranks, whatever the others have made of it.

    Args:
        attempt: The attempt.
        gone: As of ``ending_of``.
        rank: The rank that has died.

    Returns:
        Its failure, which is that of before where the attempt itself has said more; and which rank, where, and why.
    """
    nodes = attempt.alive.nodes if attempt.alive else ()
    node, address = nodes[rank] if rank < len(nodes) else ("", "")
    where = f"rank {rank}{f' on {address}' if address else ''}"
    reason = gone if is_full_memory(gone) else f"{where}: {gone}"
    before = attempt.failure
    if before is not None and before.outcome not in ("error", "lost"):
        return before, reason
    details = "" if before is None else before.details or before.reason
    return Failure("lost", reason, attempt.spec.attempt, ClusterError.exit_code, details, node), reason


def only_node(attempt: Attempt) -> str:
    """Returns Ray's name of the node of an attempt; empty where it has several: it is not known which has failed."""
    return attempt.alive.node_id if attempt.alive and len(attempt.alive.nodes) == 1 else ""
