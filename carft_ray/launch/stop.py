"""Asking the search (or training) of another process to stop: the file that its trainings look at."""

import time
from pathlib import Path

from carft_ray import files
from carft_ray.layout import STOP
from carft_ray.study.lease import holder

CHECK_EVERY_S = 0.5


def ask_to_stop(folder: Path) -> str | None:
    """Writes the stop file when a live process holds the folder.

    Returns:
        What the holder says of itself; None when there is nobody to ask, and then nothing is written.

    Raises:
        StorageError: The file cannot be written.
    """
    found = holder(folder)
    if found is not None:
        files.write_text(folder / STOP, "asked by `carft-ray stop`\n")
    return found


def wait_until_free(folder: Path) -> None:
    """Returns when no process holds the folder any more."""
    while holder(folder) is not None:
        time.sleep(CHECK_EVERY_S)
