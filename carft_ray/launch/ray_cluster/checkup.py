"""Whether the nodes of a cluster can run the trials of a recipe: each is asked, and what it answers is judged.

A node sees the study, the images and the model under the paths of the driver; its libraries are those of the driver;
there is space; and so on. What would make trials fail is an error, what only makes them slow or different a warning.
"""

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray import environment, files
from carft_ray.data.readers import reader_of
from carft_ray.errors import ClusterError, Problem
from carft_ray.evaluation.doctor import Diagnosis, Finding, Level, examine
from carft_ray.launch.failures.causes import root_cause
from carft_ray.launch.ray_cluster import node_facts
from carft_ray.launch.ray_cluster.cluster import nodes_alive
from carft_ray.recipe.checks.rules import named_sets
from carft_ray.recipe.loading import LOCAL_DIR, is_weights_path
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.sets import StoredSet, plain
from carft_ray.recipe.text import dotted
from carft_ray.words import counted

ANSWER_WITHIN_S = 60.0  # a worker process starts, and its disks answer or not (``node_facts.FILES_WITHIN_S``)
EXAMINE_WITHIN_S = 3600.0  # every image is read
CLOCKS_WITHIN_S = 10.0
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "ray", "optuna")
CLOCK_S = 1.0
SLOW_FILES_PER_S, SLOW_MB_PER_S = 50, 5
MEASURED_FOR_S = 0.1  # what took less says nothing
LITTLE_SPACE_GB, NO_SPACE_GB = 5.0, 0.5
LITTLE_MEMORY_GB = 2.0
LITTLE_SHARED_MEMORY_GB = 0.25  # containers have 64 MB unless they are told otherwise


@dataclass(frozen=True)
class NodeReport:
    """What is known of a node.

    Attributes:
        name: Its address, with the start of Ray's name of it where two nodes have one address.
        node_id: Ray's name of it.
        resources: What it offers to Ray.
        facts: What it has found (``node_facts.node_facts``); None when it has not answered.
        fault: Why it has not.
        clock_s: How far its clock is ahead of the driver's, at least; 0 within the time that the question took. None
            when it was not measured.
    """

    name: str
    node_id: str
    resources: Mapping[str, float]
    facts: Mapping[str, Any] | None
    fault: str = ""
    clock_s: float | None = None

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
            texts = {key: getattr(images, key) for key in images.path_keys}
            place = dotted(path)
            found |= {f"{place}.{key}": _fixed_part(text) for key, text in texts.items() if isinstance(text, str)}
    model = recipe.model
    if model.name.startswith(LOCAL_DIR):
        found["model.name"] = model.name.removeprefix(LOCAL_DIR)
    if model.pretrained is not None and is_weights_path(model.pretrained):
        found["model.pretrained"] = model.pretrained
    return found


def _fixed_part(path: str) -> str:
    there = Path(path)
    return str(next(each for each in (there, *there.parents) if not re.search(r"[{*?\[]", str(each))))


def images_are_here(recipe: Recipe) -> bool:
    """Returns whether this machine sees any of the stored images, or the recipe names none."""
    paths = {place: path for place, path in recipe_paths(recipe).items() if place.startswith("data.")}
    return not paths or any(files.exists(Path(path)) for path in paths.values())


@contextlib.contextmanager
def _marker(study_dir: Path | None) -> Iterator[dict[str, str] | None]:
    """Writes a file into the folder of a study, or into the one where it would be made, for the time of the block.

    Yields:
        ``folder``, ``marker`` and ``text``, as nodes are asked for it; None without a study.

    Raises:
        StorageError: The folder cannot be written.
    """
    if study_dir is None:
        yield None
        return
    folder = next(each for each in study_dir.absolute().parents if each.is_dir())
    text = secrets.token_hex(8)
    path = folder / f".carft-ray-{text}"
    try:
        files.write_text(path, text)
        yield {"folder": str(folder), "marker": path.name, "text": text}
    finally:
        files.remove(path)


