"""The measured alpha curve: partial points, when all images are evaluated, and the choice from what is stored."""

import curve_stand_in
import numpy as np
import pyarrow as pa
import pytest

from benchmarks import curve as benchmark
from carft_ray.evaluation.alpha import alpha_profile, partial_alphas
from carft_ray.evaluation.curve import IN_FULL, UNSURE, measure_curve, unsettled
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import (
    alphas,
    concat,
    margins,
    predictions_table,
    select,
    with_rows,
    write_predictions,
)
from carft_ray.recipe.schema import DEFAULT_GRID

SETS = ("id_val", "sketch")
SPEC = ObjectiveSpec("weighted_mean", "id_val", ("sketch",), 0.5)
NUM, CLASSES = 600, 5
OOD_SETS = ("noisy_photo", "blurry_photo", "painting", "negative")


class Model:
    """Logits that are a smooth function of alpha: ID rises, OOD rises and falls. Remembers what it was asked."""

    def __init__(self, peak=0.6, seed=0):
        rng = np.random.default_rng(seed)
        self.labels = {name: rng.integers(0, CLASSES, NUM) for name in SETS}
        self.ids = {name: rng.permutation(10 * NUM)[:NUM].astype(np.uint64) for name in SETS}
        self.luck = {name: rng.normal(size=(NUM, CLASSES)) for name in SETS}
        self.drift = {name: rng.normal(size=(NUM, CLASSES)) for name in SETS}
        self.peak, self.asked = peak, []

    def logits(self, name, alpha):
        help_ = 0.9 + (0.5 * alpha if name == "id_val" else alpha * (2 * self.peak - alpha))
        return (self.luck[name] + 0.3 * alpha * self.drift[name] + help_ * np.eye(CLASSES)[self.labels[name]]).astype(
            np.float32
        )

    def at(self, alpha, rows=None):
        self.asked.append((alpha, None if rows is None else int(rows.sum())))
        tables = [
            predictions_table(name, alpha, self.ids[name], self.labels[name], self.logits(name, alpha)) for name in SETS
        ]
        return concat(tables) if rows is None else concat(tables).filter(pa.array(rows))

    def curve(self, recipe):
        start = self.at(0.0)
        self.asked.clear()
        return measure_curve(recipe, SPEC, (), start, self.at)


class Turning(Model):
    """Between the alphas that are evaluated in full, one image in five is right that is wrong at all of them."""

    def logits(self, name, alpha):
        found = super().logits(name, alpha)
        if alpha not in IN_FULL:
            found[::5] = 9 * np.eye(CLASSES)[self.labels[name][::5]]
        return found


def recipe_with(alpha=None, **search):
    return curve_stand_in.make_recipe(objective={}, alpha=alpha or {}, **search)


def in_full(recipe):
    return [(alpha, None) for alpha in recipe.search.alpha.measured if alpha]


def points(curve):
    return {"curve": curve.points(SPEC, ())}


@pytest.mark.parametrize("peak", [0.3, 0.6, 0.9])
def test_the_default_chooses_as_the_whole_grid_from_fewer_images(peak):
    part, whole = Model(peak), Model(peak)
    curve, choice, chosen_from = part.curve(recipe_with())
    _, expected, expected_from = whole.curve(recipe_with({"grid": list(DEFAULT_GRID)}))
    assert (choice.alpha, choice.fitted, chosen_from) == (expected.alpha, expected.fitted, expected_from)
    assert choice.value == pytest.approx(expected.value, abs=2e-3)  # two or three of 1,200 images
    evaluated = sum(2 * NUM if count is None else count for _, count in part.asked)
    assert evaluated < 0.8 * 2 * NUM * len(whole.asked)
    assert all(count is None for _, count in whole.asked)
    assert partial_alphas(points(curve))


def test_ends_middle_and_chosen_alpha_are_of_all_images_and_partial_points_say_their_share():
    model = Model()
    curve, choice, _ = model.curve(recipe_with())
    found = {point["alpha"]: point.get("evaluated") for point in curve.points(SPEC, ())}
    assert [found[alpha] for alpha in (*IN_FULL, choice.alpha)] == [None] * 4
    partial = partial_alphas(points(curve))
    asked = dict(entry for entry in model.asked if entry[1] is not None)
    assert {alpha: asked[alpha] / (2 * NUM) for alpha in partial} == {alpha: found[alpha] for alpha in partial}
    assert all(UNSURE <= found[alpha] < 1 for alpha in partial)


def test_the_choice_comes_out_of_what_is_stored():
    """As `rescore` and the bootstrap of `report` make it."""
    curve, choice, chosen_from = Model().curve(recipe_with())
    table = curve.table()
    assert alphas(table, "id_val") == [point["alpha"] for point in curve.points(SPEC, ())]
    among = table.filter(np.isin(table["alpha"].to_numpy(), chosen_from))
    assert alpha_profile(among, SPEC, 0.1).choice == choice
    for alpha in alphas(table, "id_val"):
        ids = [select(table, name, alpha)["sample_id"].to_pylist() for name in SETS]
        assert ids == [select(table, name, 0.0)["sample_id"].to_pylist() for name in SETS]


