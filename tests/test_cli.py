"""The command line as a user meets it: results, JSON, and one clear message with the right code for each mistake."""

import json
import re
import shutil
from pathlib import Path

import crash_host
import pytest
import short_training
import typer.main
from PIL import Image
from suggestions import check_suggestions, parsed

import carft_ray
from carft_ray import cli
from carft_ray.cli import program
from carft_ray.errors import Problem
from carft_ray.launch.session import begin
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.recipe import single
from carft_ray.study.opening import open_study

TRAINING = short_training.training_in(Path()) / "attempt-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, images, a recipe, a finished training ``done``, and other files in ``full``."""
    path = tmp_path_factory.mktemp("short")
    short_training.make(path)
    (path / "full").mkdir()
    (path / "full" / "notes.txt").write_text("not ours")
    cache = f"data.cache_dir={path / 'cache'}"
    assert crash_host.call(["train", path / "recipe.yaml", "--out", path / "done", "--set", cache, "--json"]) == 0
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys, tmp_path):
    """Runs the command line in a copy of the folder; returns exit code, standard output and standard error."""
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    capsys.readouterr()

    def call(*words):
        code = crash_host.call(words)
        captured = capsys.readouterr()
        check_suggestions(captured.err)
        return code, captured.out, captured.err

    return call


def everything(here="."):
    return sorted(path for path in Path(here).rglob("*") if path.name != "lock")


# the commands


@pytest.mark.slow
def test_train_evaluate_and_export_from_the_first_to_the_last_command(run):
    code, out, err = run("train", "recipe.yaml", "--out", "out")
    assert code == 0, err
    assert [line.split("  ")[0].split(",")[0] for line in out.splitlines()] == [
        "accuracy",
        "zero-shot",
        "fine-tuned",
        "mixed",
    ]
    assert re.search(r"^zero-shot +\d+\.\d \[\d+\.\d, \d+\.\d\]", out, re.M)
    assert "carft-ray export out --to exports/short" in err

    code, out, err = run("train", "recipe.yaml", "--out", "out", "--resume", "--json")
    result = json.loads(out)
    assert {"folder", "objective", "alpha", "metrics", "curve", "zero_shot", "fine_tuned"} <= result.keys()
    metrics = {"id_accuracy", "ood_accuracy", "accuracy/id_val", "accuracy/sketch", "objective"}
    assert result["metrics"].keys() == result["fine_tuned"].keys() == metrics
    assert err == ""

    code, out, err = run("evaluate", "out", "--json")
    found = json.loads(out)
    by_set = found.pop("sets")
    assert found == {"name": "out/train", "alpha": result["alpha"], "head": "fine_tuned", "metrics": result["metrics"]}
    assert list(by_set) == ["id_val", "sketch"]
    for name, values in by_set.items():
        assert values["accuracy"] == result["metrics"][f"accuracy/{name}"]
        assert {"top5", "nll", "brier", "ece", "worst_class"} <= values.keys()
        assert values["worst_class"]["name"] in short_training.CLASSES
        assert values["worst_class"]["accuracy"] <= values["accuracy"]
    code, out, err = run("evaluate", "out", "--alpha", "1", "--json")
    assert json.loads(out)["metrics"] == result["fine_tuned"]
    code, out, err = run("evaluate", "out", "--alpha", "0", "--head", "zero_shot", "--json")
    assert json.loads(out)["metrics"] == {key: result["zero_shot"][key] for key in metrics}
    code, out, err = run("evaluate", "out", "--alpha", "0.5")
    assert "out/train, alpha 0.5" in out
    head, *rows = out.split("\n\n")[1].splitlines()
    assert re.split(r"  +", head) == ["set", "images", "top-5, %", "NLL, nats", "Brier", "ECE, %", "worst class, %"]
    assert [row.split()[0] for row in rows] == ["ID", "sketch"]
    assert max(map(len, (head, *rows))) <= 80
    assert "carft-ray export out --to exports/short --alpha 0.5" in err

    code, out, err = run("export", "out", "--to", "exported", "--json")
    assert code == 0, err
    exported = json.loads(out)
    assert exported.keys() == {"folder", "alpha", "num_checked", "formats"}
    assert exported["alpha"] == result["alpha"]
    assert exported["formats"].keys() == {"open_clip"}
    assert exported["formats"]["open_clip"] < 1e-3


