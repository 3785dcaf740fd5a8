"""How many trainings run at a time: what fits on the nodes of a cluster, and how a search follows that."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from carft_ray.errors import ClusterError, Problem, nearest
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.words import counted

UNITS = 10_000  # in which Ray counts a resource; what is finer is cut off
KIND = "accelerator_type:"  # begins the resource that says of which kind the accelerators of a node are
OF_KIND = 0.001  # of that resource, as Ray itself asks for a kind: each node has 1
COUNT_EVERY_S = 3.0
MEMORY = "memory was full"
CROWDED = 1.5  # threads per core


@dataclass(frozen=True)
class Node:
    """Resources of one machine.

    Attributes:
        num_cpus: What it has.
        num_gpus: As above.
        accelerator: The kind of its GPUs by Ray's name: ``H100``.
        held_cpus: What others hold of its CPUs; what this job holds is its own.
        held_gpus: As above.
    """

    num_cpus: float
    num_gpus: float
    accelerator: str = ""
    held_cpus: float = 0.0
    held_gpus: float = 0.0

    def amount(self, name: str) -> float:
        """Returns how much it has of ``CPU`` or ``GPU``."""
        return self.num_cpus if name == "CPU" else self.num_gpus

    def free(self, name: str) -> float:
        """Returns how much of that others leave."""
        return self.amount(name) - (self.held_cpus if name == "CPU" else self.held_gpus)


@dataclass(frozen=True)
class Capacity:
    """How trials fit into a cluster.

    Attributes:
        concurrency: Trials at a time; 0 where a trial must wait for a node.
        reason: Why not more.
        num_workers: Processes of one trial.
        cpus_per_worker: CPUs of each, resolved.
        gpus_per_worker: GPUs of each, resolved.
        one_node: Whether all workers of a trial can be on one machine, and then will be.
        asked: Further trials, for which nodes are asked for.
        accelerator: The kind of the GPUs; empty: any.
    """

    concurrency: int
    reason: str
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    one_node: bool
    asked: int = 0
    accelerator: str = ""

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        need = {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})
        return need | ({f"{KIND}{self.accelerator}": OF_KIND} if self.accelerator else {})


def node_of(resources: Mapping[str, float], held: Mapping[str, float] | None = None) -> Node:
    """Returns a machine with these resources, by Ray's names, of which others hold some."""
    kinds = [name.removeprefix(KIND) for name in resources if name.startswith(KIND)]
    kind = min(kinds, key=len, default="")  # a placement group adds longer names of its own
    held = held or {}
    return Node(resources.get("CPU", 0), resources.get("GPU", 0), kind, held.get("CPU", 0), held.get("GPU", 0))


def held_by_others(free: Mapping[str, float], there: Mapping[str, float], job_id: str) -> dict[str, float]:
    """Returns what is not free on a node and not held by a placement group of a job, as all of its trainings are.

    Args:
        free: What is free there (``ray_private.resources_of_nodes``).
        there: What there is. The name of a group ends with that of its job.
        job_id: The job.
    """
    found = {}
    for name in ("CPU", "GPU"):
        ours = sum(there[each] for each in there if re.fullmatch(rf"{name}_group_[0-9a-f]+{job_id}", each))
        found[name] = round(max(0.0, there.get(name, 0.0) - free.get(name, 0.0) - ours), 4)
    return found


def crowding(recipe: Recipe, capacity: Capacity, nodes: tuple[Node, ...]) -> str:
    """Returns a warning if trainings have far more threads together than there are cores; else an empty text."""
    threads, workers = recipe.resources.threads, capacity.concurrency * capacity.num_workers
    cores = sum(node.num_cpus for node in nodes)
    if threads is None or workers * threads <= CROWDED * cores:
        return ""
    text = f"resources.threads is {threads}: {counted(workers, 'worker')} at a time have {workers * threads} threads "
    return f"{text}on {cores:g} cores and slow each other down; remove the key, or set {max(1, int(cores // workers))}"


