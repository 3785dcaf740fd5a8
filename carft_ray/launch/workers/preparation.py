"""Preparation of a study: the caches of all nodes, then once what all trainings share."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray import environment
from carft_ray.data.sets import write_sets
from carft_ray.errors import CarftError, ClusterError, Problem
from carft_ray.launch.cluster.capacity import Capacity, num_fitting
from carft_ray.launch.cluster.cluster import nodes_alive
from carft_ray.launch.cluster.ray_errors import is_death, lost_rank, root_cause
from carft_ray.launch.workers.mailbox import Box
from carft_ray.launch.workers.node_files import prepared_at_hand, sees, uses_bucket
from carft_ray.launch.workers.runtime import STOP_CHECK_S, Runtime
from carft_ray.launch.workers.worker import take_gpu
from carft_ray.layout import PREPARED
from carft_ray.recipe.schema.recipe import with_threads
from carft_ray.training.run_context import RunContext
from carft_ray.words import counted

FILLING, PREPARING = "filling", "preparing"  # what is said in the mailbox, under these names, is what is done
MOST_NAMED = 3  # nodes in a line
ATTEMPTS = 5  # at the preparation, where the process or its node has died
WAIT_NOTE_AFTER_S = 5.0  # a preparation that has not begun by then gets a note
WAITS = "the preparation waits for a node: is the cluster full? See `ray status`"


def _say(box: Box, what: str, node: str, text: str) -> None:
    """Passes what a task does, on a node that is named where there are several, to the driver's process."""
    with contextlib.suppress(OSError):  # the next text will do
        box.answer(what, f"{node}: {text}" if node else text)


def fill_nodes(runtime: Runtime, say: Callable[[str], None], asked: Callable[[], bool] = bool) -> None:
    """Lists the sets, and builds what the caches lack on all nodes that can run trainings, at once and with all cores.

    Nodes, tasks and trials take the listing from the folder of the preparation. No GPU and no place of a trial is held
    meanwhile. A node that dies or fails as a machine is passed over: its trainings, should it come back, build for
    themselves, and so do those on a node that comes later. In this process the preparation builds.

    Args:
        runtime: Of the search.
        say: Given texts of what the nodes do.
        asked: Tells whether a stop was asked for.

    Raises:
        CarftError: A set or the model cannot be opened; a ``ClusterError`` where a stop was asked for.
    """
    write_sets(runtime.recipe, runtime.study_dir / PREPARED, runtime.made_of)
    if runtime.in_process or (runtime.runner.fill is None and runtime.files is None):
        return
    nodes = _nodes_for_trainings(runtime.capacity)
    # a process that the preparation may not use again (Ray keeps those with GPUs apart) would hold a model for nothing
    max_calls = 1 if runtime.capacity.gpus_per_worker or len(nodes) > 1 else 0
    pending, without = dict[Any, str](), list[tuple[str, bool]]()
    for node_id, address in nodes.items():
        where = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        task = ray.remote(num_cpus=0, num_gpus=0, max_retries=0, max_calls=max_calls, scheduling_strategy=where)(_fill)  # type: ignore[call-overload]
        pending[task.remote(runtime, address if len(nodes) > 1 else "")] = node_id
    with _cancelling(pending):
        for ended in _rounds(runtime, pending, FILLING, say, asked):
            for done in ended:
                node_id = pending.pop(done)
                reason, seen, by_bucket = "", True, False
                try:
                    reason, seen, by_bucket = ray.get(done)
                except Exception as error:  # not of the sets: the preparation meets it, too, or is spared it
                    cause = getattr(error, "cause", error)
                    if isinstance(cause, CarftError):
                        raise cause from None
                    reason = root_cause(error)
                if reason:
                    say(f"{nodes[node_id]} did not fill its cache; its trials will fill it: {reason}")
                without += [] if seen else [(nodes[node_id], by_bucket)]
            alive = _nodes_for_trainings(runtime.capacity)
            for lost in [each for each, node_id in pending.items() if node_id not in alive]:  # Ray may take minutes
                say(f"{nodes[pending.pop(lost)]} is gone: the search continues without it")
    if runtime.files is not None:
        say(_sight(runtime.study_dir, len(nodes), without))


@contextlib.contextmanager
def _cancelling(pending: Collection[Any]) -> Iterator[None]:
    """Cancels the tasks that are pending when the block raises: a Ray of the caller's would run them to their end.

    Only those that have not ended: Ray may end the process that cancels a task while its result arrives.
    """
    try:
        yield
    except BaseException:
        for task in ray.wait(list(pending), num_returns=len(pending), timeout=0)[1] if pending else ():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(task, force=True)
        raise


def _sight(study_dir: Path, num_nodes: int, without: Sequence[tuple[str, bool]]) -> str:
    """Returns how many nodes see the study, and how the others have its files.

    Args:
        study_dir: The study directory.
        num_nodes: That were asked.
        without: Those that do not see it: address, which several may have, and whether they use its bucket themselves.
    """
    if not without:
        return f"{'the node sees' if num_nodes == 1 else f'all {num_nodes} nodes see'} {study_dir}"
    through = [node for node, by_bucket in without if not by_bucket]
    number = len(without) - len(through)
    addresses = sorted({*through})
    names = ", ".join(addresses[:MOST_NAMED]) + (", ..." if len(addresses) > MOST_NAMED else "")
    ways = [f"{number} of them {'uses' if number == 1 else 'use'} the bucket"] if number else []
    if through:
        ways.append(
            f"the files of {len(through)} go through Ray ({names})" if number else f"its files go through Ray ({names})"
        )
    return f"{len(without)} of {counted(num_nodes, 'node')} do not see {study_dir}: {', '.join(ways)}"


