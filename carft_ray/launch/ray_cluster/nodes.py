"""Nodes on which attempts fail again and again: such a node is named, and left out for a while."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from carft_ray.launch.ray_cluster.cluster import nodes_alive

FAILURES = 3  # attempts in a row that fail on a node, and none that ends well there meanwhile
LEFT_OUT_S = 600.0


def alive_nodes() -> dict[str, str]:
    """Returns the address of every node that is alive, by Ray's name of it; empty where no Ray runs."""
    if not ray.is_initialized():
        return {}
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes_alive()}


@dataclass
class BadNodes:
    """Counts failed attempts by node. At most half of the nodes are left out at a time, and none without which no
    training fits: a bad one is better than none.

    Attributes:
        nodes: Lists the nodes that are alive: address by name.
        fits: Tells whether a training fits on the nodes that are alive without these.
        clock: Seconds.
    """

    nodes: Callable[[], Mapping[str, str]] = alive_nodes
    fits: Callable[[Sequence[str]], bool] = lambda without: True
    clock: Callable[[], float] = time.monotonic
    _failed: Counter[str] = field(default_factory=Counter)
    _until: dict[str, float] = field(default_factory=dict)

    def well(self, node: str) -> None:
        """Notes that an attempt has ended well on a node."""
        self._failed.pop(node, None)

    def failed(self, node: str) -> str:
        """Notes that an attempt was lost on a node.

        Returns:
            That the node is left out from now on, in a sentence; empty where it is not, or is gone in any case.
        """
        nodes = self.nodes()
        if node not in nodes:
            return ""
        self._failed[node] += 1
        without = [*self.left_out(), node]
        if self._failed[node] < FAILURES or 2 * len(without) > len(nodes) or not self.fits(without):
            return ""
        number = self._failed.pop(node)
        self._until[node] = self.clock() + LEFT_OUT_S
        lost = f"{number} attempts in a row were lost on node {nodes[node]}"
        return f"{lost}; it is left out for {LEFT_OUT_S / 60:g} minutes"

    def left_out(self) -> list[str]:
        """Returns Ray's names of the nodes that are left out now."""
        now = self.clock()
        self._until = {node: until for node, until in self._until.items() if until > now}
        nodes = self.nodes() if self._until else {}  # Ray is asked for them
        found = sorted(node for node in self._until if node in nodes)
        return found if found and self.fits(found) else []  # others may have gone since
