"""How many trainings run at a time on the nodes of a cluster, what limits them, and how many wait for further nodes."""

from collections.abc import Mapping
from dataclasses import dataclass

from carft_ray.errors import ClusterError, Problem, nearest
from carft_ray.recipe.schema import Recipe
from carft_ray.words import counted

UNITS = 10_000  # in which Ray counts a resource; what is finer is cut off
KIND = "accelerator_type:"  # begins the resource that says of which kind the accelerators of a node are
OF_KIND = 0.001  # of that resource, as Ray itself asks for a kind: each node has 1


@dataclass(frozen=True)
class Node:
    """Resources of one machine; ``accelerator`` is the kind of its GPUs by Ray's name: ``H100``."""

    num_cpus: float
    num_gpus: float
    accelerator: str = ""

    def amount(self, name: str) -> float:
        """Returns how much it has of ``CPU`` or ``GPU``."""
        return self.num_cpus if name == "CPU" else self.num_gpus


# of the largest cluster that may come of this one: its nodes; none, where it does not grow; None, where it may grow and
# nobody says how far
Most = tuple[Node, ...] | None


@dataclass(frozen=True)
class Capacity:
    """How trials fit into a cluster.

    Attributes:
        concurrency: Trials at a time; 0 where a trial must wait for a node.
        reason: Why not more.
        num_workers: Processes of one trial, at least.
        cpus_per_worker: CPUs of each, resolved.
        gpus_per_worker: GPUs of each, resolved.
        one_node: Whether all workers of a trial can be on one machine, and then will be.
        asked: Further trials, for which nodes are asked for.
        accelerator: The kind of the GPUs; empty: any.
        most_workers: Processes of one trial, at most; 0: ``num_workers``.
        slots: Processes that fit, of all trials together.
    """

    concurrency: int
    reason: str
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    one_node: bool
    asked: int = 0
    accelerator: str = ""
    most_workers: int = 0
    slots: int = 0

    def workers_for(self, trials: int, slots: int, held: int) -> int:
        """Returns how many workers an attempt gets: an equal share of the slots, of those that are free.

        Args:
            trials: Trials that share the slots.
            slots: Those that may be used, ``slots`` at most.
            held: Those that others hold.
        """
        free = min(slots // max(1, trials), slots - held)
        return max(self.num_workers, min(free, self.most_workers))

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        need = {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})
        return need | ({f"{KIND}{self.accelerator}": OF_KIND} if self.accelerator else {})


def node_of(resources: Mapping[str, float]) -> Node:
    """Returns a machine with these resources, by Ray's names."""
    kinds = [name.removeprefix(KIND) for name in resources if name.startswith(KIND)]
    kind = min(kinds, key=len, default="")  # a placement group adds longer names of its own
    return Node(resources.get("CPU", 0), resources.get("GPU", 0), kind)


def capacity_of(recipe: Recipe, nodes: tuple[Node, ...], most: Most = ()) -> Capacity:
    """Returns how many trials of a recipe run at a time on these nodes, and what limits them.

    While the cluster may grow, as many trials wait for nodes as run, and at least one; where nobody says how far it may
    grow, one waits. Ray asks its autoscaler for nodes on behalf of what waits.

    Args:
        recipe: The recipe.
        nodes: Those that are there.
        most: Those of the largest cluster that may come of this one.

    Raises:
        ClusterError: Not even one trial fits, and none ever will.
    """
    resources, kind = recipe.resources, recipe.resources.accelerator
    num_workers, gpus = resources.num_workers, resources.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if kind or any(node.num_gpus for node in (*nodes, *(most or ()))) else 0.0
    usable, to_come = _of_kind(nodes, kind), _of_kind(most or (), kind)
    cpus = resources.cpus_per_worker or _share_of_cores(gpus, usable, to_come)
    need = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    grows = resources.most_workers > num_workers
    fitting, one_node, slots = _fit(need, num_workers, usable, grows)
    will_fit, will_be_one_node, _ = _fit(need, num_workers, to_come, grows)
    if fitting:
        reason = _limit(fitting, need, usable, num_workers, one_node) + (" at least" if grows else "")
    elif most is None or will_fit:
        reason, one_node = f"no node for a trial, which needs {_needed(need, num_workers, kind)}", will_be_one_node
    else:
        raise ClusterError(_never_fits(need, num_workers, kind, nodes, most or ()))
    asked = 1 if most is None else min(max(1, fitting), max(0, will_fit - fitting))
    wanted = recipe.search.max_concurrent_trials
    if wanted is not None:
        if wanted <= fitting:
            fitting, reason = wanted, "search.max_concurrent_trials"
        asked, will_fit = min(asked, wanted - fitting), min(will_fit, wanted)
    if resources.executor == "debug":
        fitting, asked, reason = 1, 0, "executor debug: one after the other"
    if asked:
        limit = "" if most is None else f", of {will_fit} at most"
        reason += f"; nodes for {asked}{' more' if fitting else ''} are asked for{limit}"
    counts = {"num_workers": num_workers, "most_workers": resources.most_workers, "slots": slots}
    return Capacity(
        fitting,
        reason,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        one_node=one_node,
        asked=asked,
        accelerator=kind or "",
        **counts,
    )


