"""Event files of a training for TensorBoard; several of them in one folder are one run.

``SummaryWriter`` writes in a thread of its own, where a full disk gives a traceback on the terminal. Here it is a
``StorageError``. No file stays open.
"""

import io
import itertools
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName, Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from carft_ray import files
from carft_ray.recipe.schema.recipe import Recipe

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


def varied(recipe: Recipe) -> HParams:
    """Returns the values of a training that its study varies, as the columns of TensorBoard's HPARAMS table.

    Args:
        recipe: ``train`` holds its values.
    """
    of_baselines = [name for values in recipe.search.baselines.values() for name in values]
    names = dict.fromkeys(("learning_rate", "kl_weight", *recipe.search.space, *of_baselines))
    train = recipe.train.model_dump(mode="json")
    values = {name: value for name in names if (value := train.get(name)) is not None}
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}


def _short(value: Any) -> str:
    """Returns a value in three digits, with such letters alone as every file system takes."""
    text = re.sub(r"e([+-])0+", r"e\1", f"{value:.3g}") if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text.replace("e+", "e"))


def begin_file(folder: Path, purge_step: int | None = None) -> Path:
    """Makes a new event file; returns its path.

    Args:
        folder: Of the run; made when it is missing.
        purge_step: What earlier files of the run hold from this step on is void.

    Raises:
        StorageError: Here and in the functions below: the file cannot be written.
    """
    ending = f"{socket.gethostname()}.{os.getpid()}.{next(_count):06d}"  # that no other file has
    path = folder / f"{EVENTS}{int(time.time()):010d}.{ending}"
    with files.writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    start = [] if purge_step is None else [{"step": purge_step, "session_log": SessionLog(status=SessionLog.START)}]
    _append(path, {"file_version": "brain.Event:2"}, *start)
    return path


def add_scalars(path: Path, numbers: Mapping[str, float], step: int) -> None:
    """Adds a point to each of some curves, by tag."""
    values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
    _append(path, {"step": step, "summary": Summary(value=values)})


def add_hparams(path: Path, values: HParams, metrics: Mapping[str, float], step: int) -> None:
    """Adds the line of a finished training to TensorBoard's HPARAMS table.

    Args:
        path: The file.
        values: The columns of hyperparameters.
        metrics: The columns of metrics, each a scalar of the run too.
        step: Step of these scalars.
    """
    start, columns = SessionStartInfo(), []
    for name, value in values.items():
        kind = "string" if isinstance(value, str) else "bool" if isinstance(value, bool) else "number"
        setattr(start.hparams[name], f"{kind}_value", value)
        type_name = {"string": "STRING", "bool": "BOOL", "number": "FLOAT64"}[kind]
        columns.append(HParamInfo(name=name, type=DataType.Value(f"DATA_TYPE_{type_name}")))
    experiment = Experiment(
        hparam_infos=columns, metric_infos=[MetricInfo(name=MetricName(tag=tag)) for tag in metrics]
    )
    parts = {
        metadata.EXPERIMENT_TAG: {"experiment": experiment},
        metadata.SESSION_START_INFO_TAG: {"session_start_info": start},
        metadata.SESSION_END_INFO_TAG: {"session_end_info": SessionEndInfo(status=Status.Value("STATUS_SUCCESS"))},
    }
    found = []
    for tag, content in parts.items():
        data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content).SerializeToString()
        about = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data)
        found.append(Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=about)))
    _append(path, *({"summary": Summary(value=[value])} for value in found))
    add_scalars(path, metrics, step)


def _append(path: Path, *events: Mapping[str, Any]) -> None:
    data = io.BytesIO()
    records = RecordWriter(data)
    for fields in events:
        records.write(Event(wall_time=time.time(), **fields).SerializeToString())
    with files.writing(path), open(path, "ab") as file:
        file.write(data.getvalue())
