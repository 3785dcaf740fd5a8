"""A search and a confirm of stand-in trainings by the executor ``debug``, as a program of ``crash_host``.

    search STUDY TRIALS     ``carft_ray.search``
    resume STUDY TRIALS     ``carft_ray.resume``: its continuation with more trials
    confirm STUDY           ``carft_ray.confirm``: its best trial and its baseline with two fresh seeds
    look STUDY              prints what the study knows, as JSON, and changes nothing
    halves STUDY            prints which files are half written
    fill DISK KILOBYTES     fills a disk but for so much
    clear DISK              removes what ``fill`` has written

STUDY is a folder or an address. Every look of the driver is made at once, so that what is written, and in which order,
is the same each time; into a bucket nothing goes on the side. No figure is drawn.

As a program of its own, ``python debug_search.py search STUDY TRIALS EXECUTOR [NUMBER MOMENT KIND]``, a search has
another executor, and kills itself as the counter of ``crash_host`` has it.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import crash_host
import numpy as np
import stand_in
from logs import has_begun
from report_studies import predictions

import carft_ray
from carft_ray.errors import CarftError, UsageError
from carft_ray.evaluation.predictions import write_predictions
from carft_ray.launch import driver
from carft_ray.launch.workers import worker
from carft_ray.launch.workers.runtime import Runner
from carft_ray.layout import PREDICTIONS, ZERO_SHOT_TABLE
from carft_ray.results import figure
from carft_ray.store.copy import NUMBERS
from carft_ray.study import uploads
from carft_ray.study.place import fetched
from carft_ray.study.snapshot import snapshot

EPOCHS = 3
SEARCH = {
    "train": {"batch_size": 8},
    "sampler": {"name": "tpe", "startup_trials": 2},
    "pruner": {"name": "median", "startup_trials": 2},
    "evaluate": {"every_epochs": 1},
    "resources": {"executor": "debug"},
}


def prepare(recipe, folder, say=None, made_of=None):
    """As ``stand_in.prepare``, with predictions for the lines at the end of a search."""
    found = stand_in.prepare(recipe, folder, say)
    store(recipe, folder / ZERO_SHOT_TABLE, 0.0)
    return found


def train(recipe, out_dir, prepared_dir, context, attempt):
    """As ``stand_in.train``, with predictions."""
    store(recipe, out_dir / f"attempt-{attempt}" / PREDICTIONS, 0.5)
    return stand_in.train(recipe, out_dir, prepared_dir, context, attempt)


def store(recipe, path, alpha):
    write_predictions(path, predictions(recipe.train, (alpha,), ("id_val",), np.random.default_rng(0)))


def import_everything():
    crash_host.import_everything()
    driver.POLL_EVERY_S, driver.POLL_SHARE = 0.0, 1.0
    uploads.UPLOAD_EVERY_S = 1000.0
    worker.RUNNER = Runner(prepare, train)
    figure.figure_at_the_end = lambda study, num_before: contextlib.nullcontext()


def told(study_dir):
    """Returns all trainings and the ledger as JSON holds them, without times and attempts."""
    if not has_begun(study_dir):
        return []
    study = snapshot(study_dir)
    found = [[row.kind, row.number, row.name, row.values, row.outcome, row.reason, row.objective] for row in study.rows]
    return json.loads(json.dumps(found + [["ledger", entry.purpose] for entry in study.ledger]))


def half_written(study_dir):
    """Returns temporary files, and files of JSON that are not whole."""
    found = [str(path) for path in study_dir.rglob("*.tmp")]
    for path in study_dir.rglob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            found.append(str(path))
    return found


def call(argv):
    what, place = argv[0], Path(argv[1])
    if what == "fill":
        free = os.statvfs(place)
        with open(place / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 1024 * int(argv[2]))
        return 0
    if what == "clear":
        (place / "filler").unlink()
        return 0
    if what == "halves":
        print(half_written(place))
        return 0
    try:
        if what == "look":
            found = []
            with contextlib.suppress(UsageError):  # there is no study yet
                found = told(fetched(argv[1], NUMBERS))
            print(json.dumps(found))
            return 0
        if what == "search":
            executor = {"resources": {"executor": argv[3]}} if argv[3:] else {}
            recipe = stand_in.make_recipe(int(argv[2]), epochs=EPOCHS, **{**SEARCH, **executor})
            carft_ray.search(recipe, argv[1], progress=False)
        elif what == "resume":
            carft_ray.resume(argv[1], argv[2], progress=False)
        else:
            carft_ray.confirm(argv[1], top=1, seeds=2, ablation=False, progress=False)
    except CarftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def main(argv):
    worker.RUNNER = Runner(prepare, train)
    if number := argv[4:]:
        crash_host.Counter(int(number[0]), *number[1:]).install()
    return call(argv[:4])


if __name__ == "__main__":
    import debug_search  # whose functions the workers of Ray import by this name

    sys.exit(debug_search.main(sys.argv[1:]))
