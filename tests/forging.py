"""Results that a test has changed, recorded as if trainings had left them so: who owns a study can do that."""

import json

from logs import replace

from carft_ray import files
from carft_ray.layout import MANIFEST, RESULT
from carft_ray.store.attempt_files import read_result, sha256
from carft_ray.store.log import log_of
from carft_ray.study import ledger, records
from carft_ray.study.snapshot import snapshot


def record(study_dir):
    """Writes hashes of what lies in the folders of a study into its results, and those of the results into its log."""
    for row in [row for row in snapshot(study_dir).rows if row.digest]:
        place = row.place(study_dir)
        content = json.loads((place / RESULT).read_text())
        for name, kept in content["files"].items():
            if (place / name).exists():
                kept |= {"bytes": (place / name).stat().st_size, "sha256": sha256(place / name)}
        files.write_json(place / RESULT, content)
        replace(study_dir, row.digest, read_result(place)[1])
    manifest = files.read_json(study_dir, MANIFEST)
    if records.LEDGER in manifest:
        log = log_of(study_dir)
        note = ledger._note(log, ledger._entries(log))
        files.write_json(study_dir / MANIFEST, {**manifest, records.LEDGER: note})
