"""What attempts at a training leave in its folder: results, rows, checkpoints, and the log of the training.

``result.json`` of an attempt means that it has finished. It is written last, whole, with size and hash of each file
that belongs to it. A worker writes it, the study reads it. A checkpoint is a folder ``step-*`` with ``state.json``:
without that file, a kill has left its folder, or a part of it.
"""

import contextlib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from carft_ray import files, untrusted
from carft_ray.errors import StorageError
from carft_ray.layout import ATTEMPT, LOG, METRICS, OF_RESULT, OWN, RESULT, ROWS, STATE, STEP, WEIGHTS

FORMAT_VERSION = 1
_CHECKPOINT = re.compile(rf"(.+)/{ATTEMPT}(\d+)/{STEP}(\d+)(/|$)")


def write_result(place: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the result of an attempt whose other files are there; returns all that is written.

    Args:
        place: Folder of the attempt.
        content: ``objective``, ``metrics``, and whatever else is known.

    Raises:
        StorageError: It cannot be written.
    """
    kept = {
        name: {"bytes": (place / name).stat().st_size, "sha256": sha256(place / name)}
        for name in OF_RESULT
        if files.exists(place / name)
    }
    written = {"format_version": FORMAT_VERSION, **content, "files": kept}
    files.write_json(place / RESULT, written)
    return written


def read_result(place: Path) -> tuple[dict[str, Any], str] | None:
    """Returns what ``write_result`` has written, and the SHA-256 of the file; None where it is not there or not valid.

    It is valid with a known version and a finite objective. Of its files, those that a study does not keep may be gone.
    """
    path = place / RESULT
    if not files.exists(path):
        return None
    data = files.read_whole(place, RESULT)
    content: Any = None
    with contextlib.suppress(ValueError):
        content = untrusted.require_plain(untrusted.parse_json(data))
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        return None
    objective = content.get("objective")
    valid = isinstance(objective, int | float) and math.isfinite(objective) and isinstance(content.get("metrics"), dict)
    return (content, hashlib.sha256(data).hexdigest()) if valid else None


def left(folder: Path, name: str) -> list[Path]:
    """Returns what the attempts at a training have left under a name, the newest last."""
    found = folder.glob(f"{ATTEMPT}*/{name}")
    return sorted(found, key=lambda path: (len(path.parent.name), path.parent.name))  # by their numbers


def checkpoints(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Returns ``((step, attempt), folder)`` of all checkpoints of a training, the newest first."""
    named = [(checkpoint_of(path.as_posix()), path) for path in left(folder, f"{STEP}*")]
    return sorted(((found[1], path) for found, path in named if found and files.exists(path / STATE)), reverse=True)


def checkpoint_of(name: str) -> tuple[str, tuple[int, int]] | None:
    """Returns training and ``(step, attempt)`` of the checkpoint that a file or folder of this name belongs to."""
    match = _CHECKPOINT.match(name)
    return (match[1], (int(match[3]), int(match[2]))) if match else None


def reported_rows(folder: Path) -> list[dict[str, Any]]:
    """Returns what the attempts at a training have reported, a row per epoch.

    What an attempt has reported from the first step of a later one on is void.
    """
    found: list[dict[str, Any]] = []
    for row in (row for path in left(folder, ROWS) for row in files.read_json_lines(path.parent, path.name)):
        if isinstance(row.get("step"), int | float):
            while found and found[-1]["step"] >= row["step"]:
                found.pop()
            found.append(row)
    return found


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file.

    Raises:
        StorageError: It cannot be read.
    """
    with files.writing(path), untrusted.open_regular(path, StorageError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it is a buffered file


def log_lost(folder: Path, attempt: int, reason: str, details: str = "") -> None:
    """Appends why an attempt was lost to the log of its training: the first cause, and what followed from it.

    Raises:
        StorageError: The log cannot be written.
    """
    append_log(folder, "\n".join([f"attempt {attempt}: lost: {reason}", *filter(None, [details.rstrip()])]))


def progress_of(folder: Path, known: Iterable[str] = ()) -> list[int]:
    """Returns how far a training has got, to be compared: whether its weights are there, step of its checkpoint.

    Of a fine-tuning of the user's own, which keeps what only it knows, the step that it has reported last counts.

    Args:
        folder: Of the training.
        known: Its files that may be only in the bucket of the study (``Store.known``).
    """
    known = tuple(known)
    there = {path.name for path in folder.glob(f"{ATTEMPT}*/*")} | {"/".join(name.split("/")[3:4]) for name in known}
    named = [checkpoint_of(name) for name in known if name.endswith(f"/{STATE}")]
    steps = [step for (step, _), _ in checkpoints(folder)] + [found[1][0] for found in named if found]
    if OWN in there:
        steps += [int(row.get("step", 0)) for row in files.read_json_lines(folder, METRICS)]
    return [int(WEIGHTS in there), max(steps, default=0)]


def progress_words(folder: Path, known: Iterable[str] = ()) -> str:
    """Returns from where another attempt at a training continues: the newest checkpoint, by step and finished epoch.

    Args:
        folder: Of the training.
        known: As of ``progress_of``.
    """
    is_trained, step = progress_of(folder, known)
    if is_trained:
        return "the end of its training"
    if not step:
        return "its beginning"
    epochs = [int(row.get("epoch", 0)) for row in files.read_json_lines(folder, METRICS) if row.get("step", 0) <= step]
    return f"step {step} (epoch {max(epochs)} done)" if epochs else f"step {step} (epoch 1)"


def log_left(folder: Path, attempt: int, reason: str, known: Iterable[str] = ()) -> None:
    """Appends to the log of a training that an attempt has left as it was asked to, and from where the next continues.

    Args:
        folder: Of the training.
        attempt: Its number.
        reason: Why it was asked to leave.
        known: As of ``progress_of``.

    Raises:
        StorageError: The log cannot be written.
    """
    where = f"the next attempt continues from {progress_words(folder, known)}"
    append_log(folder, f"attempt {attempt}: left: {reason}; {where}")


def append_log(folder: Path, text: str) -> None:
    """Appends text with the time to the log of a training."""
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.append_line(folder / LOG, f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}")
