"""Trainings of an open study: what a search and a confirm share. Ray Tune runs them, or this process (``debug``).

Both ask the ``Driver`` what comes next and report to it what has ended. Tune gets no metric: a report without it would
end the whole run. It saves nothing of this; the study on disk is the truth.
"""

import dataclasses
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from carft_ray import files
from carft_ray.data.readers import forget_listings
from carft_ray.errors import CarftError, ClusterError, Problem, StorageError
from carft_ray.launch.driver import Driver
from carft_ray.launch.events import ConcurrencyChanged, Event
from carft_ray.launch.failures.causes import error_of, explained, full_text, root_cause
from carft_ray.launch.failures.leaks import Leaks
from carft_ray.launch.mailbox import Exchange
from carft_ray.launch.ray_cluster.concurrency import AtATime, Capacity
from carft_ray.launch.ray_cluster.drains import Drains
from carft_ray.launch.ray_cluster.growth import present_capacity
from carft_ray.launch.ray_cluster.nodes import BadNodes
from carft_ray.launch.ray_cluster.ray_private import one_trial_dies
from carft_ray.launch.ray_workers import tune_trainable
from carft_ray.launch.runtime import Runtime
from carft_ray.launch.stop import stop_on_signal
from carft_ray.launch.worker import end_process, run_worker
from carft_ray.layout import STOP
from carft_ray.study.holding import take_back_stop
from carft_ray.study.mirror import ALL
from carft_ray.study.outcome import TrialSpec
from carft_ray.study.study import Study
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
            _run_with_tune(driver, runtime)
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


def _run_with_tune(driver: Driver, runtime: Runtime) -> None:
    """Has Ray Tune run the trainings; what goes wrong is the driver's ``failure``."""
    searcher, ray_files = DriverSearcher(driver), tempfile.mkdtemp(prefix="carft-tune-")
    try:
        tuner = tune.Tuner(
            tune_trainable(runtime),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,  # until the searcher says FINISHED
                reuse_actors=True,
                trial_name_creator=_tune_name,
                trial_dirname_creator=_tune_name,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=ray_files,
                verbose=0,
                callbacks=[DriverCallback(driver, searcher)],
                stop=EndOfWaiting(driver),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        with one_trial_dies():
            tuner.fit()
        driver.end_waiting()
        if driver.leaks:
            driver.leaks.clear()  # Ray keeps that of a group which got its resources while its trial was ended
    except Exception as error:
        driver.failure = driver.failure or (error if isinstance(error, CarftError) else _ray_error(error))
    finally:
        shutil.rmtree(ray_files, ignore_errors=True)


def _ray_error(error: Exception) -> ClusterError:
    step = "Run it again with --debug to see where."
    found = ClusterError(Problem("search", "Ray must run it to its end", root_cause(error), next_step=step))
    found.__cause__ = error
    return found


class DriverSearcher(Searcher):
    """Answers Tune from the driver. Concurrency and the end of the search are the driver's, too."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver
        self._trials: list[Any] = []

    def see(self, trials: list[Any]) -> None:
        """Takes Tune's list of its trials."""
        self._trials = trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a text
        """Returns what to run next; None to be asked again; ``FINISHED`` at the end. Never None with nothing live."""
        for trial in self._trials:  # what has ended without a message: a reused actor that could not be reset
            if trial.status in ("TERMINATED", "ERROR") and self._driver.holds(trial.trial_id):
                self.on_trial_complete(trial.trial_id, error=True)
        spec = self._driver.propose(trial_id)
        if spec is None:
            return None if self._driver.live else Searcher.FINISHED
        where = {"avoid": self._driver.avoided(), "one_node": self._driver.at_a_time.one_node}
        return {"spec": dataclasses.asdict(spec), **where}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Reports it to the driver."""
        told = result or {}
        gone = str(told.get("lost", ""))
        if error:
            trial = next((trial for trial in self._trials if trial.trial_id == trial_id), None)
            gone = "" if trial is None else explained(error_of(trial))
        self._driver.ended(trial_id, gone, told.get("dead_rank"))

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Says that the limit is ours."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Reads nothing."""


class DriverCallback(tune.Callback):
    """Has the driver poll what runs, in Tune's loop."""

    def __init__(self, driver: Driver, searcher: DriverSearcher) -> None:
        self._driver = driver
        self._searcher = searcher

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Reads the files."""
        self._searcher.see(trials)
        self._driver.poll()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Reports that a training begins."""
        self._driver.started(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Suspects that a trial whose process died has left a placement group."""
        if self._driver.leaks:
            self._driver.leaks.suspect()


class EndOfWaiting(tune.Stopper):
    """Ends Tune's run when a stop was asked for and what is left waits for nodes, which may never come."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Ends no trial by itself."""
        return False

    def stop_all(self) -> bool:
        """Asks the driver."""
        return self._driver.only_waits


def _tune_name(tune_trial: Any) -> str:
    spec = tune_trial.config["spec"]
    return f"{spec['name']}-{spec['attempt']}"
