"""Whether the nodes of a cluster can run the trials of a recipe: each looks at it as `doctor` does on one machine.

A node must see the images and the model under the paths of the driver, have the driver's libraries and the GPUs that it
offers, and reach the other nodes. What would make trials fail is an error, what may not is a warning.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray import __version__
from carft_ray.errors import Problem
from carft_ray.launch.cluster.cluster import nodes_alive
from carft_ray.launch.cluster.doctor import Diagnosis, Finding, Level
from carft_ray.launch.cluster.ray_errors import root_cause
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.words import counted

ANSWER_WITHIN_S = 300.0  # a worker process starts, and large sets are listed, if its disks answer
COLLECTIVE_WITHIN_S = 60.0
LITTLE_SPACE_GB, NO_SPACE_GB = 5.0, 0.5


@dataclass(frozen=True)
class NodeReport:
    """What is known of a node that takes trials.

    Attributes:
        name: Its address, with the start of Ray's name of it where two nodes have one address.
        node_id: Ray's name of it.
        resources: What it offers to Ray.
        found: What it has found (``launch.cluster.doctor.look_around``); None if it has not answered.
        fault: Why it has not.
    """

    name: str
    node_id: str
    resources: Mapping[str, float]
    found: Diagnosis | None
    fault: str = ""


def ask_nodes(recipe: Recipe, say: Callable[[str], None], within_s: float = ANSWER_WITHIN_S) -> list[NodeReport]:
    """Asks every node that has CPUs for trials, all at the same time; Ray is attached to.

    Args:
        recipe: The recipe.
        say: Told what is being done.
        within_s: How long each node may take.
    """
    nodes = [node for node in nodes_alive() if node["Resources"].get("CPU", 0)]
    say(f"asking {counted(len(nodes), 'node')}")
    given, look = (__version__, recipe.model_dump(mode="json")), _look()
    answers = _answers([_submit(node["NodeID"], look, *given) for node in nodes], within_s)
    addresses, reports = [node["NodeManagerAddress"] for node in nodes], []
    for node, address, answer in zip(nodes, addresses, answers, strict=True):
        name = address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:8]})"
        found, fault = (None, answer) if isinstance(answer, str) else (answer, "")
        reports.append(NodeReport(name, node["NodeID"], node["Resources"], found, fault))
    return reports


def _look() -> Callable[..., Any]:
    """Returns what a node runs. Being local, it is sent as code: it also runs where carft-ray is missing or another."""

    def look(version: str, recipe: dict[str, Any]) -> Any:
        from carft_ray import __version__ as installed

        if installed != version:
            return f"carft-ray {installed}"
        from carft_ray.launch.cluster.doctor import look_around
        from carft_ray.recipe.schema.recipe import Recipe

        return look_around(Recipe.model_validate(recipe))

    return look


def _submit(node_id: str, function: Callable[..., Any], *given: Any) -> Any:
    """Starts a function on a node, whatever is reserved there, once and nowhere else."""
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(*given)


def _answers(tasks: Sequence[Any], within_s: float) -> list[Any]:
    """Returns what each task answers; of one that does not, a text that says why."""
    done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=within_s)
    answers: list[Any] = []
    for task in tasks:
        if task not in done:
            ray.cancel(task, force=True)
            answers.append(f"no answer within {within_s:g} s")
            continue
        try:
            answers.append(ray.get(task))
        except ray.exceptions.RayError as error:
            answers.append(root_cause(error))
    return answers


def check_collective(reports: Sequence[NodeReport], recipe: Recipe, say: Callable[[str], None]) -> list[Finding]:
    """Runs a collective over the nodes, if a trial has several workers.

    NCCL where nodes offer GPUs that trials use, over these nodes, else gloo. They find each other by a port of this
    machine.

    Args:
        reports: Of all nodes.
        recipe: The recipe.
        say: Told what is being done.
    """
    able = [each for each in reports if each.found]
    with_gpus = [each for each in able if each.resources.get("GPU", 0) and recipe.resources.gpus_per_worker != 0]
    nodes = with_gpus or able
    if recipe.resources.num_workers == 1 or len(nodes) < 2:
        return []
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    backend, address = "nccl" if with_gpus else "gloo", ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    say(f"running a collective over {len(nodes)} nodes ({backend})")
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    given = backend, address, store.port
    size = len(nodes), COLLECTIVE_WITHIN_S
    tasks = [_submit(each.node_id, collective, *given, rank, *size) for rank, each in enumerate(nodes)]
    answers = _answers(tasks, 3 * COLLECTIVE_WITHIN_S)
    if not any(answers):
        return []
    value = "; ".join(f"{each.name}: {answer}" for each, answer in zip(nodes, answers, strict=True) if answer)
    step = "Open all ports between the nodes; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network to use."
    return [Finding("error", Problem("cluster", f"nodes must run a collective by {backend}", value, next_step=step))]


def collective(backend: str, address: str, port: int, rank: int, world_size: int, within_s: float) -> str:
    """Counts the nodes by a sum over all of them, as the workers of a training sum their gradients.

    Args:
        backend: ``nccl``, on the first GPU of the node, or ``gloo``.
        address: Of the machine where the ranks find each other.
        port: Its port.
        rank: Of this node.
        world_size: Nodes.
        within_s: Seconds for each step.

    Returns:
        Why it failed; empty where it did not.
    """
    try:
        import torch
        from torch import distributed

        limit = timedelta(seconds=within_s)
        store = distributed.TCPStore(address, port, timeout=limit)  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        try:
            one = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            distributed.all_reduce(one)
            return "" if int(one) == world_size else f"counted {int(one)} of {world_size} nodes"
        finally:
            distributed.destroy_process_group()
    except Exception as error:  # whatever torch, NCCL or gloo raise
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def judge(reports: Sequence[NodeReport], here: Diagnosis) -> list[Finding]:
    """Returns what is wrong on the nodes and not here, errors first, in one finding for all nodes that share it."""
    if not reports:
        step = "Nodes that come only for a search are checked once it runs: run doctor again then, or start one before."
        return [
            Finding(
                "warning", Problem("cluster", "no node that runs trials was checked: none is there", next_step=step)
            )
        ]
    together: dict[Finding, list[str]] = {}
    for report in reports:
        for finding in _findings(report, here):
            together.setdefault(finding, []).append(report.name)
    found = []
    for finding, names in together.items():
        place = f"node {names[0]}" if len(names) == 1 else f"{len(names)} nodes ({', '.join(names)})"
        place += f": {finding.problem.place}" if finding.problem.place else ""
        found.append(replace(finding, problem=replace(finding.problem, place=place)))
    return sorted(found, key=lambda one: one.level != "error")


def _findings(report: NodeReport, here: Diagnosis) -> Iterator[Finding]:
    """Yields what is wrong on one node."""
    if report.found is None:
        step = f"Is carft-ray {__version__} installed there, in the Python that runs `ray start`? Do its disks answer? "
        step += "Can the other nodes reach its ports? See `ray status` and the logs of that node."
        yield Finding(
            "error", Problem("", f"must run the checks of carft-ray {__version__}", report.fault, next_step=step)
        )
        return
    yield from (each for each in report.found.findings if each.level != "note" and each not in here.findings)
    there, ours = report.found.machine, here.machine
    if there["source"] != ours["source"]:
        rule, step = "has different files of carft-ray than the driver, with the same version", "Install the driver's."
        yield Finding("warning", Problem("", rule, next_step=step))
    for name, wanted in ours["versions"].items():
        version = there["versions"][name] or "none"
        if wanted is not None and version.partition("+")[0] != wanted.partition("+")[0]:  # without CPU or CUDA
            rule = f"should have {name} {wanted}, like the driver: results may differ between nodes"
            yield Finding("warning", Problem("", rule, version, next_step=f"Install {name} {wanted} there."))
    if (free_gb := there["cache_free_gb"]) < LITTLE_SPACE_GB:
        rule, value = (
            f"should have {LITTLE_SPACE_GB:g} GB free for the cache",
            f"{free_gb:.2g} GB at {there['cache_dir']}",
        )
        step = "Free some, or name another folder in data.cache_dir."
        level: Level = "error" if free_gb < NO_SPACE_GB else "warning"
        yield Finding(level, Problem("", rule, value, next_step=step))
    offered = report.resources.get("GPU", 0)
    if offered > there["gpus"]:
        rule = f"must see the {counted(offered, 'GPU')} that it offers to Ray"
        step = "Install torch for CUDA there, or start its Ray with the number of GPUs that torch sees."
        yield Finding("error", Problem("", rule, f"{there['gpus']} by torch", next_step=step))
    elif there["gpus"] and not offered:
        step = "Start its Ray with --num-gpus if trials are to use them."
        yield Finding("warning", Problem("", "offers none of its GPUs to Ray", f"{there['gpus']}", next_step=step))
