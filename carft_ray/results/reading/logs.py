"""The log of one training of a study, whole or as it grows."""

import time
from collections.abc import Iterator
from pathlib import Path

from carft_ray import files
from carft_ray.layout import LOG
from carft_ray.results.reading.study_view import Overview, find_row
from carft_ray.study.holding import log_of
from carft_ray.study.mirror import NUMBERS, Place, fetched
from carft_ray.study.outcome import TrialRow
from carft_ray.study.rows import all_rows, readable

READ_EVERY_S = 0.5


def find_log(overview: Overview, written: str) -> tuple[TrialRow, Path]:
    """Returns the trial, baseline or training of a confirm that a user means, and the path of its log.

    The log need not be there yet.

    Raises:
        UsageError: There is no such trial.
    """
    rows = [row for row in overview.confirmations if row.name == written]  # these have no numbers to be called by
    row = rows[0] if rows else find_row([*overview.baselines, *overview.trials], written)
    return row, row.folder(overview.study_dir) / LOG


def read_log(path: Path) -> list[str] | None:
    """Returns the lines of a log, or None when there is none yet.

    Raises:
        StorageError: It cannot be read.
    """
    content = _content(path)
    return None if content is None else content.decode(errors="replace").splitlines()


def follow_log(path: Path, place: Place) -> Iterator[str]:
    """Yields the whole lines of a log, old ones and new ones, until its training has ended or no search is left.

    Raises:
        StorageError: It cannot be read.
    """
    study_dir = fetched(place, NUMBERS).resolve()
    position, log = 0, log_of(study_dir)
    with readable(log) as storage:
        over = False
        while not over:
            fetched(place, NUMBERS)
            if not position or log.follow():  # before the last reading
                rows = [row for group in all_rows(storage).values() for row in group]
                over = any(row.folder(study_dir) == path.parent and row.outcome != "running" for row in rows)
            over = over or log.holder() is None
            content = _content(path, position) or b""
            whole = content if over else content[: content.rfind(b"\n") + 1]
            position += len(whole)
            yield from whole.decode(errors="replace").splitlines()
            if not over:
                time.sleep(READ_EVERY_S)


def _content(path: Path, position: int = 0) -> bytes | None:
    try:
        with open(path, "rb") as file:
            file.seek(position)
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.storage_error(path, error) from error