@pytest.mark.slow
def test_validate_says_what_comes_next_and_speaks_json(run):
    before = everything()
    code, out, err = run("validate", "recipe.yaml", "--set", "train.epochs=7")
    assert (code, out) == (0, "")
    assert err.splitlines()[0] == "recipe.yaml is valid."
    assert "carft-ray search recipe.yaml --set train.epochs=7 --study studies/short" in err
    code, out, err = run("validate", "recipe.yaml", "--json", "--set", "train.epochs=7")
    answer = json.loads(out)
    assert answer.keys() == {"valid", "recipe_hash", "recipe"}
    assert answer["recipe"]["train"]["epochs"] == 7
    assert everything() == before


@pytest.mark.slow
def test_the_shown_recipe_is_complete_and_loads_to_the_same_value(run):
    _, out, _ = run("validate", "recipe.yaml", "--show", "--set", "train.seed=3")
    Path("shown.yaml").write_text(out)
    assert load_recipe(Path("shown.yaml")) == load_recipe(Path("recipe.yaml"), ["train.seed=3"])


def test_sandbox_images_refuses_a_folder_that_is_there(run):
    before = everything()
    code, _, err = run("sandbox", "images", "--to", "full")
    assert (code, everything()) == (2, before), err
    assert err.startswith("error: ")
    assert "full" in err


# mistakes: words of the command, exit code, the whole message ({here}: the working directory)

