"""Two ways to run one training: inline in a Tune trial, or as a Ray Train group of workers. The loop is the same.

A training is stopped by a file that rank 0 reads, ``stop`` in the study directory or ``cut.json`` in its own folder; so
nothing is ever stopped from outside, where Ray leaks placement groups. A file reaches every node that sees the study,
needs no actor that could die, and lets another process ask for the stop. What a training has to say it writes into its
folder before it ends; Ray carries no results.
"""

import contextlib
import faulthandler
import math
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray import files
from carft_ray.data.listed_sets import write_sets
from carft_ray.data.shared_images import read_shared, without_shared
from carft_ray.errors import (
    CarftError,
    ClusterError,
    DivergedError,
    InterruptedRunError,
    MachineError,
    OutdatedAttemptError,
    OutOfMemoryError,
    Problem,
    StorageError,
)
from carft_ray.launch.causes import explained, root_cause
from carft_ray.launch.cluster import START_TIMEOUT, Capacity, Node, capacity, num_fitting
from carft_ray.launch.fits import fitted, memory_failure
from carft_ray.launch.host_memory import told_of_full_memory
from carft_ray.launch.lost import UNKNOWN, device_error_step, is_death, lost_rank
from carft_ray.layout import ALIVE, CUT, LOG, MANIFEST, PREPARED, RAY_FILES, STOP
from carft_ray.learning.context import RunContext
from carft_ray.learning.memory import is_out_of_memory
from carft_ray.recipe.constraints import alone
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.space import apply
from carft_ray.search.outcome import (
    Alive,
    Failure,
    TrialSpec,
    append_log,
    check_fence,
    progress_words,
    read_alive,
    read_failure,
    replace_failure,
    write_failure,
)
from carft_ray.words import counted

STOP_CHECK_S = 0.5
NODES_TOLD = 3  # of many nodes that fill their caches, so many are told at a time
STEP_TOLD_S = 1.0  # steps are told to the driver this often at most
STACKS_AFTER = 0.9  # of the time after which an attempt without a step is ended, its threads are written to its log
DOING = "preparing.txt"  # in it: what the preparation does at the moment
# the driver of a Ray Train group takes no CPU, which could starve its own workers; every head node has this resource
HEAD_ONLY = {"node:__internal_head__": 0.001}
NODE_LABEL = "ray.io/node-id"  # that Ray gives every node

Fill = Callable[[Recipe, Path, Callable[[str], None]], float]
Prepare = Callable[[Recipe, Path], dict[str, Any]]
Train = Callable[[Recipe, Path, Path, RunContext, int], dict[str, Any]]


def fill(recipe: Recipe, prepared_dir: Path, say: Callable[[str], None]) -> float:
    """``evaluation.materials.fill_cache``, imported where it runs. Returns the seconds that it took by itself."""
    from carft_ray.evaluation import materials

    began = time.monotonic()
    materials.fill_cache(recipe, prepared_dir, say)
    return time.monotonic() - began


