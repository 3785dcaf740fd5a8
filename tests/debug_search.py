"""A search and a confirm of stand-in trainings by the executor ``debug``, as a program of ``crash_host``.

    search STUDY TRIALS     a search, or its continuation with more trials
    confirm STUDY           its best trial and its baseline with two fresh seeds
    look STUDY              prints what the study knows, as JSON, and changes nothing
    halves STUDY            prints which files are half written
    fill DISK KILOBYTES     fills a disk but for so much
    clear DISK              removes what ``fill`` has written

STUDY is a folder or an address. Every look of the driver is made at once, so that what is written, and in which order,
is the same each time; into a bucket nothing goes on the side. No figure is drawn.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import crash_host
import stand_in

from carft_ray.errors import CarftError, UsageError
from carft_ray.launch import driver
from carft_ray.launch.command import Plan, run_confirm, run_search
from carft_ray.launch.runtime import Runner
from carft_ray.results import confirmation
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.copy import NUMBERS
from carft_ray.study import uploads
from carft_ray.study.holding import is_study
from carft_ray.study.ledger import read_ledger
from carft_ray.study.place import fetched, own_folder
from carft_ray.study.rows import baselines, confirmations, trials

EPOCHS = 3
SEARCH = {
    "sampler": {"name": "tpe", "startup_trials": 2},
    "pruner": {"name": "median", "startup_trials": 2},
    "evaluate": {"every_epochs": 1},
    "resources": {"executor": "debug"},
}
RUNNER = Runner(stand_in.prepare, stand_in.train)


def import_everything():
    crash_host.import_everything()
    driver.POLL_EVERY_S, driver.POLL_SHARE = 0.0, 1.0
    uploads.UPLOAD_EVERY_S = 1000.0


def told(study_dir):
    """Returns all trainings and the ledger as JSON holds them, without times and attempts."""
    if not is_study(study_dir):
        return []
    rows = [*trials(study_dir), *baselines(study_dir), *confirmations(study_dir)]
    found = [[row.kind, row.number, row.name, row.values, row.outcome, row.reason, row.objective] for row in rows]
    return json.loads(json.dumps(found + [["ledger", entry.purpose] for entry in read_ledger(study_dir)]))


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
        study_dir = own_folder(argv[1])
        if what == "search":
            recipe = stand_in.make_recipe(int(argv[2]), epochs=EPOCHS, **SEARCH)
            run_search(Plan(recipe, study_dir, runner=RUNNER))
        else:
            view = read_study(study_dir)
            stage, _ = confirmation.plan(view, 1, 2, ablation=False)
            fix = lambda study: confirmation.fix(study, view.recipe, stage, None)  # noqa: E731
            plan = Plan(view.recipe, study_dir, runner=RUNNER, given=fix, resume_command="the same command")
            run_confirm(plan, lambda: None)
    except CarftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
