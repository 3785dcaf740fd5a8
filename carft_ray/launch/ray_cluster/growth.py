"""A cluster that grows and shrinks: the largest that it may become, and the wait for its first nodes.

Ray's autoscaler starts nodes for what waits: a task, or the placement group of a trial. Up to Ray 2.60 it tells nobody
how many nodes it may start; so the file is read with which its process on the head was started (``ray up`` writes it).
On Kubernetes the autoscaler runs in a container of its own, and the number stays unknown.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from carft_ray import files
from carft_ray.errors import ClusterError, Problem, StorageError
from carft_ray.launch.ray_cluster.cluster import HEAD_ONLY, nodes_alive, nodes_now
from carft_ray.launch.ray_cluster.concurrency import Capacity, Most, Node, capacity_of, node_of
from carft_ray.launch.ray_cluster.ray_private import node_groups
from carft_ray.layout import CONCURRENCY, RAY_FILES, STOP
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.text import parse

GROUP_LABEL = "ray.io/node-group"  # of nodes that the cluster launcher or KubeRay has started
CONFIG_OPTION = "--autoscaling-config="
READ_WITHIN_S = 60.0  # a process on the head must start for it
UNBOUNDED = 1000  # nodes, where a group has no limit
CHECK_EVERY_S = 1.0

Groups = list[tuple[dict[str, float], int]]


def most_nodes() -> Most:
    """Returns the nodes of the largest cluster that may come of the present one; see ``concurrency.Most``."""
    nodes = nodes_alive()
    head = [node for node in nodes if set(HEAD_ONLY) <= set(node["Resources"])]
    groups, limit = node_groups(), None
    if groups is None:
        groups, limit = _read_on_head()
    if groups is not None:
        return largest([node_of(node["Resources"]) for node in head], groups, limit)
    return None if any(node.get("Labels", {}).get(GROUP_LABEL) for node in head) else ()


def largest(head: list[Node], groups: Groups, limit: int | None = None) -> tuple[Node, ...]:
    """Returns the nodes of the largest cluster: the head, and of each group as many as there may be.

    Args:
        head: The head node.
        groups: Resources of a node, and how many there may be (-1: any number).
        limit: Of all nodes but the head, the largest are taken then; None: there is none.
    """
    workers = [node_of(resources) for resources, number in groups for _ in range(UNBOUNDED if number < 0 else number)]
    workers.sort(key=lambda node: (node.num_gpus, node.num_cpus), reverse=True)
    return (*head, *workers[:limit])


def _read_on_head() -> tuple[Groups | None, int | None]:
    """Returns what the autoscaler's file on the head says, or twice None."""
    address = ray.get_runtime_context().gcs_address
    task: Any = ray.remote(num_cpus=0, resources=HEAD_ONLY, max_retries=0)(read_config)
    try:
        found: tuple[Groups | None, int | None] = ray.get(task.remote(address), timeout=READ_WITHIN_S)
    except ray.exceptions.RayError:  # a head that has no room for it, or another version of Python
        return None, None
    return found


def read_config(gcs_address: str, processes: Path = Path("/proc")) -> tuple[Groups | None, int | None]:
    """Returns the groups of nodes that the autoscaler on this machine may start, and how many nodes in all.

    Args:
        gcs_address: Of the cluster: a machine may have several.
        processes: The kernel's folder of processes.

    Returns:
        ``Groups`` without the head's, and the limit; twice None without such an autoscaler.
    """
    for path in processes.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            config = next((word.removeprefix(CONFIG_OPTION) for word in words if word.startswith(CONFIG_OPTION)), "")
            if config and f"--gcs-address={gcs_address}" in words:
                return groups_of(Path(os.path.expanduser(config)).read_text())
    return None, None


def groups_of(text: str) -> tuple[Groups | None, int | None]:
    """Returns what a file of the cluster launcher says: as ``read_config``."""
    config = parse(text, "").value
    try:
        types, head, limit = config["available_node_types"], config.get("head_node_type"), config.get("max_workers")
        groups = [
            (dict(each.get("resources") or {}), int(each.get("max_workers", limit or 0)))
            for name, each in types.items()
            if name != head
        ]
    except (KeyError, TypeError, AttributeError, ValueError):  # one that Ray itself does not take
        return None, None
    return groups, limit


def present_capacity(recipe: Recipe, most: Most, without: Collection[str] = ()) -> Capacity:
    """Returns how trials fit now; where none does, that nodes are awaited, whoever may add them.

    Args:
        recipe: The recipe.
        most: As of ``capacity_of``.
        without: Ray's names of nodes that are being taken away.
    """
    nodes = nodes_now(without)
    try:
        return capacity_of(recipe, nodes, most)
    except ClusterError:  # what the search began with is gone
        return capacity_of(recipe, nodes, None)


def await_nodes(
    recipe: Recipe, nodes: tuple[Node, ...], most: Most, study_dir: Path, say: Callable[[str], None]
) -> tuple[Node, ...]:
    """Waits for the first nodes on which a trial fits; meanwhile a placement group asks Ray for them.

    Args:
        recipe: The recipe; ``resources.wait_for_nodes`` limits the wait.
        nodes: Those that are there.
        most: As of ``capacity_of``.
        study_dir: The study directory, with its stop file.
        say: Told what is awaited.

    Returns:
        The nodes then.

    Raises:
        ClusterError: No node on which a trial fits comes, or none has come in time, or a stop was asked for.
    """
    limit_s = recipe.resources.wait_for_nodes
    capacity = _fitting(recipe, nodes, most) if limit_s is None else present_capacity(recipe, most)
    if capacity.concurrency:
        return nodes
    began, told, group = time.monotonic(), "", None
    try:
        while not capacity.concurrency:
            if capacity.reason != told:
                if group is not None:
                    ray.util.remove_placement_group(group)
                told = capacity.reason
                write_concurrency(study_dir, 0, told)
                say(f"waiting: {told}")
                strategy = "STRICT_PACK" if capacity.one_node else "PACK"
                group = ray.util.placement_group([capacity.worker_resources] * capacity.num_workers, strategy=strategy)
            if files.seen(study_dir / STOP):
                raise ClusterError(Problem("search", "was stopped on request"))
            if limit_s is not None and time.monotonic() - began >= limit_s:
                rule = f"after {limit_s:g} s there is {capacity.reason}"
                raise ClusterError(Problem("resources.wait_for_nodes", rule))
            time.sleep(CHECK_EVERY_S)
            capacity = present_capacity(recipe, most)
    finally:
        if group is not None:
            ray.util.remove_placement_group(group)
    return nodes_now()


def _fitting(recipe: Recipe, nodes: tuple[Node, ...], most: Most) -> Capacity:
    try:
        return capacity_of(recipe, nodes, most)
    except ClusterError as error:
        [problem] = error.problems
        step = f"{problem.next_step} Nodes that are yet to be added are awaited with resources.wait_for_nodes=10m."
        raise ClusterError(replace(problem, next_step=step.strip())) from None


def write_concurrency(study_dir: Path, concurrency: int, reason: str) -> None:
    """Notes for other processes how many trainings run at a time, and why not more."""
    with contextlib.suppress(StorageError):  # what matters meets the same disk, and says so
        files.write_json(study_dir / RAY_FILES / CONCURRENCY, {"concurrency": concurrency, "reason": reason})
