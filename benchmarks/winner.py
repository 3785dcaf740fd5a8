"""What the best of a search is worth, on any images: ``python -m benchmarks.effect --recipe RECIPE``

The whole sequence that a user would run, by the command line:

    search    the recipe: CAR-FT
    search    the same with all penalties 0, which its space then leaves out: plain fine-tuning, an equal budget
    confirm   the winner, the winner of plain fine-tuning, and the baselines, each with five fresh seeds
    test      all of them on id_test and ood_test, once, at the alphas that validation chose

It prints a table in Markdown and draws it. Everything is written to ``--out``; a run that was killed continues with the
same command, and a finished one is only printed again.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.effect_figure import Estimate, effect_figure
from carft_ray import files
from carft_ray.errors import Problem, UsageError
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import PENALTIES

ROOT = Path(__file__).resolve().parents[1]
NUM_SEEDS = 5
SUMMARY = Path("test") / "summary.json"
COLUMNS = {"id_accuracy": "ID test", "ood_accuracy": "OOD test, mean", "objective": "objective"}


def run(recipe_path: Path, out: Path, figure_dir: Path, settings: Sequence[str]) -> int:
    """Runs what is missing, prints the table and draws the figure; returns the exit code of what failed, else 0.

    Args:
        recipe_path: Its test sets are read.
        out: Folder of the two studies.
        figure_dir: Where ``effect.png`` and ``.svg`` go.
        settings: Over the recipe, ``key=value``.

    Raises:
        UsageError: The recipe has no test sets, or its space nothing but ``kl_weight``.
    """
    recipe = load_recipe(recipe_path, settings)
    plain_over = plain_settings(recipe, recipe_path)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / ".gitignore", "*\n")
    study, plain = str(out / "car_ft"), str(out / "plain")
    changed = [word for setting in settings for word in ("--set", setting)]
    plain_changed = [word for setting in plain_over for word in ("--set", setting)]
    commands = (
        ("search", str(recipe_path), "--study", study, *changed),
        ("search", str(recipe_path), "--study", plain, *changed, *plain_changed),
        ("confirm", study, "--top", "1", "--seeds", str(NUM_SEEDS), "--against", plain),
        ("test", study),
    )
    for words in () if (out / "car_ft" / SUMMARY).exists() else commands:
        print(f"$ carft-ray {' '.join(words)}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", "carft_ray.cli", *words], check=False, stdout=sys.stderr)
        if done.returncode:
            return done.returncode
    summary = files.read_json(out / "car_ft", str(SUMMARY))
    print("\n".join(markdown(summary)))
    print(f"\n{summary['headline']}")
    below = f"test sets; 95 % intervals, {len(summary['seeds'])} seeds"
    synthetic = recipe.data.train.source == "sandbox"
    pictures = figure_dir / "effect.png", figure_dir / "effect.svg"
    figure_dir.mkdir(parents=True, exist_ok=True)
    effect_figure(estimates(summary), *pictures, recipe.name, words=below, synthetic=synthetic)
    return 0


def plain_settings(recipe: Recipe, path: Path) -> list[str]:
    """Returns the settings that make the recipe one of plain fine-tuning.

    Raises:
        UsageError: The recipe has no test sets, or its space nothing but penalties.
    """
    searched = recipe.search.space
    space = {name: part.model_dump(mode="json") for name, part in searched.items() if name not in PENALTIES}
    problems = []
    if not space:
        problems.append(Problem(f"{path}: search.space", "must have a parameter beside kl_weight", "none"))
    if recipe.data.id_test is None:
        problems.append(Problem(f"{path}: data.id_test", "must be a set: this benchmark reads test sets", "none"))
    if problems:
        raise UsageError(problems)
    zeros = (f"train.{name}=0" for name in PENALTIES)
    return ["name=plain", *zeros, f"search.space={json.dumps(space)}", "search.baselines={}"]


def markdown(summary: Mapping[str, Any]) -> list[str]:
    """Returns the rows of ``test/summary.json`` as a Markdown table, accuracies in percent with 95 % intervals."""
    lines = ["| | alpha | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in summary["rows"]:
        cells = [_cell(row[name]) for name in COLUMNS]
        lines.append(f"| {row['name'].replace('_', ' ')} | {row['alpha']:.2f} | " + " | ".join(cells) + " |")
    return lines


def estimates(summary: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """Returns the accuracies of the rows for the figure: ID, OOD mean, and each OOD test set."""
    found = {}
    for row in summary["rows"]:
        ood = {name: each for name, each in row["sets"].items() if name != "id_test"}
        columns = {"ID": row["id_accuracy"], "OOD mean": row["ood_accuracy"], **ood}
        found[row["name"].replace("_", " ")] = {
            name: Estimate(each["mean"], *each["ends"]) for name, each in columns.items() if each is not None
        }
    return found


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["ends"]
    return f"{100 * found['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