def capacity_of(recipe: Recipe, nodes: tuple[Node, ...], may_grow: bool = False) -> Capacity:
    """Returns how many trials of a recipe run at a time on these nodes, and what limits them.

    What others hold is left to them; where they leave too little for a trial, one waits for it.

    While a cluster may grow, one trial waits for a node; where ``search.max_concurrent_trials`` says how many are
    wanted, as many wait as run. Ray asks its autoscaler for nodes on behalf of what waits.

    Args:
        recipe: The recipe.
        nodes: Those that are there.
        may_grow: Whether nodes may be added, by an autoscaler or by hand.

    Raises:
        ClusterError: Not even one trial fits, and the cluster does not grow.
    """
    resources, kind, num_workers = recipe.resources, recipe.resources.accelerator, recipe.resources.num_workers
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if kind or any(node.num_gpus for node in nodes) else 0.0
    usable = tuple(node for node in nodes if kind in (None, node.accelerator))
    cpus = resources.cpus_per_worker or _share_of_cores(gpus, usable)
    need = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    without_others, together = (
        [min(counts) for counts in zip(*_slots(need, usable, amount).values(), strict=True)]
        for amount in (Node.amount, Node.free)
    )
    one_node = any(count >= num_workers for count in without_others)
    fitting, asked = _num_trials(together, num_workers, one_node), 0
    is_held = not fitting and _num_trials(without_others, num_workers, one_node) > 0
    if fitting or is_held:
        reason = _limit(fitting, need, usable, num_workers, one_node)
    elif may_grow:
        reason = f"no node for a trial, which needs {_needed(need, num_workers, kind)}"
    else:
        raise ClusterError(_never_fits(need, num_workers, kind, nodes))
    wanted = recipe.search.max_concurrent_trials
    if may_grow:
        asked = 1 if wanted is None else min(max(1, fitting), wanted - fitting)
    if wanted is not None and wanted <= fitting:
        fitting, asked, reason = wanted, 0, "search.max_concurrent_trials"
    if resources.executor == "debug":
        fitting, asked, reason = 1, 0, "executor debug: one after the other"
    if is_held and not asked:
        asked, reason = 1, f"{reason}; one waits"
    elif asked:
        reason += f"; nodes for {asked}{' more' if fitting else ''} are requested"
    return Capacity(fitting, reason, num_workers, cpus, gpus, one_node, asked, kind or "")


def _share_of_cores(gpus: float, usable: tuple[Node, ...]) -> float:
    """Returns the CPUs of a worker where the recipe names none: whole ones, as many as leave no GPU idle."""
    shares = [int(node.num_cpus * min(1, gpus / node.num_gpus)) for node in usable if node.num_gpus]
    return float(max(1, min(shares, default=1))) if gpus else 1.0


def _slots(
    need: dict[str, float], nodes: tuple[Node, ...], amount_of: Callable[[Node, str], float]
) -> dict[str, list[int]]:
    """Returns how many workers fit on each node, by each resource alone."""
    return {name: [num_fitting(name, each, amount_of(node, name)) for node in nodes] for name, each in need.items()}


