"""The command line as a user meets it: results, JSON, and one clear message with the right code for each mistake."""

import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import crash_host
import pytest
import short_training
import typer.main
from suggestions import parsed

import carft_ray
from carft_ray import cli
from carft_ray.cli import program
from carft_ray.data import sets
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.recipe.schema.recipe import single
from carft_ray.study.opening import open_study
from carft_ray.ui import console


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, images, a recipe, trainings ``done`` and ``begun``, and other files in ``full``."""
    path = tmp_path_factory.mktemp("short")
    short_training.make(path)
    (path / "full").mkdir()
    (path / "full" / "notes.txt").write_text("not ours")
    cache = f"data.cache_dir={path / 'cache'}"
    assert crash_host.call(["train", path / "recipe.yaml", "--out", path / "done", "--set", cache, "--json"]) == 0
    recipe = single(load_recipe(path / "recipe.yaml"))
    with open_study(path / "begun", recipe):
        (path / "begun" / "resolved.yaml").write_text(dump_recipe(recipe))
    return path


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A copy of the folder, the working directory."""
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def everything(here="."):
    return sorted(path for path in Path(here).rglob("*") if path.name != "lock")


@pytest.mark.slow
def test_train_evaluate_and_export_from_the_first_to_the_last_command(run):
    code, out, err = run("train", "recipe.yaml", "--out", "out")
    assert code == 0, err
    rows = [line.split("  ")[0].split(",")[0] for line in out.splitlines()]
    assert rows == ["accuracy", "zero-shot", "fine-tuned", "mixed"]
    assert re.search(r"^zero-shot +\d+\.\d \[\d+\.\d, \d+\.\d\]", out, re.M)
    assert "carft-ray export out --to exports/short" in err

    code, out, err = run("train", "recipe.yaml", "--out", "out", "--resume", "--json")
    result = json.loads(out)
    assert {"folder", "objective", "alpha", "metrics", "curve", "zero_shot"} <= result.keys()
    metrics = {"id_accuracy", "ood_accuracy", "accuracy/id_val", "accuracy/sketch", "objective"}
    at_one = {name: value for name, value in result["curve"][-1].items() if name != "alpha"}
    assert result["curve"][-1]["alpha"] == 1
    assert result["metrics"].keys() == at_one.keys() == metrics
    assert err == ""

    code, out, err = run("evaluate", "out", "--json")
    found = json.loads(out)
    by_set = found.pop("sets")
    assert found == {"name": "out/train", "alpha": result["alpha"], "head": "fine_tuned", "metrics": result["metrics"]}
    assert by_set.keys() == {"id_val", "sketch"}
    for name, values in by_set.items():
        assert values["accuracy"] == result["metrics"][f"accuracy/{name}"]
        assert {"top5", "nll", "brier", "ece", "worst_class"} <= values.keys()
    for words, expected in (
        (["--alpha", "1"], at_one),
        (["--alpha", "0", "--head", "zero_shot"], {key: result["zero_shot"][key] for key in metrics}),
    ):
        assert json.loads(run("evaluate", "out", *words, "--json")[1])["metrics"] == expected
    code, out, err = run("evaluate", "out", "--alpha", "0.5")
    assert "out/train, alpha 0.5" in out
    assert [row.split()[0] for row in out.split("\n\n")[1].splitlines()] == ["set", "ID", "sketch"]
    assert "carft-ray export out --to exports/short --alpha 0.5" in err

    code, out, err = run("export", "out", "--to", "exported", "--json")
    assert code == 0, err
    exported = json.loads(out)
    said = {"trial", "standing", "sha256", "said"}
    assert exported.keys() == {"folder", "alpha", "num_checked", "formats", *said}
    assert exported["standing"] == "searched"
    assert exported["alpha"] == result["alpha"]
    assert exported["formats"]["open_clip"] < 1e-3


