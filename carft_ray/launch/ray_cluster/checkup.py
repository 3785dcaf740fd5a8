"""Whether the nodes of a cluster can run the trials of a recipe: each is asked, and what it answers is judged.

A node must see the images and the model under the paths of the driver, have the driver's libraries and the
GPUs that it offers, and reach the other nodes. What would make trials fail is an error, what may not is a warning.
"""

import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray import environment
from carft_ray.errors import Problem
from carft_ray.launch.failures.causes import root_cause
from carft_ray.launch.ray_cluster import node_facts
from carft_ray.launch.ray_cluster.cluster import nodes_alive
from carft_ray.recipe.checks.rules import named_sets
from carft_ray.recipe.schema.fine_tuning import LOCAL_DIR, is_weights_path
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.sets import StoredSet, plain
from carft_ray.recipe.text import dotted
from carft_ray.training.doctor import Finding, Level
from carft_ray.words import counted

ANSWER_WITHIN_S = 60.0  # a worker process starts, and its disks answer or not
COLLECTIVE_WITHIN_S = 60.0
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "ray", "optuna")
LITTLE_SPACE_GB, NO_SPACE_GB = 5.0, 0.5
Fault = tuple[Level, str, str, str]  # and rule, value, next step


@dataclass(frozen=True)
class NodeReport:
    """What is known of a node.

    Attributes:
        name: Its address, with the start of Ray's name of it where two nodes have one address.
        node_id: Ray's name of it.
        resources: What it offers to Ray.
        facts: What it has found (``node_facts.node_facts``); None when it has not answered.
        fault: Why it has not.
    """

    name: str
    node_id: str
    resources: Mapping[str, float]
    facts: Mapping[str, Any] | None
    fault: str = ""

    @property
    def takes_trials(self) -> bool:
        """Whether Ray gives it any."""
        return self.resources.get("CPU", 0) > 0


def recipe_paths(recipe: Recipe) -> dict[str, str]:
    """Returns what every node must see of a recipe: key path -> path; of a pattern the folder that it begins with."""
    found: dict[str, str] = {}
    for path, spec in named_sets(recipe).items():
        images = plain(spec)
        if isinstance(images, StoredSet):
            texts = {f"{dotted(path)}.{key}": getattr(images, key) for key in images.path_keys}
            found |= {place: _fixed_part(text) for place, text in texts.items() if isinstance(text, str)}
    model = recipe.model
    if model.name.startswith(LOCAL_DIR):
        found["model.name"] = model.name.removeprefix(LOCAL_DIR)
    if model.pretrained is not None and is_weights_path(model.pretrained):
        found["model.pretrained"] = model.pretrained
    return found


def _fixed_part(path: str) -> str:
    there = Path(path)
    return str(next(each for each in (there, *there.parents) if not re.search(r"[{*?\[]", str(each))))


def ask_nodes(recipe: Recipe, say: Callable[[str], None], within_s: float = ANSWER_WITHIN_S) -> list[NodeReport]:
    """Asks every node that is alive, all at the same time; Ray is attached to.

    Args:
        recipe: The recipe.
        say: Told what is being done.
        within_s: How long each node may take.
    """
    nodes = nodes_alive()
    say(f"asking {counted(len(nodes), 'node')}")
    asked = {"libraries": LIBRARIES, "paths": recipe_paths(recipe), "cache_dir": recipe.data.cache_dir}
    answers = _answers([_submit(node["NodeID"], node_facts.node_facts, asked) for node in nodes], within_s)
    addresses, reports = [node["NodeManagerAddress"] for node in nodes], []
    for node, address, answer in zip(nodes, addresses, answers, strict=True):
        name = address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:8]})"
        facts, fault = (None, answer) if isinstance(answer, str) else (answer, "")
        reports.append(NodeReport(name, node["NodeID"], node["Resources"], facts, fault))
    return reports


def _submit(node_id: str, function: Callable[..., Any], *given: Any) -> Any:
    """Starts a function on a node, whatever is reserved there, once and nowhere else."""
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    ray.cloudpickle.register_pickle_by_value(node_facts)  # type: ignore[no-untyped-call]  # a node need not have it
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
    """Runs a collective over the nodes that take trials, where a trial has several workers.

    NCCL where nodes offer GPUs, over these nodes, else gloo. They find each other by a port of this machine.

    Args:
        reports: Of all nodes.
        recipe: The recipe.
        say: Told what is being done.
    """
    able = [each for each in reports if each.takes_trials and each.facts and each.facts["versions"]["torch"]]
    with_gpus = [each for each in able if each.resources.get("GPU", 0)]
    nodes = with_gpus or able
    if recipe.resources.num_workers == 1 or len(nodes) < 2:
        return []
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    backend, address = "nccl" if with_gpus else "gloo", ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    say(f"running a collective over {len(nodes)} nodes ({backend})")
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    given = backend, address, store.port
    size = len(nodes), COLLECTIVE_WITHIN_S
    tasks = [_submit(each.node_id, node_facts.collective, *given, rank, *size) for rank, each in enumerate(nodes)]
    answers = _answers(tasks, 3 * COLLECTIVE_WITHIN_S)
    if not any(answers):
        return []
    value = "; ".join(f"{each.name}: {answer}" for each, answer in zip(nodes, answers, strict=True) if answer)
    step = "Open all ports between the nodes; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network to use."
    return [Finding("error", Problem("cluster", f"nodes must run a collective by {backend}", value, next_step=step))]


