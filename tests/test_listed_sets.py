"""Trees are listed once a command, and not at all by trials: counted in every process of real commands."""

import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import short_training
from PIL import Image
from short_training import write_image
from test_sources_search import SETS, here, sets  # noqa: F401

from carft_ray.data.listed_sets import open_sets, write_sets
from carft_ray.data.readers import list_set, listing_once
from carft_ray.errors import DataError
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.sets import FolderSet

# what every process notes: folders listed and files opened below a root
AUDIT = """
import os, sys
root, log = os.environ["AUDITED"], os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(event, args):
    if event in ("os.scandir", "os.listdir", "open") and isinstance(args[0], (str, bytes)):
        path = os.fsdecode(args[0])
        if path.startswith(root):
            os.write(log, f"{event} {path}\\n".encode())

sys.addaudithook(note)
"""
MANY = ["--set", "search.baselines={}", "--set", "train.epochs=1", "--set", "resources.cpus_per_worker=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listed")
    short_training.make(folder)
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(AUDIT)
    return folder


def run(folder, *words):
    """Runs a command; returns how often each folder of images was listed, and the images that were opened."""
    log = folder / "audit.log"
    log.unlink(missing_ok=True)
    environ = {
        **os.environ,
        "AUDITED": str(folder / "images"),
        "AUDIT_LOG": str(log),
        "PYTHONPATH": os.pathsep.join([str(folder / "hook"), str(Path(__file__).parents[1])]),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "carft_ray.cli", *map(str, words)]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    listed = Counter(path for event, path in lines if event != "open")
    return listed, [path for event, path in lines if event == "open"]


@pytest.mark.whole
@pytest.mark.slow
def test_a_command_lists_each_folder_once_and_a_second_one_opens_no_image(made):
    recipe = made / "recipe.yaml"
    listed, opened = run(made, "doctor", recipe)
    assert listed
    assert set(listed.values()) == {1}
    assert opened
    listed, opened = run(made, "doctor", recipe)
    assert set(listed.values()) == {1}
    assert not opened
    path = next((made / "images" / "photo").glob("*/*.png"))
    before = path.stat()
    Image.new("RGB", (20, 16)).save(path)  # in place
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert str(path) in run(made, "doctor", recipe)[1]


@pytest.mark.whole
@pytest.mark.slow
def test_trials_list_nothing(made):
    study = made / "study"
    listed, _ = run(made, "search", made / "recipe.yaml", "--study", study, "--set", "search.trials=2", *MANY)
    assert listed
    assert set(listed.values()) == {1}
    assert len(list((study / "trials").glob("*/*/result.json"))) == 2


def test_sets_that_share_a_tree_share_its_listing_while_that_is_asked_for(tmp_path):
    short_training.make(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.yaml", ["data.train.part=[0, 0.5]"])
    spec = recipe.data.train
    with listing_once():
        first = list_set(spec, "one")
        other = list_set(spec.model_copy(update={"part": (0.5, 1.0)}), "other")
        assert other is first
    next((tmp_path / "images" / "photo").glob("*/*.png")).unlink()
    assert len(list_set(spec, "one")) == len(first) - 1


def test_listings_of_threads_that_overlap_end_with_their_own_thread(tmp_path):
    write_image(tmp_path / "images" / "star" / "0.png", 0, 0)
    spec = FolderSet(source="folder", path=str(tmp_path / "images"))
    began, done = threading.Event(), threading.Event()

    def other():
        with listing_once():
            list_set(spec, "other")
            began.set()
            assert done.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with listing_once():
            ended = pool.submit(other)
            assert began.wait(10)
        done.set()
        ended.result()
    write_image(tmp_path / "images" / "star" / "1.png", 0, 1)
    assert len(list_set(spec, "now")) == 2


@pytest.mark.parametrize("kind", SETS)
def test_a_set_that_was_listed_before_is_the_same_set(here, tmp_path, monkeypatch, kind):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = load_recipe(here / "folder.yaml", sets(*[kind] * 3))
    write_sets(recipe, tmp_path / "prepared")
    listed, opened = open_sets(recipe, tmp_path / "prepared"), open_sets(recipe)
    assert list(listed) == list(opened)
    for name, source in opened.items():
        mapped = listed[name]
        assert mapped.hashes() is not None
        assert mapped.labels.tolist() == source.labels.tolist()
        assert mapped.sample_ids.tolist() == source.sample_ids.tolist()
        for what in ("name", "class_names", "fingerprint", "groups", "home", "skipped"):
            assert getattr(mapped, what) == getattr(source, what), what
        assert [mapped.place(i) for i in range(len(mapped))] == [source.place(i) for i in range(len(source))]
        assert mapped.content(3) == source.content(3)
        assert (mapped.pixels(3) == source.pixels(3)).all()
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"pack": "always"})})
    assert open_sets(other, tmp_path / "prepared")["train"].hashes() is None  # of another recipe


def test_a_container_that_changes_in_use_is_told(here, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = load_recipe(here / "folder.yaml", sets(*["bytes"] * 3))
    write_sets(recipe, tmp_path / "prepared")
    mapped, directly = open_sets(recipe, tmp_path / "prepared")["train"], open_sets(recipe)["train"]
    assert mapped.fingerprint == directly.fingerprint
    for path in {Path(mapped.listing.root, path) for path in mapped.listing.table["path"].to_pylist()}:
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    assert directly.listing.stamps == mapped.listing.stamps
    for source in (mapped, directly):
        with pytest.raises(DataError, match="must not change while a command uses it"):
            source.content(0)