@pytest.mark.slow
def test_validate_says_what_comes_next_shows_a_complete_recipe_and_speaks_json(run):
    before = everything()
    words = ["validate", "recipe.yaml", "--set", "train.epochs=7"]
    code, out, err = run(*words)
    assert (code, out) == (0, "")
    assert err.splitlines()[0] == "recipe.yaml is valid."
    assert "carft-ray search recipe.yaml --set train.epochs=7 --study studies/short" in err
    answer = json.loads(run(*words, "--json")[1])
    assert answer.keys() == {"valid", "recipe_hash", "recipe"}
    assert answer["recipe"]["train"]["epochs"] == 7
    assert everything() == before
    assert "Next:\n  carft-ray train recipe.yaml" in run("validate", "recipe.yaml", "--set", "search.space={}")[2]
    Path("shown.yaml").write_text(run(*words, "--show")[1])
    assert load_recipe(Path("shown.yaml")) == load_recipe(Path("recipe.yaml"), ["train.epochs=7"])
    code, _, err = run("validate", "recipe.yaml", "--set", "prompts.templates=['a {}']")
    assert code == 0
    assert "warning: train.kl_weight has no effect: with one template the KL term is always 0\n" in err


@pytest.mark.slow
def test_what_is_done_with_an_image_in_two_roles_is_told(run):
    shutil.copy("images/photo/star/0.png", "images/photo_val/star/copy.png")
    for words in ("validate recipe.yaml --deep", "data add recipe.yaml"):
        code, _, err = run(*words.split())
        assert code == 0
        assert "data.train: 1 image left out, also in data.id_val\n" in err
    assert "train: 19 images" in err


@pytest.mark.slow
@pytest.mark.parametrize("words", ["validate recipe.yaml --deep", "data add recipe.yaml", "doctor recipe.yaml --quick"])
def test_a_command_lists_each_tree_once(run, words, monkeypatch):
    listed = Counter()

    def counting(reader):
        def listing(spec, place):
            listed[spec.model_dump_json(exclude=sets._TAKES)] += 1
            return reader.listing(spec, place)

        return replace(reader, listing=listing)

    monkeypatch.setattr(sets, "READERS", {kind: counting(reader) for kind, reader in sets.READERS.items()})
    assert run(*words.split())[0] == 0
    assert [*listed.values()] == [1, 1, 1]


# mistakes: the command line, exit code, words of the message ({here}: the working directory)

GO_ON = "carft-ray train {here}/begun/resolved.yaml --out {here}/begun --resume"
MISTAKES = [
    ("search --study new --set search.space={}", 3, "search.space: must contain at least one parameter to search"),
    ("validate --set data.train.path=nowhere", 4, "\n    Images are expected as PATH/domain/class/*.png, without "),
    ("validate --set train.batch_size=21", 4, "must be at most the size of the training set, 20 images, in train,"),
    ("validate --set 'data.id_test={source: folder, path: images, domains: [photo]}'", 8, "data.id_test: a set has"),
    ("validate --set 'model={name: ViT-B-33, pretrained: openai}'", 3, "did you mean 'ViT-B-32'?"),
    ("validate --set 'model={name: ViT-B-32, pretrained: no.safetensors}'", 3, "must be an existing weights file"),
    ("train --out new --set 'model={name: ViT-B-32, pretrained: openai}'", 3, "model.name: ViT-B-32-quickgelu"),
    ("train --out new --set 'model={name: ViT-B-32, pretrained: laion2b_s34b_b79k}'", 4, "Without a network, "),
    ("train --out new --resume", 2, "new: must contain a training to resume, but got none\n    Leave --resume out to"),
    ("train --out full", 2, "full: must be a new folder, but got one that contains notes.txt\n    Give another folder"),
    ("train --out full/notes.txt", 2, "{here}/full/notes.txt: must be a new folder, but got a file\n    Give"),
    ("train --out done", 2, "but got a finished training\n    Add --resume to see its result. Give another folder"),
    ("train --out done --resume --set train.seed=5", 3, "train.seed: must be 0 as in {here}/done, but got 5\n"),
    ("sandbox images --to full", 2, "full"),
    ("evaluate nowhere", 2, "nowhere: must be a study or the folder of a training, but got no such folder"),
    ("export images --to new", 2, "images: must be a study or the folder of a training, but got one without log/"),
    ("export begun --to new", 6, "{here}/begun: must have a finished trial, but got none\n    Continue it: " + GO_ON),
    ("evaluate done --head zeroshot", 2, "but got 'zeroshot'; did you mean 'zero_shot'?"),
    ("export done --to new --format onnx,huggingfaces", 2, "did you mean 'huggingface'? (allowed: "),
    (f"report {'x' * 300}", 2, "is too long: each name in a path has at most 255 bytes"),
]


