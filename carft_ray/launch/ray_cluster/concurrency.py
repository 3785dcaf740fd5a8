"""How many trainings run at a time on the nodes of a cluster, and what limits them."""

from dataclasses import dataclass

from carft_ray.errors import ClusterError, Problem
from carft_ray.recipe.schema import Recipe
from carft_ray.words import counted

UNITS = 10_000  # in which Ray counts a resource; what is finer is cut off


@dataclass(frozen=True)
class Node:
    """Resources of one machine."""

    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Capacity:
    """How trials fit into a cluster.

    Attributes:
        concurrency: Trials at a time, at least 1.
        reason: Why not more.
        num_workers: Processes of one trial.
        cpus_per_worker: CPUs of each.
        gpus_per_worker: GPUs of each, resolved.
        one_node: Whether all workers of a trial can be on one machine, and then will be.
    """

    concurrency: int
    reason: str
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    one_node: bool

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})


def capacity_of(recipe: Recipe, nodes: tuple[Node, ...]) -> Capacity:
    """Returns how many trials of a recipe run at a time on these nodes, and what limits them.

    Raises:
        ClusterError: Not even one trial fits.
    """
    resources = recipe.resources
    num_workers, cpus = resources.num_workers, resources.cpus_per_worker
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.num_gpus for node in nodes) else 0.0

    need = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    there = {"CPU": [node.num_cpus for node in nodes], "GPU": [node.num_gpus for node in nodes]}
    slots = {name: [num_fitting(name, amount, capacity) for capacity in there[name]] for name, amount in need.items()}
    together = [min(counts) for counts in zip(*slots.values(), strict=True)]  # workers that fit on each node
    one_node = any(count >= num_workers for count in together)

    def num_trials(counts: list[int]) -> int:
        return sum(count // num_workers for count in counts) if one_node else sum(counts) // num_workers

    fitting = num_trials(together)
    if not fitting:
        needed = " and ".join(f"{num_workers} x {amount_text(amount, name)}" for name, amount in need.items())
        have = f"{amount_text(sum(there['CPU']), 'CPU')} and {amount_text(sum(there['GPU']), 'GPU')} in all"
        step = "Lower resources.num_workers, cpus_per_worker or gpus_per_worker."
        raise ClusterError(Problem("resources", f"a trial needs {needed}", have, next_step=step))
    scarcest = min(need, key=lambda name: (num_trials(slots[name]), sum(slots[name])))
    if num_trials(slots[scarcest]) == fitting:
        need = {scarcest: need[scarcest]}  # the others do not matter
    reason = _limit(fitting, need, there, num_workers, one_node)
    wanted = recipe.search.max_concurrent_trials
    if wanted is not None and wanted <= fitting:
        fitting, reason = wanted, "search.max_concurrent_trials"
    if recipe.resources.executor == "debug":
        fitting, reason = 1, "executor debug: one after the other"
    return Capacity(fitting, reason, num_workers, cpus, gpus, one_node)


def num_fitting(name: str, amount: float, capacity: float) -> int:
    """Returns how many workers fit on one node by one resource; exact, as Ray counts.

    Args:
        name: ``CPU``, ``GPU`` or another resource.
        amount: Of each worker. A share of a GPU lies on one GPU.
        capacity: What the node has.
    """
    part, whole = int(amount * UNITS), round(capacity * UNITS)
    if name != "GPU" or part >= UNITS:
        return whole // part
    gpus, rest = divmod(whole, UNITS)
    return gpus * (UNITS // part) + rest // part


def amount_text(amount: float, name: str) -> str:
    """Returns an amount of a resource in words: ``1 CPU``, ``0.5 GPUs``."""
    return counted(amount, name) if name in ("CPU", "GPU") else f"{amount:g} {name}"


def _limit(
    fitting: int, need: dict[str, float], there: dict[str, list[float]], num_workers: int, one_node: bool
) -> str:
    """Returns why no more trials fit.

    Args:
        fitting: How many do.
        need: Of each worker, by the resources that limit them.
        there: Of each node, by resource.
        num_workers: As in ``Capacity``.
        one_node: As in ``Capacity``.
    """
    if len(need) == 1:
        [(name, amount)] = need.items()
        total, part = sum(there[name]), int(amount * UNITS)
        if round(total * UNITS) // (part * num_workers) == fitting:
            return f"{amount_text(total, name)}, {amount * num_workers:g} a trial"
        if name == "GPU" and part < UNITS:
            return f"{amount_text(total, name)}, {amount:g} a trial: {UNITS // part} on each"
        there = {name: [amount for amount in there[name] if amount]}  # a head node without GPUs explains nothing
    amounts = [there[name] for name in need]
    spans = " and ".join(_span(there[name], name) for name in need)
    alike = " each" if all(len({*each}) == 1 for each in amounts) else ""
    place = f"{counted(len(amounts[0]), 'node')} with {spans}{alike}"
    needed = {name: amount * (num_workers if one_node else 1) for name, amount in need.items()}
    each = " and ".join(amount_text(amount, name) for name, amount in needed.items())
    if one_node:
        return f"{place}, {each} a trial on one node"
    return f"{place}, {counted(num_workers, 'worker')} a trial, {each} each"


def _span(amounts: list[float], name: str) -> str:
    least, most = min(amounts), max(amounts)
    return amount_text(most, name) if least == most else f"{least:g} to {amount_text(most, name)}"
