"""Event files for TensorBoard, written in the calling thread.

``SummaryWriter`` writes in a thread of its own, where a full disk gives a traceback on the terminal while the training
continues. Here it is a ``StorageError`` of the training.
"""

import itertools
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from carft_ray import files
from carft_ray.recipe.schema.recipe import Recipe

FLUSH_EVERY_S = 5.0
# TensorBoard shows groups, and plots inside them, in the order of their names: curves, epochs, final, other
TAGS = {name: f"curves/{i}_{name}" for i, name in enumerate(("loss", "ce", "kl", "learning_rate"), 1)}
_OF_EPOCHS = ("id_accuracy", "ood_accuracy", "objective", "alpha")
TAGS |= {f"subset/{name}": f"epochs/{i}_{name}" for i, name in enumerate(_OF_EPOCHS, 1)}
SHORT = {"learning_rate": "lr", "kl_weight": "kl", "weight_decay": "wd"}  # in names of runs
EVENTS = "events.out.tfevents."
LONGEST_NAME = 120  # bytes; of 255 that file systems allow
HParams = Mapping[str, bool | int | float | str]
_count = itertools.count()


def tag_of(name: str) -> str:
    """Returns the tag of a number of a training: of a step (``loss``), or of an epoch (``subset/id_accuracy``)."""
    return TAGS.get(name, f"other/{name.removeprefix('subset/')}")


def run_folder(out_dir: Path, recipe: Recipe) -> Path:
    """Returns the folder of a training's event files; its name, which TensorBoard shows, has what the search varies.

    An earlier attempt's stays: the same recipe may search more, or have other baselines, when it resumes.

    Args:
        out_dir: Folder of the training.
        recipe: ``train`` holds its values.
    """
    with files.writing(out_dir):
        if there := sorted(out_dir.glob(f"*/{EVENTS}*")):
            return there[0].parent
    names = dict.fromkeys(("learning_rate", "kl_weight", *recipe.search.space))
    values = {name: value for name in names if (value := getattr(recipe.train, name, None)) is not None}
    words = [f"{SHORT.get(name, name)}={_short(value)}" for name, value in values.items()]
    return out_dir / " ".join(words)[:LONGEST_NAME].strip()


def varied(recipe: Recipe, train: Mapping[str, Any]) -> HParams:
    """Returns the values of a training that its study varies, as the columns of TensorBoard's HPARAMS table.

    Args:
        recipe: The study's.
        train: All values of the training.
    """
    of_baselines = [name for values in recipe.search.baselines.values() for name in values]
    names = dict.fromkeys(("learning_rate", "kl_weight", *recipe.search.space, *of_baselines))
    values = {name: value for name in names if (value := train.get(name)) is not None}
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}


def _short(value: Any) -> str:
    """Returns a value in three digits, with such letters alone as every file system takes."""
    text = re.sub(r"e([+-])0+", r"e\1", f"{value:.3g}") if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text.replace("e+", "e"))


class EventFile:
    """One new event file in the folder of a TensorBoard run; several of them in one folder are one run.

    Args:
        folder: Folder of the run; made when it is missing.
        purge_step: What earlier files of the run hold from this step on is void.

    Raises:
        StorageError: Here and in all methods: the file cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        ending = f"{socket.gethostname()}.{os.getpid()}.{next(_count):06d}"  # that no other file has
        self.path = folder / f"{EVENTS}{int(time.time()):010d}.{ending}"
        self._flushed = time.monotonic()
        with files.writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "wb")  # noqa: SIM115  # open as long as the training
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))

    def hparams(self, values: HParams, metrics: Mapping[str, float], step: int) -> None:
        """Adds the line of a finished training to TensorBoard's HPARAMS table.

        Args:
            values: The columns of hyperparameters.
            metrics: The columns of metrics, each a scalar of the run too.
            step: Step of these scalars.
        """
        for part in summary.hparams({**values}, {**metrics}):  # type: ignore[no-untyped-call]  # torch has no types there
            self._write(summary=part)
        for name, number in metrics.items():
            self.scalar(name, number, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        with files.writing(self.path):
            self._file.close()

    def _write(self, **fields: Any) -> None:
        with files.writing(self.path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            if time.monotonic() - self._flushed > FLUSH_EVERY_S:
                self._file.flush()
                self._flushed = time.monotonic()
