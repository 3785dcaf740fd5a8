"""Searches of ``debug_search`` on a small disk that is filled, as a program of ``crash_host``.

fill DISK KILOBYTES    fills it but for so much
clear DISK             removes what ``fill`` has written
search, confirm, look  as ``debug_search``; ``look`` has what is half written, too
"""

import json
import os
from pathlib import Path

import debug_search
from debug_search import import_everything

__all__ = ["call", "import_everything"]

FILLER = "filler"


def call(argv):
    if argv[0] == "fill":
        disk = Path(argv[1])
        free = os.statvfs(disk)
        with open(disk / FILLER, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 1024 * int(argv[2]))
        return 0
    if argv[0] == "clear":
        (Path(argv[1]) / FILLER).unlink()
        return 0
    if argv[0] == "look":
        print(json.dumps([debug_search.told(Path(argv[1])), half_written(Path(argv[1]))]))
        return 0
    return debug_search.call(argv)


def half_written(study_dir):
    """Returns temporary files, and files of JSON that are not whole."""
    found = [str(path) for path in study_dir.rglob("*.tmp")]
    for path in study_dir.rglob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            found.append(str(path))
    return found