def test_rows_of_a_partial_point_are_evaluated_there_or_of_the_nearer_neighbour():
    model = Model()
    curve, _, _ = model.curve(recipe_with())
    (alpha,) = [alpha for alpha in partial_alphas(points(curve)) if alpha == 0.1]
    rows, nearer, there = unsettled(curve.tables[0.0], curve.tables[0.4]), curve.tables[0.0], model.at(alpha)
    for name in ("prediction", "log_sum_exp", "logit_true", "sample_id"):
        expected = np.where(rows, there[name].to_numpy(), nearer[name].to_numpy())
        assert curve.tables[alpha][name].to_numpy().tolist() == expected.tolist()
    assert set(curve.tables[alpha]["alpha"].to_pylist()) == {alpha}


def test_a_grid_that_is_written_out_constraints_and_a_front_are_of_all_images():
    for recipe in (
        recipe_with({"grid": list(DEFAULT_GRID)}),
        recipe_with(constraints={"id_drop": {"zero_shot": 0.01}}),
        recipe_with(constraints={"ece": {"id_val": 0.5}}),
    ):
        model = Model()
        curve, _, _ = model.curve(recipe)
        assert model.asked[:6] == in_full(recipe)
        assert {count for _, count in model.asked} == {None}
        assert partial_alphas(points(curve)) == ()


def test_a_partial_point_that_was_wrong_has_all_of_the_curve_evaluated():
    model = Turning()
    curve, choice, chosen_from = model.curve(recipe_with())
    _, expected, expected_from = Turning().curve(recipe_with({"grid": list(DEFAULT_GRID)}))
    assert partial_alphas(points(curve)) == ()
    assert choice.alpha not in IN_FULL
    asked = {alpha: [count or 2 * NUM for at, count in model.asked if at == alpha] for alpha in chosen_from if alpha}
    assert {alpha: sum(counts) for alpha, counts in asked.items()} == dict.fromkeys(asked, 2 * NUM)  # no image twice
    assert (choice, chosen_from) == (expected, expected_from)


def test_settled_images_have_one_class_and_no_small_margin_at_both_alphas():
    model = Model()
    one, other = model.at(0.4), model.at(1.0)
    rows = unsettled(one, other)
    differs = one["prediction"].to_numpy() != other["prediction"].to_numpy()
    smallest = np.minimum(margins(one), margins(other))
    for part in (slice(0, NUM), slice(NUM, 2 * NUM)):  # each set by itself
        assert (rows[part] >= differs[part]).all()
        assert smallest[part][~rows[part]].min() > np.quantile(smallest[part], UNSURE)
        assert smallest[part][rows[part] & ~differs[part]].max() <= np.quantile(smallest[part], UNSURE)
    assert unsettled(one, one).mean() == pytest.approx(UNSURE, abs=2 / NUM)


def test_one_class_has_no_margin_and_no_image_is_settled():
    ids = np.arange(4, dtype=np.uint64)
    table = predictions_table("id_val", 0.0, ids, np.zeros(4, int), np.ones((4, 1), np.float32))
    assert margins(table).tolist() == [0] * 4
    assert unsettled(table, table).all()


def test_no_row_and_every_row_may_be_replaced():
    model = Model()
    table, there = model.at(0.0), model.at(0.2)
    none, all_ = np.zeros(2 * NUM, bool), np.ones(2 * NUM, bool)
    assert with_rows(table, 0.2, all_, there).equals(there)
    kept = with_rows(table, 0.2, none, there.slice(0, 0))
    assert kept.drop(["alpha"]).equals(table.drop(["alpha"]))


# ---------------------------------------------------------------------------------------------- the benchmark

FEW = [f"data.{name}.num_per_class=2" for name in ("train", "id_val", *(f"ood_val.{one}" for one in OOD_SETS))]


@pytest.mark.whole
def test_the_benchmark_measures_the_curve_and_its_training(tmp_path):
    settings = [*FEW, f"data.cache_dir={tmp_path}", "train.epochs=1", "train.batch_size=32", "evaluate.every_epochs=0"]
    pairs = benchmark.curve_and_training(settings)
    assert len(pairs) == len(benchmark.LEARNING_RATES) - 1
    assert all(curve_s > 0 and training_s > 0 for curve_s, training_s in pairs)


@pytest.mark.parametrize("kind", [Model, Turning])
def test_the_benchmark_replays_stored_predictions(tmp_path, capsys, kind):
    recipe, path = recipe_with({"grid": list(DEFAULT_GRID)}), tmp_path / "validation.parquet"
    curve, choice, _ = kind().curve(recipe)
    write_predictions(path, curve.table())
    found = benchmark.replay(recipe, path)
    assert (found.alpha, found.other, found.lost) == (choice.alpha, choice.alpha, 0)
    whole, part = found.passes
    assert whole == len(curve.tables) - 1
    assert (part < whole) == (kind is Model)
    assert benchmark.report([found])
    assert "PASS  1 trainings: the same alpha in 100.0 %" in capsys.readouterr().out