def _rounds(
    runtime: Runtime,
    pending: Collection[Any],
    what: str,
    say: Callable[[str], None],
    asked: Callable[[], bool],
    silent: str = "",
) -> Iterator[list[Any]]:
    """Waits for tasks while any is pending; passes on what they say, where it is new.

    Args:
        runtime: Of the search.
        pending: The tasks, from which the caller takes what has ended.
        what: ``FILLING`` or ``PREPARING``.
        say: Given what they say.
        asked: Tells whether a stop was asked for.
        silent: Said instead where they have said nothing ``WAIT_NOTE_AFTER_S`` after the beginning.

    Yields:
        Twice a second the tasks that have ended, if any.

    Raises:
        ClusterError: A stop was asked for.
    """
    began, told = time.monotonic(), ""
    while pending:
        if asked():
            raise ClusterError(Problem("preparation", "was stopped on request"))
        text = silent if time.monotonic() - began >= WAIT_NOTE_AFTER_S else ""
        with contextlib.suppress(OSError):
            text = str(runtime.mailbox.ask(what, None) or text)
        if text not in ("", told):
            told = text
            say(text)
        yield ray.wait(list(pending), timeout=STOP_CHECK_S)[0]


def _nodes_for_trainings(capacity: Capacity) -> dict[str, str]:
    """Returns the addresses of the live nodes on which a worker fits, by Ray's name."""
    need = capacity.worker_resources.items()
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in nodes_alive()
        if all(num_fitting(name, amount, node["Resources"].get(name, 0)) for name, amount in need)
    }


def _fill(runtime: Runtime, node: str) -> tuple[str, bool, bool]:
    """Fills the cache of this node.

    Returns:
        Why it could not, where the machine failed; whether it sees the study; else, whether it uses its bucket itself.
    """
    seen, by_bucket = sees(runtime), False
    try:
        by_bucket = not seen and uses_bucket(runtime)
        with prepared_at_hand(runtime) as prepared:
            if runtime.runner.fill is not None:
                runtime.runner.fill(runtime.recipe, prepared, partial(_say, runtime.mailbox, FILLING, node))
    except Exception as error:
        if lost_rank(error, RunContext()) is None:
            raise
        return " ".join(str(error).split()), seen, by_bucket
    return "", seen, by_bucket


def run_prepare(
    runtime: Runtime, say: Callable[[str], None] = lambda text: None, asked: Callable[[], bool] = bool
) -> dict[str, Any]:
    """Fills the caches of all nodes, then runs the preparation in a Ray task or in this process.

    The task asks for what a worker gets. All cores of the node are used.

    Args:
        runtime: Of the search.
        say: Given texts of what the preparation does.
        asked: Tells whether a stop was asked for.

    Raises:
        CarftError: As the preparation raised it, or a ``ClusterError`` with the cause of any other end.
    """
    capacity, folder = runtime.capacity, runtime.study_dir / PREPARED
    if runtime.in_process:
        fill_nodes(runtime, say, asked)
        recipe = with_threads(runtime.recipe, environment.usable_cores())
        return runtime.runner.prepare(recipe, folder, say, runtime.made_of)
    kind = {name: amount for name, amount in capacity.worker_resources.items() if name not in ("CPU", "GPU")}
    task = ray.remote(
        num_cpus=capacity.cpus_per_worker, num_gpus=capacity.gpus_per_worker, resources=kind, max_retries=0
    )(_prepare)

    def attempt() -> dict[str, Any]:
        pending = task.remote(runtime)
        with _cancelling([pending]):
            for ended in _rounds(runtime, [pending], PREPARING, say, asked, WAITS):
                if ended:
                    break
            metrics: dict[str, Any] = ray.get(pending)
        return metrics

    try:
        fill_nodes(runtime, say, asked)
        for _ in range(ATTEMPTS - 1):
            try:
                return attempt()
            except ray.exceptions.RayError as error:
                if not is_death(error):
                    raise
                say(f"the preparation runs once more: {root_cause(error)}")
                _say(runtime.mailbox, PREPARING, "", "")  # not what the dead one has said
        return attempt()
    except Exception as error:  # what cannot be pickled is refused in this process already
        cause = getattr(error, "cause", error)  # as the preparation raised it
        if isinstance(cause, CarftError):
            raise cause from None
        step = "Run it again with --debug to see where."
        raise ClusterError(Problem("preparation", "must run to its end", root_cause(error), next_step=step)) from error


def _prepare(runtime: Runtime) -> dict[str, Any]:
    take_gpu(runtime, RunContext())  # what a CPU computes would be kept for all trainings
    node_id = ray.get_runtime_context().get_node_id()
    num_cpus = next(node["Resources"].get("CPU", 1) for node in nodes_alive() if node["NodeID"] == node_id)
    say = partial(_say, runtime.mailbox, PREPARING, "")
    with prepared_at_hand(runtime) as folder:
        recipe = with_threads(runtime.recipe, max(1, int(num_cpus)))
        return runtime.runner.prepare(recipe, folder, say, runtime.made_of)
