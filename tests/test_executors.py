"""The same training run in three ways: here, by one Ray Train worker, and by two of them. Real model, real images."""

from pathlib import Path

import pyarrow.compute as pc
import pytest
import ray

from carft_ray.evaluation.predictions import read_predictions
from carft_ray.launch.runs.single import train_once
from carft_ray.recipe.loading import load_recipe

RECIPE = Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml"
OOD_VAL = "{painting: {source: sandbox, domain: painting, split: val, num_per_class: 4}}"
SETTINGS = [
    "train.epochs=1",
    "train.precision=fp64",  # another order of sums, at 1e-16, decides over no image
    "data.train.num_per_class=16",
    "data.id_val.num_per_class=40",  # 640 images
    f"data.ood_val={OOD_VAL}",
    "search.alpha.grid=[0, 0.5, 1]",
    "resources.threads=1",
]
WAYS = {
    "inline": ["resources.executor=inline"],
    "one": ["resources.executor=ray-train"],
    "two": ["resources.executor=ray-train", "resources.num_workers=2", "resources.cpus_per_worker=0.5"],
}

pytestmark = pytest.mark.slow


def ignore(row):
    del row


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder and result of the training, for each way to run it."""
    folder, found = tmp_path_factory.mktemp("ways"), {}
    for way, settings in WAYS.items():
        recipe = load_recipe(RECIPE, SETTINGS + settings)
        epochs, said = [], []
        result, _ = train_once(recipe, folder / way, False, "", said.append, ignore, epochs.append)
        assert any(text.startswith(("evaluating zero-shot", "the heads are")) for text in said), way
        assert [row["epoch"] for row in epochs] == [1]
        assert not (folder / way / "_tune").exists()
        assert not ray.is_initialized()
        found[way] = (folder / way, result)
    return found


def numbers(result):
    """All metrics of a result by name, those of each alpha among them."""
    found = {f"at alpha/{name}": value for name, value in result["metrics"].items()}
    found |= {f"fine_tuned/{name}": value for name, value in result["fine_tuned"].items()}
    found |= {f"{row['alpha']}/{name}": value for row in result["curve"] for name, value in row.items()}
    return found | {"objective": result["objective"], "alpha": result["alpha"], "moved": result["moved"]}


def predictions(folder):
    """Predicted classes of the fine-tuned model on id_val, by image."""
    table = read_predictions(folder / "predictions" / "validation.parquet")
    mine = table.filter(pc.and_(pc.equal(table["set"], "id_val"), pc.equal(table["alpha"], 1.0)))
    return dict(zip(mine["sample_id"].to_pylist(), mine["prediction"].to_pylist(), strict=True))


def test_inline_and_ray_train_with_one_worker_give_the_same_metrics(trained):
    inline, one = numbers(trained["inline"][1]), numbers(trained["one"][1])
    assert inline.keys() == one.keys()
    assert {name: (inline[name], one[name]) for name in inline if abs(inline[name] - one[name]) > 1e-5} == {}


def test_two_workers_predict_the_same_but_for_the_order_of_sums(trained):
    one, two = predictions(trained["one"][0]), predictions(trained["two"][0])
    assert one.keys() == two.keys()
    assert len(one) == 640
    assert [image for image in one if one[image] != two[image]] == []
    assert trained["one"][1]["moved"] > 0.001  # they have learnt
    assert trained["two"][1]["moved"] == pytest.approx(trained["one"][1]["moved"], rel=1e-6)
