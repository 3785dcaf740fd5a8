"""Which images of a tree belong to a set: parts, shots, masks of classes, and images that cannot be decoded."""

from pathlib import Path

import numpy as np
import pytest
from from_logits import predictions_table
from PIL import Image
from sources import open_set, open_train, open_validation
from strict_roles import check_overlap

from carft_ray.data.bad_images import without_bad_images
from carft_ray.data.open_source import open_source
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.errors import DataError
from carft_ray.recipe.loading import absolute_paths
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.training.origin import set_contents

CLASSES = ("bird", "cat", "dog")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Three classes of forty images, without domains."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(40):
            pixels = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index:02d}.png")
    return tmp_path


def chosen(tree, names=None, **selection):
    return open_set(names, base_dir=tree, source="folder", path="images", **selection)


def recipe_of(tree, **sets):
    whole = {"source": "folder", "path": "images"}
    data = {"train": {**whole, "part": [0.3, 1]}, "id_val": {**whole, "part": [0, 0.3]}, **sets}
    return absolute_paths(Recipe.model_validate({"data": data, "train": {"batch_size": 4}}), Path.cwd())


def test_parts_and_shots_are_disjoint_nested_and_drawn_by_their_seed(tree):
    whole = chosen(tree)
    assert (whole.class_names, whole.listing.names[0]) == (CLASSES, "bird/00.png")
    assert np.bincount(whole.labels).tolist() == [40, 40, 40]
    parts = [chosen(tree, part=part) for part in ([0, 0.25], [0.25, 0.6], [0.6, 1])]
    ids = [set(part.sample_ids.tolist()) for part in parts]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 120
    assert [len(part) for part in parts] == [33, 48, 39]  # 30, 42 and 48 are expected
    one, five, other = (chosen(tree, shots=k, shots_seed=seed) for k, seed in ((1, 0), (5, 0), (5, 1)))
    assert np.bincount(five.labels).tolist() == [5, 5, 5]
    assert set(one.sample_ids.tolist()) < set(five.sample_ids.tolist())
    assert set(five.sample_ids.tolist()) != set(other.sample_ids.tolist())
    assert set(chosen(tree, part=[0, 0.25], shots=3).sample_ids.tolist()) < ids[0]


def test_a_set_of_some_classes_is_told_apart_between_those(tree):
    names = ("ant", "bird", "cat", "cow", "dog")
    source = chosen(tree, names, classes="some")
    assert source.groups == ((1,), (2,), (4,))
    assert sorted(set(source.labels.tolist())) == [1, 2, 4]
    with pytest.raises(DataError, match="write classes: some"):
        chosen(tree, names)
    with pytest.raises(DataError, match="every class of a set must be in the class list, but got 'dog'"):
        chosen(tree, names[:4], classes="some")


def test_masked_predictions_are_those_of_the_logits_of_the_groups_alone():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(0, 5, (50, 6)).astype(np.float32), np.arange(50, dtype=np.uint64)
    groups = ((1, 4), (2,), (5,))
    named = np.array([1, 2, 5])
    labels = named[rng.integers(0, 3, 50)]
    table = predictions_table("r", 1.0, ids, labels, logits, groups)
    merged = np.stack([logits[:, [1, 4]].max(1), logits[:, 2], logits[:, 5]], axis=1)
    assert table["prediction"].to_pylist() == named[merged.argmax(1)].tolist()
    alone = predictions_table("r", 1.0, ids, np.searchsorted(named, labels), merged)
    for name in ("rank", "confidence", "nll", "sum_p2"):
        np.testing.assert_array_equal(table[name].to_numpy(), alone[name].to_numpy())
    everything = tuple((label,) for label in range(6))
    plain, masked = (predictions_table("r", 1.0, ids, labels, logits, groups) for groups in (None, everything))
    assert plain.equals(masked)


def test_one_tree_may_be_cut_into_roles_by_parts_that_share_no_image(tree):
    recipe = recipe_of(tree)
    assert check_roles(recipe) == check_sets(recipe) == []
    check_overlap(recipe, tree / "cache")
    assert len(open_train(recipe)) + len(open_validation(recipe)[0]) == 120
    for other in ({"part": [0.2, 0.4]}, {"part": [0.3, 1]}, {}, {"shots": 2}, {"path": "images/bird"}):
        (problem,) = check_roles(recipe_of(tree, id_val={"source": "folder", "path": "images", **other}))
        told = "data.id_val: a set has one role and must not share images with data.train, but got "
        assert str(problem).startswith(
            f"{told}{tree / other.get('path', 'images')}\n    Give data.id_val images of its "
        )


def test_a_part_without_images_and_more_shots_than_images_are_refused(tree):
    with pytest.raises(DataError, match="there must be at least one image, but got none of 120 in the part"):
        chosen(tree, part=[0, 1e-9])
    with pytest.raises(DataError, match=r"every class must have 41 images, as shots says, but got 40 in 'bird'"):
        chosen(tree, shots=41)


def test_images_that_cannot_be_decoded_are_left_out_counted_and_found_once(tree, caplog):
    (tree / "images" / "cat" / "07.png").write_bytes(b"no image")
    (tree / "images" / "dog" / "11.png").write_bytes((tree / "images" / "dog" / "12.png").read_bytes()[:60])
    source = chosen(tree, on_bad_image="skip")
    left = without_bad_images(source, tree / "cache")
    assert len(left) == 118
    assert [name.rsplit("images/")[1] for name in left.skipped] == ["cat/07.png", "dog/11.png"]
    assert caplog.text.count("left out") == 1
    assert caplog.text.count("must be a readable image") == 2
    assert len(without_bad_images(chosen(tree, on_bad_image="skip"), tree / "cache")) == 118
    assert caplog.text.count("left out") == 1
    assert left.fingerprint != source.fingerprint


def test_skipped_images_are_counted_in_the_manifest_and_fail_is_the_default(tree, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "cache"))
    (tree / "images" / "cat" / "07.png").write_bytes(b"no image")
    whole = {"source": "folder", "path": "images", "on_bad_image": "skip"}
    recipe = recipe_of(tree, train={**whole, "part": [0.3, 1]}, id_val={**whole, "part": [0, 0.3]})
    found = set_contents(recipe)
    assert [found[name].get("num_skipped", 0) for name in ("train", "id_val")] in ([1, 0], [0, 1])
    strict = open_source(recipe_of(tree).data.train.model_copy(update={"part": None}), "train", None)
    with pytest.raises(DataError, match=r"07\.png: must be a readable image"):
        strict.pixels(47)


def test_a_set_of_bad_images_alone_is_refused(tree):
    for path in tree.glob("images/*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="at least one image that can be decoded, but got none of 120"):
        without_bad_images(chosen(tree, on_bad_image="skip"), tree / "cache")
