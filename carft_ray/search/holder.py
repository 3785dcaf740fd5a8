"""Whether a process works on a study (or a training of `train`), found out without taking or writing anything."""

import fcntl
import os
from pathlib import Path

from carft_ray.search.folder import LOCK


def holder(folder: Path) -> str | None:
    """Returns what the live holder of a folder's lock says of itself, or None when nobody holds it.

    The lock goes when its process does, so a text left behind by a dead process counts for nothing.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(handle, 1000, 0).decode(errors="replace").strip() or "a process"
    except OSError:  # a file system without locks: nobody can hold it
        return None
    finally:
        os.close(handle)
    return None
