"""How many trainings run at a time: as many as fit on the nodes that are there, and fewer where memory was full."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from carft_ray.launch.ray_cluster.concurrency import Capacity

COUNT_EVERY_S = 3.0
MEMORY = "memory was full"


@dataclass(eq=False)
class AtATime:
    """Trainings at a time from now on.

    Attributes:
        concurrency: How many.
        asked: Further trainings, for which nodes are asked for.
        reason: Why not more, at the beginning.
        capacity_now: Returns how trainings fit now; None: that does not change.
        on_change: Given trainings at a time, and why not more, whenever they change.
        capacity: How trainings fit, as it was last counted; None: nobody counts, each has one worker.
        most: The most that ran at a time.
    """

    concurrency: int
    asked: int = 0
    reason: str = ""
    capacity_now: Callable[[], Capacity] | None = None
    on_change: Callable[[int, str], None] = lambda concurrency, reason: None
    capacity: Capacity | None = None
    most: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.most = self.concurrency
        self._share = Fraction(1)  # of the trainings that fit, those for which there is memory
        self._told = self.concurrency, self.reason
        self._next_count = 0.0

    @property
    def limit(self) -> int:
        """Attempts that may be there, those that wait for nodes included."""
        return max(1, self.concurrency + self.asked)

    @property
    def grows(self) -> bool:
        """Whether attempts may have different numbers of workers."""
        return self.capacity is not None and self.capacity.most_workers > self.capacity.num_workers

    def num_workers(self, trainings: int, held: int) -> int:
        """Returns how many workers an attempt gets.

        Args:
            trainings: Those that are not done.
            held: Workers of other attempts.
        """
        if self.capacity is None:
            return 1
        slots = int(self.capacity.slots * self._share)
        return self.capacity.workers_for(min(trainings, self.concurrency), slots, held)

    def follow(self) -> None:
        """Asks now and then how many trainings fit on the nodes that are there, and keeps to that.

        Where memory was full, as large a share of them as had memory; no nodes are asked for then, as what would wait
        for them would take what is left free.
        """
        now = time.monotonic()
        if self.capacity_now is None or now < self._next_count:
            return
        self._next_count = now + COUNT_EVERY_S
        found = self.capacity_now()
        self.capacity = found
        if self._share == 1:
            self.concurrency, self.asked = found.concurrency, found.asked
            self._tell(found.reason)
        else:
            self.concurrency = max(1, int(found.concurrency * self._share)) if found.concurrency else 0
            self.asked = 0
            self._tell(f"{MEMORY}; {found.concurrency} would fit")

    def memory_was_full(self) -> None:
        """Lowers it by one training."""
        self._share *= Fraction(self.concurrency - 1, self.concurrency)
        self.concurrency, self.asked = self.concurrency - 1, 0
        self._tell(MEMORY)

    def _tell(self, reason: str) -> None:
        self.most = max(self.most, self.concurrency)
        if (self.concurrency, reason) != self._told:
            self._told = self.concurrency, reason
            self.on_change(self.concurrency, reason)
