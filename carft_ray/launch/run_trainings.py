"""Runs the trainings of an open study: in this process (``debug``), or by Ray Tune (``launch.tune_runner``)."""

import functools
import time
from collections.abc import Callable, Sequence

from carft_ray import files
from carft_ray.data.sets import forget_listings
from carft_ray.errors import StorageError
from carft_ray.launch.cluster.capacity import AtATime, Capacity
from carft_ray.launch.cluster.ray_errors import explained, full_text
from carft_ray.launch.driver import Driver
from carft_ray.launch.events import ConcurrencyChanged, Event
from carft_ray.launch.leaks import Leaks
from carft_ray.launch.nodes import BadNodes, Drains, present_capacity
from carft_ray.launch.stop import stop_on_signal
from carft_ray.launch.tune_runner import run_with_tune
from carft_ray.launch.workers.mailbox import Exchange
from carft_ray.launch.workers.runtime import Runtime
from carft_ray.launch.workers.worker import end_process, run_worker
from carft_ray.layout import STOP
from carft_ray.store.copy import ALL
from carft_ray.study.holding import take_back_stop
from carft_ray.study.study import Study
from carft_ray.study.training import TrialSpec
from carft_ray.training.run_context import RunContext

STOPPED = "stopped on request"


def run_trainings(
    study: Study,
    runtime: Runtime,
    on_event: Callable[[Event], None],
    began: float | None = None,
) -> str:
    """Runs what a recovered study proposes, until nothing is left or a stop is asked for.

    Args:
        study: The study; what was prepared lies in its folder.
        runtime: How and where trainings run.
        on_event: Given what happens, in the calling thread.
        began: When the search began (``time.monotonic``), from which its budget counts; None: it has no budget.

    Returns:
        What ended it before all was done: ``STOPPED``, or which limit of the budget. Empty otherwise.

    Raises:
        CarftError: What ended the run before its time (``Driver.failure``); a ``ClusterError`` when it was Ray.
    """
    forget_listings()
    for spec in study.waiting if not runtime.bucket else ():  # nodes that use the bucket get what they go on from
        study.log.store.bring(spec.training, ALL)
    capacity = runtime.capacity
    drains = None if runtime.in_process else Drains()
    driver = Driver(
        study,
        AtATime(
            capacity.concurrency,
            capacity.asked,
            capacity.reason,
            capacity.one_node,
            functools.partial(_capacity_now, runtime, drains) if runtime.attached else None,
            lambda concurrency, reason: on_event(ConcurrencyChanged(concurrency, reason)),
        ),
        on_event,
        capacity.num_workers * capacity.gpus_per_worker,
        None if began is None else study.recipe.budget,
        time.monotonic() if began is None else began,
        hang_timeout_s=None if runtime.in_process else study.recipe.resources.hang_timeout_s,
        end_process=end_process,
        leaks=Leaks() if runtime.nested else None,
        bad_nodes=BadNodes(fits=lambda without: _capacity_now(runtime, drains, without).concurrency > 0),
        drains=drains,
        exchange=Exchange(runtime.mailbox),
    )
    with stop_on_signal(study.stop.ask), driver.exchange.going_on():
        if runtime.in_process:
            _run_here(driver, runtime)
        else:
            run_with_tune(driver, runtime)
    if driver.failure is not None:
        raise driver.failure
    if study.done() and not driver.has_stopped:  # what asked to stop came too late
        files.remove(study.study_dir / STOP)
        take_back_stop(study.log)
        return ""
    return driver.out_of_budget or (STOPPED if driver.check_stop() else "")


def _capacity_now(runtime: Runtime, drains: Drains | None, without: Sequence[str] = ()) -> Capacity:
    """Returns how trainings fit now on the nodes that stay, without some of them."""
    gone = {*without, *(drains.nodes() if drains else ())}
    return present_capacity(runtime.recipe, runtime.may_grow, gone)


def _run_here(driver: Driver, runtime: Runtime) -> None:
    """Runs one training after the other in this process."""
    key = "training"
    while (spec := driver.propose(key)) is not None:
        driver.started(key)
        context = RunContext(should_stop=functools.partial(_poll, driver, spec))
        gone = ""
        try:
            run_worker(runtime, spec, context)
        except (MemoryError, RuntimeError) as error:  # with Ray it would end the process
            gone = explained(full_text(error))
        driver.ended(key, gone)


def _poll(driver: Driver, spec: TrialSpec) -> bool:
    """Polls within a training of this process; tells whether it is to end, without the way through the mailbox."""
    try:
        driver.poll()
    except StorageError:  # the driver keeps it: another search has the study
        return True
    return driver.check_stop() or driver.exchange.ordered(spec.training) != "go"
