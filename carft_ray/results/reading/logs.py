"""The log of one training of a study, whole or as it grows."""

import time
from collections.abc import Iterator
from pathlib import Path

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.layout import LOG
from carft_ray.results.reading.study_view import Overview, find_row
from carft_ray.store.copy import STATE
from carft_ray.store.log import log_of
from carft_ray.study.place import Place, bring, fetched
from carft_ray.study.rows import all_rows, readable
from carft_ray.study.training import TrialRow
from carft_ray.untrusted import MOST_TEXT_BYTES

READ_EVERY_S = 0.5


def find_training(overview: Overview, written: str) -> TrialRow:
    """Returns the trial, baseline or training of a confirm that a user means.

    Raises:
        UsageError: There is no such trial.
    """
    rows = [row for row in overview.confirmations if row.name == written]  # these have no numbers to be called by
    return rows[0] if rows else find_row([*overview.baselines, *overview.trials], written)


def read_log(study_dir: Path, training: str) -> list[str] | None:
    """Returns the lines of a log, or None when there is none yet.

    Args:
        study_dir: The study directory.
        training: Folder of the training within the study (``TrialSpec.training``).

    Raises:
        StorageError: It cannot be read, or is larger than ``untrusted.MOST_TEXT_BYTES``.
    """
    content = _content(study_dir, training)
    if content is not None and len(content) > MOST_TEXT_BYTES:
        rule = f"must have at most {MOST_TEXT_BYTES:,} bytes, since it is read whole"
        raise StorageError(Problem(str(study_dir / training / LOG), rule))
    return None if content is None else content.decode(errors="replace").splitlines()


def follow_log(place: Place, training: str) -> Iterator[str]:
    """Yields the whole lines of a log, old ones and new ones, until its training has ended or no search is left.

    Raises:
        StorageError: It cannot be read.
    """
    study_dir = fetched(place, STATE).resolve()
    position, log = 0, log_of(study_dir)
    with readable(log) as storage:
        over = False
        while not over:
            fetched(place, STATE)
            bring(study_dir, [f"{training}/{LOG}"])
            if not position or log.follow():  # before the last reading
                rows = [row for group in all_rows(storage).values() for row in group]
                over = any(row.training == training and row.outcome != "running" for row in rows)
            over = over or log.holder() is None
            content = _content(study_dir, training, position) or b""
            whole = content if over else content[: content.rfind(b"\n") + 1]
            position += len(whole)
            yield from whole.decode(errors="replace").splitlines()
            if not over:
                time.sleep(READ_EVERY_S)


def _content(study_dir: Path, training: str, position: int = 0) -> bytes | None:
    name = f"{training}/{LOG}"
    try:
        with files.open_inside(study_dir, name) as file:
            file.seek(position)
            return file.read(MOST_TEXT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.storage_error(study_dir / name, error, "must be readable") from error