LAYOUT = (
    "\n    Images are expected as PATH/domain/class/*.png, without domains as PATH/class/*.png; PATH is the set's path."
)
SPACE = "search.space.learning_rate"
OPENAI = ["--set", "prompts.templates=openai"]
MISTAKES = [
    (
        ["validate", "--set", "train.lerning_rate=1"],
        3,
        "--set train.lerning_rate=1: unknown key; did you mean 'learning_rate'? (allowed: ",
    ),
    (
        ["validate", "--set", "train.epochs=many"],
        3,
        '--set train.epochs=many: must be a whole number, but got "many"',
    ),
    (
        ["validate", "--set", f"{SPACE}={{low: 1, high: .5}}"],
        3,
        f"--set {SPACE}={{low: 1, high: .5}}: low <= high must hold, but got low=1.0, high=0.5",
    ),
    (
        ["validate", "--set", f"{SPACE}={{low: 0, high: 1, log: true}}"],
        3,
        f"--set {SPACE}={{low: 0, high: 1, log: true}}: low > 0 must hold with log: true, but got low=0.0",
    ),
    (
        ["validate", "--set", "search.space.seed={low: 0, high: 9}"],
        3,
        "--set search.space.seed={low: 0, high: 9}: must not be searched\n    Seeds are no hyperparameters: ",
    ),
    (["validate", "--set", "train.seed"], 3, "--set train.seed: must have the form key.path=value"),
    (
        ["search", "--study", "new", "--set", "search.space={}"],
        3,
        "search.space: must hold at least one parameter to search\n"
        "    Add a parameter, for example learning_rate: {low: 1e-6, high: 1e-4, log: true}.",
    ),
    (
        ["train", "--out", "new", "--executor", "dask"],
        3,
        '--set resources.executor=dask: must be one of the allowed values, but got "dask" '
        "(allowed: auto, inline, ray-train, debug)",
    ),
    (
        ["train", "--out", "new", "--executor", "inline", "--num-workers", "2"],
        3,
        "--set resources.num_workers=2: must be 1 with executor: inline, but got 2\n"
        "    Write executor: ray-train, or leave the executor out.",
    ),
    (
        ["validate", "--set", "data.train.path=nowhere"],
        4,
        "data.train: the root of the image tree must be a folder, but got {here}/nowhere" + LAYOUT,
    ),
    (
        ["validate", "--set", "data.train.domains=[foto]"],
        4,
        "data.train: a domain must be a folder of {here}/images, but got 'foto'; did you mean 'photo'? "
        "(allowed: photo, photo_val, sketch)",
    ),
    (
        ["validate", "--set", "train.batch_size=21"],
        4,
        "batch_size: must be at most the size of the training set, 20 images, in train, search.space and baselines, "
        "but got 21",
    ),
    (
        ["validate", "--set", "model={name: ViT-B-33, pretrained: openai}", *OPENAI],
        3,
        "model.name: must be 'sandbox', 'local-dir:FOLDER', 'hf-hub:OWNER/NAME' or a model name of open_clip, but got "
        "'ViT-B-33'; did you mean 'ViT-B-32'?",
    ),
    (
        ["validate", "--set", "model.name=local-dir:modell"],
        3,
        "model.name: local-dir: needs a folder with open_clip_config.json, or one with a CLIPModel of Hugging Face, "
        "but got {here}/modell",
    ),
    (
        ["validate", "--set", "model={name: ViT-B-32, pretrained: openia}", *OPENAI],
        3,
        "model.pretrained: must be a tag of ViT-B-32, a weights file, or 'random', but got 'openia'; "
        "did you mean 'openai'? (allowed: random, openai, laion400m_e31, ",
    ),
    (
        ["validate", "--set", "model={name: ViT-B-32, pretrained: model/open_clip_modell.safetensors}", *OPENAI],
        3,
        "model.pretrained: must be a weights file that is there, but got {here}/model/open_clip_modell.safetensors; "
        "did you mean '{here}/model/open_clip_model.safetensors'?",
    ),
    (
        ["train", "--out", "new", "--set", "model={name: ViT-B-32, pretrained: openia}", *OPENAI],
        3,
        "model.pretrained: must be a tag of ViT-B-32, a weights file, or 'random', but got 'openia'; "
        "did you mean 'openai'? (allowed: random, openai, laion400m_e31, ",
    ),
    (
        ["train", "--out", "new", "--set", "model={name: ViT-B-32, pretrained: openai}", *OPENAI],
        3,
        "model.name: must compute the activation that 'openai' was trained with (QuickGELU), or every number is wrong, "
        "but got ViT-B-32 (GELU)\n    Write model.name: ViT-B-32-quickgelu",
    ),
    (
        ["train", "--out", "new", "--set", "model={name: ViT-B-32, pretrained: laion2b_s34b_b79k}", *OPENAI],
        4,
        "model.pretrained: the weights 'laion2b_s34b_b79k' of ViT-B-32 must be in the hub's cache or fetched "
        "(laion/CLIP-ViT-B-32-laion2B-s34B-b79K), but got not in the cache, and no connection to the hub\n"
        "    Without a network: model.pretrained: a weights file",
    ),
    (
        ["validate", "--set", "data.id_test={source: folder, path: images, domains: [photo]}"],
        8,
        "data.id_test: a set has one role and must not share images with data.train, but got {here}/images/photo\n"
        "    Give data.id_test images of its own; parts of one folder have none in common: [0, 0.8] and [0.8, 1].",
    ),
    (
        ["train", "--out", "new", "--resume"],
        2,
        "{here}/new: must hold a training to resume, but got none\n    Leave --resume out to begin one.",
    ),
    (
        ["train", "--out", "full"],
        2,
        "{here}/full: must be a new folder, but got one that holds notes.txt\n    Give another folder with --out.",
    ),
    (
        ["train", "--out", "full/notes.txt"],
        2,
        "{here}/full/notes.txt: must be a new folder, but got a file\n    Give another folder with --out.",
    ),
    (
        ["train", "--out", "done"],
        2,
        "{here}/done: must be a new folder, but got a finished training\n"
        "    Add --resume to see its result. Give another folder with --out.",
    ),
    (
        ["evaluate", "nowhere"],
        2,
        "nowhere: must be a study or the folder of a training, but got no such folder",
    ),
    (
        ["export", "images", "--to", "new"],
        2,
        "images: must be a study or the folder of a training, but got one without log/",
    ),
    (
        ["evaluate", "done", "--head", "zeroshot"],
        2,
        "--head: must be the name of a head, but got 'zeroshot'; did you mean 'zero_shot'? "
        "(allowed: fine_tuned, zero_shot)",
    ),
    (
        ["evaluate", "done", "--trial", "t0003"],
        2,
        "--trial: must be the number or name of a trial or baseline, but got 't0003'; did you mean 't0000'? (allowed: "
        "zero_shot, train)",
    ),
    (
        ["export", "done", "--to", "full"],
        2,
        "{here}/full: must be a new folder, but got one that holds notes.txt\n    Give another folder with --to.",
    ),
    (
        ["export", "done", "--to", "new", "--format", "onnx,huggingfaces"],
        2,
        "--format: must be a format, but got 'huggingfaces'; did you mean 'huggingface'? "
        "(allowed: open_clip, huggingface, onnx)",
    ),
]


