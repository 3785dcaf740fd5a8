"""Which rule chooses better values: today's, expected ones, or repeats? ``python -m benchmarks.selection RECIPE``

    python -m benchmarks.selection examples/pacs/photo.yaml --out benchmarks/results/selection/photo

Searches of N trainings in the worlds of ``benchmarks.emulators``, which are made of the recipe's table
(``benchmarks.seed_table``). Proposals, repeats and expectations are the product's own; nothing is written to a study.
The recipe's baselines are trained once before each search, and do not count in N.

    today          all trainings have one seed; the best has the highest measured objective at its own alpha, and this
                   number is what it promises
    expected       the same trainings; the best is expected to be best (``study.expected``)
    repeats R      a share R of the trainings are repeats (``search.repeats``)
    repeats R, told   before each draw the sampler is told the expected objectives in place of the measured ones
    NAME N times   no search: a baseline is trained N times; of ``table`` as often as it can be

Each rule but the last chooses twice: the best trial, and the best trial or baseline. Each choice has a true objective
at its alpha. In points, with 95 % intervals over searches:

    true         true objective
    - today      the same minus that of today's best trial in the same search, paired
    - NAME       the same minus the true objective of a baseline at the alpha of its first training
    worse        share of the searches where this is below -.2
    optimism     what the choice promises minus the truth
    covers       share of the 95 % intervals of the promise that cover the truth; not of ``table``, whose truth is noisy
    new, again   different values among the trials; trainings of baselines beyond the first; means

A second table shows how often choices are truly better than a baseline, by the probability that was given for this. All
results of the searches are in ``searches-HASH.jsonl`` and all numbers in ``summary-HASH.json``; HASH is that of table,
recipe and rules. A killed run continues with the same command; after a change of the product use another folder.

One more world is not simulated (``benchmarks.trained``): ``--worlds trained --trainings 16 --searches 5 --rules ...``
runs real trainings, and the truth is the mean of three fresh seeds. No test set is read.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from benchmarks.emulators import EDGE, SeedTable, World, make_world, read_table
from benchmarks.rules import REPEATED, RULES, TODAY, run_rules, student
from carft_ray import files
from carft_ray.errors import CarftError
from carft_ray.evaluation.metrics import wilson
from carft_ray.recipe.loading import load_recipe, recipe_hash
from carft_ray.ui import console

if TYPE_CHECKING:
    from benchmarks.trained import Trained

TABLES = Path(__file__).resolve().parent / "tables"
WORLDS = ("smooth", "rough", "flat", "table")
TRAINED = "trained"
SEARCHES = {16: 1000, 32: 300, 64: 100}  # by the number of trainings
MARGIN = 0.002  # worse than a baseline by more
BINS = 5  # of probabilities
CHOICES = {"trial": "", "any": ", or a baseline"}
SAY_S = 10  # seconds between two lines about the time left


@dataclass(frozen=True)
class Task:
    """One search by all rules: world, number of trainings, number of the search."""

    world: str
    trainings: int
    search: int

    @property
    def cost(self) -> float:
        """About how long it takes, for the time left."""
        return self.trainings * (1 + self.trainings / 100)


@dataclass(frozen=True)
class Here:
    """What searches are made of; goes to worker processes.

    Attributes:
        table: Of the recipe.
        rules: Their names, with today's.
        out: Folder of the results.
    """

    table: SeedTable
    rules: tuple[str, ...]
    out: Path

    def world(self, name: str) -> World:
        """Returns a world by its name."""
        return self.trained() if name == TRAINED else make_world(name, self.table)

    def trained(self) -> "Trained":
        """Returns the world of real trainings."""
        from benchmarks.trained import Trained  # not above: it loads torch, which the other worlds do without

        return Trained(self.table, self.out / TRAINED, TABLES / f"{self.table.recipe.name}-trained.jsonl")


_here: dict[str, Any] = {}  # of a worker process: of what searches are made, and the worlds made of it so far


def _begin_worker(here: Here) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _here.update(here=here, worlds={})


def _run(task: Task) -> dict[str, Any]:
    here: Here = _here["here"]
    if task.world not in _here["worlds"]:
        _here["worlds"][task.world] = here.world(task.world)
    world = _here["worlds"][task.world]
    return {**vars(task), "rules": run_rules(world, here.table.recipe, task.trainings, task.search, here.rules)}


def results(here: Here, tasks: Sequence[Task], processes: int) -> Iterator[dict[str, Any]]:
    """Runs tasks in worker processes, or here if it is one; gives each result as soon as it is there."""
    if processes == 1:
        _begin_worker(here)
        yield from map(_run, tasks)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of small matrices more threads are many times slower
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin_worker, (here,)) as pool:
        left, running = iter(tasks), set[Future[dict[str, Any]]]()
        while True:
            running |= {pool.submit(_run, task) for task in islice(left, 2 * processes - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def task_of(result: Mapping[str, Any]) -> Task:
    """Returns the task of a result."""
    return Task(result["world"], result["trainings"], result["search"])


def read_results(path: Path) -> dict[Task, dict[str, Any]]:
    """Returns the results of a file by their tasks; half a line, which a kill has left, is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            result = json.loads(line)
            found[task_of(result)] = dict(result["rules"])
    return found


