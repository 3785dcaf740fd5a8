"""The same training run in this process, by one Ray Train worker, and by two of them. Real model, real images. What
becomes of its attempts, with a stand-in."""

from pathlib import Path

import pyarrow.compute as pc
import pytest
import ray
import short_training
import stand_in
import torch
from safetensors.torch import load_file

from carft_ray.errors import InterruptedRunError
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.launch.runs.single import train_once
from carft_ray.launch.runtime import Runner
from carft_ray.recipe.loading import load_recipe
from carft_ray.study.rows import trials

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
    "here": ["resources.executor=inline"],
    "two": ["resources.executor=ray-train", "resources.num_workers=2", "resources.cpus_per_worker=0.5"],
}

pytestmark = pytest.mark.slow


def ignore(row):
    del row


@pytest.fixture
def trained(tmp_path):
    """Gives a function that returns folder and result of the training for a way to run it."""

    def train(way):
        recipe = load_recipe(RECIPE, SETTINGS + WAYS[way])
        epochs, said = [], []
        result, _ = train_once(recipe, tmp_path / way, False, "", said.append, ignore, epochs.append)
        assert any(text.startswith(("evaluating zero-shot", "the heads are")) for text in said), way
        assert [row["epoch"] for row in epochs] == [1]
        assert not (tmp_path / way / "_tune").exists()
        assert not ray.is_initialized()
        return short_training.place_in(tmp_path / way), result

    return train


def predictions(folder):
    """Predicted classes of the fine-tuned model on id_val, by image."""
    table = read_predictions(folder / "predictions" / "validation.parquet")
    mine = table.filter(pc.and_(pc.equal(table["set"], "id_val"), pc.equal(table["alpha"], 1.0)))
    return dict(zip(mine["sample_id"].to_pylist(), mine["prediction"].to_pylist(), strict=True))


@pytest.mark.whole
def test_two_workers_predict_the_same_as_this_process_but_for_the_order_of_sums(trained):
    (one_dir, one), (two_dir, two) = trained("here"), trained("two")
    assert two["objective"] == pytest.approx(one["objective"], abs=1e-9)
    expected, found = predictions(one_dir), predictions(two_dir)
    assert expected.keys() == found.keys()
    assert len(expected) == 640
    assert [image for image in expected if expected[image] != found[image]] == []
    assert one["fine_tuned"]["objective"] != one["curve"][0]["objective"]  # they have learnt
    one_state, two_state = (load_file(folder / "fine_tuned.safetensors") for folder in (one_dir, two_dir))
    for name, tensor in one_state.items():
        torch.testing.assert_close(two_state[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("executor", ["debug", pytest.param("ray-train", marks=pytest.mark.whole)])
def test_no_attempt_of_a_training_has_the_number_of_another(tmp_path, monkeypatch, executor):
    """Two workers die in the first attempt; the second one is stopped, and the third one finishes."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}")  # of Ray's workers
    lost = executor == "ray-train"
    workers = {"num_workers": 2, "cpus_per_worker": 0.5} if lost else {}
    recipe = stand_in.make_recipe(resources={"executor": executor, **workers})
    stand_in.tell(tmp_path, rain="die_once" if lost else "raise_once")  # by the letters where a trial has its number
    (tmp_path / "base" / "hold").touch()
    out, runner = tmp_path / "out", Runner(stand_in.prepare, stand_in.train)

    def train(resume, report=ignore):
        return train_once(recipe, out, resume, "", str, ignore, report, None, None, (), runner)

    def stop(row):
        if row["epoch"] == 1:
            (out / "stop").write_text("")

    with pytest.raises(InterruptedRunError, match="continues from step 10"):
        train(False, stop)
    (tmp_path / "base" / "hold").unlink()
    epochs = []
    train(True, epochs.append)
    assert [row["epoch"] for row in epochs] == [2]
    [row] = trials(out)
    assert (row.name, row.outcome, row.attempt) == ("train", "complete", 3)
    lines = (row.folder(out) / "log.txt").read_text().splitlines()
    said = [line.split(" ", 1)[1] for line in lines if " attempt " in line]
    kinds = [line.split()[:3] for line in said]
    first = "lost:" if lost else "error:"
    expected = [("1:", "starts"), ("1:", first), ("2:", "starts"), ("2:", "stopped:"), ("3:", "starts")]
    assert [tuple(words[1:]) for words in kinds] == expected