def prepare(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """``evaluation.run.prepare``, imported where it runs: the driver holds no torch."""
    from carft_ray.evaluation import run

    return run.prepare(recipe, folder, tells_driver(folder))


def prepare_single(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """``prepare`` for one training, which shares no targets with others."""
    from carft_ray.evaluation import run

    return run.prepare(recipe, folder, tells_driver(folder), share_targets=False)


def tells_driver(folder: Path, name: str = DOING) -> Callable[[str], None]:
    """Returns what a preparation in ``folder`` tells what it does: ``run_prepare`` reads it in the driver's process.

    Args:
        folder: Where the preparation is kept.
        name: Of the file in between.
    """
    path = folder.parent / RAY_FILES / name

    def say(text: str) -> None:
        with contextlib.suppress(StorageError):  # what matters meets the same disk, and says so
            files.write_text(path, text)

    return say


def train(recipe: Recipe, out_dir: Path, prepared_dir: Path, context: RunContext, attempt: int) -> dict[str, Any]:
    """``evaluation.run.run_training``, imported where it runs."""
    from carft_ray.evaluation import run

    return run.run_training(recipe, out_dir, prepared_dir, context, attempt)


@dataclass(frozen=True)
class Runner:
    """What is run; module-level functions, which Ray moves by name.

    Attributes:
        prepare: Does once what all trainings share.
        train: One training.
        fill: Builds what the cache of its node lacks, for trainings that read sets; None: they read none.
    """

    prepare: Prepare
    train: Train
    fill: Fill | None = None


RUNNER = Runner(prepare, train, fill)


@dataclass(frozen=True)
class Plan:
    """What every training of a search shares; travels to the workers.

    Attributes:
        recipe: With ``gpus_per_worker`` resolved.
        study_dir: The study directory, seen by every node.
        capacity: Trainings at a time, workers of each and what they get.
        runner: Preparation and training.
    """

    recipe: Recipe
    study_dir: Path
    capacity: Capacity
    runner: Runner

    def filled(self) -> "Plan":
        """Returns the plan for another preparation of the same sets: no cache is filled again."""
        return replace(self, runner=replace(self.runner, fill=None))

    @property
    def in_process(self) -> bool:
        """Whether trainings run in the driver's own process, without Ray."""
        return self.recipe.resources.executor == "debug"

    @property
    def nested(self) -> bool:
        """Whether trainings run as a Ray Train group."""
        executor = self.recipe.resources.executor
        return executor == "ray-train" or (executor == "auto" and self.capacity.num_workers > 1)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        gpus = {"GPU": self.capacity.gpus_per_worker} if self.capacity.gpus_per_worker else {}
        return {"CPU": self.capacity.cpus_per_worker, **gpus}


def make_plan(recipe: Recipe, study_dir: Path, nodes: tuple[Node, ...], runner: Runner) -> Plan:
    """Returns the plan of a search (or of one training) on these nodes; its sets are without what the list of shared
    images leaves out.

    Raises:
        ClusterError: A training does not fit.
    """
    room = capacity(recipe, nodes)
    resources = recipe.resources.model_copy(update={"gpus_per_worker": room.gpus_per_worker})
    recipe = without_shared(recipe, read_shared(study_dir))
    return Plan(recipe.model_copy(update={"resources": resources}), study_dir, room, runner)


def stop_reader(study_dir: Path, folder: Path) -> Callable[[], bool]:
    """Returns a function that tells whether a training is to end: the search stops, or the pruner has cut it.

    It looks at most twice a second. Where the disk does not answer, it goes on and asks again.
    """
    paths, state = (study_dir / STOP, folder / CUT), {"next": 0.0, "stopped": False}

    def should_stop() -> bool:
        if not state["stopped"] and time.monotonic() >= state["next"]:
            state["stopped"] = any(files.seen(path) for path in paths)
            state["next"] = time.monotonic() + STOP_CHECK_S
        return bool(state["stopped"])

    return should_stop


def fill_nodes(plan: Plan, say: Callable[[str], None]) -> float:
    """Builds what the caches of the nodes lack, on all nodes that can run trainings at once and with all cores of each.

    No GPU and no place of a trial is held meanwhile. A node that dies or fails as a machine is passed over: its
    trainings, should it come back, build for themselves, and so do those on a node that comes later.

    Args:
        plan: Of the search.
        say: Told what the nodes do, as it goes on.

    Returns:
        The seconds that the slowest node took.

    Raises:
        CarftError: A set or the model cannot be opened; a ``ClusterError`` where a stop was asked for.
    """
    if plan.runner.fill is None:
        return 0.0
    nodes = _nodes_for_trainings(plan.capacity)
    # a process that the preparation may not use again (Ray keeps those with GPUs apart) would hold a model for nothing
    max_calls = 1 if plan.capacity.gpus_per_worker or len(nodes) > 1 else 0
    pending = {}
    for node_id in nodes:
        where = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        task = ray.remote(num_cpus=0, num_gpus=0, max_retries=0, max_calls=max_calls, scheduling_strategy=where)(_fill)
        pending[task.remote(plan)] = node_id
    told, longest_s = "", 0.0
    while pending:
        _check_not_stopped(plan)
        for done in ray.wait(list(pending), timeout=STOP_CHECK_S)[0]:
            node_id, reason = pending.pop(done), ""
            try:
                seconds, reason = ray.get(done)
                longest_s = max(longest_s, seconds)
            except Exception as error:  # of another kind than of sets: the preparation meets it, too, or is spared it
                cause = getattr(error, "cause", error)
                if isinstance(cause, CarftError):
                    raise cause from None
                reason = root_cause(error)
            if reason:
                say(f"{nodes[node_id]} did not fill its cache, which its trials will do: {reason}")
        alive = _nodes_for_trainings(plan.capacity)
        for lost in [each for each, node_id in pending.items() if node_id not in alive]:  # Ray may take minutes
            say(f"{nodes[pending.pop(lost)]} is gone: the search goes on without it")
        texts = {}
        for node_id in pending.values():
            with contextlib.suppress(OSError):
                texts[node_id] = (plan.study_dir / RAY_FILES / _told_by(node_id)).read_text()
        if (text := _of_nodes(texts, nodes)) not in ("", told):
            told = text
            say(told)
    return longest_s


def _check_not_stopped(plan: Plan) -> None:
    """Raises where the study's stop file is there, which tells the caller that it was no fault (``signals``)."""
    if files.seen(plan.study_dir / STOP):
        raise ClusterError(Problem("preparation", "was stopped on request"))


def _nodes_for_trainings(room: Capacity) -> dict[str, str]:
    """Returns the addresses of the live nodes on which a worker fits, by Ray's name."""
    need = {"CPU": room.cpus_per_worker} | ({"GPU": room.gpus_per_worker} if room.gpus_per_worker else {})
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"]
        and all(num_fitting(name, amount, node["Resources"].get(name, 0)) for name, amount in need.items())
    }


def _told_by(node_id: str) -> str:
    return f"filling-{node_id}.txt"


def _of_nodes(texts: dict[str, str], nodes: dict[str, str]) -> str:
    """Returns what the nodes do in one line; where there is one node, its own words.

    Args:
        texts: What they tell, by Ray's name.
        nodes: The addresses of all nodes.
    """
    if len(nodes) == 1:
        return next(iter(texts.values()), "")
    lines = [f"{nodes[node_id]}: {text}" for node_id, text in texts.items()]
    more = [f"{counted(len(lines) - NODES_TOLD, 'more node')}"] if len(lines) > NODES_TOLD else []
    return "; ".join(lines[:NODES_TOLD] + more)


def _fill(plan: Plan) -> tuple[float, str]:
    """Fills the cache of this node; returns the seconds that it took, and why it could not where the machine failed."""
    if plan.runner.fill is None or _not_visible(plan):  # a training on this node will say so
        return 0.0, ""
    node_id, prepared = ray.get_runtime_context().get_node_id(), plan.study_dir / PREPARED
    try:
        return plan.runner.fill(plan.recipe, prepared, tells_driver(prepared, _told_by(node_id))), ""
    except Exception as error:
        if lost_rank(error, RunContext()) is None:
            raise
        return 0.0, " ".join(str(error).split())


def run_prepare(plan: Plan, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Fills the caches of all nodes, then runs the preparation in a Ray task.

    The task asks for what a worker gets, and uses all cores of its node.

    Args:
        plan: Of the search.
        say: Told what the preparation does, as it goes on.

    Raises:
        CarftError: As the preparation raised it, or a ``ClusterError`` with the cause of any other end.
    """
    room = plan.capacity
    write_sets(plan.recipe, plan.study_dir / PREPARED)  # listed once, here; tasks and trials map it
    task = ray.remote(num_cpus=room.cpus_per_worker, num_gpus=room.gpus_per_worker, max_retries=0)(_prepare)
    path, told = plan.study_dir / RAY_FILES / DOING, ""
    shutil.rmtree(path.parent, ignore_errors=True)  # what a killed search has left
    try:
        fill_nodes(plan, say)
        pending, ended = task.remote(plan), False
        while not ended:
            _check_not_stopped(plan)
            ended = bool(ray.wait([pending], timeout=STOP_CHECK_S)[0])
            with contextlib.suppress(OSError):
                if (text := path.read_text()) != told:
                    told = text
                    say(told)
        metrics: dict[str, Any] = ray.get(pending)
    except Exception as error:  # what cannot be pickled is refused in this process already
        cause = getattr(error, "cause", error)  # as the preparation raised it
        if isinstance(cause, CarftError):
            raise cause from None
        step = "Run it again with --debug to see where."
        raise ClusterError(Problem("preparation", "must run to its end", root_cause(error), next_step=step)) from error
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)
    return metrics


def _prepare(plan: Plan) -> dict[str, Any]:
    _check_visible(plan)
    node_id = ray.get_runtime_context().get_node_id()
    num_cpus = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == node_id)
    resources = plan.recipe.resources.model_copy(update={"threads": max(1, int(num_cpus))})
    recipe = plan.recipe.model_copy(update={"resources": resources})
    return plan.runner.prepare(recipe, plan.study_dir / PREPARED)


def _check_visible(plan: Plan) -> None:
    if problem := _not_visible(plan):
        raise ClusterError(problem)


def _not_visible(plan: Plan) -> Problem | None:
    """Returns the message that this node does not see the study; None where it does."""
    if files.exists(plan.study_dir / MANIFEST):
        return None
    rule = "must be seen by every node: a trial runs on any of them"
    step = "Put the study into a folder that all nodes share."
    return Problem(str(plan.study_dir), rule, f"not on {ray.util.get_node_ip_address()}", next_step=step)


def tune_trainable(plan: Plan) -> Any:
    """Returns the Tune trainable, with its resources.

    Its ``config`` holds ``spec``, the fields of a ``TrialSpec``, and ``avoid``, Ray's names of nodes that are left out.
    It reports once, at the end: ``lost`` says why its workers are gone. Without a report Tune prints a line.
    """
    if plan.nested:

        def nested_trial(config: dict[str, Any]) -> dict[str, str]:
            return {"lost": run_nested(plan, TrialSpec(**config["spec"]), avoid=config["avoid"])}

        return tune.with_resources(nested_trial, HEAD_ONLY)

    def inline_trial(config: dict[str, Any]) -> dict[str, str]:
        spec = TrialSpec(**config["spec"])
        folder = spec.folder(plan.study_dir)
        context = RunContext(should_stop=stop_reader(plan.study_dir, folder))
        if not run_worker(plan, spec, folder, context):
            failure = read_failure(folder, spec.attempt)
            if failure and failure.outcome == "memory":  # Ray ends the process, and with it all that it held
                raise RuntimeError(f"{spec.name}: {failure.reason}")
        return {"lost": ""}

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        where = {"bundle_label_selector": [_anywhere_but(config["avoid"])]} if config["avoid"] else {}
        return tune.PlacementGroupFactory([plan.worker_resources], **where)

    return tune.with_resources(inline_trial, resources)


def _anywhere_but(nodes: Sequence[str]) -> dict[str, str]:
    """Returns Ray's label selector for all nodes but these."""
    return {NODE_LABEL: f"!in({','.join(nodes)})"}


def run_worker(plan: Plan, spec: TrialSpec, folder: Path, context: RunContext) -> bool:
    """Runs one attempt in this process; how it ended lies in the folder afterwards.

    Once the driver has begun another attempt, it writes nothing more and ends at its next look or write.

    Returns:
        Whether it ended well: finished, or stopped after a checkpoint.

    Raises:
        MemoryError, RuntimeError: The machine has no memory for the process as such; nothing is left in the folder.
    """
    try:
        with files.fenced(lambda: check_fence(folder, spec.attempt)):
            return _run_worker(plan, spec, folder, context)
    except OutdatedAttemptError:
        return False


def _run_worker(plan: Plan, spec: TrialSpec, folder: Path, context: RunContext) -> bool:
    recipe, nodes = plan.recipe, tuple[tuple[str, str], ...]()
    try:
        nodes = _meet(plan, context)
        folder.mkdir(parents=True, exist_ok=True)
        if context.rank == 0:
            addresses = dict.fromkeys(address for _, address in nodes)
            start = f" from {progress_words(folder)}" if spec.attempt > 1 else ""
            append_log(folder, f"attempt {spec.attempt}: starts on {', '.join(addresses)}{start}")
        recipe = apply(plan.recipe if spec.kind == "trial" else alone(plan.recipe), spec.values)
        recipe = fitted(recipe, plan.study_dir, context.world_size)
        gpus = plan.capacity.num_workers * plan.capacity.gpus_per_worker
        with _alive(folder, spec.attempt, context, gpus, nodes, plan.recipe.resources.hang_timeout_s) as context:
            result = plan.runner.train(recipe, folder, plan.study_dir / PREPARED, context, spec.attempt)
    except OutdatedAttemptError:
        raise
    except OutOfMemoryError as error:
        details = traceback.format_exc()
        failure = memory_failure(error, recipe, spec.values, plan.study_dir, spec.attempt)
    except Exception as error:  # whatever it is, the tables show it; processes and clusters stay healthy
        if is_out_of_memory(error):
            append_log(folder, f"attempt {spec.attempt}: no memory\n{traceback.format_exc().rstrip()}")
            raise
        sorted_out, details = _failure(error, spec.attempt, context, nodes), traceback.format_exc()
        if sorted_out is None:
            return True
        failure = sorted_out
        if failure.outcome == "lost":  # with the folder, perhaps: what was raised goes to Ray then
            if not nodes and getattr(error, "rank", None) == context.rank:  # this node does not see the study
                raise
            try:
                write_failure(folder, replace(failure, details=details))
            except StorageError:
                raise error from None
            return False
    else:
        if math.isfinite(result["objective"]):
            return True
        reason = f"objective is {result['objective']}"
        failure, details = Failure("diverged", reason, spec.attempt, DivergedError.exit_code), ""
    write_failure(folder, failure, details)
    return False


def _meet(plan: Plan, context: RunContext) -> tuple[tuple[str, str], ...]:
    """Returns Ray's name and the address of each rank's node, once all of them see the study.

    Raises:
        MachineError: One does not; the message is the same on every rank.
    """
    problem, node_id = _not_visible(plan), ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    everybody = [(node_id, ray.util.get_node_ip_address(), problem)]
    if context.world_size > 1:
        from carft_ray.learning.ranks import gather  # torch; the driver holds none

        everybody = gather(context, everybody[0])
    for rank, (_, _, problem) in enumerate(everybody):
        if problem:
            raise MachineError(problem, rank)
    return tuple((node_id, address) for node_id, address, _ in everybody)


@contextlib.contextmanager
def _alive(
    folder: Path,
    attempt: int,
    context: RunContext,
    gpus: float,
    nodes: Sequence[tuple[str, str]],
    hang_timeout_s: float | None,
) -> Iterator[RunContext]:
    """Tells the driver which process runs the attempt, and with each step (each look for a stop) that it still does.

    The file stays after a failure: it names the nodes. All ranks tell that they go on: rank 0 may be waiting for one
    that builds a set into the cache of its node.

    Without a step for most of ``hang_timeout_s`` the stacks of all threads of rank 0 go to the log: the driver is about
    to end the process. Python's own watchdog writes them, whatever the process does; setting it costs 0.1 ms a second.
    """
    path, state = folder / ALIVE, {"next": time.monotonic() + STEP_TOLD_S}

    def should_stop(watch: Callable[[], None] = lambda: None) -> bool:
        if time.monotonic() >= state["next"]:
            state["next"] = time.monotonic() + STEP_TOLD_S
            check_fence(folder, attempt)
            watch()
            with contextlib.suppress(OSError):  # a step is not worth a failure
                os.utime(path)
        return context.should_stop()

    if context.rank != 0:
        yield replace(context, should_stop=should_stop)
        return
    group = ray.util.get_current_placement_group() if ray.is_initialized() else None
    names = {"node_id": nodes[0][0], "group": group.id.hex() if group else "", "nodes": list(nodes)}
    files.write_json(path, {"attempt": attempt, "pid": os.getpid(), "began": time.time(), "gpus": gpus, **names})
    with open(folder / LOG, "a") as log:

        def watch() -> None:
            if hang_timeout_s is not None:
                faulthandler.dump_traceback_later(STACKS_AFTER * hang_timeout_s, file=log)

        watch()
        has_failed = False
        try:
            yield replace(context, should_stop=partial(should_stop, watch))
        except Exception as error:
            has_failed = getattr(error, "exit_code", 1) != InterruptedRunError.exit_code
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):
                if not has_failed and read_alive(folder, attempt):  # it is still ours
                    path.unlink(missing_ok=True)


def end_process(alive: Alive) -> None:
    """Ends the process of an attempt that hangs, on whatever node it runs; does not wait for it."""
    where = NodeAffinitySchedulingStrategy(node_id=alive.node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(_kill).remote(alive.pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _failure(error: Exception, attempt: int, context: RunContext, nodes: Sequence[tuple[str, str]]) -> Failure | None:
    """Sorts an exception of a training; None for a stop.

    Args:
        error: The exception.
        attempt: Number of the attempt.
        context: Of the worker that met it.
        nodes: Name and address of each rank's node; empty where they are not known yet.
    """
    if isinstance(error, CarftError) and error.exit_code == InterruptedRunError.exit_code:
        return None
    text = str(error).strip()
    line = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    if isinstance(error, DivergedError):
        reason = "; ".join(str(replace(problem, next_step="")) for problem in error.problems)
        return Failure("diverged", reason, attempt, error.exit_code)
    rank = lost_rank(error, context)
    if rank is not None:
        reason = " ".join(text.split()) if isinstance(error, CarftError) else line
        node = nodes[rank][0] if rank != UNKNOWN and nodes else ""
        return Failure("lost", reason, attempt, ClusterError.exit_code, node=node)
    if isinstance(error, CarftError):
        return Failure("fatal", text, attempt, error.exit_code)
    if (step := device_error_step(error)) is not None:
        return Failure("lost", line, attempt, ClusterError.exit_code, node=nodes[context.rank][0], step=step)
    return Failure("error", line, attempt)


def run_nested(plan: Plan, spec: TrialSpec, folder: Path | None = None, avoid: Sequence[str] = ()) -> str:
    """Runs one attempt as a Ray Train group and waits for it; how it ended lies in its folder.

    Nothing is restarted inside: an attempt whose worker dies ends, and the study gives the training another one.

    Args:
        plan: How and where trainings run.
        spec: The attempt.
        folder: Of the training; by default that of the spec.
        avoid: Ray's names of nodes that are left out.

    Returns:
        Why the group ended before its time, for an attempt that left no word (``causes.explained``); empty otherwise.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = folder or spec.folder(plan.study_dir)
    use_gpu = plan.capacity.gpus_per_worker > 0
    can_select = "label_selector" in {each.name for each in fields(ScalingConfig)}  # older releases of Ray cannot
    trainer = TorchTrainer(
        _nested_worker,
        train_loop_config={"plan": plan, "spec": spec, "folder": folder},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=plan.capacity.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=plan.worker_resources,
            placement_strategy="STRICT_PACK" if plan.capacity.one_node else "PACK",
            **({"label_selector": _anywhere_but(avoid)} if avoid and can_select else {}),
        ),
        run_config=RunConfig(
            name=f"{spec.name}-{spec.attempt}",  # a name of its own: Ray Train would resume a run by its name
            storage_path=str(plan.study_dir / RAY_FILES / "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return _dead_worker(error, spec, folder) or _late(error, plan) or explained(error)
    return ""


def _nested_worker(config: dict[str, Any]) -> None:
    """One worker of a group. A failure is raised again, so that Ray ends the others, who may wait for this one."""
    plan, spec, folder = config["plan"], config["spec"], config["folder"]
    place, should_stop = ray.train.get_context(), stop_reader(plan.study_dir, folder)
    context = RunContext(place.get_world_rank(), place.get_world_size(), should_stop=should_stop)
    if not run_worker(plan, spec, folder, context):
        raise RuntimeError(f"{spec.name} failed, see its folder")


def _dead_worker(error: Exception, spec: TrialSpec, folder: Path) -> str:
    """Notes that an attempt was lost when one of its workers has died, whatever the others have made of it.

    Returns:
        Which worker, where and why; empty when none has died.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    dead = {rank: each for rank, each in failures.items() if is_death(each)}
    if not dead:
        return ""
    rank, alive = min(dead), read_alive(folder, spec.attempt)
    node, address = alive.nodes[rank] if alive and rank < len(alive.nodes) else ("", "")
    cause = root_cause(dead[rank])
    where = f"rank {rank}{f' on {address}' if address else ''}"
    reason = cause if told_of_full_memory(cause) else f"{where}: {cause}"
    before = read_failure(folder, spec.attempt)
    if before is None or before.outcome in ("error", "lost"):
        details = "" if before is None else before.details or before.reason
        with contextlib.suppress(StorageError):
            replace_failure(folder, Failure("lost", reason, spec.attempt, ClusterError.exit_code, details, node))
    return reason


def _late(error: Exception, plan: Plan) -> str:
    """Returns that the workers of a group did not come in time; empty when they failed in another way."""
    if type(getattr(error, "controller_failure", None)).__name__ != "WorkerGroupStartupTimeoutError":
        return ""
    room, limit_s = plan.capacity, os.environ.get(START_TIMEOUT, "60")
    gpus = f" and {counted(room.gpus_per_worker, 'GPU')}" if room.gpus_per_worker else ""
    what = f"{counted(room.num_workers, 'worker')} with {counted(room.cpus_per_worker, 'CPU')}{gpus} each did not start"
    return f"{what} within {limit_s} s ({START_TIMEOUT}): is the cluster full?"
