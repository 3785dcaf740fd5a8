"""Images in two roles from `search` on: the study's list, and every command that reads it. No Ray is started."""

import contextlib
import csv
import io
import json
import shutil
from collections import Counter

import pytest
import short_training
from crash_host import call
from test_shared_images import picture

from carft_ray.data.copies import shared_images
from carft_ray.data.copies.shared_images import read_shared
from carft_ray.recipe.loading import dump_recipe, load_recipe

pytestmark = pytest.mark.slow

NUM = {"photo": 20, "photo_val": 20, "sketch": 4}  # images per class, of five
SHARED = 4  # of 100 in each: two with the same bytes, two saved again
LEFT = {"train": 96, "id_val": 100, "sketch": 20}
LINE = f"data.train: {SHARED} images left out, also in data.id_val"
SHORT = [
    "train={learning_rate: 1e-2, kl_weight: 1, epochs: 1, batch_size: 16}",
    "search.trials=1",
    "resources.executor=debug",
    "search.baselines={plain: {kl_weight: 0}}",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, two of each of two classes in two roles, and a recipe."""
    folder = tmp_path_factory.mktemp("shared_search")
    path, images = short_training.make(folder), folder / "images"
    for number, (domain, count) in enumerate(NUM.items()):
        shutil.rmtree(images / domain)
        for label, name in enumerate(short_training.CLASSES):
            (images / domain / name).mkdir(parents=True)
            for index in range(count):
                picture([number, label, index], 24).save(images / domain / name / f"{index}.png")
    for index, name in enumerate(short_training.CLASSES[:2]):
        shutil.copy(images / "photo" / name / "0.png", images / "photo_val" / name / "3.png")
        picture([0, index, 1], 24).save(images / "photo_val" / name / "4.png", "JPEG", quality=90)
    path.write_text(dump_recipe(load_recipe(path, [*SHORT, f"data.cache_dir={folder / 'cache'}"])))
    return folder


@pytest.fixture(scope="module")
def searched(made):
    """The study, and what its search told."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert call(["search", made / "recipe.yaml", "--study", made / "study"]) == 0
    return made / "study", told.getvalue()


@pytest.fixture
def study(searched, tmp_path):
    return shutil.copytree(searched[0], tmp_path / "study")


@pytest.fixture
def compares_nothing(monkeypatch):
    def refused(*words):
        raise AssertionError("images are compared again")

    monkeypatch.setattr(shared_images, "shared_pairs", refused)


def run(capsys, *words):
    capsys.readouterr()
    code = call(words)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/result.json"))]


def test_a_search_leaves_copies_out_of_training_and_says_so_in_one_line(searched):
    study, told = searched
    assert told.count(LINE) == told.count("left out") == 1
    with (study / "shared_images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["found_by"] for row in rows) == {"same bytes": 2, "same picture": 2}
    assert {(row["set"], row["done"], row["other_set"]) for row in rows} == {("data.train", "leaves", "data.id_val")}
    provenance = json.loads((study / "manifest.json").read_text())["provenance"]
    assert provenance["shared_images"] == {"policy": "drop", "counts": {"data.train": {"leaves": SHARED}}}
    assert {name: one["num_images"] for name, one in provenance["data"].items()} == LEFT
    assert [one["num_images"] for one in (*results(study / "trials"), *results(study / "baselines"))] == [LEFT, LEFT]


def test_report_and_model_card_tell_them_and_a_search_that_goes_on_compares_nothing_again(
    study, tmp_path, capsys, compares_nothing
):
    code, out, _ = run(capsys, "report", study, "--json")
    assert code == 0
    assert json.loads(out)["shared_images"] == {"data.train": {"leaves": SHARED}}
    assert LINE in run(capsys, "report", study)[1]
    assert run(capsys, "export", study, "--trial", "0", "--alpha", "1", "--to", tmp_path / "model")[0] == 0
    assert LINE in (tmp_path / "model" / "README.md").read_text()
    before = (study / "shared_images.csv").read_bytes()
    code, _, err = run(capsys, "resume", study, "--trials", "+1")
    assert code == 0, err
    assert "left out" not in err
    assert (study / "shared_images.csv").read_bytes() == before
    assert [one["num_images"] for one in results(study / "trials")] == [LEFT, LEFT]


@pytest.mark.whole
def test_confirm_and_reproduce_train_on_what_the_search_trained_on(study, capsys, compares_nothing):
    code, _, err = run(capsys, "confirm", study, "--top", "1", "--seeds", "2")
    assert code == 0, err
    again = results(study / "confirm")
    assert [one["num_images"] for one in again] == [LEFT] * len(again)
    shared = json.loads((study / "confirm" / "summary.json").read_text())["shared_images"]
    assert shared == {"data.train": {"leaves": SHARED}}
    name = next((study / "confirm").glob("*/*/result.json")).parents[1].name
    code, out, err = run(capsys, "reproduce", study, f"confirm/{name}")
    assert code == 0, err
    assert "the same, bit for bit" in out + err


def test_train_trains_on_the_same_images_and_is_reproduced(made, tmp_path, capsys):
    code, _, err = run(capsys, "train", made / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 0, err
    assert LINE in err
    (result,) = results(tmp_path / "run" / "trials")
    assert result["num_images"] == LEFT
    code, _, err = run(capsys, "reproduce", tmp_path / "run", "--out", tmp_path / "again")
    assert code == 0, err
    assert read_shared(tmp_path / "again") == read_shared(tmp_path / "run") != []


def test_the_table_of_the_doctor_is_what_exclude_takes(made, tmp_path, capsys):
    table = tmp_path / "pairs.csv"
    code, _, err = run(capsys, "doctor", made / "recipe.yaml", "--pairs", table)
    assert code == 0, err
    words = ("--set", f"data.train.exclude={table}", "--set", "data.shared_images=fail", "--study", tmp_path / "new")
    code, _, err = run(capsys, "search", made / "recipe.yaml", *words)
    assert code == 0, err
    assert [one["num_images"] for one in results(tmp_path / "new" / "trials")] == [LEFT]
    assert (tmp_path / "new" / "shared_images.csv").read_text().count("\n") == 1
