"""Studies in wrong hands: what the command line says, and that nothing is lost or left behind. No Ray runs."""

import contextlib
import json
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import crash_host
import pytest
import short_training
from logs import HOLD

from carft_ray.errors import ClusterError, DataError, HoldOutError, RecipeError
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.store.result import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import trials

OTHER_SPACE = "search.space.learning_rate={low: 1e-3, high: 1e-1, log: true}"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a recipe of images that are there, and the study ``study`` of it: 3 of 4 trials finished."""
    folder = tmp_path_factory.mktemp("wrong") / "here"
    short_training.make(folder)
    recipe = load_recipe(folder / "recipe.yaml", ["search.trials=4"])
    with open_study(folder / "study", recipe) as study:
        (study.study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
        recover_running(study)
        study.add_zero_shot({"objective": 0.25})
        for _ in range(len(recipe.search.baselines) + 3):
            spec = study.next()
            content = {"objective": 0.5, "alpha": 0.5, "metrics": {}, "elapsed_s": 1.0}
            write_result(spec.place(study.study_dir), content)
            study.settle(spec)
    return folder


@pytest.fixture
def here(original, monkeypatch):
    """The folder, in its own place, since a study holds absolute paths; as it was, after the test."""
    monkeypatch.chdir(original)
    copy = original.with_name("copy")
    shutil.copytree(original, copy)
    yield original
    shutil.rmtree(original)
    copy.rename(original)


@pytest.fixture
def refused(here, capsys):
    """Runs a command line that must end with a code and one message, and change nothing; returns the message."""
    capsys.readouterr()

    def call(code, *words):
        before = everything(here)
        found = crash_host.call(words)
        captured = capsys.readouterr()
        assert (found, captured.out) == (code, ""), captured.err
        told = captured.err.removeprefix("training with 2 Ray Train workers\n")
        assert told.startswith("error: ")
        assert told.count("error: ") == 1
        assert "Traceback" not in told
        assert without_holders(before, everything(here)) == without_holders(before, before)
        return told

    return call


def everything(folder):
    """All that is in a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def without_holders(before, found):
    """All but the commits that say who has held a study since."""
    new = [name for name in found.keys() - before.keys() if name.startswith("study/log/")]
    for name in new:
        commit = json.loads(found[name].split(b"\n")[1])
        assert commit["operations"] == []
        assert {record["kind"] for record in commit["records"]} <= {"owner", "released"}
    return {name: found[name] for name in found if name not in new}


@contextlib.contextmanager
def another_search(study_dir):
    """Another process that holds a study within the block."""
    code = f"{HOLD}import sys\nwith holding({str(study_dir)!r}):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def closed_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


SEARCH = ("search", "recipe.yaml", "--set", "search.trials=4", "--study", "study")
RESUME = ("resume", "study")


@pytest.mark.slow
def test_two_searches_on_one_study(refused, here):
    with another_search(here / "study") as other:
        for words in (SEARCH, RESUME):
            told = refused(5, *words)
            assert told.startswith(f"error: {here / 'study'}: is in use: two searches on one study would spoil it: ")
            assert f"process {other.pid} on " in told
            assert told.splitlines()[1].startswith("    Wait until the other search ends")


@pytest.mark.slow
def test_a_study_of_another_recipe_names_all_keys_that_differ(refused, here):
    told = refused(3, *SEARCH, "--set", "train.epochs=9", "--set", OTHER_SPACE)
    assert told.startswith("error: 2 problems\n")
    for place, was, given in (("train.epochs", 3, 9), ("search.space.learning_rate.high", 0.01, 0.1)):
        assert f"{place}: must be {was} as in {here / 'study'}, but got {given}" in told
    assert told.splitlines()[-1].strip() == f"Continue with {here / 'study' / 'resolved.yaml'}, or give another folder."


@pytest.mark.slow
def test_an_address_where_nothing_answers_is_told_and_leaves_no_folder(refused):
    address = f"127.0.0.1:{closed_port()}"
    training = ("train", "recipe.yaml", "--out", "new", "--num-workers", "2", "--executor", "ray-train")
    for words in ((*SEARCH[:-1], "new"), RESUME, training):
        told = refused(5, *words, "--address", address)
        assert f"no Ray answers at {address}: " in told
    assert "Start one with 'ray start --head', or leave the address out to use this machine." in told


