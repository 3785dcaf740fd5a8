"""Data sets of Hugging Face on disk, written and read by the library ``datasets`` as the oracle."""

import json
import shutil

import crash_host
import numpy as np
import pytest
from layouts_tables import CLASSES, hf_dataset, mixed_modes, pictures, write_folder, write_hub
from sources import open_set

from carft_ray.errors import DataError

datasets = pytest.importorskip("datasets")
IMAGES, OTHERS = pictures(), pictures(2, seed=1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A data set with two splits, one without, and the hub's layout of the first."""
    folder = tmp_path_factory.mktemp("hf")
    datasets.disable_progress_bars()
    splits = {"train": hf_dataset(IMAGES), "validation": hf_dataset(OTHERS)}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved", num_shards={"train": 3, "validation": 1})
    hf_dataset(mixed_modes()).save_to_disk(folder / "modes")
    write_hub(folder / "hub", splits)
    return folder


@pytest.fixture
def base(written, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(written, tmp_path / "hf")
    monkeypatch.chdir(tmp_path / "hf")
    return tmp_path / "hf"


def opened(base, path, names=None, **keys):
    return open_set(names, base_dir=base, source="huggingface", path=path, **keys)


def told(base, *args, **keys):
    """Returns the message for a set that cannot be opened."""
    with pytest.raises(DataError) as caught:
        opened(base, *args, **keys)
    assert caught.value.exit_code == 4
    return str(caught.value)


@pytest.mark.parametrize("path", ["saved", "saved/train", "hub", "hub/data", "modes"])
def test_the_rows_are_those_of_the_library(base, path):
    split = {"saved": "train", "hub": "train", "hub/data": "train"}.get(path)
    source = opened(base, path, split=split)
    if path.startswith("hub"):
        files = sorted(map(str, (base / "hub" / "data").glob("train-*.parquet")))
        oracle = datasets.Dataset.from_parquet(files, cache_dir=str(base / "cache"))
    else:
        oracle = datasets.load_from_disk(base / path)
        oracle = oracle if split is None else oracle[split]
    assert source.class_names == tuple(oracle.features["label"].names) == CLASSES
    assert source.labels.tolist() == oracle["label"][:]
    for index, row in enumerate(oracle.cast_column("image", datasets.Image(decode=False))):
        assert source.content(index) == row["image"]["bytes"]
    if path != "modes":  # those of the library are not yet RGB
        for index, row in enumerate(oracle):
            np.testing.assert_array_equal(source.pixels(index), np.asarray(row["image"]))


def test_names_are_those_of_the_same_images_in_another_layout(base):
    saved, hub = opened(base, "saved", split="train"), opened(base, "hub", split="train")
    np.testing.assert_array_equal(saved.sample_ids, hub.sample_ids)
    assert saved.fingerprint != hub.fingerprint
    shutil.copytree(base / "saved", base / "moved")
    assert opened(base, "moved", split="train").fingerprint == saved.fingerprint
    write_folder(base / "images", IMAGES)
    folder = open_set(base_dir=base, source="folder", path="images")
    np.testing.assert_array_equal(opened(base, "saved", split="train", id="name").sample_ids, folder.sample_ids)


def test_a_column_of_paths_counts_from_the_root(base):
    write_folder(base / "images", IMAGES)
    rows = {"image": [image.name for image in IMAGES], "label": [image.label for image in IMAGES]}
    datasets.Dataset.from_dict(rows).save_to_disk(base / "paths")
    source = opened(base, "paths", root="images")
    assert list(source.listing.names) == rows["image"]
    assert [source.content(index) for index in range(len(source))] == [image.content for image in IMAGES]


def test_the_only_split_need_not_be_named(base):
    shutil.rmtree(base / "saved" / "validation")
    (base / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for path in (base / "hub" / "data").glob("validation-*"):
        path.unlink()
    assert len(opened(base, "saved")) == len(opened(base, "hub")) == len(IMAGES)


# sets that are not as they should be


def spoilt(name, content=None):
    """Overwrites a file of the sets, or removes it."""
    return lambda base: (base / name).unlink() if content is None else (base / name).write_text(content)


def with_state(**changes):
    def write(base):
        state = json.loads((base / STATE).read_text())
        (base / STATE).write_text(json.dumps({**state, **changes}))

    return write


STATE, SPLITS, HUB_FILE = "saved/train/state.json", "saved/dataset_dict.json", "train-00001-of-00002.parquet"
ALLOWED = "(allowed: train, validation)"
NO_FILES = "must hold the files that its state.json names, at least one, but got no"
# what makes a set of the split train wrong, its path, and the message
BROKEN = [
    (spoilt(f"hub/data/{HUB_FILE}"), "hub", f"the split train must have 2 files, but got 1, without {HUB_FILE}"),
    (spoilt("saved/train/data-00002-of-00003.arrow"), "saved", f"{NO_FILES} "),
    (spoilt(STATE), "saved", "must be a readable JSON file, but got No such"),
    (spoilt(STATE, "{"), "saved", "state.json: must be a readable JSON file, but got Expecting"),
    (with_state(_data_files=[]), "saved", f"{NO_FILES}ne"),
    (with_state(_data_files=[["a.arrow"], 1]), "saved", f"{NO_FILES} "),
    (with_state(_indices_data_files=[{"filename": "a"}]), "saved", "must be a data set without a file of indices"),
    (spoilt(SPLITS, '{"splits": [1, ["train"]]}'), "saved", "must be a split of the data set, but got 'train'"),
    (spoilt("saved/train/data-00001-of-00003.arrow", "?"), "saved", "but got it is cut off, or no Arrow file"),
]
# path and keys of a set that is sound
WRONG = [
    ("none", {}, "train: must be the folder of a data set, but got no such folder"),
    (".", {}, "which is none (allowed: "),
    ("saved", {}, f"must be a split of the data set, but got none {ALLOWED}"),
    ("hub", {"split": "validatoin"}, "did you mean 'validation'?"),
    ("saved/train", {"split": "test"}, "split: must be left out: the folder holds one data set"),
    ("saved/train", {"label": "lable"}, "must be a column of data-00000-of-00003.arrow, but got 'lable'; did you mean"),
]


@pytest.mark.parametrize(("spoil", "path", "message"), BROKEN)
def test_a_broken_set_gets_one_message(base, spoil, path, message):
    spoil(base)
    text = told(base, path, split="train")
    assert message in text
    assert text.count("\n") <= 1, "one problem, one next step"


@pytest.mark.parametrize(("path", "keys", "message"), WRONG)
def test_what_names_no_set_gets_one_message(base, path, keys, message):
    text = told(base, path, **keys)
    assert message in text
    assert text.count("\n") <= 1


# roles and the command line


def test_validate_reads_the_sets_and_finds_the_same_images_in_two_of_them(base, capsys, monkeypatch):
    monkeypatch.chdir(base)
    (base / "r.yaml").write_text(
        "data:\n  train: {source: huggingface, path: saved, split: train}\n"
        "  id_val: {source: huggingface, path: hub, split: validation}\ntrain: {batch_size: 4}\n"
    )
    assert crash_host.call(["validate", "r.yaml", "--deep"]) == 0
    assert crash_host.call(["validate", "r.yaml", "--deep", "--set", "data.id_val.split=train"]) == 8
    assert "stand in another role too (data.shared_limit), but got 12 of 12 images" in capsys.readouterr().err
    assert crash_host.call(["validate", "r.yaml", "--set", "data.id_val.split=test"]) == 4
    assert "data.id_val.split: must be a split of the data set" in capsys.readouterr().err