def run_all(here: Here, path: Path, tasks: Sequence[Task], processes: int) -> None:
    """Runs the searches that a file lacks, and appends their results to it."""
    known = read_results(path)
    todo = [task for task in tasks if task not in known]
    began, said, done, total = time.monotonic(), 0.0, 0.0, sum(task.cost for task in todo)
    trained = here.trained() if any(task.world == TRAINED for task in todo) else None
    for result in results(here, todo, processes):
        files.append_line(path, json.dumps(result), is_flushed=False)
        task = task_of(result)
        if trained is not None:
            trained.collect()
        done += task.cost
        elapsed = time.monotonic() - began
        if elapsed - said > SAY_S:
            said, left = elapsed, elapsed * (total / done - 1)
            what = f"{task.world}, {task.trainings} trainings"
            print(
                f"[{elapsed / 60:.0f} min] {done / total:4.0%}  {what}, about {left / 60:.0f} min left", file=sys.stderr
            )


def share(hits: Sequence[bool]) -> tuple[float, float, float]:
    """Returns a share with Wilson's 95 % interval."""
    return (sum(hits) / len(hits), *wilson(sum(hits), len(hits)))


def summary(found: Sequence[Mapping[str, Any]], is_exact: bool) -> list[dict[str, Any]]:
    """Returns the numbers of each rule and choice over the same searches, as fractions.

    Args:
        found: Of each search, what each rule has found.
        is_exact: Whether the truth has no noise.
    """
    lines = []
    today = np.array([each[TODAY]["choices"]["trial"]["truth"] for each in found])
    for rule, choice in ((rule, choice) for choice in CHOICES for rule in found[0]):
        if choice not in found[0][rule]["choices"]:
            continue
        ones = [each[rule]["choices"][choice] for each in found]
        true, promised = (np.array([one[key] for one in ones]) for key in ("truth", "promise"))
        once = [{**each[TODAY]["once"], **each[rule]["once"]} for each in found]
        gains = {name: true - np.array([each[name] for each in once]) for name in once[0]}
        line = {
            "rule": rule + (CHOICES[choice] if "trial" in found[0][rule]["choices"] else ""),
            "choice": choice,
            "searches": len(found),
            **{key: float(np.mean([each[rule][key] for each in found])) for key in ("new", "again")},
            "baselines": float(np.mean([isinstance(one["values"], str) for one in ones])),
            "true": student(true),
            "minus_today": student(true - today),
            "minus": {name: student(gain) for name, gain in gains.items()},
            "worse": {name: share((gain < -MARGIN).tolist()) for name, gain in gains.items()},
            "optimism": student(promised - true),
        }
        if is_exact and "ends" in ones[0]:
            line["covers"] = share([one["ends"][0] <= one["truth"] <= one["ends"][1] for one in ones])
        if is_exact and "better" in ones[0]:
            line["better"] = {name: calibration([one["better"].get(name) for one in ones]) for name in gains}
        lines.append(line)
    return lines


