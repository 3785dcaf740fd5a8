"""What the engine itself costs, with trainings that do nothing.

    throughput   trials per second through Ray (inline), from the first end to the last
    study        one proposal and one answer after so many finished trials, without Ray: the log, its size, opening it,
                 `status` and `ls` as commands, memory
    driver       a driver with 200 running trials that report every second: taking in what they report, and the live
                 table, as shares of one core

A study of n trials is not searched, it is written: one trial goes the way of every trial, and its commits in the log
and the files of its folder are repeated with other numbers and values. So lines, bytes and files are those of a search.
Numbers are medians.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Row, apart, let_workers_import, peak_mb
from carft_ray import files
from carft_ray.layout import COMMITS, METRICS, RESOLVED, RESULT
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.attempt_files import write_result
from carft_ray.study.journal import trial_name
from carft_ray.study.opening import open_study
from carft_ray.study.snapshot import snapshot
from carft_ray.study.study import Study
from carft_ray.study.take_over import recover_running
from carft_ray.study.training import TrialSpec
from carft_ray.training.run_context import RunContext

NUM_TRIALS = 60  # of the search through Ray
CREATE_TRIAL = 4  # as Optuna numbers its operations
NUM_ASKED = 30  # proposals of which the median is taken
NUM_LIVE = 200
NUM_SECONDS = 4  # of the driver that are played
SETS = ("noisy_photo", "blurry_photo", "painting", "negative")  # OOD validation sets
SPACE = {
    "learning_rate": {"low": 1e-4, "high": 5e-3, "log": True},
    "kl_weight": {"low": 0.1, "high": 100.0, "log": True},
    "weight_decay": {"low": 1e-3, "high": 1.0, "log": True},
}
EPOCH = {  # a line of metrics.jsonl, without its number
    "step": 8,
    "num_steps": 96,
    "learning_rate": 0.002495443738882951,
    "loss": 1.2485453075191606,
    "ce": 1.0741136819124222,
    "kl": 0.13695777765703676,
    "context_entropy": 2.0345326364040375,
    "grad_norm": 19.29855513572693,
    "images_per_s": 1193.7426760127225,
}


def recipe_of(num_trials: int, sampler: str = "tpe") -> Recipe:
    """Returns a recipe with three parameters; its sets are never opened."""
    sandbox = {"source": "sandbox", "num_per_class": 4}
    ood = {name: {**sandbox, "domain": name, "split": "val"} for name in SETS}
    photo = {**sandbox, "domain": "photo"}
    data = {"train": {**photo, "split": "train"}, "id_val": {**photo, "split": "val"}, "ood_val": ood}
    search = {"trials": num_trials, "space": SPACE, "baselines": {}, "sampler": {"name": sampler}}
    return Recipe.model_validate({"data": data, "search": search})


# ---------------------------------------------------------------------------------------------- trainings of nothing


def prepare(recipe: Recipe, folder: Path, say: Callable[[str], None], made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Stands in for ``training.run.prepare``."""
    del recipe, say
    folder.mkdir(parents=True, exist_ok=True)
    return metrics_of(0.5)


def train(recipe: Recipe, out_dir: Path, prepared_dir: Path, context: RunContext, attempt: int) -> dict[str, Any]:
    """Stands in for ``training.run.run_training``: writes a result and trains nothing."""
    del prepared_dir, attempt
    context.should_stop()
    return finish(out_dir, objective_of(recipe.train.learning_rate))


def objective_of(learning_rate: float) -> float:
    """Returns a number with a maximum inside the space."""
    return 0.7 / (1 + 0.1 * math.log10(learning_rate / 1e-3) ** 2)


def metrics_of(objective: float) -> dict[str, float]:
    """Returns as many metrics as a trial with five validation sets reports."""
    sets = {f"accuracy/{name}": objective + 1e-3 * k for k, name in enumerate(("id_val", *SETS))}
    return {**sets, "id_accuracy": objective, "ood_accuracy": objective + 2.5e-3, "objective": objective}


