"""Trainings on Weights & Biases and MLflow: epochs while they run, then metrics and alpha curve.

A tracker is a receiver of ``launch.outbox``: it gets what the study has on disk, and never holds up the search. One
that fails is a warning at the end, whatever the reason, and is told nothing more.

    wandb     a run per training, all of one study in a group; ``training/...`` over ``training/step``, ``curve/...``
              over ``curve/alpha``
    mlflow    a run per training, all of one study with one tag; ``training/...`` by step, ``curve/...`` with 100 alpha
              as the step

A run begins with the first epoch that is seen. A training that is sent again, after its search was killed, replaces
its run.
"""

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.launch.events import BaselineFinished, Event, TrialEpoch, TrialFinished
from carft_ray.launch.outbox import Receiver
from carft_ray.layout import METRICS, TRACKING
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.place import COPIED_FROM
from carft_ray.study.recipe_identity import read_manifest
from carft_ray.study.training import result_of

STOPPED = "stopped"
CURVE = ("alpha", "id_accuracy", "ood_accuracy", "objective")  # of a point
Numbers = dict[str, float]
Told = TrialEpoch | TrialFinished | BaselineFinished


def trackers(recipe: Recipe, study_dir: Path, warn: Callable[[str], None]) -> dict[str, Receiver]:
    """Returns the trackers that get the trainings of a search or a confirm, by their keys.

    Args:
        recipe: The recipe; ``tracking`` says where.
        study_dir: The study directory; it need not be there yet.
        warn: Told which library is not installed.
    """
    asked = {"wandb": recipe.tracking.wandb.project, "mlflow": recipe.tracking.mlflow.experiment}
    found = dict[str, Receiver]()
    for name in [name for name, place in asked.items() if place is not None]:
        if importlib.util.find_spec(name) is None:
            warn(f"tracking.{name} has no effect: {name} is not installed (pip install 'carft-ray[{name}]')")
        else:
            found[f"tracking.{name}"] = partial(_track, name, recipe, study_dir.absolute())
    return found


def _track(name: str, recipe: Recipe, study_dir: Path, events: Iterator[Event]) -> tuple[()]:
    """Tells a library of the trainings; without any, nothing is opened."""
    client: Any = None
    for event in events:
        if isinstance(event, Told):
            client = client or CLIENTS[name](recipe, study_dir)
            _tell(client, event)
    for training in [] if client is None else list(client.runs):
        client.end(training, {}, STOPPED)  # another search begins its run again
    return ()


class _Client:
    """What is the same for both libraries. ``runs`` are those of trainings that have not ended, by name."""

    def __init__(self, recipe: Recipe, study_dir: Path) -> None:
        self.recipe, self.study_dir, self.folder = recipe, study_dir, study_dir / TRACKING
        self.runs, self.steps = dict[str, Any](), Numbers()
        manifest = read_manifest(study_dir)
        self.study_id: str = manifest["id"]
        if COPIED_FROM in manifest:  # a copy has the id of its original, whose runs stay what they are
            self.study_id += f"-{hashlib.blake2b(str(study_dir).encode(), digest_size=4).hexdigest()}"
        self.group = f"{recipe.name}-{self.study_id}"
        self.folder.mkdir(exist_ok=True)


def _tell(client: Any, event: Told) -> None:
    """Tells a client the new epochs of a training, and how it has ended."""
    one = event.spec if isinstance(event, TrialEpoch) else event.row
    if one.name not in client.runs:
        client.runs[one.name] = client.begin(one.name, one.kind, one.values)
    for line in files.read_json_lines(client.study_dir, f"{one.training}/{METRICS}"):
        if line.get("step", -1) > client.steps.get(one.name, -1):
            client.steps[one.name] = line["step"]
            numbers = {f"training/{name}": value for name, value in line.items() if isinstance(value, int | float)}
            client.log(one.name, numbers, line["step"])
    if isinstance(event, TrialEpoch):
        return
    for point in result_of(client.study_dir, event.row).get("curve") or ():
        client.log(one.name, {f"curve/{name}": point[name] for name in CURVE if name in point}, 100 * point["alpha"])
    row, own = event.row, ("objective", "alpha", "elapsed_s")
    numbers = row.metrics | {name: getattr(row, name) for name in own if getattr(row, name) is not None}
    client.end(one.name, numbers, row.outcome, row.reason)


class _Wandb(_Client):
    def begin(self, name: str, kind: str, values: Mapping[str, Any]) -> Any:
        import wandb

        asked = self.recipe.tracking.wandb
        off = {"x_disable_stats": True, "x_save_requirements": False, "disable_git": True, "disable_code": True}
        run = wandb.init(
            project=asked.project,
            entity=asked.entity,
            mode="offline" if asked.offline else None,
            group=self.group,
            name=name,
            id=f"{self.study_id}-{name}",
            job_type=kind,
            config=dict(values),
            dir=str(self.folder),
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, **off),
        )
        run.define_metric("training/*", step_metric="training/step")
        run.define_metric("curve/*", step_metric="curve/alpha")
        return run

    def log(self, name: str, numbers: Numbers, step: float) -> None:
        self.runs[name].log(numbers)

    def end(self, name: str, numbers: Numbers, outcome: str, reason: str = "") -> None:
        self.runs[name].summary.update({**numbers, "outcome": outcome, "reason": reason})
        self.runs.pop(name).finish()


class _Mlflow(_Client):
    def __init__(self, recipe: Recipe, study_dir: Path) -> None:
        super().__init__(recipe, study_dir)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else its import tells its makers of each use
        import mlflow

        uri, asked = os.environ.get("MLFLOW_TRACKING_URI"), self.recipe.tracking.mlflow.experiment
        if not uri:
            uri = (self.folder / "mlflow").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # of files, newer releases ask for this word
        self.client, self.entities = mlflow.MlflowClient(tracking_uri=uri), mlflow.entities
        known = self.client.get_experiment_by_name(asked)
        self.experiment = self.client.create_experiment(asked) if known is None else known.experiment_id

    def begin(self, name: str, kind: str, values: Mapping[str, Any]) -> str:
        tags = {"carft_ray.study": self.group, "carft_ray.kind": kind, "carft_ray.name": name}
        words = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        for before in self.client.search_runs([self.experiment], words):  # told by a search that was killed
            self.client.delete_run(before.info.run_id)
        run = str(self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id)
        self.client.log_batch(run, params=[self.entities.Param(key, str(value)) for key, value in values.items()])
        return run

    def log(self, name: str, numbers: Numbers, step: float) -> None:
        at = int(1000 * time.time()), round(step)
        metrics = [self.entities.Metric(key, value, *at) for key, value in numbers.items()]
        self.client.log_batch(self.runs[name], metrics)

    def end(self, name: str, numbers: Numbers, outcome: str, reason: str = "") -> None:
        self.log(name, numbers, 0)
        self.client.set_tag(self.runs[name], "carft_ray.outcome", outcome)
        status = "FINISHED" if "objective" in numbers else "KILLED" if outcome == STOPPED else "FAILED"
        self.client.set_terminated(self.runs.pop(name), status)


CLIENTS: dict[str, Any] = {"wandb": _Wandb, "mlflow": _Mlflow}
