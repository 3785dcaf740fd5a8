"""Trainings of 24 configurations with four seeds each, as one table: ``python -m benchmarks.seed_table RECIPE``

    python -m benchmarks.seed_table examples/pacs/photo.yaml --out benchmarks/results/seeds/photo
    python -m benchmarks.seed_table search_spaces/quickstart.yaml --no-tests --out benchmarks/results/seeds/quickstart

The configurations are the recipe's baselines and a space-filling design (scrambled Sobol) over its search space. Each
is trained with seeds 0 to 3 by the product's own code. The table shows what a search sees of a training, and what a
search does not see: its accuracies on the first fifth of each test domain and of the ID test images, which is for
tables. No claim about test domains is made from it, and the recipes of ``examples/pacs`` test on the other four fifths.
With ``--no-tests`` no test set is read.

    one row per training: configuration, the searched values, seed, alpha, objective, elapsed_s
    curve    list of {alpha, objective, id_accuracy, ood_accuracy, accuracy/<set>, correct, tests}

``correct`` and ``tests`` hold one bit per validation and test image (``numpy.packbits``). The metadata of the schema
have the sets and their sizes, commit, recipe hash, and which images the zero-shot model answers right. A training that
diverged has its values and nothing else. Fine-tuned weights stay in the folder of the trainings (4 GB), outside git.
Finished trainings are not run again: a killed benchmark continues with the same command, and a table that has some of
the trainings gets the others, on another machine, too.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from scipy.stats import qmc

from benchmarks.acceptance import value_at
from benchmarks.emulators import words_of
from benchmarks.table import correct_bits, write_table
from benchmarks.trainings import ID_TEST, Bench, Clock, Finished, Planned, open_bench, run_all, space_of
from carft_ray import environment
from carft_ray.errors import CarftError, Problem, UsageError
from carft_ray.evaluation.objective import ID_SET
from carft_ray.evaluation.predictions import correct_matrix, read_predictions
from carft_ray.layout import ZERO_SHOT_TABLE
from carft_ray.recipe.loading import load_recipe, recipe_hash
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.ui import console

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "benchmarks" / "tables"
NUM_CONFIGURATIONS, SEEDS = 24, (0, 1, 2, 3)
DESIGN_SEED = 0
AT_ONCE = 3  # trainings per process, after which the table is written
MOST_APART = 0.01  # of the validation images, that one model answers otherwise on two processors
SHARE = 0.2  # of each test set, its first images: for tables


def design(recipe: Recipe, number: int) -> dict[str, dict[str, Any]]:
    """Returns the values of the configurations by name: the recipe's baselines, then points of its space."""
    space, found = space_of(recipe), {name: dict(values) for name, values in recipe.search.baselines.items()}
    shares = qmc.Sobol(len(space), seed=DESIGN_SEED).random_base2(max(1, (number - 1).bit_length()))
    for index, row in enumerate(shares[: number - len(found)]):
        found[f"point {index}"] = {
            name: value_at(part.low, part.high, part.log, float(share), 4)
            for (name, part), share in zip(space.items(), row, strict=True)
        }
    return found


def row_of(name: str, training: Finished, sets: Sequence[str], tests: Sequence[str]) -> dict[str, Any]:
    """Returns a training as a row of the table."""
    row: dict[str, Any] = {"configuration": name, **training.planned.values, "diverged": training.diverged}
    if training.diverged:
        return row
    result = training.result
    return {
        **row,
        **{key: result[key] for key in ("objective", "alpha", "elapsed_s")},
        "curve": [
            {
                **point,
                "correct": correct_bits(training.validation, point["alpha"], sets),
                "tests": correct_bits(training.test, point["alpha"], tests) if tests and point["alpha"] else b"",
            }
            for point in result["curve"]
        ],
    }


def for_tables(recipe: Recipe) -> Recipe:
    """Returns a recipe whose test sets are the first images of each, which are for tables.

    Raises:
        UsageError: A test set has no part that leaves them out.
    """
    specs = {"data.id_test": recipe.data.id_test}
    specs |= {f"data.ood_test.{name}": spec for name, spec in recipe.data.ood_test.items()}
    rule = "must have a part that leaves the first fifth to tables, as [0.2, 1]"
    lows = {key: (getattr(spec, "part", None) or (0, 1))[0] for key, spec in specs.items()}
    if problems := [Problem(key, rule) for key, low in lows.items() if low <= 0]:
        raise UsageError(problems)
    data = recipe.data.model_copy(
        update={
            "id_test": _first(recipe.data.id_test),
            "ood_test": {name: _first(spec) for name, spec in recipe.data.ood_test.items()},
        }
    )
    return recipe.model_copy(update={"data": data})


def _first(spec: Any) -> Any:
    """Returns the part for tables that belongs to a sealed part: the fifth before it."""
    low, high = spec.part
    return spec.model_copy(update={"part": (round(low - (high - low) * SHARE / (1 - SHARE), 9), low)})