def ask_nodes(
    recipe: Recipe, study_dir: Path | None, say: Callable[[str], None], within_s: float = ANSWER_WITHIN_S
) -> list[NodeReport]:
    """Asks every node that is alive, all at the same time; Ray is attached to.

    Args:
        recipe: The recipe.
        study_dir: Where the study would be; None: it is not looked for.
        say: Told what is being done.
        within_s: How long each node may take.

    Raises:
        StorageError: The folder of the study cannot be written from here.
    """
    nodes = nodes_alive()
    addresses = [node["NodeManagerAddress"] for node in nodes]
    # a test set is asked for, and none of its files is opened; those of ``train`` are read for the time that it takes
    train = plain(recipe.data.train)
    reads = reader_of(train).places(train) if isinstance(train, StoredSet) else []
    asked = {
        "libraries": LIBRARIES,
        "paths": recipe_paths(recipe),
        "cache_dir": recipe.data.cache_dir,
        "reads": reads[:8],
    }
    say(f"asking {counted(len(nodes), 'node')}")
    with _marker(study_dir) as study, _sent_as_code():
        answers = _from_each(nodes, node_facts.node_facts, within_s, {**asked, "study": study})
        clocks = _clocks([node for node, answer in zip(nodes, answers, strict=True) if not isinstance(answer, str)])
    reports = []
    for node, address, answer in zip(nodes, addresses, answers, strict=True):
        node_id = node["NodeID"]
        name = address if addresses.count(address) == 1 else f"{address} ({node_id[:8]})"
        is_fault = isinstance(answer, str)
        report = NodeReport(name, node_id, node["Resources"], None if is_fault else answer, answer if is_fault else "")
        reports.append(replace(report, clock_s=clocks.get(node_id)))
    return reports


@contextlib.contextmanager
def _sent_as_code() -> Iterator[None]:
    """Within the block, Ray sends the functions of ``node_facts`` whole: a node need not have them."""
    ray.cloudpickle.register_pickle_by_value(node_facts)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_facts)  # type: ignore[no-untyped-call]


def _submit(node_id: str, function: Callable[..., Any], *given: Any) -> Any:
    """Starts a function on a node, whatever is reserved there, once and nowhere else."""
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(*given)


def _from_each(
    nodes: Sequence[Mapping[str, Any]], function: Callable[..., Any], within_s: float, *given: Any
) -> list[Any]:
    """Returns what a function answers on each node, or a text that says why it has not."""
    tasks = [_submit(node["NodeID"], function, *given) for node in nodes]
    done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=within_s)
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


