"""Recipes to begin with: what is seen in a tree of images, what is proposed for it, and the recipes that ship."""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from crash_host import call
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from short_training import write_model
from sources import open_train

from carft_ray.data.class_names import class_folders, class_names
from carft_ray.data.draft import Roles, choose_roles, draft, readable, survey
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.data.sets import open_source
from carft_ray.errors import DataError, UsageError
from carft_ray.launch.cluster.doctor import examine
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.presets import preset_text, presets
from carft_ray.recipe.rules import check_searchable, warnings
from carft_ray.recipe.written import parse_yaml

CLASSES = ("ant", "bee", "grey wolf")


def write_tree(root, folders, classes=CLASSES, images=10, mode="RGB", size=6):
    rng = np.random.default_rng(0)
    for folder in folders:
        for name in classes:
            (root / folder / name).mkdir(parents=True, exist_ok=True)
            for index in range(images):
                pixels = rng.integers(0, 256, (size, size, len(mode)), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{index}.png")


# folders of classes -> (domain, split) of each
LAYOUTS = {
    ".": [("", "")],
    "art photo": [("art", ""), ("photo", "")],
    "train val": [("", "train"), ("", "val")],
    "Training validation TEST": [("", "test"), ("", "train"), ("", "val")],
    "art/train art/test photo/train": [("art", "test"), ("art", "train"), ("photo", "train")],
    "train/art train/photo val/photo": [("art", "train"), ("photo", "train"), ("photo", "val")],
}


def drafted(tree, train, *model, ood=(None, None)):
    """The recipe that is drafted for a tree beside it, and its text."""
    found = survey(tree)
    roles = choose_roles(found, train, *ood)
    written = draft("x", tree, str(tree), found, roles, *(model or ("ViT-B-16", "openai")))
    (tree.parent / "r.yaml").write_text(written)
    return load_recipe(tree.parent / "r.yaml"), written


@pytest.mark.parametrize("folders", LAYOUTS)
def test_every_layout_becomes_a_recipe_that_may_be_used(tmp_path, folders):
    write_tree(tmp_path / "tree", folders.split())
    found = survey(tmp_path / "tree")
    assert sorted(one.folder for one in found) == sorted(folders.split())
    assert {one.num_images for one in found} == {30}
    assert sorted((one.domain, one.split) for one in found) == LAYOUTS[folders]
    train = "photo" if "art" in folders else None
    roles = choose_roles(found, train, None, None)
    assert (roles.train, roles.ood_val) == (("photo", ("art",)) if train else ("", ()))
    recipe, _ = drafted(tmp_path / "tree", train, "sandbox", None)
    assert check_searchable(recipe) == check_roles(recipe) == check_sets(recipe) == []
    assert recipe.data.ood_val
    assert recipe.resources.threads is None  # as many as the cores of a training, on each machine


@pytest.mark.parametrize("splits", [(), ("val",)])
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("images", [2, 3, 6, 7, 8, 15, 50])
def test_a_draft_of_few_images_leaves_no_set_without_images(tmp_path, images, num_classes, splits):
    tree, classes = tmp_path / "tree", CLASSES[:num_classes]
    write_tree(tree, ["train" if splits else ".", *splits], classes, images)
    recipe, _ = drafted(tree, None, "sandbox", None)
    assert check_sets(recipe) == []
    sets = {role: open_source(getattr(recipe.data, role), role, classes) for role in ("train", "id_val", "id_test")}
    counts = {role: len(source) for role, source in sets.items()}
    whole = images * num_classes
    assert counts["train"] + counts["id_test"] + (0 if splits else counts["id_val"]) == whole
    assert min(counts["id_val"], counts["id_test"]) >= max(1, whole / 20)
    assert counts["train"] >= recipe.train.batch_size
    assert f"the training set has about {counts['train']} images" in (tmp_path / "r.yaml").read_text()


def test_too_few_images_to_draft_from_are_told_and_a_part_without_images_is_no_valid_recipe(tmp_path, capsys):
    write_tree(tmp_path / "tree", ["."], CLASSES, 1)
    assert call(["init", "--from", tmp_path / "tree", "--to", tmp_path / "r.yaml", "--model", "sandbox"]) == 4
    told = "must have at least 4 images: two for train, one for id_val, one for id_test, but got 3"
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r.yaml").exists()
    write_tree(tmp_path / "tree", ["."], CLASSES, 3)
    drafted(tmp_path / "tree", None, "sandbox", None)
    for role in ("train", "id_val"):
        empty = load_recipe(tmp_path / "r.yaml", [f"data.{role}.part=[0.99999, 1]"])
        [problem, *_] = check_sets(empty)
        assert str(problem).startswith(f"data.{role}: there must be at least one image, but got none of 9 in the part")


def test_words_of_a_draft_are_readable_and_its_classes_and_ids_are_those_of_the_folders(tmp_path):
    for name in ("animals-nature", "animals_nature", "animalsNature"):
        assert readable(name) == "animals nature"
    assert readable("012.Black_footed_Albatross") == "Black footed Albatross"
    for name in ("grey wolf", "t-shirt", "McDonald", "TV", "747-400", "n12345678", "__"):
        assert readable(name) == name
    folders = ("animalsNature", "city-street", "old_town")
    write_tree(tmp_path / "tree", ["photo", "art"], folders, images=5)
    recipe, written = drafted(tmp_path / "tree", "photo")
    assert class_names(recipe) == ("animals nature", "city street", "old town")
    assert class_folders(recipe) == folders
    assert "NO WORDS" not in written
    without = load_recipe(tmp_path / "r.yaml", ["prompts.class_names=null"])
    ids, same = (open_train(each).sample_ids.tolist() for each in (recipe, without))
    assert ids == same


def test_ids_of_imagenet_get_its_words_and_other_ids_a_word_of_warning(tmp_path):
    for name, words in (("n01443537", ("tench", "goldfish")), ("n99999999", ("n01440764", "n99999999"))):
        write_tree(tmp_path / name, ["photo", "art"], ("n01440764", name), images=5)
        recipe, written = drafted(tmp_path / name, "photo")
        assert class_names(recipe) == words
        assert ("THESE FOLDER NAMES ARE NOT WORDS" in written) == (name in words)


def test_roles_are_as_asked_and_the_rest_as_proposed(tmp_path):
    write_tree(tmp_path, ["a", "b", "c", "d"])
    write_tree(tmp_path, ["d"], images=12)
    found = survey(tmp_path)
    assert choose_roles(found, None, None, None) == Roles("d", ("a", "b"), ("c",))
    assert choose_roles(found, "b", ["d"], None) == Roles("b", ("d",), ("a", "c"))
    assert choose_roles(found, None, None, ["d"]) == Roles("a", ("b", "c"), ("d",))
    with pytest.raises(UsageError) as caught:
        choose_roles(found, "e", ["a", "a"], ["bb"])
    assert [str(problem).split(":")[0] for problem in caught.value.problems] == ["--train", "--ood-val", "--ood-test"]


@pytest.mark.parametrize("name", ["my: tree", "my: " + "long " * 20 + "tree", "\u2028 {, } \U0001f469\u200d\U0001f680"])
def test_names_that_need_quotes_and_folders_that_are_no_words(tmp_path, name):
    write_tree(tmp_path / name, ["été #1", "no"], ["n01440764", "12", "true"])
    recipe, written = drafted(tmp_path / name, "no")
    assert "THESE FOLDER NAMES ARE NOT WORDS" in written
    assert recipe.data.train.domains == ("no",)
    assert [spec.domains for spec in recipe.data.ood_val.values()] == [("été #1",)]
    assert check_sets(recipe) == warnings(recipe) == []


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ("", "must contain folders of images, but got none"),
        ("a b/train", "all class folders must be at the same depth, but got class folders in a, b/train"),
        ("train training", "each domain must have one folder for each split, but got train and training"),
    ],
)
def test_a_tree_of_no_known_layout_is_told(tmp_path, folders, message):
    write_tree(tmp_path, folders.split(), images=1)
    with pytest.raises(DataError, match=message):
        survey(tmp_path)


