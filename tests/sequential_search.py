"""A search of stand-in trainings, one after the other, without Ray and torch: for the tests that kill it everywhere.

``crash_host.py`` calls it as its program. It does what the search does: opens, recovers, and settles by the files.
"""

import gc
import json
import sys
from pathlib import Path

import stand_in

from carft_ray import files
from carft_ray.errors import CarftError, DivergedError, InterruptedRunError
from carft_ray.recipe.trial_values import apply
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import Failure
from carft_ray.study.recovery import recover_running
from carft_ray.training.run_context import RunContext

DIVERGES = 2  # number of the trial that does
EPOCHS = 3
SEARCH = {
    "keep_checkpoints": 2,
    "sampler": {"name": "tpe", "startup_trials": 2},
    "pruner": {"name": "median", "startup_trials": 2},
    "evaluate": {"every_epochs": 1},
}


def import_everything():
    import numpy.ma
    import numpy.random
    import optuna.samplers._tpe.sampler

    assert numpy, optuna
    gc.collect()
    gc.freeze()
    gc.disable()


def call(argv):
    """Searches in a folder: ``[STUDY_DIR, TRIALS]``; returns the exit code."""
    study_dir, num_trials = Path(argv[0]), int(argv[1])
    recipe = stand_in.make_recipe(num_trials, epochs=EPOCHS, **SEARCH)
    try:
        with open_study(study_dir, recipe) as study:
            told = recover_running(study)
            prepared = study.study_dir / "prepared"
            study.add_zero_shot(stand_in.prepare(recipe, prepared))
            while (spec := study.next()) is not None:
                row = study.settle(spec, attempt(study, spec, prepared))
                assert row is not None
                told.append(row)
            print(*study.notes, sep="\n")
            print("told", *[row.name for row in told])
    except CarftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def attempt(study, spec, prepared):
    """One training, as a worker runs it, and what the driver does meanwhile: it looks, and the worker sees a cut.

    Returns:
        How it failed, if it did.
    """
    folder = spec.folder(study.study_dir)
    spec.place(study.study_dir).mkdir(parents=True, exist_ok=True)

    cuts = []

    def should_stop():
        for line in files.read_json_lines(folder / "metrics.jsonl"):
            cuts.append(study.report(spec, line))
        return any(cuts)

    def report(row):
        files.append_line(spec.place(study.study_dir) / "rows.jsonl", json.dumps(row))
        study.add_row(spec, row)

    context = RunContext(report=report, should_stop=should_stop)
    try:
        stand_in.train(apply(study.recipe, spec.values), folder, prepared, context, spec.attempt)
    except InterruptedRunError:
        pass
    except DivergedError as error:
        return Failure("diverged", str(error), spec.attempt, error.exit_code, details="Traceback ...")
    return None