def judge(reports: Sequence[NodeReport]) -> list[Finding]:
    """Returns what is wrong on the nodes, errors first, in one finding for all nodes that share it."""
    together: dict[Fault, list[str]] = {}
    for report in reports:
        for fault in _faults(report):
            together.setdefault(fault, []).append(report.name)
    found = []
    for (level, rule, value, step), names in together.items():
        place = f"node {names[0]}" if len(names) == 1 else f"{len(names)} nodes ({', '.join(names)})"
        found.append(Finding(level, Problem(place, rule, value, next_step=step)))
    return sorted(found, key=lambda one: ("error", "warning", "note").index(one.level))


def _faults(report: NodeReport) -> Iterator[Fault]:
    """Yields what is wrong on one node."""
    facts = report.facts
    if facts is None:
        step = "Do its disks answer? Can the other nodes reach its ports? See `ray status` and the logs of that node."
        yield "error", "must run a task", report.fault, step
        return
    yield from _faults_of_code(facts)
    # a node without CPUs, such as a head that only holds the driver, opens no image and trains nothing
    grave: Level = "error" if report.takes_trials else "note"
    if facts["missing"]:
        value = "; ".join(f"{place}: {one['path']}: {one['fault']}" for place, one in facts["missing"].items())
        step = "Mount or copy it there under the same path, or change the recipe."
        step += "" if report.takes_trials else " It has no CPU for Ray and takes no trial."
        yield grave, "must see what the recipe names", value, step
    cache, step = facts["cache"], "Free some, or name another folder in data.cache_dir."
    free_gb = cache["free_bytes"] / 1e9
    if cache["fault"]:
        yield grave, "must be able to write the cache of images", f"{cache['path']}: {cache['fault']}", step
    elif free_gb < LITTLE_SPACE_GB:
        rule = f"should have {LITTLE_SPACE_GB:g} GB free for the cache of images"
        yield grave if free_gb < NO_SPACE_GB else "warning", rule, f"{free_gb:.2g} GB at {cache['path']}", step
    yield from _faults_of_gpus(report, facts)


def _faults_of_code(facts: Mapping[str, Any]) -> Iterator[Fault]:
    ours, here = facts["carft_ray"], environment.code()
    install = f"Install carft-ray {here['version']} there, into the Python that runs `ray start`."
    if ours["version"] != here["version"]:
        rule = f"must have carft-ray {here['version']}, like the driver"
        yield "error", rule, ours["fault"] or ours["version"], install
    elif ours["source"] != here["source"]:
        yield "warning", "has different files of carft-ray than the driver, with the same version", "", install
    for name, wanted in (environment.versions_of(LIBRARIES) | {"python": platform.python_version()}).items():
        there, step = facts["versions"][name], f"Install {name} {wanted} there."
        if there is None:
            yield "error", f"must have {name} {wanted}, like the driver", "none", step
        elif wanted is not None and _release(there) != _release(wanted):
            yield (
                "warning",
                f"should have {name} {wanted}, like the driver: results may differ between nodes",
                there,
                step,
            )


def _release(version: str) -> str:
    return version.partition("+")[0]  # a build for CPUs beside one for CUDA is the same release


def _faults_of_gpus(report: NodeReport, facts: Mapping[str, Any]) -> Iterator[Fault]:
    offered, there, torch = report.resources.get("GPU", 0), facts["gpus"], facts["versions"]["torch"] or ""
    found = f"{len(there)} by nvidia-smi"
    if offered and "+cpu" in torch:
        yield (
            "error",
            "must have a torch with CUDA, since it offers GPUs to Ray",
            torch,
            "Install torch for CUDA there.",
        )
    if offered > len(there) and there:
        step = "Start its Ray with the number of GPUs that nvidia-smi shows."
        yield "error", f"must have the {offered:g} GPUs that it offers to Ray", found, step
    if there and not offered and report.takes_trials:
        step = "Start its Ray with --num-gpus if trials are to use them."
        yield "warning", "offers none of its GPUs to Ray", found, step
