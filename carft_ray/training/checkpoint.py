"""Checkpoints of a training: safetensors and JSON, no pickle.

    attempt-1/step-00000024/{weights.safetensors, optimizer.safetensors, state.json}
                             and average.safetensors with `ema_decay` or a moving teacher

A checkpoint folder appears under its name only whole. The newest valid one wins; an attempt writes only into its own
folder, so an older one that still runs cannot overwrite a newer one's work. A training copies its state to the host,
and a thread writes the copies (``CheckpointWriter``).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.layout import ATTEMPT, KEPT_CHECKPOINTS, STATE, STEP
from carft_ray.store.attempt_files import checkpoints
from carft_ray.untrusted import open_regular, parse_json, read_regular

FORMAT_VERSION = 1
WEIGHTS, OPTIMIZER, AVERAGE = "weights.safetensors", "optimizer.safetensors", "average.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to resume.

    Attributes:
        step: Updates done.
        weights: ``state_dict`` of the classifier; with LoRA matrices and corrections apart.
        optimizer: Tensors of the optimizer, ``<parameter index>.<key>``.
        position: Seed, and the running sums of the epoch's metrics. Order and views are functions of (seed, step) and
            nothing else is drawn, so step and seed are also the sampler's position and the random state.
        average: Averages of the weights over the steps; empty where none is taken.
        name: Of one that was read: its folder below that of all checkpoints.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    position: dict[str, Any]
    average: dict[str, Tensor] = field(default_factory=dict)
    name: str = ""


class CheckpointWriter:
    """Writes the checkpoints of one attempt in a thread, one at a time: no step waits for the disk.

    A context manager: leaving it waits for the last one.

    Args:
        checkpoint_dir: Folder of the training, in which its attempts have theirs; None: none are written.
        attempt: Number of the attempt.
    """

    def __init__(self, checkpoint_dir: Path | None, attempt: int) -> None:
        self._save = None if checkpoint_dir is None else partial(save_checkpoint, checkpoint_dir, attempt)
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()  # it waits, too

    def write(self, make: Callable[[], Checkpoint]) -> None:
        """Begins to write ``make()``, whose tensors nobody changes any more, once the checkpoint before it is written.

        Raises:
            StorageError: The one before could not be written.
        """
        if self._save is not None:
            self.wait()  # first: memory holds the copies of one checkpoint
            self._pending = self._pool.submit(self._save, make())

    def check(self) -> None:
        """Raises the ``StorageError`` of a checkpoint that could not be written; waits for none."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns once everything is written.

        Raises:
            StorageError: It cannot be written; the checkpoints before it are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns copies of the optimizer's tensors on the CPU, under flat names."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value.to("cpu", copy=True) for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts what ``optimizer_tensors`` returned back into a fresh optimizer of the same groups.

    Fused kernels pass over the memory of a parameter and of its moments in one order: all get the parameter's strides.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if value.shape == parameter.shape:
                entry[key] = torch.empty_like(parameter).copy_(value)


def save_checkpoint(checkpoint_dir: Path, attempt: int, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and then removes all but the newest two; returns its folder.

    Raises:
        StorageError: It cannot be written; the checkpoints before it are untouched.
    """
    folder = checkpoint_dir / f"{ATTEMPT}{attempt}" / f"{STEP}{checkpoint.step:08d}"
    if files.exists(folder / STATE):
        return folder
    files.remove(folder)  # what a kill has left of one
    with files.new_folder(folder) as temporary:
        parts = {WEIGHTS: checkpoint.weights, OPTIMIZER: checkpoint.optimizer}
        parts |= {AVERAGE: checkpoint.average} if checkpoint.average else {}
        for name, tensors in parts.items():
            save_tensors(temporary / name, tensors)
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "position": checkpoint.position,
            "sha256": {name: _sha256(temporary / name) for name in parts},
        }
        content["sha256"]["state"] = _sha256_of_state(content)
        files.write_text(temporary / STATE, json.dumps(content, indent=2) + "\n")
    for _, old in checkpoints(checkpoint_dir)[KEPT_CHECKPOINTS:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest_checkpoint(checkpoint_dir: Path) -> tuple[Checkpoint | None, list[Problem]]:
    """Returns the newest valid checkpoint, if any, and a problem for each damaged one that was passed over.

    Raises:
        StorageError: A network disk does not answer, so it is not known which ones are damaged.
    """
    problems: list[Problem] = []
    for _, folder in checkpoints(checkpoint_dir):
        try:
            return load_checkpoint(folder), problems
        except StorageError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in files.MACHINE_ERRNOS:
                raise
            problems.extend(error.problems)
    return None, problems


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads one checkpoint folder and verifies its hashes.

    Raises:
        StorageError: It is incomplete, damaged, or of another format version; or it cannot be read.
    """
    try:
        return files.retried(folder, lambda: _load(folder))
    except OSError as error:
        raise StorageError(_damaged(folder, f"{Path(error.filename or '').name}: {error.strerror}")) from error


def _load(folder: Path) -> Checkpoint:
    try:
        content = parse_json(read_regular(folder / STATE, files.MOST_JSON_BYTES, StorageError))
        if content["format_version"] != FORMAT_VERSION:
            rule, value = f"must have format_version {FORMAT_VERSION}", str(content["format_version"])
            raise StorageError(Problem(str(folder), rule, value))
        hashes = content["sha256"]
        if _sha256_of_state(content) != hashes["state"]:
            raise StorageError(_damaged(folder, "a state.json that does not match its hash"))
        with_average = AVERAGE in hashes or (folder / AVERAGE).exists()
        names = (WEIGHTS, OPTIMIZER, *([AVERAGE] if with_average else []))
        for name in names:
            if _sha256(folder / name) != hashes[name]:
                raise StorageError(_damaged(folder, f"a file {name} that does not match its hash"))
        tensors = {name: load_file(folder / name) for name in names}
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StorageError(_damaged(folder, "a damaged state.json")) from error
    average, name = tensors.get(AVERAGE, {}), f"{folder.parent.name}/{folder.name}"
    return Checkpoint(content["step"], tensors[WEIGHTS], tensors[OPTIMIZER], content["position"], average, name)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as safetensors and flushes them; the caller's folder or rename makes it atomic.

    Raises:
        OSError: They cannot be written; the library wraps the system's error in its own, here it is itself again.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)  # the library gives its file mode 600, whatever the umask
    files.fsync_file(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        StorageError: The file is missing or damaged.
    """
    try:
        open_regular(path, StorageError).close()
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        step = "Restore it from a copy, or train again into another folder."
        value = "none" if isinstance(error, FileNotFoundError) else f"a damaged one ({error})"
        raise StorageError(Problem(str(path), "must be a file of tensors", value, next_step=step)) from error


def _damaged(folder: Path, value: str) -> Problem:
    return Problem(str(folder), "must be a whole checkpoint", value)


def _sha256_of_state(content: Mapping[str, Any]) -> str:
    """Returns the hash of what ``state.json`` says besides the hashes; a flipped digit must be noticed."""
    return hashlib.sha256(json.dumps([content["step"], content["position"]], sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open_regular(path, StorageError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it is a buffered file
