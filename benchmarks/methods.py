"""Each method searched with the same number of trainings, on any images: ``python -m benchmarks.methods RECIPE``

What a user would run, by the command line:

    search    the recipe once per method (``--method``), over the same range of learning rates, with alpha
    confirm   the winner of the first method, those of the others and the first study's baselines, with fresh seeds
    test      all of them on id_test and ood_test, once, at the alphas that validation chose

It prints tables in Markdown, writes them to ``--out`` with all numbers and draws them. Everything is kept there: a run
that was killed continues with the same command, and a finished one is only printed again. Like ``carft-ray test``, and
unlike every search and training, it **reads the test sets**.

A method can have more OOD accuracy only because it has moved less from the zero-shot model. So the second table reads
the front of each search (all its trainings at all alphas measured, validation sets) at the same ID accuracies.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods_figure import AGAIN, MARKED, Row, forest, fronts_figure
from carft_ray import environment, files
from carft_ray.errors import CarftError, Problem, UsageError
from carft_ray.recipe.loading import load_recipe, recipe_hash
from carft_ray.recipe.methods import methods
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.confirm_plan import read_plan
from carft_ray.results.figure import INK
from carft_ray.study.pareto_front import non_dominated
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import result_of
from carft_ray.ui import console

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "methods"
NUM_SEEDS = 5
PLAIN = "fine_tuning"
TRIAL = re.compile(r"t\d{4,}-[0-9a-f]{4}")  # a trial in a name
ROUNDING = 1e-9
Pair = tuple[float, float]
SUMMARY = Path("test") / "summary.json"
LEVELS = (0.7, 0.8, 0.9)  # of the way from the ID accuracy of zero-shot to the highest of plain fine-tuning's search
COLUMNS = {"id_accuracy": "ID test", "ood_accuracy": "OOD test, mean", "objective": "objective"}


def run(
    recipe_path: Path,
    out: Path,
    settings: Sequence[str],
    names: Sequence[str],
    num_seeds: int = NUM_SEEDS,
    again: int | None = None,
) -> int:
    """Runs what is missing, prints the table and draws the figure; returns the exit code of what failed, else 0.

    Args:
        recipe_path: Its test sets are read.
        out: Folder of the studies, the table and the figure.
        settings: Over the recipe, ``key=value``.
        names: Of the methods; the first one's winner is compared with those of the others.
        num_seeds: Fresh seeds of each winner.
        again: Another seed of the sampler: the first method and plain fine-tuning are searched with it, too.

    Raises:
        UsageError: The recipe has no test sets, or searches no key that all methods have, or ``again`` is its own seed.
        RecipeError: It breaks rules.
    """
    recipe = load_recipe(recipe_path, settings)
    for name in names:
        check(load_recipe(recipe_path, [f"method={name}", *settings]), recipe_path, again)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / ".gitignore", "*\n")
    changed = [word for setting in settings for word in ("--set", setting)]
    searches = {name: ["--method", name] for name in names}
    for name in () if again is None else dict.fromkeys((names[0], PLAIN)):
        searches[f"{name}{AGAIN}{again}"] = ["--method", name, "--set", f"search.sampler.seed={again}"]
    studies = {name: out / name for name in searches}
    first, *others = studies.values()
    commands = []
    for name, words in searches.items():
        more = [] if studies[name] == first else ["--set", "search.baselines={}"]  # those of the first study are enough
        commands.append(("search", str(recipe_path), "--study", str(studies[name]), *words, *changed, *more))
    against = [word for study in others for word in ("--against", str(study))]
    commands.append(("confirm", str(first), "--top", "1", "--seeds", str(num_seeds), *against))
    commands.append(("test", str(first)))
    for command in () if (first / SUMMARY).exists() else commands:
        print(f"$ carft-ray {' '.join(command)}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", "carft_ray.cli", *command], check=False, stdout=sys.stderr)
        if done.returncode:
            return done.returncode
    summary = files.read_json(first, str(SUMMARY))
    confirmed = files.read_json(first, "confirm/summary.json")
    fronts, levels, equal = equal_id(studies)
    stages = read_plan(first)
    assert stages is not None, "the confirm has ended"
    searched = {row.name: row.objective for row in stages[0].rows}
    tables = {
        "test": markdown(summary, confirmed, names[0]),
        "luck": luck(searched, confirmed, names[0]),
        "equal ID": equal,
    }
    shown = [*(line for lines in tables.values() for line in (*lines, "")), str(summary["headline"])]
    files.write_text(out / "methods.md", "\n".join(shown) + "\n")
    about = {"recipe": recipe_hash(recipe), "settings": list(settings), "cpu": environment.cpu_model()}
    about |= _cost(studies.values())
    numbers = {name: summary[name] for name in ("headline", "seeds")} | {"optimism": confirmed["optimism"]}
    numbers |= {"rows": [_numbers(row) for row in summary["rows"]], "fronts": fronts, "levels": levels}
    numbers |= {
        "differences": [_numbers(each) for each in (*summary["baselines"], *summary["others"])],
        "tables": tables,
    }
    files.write_json(out / "methods.json", {**about, **numbers})
    print("\n".join(shown))
    below = f"test sets; 95 % intervals over seeds and images, {len(summary['seeds'])} fresh seeds"
    synthetic = recipe.data.train.source == "sandbox"
    forest(rows_of(summary, names[0]), recipe.name, below, synthetic, out / "methods.png", out / "methods.svg")
    coloured_first = sorted(studies, key=lambda name: (name != names[0], name != PLAIN))
    shown_fronts = {name: fronts[name] for name in coloured_first}
    fronts_figure(shown_fronts, recipe.name, synthetic, out / "fronts.png", out / "fronts.svg")
    return 0


def check(recipe: Recipe, path: Path, again: int | None = None) -> None:
    """Checks that a recipe has test sets, something to search besides the keys of methods, and another seed.

    Raises:
        UsageError: It has not.
    """
    problems = []
    if not recipe.search.space:
        problems.append(Problem(f"{path}: search.space", "must have a parameter besides those of methods", "none"))
    if recipe.data.id_test is None:
        problems.append(Problem(f"{path}: data.id_test", "must be a set: this benchmark reads test sets", "none"))
    if not recipe.data.ood_val:
        problems.append(Problem(f"{path}: data.ood_val", "must have a set: fronts are of ID and OOD accuracy", "none"))
    if recipe.search.sampler.seed == again:
        problems.append(Problem("--again", "must be another seed than the recipe's search.sampler.seed", str(again)))
    if problems:
        raise UsageError(problems)


def markdown(summary: Mapping[str, Any], confirmed: Mapping[str, Any], first: str) -> list[str]:
    """Returns the rows of ``test/summary.json`` as a Markdown table, accuracies in percent with 95 % intervals.

    Args:
        summary: The content of the file.
        confirmed: That of ``confirm/summary.json``.
        first: The method of the winner.
    """
    differences = {each["other"]: each for each in (*summary["baselines"], *summary["others"])}
    trainings = {row["name"]: row["chosen_from"] for row in confirmed["rows"]}
    titles = ["", "best of", "alpha", *COLUMNS.values(), f"{first} minus this"]
    rows = []
    for row in summary["rows"]:
        cells = [_name(row, first), trainings.get(row["name"]) or "", f"{row['alpha']:.2f}"]
        cells += [cell(row[name]) for name in COLUMNS]
        other = differences.get(row["name"])
        cells.append(cell(other["objective"], signed=True) if other else "")
        rows.append(cells)
    return table(titles, rows)


def luck(searched: Mapping[str, float], confirmed: Mapping[str, Any], first: str) -> list[str]:
    """Returns as a Markdown table what the search measured of each configuration, and what fresh seeds have.

    Args:
        searched: By row the objective in its search, of one training.
        confirmed: As ``markdown``.
        first: As ``markdown``.
    """
    rows = []
    for row in confirmed["rows"]:
        if row["role"] != "ablation":
            cells = [f"{100 * searched[row['name']]:.1f}", cell(row["objective"])]
            rows.append([_name(row, first), row["chosen_from"] or "", *cells])
    return table(["objective on validation", "best of", "in the search, one seed", "on fresh seeds"], rows)


def equal_id(studies: Mapping[str, Path]) -> tuple[dict[str, list[Pair]], list[float], list[str]]:
    """Returns the front of each search by method, the ID accuracies of ``LEVELS``, and the OOD accuracies there."""
    fronts: dict[str, list[Pair]] = {}
    for name, study in studies.items():
        curves = [result_of(study, row)["curve"] for row in snapshot(study).trials if row.outcome == "complete"]
        points = [(point["id_accuracy"], point["ood_accuracy"]) for curve in curves for point in curve]
        start = points[0][0]  # at alpha 0, the same in all studies
        fronts[name] = [points[index] for index in non_dominated(points)]
    highest = fronts.get(PLAIN, fronts[next(iter(fronts))])[-1][0]
    levels = [start + share * (highest - start) for share in LEVELS]
    titles = ["OOD on validation, highest with ID of at least", *(f"{100 * level:.1f} %" for level in levels)]
    rows = []
    for name, front in fronts.items():
        at_least = ([ood for accuracy, ood in front if accuracy >= level - ROUNDING] for level in levels)
        rows.append([name, *(f"{100 * max(each):.1f}" if each else "-" for each in at_least)])
    return fronts, levels, table(titles, rows)


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    head, *lines = (f"| {' | '.join(map(str, row))} |" for row in (titles, *rows))
    return [head, "|---" * len(titles) + "|", *lines]


def rows_of(summary: Mapping[str, Any], first: str) -> list[Row]:
    """Returns the rows of ``test/summary.json`` for the figure, the highest objective first; args as ``markdown``."""
    found = []
    for row in sorted(summary["rows"], key=lambda row: -row["objective"]["mean"]):
        columns = {title: (row[name]["mean"], *row[name]["ends"]) for name, title in COLUMNS.items() if row[name]}
        name = _name(row, first)
        found.append(Row(name, columns, MARKED[0] if name == first else MARKED[1] if name == PLAIN else INK))
    return found


def _name(row: Mapping[str, Any], first: str) -> str:
    """Returns a row's method, without the name of the trial that won its search: each method has one."""
    if row["role"] == "baseline" and TRIAL.search(row["name"]) is None and row["alpha"]:
        return f"baseline {row['name']}"
    return TRIAL.sub("", re.sub(f"^{TRIAL.pattern}", first, row["name"])).strip()


