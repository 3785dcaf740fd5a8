"""What `search`, `resume`, `confirm`, `train` and `reproduce` have in common, from the claim to the trainings.

with open_study(...) as study:          # the claim, no stop file of before, the recipe, what a kill has left
    begin(folder, recipe)               # resolved.yaml is that of this command
    with computing(...) as runtime:     # shared images, then Ray or this process; signals are InterruptedRunError
        prepare(study, runtime, say)    # sets, caches, heads, zero-shot; what they are, into the log
        run_trainings(study, runtime)   # ``launch.trainings``
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from carft_ray import environment, files
from carft_ray.data.cache import cache_dir
from carft_ray.data.copies.find import digests_of_tests
from carft_ray.data.copies.shared_images import SharedRow, shared_of_study, write_shared
from carft_ray.errors import InterruptedRunError
from carft_ray.launch.mailbox import Mailbox, start_mailbox
from carft_ray.launch.preparation import run_prepare
from carft_ray.launch.ray_cluster.cluster import running_ray
from carft_ray.launch.ray_cluster.concurrency import Node, crowding
from carft_ray.launch.ray_cluster.growth import await_nodes, may_grow
from carft_ray.launch.ray_cluster.ray_private import forget_pickled_columns
from carft_ray.launch.runtime import Runner, Runtime, Say, make_runtime
from carft_ray.launch.stop import interruptions_as
from carft_ray.launch.study_files import start_files
from carft_ray.layout import RAY_LOG, RESOLVED
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.ledger import note_test_sets
from carft_ray.study.provenance import record_provenance
from carft_ray.study.study import Study

logger = logging.getLogger(__name__)


def begin(folder: Path, recipe: Recipe) -> None:
    """Begins a command on a study that is held.

    Raises:
        StorageError: The folder cannot be written.
    """
    files.write_text(folder / RESOLVED, dump_recipe(recipe))


@contextlib.contextmanager
def computing(
    study: Study,
    recipe: Recipe,
    runner: Runner,
    address: str | None,
    interrupted: Callable[[], InterruptedRunError],
    say: Say,
    shared: Sequence[SharedRow] | None = None,
    in_process: bool = False,
) -> Iterator[Runtime]:
    """Compares the images of the roles, then starts Ray, or attaches to one, for as long as the block lasts.

    Args:
        study: The study.
        recipe: Its recipe; ``resources.executor: debug`` takes this process, one training at a time, and no Ray.
        runner: What is run.
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        interrupted: Returns what a signal becomes.
        say: Told what is being done.
        shared: Images that stand in two roles; None: those of the study, or they are found now.
        in_process: Take this process, whatever the recipe says.

    Raises:
        InterruptedRunError: A signal came.
        HoldOutError: Two roles share images.
        ClusterError: There is no Ray, or a training does not fit.
    """
    forget_pickled_columns()  # before a set is opened here
    folder = study.study_dir
    in_process = in_process or recipe.resources.executor == "debug"
    with interruptions_as(interrupted, study.stop):
        rows = shared_of_study(recipe, cache_dir(recipe), folder, say) if shared is None else shared
        ray = running_ray(address, folder / RAY_LOG, study.stop, recipe.resources.wait_for_nodes or 0.0, say)
        with contextlib.nullcontext((_this_machine(recipe),)) if in_process else ray as nodes:
            write_shared(folder, rows)
            if shared is None:
                note_test_sets(study.log, partial(digests_of_tests, recipe, cache_dir(recipe)))
            attached = address is not None and not in_process
            grows = attached and may_grow()
            if attached:
                nodes = await_nodes(recipe, nodes, grows, study, say)
            runtime = make_runtime(recipe, folder, nodes, runner, grows)
            if slow := crowding(recipe, runtime.capacity, nodes):
                logger.warning("%s", slow)
            box = Mailbox() if in_process else start_mailbox()
            runtime = replace(runtime, in_process=in_process, attached=attached, mailbox=box)
            if attached:
                last, first = (study.log.number, study.log.digest), study.log.digest_of(1)
                served, bucket = start_files(folder, "", last)
                runtime = replace(runtime, files=served, commit=last, first_commit=first, bucket=bucket)
            yield runtime


def prepare(study: Study, runtime: Runtime, say: Say) -> dict[str, Any]:
    """Does what all trainings share, and notes in the log what their numbers come from.

    Returns:
        Zero-shot metrics and counts (``training.run.prepare``).
    """
    metrics = run_prepare(runtime, say, study.stop.asked)
    record_provenance(runtime.study_dir, study.log, runtime.recipe, metrics.pop("provenance", None))
    return metrics


def _this_machine(recipe: Recipe) -> Node:
    """Returns this machine; what the recipe asks for is taken to be there, as nobody else shares it."""
    from torch import cuda  # what runs here needs it anyway

    asked = recipe.resources
    cpus, gpus = (asked.cpus_per_worker or 1) * asked.num_workers, (asked.gpus_per_worker or 0) * asked.num_workers
    return Node(max(environment.usable_cores(), cpus), max(cuda.device_count(), gpus), asked.accelerator or "")