def calibration(given: Sequence[tuple[float, float] | None]) -> list[dict[str, Any]]:
    """Returns for each bin of probabilities how many there are, their mean, and the share that is truly better.

    Args:
        given: Of each search, the probability and the true difference; equal values count as half. None: the choice
            is that baseline.
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for p, gain in (each for each in given if each is not None):
        bins[min(BINS - 1, int(p * BINS))].append((p, (1 + np.sign(gain) * (abs(gain) > EDGE)) / 2))
    means = [np.mean(each, axis=0).tolist() if each else (None, None) for each in bins]
    return [{"count": len(each), "p": p, "better": better} for each, (p, better) in zip(bins, means, strict=True)]


def in_points(numbers: Sequence[float]) -> str:
    """Returns a difference with its interval in points."""
    mean, low, high = (100 * number for number in numbers)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def in_percent(numbers: Sequence[float]) -> str:
    """Returns a share with its interval in percent."""
    mean, low, high = (100 * number for number in numbers)
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def tables_of(world: str, trainings: int, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of the two Markdown tables of a world and a number of trainings."""
    names = [*lines[0]["minus"]]
    heads = ["rule", "true", "- today"]
    heads += [head for name in names for head in (f"- {name}", "worse, %")]
    yield f"\n{world}, {trainings} trainings, {lines[0]['searches']} searches\n"
    yield from _head([*heads, "optimism", "covers, %", "new", "again"])
    for line in lines:
        cells = [line["rule"], in_points(line["true"]).replace("+", ""), in_points(line["minus_today"])]
        for name in names:
            cells += [in_points(line["minus"][name]), in_percent(line["worse"][name])]
        cells += [in_points(line["optimism"]), in_percent(line["covers"]) if "covers" in line else ""]
        cells += [f"{line[key]:.1f}" for key in ("new", "again")]
        yield f"| {' | '.join(cells)} |"
    rated = [(line, name) for line in lines for name in names if "better" in line and line["choice"] == "trial"]
    if rated:
        ranges = [f"P {at / BINS:.1f} to {(at + 1) / BINS:.1f}" for at in range(BINS)]
        yield "\nNumber of choices: mean P that they are better than a baseline, share that is, %\n"
        yield from _head(["rule", "baseline", *ranges])
    for line, name in rated:
        cells = [
            f"{each['count']}: {100 * each['p']:.0f}, {100 * each['better']:.0f}" if each["count"] else ""
            for each in line["better"][name]
        ]
        yield f"| {line['rule']} | {name} | {' | '.join(cells)} |"


def _head(names: Sequence[str]) -> tuple[str, str]:
    return f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"


def run(here: Here, tasks: Sequence[Task], processes: int, name: str) -> None:
    """Runs the searches that are missing, prints their tables and writes their numbers.

    Args:
        here: Of what searches are made.
        tasks: The searches.
        processes: At a time.
        name: Of the results, which tells table, recipe and rules.
    """
    path = here.out / f"searches-{name}.jsonl"
    run_all(here, path, tasks, processes)
    known, numbers = read_results(path), []
    for world, trainings in dict.fromkeys((task.world, task.trainings) for task in tasks):
        found = [known[task] for task in tasks if (task.world, task.trainings) == (world, trainings)]
        lines = summary(found, world not in ("table", TRAINED))
        print("\n".join(tables_of(world, trainings, lines)))
        numbers += [{"world": world, "trainings": trainings, **line} for line in lines]
    files.write_text(here.out / f"summary-{name}.json", json.dumps(numbers, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description="Rules of choosing values.")
    parser.add_argument("recipe", type=Path, help="the recipe of a table, as examples/pacs/photo.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--table", type=Path, help="default: benchmarks/tables/NAME-seeds.parquet")
    parser.add_argument("--worlds", nargs="+", choices=(*WORLDS, TRAINED), default=WORLDS, help=f"({' '.join(WORLDS)})")
    names = (*RULES, REPEATED)
    parser.add_argument("--rules", nargs="+", choices=names, default=names, help=f"besides {TODAY} (all)")
    words = " ".join(map(str, SEARCHES))
    parser.add_argument("--trainings", nargs="+", type=int, choices=[*SEARCHES], default=[*SEARCHES], help=f"({words})")
    words = ", ".join(f"{number} of {trainings}" for trainings, number in SEARCHES.items())
    parser.add_argument("--searches", type=int, help=f"at most this number of each kind ({words})")
    parser.add_argument("--processes", type=int, default=2, help="at a time (%(default)s)")
    given = parser.parse_args(argv)
    if given.searches is not None and given.searches < 2:
        parser.error("--searches must be at least 2")
    try:
        recipe = load_recipe(given.recipe)
        path = given.table or TABLES / f"{recipe.name}-seeds.parquet"
        table = read_table(path, recipe)
        given.out.mkdir(parents=True, exist_ok=True)
        most = make_world("table", table).num_points or 0
        tasks = [
            Task(world, trainings, search)
            for trainings in given.trainings
            for world in given.worlds
            for search in range(min(SEARCHES[trainings], given.searches or SEARCHES[trainings]))
            if world != "table" or trainings <= most
        ]
        kept = tuple(name for name in names if name in (TODAY, *given.rules))
        content = [path.read_bytes(), recipe_hash(recipe).encode(), *(name.encode() for name in kept)]
        run(Here(table, kept, given.out), tasks, given.processes, hashlib.sha256(b"".join(content)).hexdigest()[:8])
    except CarftError as error:
        console.show_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