@pytest.mark.parametrize(("words", "code", "message"), MISTAKES, ids=lambda value: str(value)[:70])
def test_a_mistake_gives_one_message_its_exit_code_and_leaves_nothing(run, words, code, message):
    if words[0] in ("validate", "train", "search"):
        words = [words[0], "recipe.yaml", *words[1:]]
    before = everything()
    found, out, err = run(*words)
    assert (found, out) == (code, ""), err
    said = err.removeprefix("opening model and sets\n")
    assert said.startswith("error: " + message.replace("{here}", str(Path.cwd())))
    assert said.count("\nerror: ") == 0
    assert "Traceback" not in said
    assert everything() == before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "recipe.yaml"], ["Missing option", "--out"]),
        (["trian"], ["No such command", "trian"]),
        (["evaluate", "done", "--alpha", "2"], ["Invalid value", "--alpha", "1"]),
        (["train", "recipe.yaml", "--out", "new", "--num-workers", "0"], ["Invalid value", "--num-workers"]),
        (["validate", "recipe.yaml", "--sett", "a=1"], ["No such option", "--sett"]),
    ],
    ids=str,
)
def test_words_that_are_no_command_end_with_2_and_the_way_to_the_help(run, words, parts):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "-h' for help" in err
    assert [part for part in parts if part not in err] == []


def test_a_recipe_that_is_not_there_is_told_with_the_nearest_name(run):
    assert run("validate", "recipee.yaml") == (
        3,
        "",
        "error: recipee.yaml: no such recipe; did you mean 'recipe.yaml'?\n",
    )


def test_all_problems_of_a_file_are_told_at_once_with_their_lines(run):
    recipe = Path("recipe.yaml")
    written = recipe.read_text()
    recipe.write_text(written.replace("epochs: 3", "epochs: 0").replace("trials: 2", "trails: 2"))
    lines = [
        number for number, line in enumerate(written.splitlines(), 1) if "epochs: 3" in line or "trials: 2" in line
    ]
    code, _, err = run("validate", "recipe.yaml")
    first, *problems = err.splitlines()
    assert (code, first) == (3, "error: 2 problems")
    assert problems[0] == f"  - recipe.yaml:{lines[0]}: train.epochs: must be at least 1, but got 0"
    assert problems[1].startswith(f"  - recipe.yaml:{lines[1]}: search.trails: unknown key; did you mean 'trials'?")


