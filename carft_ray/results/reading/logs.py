"""The log of one training of a study, whole or as it grows."""

import time
from collections.abc import Iterator
from pathlib import Path

from carft_ray import files
from carft_ray.layout import ATTEMPT, CUT, ERROR, HEARTBEAT, LOG, RESULT
from carft_ray.results.reading.study_view import Overview, find_row
from carft_ray.study.holding import log_of
from carft_ray.study.outcome import TrialRow

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


def follow_log(path: Path, study_dir: Path) -> Iterator[str]:
    """Yields the whole lines of a log, old ones and new ones, until its training has ended or no search is left.

    Raises:
        StorageError: It cannot be read.
    """
    position, log = 0, log_of(study_dir)
    while True:
        over = _ended(path.parent) or log.holder() is None  # before the last reading
        content = _content(path, position) or b""
        whole = content if over else content[: content.rfind(b"\n") + 1]
        position += len(whole)
        yield from whole.decode(errors="replace").splitlines()
        if over:
            return
        time.sleep(READ_EVERY_S)
        log.follow()


def _content(path: Path, position: int = 0) -> bytes | None:
    try:
        with open(path, "rb") as file:
            file.seek(position)
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.storage_error(path, error) from error


def _ended(folder: Path) -> bool:
    """Returns whether a training has finished, was cut or diverged; other failures may be followed by an attempt."""
    failure = files.read_json(folder / ERROR) if (folder / ERROR).exists() else {}
    was_cut = (folder / CUT).exists() and not (folder / HEARTBEAT).exists()
    return any(folder.glob(f"{ATTEMPT}*/{RESULT}")) or was_cut or failure.get("outcome") == "diverged"
