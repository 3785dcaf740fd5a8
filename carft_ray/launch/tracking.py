"""Trainings on Weights & Biases and MLflow: epochs while they run, then metrics and alpha curve; at last the figure.

A tracker runs in a thread of its own, on what the study has on disk, and never holds up the search. One that fails is a
warning at the end, whatever the reason, and is told nothing more.

    wandb     a run per training, all of one study in a group, and one for the study; ``training/...`` over
              ``training/step``, ``curve/...`` over ``curve/alpha``
    mlflow    a run per training, inside the run of the study; ``training/...`` by step, ``curve/...`` with 100 alpha as
              the step

A run begins with the first epoch that is seen. A training that is told again, by a search that was killed, takes the
place of its run.
"""

import contextlib
import hashlib
import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.launch.events import BaselineFinished, Event, OnEvent, Shared, TrialEpoch, TrialFinished
from carft_ray.layout import FIGURE_PNG, MANIFEST, METRICS, TRACKING
from carft_ray.recipe.schema import MlflowConfig, Recipe, WandbConfig
from carft_ray.study.outcome import TrialRow, TrialSpec, read_result

PATIENCE_S = 120.0  # after the search, for what is still on its way
CURVE, TRAINING = "curve/", "training/"  # before the metrics of a curve, and before those of an epoch
STEP = "step"  # of an epoch
Numbers = dict[str, float]


@dataclass(frozen=True)
class Epochs:
    """New epochs of a training.

    Attributes:
        spec: The training.
        rows: What it has reported of each, ``step`` among them.
    """

    spec: TrialSpec
    rows: list[Numbers]


@dataclass(frozen=True)
class Ended:
    """A training that has ended; its epochs were told before.

    Attributes:
        spec: The training.
        row: The same with its results.
        curve: Numbers at each alpha, ``alpha`` among them.
        is_best: It was the best of the study when it ended.
    """

    spec: TrialSpec
    row: TrialRow
    curve: list[Numbers]
    is_best: bool

    @property
    def numbers(self) -> Numbers:
        """Its metrics, with alpha and objective."""
        own = {"objective": self.row.objective, "alpha": self.row.alpha, "elapsed_s": self.row.elapsed_s}
        return {**self.row.metrics, **{name: float(value) for name, value in own.items() if value is not None}}


Told = Epochs | Ended
_Waiting = tuple[TrialSpec, TrialRow | None, bool]  # a training, its row once it has ended, and whether it is the best


@contextlib.contextmanager
def tracking(recipe: Recipe, study_dir: Path, warn: Callable[[str], None]) -> Iterator[Callable[[OnEvent], OnEvent]]:
    """Tracks the trainings of a search or a confirm while the block runs; waits for what is on its way at its end.

    Args:
        recipe: The recipe; ``tracking`` says where.
        study_dir: The study directory; it need not be there yet.
        warn: Given what failed, once per tracker, in the calling thread.

    Yields:
        A function that lets the one who takes events share them with the trackers.
    """
    asked: dict[str, Any] = {}
    if recipe.tracking.wandb.project is not None:
        asked["wandb"] = _to_wandb
    if recipe.tracking.mlflow.experiment is not None:
        asked["mlflow"] = _to_mlflow
    for name in [name for name in asked if importlib.util.find_spec(name) is None]:
        del asked[name]
        warn(f"tracking.{name} has no effect: {name} is not installed (pip install 'carft-ray[{name}]')")
    if not asked:
        yield lambda on_event: on_event
        return
    study_dir = study_dir.absolute()
    trackers = [_Tracker(name, track, recipe, study_dir) for name, track in asked.items()]
    try:
        yield lambda on_event: Shared(on_event, lambda event: _pass_on(event, trackers))
    finally:
        for tracker in trackers:
            tracker.waiting.put(None)
        for tracker in trackers:
            tracker.thread.join(PATIENCE_S)
            fault = tracker.fault or (f"not done after {PATIENCE_S:g} s" if tracker.thread.is_alive() else "")
            if fault:
                warn(f"tracking.{tracker.name}: {fault}; not all was tracked, the study itself is whole")


