"""The command line as a user meets it: results, JSON, and one clear message with the right code for each mistake."""

import json
import re
import shutil
import sys

import pytest
import short_training
from PIL import Image

from carft_ray import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, images and a recipe; tests copy what they change."""
    path = tmp_path_factory.mktemp("short")
    short_training.make(path)
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys, tmp_path):
    """Runs the command line in a folder of its own; returns exit code, standard output and standard error."""
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["carft-ray", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def flat(text):
    return re.sub(r"\s+", " ", text)


def test_train_evaluate_and_export_from_the_first_to_the_last_command(run, tmp_path):
    code, out, err = run("train", "recipe.yaml", "--out", "out")
    assert code == 0, err
    assert "zero-shot" in out
    assert "mixed, alpha" in out
    assert "carft-ray export out" in err

    code, out, err = run("train", "recipe.yaml", "--out", "out", "--resume", "--json")
    result = json.loads(out)
    assert {"objective", "alpha", "metrics", "curve", "zero_shot", "fine_tuned"} <= result.keys()
    assert {"id_accuracy", "ood_accuracy", "accuracy/id_val", "accuracy/sketch"} <= result["metrics"].keys()

    code, out, err = run("evaluate", "out", "--json")
    assert json.loads(out)["metrics"] == result["metrics"]
    code, out, err = run("evaluate", "out", "--alpha", "0", "--head", "zero_shot", "--json")
    zero_shot = {key: result["zero_shot"][key] for key in result["metrics"]}
    assert json.loads(out)["metrics"] == zero_shot

    code, out, err = run("export", "out", "--to", "exported", "--json")
    assert code == 0, err
    assert json.loads(out)["largest_difference"] < 1e-3
    code, out, err = run("export", "out", "--to", "exported")
    assert (code, "must not exist yet" in flat(err)) == (2, True)

    code, out, err = run("train", "recipe.yaml", "--out", "out")
    assert code == 2
    assert "a finished training" in flat(err)
    assert "--resume" in err
    code, out, err = run("train", "recipe.yaml", "--out", "out", "--resume", "--set", "train.seed=5")
    assert code == 3
    assert "train.seed" in err


def test_validate_says_what_comes_next_and_speaks_json(run):
    code, out, err = run("validate", "recipe.yaml")
    assert (code, out) == (0, "")
    assert "carft-ray search recipe.yaml --study studies/short" in err
    code, out, err = run("validate", "recipe.yaml", "--json", "--set", "train.epochs=7")
    assert json.loads(out)["recipe"]["train"]["epochs"] == 7
    code, out, err = run("validate", "recipe.yaml", "--show")
    assert "learning_rate: 0.01" in out


# words of the command, exit code, what the message must hold
MISTAKES = [
    (["validate", "recipe.yaml", "--set", "train.lerning_rate=1"], 3, ["--set", "did you mean 'train.learning_rate'"]),
    (["validate", "recipe.yaml", "--set", "train.epochs=many"], 3, ["train.epochs", "many"]),
    (["validate", "recipe.yaml", "--set", "search.space.learning_rate={low: 1, high: .5}"], 3, ["low <= high"]),
    (["validate", "recipe.yaml", "--set", "search.space.learning_rate={low: 0, high: 1, log: true}"], 3, ["low > 0"]),
    (["validate", "recipe.yaml", "--set", "search.space.seed={low: 0, high: 9}"], 3, ["seed"]),
    (["search", "recipe.yaml", "--study", "s", "--set", "search.space={}"], 3, ["search.space"]),
    (["validate", "recipee.yaml"], 3, ["recipee.yaml", "recipe.yaml"]),
    (["validate", "recipe.yaml", "--set", "data.train.path=nowhere"], 4, ["nowhere"]),
    (["validate", "recipe.yaml", "--set", "data.train.domains=[foto]"], 4, ["foto", "photo"]),
    (["validate", "recipe.yaml", "--set", "data.classes=[arrow, circle, heart, square, sun]"], 4, ["sun", "star"]),
    (["validate", "recipe.yaml", "--set", "train.batch_size=21"], 4, ["train.batch_size", "20 images", "21"]),
    (
        ["validate", "recipe.yaml", "--set", "model={name: ViT-B-33, pretrained: openai}"],
        3,
        ["did you mean 'ViT-B-32'"],
    ),
    (
        ["validate", "recipe.yaml", "--set", "data.id_test={source: folder, path: images, domains: [photo]}"],
        8,
        ["photo"],
    ),
    (["evaluate", "nowhere"], 2, ["nowhere"]),
    (["evaluate", "images", "--head", "clip"], 2, ["--head", "clip"]),
    (["export", "images", "--to", "e"], 2, ["manifest.json"]),
    (["train", "recipe.yaml", "--out", "new", "--resume"], 2, ["new", "Leave --resume out"]),
    (["train", "recipe.yaml"], 2, ["--out"]),
    (["trian"], 2, ["trian"]),
]


@pytest.mark.parametrize(("words", "code", "parts"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_gives_one_message_and_its_exit_code(run, words, code, parts):
    found, out, err = run(*words)
    text = flat(err)
    assert found == code, text
    assert out == ""
    assert "Traceback" not in err
    for part in parts:
        assert part in text, text


def test_all_problems_of_a_recipe_are_told_at_once(run):
    code, _, err = run("validate", "recipe.yaml", "--set", "train.epochs=0", "--set", "train.decay=some")
    assert code == 3
    assert "2 problems" in err
    assert "train.epochs" in err
    assert "train.decay" in err


def test_an_unreadable_image_is_named(run):
    with open("images/photo/star/1.png", "wb") as file:
        file.write(b"not an image")
    code, _, err = run("train", "recipe.yaml", "--out", "out")
    assert code == 4
    assert "images/photo/star/1.png" in flat(err).replace(" ", "")


def test_a_hub_that_cannot_be_reached_is_said_with_the_ways_around_it(run):
    weights = "model={name: ViT-B-32, pretrained: laion2b_s34b_b79k}"
    code, _, err = run("train", "recipe.yaml", "--out", "out", "--set", weights)
    assert code == 4
    assert "the weights of ViT-B-32 must load" in flat(err)
    assert "local-dir:FOLDER" in err


def test_weights_under_the_wrong_activation_are_refused(run):
    code, _, err = run("train", "recipe.yaml", "--out", "out", "--set", "model={name: ViT-B-32, pretrained: openai}")
    assert code == 3
    assert "ViT-B-32-quickgelu" in err


def test_damaged_weights_of_a_local_model_are_a_data_error(run):
    with open("model/open_clip_model.safetensors", "wb") as file:
        file.write(b"\x00" * 100)
    code, _, err = run("train", "recipe.yaml", "--out", "out")
    assert code == 4
    assert "must load" in flat(err)


def test_settings_without_effect_are_named(run):
    code, _, err = run("validate", "recipe.yaml", "--set", "budget.wall_time_s=60")
    assert code == 0
    assert "warning: " in err
    assert "budget" in err


def test_debug_shows_the_traceback_and_keeps_the_exit_code(run):
    code, _, err = run("evaluate", "nowhere", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_grey_and_transparent_images_are_read(run):
    Image.open("images/photo/star/1.png").convert("L").save("images/photo/star/1.png")
    Image.open("images/photo/star/2.png").convert("RGBA").save("images/photo/star/2.png")
    code, _, err = run("train", "recipe.yaml", "--out", "out", "--set", "train.epochs=1")
    assert code == 0, err
