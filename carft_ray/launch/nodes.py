"""The nodes of a cluster: those that fail, those that are taken away, and those that are awaited.

- A node on which attempts fail again and again is named, and left out for a while.
- A notice of the cloud, ``ray drain-node``, or SIGTERM to a node's ``ray start --block`` drains it: Ray places nothing
  new on it, and what runs there must leave before the deadline.
- Ray's autoscaler starts nodes for what waits: a task, or the placement group of a trial. These end with the job, also
  when the driver is killed; what ``request_resources`` asks for would not.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from carft_ray.errors import BudgetError, ClusterError, Problem
from carft_ray.launch.budget import used_up
from carft_ray.launch.cluster.capacity import Capacity, Node, capacity_of
from carft_ray.launch.cluster.cluster import HEAD_ONLY, nodes_alive, nodes_now
from carft_ray.launch.cluster.ray_private import draining_nodes
from carft_ray.launch.workers.mailbox import Process
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.running import at_a_time_record
from carft_ray.study.study import Study

FAILURES = 3  # attempts in a row that fail on a node, and none that ends well there meanwhile
LEFT_OUT_S = 600.0
ASK_EVERY_S = 1.0
GROUP_LABEL = "ray.io/node-group"  # of nodes that the cluster launcher or KubeRay has started
CHECK_EVERY_S = 1.0


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
        """Notes that an attempt was lost on a node, or has raised an exception before its first epoch.

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
        failed = f"{number} attempts in a row failed on node {nodes[node]}"
        return f"{failed}; it is left out for {LEFT_OUT_S / 60:g} minutes"

    def left_out(self) -> list[str]:
        """Returns Ray's names of the nodes that are left out now."""
        now = self.clock()
        self._until = {node: until for node, until in self._until.items() if until > now}
        nodes = self.nodes() if self._until else {}  # Ray is asked for them
        found = sorted(node for node in self._until if node in nodes)
        return found if found and self.fits(found) else []  # others may have gone since


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


def may_grow() -> bool:
    """Returns whether the head was started by the cluster launcher or KubeRay, whose autoscalers may add nodes."""
    heads = [node for node in nodes_alive() if set(HEAD_ONLY) <= set(node["Resources"])]
    return any(head.get("Labels", {}).get(GROUP_LABEL) for head in heads)


def present_capacity(recipe: Recipe, grows: bool, without: Collection[str] = ()) -> Capacity:
    """Returns how trials fit now; where none does, that nodes are awaited, whoever may add them.

    Args:
        recipe: The recipe.
        grows: ``may_grow`` of ``capacity_of``.
        without: Ray's names of nodes that are being taken away.
    """
    nodes = nodes_now(without)
    try:
        return capacity_of(recipe, nodes, grows)
    except ClusterError:  # what the search began with is gone
        return capacity_of(recipe, nodes, may_grow=True)


def await_nodes(
    recipe: Recipe,
    nodes: tuple[Node, ...],
    grows: bool,
    study: Study,
    say: Callable[[str], None],
    since: float | None = None,
) -> tuple[Node, ...]:
    """Waits for the first nodes on which a trial fits; meanwhile a placement group asks Ray for them.

    Args:
        recipe: The recipe; ``resources.wait_for_nodes`` limits the wait.
        nodes: Those that are there.
        grows: ``may_grow`` of ``capacity_of``.
        study: The open study.
        say: Told what is awaited.
        since: When the budget's wall time began; None: it does not count.

    Returns:
        The nodes then.

    Raises:
        ClusterError: No node on which a trial fits comes, or none has come in time, or a stop was asked for.
        BudgetError: ``budget.wall_time`` has passed.
    """
    limit_s = recipe.resources.wait_for_nodes
    capacity = capacity_of(recipe, nodes, grows or limit_s is not None)
    if capacity.concurrency:
        return nodes
    study.log.write(at_a_time_record(0, capacity.reason))
    say(f"waiting: {capacity.reason}")
    strategy = "STRICT_PACK" if capacity.one_node else "PACK"
    group = ray.util.placement_group([capacity.worker_resources] * capacity.num_workers, strategy=strategy)
    began = time.monotonic()
    try:
        while not capacity_of(recipe, nodes := nodes_now(), may_grow=True).concurrency:
            if study.stop.asked():
                raise ClusterError(Problem("search", "was stopped on request"))
            if since is not None and (ended := used_up(recipe.budget, time.monotonic() - since, 0.0)):
                raise BudgetError(ended)
            if limit_s is not None and time.monotonic() - began >= limit_s:
                rule = f"after {limit_s:g} s there is {capacity.reason}"
                raise ClusterError(Problem("resources.wait_for_nodes", rule))
            time.sleep(CHECK_EVERY_S)
    finally:
        ray.util.remove_placement_group(group)
    return nodes  # asked again at once, Ray may say that what this group has held is not free yet