def test_a_class_list_that_does_not_match_is_told_for_every_set(run):
    code, _, err = run("validate", "recipe.yaml", "--set", "data.classes=[arrow, circle, heart, sqare, star]")
    assert code == 4
    assert err.startswith("error: 6 problems\n")
    for place in ("data.train", "data.id_val", "data.ood_val.sketch"):
        assert (
            f"  - {place}: every class of a set must be in the class list, but got 'square'; did you mean 'sqare'?"
            in err
        )
        assert f"  - {place}: every class must be there in every set, but got none for 'sqare'" in err


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["photo", "sketch"])
def test_an_unreadable_image_is_named_and_the_mended_command_works(run, domain):
    image = Path("images", domain, "star", "1.png")
    whole, before = image.read_bytes(), everything()
    image.write_bytes(whole[:100])
    code, _, err = run("train", "recipe.yaml", "--out", "new")
    assert code == 4
    assert err.endswith(
        f"error: {image.absolute()}: must be a readable image, but got image file is truncated\n"
        "    Replace the file, or take it out of the set.\n"
    )
    assert everything() == before
    image.write_bytes(whole)
    assert run("train", "recipe.yaml", "--out", "new", "--set", "train.epochs=1")[0] == 0


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_told_with_the_ways_around_it(run):
    weights = "model={name: ViT-B-32, pretrained: laion2b_s34b_b79k}"
    code, _, err = run("train", "recipe.yaml", "--out", "out", "--set", weights)
    assert code == 4
    assert err.splitlines()[-1].strip().startswith("Without a network: model.pretrained: a weights file (.safetensors")
    assert "model.name: local-dir:FOLDER" in err


@pytest.mark.slow
def test_damaged_weights_of_a_local_model_are_a_data_error(run):
    before = everything()
    Path("model/open_clip_model.safetensors").write_bytes(b"\x00" * 100)
    code, _, err = run("train", "recipe.yaml", "--out", "out")
    assert code == 4
    assert "error: model.name: must be a weights file that can be read, but got " in err
    assert "Traceback" not in err
    assert everything() == before


NOT_RECORDED = (
    "must be the file that the study has recorded, but got another one",
    "    Restore it from a copy; no command changes a finished training.",
)
NO_TENSORS = (
    "must be a file of tensors, but got a damaged one (",
    "    Restore it from a copy, or train again into another folder.",
)


@pytest.mark.parametrize(
    ("name", "says"),
    [(TRAINING / "fine_tuned.safetensors", NOT_RECORDED), ("prepared/heads.safetensors", NO_TENSORS)],
    ids=["weights", "heads"],
)
@pytest.mark.parametrize("words", [["evaluate", "done"], ["export", "done", "--to", "new"]], ids=lambda words: words[0])
def test_damaged_results_are_a_storage_error(run, name, says, words):
    path = Path("done", name)
    path.write_bytes(path.read_bytes()[:-1])
    before = everything()
    code, _, err = run(*words)
    assert code == 5
    assert err.startswith(f"error: {path.absolute()}: {says[0]}")
    assert err.splitlines()[-1] == says[1]
    assert everything() == before


@pytest.mark.parametrize(
    ("name", "what"),
    [(TRAINING / "result.json", "file that the study has recorded"), ("manifest.json", "manifest of a")],
)
def test_a_damaged_json_file_is_a_storage_error(run, name, what):
    path = Path("done", name)
    path.write_bytes(path.read_bytes()[:-10])
    code, _, err = run("evaluate", "done")
    assert code == 5
    assert err.startswith(f"error: {path.absolute()}: must be the {what}")


def test_an_unfinished_training_is_no_model(run):
    begun = Path("begun").absolute()
    recipe = single(load_recipe(Path("recipe.yaml")))
    with open_study(begun, recipe):
        begin(begun, recipe)
    code, _, err = run("export", "begun", "--to", "new")
    assert code == 6
    assert err == (
        f"error: {begun}: must have a finished trial, but got none\n"
        f"    Go on with it: carft-ray train {begun}/resolved.yaml --out {begun} --resume\n"
    )


def test_a_training_is_not_resumed_with_another_recipe(run):
    code, _, err = run("train", "recipe.yaml", "--out", "done", "--resume", "--set", "train.seed=5")
    assert code == 3
    done = Path("done").absolute()
    problems = err.splitlines()
    assert f"train.seed: must be 0 as in {done}, but got 5" in problems[0] + problems[-2]
    assert problems[-1] == f"    Continue with {done / 'resolved.yaml'}, or give another folder."


