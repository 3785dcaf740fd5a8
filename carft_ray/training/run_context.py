"""The environment of a training: its rank, where to report, when to stop. Loads neither torch nor Ray."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunContext:
    """One process of one training.

    Attributes:
        rank: Number of this worker; 0 writes and reports.
        world_size: Number of workers. With more than one, ``torch.distributed`` is initialised by the caller.
        report: Called on rank 0 at the end of every epoch with the epoch's metrics.
        progress: Called on rank 0 every few steps with the latest metrics; must be quick.
        should_stop: Called by rank 0 every few steps. If it returns true, all workers write a checkpoint and raise
            ``StoppedRun``. Evaluations also call it, as a heartbeat, and continue whatever it returns.
        keeps_files: On a node that does not see the study, whether this is the first rank there.
        references: ID accuracies with which the constraints compare, by baseline; empty: there are no constraints.
    """

    rank: int = 0
    world_size: int = 1
    report: Callable[[dict[str, float]], None] = lambda row: None
    progress: Callable[[dict[str, float]], None] = lambda row: None
    should_stop: Callable[[], bool] = lambda: False
    keeps_files: bool = False
    references: Mapping[str, float] = field(default_factory=dict)