def _clocks(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns how far the clock of each node is ahead of this one's, beyond what the question itself took."""
    found = {}
    for node in nodes:
        offsets = []
        for _ in range(3):  # the first one may wait for a process
            asked = time.time()
            try:
                there = ray.get(_submit(node["NodeID"], node_facts.now), timeout=CLOCKS_WITHIN_S)
            except ray.exceptions.RayError:
                break
            offsets.append(clock_ahead(asked, there, time.time()))
        if offsets:
            found[node["NodeID"]] = min(offsets, key=abs)
    return found


def clock_ahead(asked: float, there: float, answered: float) -> float:
    """Returns how far a clock is ahead for certain, in seconds: 0 when it was read between question and answer."""
    return there - answered if there > answered else min(0.0, there - asked)


def judge(reports: Sequence[NodeReport], recipe: Recipe) -> list[Finding]:
    """Returns what is wrong on the nodes, in one finding for all nodes that share it."""
    here = {"python": environment.versions()["python"], **environment.versions_of(LIBRARIES)}
    code = environment.code()
    together: dict[Finding, list[str]] = {}
    for report in reports:
        for finding in judge_node(report, recipe, here, code):
            together.setdefault(finding, []).append(report.name)
    found = [_on(names, finding) for finding, names in together.items()]
    kinds = {
        kind: sum(gpu["name"] == kind for report in reports if report.facts for gpu in report.facts["gpus"])
        for report in reports
        if report.facts
        for kind in sorted({gpu["name"] for gpu in report.facts["gpus"]})
    }
    if len(kinds) > 1:
        rule = f"GPUs are of several kinds: {', '.join(f'{number} x {kind}' for kind, number in kinds.items())}"
        found.append(Finding("note", Problem("cluster", rule)))
    return sorted(found, key=lambda one: ("error", "warning", "note").index(one.level))


def _on(names: Sequence[str], finding: Finding) -> Finding:
    place = f"node {names[0]}" if len(names) == 1 else f"{len(names)} nodes ({', '.join(names)})"
    return replace(finding, problem=replace(finding.problem, place=place))


def judge_node(
    report: NodeReport, recipe: Recipe, here: Mapping[str, str | None], code: Mapping[str, Any]
) -> list[Finding]:
    """Returns what is wrong on one node; the places are empty.

    Args:
        report: What is known of the node.
        recipe: The recipe.
        here: Versions of Python and of libraries, as the driver has them.
        code: ``environment.code`` of the driver.
    """
    found: list[Finding] = []

    def add(level: Level, rule: str, value: str = "", next_step: str = "") -> None:
        found.append(Finding(level, Problem("", rule, value, next_step=next_step)))

    facts = report.facts
    if facts is None:
        step = "See `ray status` and the logs of that node; may the other nodes reach its ports? Start it again."
        add("error", "must run a task", report.fault, step)
        return found
    _judge_code(facts, here, code, add)
    # a node without CPUs, such as a head that only holds the driver, opens no image and trains nothing
    grave: Level = "error" if report.takes_trials else "note"
    idle = "" if report.takes_trials else " It has no CPU for Ray and takes no trial."
    if facts["hung"]:
        step = "Is the disk mounted, and does its server answer?"
        add("error", f"disks must answer within {node_facts.FILES_WITHIN_S:g} s", f"nothing of {facts['hung']}", step)
    if facts["study"]:
        step = "Mount one disk under one path on all nodes, and put the study there (--study)."
        add("error", "must see and write the folder of the study", facts["study"], step)
    if facts["missing"]:
        places: dict[str, list[str]] = {}
        for place, one in facts["missing"].items():
            places.setdefault(f"{one['path']}: {one['fault']}", []).append(place)
        value = "; ".join(f"{text} ({', '.join(names)})" for text, names in places.items())
        step = f"Mount or copy it there under the same path, or change the recipe.{idle}"
        add(grave, "must see what the recipe names", value, step)
    _judge_space(facts, recipe, grave, add)
    _judge_gpus(report, facts, add)
    if report.takes_trials:
        _judge_speed(facts, add)
    if report.clock_s is not None and abs(report.clock_s) > CLOCK_S:
        value = f"{abs(report.clock_s):.1f} s {'ahead' if report.clock_s > 0 else 'behind'}"
        add("warning", f"the clock must be within {CLOCK_S:g} s of the driver's", value, "Run chrony or ntpd there.")
    return found


Add = Callable[..., None]


def _judge_code(facts: Mapping[str, Any], here: Mapping[str, str | None], code: Mapping[str, Any], add: Add) -> None:
    ours = facts["carft_ray"]
    install = f"Install carft-ray {code['version']} there, into the Python that runs `ray start`."
    if ours["fault"]:
        add("error", f"must import carft-ray {code['version']}, as the driver has it", ours["fault"], install)
    elif ours["version"] != code["version"]:
        add("error", f"must have carft-ray {code['version']}, as the driver has it", ours["version"], install)
    elif ours["source"] != code["source"]:
        add("warning", "has other files of carft-ray than the driver, of the same version", next_step=install)
    there = {"python": facts["python"], **facts["versions"]}
    for name, version in here.items():
        needed = f"Install {name}=={version} there." if name != "python" else f"Use Python {version} there."
        if there[name] is None:
            add("error", f"must have {name} {version}, as the driver has it", "none", needed)
        elif version is not None and _release(there[name]) != _release(version):
            rule = f"should have {name} {version}, as the driver has it: results may differ by node"
            add("warning", rule, there[name], needed)


def _release(version: str) -> str:
    return version.partition("+")[0]  # a build for CPUs beside one for CUDA is the same release


def _judge_space(facts: Mapping[str, Any], recipe: Recipe, grave: Level, add: Add) -> None:
    cache = facts["cache"]
    move = "Free some, or name another folder in data.cache_dir." if recipe.data.cache_dir else "Set data.cache_dir."
    if cache is not None and cache["fault"]:
        add(grave, "must be able to write the cache of images", f"{cache['path']}: {cache['fault']}", move)
    steps = {"cache": move, "temp": "Free some, or start its Ray with --temp-dir on a larger disk."}
    for name, what in (("cache", "the cache of images"), ("temp", "temporary files")):
        one = facts[name]
        if one is None or one["free_bytes"] / 1e9 >= LITTLE_SPACE_GB:
            continue
        level = grave if one["free_bytes"] / 1e9 < NO_SPACE_GB else "warning"
        rule = f"should have {LITTLE_SPACE_GB:g} GB free for {what}"
        add(level, rule, f"{one['free_bytes'] / 1e9:.2g} GB at {one['path']}", steps[name])
    free = facts["memory_free_bytes"]
    if free is not None and free / 1e9 < LITTLE_MEMORY_GB:
        add("warning", f"should have {LITTLE_MEMORY_GB:g} GB of memory free", f"{free / 1e9:.2g} GB", "What else runs?")
    shared = facts["shared_memory_bytes"]
    if shared is not None and shared / 1e9 < LITTLE_SHARED_MEMORY_GB:
        step = "Start the container with --shm-size=2g; on Kubernetes mount an emptyDir of medium Memory at /dev/shm."
        rule = f"/dev/shm should have {LITTLE_SHARED_MEMORY_GB:g} GB, for Ray's objects and for NCCL"
        add("warning", rule, f"{shared / 1e9:.2g} GB", step)


def _judge_gpus(report: NodeReport, facts: Mapping[str, Any], add: Add) -> None:
    offered, there = report.resources.get("GPU", 0), facts["gpus"]
    torch = facts["versions"]["torch"] or ""
    if offered and "+cpu" in torch:
        add("error", "must have a torch with CUDA, as it offers GPUs to Ray", torch, "Install torch for CUDA there.")
    if offered > len(there) and there:
        step = "Start its Ray with the number of GPUs that nvidia-smi shows."
        add("error", f"must have the {offered:g} GPUs that it offers to Ray", f"{len(there)} by nvidia-smi", step)
    if there and not offered and report.takes_trials:
        step = "Start its Ray with --num-gpus, where trials shall use them."
        add("warning", "offers none of its GPUs to Ray", f"{len(there)} by nvidia-smi", step)
    known = [gpu for gpu in there if gpu["free_bytes"] is not None and gpu["total_bytes"]]
    held = [gpu for gpu in known if gpu["free_bytes"] < 0.5 * gpu["total_bytes"]]
    if held:
        value = ", ".join(f"{gpu['free_bytes'] / 1e9:.1f} of {gpu['total_bytes'] / 1e9:.1f} GB free" for gpu in held)
        step = "See nvidia-smi there; trials that run now hold some, too."
        add("warning", "half of the memory of each GPU should be free", value, step)


def _judge_speed(facts: Mapping[str, Any], add: Add) -> None:
    read = facts["read"]
    if read is None or read["seconds"] < MEASURED_FOR_S:
        return
    files_per_s, mb_per_s = speed(read)
    if files_per_s < SLOW_FILES_PER_S and mb_per_s < SLOW_MB_PER_S:
        rule = f"training images should be read at {SLOW_FILES_PER_S} files or {SLOW_MB_PER_S} MB per second"
        step = "They are read once and then kept decoded in the cache: let that lie on a disk of the node."
        add("warning", rule, f"{files_per_s:.0f} files and {mb_per_s:.1f} MB per second", step)


def speed(read: Mapping[str, float]) -> tuple[float, float]:
    """Returns files and megabytes per second of ``node_facts.read_speed``."""
    seconds = max(read["seconds"], 1e-6)
    return read["num_files"] / seconds, read["num_bytes"] / 1e6 / seconds


def examine_there(
    reports: Sequence[NodeReport], recipe: Recipe, num_images: int | None, quick: bool, say: Callable[[str], None]
) -> Diagnosis | None:
    """Checks images, prompts and model on a node that sees them, for a driver that does not.

    Args:
        reports: Of all nodes.
        recipe: The recipe.
        num_images: As of ``examine``.
        quick: As of ``examine``.
        say: Told where it is done.

    Returns:
        None when no node can do it: its findings say why.

    Raises:
        ClusterError: The node was lost, or takes more than an hour.
    """
    able = [each for each in reports if each.facts and not _hinders(each.facts)]
    if not able:
        return None
    chosen = max(able, key=lambda each: (each.resources.get("GPU", 0), each.resources.get("CPU", 0)))
    say(f"checking images and model on node {chosen.name}")
    task = _submit(chosen.node_id, examine, recipe, num_images, quick)
    try:
        found: Diagnosis = ray.get(task, timeout=EXAMINE_WITHIN_S)
    except ray.exceptions.RayError as error:
        ray.cancel(task, force=True)
        step = "Run it again, or with --quick, which opens no image."
        rule = "must check images and model"
        raise ClusterError(Problem(f"node {chosen.name}", rule, root_cause(error), next_step=step)) from error
    return found


def _hinders(facts: Mapping[str, Any]) -> bool:
    return bool(facts["missing"] or facts["hung"] or facts["carft_ray"]["source"] != environment.code()["source"])


def report_data(report: NodeReport) -> dict[str, Any]:
    """Returns a report for JSON."""
    return {
        "name": report.name,
        "node_id": report.node_id,
        "resources": dict(report.resources),
        "takes_trials": report.takes_trials,
        "fault": report.fault,
        "clock_s": report.clock_s,
        "facts": None if report.facts is None else dict(report.facts),
    }
