"""A cluster that grows and shrinks: whether it may, and the wait for its first nodes.

Ray's autoscaler starts nodes for what waits: a task, or the placement group of a trial. These end with the job, also
when the driver is killed; what ``request_resources`` asks for would not.
"""

import time
from collections.abc import Callable, Collection

import ray

from carft_ray.errors import ClusterError, Problem
from carft_ray.launch.ray_cluster.cluster import HEAD_ONLY, nodes_alive, nodes_now
from carft_ray.launch.ray_cluster.concurrency import Capacity, Node, capacity_of
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.running import at_a_time_record
from carft_ray.study.study import Study

GROUP_LABEL = "ray.io/node-group"  # of nodes that the cluster launcher or KubeRay has started
CHECK_EVERY_S = 1.0


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
    recipe: Recipe, nodes: tuple[Node, ...], grows: bool, study: Study, say: Callable[[str], None]
) -> tuple[Node, ...]:
    """Waits for the first nodes on which a trial fits; meanwhile a placement group asks Ray for them.

    Args:
        recipe: The recipe; ``resources.wait_for_nodes`` limits the wait.
        nodes: Those that are there.
        grows: ``may_grow`` of ``capacity_of``.
        study: The open study.
        say: Told what is awaited.

    Returns:
        The nodes then.

    Raises:
        ClusterError: No node on which a trial fits comes, or none has come in time, or a stop was asked for.
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
        while not present_capacity(recipe, grows).concurrency:
            if study.stop.asked():
                raise ClusterError(Problem("search", "was stopped on request"))
            if limit_s is not None and time.monotonic() - began >= limit_s:
                rule = f"after {limit_s:g} s there is {capacity.reason}"
                raise ClusterError(Problem("resources.wait_for_nodes", rule))
            time.sleep(CHECK_EVERY_S)
    finally:
        ray.util.remove_placement_group(group)
    return nodes_now()
