"""Nodes on which attempts fail again and again: they are named, and left out for a while."""

import time
from collections.abc import Callable, Mapping

import ray

FAILURES = 3  # attempts in a row that fail on a node, and none that ends well there meanwhile
LEFT_OUT_S = 600.0


def alive_nodes() -> dict[str, str]:
    """Returns the address of every node that is alive, by Ray's name of it; empty where no Ray runs."""
    if not ray.is_initialized():
        return {}
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


class BadNodes:
    """Counts failed attempts by node. At most half of the nodes are left out at a time.

    Args:
        nodes: Lists the nodes that are alive: address by name.
        clock: Seconds.
    """

    def __init__(
        self, nodes: Callable[[], Mapping[str, str]] = alive_nodes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._nodes, self._clock = nodes, clock
        self._failed: dict[str, int] = {}
        self._until: dict[str, float] = {}

    def well(self, node: str) -> None:
        """Notes that an attempt has ended well on a node."""
        self._failed.pop(node, None)

    def failed(self, node: str) -> str:
        """Notes that an attempt was lost on a node.

        Returns:
            That the node is left out from now on, in a sentence; empty where it is not, or is gone in any case.
        """
        nodes = self._nodes()
        if node not in nodes:
            return ""
        self._failed[node] = self._failed.get(node, 0) + 1
        if self._failed[node] < FAILURES or 2 * (len(self.left_out()) + 1) > len(nodes):
            return ""
        number = self._failed.pop(node)
        self._until[node] = self._clock() + LEFT_OUT_S
        lost = f"{number} attempts in a row were lost on node {nodes[node]}"
        return f"{lost}; it is left out for {LEFT_OUT_S / 60:g} minutes"

    def left_out(self) -> list[str]:
        """Returns Ray's names of the nodes that are left out now."""
        now = self._clock()
        self._until = {node: until for node, until in self._until.items() if until > now}
        nodes = self._nodes() if self._until else {}  # Ray is asked for them
        return sorted(node for node in self._until if node in nodes)
