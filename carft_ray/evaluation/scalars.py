"""Event files for TensorBoard, written in the calling thread.

``SummaryWriter`` writes in a thread of its own, where a full disk ends with a traceback on the terminal and a training
that goes on. Here it is a ``StorageError`` of the training.
"""

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from carft_ray import files

FLUSH_EVERY_S = 5.0
_count = itertools.count()


class EventFile:
    """One new event file in the folder of a TensorBoard run; several of them in one folder are one run.

    Args:
        folder: Folder of the run; made when it is missing.
        purge_step: What earlier files of the run hold from this step on is void.

    Raises:
        StorageError: Here and in all methods: the file cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_count):06d}"
        self.path = folder / name
        self._flushed = time.monotonic()
        with files.writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "wb")  # noqa: SIM115  # lives as long as the training
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._write(step=step, summary=summary.scalar(name, value))  # type: ignore[no-untyped-call]

    def hparams(self, values: Mapping[str, bool | int | float | str], metrics: Mapping[str, float], step: int) -> None:
        """Adds the run's line of TensorBoard's HPARAMS table.

        Args:
            values: The columns of hyperparameters.
            metrics: The columns of metrics, each a scalar of the run too.
            step: Step of these scalars.
        """
        for part in summary.hparams(dict(values), dict(metrics)):  # type: ignore[no-untyped-call]
            self._write(summary=part)
        for name, value in metrics.items():
            self.scalar(name, value, step)

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
