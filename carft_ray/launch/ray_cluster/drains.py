"""Nodes that Ray drains because their machine is being taken away: what runs there must leave before the deadline.

A notice of the cloud, ``ray drain-node``, or SIGTERM to a node's ``ray start --block`` drains it. Ray places nothing
new on such a node.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from carft_ray.launch.mailbox import Process
from carft_ray.launch.ray_cluster.ray_private import draining_nodes

ASK_EVERY_S = 1.0


@dataclass
class Drains:
    """Asks Ray for the nodes that it drains, once a second at most.

    Attributes:
        ask: Returns the nodes by Ray's name, with the deadline in milliseconds since 1970; 0: it has none.
        clock: Seconds.
    """

    ask: Callable[[], Mapping[str, int]] = draining_nodes
    clock: Callable[[], float] = time.monotonic
    _nodes: dict[str, int] = field(default_factory=dict)
    _next: float = 0.0

    def nodes(self) -> list[str]:
        """Returns Ray's names of the nodes that are being drained."""
        if self.clock() >= self._next:
            self._next = self.clock() + ASK_EVERY_S
            self._nodes = dict(self.ask())
        return sorted(self._nodes)

    def reason(self, alive: Process | None) -> str:
        """Returns why an attempt must leave, in one line; empty where none of its ranks is on a node that is drained.

        Args:
            alive: Its process; None: it is not there yet.
        """
        drained = self.nodes()
        there = {address: node for node, address in (alive.nodes if alive else ()) if node in drained}
        if not there:
            return ""
        limits = [limit for node in there.values() if (limit := self._nodes[node])]
        when = f" within {max(0.0, min(limits) / 1000 - time.time()):.0f} s" if limits else ""
        return f"{', '.join(there)} is being taken away{when}"