@pytest.mark.parametrize("flat", ["test", "val test"])
def test_splits_without_class_folders_are_passed_over_with_a_line(tmp_path, caplog, flat):
    write_tree(tmp_path / "tree", ["train"])
    for name in flat.split():
        write_tree(tmp_path / "tree", [""], classes=[name])
    recipe, _ = drafted(tmp_path / "tree", "")
    assert (recipe.data.train.path, recipe.data.train.domains) == (str(tmp_path / "tree"), ("train",))
    assert open_source(recipe.data.train, "train", None).class_names == tuple(sorted(CLASSES))
    (line,) = caplog.messages
    assert f"the images directly in {', '.join(sorted(flat.split()))} are not used" in line


def test_presets_are_the_recipes_of_the_folder(tmp_path, capsys):
    assert {"quickstart", "folders"} <= presets().keys()
    assert not [text for text in presets().values() if text.endswith(":")]
    assert call(["init", "--preset", "quickstart", "--to", tmp_path / "r.yaml"]) == 0
    assert load_recipe(tmp_path / "r.yaml").name == "quickstart"
    capsys.readouterr()
    assert call(["init", "--preset", "quickstart", "--json"]) == 0  # which is not written
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["preset"], found["found"]) == (None, "quickstart", [])
    assert found["text"] == preset_text("quickstart")


