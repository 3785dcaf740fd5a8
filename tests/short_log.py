"""A short search in a log, with no training; what happens to its store, and what is read there."""

import functools
import itertools
import json

import optuna
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from carft_ray.store.bucket import Bucket
from carft_ray.store.folder import Folder
from carft_ray.store.log import Log

NUM_TRIALS = 2
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Clock:
    """Time that passes only while somebody sleeps; ``meanwhile`` happens then."""

    def __init__(self, meanwhile=lambda: None):
        self.now, self.meanwhile = 1000.0, meanwhile

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


class Struck(Folder):
    """A folder that something happens to: ``strike(number, name, call)`` in place of its n-th operation, from 1."""

    def __init__(self, path, strike):
        super().__init__(path)
        for name in ("get", "put_new", "put", "list", "remove"):
            setattr(self, name, functools.partial(self._call, name, getattr(self, name)))
        self._strike, self._count = strike, itertools.count(1)

    def _call(self, name, method, *arguments, **named):
        return self._strike(next(self._count), name, lambda: method(*arguments, **named))


def log_of(store, clock=None):
    clock = clock or Clock()
    return Log(store, clock, clock.sleep)


def claimed(store, clock=None, **me):
    log = log_of(store, clock)
    log.claim(**me)
    return log


def search(log, committed=lambda number: None):
    """A short search, from wherever the log has it; ``committed`` is told after each commit."""
    storage = JournalStorage(log)

    def of(name):
        return optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))

    with log.commit():
        known = optuna.get_all_study_names(storage)
        for name in {"search", "baselines"} - set(known):
            optuna.create_study(study_name=name, storage=storage, direction="maximize")
    with log.commit():
        if not of("baselines").trials:
            of("baselines").add_trial(optuna.trial.create_trial(value=0.5, user_attrs={"name": "zero_shot"}))
            of("search").enqueue_trial({"x": 0.125})
    committed(log.number)
    while len(done := of("search").get_trials(states=[TrialState.COMPLETE])) < NUM_TRIALS:
        study = of("search")
        running = study.get_trials(states=[TrialState.RUNNING])
        if not running:
            with log.commit({"kind": "started", "number": len(done)}):
                study.sampler = optuna.samplers.RandomSampler(seed=len(done))
                trial = study.ask()
                trial.suggest_float("x", 0, 1)
                trial.suggest_categorical("form", ["a", "b"])
                trial.set_user_attr("name", f"t{len(done):04d}")
        elif not running[0].intermediate_values:
            with log.commit():
                optuna.trial.Trial(study, running[0]._trial_id).report(running[0].params["x"] / 2, 50)
        else:
            with log.commit({"kind": "ended", "number": len(done)}):
                trial = optuna.trial.Trial(study, running[0]._trial_id)
                trial.set_user_attr("metrics", {"id_accuracy": running[0].params["x"]})
                study.tell(running[0].number, running[0].params["x"])
        committed(log.number)
    return log


def state(log):
    """All that a study knows, as text; without times, as in a search that was killed they are others."""
    storage, found = JournalStorage(log), {}
    for study in storage.get_all_studies():
        rows = storage.get_all_trials(study._study_id)
        found[study.study_name] = [
            (t.number, t.state.name, t.values, t.params, t.user_attrs, t.system_attrs, t.intermediate_values)
            for t in rows
        ]
    own = [record for _, record in log.records if record["kind"] not in ("owner", "released")]
    return json.dumps([found, own], sort_keys=True)


def read(store):
    log = log_of(store)
    log.follow()
    return log


def in_bucket(server):
    return Bucket(server.address("study"))


def commit(log, *kinds):
    """Makes a commit of records of these kinds."""
    log.write(*({"kind": kind} for kind in kinds))


def kinds(store):
    return [record["kind"] for _, record in read(store).records]
