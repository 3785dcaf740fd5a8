"""What the training loop knows of the world around it: its rank, whom to tell, when to stop. Nothing of Ray."""

from collections.abc import Callable
from dataclasses import dataclass


def _ignore(row: dict[str, float]) -> None:
    del row


def _never() -> bool:
    return False


@dataclass(frozen=True)
class RunContext:
    """One process of one training.

    Attributes:
        rank: Number of this worker, 0 is the one that writes and reports.
        world_size: Number of workers. With more than one, ``torch.distributed`` is initialised by the caller.
        report: Called on rank 0 at the end of every epoch with the epoch's metrics.
        progress: Called on rank 0 every few steps with the latest metrics; must be quick.
        should_stop: Asked by rank 0 every few steps. When it says yes, all workers write a checkpoint and raise
            ``StoppedRun``. Evaluations ask too, as a sign of life, and go on whatever the answer is.
    """

    rank: int = 0
    world_size: int = 1
    report: Callable[[dict[str, float]], None] = _ignore
    progress: Callable[[dict[str, float]], None] = _ignore
    should_stop: Callable[[], bool] = _never