def finish(folder: Path, objective: float) -> dict[str, Any]:
    """Writes the files of a training that has finished in its first attempt, and returns its result."""
    place = folder / "attempt-1"
    for name in ("attempt-1/predictions/validation.parquet", "tensorboard/events", "log.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 60)
    (folder / METRICS).write_text("".join(json.dumps({**EPOCH, "epoch": epoch}) + "\n" for epoch in range(1, 13)))
    metrics = metrics_of(objective)
    points = [{"alpha": alpha, **metrics} for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    content = {"objective": objective, "alpha": 0.5, "metrics": metrics, "elapsed_s": 13.4}
    num_images = dict.fromkeys(("train", "id_val", *SETS), 500)
    write_result(place, {**content, "curve": points, "num_images": num_images})
    return content


# ---------------------------------------------------------------------------------------------- a study of any size


def fill(study_dir: Path, num_trials: int, sampler: str = "tpe") -> None:
    """Makes a study with ``num_trials`` finished trials in seconds, as a search would have left it.

    Args:
        study_dir: A folder that is not there yet; absolute.
        num_trials: At least 1.
        sampler: Of the recipe.
    """
    recipe = recipe_of(num_trials, sampler)
    with open_study(study_dir, recipe) as study:
        files.write_text(study_dir / RESOLVED, dump_recipe(recipe))
        recover_running(study)
        study.add_zero_shot(metrics_of(0.5))
        spec = study.next()
        assert spec is not None
        answer(study, spec)
        folder, log, rng = spec.folder(study_dir), study.log, np.random.default_rng(0)
        commits = [json.loads(path.read_bytes().splitlines()[1]) for path in sorted((study_dir / COMMITS).iterdir())]
        creates = [line for each in commits for line in each["operations"] if line["op_code"] == CREATE_TRIAL]
        last = len(creates) - 1  # ids count over all Optuna studies of the log
        own = [
            [line for line in each["operations"] if line is creates[last] or line.get("trial_id") == last]
            for each in commits
        ]
        for number in range(1, num_trials):
            logs = rng.uniform(*np.log([[each["low"], each["high"]] for each in SPACE.values()]).T)
            values = dict(zip(SPACE, np.exp(logs).tolist(), strict=True))
            for lines in filter(None, own):
                with log.commit():
                    log.append_logs([_copy(line, number, last + number, values) for line in lines])
            shutil.copytree(folder, folder.with_name(trial_name(number, values)))


def _copy(line: dict[str, Any], number: int, trial_id: int, values: dict[str, float]) -> dict[str, Any]:
    """Returns an operation of a trial as another one has it."""
    objective = objective_of(values["learning_rate"])
    copy = {**line, "trial_id": trial_id} if "trial_id" in line else line
    if "param_name" in line:
        copy["param_value_internal"] = values[line["param_name"]]
    elif "name" in line.get("user_attr", ()):
        copy["user_attr"] = {"name": trial_name(number, values)}
    elif "metrics" in line.get("user_attr", ()):
        copy["user_attr"] = {"metrics": metrics_of(objective)}
    elif "points" in line.get("user_attr", ()):
        points = [{"alpha": point["alpha"], **metrics_of(objective)} for point in line["user_attr"]["points"]]
        copy["user_attr"] = {"points": points}
    elif line.get("values"):
        copy["values"] = [objective]
    return copy


def answer(study: Study, spec: TrialSpec) -> None:
    """Ends a trial: its files, then the study records it."""
    finish(spec.folder(study.study_dir), objective_of(spec.values["learning_rate"]))
    study.settle(spec)


# ---------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class StudyCost:
    """What a study with ``num_trials`` finished trials costs; times are medians.

    Attributes:
        num_trials: Finished trials before the first measured one.
        ask_ms: The next trial with its values, written down.
        ask_p95_ms: Its 95th percentile.
        tell_ms: A finished trial recorded.
        tell_p95_ms: Its 95th percentile.
        log_mb: Size of the log.
        replay_s: Reading its rows once.
        open_s: Opening the study for a search, with what is tidied then.
        commands_s: Wall time of whole commands, by name.
        memory_mb: Peak resident memory of the process that proposed and recorded.
    """

    num_trials: int
    ask_ms: float
    ask_p95_ms: float
    tell_ms: float
    tell_p95_ms: float
    log_mb: float
    replay_s: float
    open_s: float
    commands_s: dict[str, float]
    memory_mb: float


COMMANDS = {
    "status": ("status",),
    "ls --limit 10": ("ls", "--limit", "10"),
}


def study_cost(
    study_dir: Path,
    num_trials: int,
    num_asked: int = NUM_ASKED,
    commands: Mapping[str, tuple[str, ...]] = COMMANDS,
) -> StudyCost:
    """Measures a study that ``fill`` makes; this process should have measured none before (its memory is a peak).

    Args:
        study_dir: A folder that is not there yet; absolute.
        num_trials: Finished trials.
        num_asked: Proposals and answers of which the median is taken.
        commands: Command lines that are timed, by name.
    """
    fill(study_dir, num_trials)
    log_mb = sum(path.stat().st_size for path in (study_dir / COMMITS).iterdir()) / 1e6
    replays = [_seconds(lambda: snapshot(study_dir)) for _ in range(3)]
    commands_s = {name: _command_s(words, study_dir) for name, words in commands.items()}
    recipe = recipe_of(num_trials + num_asked)
    asked, settled = [], []
    began = time.perf_counter()
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        open_s = time.perf_counter() - began
        for _ in range(num_asked):
            began = time.perf_counter()
            spec = study.next()
            asked.append(time.perf_counter() - began)
            assert spec is not None
            finish(spec.folder(study_dir), objective_of(spec.values["learning_rate"]))
            settled.append(_seconds(lambda spec=spec: study.settle(spec)))  # type: ignore[misc]
    return StudyCost(
        num_trials,
        *_ms(asked),
        *_ms(settled),
        log_mb,
        statistics.median(replays),
        open_s,
        commands_s,
        peak_mb(),
    )


@dataclass(frozen=True)
class DriverCost:
    """What a driver does for its running trials, as shares of one core.

    Attributes:
        num_reports: Lines that each trial had written before.
        read_ms: Taking in what all have reported, median.
        read_share: Processor time of all readings per second of the search.
        view_ms: Drawing the live table once, median.
        view_share: As ``read_share``.
    """

    num_reports: int
    read_ms: float
    read_share: float
    view_ms: float
    view_share: float


def driver_cost(
    study_dir: Path,
    num_finished: int = 10,
    num_live: int = NUM_LIVE,
    num_reports: int = 100,
    num_seconds: int = NUM_SECONDS,
) -> DriverCost:
    """Plays seconds of a search with running trials that report once a second, without waiting for them to pass.

    Args:
        study_dir: A folder that is not there yet; absolute.
        num_finished: Finished trials of the study.
        num_live: Running trials.
        num_reports: Lines that each has written before.
        num_seconds: Seconds played.
    """
    import io

    from rich.console import Console

    from carft_ray.launch.cluster.capacity import AtATime
    from carft_ray.launch.driver import POLL_EVERY_S, Driver
    from carft_ray.launch.events import Started
    from carft_ray.launch.workers.mailbox import Exchange, Mailbox, Post, Process, Record
    from carft_ray.study.snapshot import snapshot
    from carft_ray.ui.live import SearchView
    from carft_ray.ui.progress import REFRESH_PER_S

    fill(study_dir, num_finished, "random")  # proposals are not what is measured here
    recipe = recipe_of(num_finished + num_live, "random")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    view = SearchView(num_seconds, snapshot(study_dir).trials)
    readings, draws, read_cpu, draw_cpu = [], [], 0.0, 0.0
    shown: list[str | None] = []
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        box = Mailbox()
        show = lambda event: shown.append(view.update(event))  # noqa: E731
        driver = Driver(study, AtATime(num_live), show, hang_timeout_s=3600.0, exchange=Exchange(box))
        view.update(Started(num_finished + num_live, num_finished, num_live, "as many as are measured"))
        specs = []
        for index in range(num_live):
            spec = driver.propose(f"id{index}")
            assert spec is not None
            folder = spec.folder(study_dir)
            folder.mkdir(parents=True, exist_ok=True)
            epochs = range(1, num_reports + 1)
            lines = (json.dumps({**EPOCH, "step": epoch, "epoch": epoch}) + "\n" for epoch in epochs)
            (folder / METRICS).write_text("".join(lines))
            driver.started(f"id{index}")
            specs.append(spec)
        for second in range(1, num_seconds + 1):
            for spec in specs:
                row = {**EPOCH, "step": num_reports + second, "epoch": num_reports + second}
                process = Process(1, "1", "n" * 56)
                record: Record = ("row", row)
                box.post(Post(spec.training, spec.attempt, 0, second, process, None, (record,), second - 1))
            for _ in range(round(1 / POLL_EVERY_S)):
                began, cpu = time.perf_counter(), time.process_time()
                driver.poll(at_once=True)  # though it reads less often where one reading takes long
                readings.append(time.perf_counter() - began)
                read_cpu += time.process_time() - cpu
            for _ in range(REFRESH_PER_S):
                began, cpu = time.perf_counter(), time.process_time()
                terminal.print(view)
                draws.append(time.perf_counter() - began)
                draw_cpu += time.process_time() - cpu
    return DriverCost(
        num_reports,
        1000 * statistics.median(readings),
        read_cpu / num_seconds,
        1000 * statistics.median(draws),
        draw_cpu / num_seconds,
    )


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _command_s(words: Sequence[str], study_dir: Path) -> float:
    """Returns the median wall time of three runs of ``carft-ray WORD STUDY ...``, after one that fills the caches."""
    command = [sys.executable, "-m", "carft_ray.cli", words[0], str(study_dir), *words[1:]]
    times = [_seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(4)]
    return statistics.median(times[1:])


def _ms(seconds: Sequence[float]) -> tuple[float, float]:
    """Returns median and 95th percentile in milliseconds."""
    return 1000 * statistics.median(seconds), 1000 * float(np.percentile(seconds, 95))


# ---------------------------------------------------------------------------------------------- rows


def study_rows(full: bool, scale: bool) -> list[Row]:
    """Measures a study of 1,000 finished trials, or 10,000 with ``scale``, against one of 10."""
    many = 10_000 if scale else 1_000
    costs = []
    for number in (10, many):
        with tempfile.TemporaryDirectory(prefix="carft-engine-") as folder:
            costs.append(StudyCost(**apart(study_cost_in, folder, number)))
    few, most = costs
    measured: dict[str, tuple[float, float, str]] = {
        "a proposal": (few.ask_ms, most.ask_ms, f"{most.ask_ms:.1f} ms, 95 % {most.ask_p95_ms:.0f}"),
        "an answer": (few.tell_ms, most.tell_ms, f"{most.tell_ms:.1f} ms, 95 % {most.tell_p95_ms:.0f}"),
        "size of the log": (few.log_mb, most.log_mb, f"{most.log_mb:.1f} MB"),
        "reading the log": (few.replay_s, most.replay_s, f"{most.replay_s:.2f} s"),
        "opening the study": (few.open_s, most.open_s, f"{most.open_s:.2f} s"),
        "peak memory": (few.memory_mb, most.memory_mb, f"{most.memory_mb:.0f} MB"),
    }
    measured |= {name: (few.commands_s[name], took, f"{took:.2f} s") for name, took in most.commands_s.items()}
    return [
        Row(f"{name}, {many:,} finished trials / 10", above / below, detail=shown)
        for name, (below, above, shown) in measured.items()
    ]


def study_cost_in(folder: str, num_trials: int) -> dict[str, Any]:
    """Returns ``study_cost`` of a study in a folder, as plain data."""
    return vars(study_cost(Path(folder).resolve() / "study", num_trials))


def driver_rows(full: bool, scale: bool) -> list[Row]:
    """Measures a driver with 200 running trials that had reported before; ``scale``: after 10,000 finished, too."""
    rows, cases = [], {"10 lines each": (10, 10), "1,000 lines each": (10, 1_000)}
    if scale:
        cases["10,000 finished trials"] = (10_000, 10)
    for name, (num_finished, num_reports) in cases.items():
        with tempfile.TemporaryDirectory(prefix="carft-engine-") as folder:
            cost = driver_cost(Path(folder).resolve() / "study", num_finished=num_finished, num_reports=num_reports)
        what = f"share of a core for {NUM_LIVE} running trials"
        rows.append(Row(f"{what}, reading, {name}", cost.read_share, digits=4, detail=f"{cost.read_ms:.1f} ms each"))
        rows.append(Row(f"{what}, table, {name}", cost.view_share, digits=4, detail=f"{cost.view_ms:.1f} ms each"))
    return rows


def throughput_rows(full: bool, scale: bool) -> list[Row]:
    """Measures a search of trainings of nothing through Ray on this machine, inline."""
    from carft_ray.launch.command import Plan, run_search
    from carft_ray.launch.events import Event, Started
    from carft_ray.launch.workers.runtime import Runner

    let_workers_import()
    started: list[Started] = []

    def on_event(event: Event) -> None:
        started.extend([event] if isinstance(event, Started) else [])

    with tempfile.TemporaryDirectory(prefix="carft-engine-") as folder:
        study_dir = Path(folder).resolve() / "study"
        result = run_search(Plan(recipe_of(NUM_TRIALS), study_dir, on_event=on_event, runner=Runner(prepare, train)))
        ends = sorted(path.stat().st_mtime for path in study_dir.glob(f"trials/*/*/{RESULT}"))
    shown = f"{started[0].concurrency} at a time, {result.elapsed_s:.1f} s in all"
    return [Row("trials of nothing through Ray, a second", (len(ends) - 1) / (ends[-1] - ends[0]), detail=shown)]
