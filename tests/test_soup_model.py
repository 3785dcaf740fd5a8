"""A soup that is the model of a study: one file through all commands, studies that lie, and kills."""

import contextlib
import hashlib
import json
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import crash_host
import logs
import pytest
import short_sealed
import short_training
from bucket_server import bucket_server, copied
from crash_host import call, printed
from debug_search import half_written
from safetensors.torch import load_file, save_file
from unseen import Here, plan_of, unseen

import carft_ray
from carft_ray.launch.workers.worker import RUNNER, run_worker
from carft_ray.layout import RESULT, WEIGHTS
from carft_ray.study.opening import open_study
from carft_ray.study.place import pull
from carft_ray.study.snapshot import snapshot
from carft_ray.study.soups import enter
from carft_ray.training.run_context import RunContext

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")]

RESUME = ["resume", "study", "--trust", "--trust-paths"]
HERE = Path(__file__).parent
SETTINGS = [
    "search.trials=2",
    "search.space={learning_rate: {choices: [0.001, 0.01]}}",
    "search.sampler.name=grid",
    "search.baselines={}",
    "search.soups=[uniform]",
    "search.alpha.grid=[0, 1]",
    "train.epochs=200",
    "evaluate.every_epochs=0",
    "resources.executor=debug",
    "train.function=own_functions:opposites",
    f"train.function_dir={HERE}",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images and a finished search, whose model is a soup."""
    folder = tmp_path_factory.mktemp("soup_model")
    recipe = short_sealed.write(folder, short_training)
    given = [each for each in short_sealed.settings(folder, 2) if "_test" in each or "cache" in each]
    words = [word for each in (*given, *SETTINGS) for word in ("--set", each)]
    assert call(["search", str(recipe), "--study", str(folder / "study"), *words, "--trust"]) == 0
    return folder


def soup_of(study_dir):
    """The soup of a study, and the SHA-256 of its weights."""
    [row] = snapshot(study_dir).soups
    return row, hashlib.sha256((row.place(study_dir) / WEIGHTS).read_bytes()).hexdigest()


def test_one_file_is_chosen_exported_in_three_formats_tested_and_made_again(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "study", tmp_path / "study")
    row, sha256 = soup_of(tmp_path / "study")
    assert row.objective > max(each.objective for each in snapshot(tmp_path / "study").trials)
    forms, answers = "open_clip,huggingface,onnx", []
    first = printed(capsys, "export", "study", "--to", "first", "--format", forms, "--trust-paths")
    for form in forms.split(","):
        printed(capsys, "export", "study", "--to", form, "--format", form, "--trust-paths")
        found = carft_ray.predict(form, made / "images" / "photo_val", progress=False)
        answers.append([(each["file"], each["class"]) for each in found.rows.to_pylist()])
    assert answers[0] == answers[1] == answers[2]
    tested = printed(capsys, "test", "study", "--trust-paths")["rows"][0]
    last = printed(capsys, "export", "study", "--to", "last", "--trust-paths")
    assert (first["standing"], last["standing"]) == ("searched", "tested")
    assert first["sha256"] == tested["sha256"] == last["sha256"] == sha256
    assert first["trial"] == last["trial"] == f"soups/{row.name}"
    again = printed(capsys, "reproduce", "study", f"soups/{row.name}", "--out", "again", "--trust", "--trust-paths")
    assert (again["same"], again["weights_compared"], again["differences"]) == (True, True, [])
    [same] = Path("again").glob(f"attempt-*/{WEIGHTS}")
    assert hashlib.sha256(same.read_bytes()).hexdigest() == sha256


def queued(commits):
    """Returns the soups that commits queue, each with the number of its commit."""
    attributes = [
        (index, one.get("user_attrs", {})) for index, each in enumerate(commits) for one in each["operations"]
    ]
    return [(index, each["soup"]) for index, each in attributes if "soup" in each]


@pytest.fixture
def waiting(made, tmp_path, monkeypatch):
    """A copy of the study in which the soup has been queued and nothing else, for a stranger to change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "study", tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "soups")
    found = logs.commits(tmp_path / "study")
    [last] = [
        index
        for index, each in enumerate(found)
        if any("soup" in one.get("user_attrs", {}) for one in each["operations"])
    ]
    logs.rewrite(tmp_path / "study", found[: last + 1])
    return tmp_path / "study"


def change_members(study_dir, changed):
    """Changes the members of the soup in the study's log."""
    found = logs.commits(study_dir)
    [soup] = [
        one["user_attrs"]["soup"] for each in found for one in each["operations"] if "soup" in one.get("user_attrs", {})
    ]
    changed(soup["members"])
    logs.rewrite(study_dir, found)


def another_shape(study_dir):
    """Has other weights for the second member, and all that the study says of them agree."""
    row = snapshot(study_dir).trials[1]
    weights, result = (row.place(study_dir) / name for name in (WEIGHTS, RESULT))
    state, old = load_file(weights), hashlib.sha256(weights.read_bytes()).hexdigest()
    save_file({**state, "class_head": state["class_head"][:, :1].clone()}, weights)
    new = hashlib.sha256(weights.read_bytes()).hexdigest()
    told = json.loads(result.read_text())
    told["files"][WEIGHTS] = {"bytes": weights.stat().st_size, "sha256": new}
    result.write_text(json.dumps(told))
    logs.replace(study_dir, old, new)
    logs.replace(study_dir, row.digest, hashlib.sha256(result.read_bytes()).hexdigest())