def test_a_copy_of_a_preset_says_where_its_images_are_missing(tmp_path, capsys):
    assert call(["init", "--preset", "pacs", "--to", tmp_path / "mine" / "pacs.yaml"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "5 sets cannot be read, the first one: data.train.path: must be the folder of PACS" in err
    assert f"but got {tmp_path / 'data' / 'pacs'}" in err


@pytest.mark.parametrize(("name", "hold_out"), [("pacs", "photo"), ("office-home", "Real World"), ("vlcs", "SUN09")])
def test_a_preset_that_leaves_one_domain_out_may_leave_out_another(name, hold_out):
    before, after = (parse_yaml(preset_text(name, domain), name).value["data"] for domain in (None, hold_out))
    domains = [one["domains"] for one in after["ood_test"].values()]
    assert domains == [[hold_out]]
    assert list(after["ood_test"]) == [hold_out.lower().replace(" ", "_")]
    (old,) = (one["domains"][0] for one in before["ood_test"].values())
    assert set(after["train"]["domains"]) == {old} | set(before["train"]["domains"]) - {hold_out}
    assert after["id_val"]["domains"] == after["ood_val"]["corrupted"]["of"]["domains"] == after["train"]["domains"]
    assert preset_text(name, old) == preset_text(name)


WRONG = [
    ("", 2, "one of --from FOLDER, --preset NAME and --list must be given, but got none of them"),
    ("--list --preset folders", 2, "must be given, but got several"),
    ("--list --to r.yaml", 2, "--to: can only be used with --from or --preset"),
    ("--preset quikstart", 2, "--preset: must be a preset, but got 'quikstart'; did you mean 'quickstart'?"),
    ("--preset pacs --hold-out foto", 2, "--hold-out: must be a domain of pacs, but got 'foto'; did you mean"),
    ("--preset fmow --hold-out x", 2, "--hold-out: the preset fmow leaves no domain out: 'x'"),
    ("--preset pacs --model sandbox", 2, "--model: can only be used with --from"),
    ("--from nowhere", 4, "nowhere: must be a folder that can be read"),
    ("--from tree --train foto", 2, "--train: must be a domain of the folder, but got 'foto'; did you mean"),
    ("--from tree --to r.yaml --model ViT-B-33", 2, "--model: must be 'sandbox', 'local-dir:FOLDER'"),
    ("--from tree --to r.yaml --model ViT-B-32", 2, "--pretrained: is required for ViT-B-32"),
    ("--from tree --pretrained opnai", 2, "--pretrained: must be a tag of ViT-B-16-quickgelu, a weights"),
    ("--from tree --to tree", 2, "--to: must be a new file, but got tree"),
    ("--from tree --to r.yaml --train art --ood-val art", 2, "a domain has one role, and --train"),
]


@pytest.mark.parametrize(("line", "code", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_use_gives_one_message_and_leaves_nothing(tmp_path, monkeypatch, capsys, line, code, message):
    write_tree(tmp_path / "tree", ["art", "photo"], images=1)
    monkeypatch.chdir(tmp_path)
    assert call(["init", *line.split()]) == code
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_domains_whose_names_would_be_one_or_a_role_s_get_names_of_their_own(tmp_path):
    others = ["my art", "my_art", "my-art", "id_val", "x" * 150]
    write_tree(tmp_path / "tree", ["photo", *others], images=5)
    for ood in ((None, None), (others, [])):
        recipe, _ = drafted(tmp_path / "tree", "photo", "sandbox", None, ood=ood)
        assert check_roles(recipe) == check_sets(recipe) == []
        sets = {**recipe.data.ood_val, **recipe.data.ood_test}
        assert len({spec.domains for spec in sets.values()}) == 5
        assert {"id_val_2", "my_art", "my_art_2"} <= {*sets}


@st.composite
def counts_of_trees(draw):
    """How many images are in each class folder of a tree of 4 to 400 images; 0: an empty folder."""
    some = {"min_size": 1, "max_size": 3, "unique": True}
    domains = draw(st.lists(st.sampled_from(["art", "photo", "my sketch", "2020"]), **some))
    splits = draw(st.lists(st.sampled_from(["train", "val", "test"]), **some))
    both = [(domain, split) for domain in domains for split in splits]
    layouts = [["."], domains, splits, [f"{d}/{s}" for d, s in both], [f"{s}/{d}" for d, s in both]]
    folders = draw(st.sampled_from(layouts))
    classes = draw(st.lists(st.sampled_from(["ant", "bee", "grey wolf", "12", "été"]), min_size=2, unique=True))
    places = [f"{folder}/{name}" for folder in folders for name in classes]
    few = st.just(0) | st.integers(1, 400 // len(places)) | st.integers(1, 400 // len(places))
    counts = {place: draw(few) for place in places if draw(st.integers(0, 5))}
    assume(sum(counts.values()) >= 4)
    return counts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny CLIP, and a folder for the cache beside it."""
    folder = tmp_path_factory.mktemp("model") / "clip"
    write_model(folder)
    return folder


REFUSED = ("the training images must be of two classes or more", "must have at least")  # by init: nothing is written


@pytest.mark.slow
@settings(max_examples=25, derandomize=True, deadline=None)
@given(counts=counts_of_trees())
def test_what_init_writes_for_any_tree_validate_and_doctor_pass(model, counts):
    """Of images that differ and can be decoded: init opens none."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()) as told:
        for place, number in counts.items():
            (Path(name) / "tree" / place).mkdir(parents=True)
            for index in range(number):
                picture = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                picture.save(Path(name) / "tree" / place / f"{index}.png")
        recipe = Path(name) / "r.yaml"
        code = call(["init", "--from", Path(name) / "tree", "--to", recipe, "--model", f"local-dir:{model}"])
        if not recipe.exists():
            assert code == 4
            assert any(reason in " ".join(told.getvalue().split()) for reason in REFUSED)
            return
        assert "refuse" not in told.getvalue()
        assert call(["validate", recipe]) == 0, told.getvalue()
        found = examine(load_recipe(recipe, [f"data.cache_dir={model.parent / 'cache'}"]))
        assert [str(problem) for problem in found.errors] == []


def test_what_cannot_be_compared_with_the_training_images_has_no_role_and_it_is_said(tmp_path, capsys):
    tree = tmp_path / "tree"
    write_tree(tree, ["photo/train", "photo/val", "art/train"], ["ant", "bee", "cow"])
    write_tree(tree, ["photo/test", "old/train", "new/test"], ["ant", "bee"])
    write_tree(tree, ["photo/val", "new/train"], ["zebra"])
    write_tree(tree, ["toy/train"], ["ant"])
    for empty in ("photo/train/dodo", "new/test/cow"):
        (tree / empty).mkdir()
    recipe, written = drafted(tree, "photo", "sandbox", None)
    notes = choose_roles(survey(tree), "photo", None, None).notes
    assert notes == (
        "'dodo' in 'photo/train' holds no image, and is no class",
        "'photo/val' has no role: no training image is of its class 'zebra'",
        "id_test has no image of 'cow': its images are classified among the other classes",
        "'toy' has no role: its only class is 'ant'",
    )
    assert [note for note in notes if f"  # {note}\n" not in written] == []
    assert recipe.data.classes == ("ant", "bee", "cow")
    assert [(name, spec.path) for name, spec in recipe.data.ood_val.items()] == [
        ("art", str(tree / "art")),
        ("new", str(tree / "new")),
    ]
    assert check_sets(recipe, lists_tests=True) == []
    assert call(["init", "--from", tree, "--train", "photo", "--ood-val", "toy"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--ood-val: must be a domain that can be compared with 'photo', but got 'toy': its only class" in told
    assert call(["init", "--from", tree, "--train", "toy"]) == 4
    assert "the training images must be of two classes or more, but got 1" in capsys.readouterr().err


def test_what_doctor_will_refuse_of_a_recipe_is_said_by_init_and_validate(tmp_path, capsys):
    write_tree(tmp_path / "tree", ["photo", "art"])
    for name in ("\u00e9.png", "e\u0301.png"):
        shutil.copy(tmp_path / "tree" / "art" / "bee" / "0.png", tmp_path / "tree" / "art" / "bee" / name)
    recipe = tmp_path / "r.yaml"
    assert call(["init", "--from", tmp_path / "tree", "--train", "photo", "--to", recipe, "--model", "sandbox"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "doctor will refuse this recipe: data.ood_val.art" in said
    assert call(["validate", recipe]) == 4
    assert "names of images must differ" in said
    assert "names of images must differ" in " ".join(capsys.readouterr().err.split())
