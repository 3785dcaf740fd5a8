"""The nodes of a cluster: what a trial that waits lacks, and nodes on which attempts fail again and again.

A trial asks Ray for a placement group, and Ray never says why it waits. A node that fails is named, and left out for a
while.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from carft_ray.launch.ray_cluster.cluster import nodes_alive
from carft_ray.launch.ray_cluster.concurrency import Capacity, amount_text, num_fitting
from carft_ray.launch.ray_cluster.ray_private import available_resources_per_node
from carft_ray.words import counted

Resources = Mapping[str, float]

FAILURES = 3  # attempts in a row that fail on a node, and none that ends well there meanwhile
LEFT_OUT_S = 600.0


@dataclass(frozen=True)
class Node:
    """Resources of one machine: all that it has, and what nobody holds."""

    total: Resources
    free: Resources


def lacking(need: Resources, num_workers: int, one_node: bool, nodes: Sequence[Node]) -> str:
    """Returns what keeps a trial from starting, in one line; empty when all that it needs is free.

    Args:
        need: Of one worker, by resource.
        num_workers: Workers.
        one_node: Whether all of them must be on one machine.
        nodes: The machines.
    """
    slots = [
        min(num_fitting(name, amount, node.free.get(name, 0.0)) for name, amount in need.items()) for node in nodes
    ]
    fits = max(slots, default=0) if one_node else sum(slots)
    if fits >= num_workers:
        return ""
    each = " and ".join(amount_text(amount, name) for name, amount in need.items())
    what = f"{counted(num_workers, 'worker')} with {each}{' on one node' if one_node and num_workers > 1 else ''}"
    free = {name: sum(node.free.get(name, 0.0) for node in nodes) for name in need}
    total = {name: sum(node.total.get(name, 0.0) for node in nodes) for name in need}
    there = ", ".join(f"{free[name]:g} of {amount_text(total[name], name)}" for name in need)
    return f"needs {what}, there is room for {fits}; free: {there}"


def why_waiting(capacity: Capacity) -> str:
    """Returns why the process of a trial does not come, from what Ray knows at this moment."""
    groups = ray.util.placement_group_table().values()
    if not any(group["state"] == "PENDING" for group in groups):
        return "Ray has given it what it needs and is starting it"
    return lacking_for(capacity) or "what it needs has just become free"


def lacking_for(capacity: Capacity, num_workers: int | None = None) -> str:
    """Returns what keeps workers from starting now, as ``lacking`` does; by default all those of a trial."""
    free = available_resources_per_node()
    nodes = [Node(node["Resources"], free.get(node["NodeID"], {})) for node in nodes_alive()]
    return lacking(capacity.worker_resources, num_workers or capacity.num_workers, capacity.one_node, nodes)


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
