"""Attempts at trainings in processes of their own, as a trial runs them, without Ray: forks of one that has it all."""

import itertools
import multiprocessing
import os
import resource
import sys
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.managers import BaseManager

import pytest
import stand_in
import torch
from crash_host import PYTHONPATH
from study_steps import searching

from carft_ray.errors import OutOfMemoryError
from carft_ray.launch.cluster.capacity import AtATime, Node
from carft_ray.launch.driver import Driver
from carft_ray.launch.workers.mailbox import Exchange, Mailbox
from carft_ray.launch.workers.runtime import Runner, make_runtime
from carft_ray.launch.workers.worker import run_worker
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.training import run
from carft_ray.training.out_of_memory import micro_batch_of, shortage
from carft_ray.training.run_context import RunContext

STAND_IN = Runner(stand_in.prepare, stand_in.train)
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["warm_training"])


def sandbox_recipe(trials=2, **train):
    """Real trainings of half a second; one forward and backward pass of a whole batch takes some 80 MB."""
    images = {"source": "sandbox", "domain": "photo", "num_per_class": 32}
    few = {**images, "num_per_class": 4}
    return Recipe.model_validate(
        {
            "data": {
                "train": {**images, "split": "train"},
                "id_val": {**images, "split": "val"},
                "ood_val": {"painting": {**few, "domain": "painting", "split": "val"}},
            },
            "train": {"epochs": 2, "batch_size": 512, "kl_weight": 0.0, "learning_rate": 1e-3, **train},
            "evaluate": {"batch_size": 512},
            "search": {
                "trials": trials,
                "space": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
                "alpha": {"grid": [0, 0.5, 1]},
            },
            "resources": {"threads": 1, "gpus_per_worker": 0},
        }
    )


def capped(megabytes, *args):
    """A real training in a process that may take so much more memory than it has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, resource.RLIM_INFINITY))
    return run.run_training(*args)


def without_memory(recipe, *args):
    """A training for which not even one image fits."""
    micro_batch = micro_batch_of(recipe.train, 1)
    raise OutOfMemoryError(shortage("training", micro_batch, 32, torch.device("cpu")), micro_batch)


class Mailboxes(BaseManager):
    """A process with mailboxes that others reach."""


Mailboxes.register("Mailbox", Mailbox)


def plan_of(study, runner=STAND_IN, **more):
    return replace(make_runtime(study.recipe, study.study_dir, (Node(2, 0),), runner), **more)


def start(plan, spec):
    """Starts an attempt; returns its process."""
    return forked(_attempt, plan, spec)


def ready():
    """Starts the process that is forked, once. It finds the modules here.

    Its threads reserve no memory of their own, which a limit on the address space would count.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", PYTHONPATH)
        patched.setenv("MALLOC_ARENA_MAX", "1")
        forkserver.ensure_running()


def forked(function, *args):
    """Starts a module's function in a process that has torch and all loaded; returns the process."""
    ready()
    process = _forks.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def _attempt(plan, spec):
    try:
        run_worker(plan, spec, RunContext())
    except Exception as error:  # what Tune would tell
        print(type(error).__name__, error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def search(study_dir, recipe, runner=STAND_IN):
    """Runs a search, one attempt after the other; returns its driver and what it told."""
    events = []
    ready()
    with searching(study_dir, recipe) as study, Mailboxes(ctx=_forks) as mailboxes:
        box = mailboxes.Mailbox()
        plan = plan_of(study, runner, mailbox=box)
        driver = Driver(study, AtATime(1), events.append, exchange=Exchange(box))
        keys = map(str, itertools.count())
        while spec := driver.propose(key := next(keys)):
            driver.started(key)
            start(plan, spec).join()
            driver.ended(key)
    return driver, events
