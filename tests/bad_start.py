"""Trainings that never begin: what a process of Ray imports, or pickles, to run them fails.

The environment says how: ``BAD_START`` is what happens (``raise``, ``die`` or ``pickle``), ``BAD_START_DRIVER`` the
process that imports in peace, and ``BAD_START_FROM`` a file from whose appearance on it happens; the preparation
makes it.
"""

import os
import signal
import sys
from pathlib import Path

import stand_in


def _begins():
    return Path(os.environ["BAD_START_FROM"]).exists()


def _import():
    mode = os.environ["BAD_START"]
    if os.getpid() == int(os.environ["BAD_START_DRIVER"]) or not _begins():
        return
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "raise":
        raise ImportError("libnever.so.9: cannot open shared object file")


def prepare(recipe, folder, say=None, made_of=None):
    prepared = stand_in.prepare(recipe, folder)
    Path(os.environ["BAD_START_FROM"]).touch()
    del sys.modules["bad_start"]  # Ray uses the process again
    return prepared


class Train:
    """``stand_in.train``, but for ``pickle``."""

    def __call__(self, *arguments):
        return stand_in.train(*arguments)

    def __reduce__(self):
        if os.environ["BAD_START"] == "pickle" and _begins():
            raise TypeError("cannot pickle '_thread.lock' object")
        return Train, ()


_import()