def _pass_on(event: Event, trackers: list["_Tracker"]) -> None:
    found: _Waiting | None = None
    if isinstance(event, TrialEpoch):
        found = event.spec, None, False
    elif isinstance(event, TrialFinished | BaselineFinished):
        row = event.row
        spec = TrialSpec(row.kind, row.number, row.name, row.values, row.attempt)
        found = spec, row, isinstance(event, TrialFinished) and event.is_best
    for tracker in trackers:
        if found and tracker.thread.is_alive():
            tracker.waiting.put(found)


class _Tracker:
    """A tracker and its thread.

    Attributes:
        waiting: Trainings of which there is something new; None after the last one.
        fault: Why it failed.
    """

    def __init__(self, name: str, track: Callable[..., None], recipe: Recipe, study_dir: Path) -> None:
        self.name = name
        self.fault = ""
        self.waiting = queue.SimpleQueue[_Waiting | None]()
        self._given = track, recipe, study_dir
        self.thread = threading.Thread(target=self._run, name=f"tracking-{name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        track, recipe, study_dir = self._given
        if (first := self.waiting.get()) is None:
            return  # nothing is opened for nothing
        try:
            track(recipe, study_dir, self._told(first, study_dir))
        except Exception as error:  # of a library that we do not know, over a network
            lines = str(error).strip().splitlines()
            self.fault = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")

    def _told(self, found: _Waiting | None, study_dir: Path) -> Iterator[Told]:
        last: dict[str, float] = {}  # step of each training that runs
        while found is not None:
            spec, row, is_best = found
            folder = spec.folder(study_dir)
            rows = [each for each in _epochs(folder) if each[STEP] > last.get(spec.name, -1)]
            if rows:
                last[spec.name] = rows[-1][STEP]
                yield Epochs(spec, rows)
            if row is not None:
                yield Ended(spec, row, _curve(read_result(folder) or {}), is_best)
            found = self.waiting.get()


def _epochs(folder: Path) -> list[Numbers]:
    rows = files.read_json_lines(folder / METRICS)
    return [{name: float(value) for name, value in row.items() if isinstance(value, int | float)} for row in rows]


def _curve(result: Mapping[str, Any]) -> list[Numbers]:
    names = ("alpha", "id_accuracy", "ood_accuracy", "objective")
    return [{name: float(point[name]) for name in names if name in point} for point in result.get("curve") or ()]


def _study_id(study_dir: Path) -> str:
    """Returns eight digits that a study keeps when it is moved."""
    return hashlib.sha256(str(files.read_json(study_dir / MANIFEST)["created"]).encode()).hexdigest()[:8]


def _own_folder(study_dir: Path) -> Path:
    folder = study_dir / TRACKING
    folder.mkdir(exist_ok=True)
    return folder


def _to_wandb(recipe: Recipe, study_dir: Path, trainings: Iterator[Told]) -> None:
    import wandb

    asked: WandbConfig = recipe.tracking.wandb
    folder, study_id = _own_folder(study_dir), _study_id(study_dir)
    off = {"x_disable_stats": True, "x_save_requirements": False, "disable_git": True, "disable_code": True}
    quiet = wandb.Settings(console="off", silent=True, **off)
    group, best = f"{recipe.name}-{study_id}", ""
    opened: dict[str, Any] = {}

    def run(name: str, kind: str, config: Mapping[str, Any]) -> Any:
        if name not in opened:
            opened[name] = wandb.init(
                project=asked.project,
                entity=asked.entity,
                mode="offline" if asked.offline else None,
                group=group,
                job_type=kind,
                name=name,
                id=f"{study_id}-{name}",
                dir=str(folder),
                config=dict(config),
                reinit="create_new",
                settings=quiet,
            )
            opened[name].define_metric(f"{TRAINING}*", step_metric=f"{TRAINING}{STEP}")
            opened[name].define_metric(f"{CURVE}*", step_metric=f"{CURVE}alpha")
        return opened[name]

    try:
        for told in trainings:
            one = run(told.spec.name, told.spec.kind, told.spec.values)
            if isinstance(told, Epochs):
                for row in told.rows:
                    one.log({f"{TRAINING}{name}": value for name, value in row.items()})
                continue
            for point in told.curve:
                one.log({f"{CURVE}{name}": value for name, value in point.items()})
            one.summary.update({**told.numbers, "outcome": told.row.outcome, "reason": told.row.reason})
            opened.pop(told.spec.name).finish()
            best = told.spec.name if told.is_best else best
        for one in opened.values():
            one.summary["outcome"] = "stopped"
        one = run(group, "study", recipe.model_dump(mode="json"))
        if (study_dir / FIGURE_PNG).exists():
            one.log({"figure": wandb.Image(str(study_dir / FIGURE_PNG))})
        if best:
            one.summary["best"] = best
    finally:
        for one in opened.values():
            one.finish()


def _to_mlflow(recipe: Recipe, study_dir: Path, trainings: Iterator[Told]) -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else its import tells its makers of each use
    import mlflow
    from mlflow.entities import Metric, Param

    asked: MlflowConfig = recipe.tracking.mlflow
    study_id, uri = _study_id(study_dir), os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        uri = (_own_folder(study_dir) / "mlflow").as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # of files, newer releases ask for this word
    client = mlflow.MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(asked.experiment)
    experiment = client.create_experiment(asked.experiment) if known is None else known.experiment_id
    opened: dict[str, str] = {}

    def run(name: str, tags: Mapping[str, str]) -> str:
        """Returns the run with these tags, a new one in place of what it may have had."""
        for old in client.search_runs([experiment], _words(tags)):
            client.delete_run(old.info.run_id)
        return str(client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id)

    of_study = {"carft_ray.study": study_id}
    found = client.search_runs([experiment], _words({**of_study, "carft_ray.kind": "study"}))
    study = found[0].info.run_id if found else run(recipe.name, {**of_study, "carft_ray.kind": "study"})

    def log(one: str, numbers: Numbers, step: int) -> None:
        now = int(1000 * time.time())
        client.log_batch(one, [Metric(name, value, now, step) for name, value in numbers.items()])

    def begin(spec: TrialSpec) -> str:
        one = run(spec.name, {**of_study, "carft_ray.kind": spec.kind, "carft_ray.name": spec.name})
        client.set_tag(one, "mlflow.parentRunId", study)
        client.log_batch(one, params=[Param(name, str(value)) for name, value in spec.values.items()])
        return one

    for told in trainings:
        name = told.spec.name
        one = opened[name] = opened.get(name) or begin(told.spec)
        if isinstance(told, Epochs):
            for row in told.rows:
                log(one, {f"{TRAINING}{each}": value for each, value in row.items() if each != STEP}, int(row[STEP]))
            continue
        log(one, told.numbers, 0)
        for point in told.curve:
            curve = {f"{CURVE}{each}": value for each, value in point.items() if each != "alpha"}
            log(one, curve, round(100 * point["alpha"]))
        client.set_tag(one, "carft_ray.outcome", told.row.outcome)
        client.set_terminated(opened.pop(name), "FINISHED" if told.row.objective is not None else "FAILED")
        if told.is_best:
            client.set_tag(study, "carft_ray.best", name)
    for one in opened.values():
        client.set_terminated(one, "KILLED")  # the search was stopped; another one begins the run again
    if (study_dir / FIGURE_PNG).exists():
        client.log_artifact(study, str(study_dir / FIGURE_PNG))
    client.set_terminated(study)


def _words(tags: Mapping[str, str]) -> str:
    """Returns what finds the runs with these tags."""
    return " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