def _share_of_cores(gpus: float, usable: tuple[Node, ...], to_come: tuple[Node, ...]) -> float:
    """Returns the CPUs of a worker where the recipe names none: whole ones, as many as leave no GPU idle."""
    with_gpus = [node for node in usable if node.num_gpus] or [node for node in to_come if node.num_gpus]
    shares = [int(node.num_cpus * min(1, gpus / node.num_gpus)) for node in with_gpus]
    return float(max(1, min(shares, default=1))) if gpus else 1.0


def _of_kind(nodes: tuple[Node, ...], kind: str | None) -> tuple[Node, ...]:
    return tuple(node for node in nodes if kind in (None, node.accelerator))


def _slots(need: dict[str, float], nodes: tuple[Node, ...]) -> dict[str, list[int]]:
    """Returns how many workers fit on each node, by each resource alone."""
    return {name: [num_fitting(name, amount, node.amount(name)) for node in nodes] for name, amount in need.items()}


def _fit(need: dict[str, float], num_workers: int, nodes: tuple[Node, ...], grows: bool) -> tuple[int, bool, int]:
    """Returns how many trials fit on these nodes, whether all workers of one are to be on one node, and how many
    workers fit. Of trials that grow, Ray keeps the workers together only where there is room."""
    together = [min(counts) for counts in zip(*_slots(need, nodes).values(), strict=True)]
    one_node = not grows and any(count >= num_workers for count in together)
    return _num_trials(together, num_workers, one_node), one_node, sum(together)


def _num_trials(counts: list[int], num_workers: int, one_node: bool) -> int:
    return sum(count // num_workers for count in counts) if one_node else sum(counts) // num_workers


def _needed(need: dict[str, float], num_workers: int, kind: str | None) -> str:
    text = " and ".join(f"{num_workers} x {amount_text(amount, name)}" for name, amount in need.items())
    return f"{text} of kind {kind}" if kind else text


def _never_fits(
    need: dict[str, float], num_workers: int, kind: str | None, nodes: tuple[Node, ...], most: tuple[Node, ...]
) -> Problem:
    """Returns the message for a trial that fits neither on the nodes that are there nor on those that may come."""
    every = most or nodes
    kinds = tuple(sorted({node.accelerator for node in every} - {""}))
    if kind and kind not in kinds:
        rule = "must be a kind of accelerator that a node of the cluster has"
        return Problem("resources.accelerator", rule, kind, kinds, nearest(kind, kinds))
    cpus, gpus = (sum(node.amount(name) for node in _of_kind(every, kind)) for name in ("CPU", "GPU"))
    have = f"{amount_text(cpus, 'CPU')} and {amount_text(gpus, 'GPU')} in all"
    have += " with all nodes that the autoscaler may add" if most else ""
    step = "Lower resources.num_workers, cpus_per_worker or gpus_per_worker."
    return Problem("resources", f"a trial needs {_needed(need, num_workers, kind)}", have, next_step=step)


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
    """Returns an amount of a resource in words: ``1 CPU``, ``0.5 GPUs``, ``accelerators H100``."""
    if name.startswith(KIND):
        return f"accelerators {name.removeprefix(KIND)}"
    return counted(amount, name) if name in ("CPU", "GPU") else f"{amount:g} {name}"


def _limit(fitting: int, need: dict[str, float], nodes: tuple[Node, ...], num_workers: int, one_node: bool) -> str:
    """Returns why no more trials fit.

    Args:
        fitting: How many do.
        need: Of each worker, by resource.
        nodes: Those that a trial may use.
        num_workers: As in ``Capacity``.
        one_node: As in ``Capacity``.
    """
    by_one = {name: _num_trials(counts, num_workers, one_node) for name, counts in _slots(need, nodes).items()}
    scarcest = min(
        reversed(need), key=lambda name: (by_one[name], sum(_slots(need, nodes)[name]))
    )  # of equals the GPUs
    if by_one[scarcest] == fitting:
        need = {scarcest: need[scarcest]}  # the others do not matter
    there = {name: [node.amount(name) for node in nodes] for name in need}
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