LIES = {
    "outside": (
        lambda members: members[1].update(name="../../elsewhere/attempt-1"),
        "a member must be a complete training",
    ),
    "a soup": (lambda members: members[1].update(name="soups/uniform-31e972/attempt-1"), "a member must be a complete"),
    "twice": (lambda members: members.__setitem__(1, members[0]), "each member must be there once"),
    "others": (lambda members: members[1].update(sha256="0" * 64), "must have the weights that the study has recorded"),
    "none": (lambda members: members.clear(), "members"),
    "no number": (lambda members: members[1].update(objective="much"), "objective"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_study_that_lies_about_the_members_of_a_soup_gets_one_message(waiting, capsys, name):
    lie, said = LIES[name]
    change_members(waiting, lie)
    assert call(RESUME) == 5
    err = capsys.readouterr().err
    assert said in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert not (waiting / "soups").exists()


def test_a_member_of_another_shape_gets_one_message(waiting, capsys):
    another_shape(waiting)
    assert call(RESUME) != 0
    err = capsys.readouterr().err
    assert "must have tensors of the same names, shapes and types, but got others of class_head" in err
    assert "Traceback" not in err


def test_a_soup_whose_member_is_gone_is_named_and_the_search_ends(waiting, capsys):
    (snapshot(waiting).trials[1].place(waiting) / WEIGHTS).unlink()
    assert call(RESUME) == 0
    err = capsys.readouterr().err
    [row] = snapshot(waiting).soups
    assert row.outcome == "error"
    assert f"Soup soups/{row.name} was not made: the weights of t0001" in err


MOMENTS = {"link": ("before", "after"), "append": ("torn",), "replace": ("after",), "request": ("before", "after")}


@pytest.mark.whole  # some 60 kills, of which each day has a tenth
@pytest.mark.timeout(3600)  # `make crash-points` kills around each write, on a slow and busy machine too
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_soup_killed_around_any_write_is_made_by_the_same_command(made, tmp_path, monkeypatch, where):
    """While it is made, between its files, its result and the log, and while they are uploaded."""
    command = ["soup", "study", "--member", "0", "--member", "1", "--kind", "model_stock", "--trust-paths"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(bucket_server(monkeypatch)) if where == "bucket" else None
        run = stack.enter_context(crash_host.started(tmp_path))

        def jobs(named):
            for name, commands in named.items():
                shutil.copytree(made / "study", tmp_path / name / "study")
                if server is not None:
                    copied(tmp_path / name / "study", server.address(name))
                    shutil.rmtree(tmp_path / name / "study")
                for number, each in enumerate(commands):  # another machine goes on
                    each["argv"] = [server.address(name) if server and word == "study" else word for word in command]
                    each["cache"] = f"cache-{number}"
            found = run([{"name": name, "commands": commands} for name, commands in named.items()])
            for name in found if server else ():
                pull(server.address(name), tmp_path / name / "study")
            return found

        calm, answers = jobs({"calm": [{"count_to": str(tmp_path / "kinds.json")}]})["calm"]
        assert answers[-1]["code"] == 0, answers[-1]["log"]
        named = {
            f"kill-{number:03d}-{kind}-{moment}": [{"kill": (number, moment, kind)}, {}]
            for kind, count in Counter(json.loads((tmp_path / "kinds.json").read_text())).items()
            for number in range(1, count + 1)
            for moment in MOMENTS.get(kind, ())
            if (kind == "request") == (server is not None)
        }
        found = jobs(dict(crash_host.share([*named.items()])))
    for name, (place, answers) in found.items():
        assert [each["code"] for each in answers] == [-signal.SIGKILL, 0], (name, answers)
        assert "Traceback" not in answers[-1]["log"], name
        assert soups_in(place / "study") == soups_in(calm / "study"), name
        assert half_written(place / "study") == [], name
    print(f"kills around {len(found)} of {len(named)} moments; lost 0")


def soups_in(study_dir):
    """What a study has of its soups, without times and attempts."""
    rows = snapshot(study_dir).soups
    weights = [hashlib.sha256((row.place(study_dir) / WEIGHTS).read_bytes()).hexdigest() for row in rows]
    return [(row.name, row.outcome, row.objective, row.alpha) for row in rows], weights


def test_a_soup_made_on_a_node_that_does_not_see_the_study_is_the_same_file(made, waiting):
    recipe = snapshot(waiting).recipe
    with open_study(waiting, recipe) as study:
        enter(study, {})
        spec = study.next()
        away = Here(study.study_dir)
        runtime = replace(plan_of(study, away), runner=RUNNER)
        assert run_worker(unseen(runtime), spec, RunContext()) == "go"
        assert study.settle(spec).outcome == "complete"
    brought = [given[0] for method, *given in away.calls if method == "read"]
    assert {name.split("/")[1] for name in brought if name.endswith(WEIGHTS)} == {
        row.name for row in snapshot(waiting).trials
    }
    assert soup_of(waiting)[1] == soup_of(made / "study")[1]