@pytest.mark.parametrize(("line", "code", "message"), MISTAKES, ids=[line[:70] for line, _, _ in MISTAKES])
def test_a_mistake_gives_one_message_its_exit_code_and_leaves_nothing(run, line, code, message):
    command, *words = shlex.split(line)
    if command in ("validate", "train", "search"):
        words = ["recipe.yaml", *words]
    if "ViT-B-32" in line:  # the templates of the sandbox would be a warning
        words += ["--set", "prompts.templates=openai"]
    before = everything()
    found, out, err = run(command, *words)
    assert (found, out) == (code, ""), err
    said = err.removeprefix("opening model and sets\n")
    assert said.startswith("error: ")
    assert message.replace("{here}", str(Path.cwd())) in said
    assert said.count("\nerror: ") == 0
    assert everything() == before


def test_words_that_are_no_command_end_with_2_and_the_way_to_the_help(run):
    for line, told in (("train recipe.yaml", "--out"), ("trian", "trian"), ("evaluate done --alpha 2", "--alpha")):
        code, out, err = run(*line.split())
        assert (code, out) == (2, "")
        assert told in err
        assert "-h' for help" in err


@pytest.mark.slow
def test_a_damaged_image_or_weights_file_is_named_and_the_mended_command_works(run):
    image, weights = Path("images/sketch/star/1.png"), Path("model/open_clip_model.safetensors")
    for path, message in (
        (image, f"error: {image.absolute()}: must be a readable image, but got image file is truncated\n"),
        (weights, "error: model.name: must be a weights file that can be read, but got "),
    ):
        whole, before = path.read_bytes(), everything()
        path.write_bytes(whole[:100])
        code, _, err = run("train", "recipe.yaml", "--out", "new")
        assert code == 4
        assert message in err
        assert everything() == before
        path.write_bytes(whole)
    code, _, err = run("train", "recipe.yaml", "--out", "new", "--address", "auto", "--set", "train.epochs=1")
    assert code == 0
    assert "warning: --address has no effect: one worker trains in this process\n" in err


def test_damaged_results_are_a_storage_error(run):
    training = short_training.place_in(Path("done"))
    for path, message in (
        (training / "fine_tuned.safetensors", "must be the file that the study has recorded, but got another one"),
        (training / "result.json", "must be the file that the study has recorded"),
        (Path("done/prepared/heads.safetensors"), "must be a file of tensors, but got a damaged one ("),
        (Path("done/manifest.json"), "must be a whole JSON file, but got a damaged one ("),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[:-10])
        before = everything()
        code, _, err = run("evaluate", "done")
        assert code == 5
        assert f"error: {path.absolute()}: {message}" in err
        assert everything() == before
        path.write_bytes(whole)


def test_a_fault_of_our_own_is_one_message_too(run, monkeypatch, capsys):
    def broken():
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(program, "app", broken)
    code, out, err = run("validate", "recipe.yaml")
    assert (code, out) == (1, "")
    assert err.startswith(
        "error: internal error: ZeroDivisionError: division by zero\n    Please report it. With --debug"
    )
    crash_host.call(["validate", "recipe.yaml", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def commands(command, words=()):
    """Yields every command, with its words."""
    if not hasattr(command, "commands"):
        yield words, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*words, name))


def test_help_shows_what_a_command_does_its_options_and_an_example_that_parses_and_version_is_one_line(run):
    assert re.fullmatch(rf"carft-ray {carft_ray.__version__} \(Python 3\..*\n", run("--version")[1])
    for words, command in commands(typer.main.get_command(cli.app)):
        code, out, _ = run(*words, "--help")
        assert code == 0
        assert " ".join(command.help.split()[:2]) in out
        assert "Example:" in out
        label, program, *rest = command.epilog.split()
        assert (label, program, parsed(rest).command.name) == ("Example:", "carft-ray", command.name)
        for option in command.params:
            assert getattr(option, "help", ""), f"{' '.join(words)}: {option.name} has no help"
        options = {option for parameter in command.params for option in parameter.opts}
        without = {"--json"} if words[0] in ("dashboard", "schema") else set()  # pages; JSON alone
        assert {"--debug", "--json"} - without <= options, words


def test_what_is_printed_beside_a_document_goes_to_standard_error(capsys):
    for asked in (True, False):
        with console.only_json(asked):
            print("epoch 1")  # by a trainer of the user's own
            console.print_json({"objective": 0.5}, asked)
        out, err = capsys.readouterr()
        assert (json.loads(out), err) == ({"objective": 0.5}, "epoch 1\n") if asked else (out, err) == ("epoch 1\n", "")
