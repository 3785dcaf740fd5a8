"""A Runner whose trainings never begin: what a worker imports to run them fails there, and only there.

The environment says what happens (``BAD_START``: ``raise`` or ``die``), in which process it does not
(``BAD_START_DRIVER``), and from when on (``BAD_START_FROM``, a file that need not be there yet).
"""

import os
import signal
import sys
from pathlib import Path

import ray
import stand_in


def _misbehave():
    if os.getpid() == int(os.environ["BAD_START_DRIVER"]) or not Path(os.environ["BAD_START_FROM"]).exists():
        return
    if os.environ["BAD_START"].endswith("worker") and not ray.get_runtime_context().get_assigned_resources().get("CPU"):
        return
    if os.environ["BAD_START"].startswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    raise ImportError("libnever.so.9: cannot open shared object file")


_misbehave()


def prepare(recipe, base_dir, folder):
    Path(os.environ["BAD_START_FROM"]).touch()
    del sys.modules["bad_start"]  # the process is used again
    return stand_in.prepare(recipe, base_dir, folder)


train = stand_in.train


def train_badly(*args):
    return stand_in.train(*args)