@pytest.mark.parametrize(
    ("command", "option", "place"),
    [
        ("search", "--study", "recipe.yaml/study"),
        ("search", "--study", "/proc/study"),
        ("train", "--out", "recipe.yaml/deeper/out"),
        ("train", "--out", "/sys/out"),
    ],
)
def test_a_place_where_no_folder_can_be_made(refused, here, command, option, place):
    told = refused(5, command, "recipe.yaml", option, place)
    assert told.startswith(f"error: {here / place}")
    assert "must be writable, but got " in told
    assert told.splitlines()[-1].startswith("    ")


def test_a_full_disk_at_the_first_write_leaves_no_folder(refused):
    """Files that may not grow stand for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        told = refused(5, *SEARCH[:-1], "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "must be writable, but got File too large" in told
    assert "run the same command again" in told




@pytest.mark.parametrize("words", [SEARCH, RESUME, ("status", "study"), ("export", "study", "--to", "new")])
def test_a_log_with_garbage_in_its_middle(refused, here, words):
    commit = here / "study" / "log" / "00000005"
    whole = commit.read_bytes()
    for content in (b"\0\xff" * 99 + b"\n", whole[:200] + b'{"op_code": 5, "wor' + whole[200:]):
        commit.write_bytes(content)
        told = refused(5, *words)
        assert told.startswith(f"error: {commit}: must be a whole commit, but got a damaged one\n")
        assert told.splitlines()[-1] == "    Restore log/ from a copy of the study."
    commit.write_bytes(whole)
    assert len(trials(here / "study")) == 3


@pytest.mark.parametrize("names", [("owner", "thesis.tex"), ("log",), ("study.journal",), (".git", "data"), ()])
def test_what_is_no_study_is_refused_and_kept(refused, here, names):
    mine = here / "mine"
    if names:
        mine.mkdir()
    paths = [mine / name for name in names] or [mine]
    for path in paths:
        path.write_text("precious")
    told = refused(2, *SEARCH[:-1], "mine")
    rule = f"must be a study or empty, but got {', '.join(names)}\n" if names else "must be a folder, but got a file\n"
    assert told.startswith(f"error: {mine}: {rule}    ")
    assert {path.read_text() for path in paths} == {"precious"}


@pytest.mark.parametrize("words", [SEARCH, RESUME], ids=lambda words: words[0])
def test_a_manifest_that_is_damaged_or_of_another_version(refused, here, words):
    manifest = here / "study" / "manifest.json"
    newer = json.dumps({**json.loads(manifest.read_text()), "format_version": 99})
    for content in ("", "[]", '{"format_version": 1, "recipe": {}}', "\0", newer):
        manifest.write_text(content)
        told = refused(5, *words)
        assert told.startswith(f"error: {manifest}: must ")
    assert "must have format_version " in told


# the folder of a study that did not begin


def test_a_new_study_that_could_not_begin_leaves_no_folder(here):
    recipe = load_recipe(here / "recipe.yaml")
    for error in (RecipeError, DataError, HoldOutError, ClusterError):
        with pytest.raises(error), open_study(here / "new", recipe):
            raise error("unfit")
        assert not (here / "new").exists()


def prepared_and_then(study_dir, error):
    (study_dir / "prepared").mkdir()
    return error


def test_what_is_there_stays_when_ray_goes_or_cannot_be_had(here):
    recipe = load_recipe(here / "recipe.yaml")
    with pytest.raises(ClusterError), open_study(here / "prepared", recipe):
        raise prepared_and_then(here / "prepared", ClusterError("its head is gone"))
    assert (here / "prepared" / "prepared").exists()
    with open_study(here / "new", recipe):
        pass
    with pytest.raises(ClusterError), open_study(here / "new", recipe):
        raise ClusterError("no Ray answers")
    assert (here / "new" / "log").exists()