def _num_trials(counts: list[int], num_workers: int, one_node: bool) -> int:
    return sum(count // num_workers for count in counts) if one_node else sum(counts) // num_workers


def _needed(need: dict[str, float], num_workers: int, kind: str | None) -> str:
    text = " and ".join(f"{num_workers} x {counted(amount, name)}" for name, amount in need.items())
    return f"{text} of kind {kind}" if kind else text


def _never_fits(need: dict[str, float], num_workers: int, kind: str | None, nodes: tuple[Node, ...]) -> Problem:
    """Returns the message for a trial that does not fit on the nodes."""
    kinds = tuple(sorted({node.accelerator for node in nodes} - {""}))
    if kind and kind not in kinds:
        rule = "must be a kind of accelerator that a node of the cluster has"
        return Problem("resources.accelerator", rule, kind, kinds, nearest(kind, kinds))
    cpus, gpus = (
        sum(node.amount(name) for node in nodes if kind in (None, node.accelerator)) for name in ("CPU", "GPU")
    )
    have = f"{counted(cpus, 'CPU')} and {counted(gpus, 'GPU')} in all"
    step = "Lower resources.num_workers, cpus_per_worker or gpus_per_worker. "
    step += "On a cluster, resources.wait_for_nodes=10m waits for nodes that are yet to be added."
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


def _limit(fitting: int, need: dict[str, float], nodes: tuple[Node, ...], num_workers: int, one_node: bool) -> str:
    """Returns why no more trials fit: how much there is of the scarcest resource, and what a trial takes of it.

    Args:
        fitting: How many do.
        need: Of each worker, by resource.
        nodes: Those that a trial may use.
        num_workers: As in ``Capacity``.
        one_node: As in ``Capacity``.
    """
    slots = _slots(need, nodes, Node.free)
    by_one = {name: (_num_trials(counts, num_workers, one_node), sum(counts)) for name, counts in slots.items()}
    name = min(reversed(need), key=lambda name: by_one[name])  # of equals the GPUs
    total, free, amount = (*(sum(of(node, name) for node in nodes) for of in (Node.amount, Node.free)), need[name])
    there = counted(total, name) if free == total else f"{free:g} of {counted(total, name)}, others use the rest"
    reason = f"{there}, {amount * num_workers:g} per trial"
    is_all = round(free * UNITS) // (int(amount * UNITS) * num_workers) == fitting
    return reason if is_all else f"{reason}; each node or GPU has too little left"


@dataclass(eq=False)
class AtATime:
    """Trainings at a time from now on: as many as fit on the nodes that are there, and fewer where memory was full.

    Attributes:
        concurrency: How many.
        asked: Further trainings, for which nodes are asked for.
        reason: Why not more, at the beginning.
        one_node: As of ``Capacity``, now.
        capacity_now: Returns how trainings fit now; None: that does not change.
        on_change: Given trainings at a time, and why not more, whenever they change.
        most: The most that ran at a time.
        told: Trainings at a time, and why not more, at the last change.
    """

    concurrency: int
    asked: int = 0
    reason: str = ""
    one_node: bool = True
    capacity_now: Callable[[], Capacity] | None = None
    on_change: Callable[[int, str], None] = lambda concurrency, reason: None
    most: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.most = self.concurrency
        self._share = Fraction(1)  # of the trainings that fit, those for which there is memory
        self.told = self.concurrency, self.reason
        self._next_count = 0.0
        self._fewer = False  # fit, by the last count

    @property
    def limit(self) -> int:
        """Attempts that may be there, those that wait for nodes included."""
        return max(1, self.concurrency + self.asked)

    def follow(self) -> None:
        """Asks now and then how many trainings fit on the nodes that are there, and keeps to that.

        Fewer are believed at the second count: while Ray makes or removes a placement group of this job, what the group
        takes looks for a moment like what another job holds.

        Where memory was full, as large a share of them as had memory; no nodes are asked for then, as what would wait
        for them would take what is left free.
        """
        now = time.monotonic()
        if self.capacity_now is None or now < self._next_count:
            return
        self._next_count = now + COUNT_EVERY_S
        found = self.capacity_now()
        fits, asked, reason = found.concurrency, found.asked, found.reason
        if self._share != 1:
            fits, asked = (max(1, int(fits * self._share)) if fits else 0), 0
            reason = f"{MEMORY}; {found.concurrency} would fit"
        fewer_before, self._fewer = self._fewer, fits < self.concurrency
        if fewer_before or not self._fewer:
            self.concurrency, self.asked, self.one_node = fits, asked, found.one_node
            self._tell(reason)

    def memory_was_full(self) -> None:
        """Lowers it by one training."""
        self._share *= Fraction(self.concurrency - 1, self.concurrency)
        self.concurrency, self.asked = self.concurrency - 1, 0
        self._tell(MEMORY)

    def _tell(self, reason: str) -> None:
        self.most = max(self.most, self.concurrency)
        if (self.concurrency, reason) != self.told:
            self.told = self.concurrency, reason
            self.on_change(self.concurrency, reason)