@pytest.mark.parametrize(
    ("override", "warning"),
    [
        ("prompts.templates=['a {}']", "train.kl_weight has no effect: with one template the KL term is always 0"),
        ("train={kl_weight: 0, context_scale: 5, batch_size: 8}", "train.context_scale has no effect: kl_weight is 0"),
    ],
)
def test_a_setting_without_effect_is_a_warning_that_names_it(run, override, warning):
    code, _, err = run("validate", "recipe.yaml", "--set", override)
    assert code == 0
    assert f"warning: {warning}\n" in err


@pytest.mark.slow
def test_an_address_for_a_training_that_needs_no_ray_is_a_warning(run):
    words = ["train", "recipe.yaml", "--out", "new", "--address", "auto", "--set", "train.epochs=1"]
    code, _, err = run(*words)
    assert code == 0
    assert "warning: --address has no effect: one worker trains in this process\n" in err


# what is shown


def test_debug_shows_the_traceback_and_keeps_message_and_exit_code(run):
    code, _, err = run("evaluate", "nowhere", "--debug")
    assert code == 2
    assert err.startswith("Traceback (most recent call last):")
    assert "\nerror: " in err


def test_a_value_stands_behind_a_rule_or_behind_a_fact():
    assert str(Problem("x", "must be 1", "2")) == "x: must be 1, but got 2"
    assert str(Problem("x", "needs a number", "a")) == "x: needs a number, but got a"
    assert str(Problem("", "no Ray answers at 1.2.3.4:5", "timed out")) == "no Ray answers at 1.2.3.4:5: timed out"
    assert carft_ray.errors.Problem is Problem


def test_a_fault_of_our_own_is_one_message_too(run, monkeypatch):
    def broken():
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(program, "app", broken)
    code, out, err = run("validate", "recipe.yaml")
    assert (code, out) == (1, "")
    assert err == (
        "error: internal error: ZeroDivisionError: division by zero\n"
        "    Please report it; with --debug the command shows where it happens.\n"
    )
    assert "Traceback" in run("validate", "recipe.yaml", "--debug")[2]


def test_a_path_that_no_system_has_is_one_message(run):
    for words in (("validate", "x" * 300 + ".yaml"), ("report", "x" * 300)):
        code, _, err = run(*words)
        assert code == 2
        assert "must be a path that can be: names of at most 255 bytes" in err


def commands(command=None, words=()):
    """Yields the words of every command."""
    command = command or typer.main.get_command(cli.app)
    if not hasattr(command, "commands"):
        yield words
        return
    for name, child in command.commands.items():
        yield from commands(child, (*words, name))


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_shows_what_a_command_does_and_an_example_that_parses(run, words):
    code, out, _ = run(*words, "--help")
    assert code == 0
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    assert " ".join(command.help.split()[:2]) in out
    label, program, *rest = command.epilog.split()
    assert (label, program) == ("Example:", "carft-ray")
    assert parsed(rest).name == command.name
    assert "Example:" in out
    for option in command.params:
        assert getattr(option, "help", ""), f"{' '.join(words)}: {option.name} has no help"


def test_version_is_one_line(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith(f"carft-ray {carft_ray.__version__} (Python 3.")
    assert out.count("\n") == 1


def test_every_command_speaks_json_and_shows_tracebacks_on_demand():
    program = typer.main.get_command(cli.app)
    for words in commands():
        command = program
        for word in words:
            command = command.commands[word]
        options = {option for parameter in command.params for option in parameter.opts}
        wanted = {"--debug"} | ({"--json"} if words[0] not in ("dashboard", "schema") else set())  # pages; JSON alone
        assert wanted <= options, words


@pytest.mark.slow
def test_grey_and_transparent_images_are_read(run):
    Image.open("images/photo/star/1.png").convert("L").save("images/photo/star/1.png")
    Image.open("images/photo/star/2.png").convert("RGBA").save("images/photo/star/2.png")
    code, _, err = run("train", "recipe.yaml", "--out", "out", "--set", "train.epochs=1")
    assert code == 0, err
