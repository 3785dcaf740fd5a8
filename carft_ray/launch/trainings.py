"""Trainings of an open study on a running Ray: the loop of Tune that a search and a confirm share."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

from ray import tune

from carft_ray.data.readers import forget_listings
from carft_ray.errors import CarftError, ClusterError, Problem
from carft_ray.launch.causes import root_cause
from carft_ray.launch.events import Event
from carft_ray.launch.executors import RAY_FILES, Plan, tune_trainable
from carft_ray.launch.host_memory import one_trial_dies
from carft_ray.launch.leaks import Leaks
from carft_ray.launch.searcher import StudySearcher, Watcher
from carft_ray.launch.signals import stop_file_on_signal
from carft_ray.launch.waiting import why_waiting
from carft_ray.search.folder import STOP
from carft_ray.search.study import Study

STOPPED = "stopped on request"


def run_trainings(study: Study, plan: Plan, on_event: Callable[[Event], None], began: float | None = None) -> str:
    """Runs what an adopted study proposes, until nothing is left or a stop is asked for.

    Args:
        study: The study; what was prepared lies in its folder.
        plan: How and where trainings run.
        on_event: Told what happens, in the calling thread.
        began: When the search began (``time.monotonic``), from which its budget counts; None: it has no budget.

    Returns:
        What ended it before all was done: ``STOPPED``, or which limit of the budget. Empty otherwise.

    Raises:
        CarftError: What ended the run before its time (``StudySearcher.failure``); a ``ClusterError`` when it was Ray.
    """
    forget_listings()
    study_dir, room = study.study_dir, plan.capacity
    budget, gpus = None if began is None else study.recipe.budget, room.num_workers * room.gpus_per_worker
    searcher = StudySearcher(study, room.concurrency, on_event, gpus, budget, began)
    leaks = Leaks(study_dir) if plan.nested else None
    watcher = Watcher(searcher, study.recipe.resources.hang_timeout_s, leaks, functools.partial(why_waiting, room))
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(room.concurrency)  # else actors start one after the other
    ray_files = study_dir / RAY_FILES
    shutil.rmtree(ray_files, ignore_errors=True)  # of a search that was killed
    try:
        tuner = tune.Tuner(
            tune_trainable(plan),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,  # until the searcher says FINISHED
                reuse_actors=True,
                trial_name_creator=_tune_name,
                trial_dirname_creator=_tune_name,
            ),
            run_config=tune.RunConfig(name="search", storage_path=str(ray_files), verbose=0, callbacks=[watcher]),
        )
        with stop_file_on_signal(study_dir / STOP), one_trial_dies():
            tuner.fit()
    except Exception as error:
        if searcher.failure is None and not isinstance(error, CarftError):
            step = "Run it again with --debug to see where."
            problem = Problem("search", "Ray must run it to its end", root_cause(error), next_step=step)
            searcher.failure = ClusterError(problem)
            searcher.failure.__cause__ = error
        searcher.failure = searcher.failure or error
    if not study.taken_over:
        shutil.rmtree(ray_files, ignore_errors=True)
    if searcher.failure is not None:
        raise searcher.failure
    return searcher.out_of_budget or (STOPPED if searcher.stopped else "")


def _tune_name(tune_trial: Any) -> str:
    spec = tune_trial.config["spec"]
    return f"{spec['name']}-{spec['attempt']}"
