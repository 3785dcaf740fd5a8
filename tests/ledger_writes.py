"""One line for the ledger of a study, as a command writes it: for the tests that kill it everywhere.

``crash_host.py`` calls it as its program.
"""

import gc
import shutil
from pathlib import Path

import stand_in
from logs import holding

from carft_ray.study.ledger import record


def import_everything():
    gc.collect()
    gc.freeze()
    gc.disable()


def call(argv):
    """Writes a line: ``[STUDY_DIR, REASON, TEMPLATE]``; the study is copied from the template when it is not there."""
    study_dir, reason, template = Path(argv[0]).absolute(), argv[1], Path(argv[2])
    if not study_dir.exists():
        shutil.copytree(template, study_dir)
    with holding(study_dir) as log:
        record(study_dir, log, stand_in.make_recipe(), "test", ("id_test",), {"rows": [1, 2]}, reason)
    return 0
