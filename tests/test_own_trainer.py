"""A fine-tuning of the user's own in place of the built-in loop: by its name in a recipe, and given from Python."""

import contextlib
import pickle
import random
import re
import shutil
import sys
import threading
from pathlib import Path

import forging
import numpy as np
import own_functions
import pytest
import short_sealed
import short_training
import torch
from crash_host import call
from ray import cloudpickle

import carft_ray
from carft_ray.errors import CarftError, DivergedError, RecipeError, UsageError
from carft_ray.launch.command import Plan, run_search, train_once
from carft_ray.launch.workers.own_trainer import with_function
from carft_ray.recipe.loading import apply, dump_recipe, load_recipe, portable_paths
from carft_ray.recipe.loading import own_functions as own_of
from carft_ray.training.loop import StoppedRun
from carft_ray.training.own_function import load_function, require_trusted
from carft_ray.training.own_training import checked_state
from carft_ray.training.run import prepare, run_training
from carft_ray.training.run_context import RunContext

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
STRANGE = ["--set", "train.function=mine:few_steps"]
DEBUG = "resources.executor=debug"
ONE_EPOCH = ["train.epochs=1", "evaluate.every_epochs=0"]


def recipe_for(folder, name, *overrides):
    """The recipe of short trainings with a function of ``own_functions``."""
    path = folder / "recipe.yaml"
    if not path.exists():
        short_training.make(folder)
    named = [f"train.function=own_functions:{name}", f"train.function_dir={HERE}", f"data.cache_dir={folder / 'cache'}"]
    return load_recipe(path, [*named, *overrides])


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A folder in which trainings are prepared; its recipe names test sets, which are not there."""
    folder = tmp_path_factory.mktemp("ready")
    tests = [text for text in short_sealed.settings(folder, 1) if "test" in text]
    tests = [text.replace("photo_test", "sealed_photo").replace("[cartoon]", "[sealed_cartoon]") for text in tests]
    prepare(recipe_for(folder, "few_steps", *tests), folder / "prepared", lambda text: None, opened=False)
    return folder, tests


@pytest.fixture
def train(ready, tmp_path):
    """Makes one training without a study, by a function of ``own_functions`` or one that is given."""
    folder, tests = ready

    def call(function, *overrides, context=None, out="out", attempt=1):
        name, given = (function, None) if isinstance(function, str) else (function.__name__, function)
        recipe = recipe_for(folder, name, *tests, *(overrides or ONE_EPOCH))
        place, prepared = tmp_path / out, folder / "prepared"
        return run_training(recipe, place, prepared, context or RunContext(), attempt, function=given)

    return call


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "trainer.py").write_text("def fine_tune(values, context):\n    return 'of the folder'\n\n\nlimit = 3\n")
    (tmp_path / "needy.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "broken.py").write_text("def fine_tune(values, context:\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trainr:fine_tune", "must be a module that can be imported, but got trainr; did you mean 'trainer'?"),
        ("trainer:finetune", "but got finetune; did you mean 'fine_tune'? (allowed: fine_tune)"),
        ("trainer:limit", "must be a function, but got trainer:limit, of type int"),
        ("needy:fine_tune", "ModuleNotFoundError: No module named 'nowhere_to_be_found' ("),
        ("broken:fine_tune", "the module broken must be importable, but got SyntaxError"),
        ("script:fine_tune", "the module script must be importable, but got SystemExit: 1"),
        ("__main__:fine_tune", "was given from Python and has no module to import"),
        ("trainer:make.<locals>.fine_tune", "was given from Python"),
        ("own_functions:one_argument", "must take two arguments, fn(values, context), but got one_argument(values)"),
    ],
)
def test_a_function_that_cannot_be_had_is_one_message(modules, name, said):
    with pytest.raises(RecipeError) as caught:
        load_function(name, str(modules))
    assert said in str(caught.value)
    assert str(caught.value).startswith("train.function: ")


def test_the_folder_of_the_recipe_is_first_on_the_path_whatever_was_imported_before(modules, tmp_path_factory):
    assert load_function("trainer:fine_tune", str(modules))({}, None) == "of the folder"
    other = tmp_path_factory.mktemp("other")
    (other / "trainer.py").write_text("def fine_tune(values, context):\n    return 'of another'\n")
    assert load_function("trainer:fine_tune", str(other))({}, None) == "of another"


@pytest.mark.parametrize("text", ["trainer", "trainer.py:fit", ":fit", "a:b:c"])
def test_a_recipe_names_module_and_function_and_its_space_none(text):
    with pytest.raises(RecipeError, match="must be MODULE:NAME, the function"):
        load_recipe(EXAMPLES / "own_trainer.yaml", [f"train.function='{text}'"])
    with pytest.raises(RecipeError, match="must not be searched"):
        load_recipe(EXAMPLES / "own_trainer.yaml", ["search.space.function={choices: ['a:b', 'c:d']}"])


def test_the_folder_is_that_of_the_recipe_and_stays_in_the_resolved_one(tmp_path):
    recipe = load_recipe(EXAMPLES / "own_trainer.yaml")
    assert recipe.train.function_dir == str(EXAMPLES)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert portable_paths(recipe).train.function_dir == "examples"
    assert load_recipe(HERE.parent / "search_spaces" / "quickstart.yaml").train.function_dir is None


def test_a_function_of_a_baseline_counts_where_baselines_are_trained():
    overrides = ["train.function=null", "search.baselines={mine: {function: 'nowhere:fit'}}"]
    recipe = load_recipe(EXAMPLES / "own_trainer.yaml", overrides)
    assert own_of(recipe) == {"search.baselines.mine.function": "nowhere:fit"}
    require_trusted(recipe, False, baselines=False)
    with pytest.raises(UsageError, match=r"search\.baselines\.mine\.function: names code that a training would run"):
        require_trusted(recipe, False)


def test_values_model_sets_and_folder_are_what_a_function_needs(train):
    seen = {}

    def look(values, context):
        seen["values"] = values
        image, label = context.train_set[0]
        assert context.model(image[None]).shape == (1, len(context.class_names))
        assert torch.equal(context.model.eval()(image[None]), context.frozen(image[None]))
        assert all(p.requires_grad for p in context.model.parameters())
        assert not any(p.requires_grad for p in context.frozen.parameters())
        assert label == context.train_set.labels[0]
        assert [len(each) for each in context.validation_sets.values()] == [15, 10]
        assert context.checkpoint_dir.is_dir()
        plain = context.train_set.with_transform(context.transform)
        assert torch.equal(plain[0][0], plain[0][0])
        loader = torch.utils.data.DataLoader(context.train_set, batch_size=8)
        assert sum(len(labels) for _, labels in loader) == len(context.train_set) == len(list(context.train_set)) == 20
        stored = context.validation_sets["id_val"]
        pixels_BHWC = torch.from_numpy(np.array(stored.image(3)))[None]
        same = context.frozen.logits(context.frozen.features(pixels_BHWC))
        torch.testing.assert_close(context.frozen(stored[3][0][None]), same, rtol=1e-4, atol=1e-4)
        return context.model.state_dict()

    result = train(look, *ONE_EPOCH, "train.head_bias=true", "train.precision=fp64")
    assert seen["values"] == {**result["train"], "compile": False}  # what auto means here
    assert {point["objective"] for point in result["curve"]} == {result["objective"]}  # all weights are the same


def test_no_test_set_can_be_reached_through_the_context(train):
    found = []

    def walk(value, seen):
        if id(value) in seen or isinstance(value, type) or type(value).__module__.startswith("torch"):
            return
        seen[id(value)] = value
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            [walk(each, seen) for pair in value.items() for each in pair]
        elif isinstance(value, list | tuple):
            [walk(each, seen) for each in value]
        elif hasattr(value, "__closure__"):
            [walk(cell.cell_contents, seen) for cell in value.__closure__ or ()]
        else:
            walk(getattr(value, "__dict__", None), seen)
            walk(getattr(value, "__self__", None), seen)

    def look(values, context):
        walk([context, values], {})
        return context.model.state_dict()

    train(look)
    assert any("photo_val" in text for text in found)  # the walk reaches the sets
    assert not [text for text in found if "sealed" in text]


def test_what_is_reported_is_a_row_with_an_intermediate_value_once_the_model_has_changed(train):
    rows, values = [], ["train.epochs=2", "train.learning_rate=0.1", "evaluate.every_epochs=1"]
    train("few_steps", *values, context=RunContext(report=rows.append))
    assert [(row["epoch"], row["step"], row["num_steps"]) for row in rows] == [(1, 1, 2), (2, 2, 2)]
    assert all(0 <= row["subset/objective"] <= 1 and row["loss"] > 0 for row in rows)


def test_the_same_seed_gives_the_same_random_numbers_and_another_does_not(train):
    drawn = []

    def draws(values, context):
        drawn.append((torch.rand(1).item(), random.random(), context.train_set[0][0].sum().item()))
        return context.model.state_dict()

    for number, seed in enumerate((0, 0, 1)):
        train(draws, *ONE_EPOCH, "train.crop_scale=0.3", f"train.seed={seed}", out=str(number))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))


HEAD = "'class_head' must be a tensor of the shape [5, "
RETURNED = [
    (lambda model: None, "must return a state dict such as context.model.state_dict()"),
    (lambda model: model, "but got OwnClassifier\n    Return model.state_dict()."),
    (lambda model: {"class_haed": model.class_head}, "but got 'class_haed'; did you mean 'class_head'?"),
    (lambda model: {"visual.conv1.weight": model.state_dict()["visual.conv1.weight"]}, HEAD),
    (lambda model: {**model.state_dict(), "class_head": model.class_head[1:]}, HEAD),
    (lambda model: {**model.state_dict(), "class_head": model.class_head / 0}, "must be finite"),
]


@pytest.mark.parametrize(("returned", "said"), RETURNED)
def test_what_is_no_finite_state_of_the_model_is_told(train, tmp_path, returned, said):
    def returns(values, context):
        return returned(context.model)

    with pytest.raises(DivergedError if "finite" in said else RecipeError) as caught:
        train(returns)
    assert said in str(caught.value)
    assert len(caught.value.problems) <= 6
    assert not list((tmp_path / "out").glob("*/fine_tuned.safetensors"))


def test_the_prefixes_of_wrapped_models_are_taken_off():
    start = {"visual.a": torch.ones(2), "class_head": torch.ones(3)}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        found = checked_state({f"{prefix}{name}": 2 * tensor for name, tensor in start.items()}, start)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {"visual.a": [2] * 2, "class_head": [2] * 3}


def test_a_function_that_is_told_to_stop_has_not_finished_whatever_it_returns(train):
    def stubborn(values, context):
        assert context.should_stop()
        return context.model.state_dict()

    with pytest.raises(StoppedRun, match="stopped on request after epoch 0 of 1"):
        train(stubborn, context=RunContext(should_stop=lambda: True))


def test_the_example_goes_on_from_what_it_has_kept(train, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    function, reported = load_function("own_trainer:fine_tune", str(EXAMPLES)), []

    def report(row):
        reported.append(row["epoch"])
        if reported == [1, 2]:  # the second epoch is not kept yet
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(function, "train.epochs=4", "evaluate.every_epochs=0", context=RunContext(report=report))
    train(function, "train.epochs=4", "evaluate.every_epochs=0", context=RunContext(report=report), attempt=2)
    assert reported == [1, 2, 2, 3, 4]


def test_a_function_that_is_given_is_called_itself_and_a_baseline_may_have_the_built_in_loop(ready, tmp_path):
    calls = []

    def mine(values, context):
        calls.append(values["learning_rate"])
        return own_functions.few_steps(values, context)

    folder, _ = ready
    base = load_recipe(folder / "recipe.yaml", [DEBUG, *ONE_EPOCH, f"data.cache_dir={folder / 'cache'}"])
    recipe, runner = with_function(base, mine)
    assert recipe.train.function == f"{__name__}:{mine.__qualname__}"
    runner.train(recipe, tmp_path / "own", folder / "prepared", RunContext(), 1)
    built_in = apply(recipe, {"function": None, "kl_weight": 0.0})
    result = runner.train(built_in, tmp_path / "built-in", folder / "prepared", RunContext(), 1)
    assert calls == [recipe.train.learning_rate]
    assert result["train"]["function"] is None


def test_a_function_of_a_module_travels_by_its_name_and_finds_its_folder_there(ready, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "far_away.py").write_text("def fit(values, context):\n    raise LookupError(__file__)\n")
    fit = load_function("far_away:fit", str(tmp_path))
    recipe, runner = with_function(recipe_for(ready[0], "few_steps", *ONE_EPOCH), fit)
    assert (recipe.train.function, recipe.train.function_dir) == ("far_away:fit", str(tmp_path))
    packed = cloudpickle.dumps(runner)
    sys.path.remove(str(tmp_path))
    del sys.modules["far_away"]  # as in the process of a worker
    with pytest.raises(LookupError, match=str(tmp_path / "far_away.py")):
        pickle.loads(packed).train(recipe, tmp_path / "out", ready[0] / "prepared", RunContext(), 1)


def test_a_function_that_cannot_be_sent_to_workers_is_refused_unless_nothing_is_sent():
    lock = threading.Lock()
    with pytest.raises(UsageError, match="must be a function that can be sent to workers, but got TypeError"):
        with_function(load_recipe(EXAMPLES / "own_trainer.yaml"), lambda values, context: lock)
    with_function(load_recipe(EXAMPLES / "own_trainer.yaml", [DEBUG]), lambda values, context: lock)


def test_a_function_from_python_is_refused_with_a_linear_probe_in_one_message(tmp_path):
    recipe = load_recipe(EXAMPLES / "own_trainer.yaml", ["train.function=null", "train.probe_epochs=2"])
    with pytest.raises(RecipeError, match=r"train\.probe_epochs: must be left out with function") as raised:
        carft_ray.search(recipe, tmp_path / "study", train=lambda values, context: {})
    assert len(raised.value.problems) == 1


OUTCOMES = [
    ("raises", "error", "ZeroDivisionError: of mine"),
    ("exits", "error", "RuntimeError: train.function called sys.exit(3)"),
    ("diverges", "diverged", "epoch 2 of 3: the loss must stay finite, but got train/loss nan"),
]


@pytest.mark.parametrize(("name", "outcome", "reason"), OUTCOMES)
def test_what_a_function_raises_is_a_verdict_with_its_traceback(tmp_path, name, outcome, reason):
    said = []
    with pytest.raises(CarftError, match=re.escape(reason)):
        train_once(Plan(recipe_for(tmp_path, name), tmp_path / "run", on_event=lambda event: said.append(event.line())))
    warned = [text for text in said if text == f"train gets another attempt: {reason}"]
    assert len(warned) == (outcome == "error")
    [log] = (tmp_path / "run").glob("trials/*/log.txt")
    assert f": {outcome}: {reason}" in log.read_text()
    assert "own_functions.py" in log.read_text()


@pytest.mark.slow
def test_the_pruner_cuts_a_function_that_asks(tmp_path):
    notes = []
    pruner = "search.pruner={name: percentile, percentile: 1.0, startup_trials: 1, first: 0.2}"
    space = "search.space={learning_rate: {low: 0.0001, high: 0.1, log: true}}"
    enqueue = "search.enqueue=[{learning_rate: 0.1}, {learning_rate: 0.0001}]"
    recipe = recipe_for(tmp_path, "waiting_steps", DEBUG, "search.trials=2", "train.epochs=5", pruner, space, enqueue)
    result = run_search(
        Plan(recipe, tmp_path / "study", on_event=lambda event: notes.append(getattr(event, "text", "")))
    )
    assert [row.outcome for row in result.study.trials] == ["complete", "pruned"], result.study.trials
    told = "train.function replaces the built-in loop: carft-ray promises no exact resume, "
    assert len([text for text in notes if told in text]) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study with test sets, whose function lies in the folder of its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(HERE / "own_functions.py", folder / "mine.py")
    function = ["train.function=mine:few_steps", f"train.function_dir={folder}"]
    short_sealed.make(folder, short_training, *function, "train.learning_rate=0.1", trials=1)
    return folder


# each command that opens what a stranger may have sent, as it would be given without ``--trust``
THAT_TRAIN = {
    **{name: ["recipe.yaml", "--study", "other", *STRANGE] for name in ("search", "submit")},
    "train": ["study/best.yaml", "--out", "run"],
    "confirm": ["study"],
    "resume": ["study", "--trials", "+1"],
    "reproduce": ["study", "--out", "again"],
}
WITHOUT_TRUST = {
    **THAT_TRAIN,
    **{name: ["study"] for name in ("stop", "status", "ls", "logs", "soup", "test", "report", "rescore")},
    **{name: ["study/best.yaml"] for name in ("validate", "doctor")},
    "plan": ["recipe.yaml", *STRANGE],
    "evaluate": ["TRAINING"],
    "export": ["study", "--to", "sent"],
    "predict": ["sent", "images", "--to", "answers.csv"],
    "compare": ["study", "study:zero_shot"],
}
# they read the images and the machine of who asks; the dashboard serves the journal, copies copy: none opens a recipe
OF_NOBODY_ELSE = {"pull", "init", "data", "sandbox", "dashboard", "schema"}


def test_no_command_that_trains_takes_a_function_without_trust(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    for command, words in THAT_TRAIN.items():
        assert call([command, *words]) == 2, command
        said = capsys.readouterr().err
        assert f"names code that a training would run: mine:few_steps in {finished}" in said
        assert "If you trust it, add --trust." in said
    assert call(["plan", "recipe.yaml", *STRANGE]) == 2
    assert "plan measures only the built-in loop" in capsys.readouterr().err
    assert call(["search", "recipe.yaml", "--set", "train.function=mine:nothing_here", "--study", "x", "--trust"]) == 3
    assert "mine.py, but got nothing_here" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_no_command_imports_a_strangers_code_without_trust(finished, tmp_path, monkeypatch, capsys):
    from typer.main import get_command

    from carft_ray.cli import app

    assert set(get_command(app).commands) == {*WITHOUT_TRUST, *OF_NOBODY_ELSE}
    monkeypatch.setattr("carft_ray.results.export.export.farthest_logit", lambda *given: 0.0)  # seconds each
    folder = tmp_path / "sent"
    shutil.copytree(finished, folder)
    for path in folder.rglob("*"):  # the study names the folder where it was made
        if path.suffix in (".json", ".jsonl", ".yaml", ".log"):
            path.write_bytes(path.read_bytes().replace(str(finished).encode(), str(folder).encode()))
    forging.record(folder / "study")
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n{(folder / 'mine.py').read_text()}")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.chdir(folder)
    [training] = folder.glob("study/trials/*")
    for command, words in WITHOUT_TRUST.items():
        code = call([command, *(str(training) if word == "TRAINING" else word for word in words)])
        assert not ran.exists(), command
        said = capsys.readouterr()
        assert code in (0, 2), (command, said.err)
    for action, given in (
        (carft_ray.resume, {"trials": "+1"}),
        (carft_ray.confirm, {}),
        (carft_ray.report, {}),
        (carft_ray.open_study, {}),
        (carft_ray.export, {"to": tmp_path / "exported"}),
    ):
        with contextlib.suppress(UsageError):
            action(folder / "study", **given)
        assert not ran.exists(), action.__name__
    with pytest.raises(UsageError, match="names code that a training would run"):
        carft_ray.train(carft_ray.load_recipe(folder / "study" / "best.yaml"), tmp_path / "run")
    assert not ran.exists()


@pytest.mark.slow
def test_with_trust_it_is_resumed_confirmed_tested_exported_and_trained_again(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    monkeypatch.setattr("carft_ray.results.export.export.farthest_logit", lambda *given: 0.0)  # seconds
    debug = ["--executor", "debug", "--trust"]
    assert call(["resume", "study", "--trials", "2", *debug]) == 0
    assert "carft-ray confirm study --trust" in capsys.readouterr().err
    assert call(["confirm", "study", "--top", "1", "--seeds", "2", *debug]) == 0
    assert call(["test", "study"]) == 0
    assert call(["export", "study", "--to", "exported", "--format", "huggingface"]) == 0
    assert not (finished / "exported" / "open_clip_config.json").exists()
    card = (finished / "exported" / "README.md").read_text()
    assert "function mine:few_steps" in card
    assert str(finished) not in card
    assert "--trust" in (finished / "study" / "best.yaml").read_text().splitlines()[0]
    assert call(["train", "study/best.yaml", "--out", "run", "--trust"]) == 0
    assert "epoch 3: loss " in capsys.readouterr().err
    assert call(["resume", "study", "--set", "train.function=mine:frozen", "--trust", "--executor", "debug"]) == 3
    assert 'train.function: must be "mine:few_steps" as in' in capsys.readouterr().err