def _cost(studies: Iterable[Path]) -> dict[str, Any]:
    """Returns the commits of all trainings, those with fresh seeds included, how many there are, and their hours."""
    rows = [(study, row) for study in studies for row in snapshot(study).rows]
    rows = [(study, row) for study, row in rows if row.outcome == "complete" and row.alpha]
    commits = sorted({result_of(study, row)["environment"]["commit"] for study, row in rows})
    hours = sum(row.elapsed_s or 0.0 for _, row in rows) / 3600
    return {"commits": commits, "num_trainings": len(rows), "hours_of_trainings": round(hours, 2)}


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns of a row, or of a difference, what the tables and figures show."""
    values = {name: {key: row[name][key] for key in ("mean", "ends")} for name in COLUMNS if row.get(name)}
    return {name: row[name] for name in ("name", "other", "role", "alpha") if name in row} | values


def cell(found: Mapping[str, Any] | None, signed: bool = False) -> str:
    """Returns a ``mean`` with its ``ends``, fractions, in percent; empty for None."""
    if found is None:
        return ""
    mean, low, high = (100 * value for value in (found["mean"], *found["ends"]))
    sign = "+" if signed else ""
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or that of what failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description="Methods, searched equally.")
    parser.add_argument("recipe", type=Path, help="with test sets, which are read")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the recipe")
    parser.add_argument("--out", type=Path, help=f"where studies and numbers are kept ({OUT}/NAME OF THE RECIPE)")
    parser.add_argument("--methods", default=",".join(["car_ft", *(name for name in methods() if name != "car_ft")]))
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="fresh seeds of each winner (%(default)s)")
    words = "search the first method and plain fine-tuning once more, with this seed of the sampler"
    parser.add_argument("--again", type=int, metavar="SEED", help=words)
    given = parser.parse_args(argv)
    try:
        out = (given.out or OUT / given.recipe.stem).resolve()
        return run(given.recipe.resolve(), out, given.set, given.methods.split(","), given.seeds, given.again)
    except CarftError as error:
        console.show_error(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