def make(recipe: Recipe, out: Path, table_path: Path, number: int, processes: int, reads_tests: bool = True) -> None:
    """Runs the trainings that the table has not, so many at a time with one thread each, and writes it often.

    Raises:
        UsageError: The table is of other trainings.
    """
    bench = open_bench(for_tables(recipe) if reads_tests else recipe, out, reads_tests)
    alphas = tuple(alpha for alpha in recipe.search.alpha.measured if alpha > 0) if reads_tests else ()
    start = start_of(bench, recipe, number)
    rows = _rows_of(table_path, start)
    has = {(row["configuration"], row["seed"]) for row in rows}
    sets, tests = (ID_SET, *recipe.data.ood_val), (ID_TEST, *recipe.data.ood_test) if reads_tests else ()
    planned = {
        (name, seed): Planned(f"{name}, seed {seed}", {**values, "seed": seed}, alphas, keeps_weights=True)
        for seed in SEEDS
        for name, values in design(recipe, number).items()
        if (name, seed) not in has
    }
    clock = Clock(sum(each.cost for each in planned.values()))
    words = {
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        **start,
        "commit": environment.git_state(ROOT)[0] or "",
        "sets": json.dumps(_num_images(bench.prepared_dir / ZERO_SHOT_TABLE, sets)),
        "tests": json.dumps(_num_images(bench.zero_shot_test_path, tests) if tests else {}),
    }
    while planned:
        some = [(key, planned.pop(key)) for key in [*planned][: AT_ONCE * processes]]
        trainings = run_all(bench, [each for _, each in some], processes, clock)
        rows += [row_of(name, each, sets, tests) for ((name, _), _), each in zip(some, trainings, strict=True)]
        write_table(table_path, rows, words)
        print(f"{len(rows)} trainings, {sum(row['diverged'] for row in rows)} diverged; {table_path}", flush=True)


def _num_images(path: Path, names: Sequence[str]) -> dict[str, int]:
    """Returns how many images of each set have predictions of the zero-shot model."""
    found = read_predictions(path)
    return {name: len(correct_matrix([(found, 0.0)], name)[0]) for name in names}


def what_is_trained(recipe: Recipe, number: int) -> str:
    """Returns JSON that is equal where the trainings of two tables are: sets without their paths, values, alphas."""
    content = recipe.model_dump(mode="json", include={"data", "prompts", "train"}, exclude_defaults=True)
    alphas = list(recipe.search.alpha.measured)
    return json.dumps([_without_paths(content), design(recipe, number), alphas], sort_keys=True)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(child) for key, child in value.items() if key not in ("path", "cache_dir")}
    return value


def start_of(bench: Bench, recipe: Recipe, number: int) -> dict[str, str]:
    """Returns what trainings begin with, for the metadata of their file.

    ``trained``: see ``what_is_trained``. ``frozen``: which validation images the zero-shot model answers right, a bit
    each, in hexadecimal digits.
    """
    found = read_predictions(bench.prepared_dir / ZERO_SHOT_TABLE)
    answers = correct_bits(found, 0.0, (ID_SET, *recipe.data.ood_val))
    return {"trained": what_is_trained(recipe, number), "frozen": answers.hex()}


def check_start(path: str, known: Mapping[str, str], start: Mapping[str, str]) -> None:
    """Checks that the trainings of a file began as those of here. Another processor may answer a few images otherwise.

    Args:
        path: The file.
        known: Its metadata.
        start: Of ``start_of``.

    Raises:
        UsageError: They are other trainings, or began from another model.
    """
    if known.get("trained") != start["trained"]:
        step = "Give another file with --table, or remove this one."
        raise UsageError(Problem(path, "must be of these trainings", known.get("trained", "")[:80], next_step=step))
    known_answers, answers = known.get("frozen") or "0", start["frozen"]
    num, apart = 4 * len(answers), (int(known_answers, 16) ^ int(answers, 16)).bit_count()
    if apart > num * MOST_APART:
        got = f"those of a model that answers {apart} of {num} validation images otherwise"
        step = "Make the model anew with the libraries of before; or remove the file."
        raise UsageError(Problem(path, "must be of trainings of this model", got, next_step=step))


def _rows_of(path: Path, start: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the trainings that a table has; none where it does not exist."""
    if not path.exists():
        return []
    table = pq.read_table(path)
    check_start(str(path), words_of(table), start)
    return list(table.to_pylist())


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seed_table", description="Trainings as a table.")
    parser.add_argument("recipe", type=Path, help="a recipe with test sets, as examples/pacs/photo.yaml")
    parser.add_argument("--no-tests", action="store_true", help="read no test set")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--table", type=Path, help="default: benchmarks/tables/NAME-seeds.parquet")
    parser.add_argument("--configurations", type=int, default=NUM_CONFIGURATIONS, help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time (%(default)s)")
    given = parser.parse_args(argv)
    try:
        recipe = load_recipe(given.recipe)
        table = given.table or TABLES / f"{recipe.name}-seeds.parquet"
        make(recipe, given.out.resolve(), table, given.configurations, given.processes, not given.no_tests)
    except CarftError as error:
        console.show_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
