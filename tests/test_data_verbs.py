"""The verbs of the cache of images on the command line: data add, data ls, data clean."""

import json
import os
import re

import pyarrow as pa
import pytest
import short_training
from cached_pictures import decoded

from carft_ray.data import cache
from carft_ray.words import counted


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))


@pytest.mark.slow
def test_add_builds_train_and_validation_and_never_a_test_set_and_ls_shows_them(run, tmp_path):
    short_training.make(tmp_path)
    code, out, err = run("data", "ls")
    assert (code, out) == (0, "")
    assert "0 entries, 0 kB." in err
    assert "carft-ray data add" in err
    tests = ["--set", "data.id_test={source: folder, path: images, domains: [secret]}"]
    (tmp_path / "images" / "secret" / "star").mkdir(parents=True)  # no class list of ours: reading it would be an error
    code, out, err = run("data", "add", "recipe.yaml", "--set", "data.pack=always", *tests)
    assert (code, out) == (0, "")
    assert "id_val: 15 images, decoded, built\nsketch: 10 images, decoded, built" in err
    assert re.search(r"train: 20 images, packed, (built|there)", err)
    assert "carft-ray search recipe.yaml --set data.pack=always" in err
    code, out, err = run("data", "add", "recipe.yaml", "--json")
    answer = json.loads(out)
    kinds = [("train", "files", False), ("id_val", "decoded", False), ("sketch", "decoded", False)]
    assert [(each["name"], each["kind"], each["built"]) for each in answer["sets"]] == kinds
    assert answer["cache"] == str(tmp_path / "own" / "carft-ray")
    code, out, err = run("data", "ls")
    assert code == 0
    assert re.search(r"id_val +decoded +folder +15 +16 x 16 +\S+ kB", out)
    assert re.search(r"train +packed +folder +20 ", out)
    assert f"{tmp_path / 'own' / 'carft-ray'}: 3 entries, " in err
    listed = json.loads(run("data", "ls", "--json")[1])
    assert sorted(entry["name"] for entry in listed["entries"]) == ["id_val", "sketch", "train"]
    assert listed["num_bytes"] == answer["num_bytes"] == sum(entry["num_bytes"] for entry in listed["entries"])


ODD = [{"key": "x", "last_used": 1, "num_bytes": 1, "in_use": True}, {"num_images": "x", "created": "x"}, [], 3]
ODD += [
    {"name": 3, "kind": None, "source": [], "num_images": 1.5, "created": 1e300},
    {"num_images": -1, "created": True},
]


@pytest.mark.parametrize("about", [*map(json.dumps, ODD), '{"created": NaN}', "[" * 100_000])
def test_an_entry_of_a_strangers_cache_says_only_what_can_be(run, tmp_path, about):
    path = tmp_path / f"{'0' * 32}.arrow"
    about = about if about.startswith("[[") else about.replace("{", '{"image_size": "8 x 8", "created": 1e9, ', 1)
    with pa.ipc.new_file(str(path), pa.schema([], metadata={"about": about, "x": '"created": '})):
        pass
    code, out, _ = run("data", "ls", "--cache", tmp_path, "--json")
    assert code == 0
    (entry,) = json.loads(out)["entries"]
    assert (entry["key"], entry["num_bytes"]) == ("0" * 32, path.stat().st_size)
    assert (entry["kind"], entry["name"], entry["source"], entry["num_images"]) == ("unknown", "", "", 0)
    assert run("data", "ls", "--cache", tmp_path)[0] == 0


NOTE = f"records-{'0' * 32}.arrow"


@pytest.fixture
def filled(tmp_path):
    """Three sets, last used 40, 20 and 0 days ago, with hashes, what a killed build left, and other files."""
    folder = tmp_path / "full"
    for number, days in ((0, 40), (1, 20), (2, 0)):
        decoded(folder, number)
        path = folder / f"{cache.list_entries(folder)[0].key}.arrow"
        os.utime(path, (path.stat().st_mtime - 86400 * days,) * 2)
    (folder / f".{'0' * 32}.arrow.9-host.tmp").touch()
    (folder / NOTE).write_bytes(b"hashes")
    (folder / "studies").mkdir()
    (folder / "notes.txt").write_text("mine")
    return folder


CLEANED = {"--older-than 30d": 2, "--older-than 480h": 1, "--to-gb 0.000009": 2, "--to-gb 0": 0, "--all": 0}


@pytest.mark.parametrize(("words", "kept"), CLEANED.items())
def test_clean_removes_what_was_not_used_for_longest(run, filled, words, kept):
    before = [entry.key for entry in cache.list_entries(filled)]  # the last used first
    code, out, _ = run("data", "clean", "--cache", filled, *words.split(), "--yes", "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["num_kept"], answer["num_dead_builds"], answer["num_in_use"]) == (kept, 1, 0)
    assert [entry.key for entry in cache.list_entries(filled)] == before[:kept]
    assert {*answer["removed"]} == {*before[kept:]}
    assert [name for name in os.listdir(filled) if name.startswith(".")] == []
    assert (filled / "studies").is_dir()
    assert (filled / "notes.txt").exists()
    assert (filled / NOTE).exists() is (words != "--all")


@pytest.mark.parametrize(("answer", "kept"), [(True, 1), (False, 3)])
def test_clean_asks_first_and_leaves_what_is_in_use(run, filled, monkeypatch, answer, kept):
    held = decoded(filled, 0).images_NHWC[3:5]  # a part of it uses it
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, err: print(text) or answer)
    code, out, err = run("data", "clean", "--cache", filled, "--all")
    assert (code, out) == (0, "Remove 2 entries and 1 file of notes?\n")
    assert len(cache.list_entries(filled)) == kept
    assert ("Nothing was removed." in err) is (kept == 3)
    if kept == 1:
        assert "Removed 2 entries, " in err
        assert "1 entry in use: not removed." in err
        assert f"carft-ray data ls --cache {filled}" in err
    del held
    _, _, err = run("data", "clean", "--cache", filled, "--all", "--yes")
    assert f"Removed {counted(kept, 'entry')}, " in err
    assert "in use" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("clean", "needs exactly one of --all, --older-than and --to-gb, but got none of them"),
        ("clean --all --to-gb 0", "needs exactly one of --all, --older-than and --to-gb, but got --all and --to-gb"),
        ("clean --older-than month", "--older-than: must be a time such as 12h or 30d, but got 'month'"),
        ("clean --all --cache full", "No terminal to confirm on; pass --yes."),
        ("clean --all --cache elsewhere", "--cache: elsewhere must be the folder of a cache, but got no such"),
        ("ls --cache full/notes.txt", "--cache: full/notes.txt must be the folder of a cache, but got a file"),
    ],
)
def test_a_mistake_gives_one_message_exit_code_2_and_removes_nothing(run, filled, words, message):
    code, out, err = run("data", *words.split())
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert len(cache.list_entries(filled)) == 3
