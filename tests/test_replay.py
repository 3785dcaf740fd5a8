"""``benchmarks.samplers`` on a made-up table whose best training is known."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import landscape as landscapes
from benchmarks import replay, samplers, searches, table
from carft_ray.recipe.loading import load_recipe

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def height(values):
    """Best at learning rate 1e-3 and a small KL weight."""
    return 0.05 - 0.05 * math.log10(values["learning_rate"] / 1e-3) ** 2 - 0.01 * math.log10(values["kl_weight"])


def objective(values, alpha):
    return 0.6 + height(values) * 4 * alpha * (1 - alpha)


def point(alpha, value):
    """ID accuracy .2 over the objective, OOD accuracy .2 under it."""
    return {"alpha": alpha, "objective": value, "id_accuracy": value + 0.2, "ood_accuracy": value - 0.2}


def look(values, epoch):
    """Rises with the share of the schedule."""
    return objective(values, 0.5) - 0.05 * (1 - epoch / values["epochs"])


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
    points = [{**values, "seed": 0} for values in table.design(60)]
    points += [{**points[0], "seed": seed} for seed in (1, 2)]
    rows = []
    for values in points:
        noise = 0.001 * values["seed"]
        curve = [point(alpha, objective(values, alpha) + noise * (alpha > 0)) for alpha in ALPHAS]
        looks = [{"epoch": e, "subset/objective": look(values, e) + noise} for e in range(1, values["epochs"] + 1)]
        best = objective(values, 0.5) + noise
        rows.append({**values, "diverged": False, "objective": best, "curve": curve, "epochs_seen": looks})
    rows.append({**points[1], "diverged": True, "objective": None, "curve": None, "epochs_seen": None})
    path = tmp_path_factory.mktemp("table") / "table.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(replay.RECIPE, ["search.trials=12"])


@pytest.fixture(scope="module")
def landscape(table_path, recipe):
    return landscapes.read_landscape(table_path, recipe)


def test_the_spline_foretells_trainings_that_it_has_not_seen(landscape):
    values = {"learning_rate": 7e-4, "kl_weight": 2.0, "weight_decay": 0.05, "epochs": 12, "crop_scale": 0.8}
    expected = [objective(values, alpha) for alpha in ALPHAS]
    assert np.abs(landscape.curve(values) - expected).max() < 0.005
    assert landscape.cv_correlation > 0.8
    assert landscape.seed_sd == pytest.approx(0.001)
    training = landscape.training(values)
    assert np.abs(training.id_accuracies - training.ood_accuracies - 0.4).max() < 1e-9
    assert training.at_share(0.5) == pytest.approx(look(values, 6), abs=0.01)
    values = {"learning_rate": 1e-3, "kl_weight": 1.0}
    assert landscape.objective(values, 0.1) == pytest.approx(objective(values, 0.5), abs=0.005)
    drawn = landscape.objective({**values, "alpha": 0.9}, 0.1)
    assert drawn == pytest.approx(objective(values, 0.9), abs=0.005)


def test_a_seed_moves_curve_and_looks_together_and_leaves_zero_shot(landscape):
    values = {"learning_rate": 7e-4, "kl_weight": 2.0}
    truth, rng = landscape.training(values), np.random.default_rng(0)
    shifts = []
    for _ in range(200):
        noisy = landscape.training(values, rng)
        assert noisy.objectives[0] == pytest.approx(truth.objectives[0])
        shifts.append(noisy.objectives[2] - truth.objectives[2])
        assert np.allclose(noisy.intermediate - truth.intermediate, shifts[-1])
    assert np.std(shifts) == pytest.approx(landscape.seed_sd, rel=0.2)


@pytest.mark.whole
def test_each_part_runs(table_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "TABLE", table_path)
    for module in (searches, replay):
        monkeypatch.setattr(module, "NUM_TRIALS", 12)
    monkeypatch.setattr(searches, "SAMPLERS", {"random": []})
    monkeypatch.setattr(searches, "GRIDS", {30: (2, 2, 1, 1), 100: (2, 2, 2, 1)})
    parts = [name for name in samplers.PARTS if name != "grids"]
    assert samplers.main([*parts, "--seeds", "2"]) in (0, 1)  # a made-up table promises nothing of the thresholds
    out = capsys.readouterr().out
    assert all(f"\n{name}\n" in out for name in parts)
