"""Ray Tune as the pool of processes: it asks the ``Driver`` what comes next, and reports to it what has ended.

A Tune trial runs a training itself, or has a Ray Train group run it (``launch.workers.group``); the loop is the same.
Tune gets no metric: a report without it would end the whole run. It saves nothing of this; the study on disk is the
truth.

A training is stopped by an order that rank 0 reads from the mailbox; so nothing is ever stopped from outside, where Ray
leaks placement groups. A training writes its results into its folder before it ends; Ray carries none.
"""

import contextlib
import dataclasses
import shutil
import tempfile
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from carft_ray.errors import CarftError, ClusterError, Problem
from carft_ray.launch.cluster.cluster import HEAD_ONLY
from carft_ray.launch.cluster.ray_errors import error_of, explained, root_cause
from carft_ray.launch.cluster.ray_private import one_trial_dies
from carft_ray.launch.driver import Driver
from carft_ray.launch.workers.group import NestedTrial, anywhere_but
from carft_ray.launch.workers.runtime import Runtime
from carft_ray.launch.workers.worker import run_worker
from carft_ray.study.training import Failure, TrialSpec
from carft_ray.training.run_context import RunContext


def run_with_tune(driver: Driver, runtime: Runtime) -> None:
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
        with contextlib.suppress(Exception):  # Ray may be gone
            if driver.leaks:
                driver.leaks.clear()
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


def tune_trainable(runtime: Runtime) -> Any:
    """Returns the Tune trainable, with its resources.

    Its ``config`` holds ``spec``, the fields of a ``TrialSpec``; ``avoid``, Ray's names of nodes that are left out; and
    ``one_node``, as of ``Capacity``, for a group of workers.
    It reports once, at the end: ``lost`` says why its workers are gone, ``dead_rank`` which of them has died. Without a
    report Tune prints a line.
    """
    if runtime.nested:
        return tune.with_resources(tune.with_parameters(NestedTrial, runtime=runtime), HEAD_ONLY)

    def inline_trial(config: dict[str, Any]) -> dict[str, str]:
        spec = TrialSpec(**config["spec"])
        ended = run_worker(runtime, spec, RunContext())
        # Ray ends the process, and with it what it held and a CUDA that has failed, which a process keeps for good
        if isinstance(ended, Failure) and ended.outcome in ("memory", "lost"):
            raise RuntimeError(f"{spec.name}: {ended.reason}")
        return {"lost": ""}

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        where: dict[str, Any] = {"bundle_label_selector": [anywhere_but(config["avoid"])]} if config["avoid"] else {}
        return tune.PlacementGroupFactory([runtime.capacity.worker_resources], **where)

    return tune.with_resources(inline_trial, resources)
