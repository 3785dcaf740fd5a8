"""Steps of a search without its trainings: a study that is open, results as trainings leave them, what Optuna knows."""

import contextlib

import optuna
from optuna.storages import JournalStorage

from carft_ray.store import attempt_files
from carft_ray.store.log import log_of
from carft_ray.study.opening import open_study
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_running
from carft_ray.study.training import Failure


@contextlib.contextmanager
def searching(study_dir, recipe, *change_space):
    """Opens a study as a search does, and recovers what an earlier one has left."""
    with open_study(study_dir, recipe, *change_space) as study:
        recover_running(study)
        yield study


def write_result(study_dir, spec, value=0.5, **more):
    content = {"objective": value, "alpha": 0.4, "metrics": {"id_accuracy": 0.7}, "elapsed_s": 2.0}
    attempt_files.write_result(spec.place(study_dir), {**content, **more})


def finish(study, spec, value=0.5, **more):
    """Ends an attempt with a result; returns the row."""
    write_result(study.study_dir, spec, value, **more)
    return study.settle(spec)


def failed(spec, outcome, reason="because"):
    return Failure(outcome, reason, spec.attempt, 4, details="Traceback ...")


def run_all(study, value=lambda spec: 0.5):
    """Runs what is left to its end; returns the specs."""
    specs = []
    while (spec := study.next()) is not None:
        assert finish(study, spec, value(spec)) is not None
        specs.append(spec)
    return specs


def run_search(study_dir, recipe, value=lambda spec: 0.5):
    """Searches to the end; returns the specs."""
    with searching(study_dir, recipe) as study:
        return run_all(study, value)


def optuna_study(study_dir, name="search"):
    return optuna.load_study(storage=JournalStorage(log_of(study_dir)), study_name=name)


def told(study_dir):
    """All that a study tells of its trials and baselines, without times and attempts."""
    return [
        (row.kind, row.name, row.values, row.outcome, row.reason, row.objective, row.alpha, row.intermediate_values)
        for row in snapshot(study_dir).rows
    ]


def contents(folder):
    """Content of all files in a folder, by path."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
