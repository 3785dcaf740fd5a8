"""About 200 real sandbox trainings as one table, to be replayed: ``python -m benchmarks.samplers --make``

A space-filling design (scrambled Sobol) over five values of a training, ``SPACE``; each point is trained by the
product's own code with the recipe ``search_spaces/quickstart.yaml`` and read on the validation sets only. The table
keeps what a search, a pruner or a selection rule may use:

    one row per training: the five values, seed (0; the first four points also with others), objective, alpha,
    accuracies, elapsed_s,
    epochs   list of {epoch, loss, ce, kl, and the subset/ values of that epoch}
    curve    list of {alpha, objective, id_accuracy, ood_accuracy, accuracy/<set>, correct}

``correct`` holds one bit per validation image (``numpy.packbits``, sets and their sizes in the order of the schema's
metadata). A training that diverged has its values and nothing else. Finished trainings are kept and not run again: a
killed benchmark continues with the same command.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import qmc

from benchmarks.acceptance import value_at
from benchmarks.trainings import Clock, Finished, Planned, open_bench, run_all
from carft_ray import files
from carft_ray.evaluation.objective import ID_SET
from carft_ray.evaluation.predictions import correct_matrix
from carft_ray.layout import METRICS
from carft_ray.recipe.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "search_spaces" / "quickstart.yaml"
OUT = ROOT / "benchmarks" / "results" / "table"
TABLE = ROOT / "benchmarks" / "table.parquet"
GRID = [0, 0.2, 0.4, 0.6, 0.8, 1]  # of alphas: more than a search measures, to compare grids
NUM_POINTS = 188
NUM_REPEATED, REPEAT_SEEDS = 4, (1, 2, 3)  # the first points again: the noise between seeds
DESIGN_SEED = 0

# name -> low, high, whether logarithmic; epochs are whole
SPACE = {
    "learning_rate": (1e-4, 1e-2, True),
    "kl_weight": (0.3, 100.0, True),
    "weight_decay": (1e-3, 1.0, True),
    "epochs": (4, 16, False),
    "crop_scale": (0.5, 1.0, False),
}


def design(num_points: int) -> list[dict[str, float | int]]:
    """Returns the points of the design; the first n of a longer one are those of a shorter one."""
    shares = qmc.Sobol(len(SPACE), seed=DESIGN_SEED).random_base2(max(1, (num_points - 1).bit_length()))[:num_points]
    return [{name: _at(name, float(share)) for name, share in zip(SPACE, row, strict=True)} for row in shares]


def _at(name: str, share: float) -> float | int:
    low, high, log = SPACE[name]
    if name == "epochs":
        return int(low + share * (high - low + 1))
    return value_at(low, high, log, share, 4)


def row_of(index: int, training: Finished, sets: Sequence[str]) -> dict[str, Any]:
    """Returns a training as a row of the table."""
    row: dict[str, Any] = {"point": index, "seed": 0, **training.planned.values, "diverged": training.diverged}
    if training.diverged:
        return row
    result = training.result
    metrics = files.read_json_lines(training.folder, METRICS)
    kept = ("epoch", "loss", "ce", "kl", "context_entropy")
    return {
        **row,
        "objective": result["objective"],
        "alpha": result["alpha"],
        "id_accuracy": result["metrics"]["id_accuracy"],
        "ood_accuracy": result["metrics"]["ood_accuracy"],
        "elapsed_s": result["elapsed_s"],
        "epochs_seen": [
            {key: value for key, value in epoch.items() if key in kept or key.startswith("subset/")}
            for epoch in metrics
        ],
        "curve": [
            {**point, "correct": correct_bits(training.validation, point["alpha"], sets)} for point in result["curve"]
        ],
    }


def correct_bits(predictions: pa.Table, alpha: float, sets: Sequence[str]) -> bytes:
    """Returns which images a training answers right at an alpha, a bit each, set after set."""
    return np.packbits(np.concatenate([correct_matrix([(predictions, alpha)], name)[0] for name in sets])).tobytes()


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], words: Mapping[str, str]) -> None:
    """Writes rows, which may lack columns that others have, as a Parquet file; words are its metadata."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]).replace_schema_metadata(
        words
    )
    with files.new_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def make(out: Path, table_path: Path = TABLE, num_points: int = NUM_POINTS, processes: int = 2) -> None:
    """Runs the trainings that are missing, so many at a time with one thread each, and writes the table."""
    recipe = load_recipe(RECIPE, ["evaluate.every_epochs=1", "evaluate.subset=200", f"search.alpha.grid={GRID}"])
    bench = open_bench(recipe, out)
    points = list(enumerate(design(num_points)))
    points += [(index, {**values, "seed": seed}) for index, values in points[:NUM_REPEATED] for seed in REPEAT_SEEDS]
    plans = [Planned(f"point {index}", values) for index, values in points]
    trainings = run_all(bench, plans, processes, Clock(sum(planned.cost for planned in plans)))
    sets = (ID_SET, *recipe.data.ood_val)
    num_images = next(training.result["num_images"] for training in trainings if not training.diverged)
    words = {
        "data": "synthetic: the sandbox of carft-ray",
        "sets": json.dumps({name: num_images[name] for name in sets}),
        "train": recipe.train.model_dump_json(),
        "space": json.dumps(SPACE),
    }
    rows = [row_of(index, training, sets) for (index, _), training in zip(points, trainings, strict=True)]
    write_table(table_path, rows, words)
    finished = [training for training in trainings if not training.diverged]
    best = max(finished, key=lambda training: float(training.result["objective"]))
    print(
        f"{len(trainings)} trainings, {len(trainings) - len(finished)} diverged; objective "
        f"{min(training.result['objective'] for training in finished):.4f} to {best.result['objective']:.4f}, best at "
        f"{dict(best.planned.values)}; {table_path}, {table_path.stat().st_size / 1e6:.2f} MB"
    )
