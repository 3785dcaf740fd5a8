"""Attempts to leak a test set into what chooses: a table, a row each. A row is refused with its exit code and message,
before anything is trained and with nothing left behind; or it stands among those that cannot be caught, with the
reason, and the test shows that it indeed is not.

Another attempt is another row of ``REFUSED``: name, what is done to the images (a function of their folder, or None),
words of a command, exit code, how the message begins.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import crash_host
import pytest
import short_training
from PIL import Image, ImageOps
from test_shared_images import hills, write_pictures

from benchmarks.pairs import COPIES
from carft_ray.recipe.loading import load_recipe
from carft_ray.training import run as evaluation
from carft_ray.training.run_context import RunContext

pytestmark = pytest.mark.slow

TESTS = {"id_test": "photo_test", "painting": "painting"}  # set -> its domain
TEST_SETS = """\
  id_test: {source: folder, path: images, domains: [photo_test]}
  ood_test: {painting: {source: folder, path: images, domains: [painting]}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The short training with test sets, and a finished training of it, ``done``."""
    path = tmp_path_factory.mktemp("leaks")
    short_training.make(path)
    shutil.rmtree(path / "images")
    domains = {"photo": 4, **dict.fromkeys(("photo_val", "sketch", *TESTS.values()), 2)}
    write_pictures(path / "images", domains, short_training.CLASSES, 48)
    text = short_training.RECIPE.replace("epochs: 3", "epochs: 1").replace("prompts:", TEST_SETS + "prompts:")
    text = text.replace("data:", "data:\n  shared_images: fail", 1)
    (path / "recipe.yaml").write_text(text)
    cache = f"data.cache_dir={path / 'cache'}"
    assert crash_host.call(["train", path / "recipe.yaml", "--out", path / "done", "--set", cache, "--json"]) == 0
    return path


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    place = tmp_path / "here"
    shutil.copytree(folder, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    return place


# what a leak does to the images; each makes the folder images/leak of pictures of photo_test


def copied(edit=None):
    """Copies the domain; with ``edit`` every file of the copy shows something else."""

    def act(images):
        shutil.copytree(images / "photo_test", images / "leak")
        for path in sorted((images / "leak").glob("*/*")) if edit else ():
            edit(Image.open(path).convert("RGB")).save(path)

    return act


def one_image(images):
    """One of the set, under another name and class, among other pictures."""
    for label, name in enumerate(short_training.CLASSES):
        (images / "leak" / name).mkdir(parents=True)
        hills([9, label]).save(images / "leak" / name / "0.png")
    shutil.copy(images / "photo_test" / "star" / "1.png", images / "leak" / "heart" / "new.png")


def among_training(images):
    for path in sorted((images / "painting").glob("*/0.png")):
        shutil.copy(path, images / "photo" / path.parent.name / "more.png")


def given(role, domain):
    """Returns a setting: this domain has this role."""
    return f"--set=data.{role}={{source: folder, path: images, domains: [{domain}]}}"


def drawn(role, split):
    return f"--set=data.{role}={{source: sandbox, domain: photo, split: {split}, num_per_class: 4}}"


def named(test, role):
    return f"data.{test}: a set has one role and must not share images with data.{role}, but got "


def told(role, count, how="same bytes", test="id_test"):
    return f"{named(test, role)}{count} of 10 images in both ({how}): {{here}}/images/"


OOD_LEAK, PAINTING = given("ood_val.leak", "leak"), given("ood_val.x", "painting")
CHECK, TRAIN = ["validate", "recipe.yaml"], ["train", "recipe.yaml", "--out", "new"]
SEARCH, DEEP = ["search", "recipe.yaml", "--study", "new"], [*CHECK, "--deep"]
SANDBOX = [drawn("train", "train"), drawn("id_test", "test"), drawn("ood_val.x", "test")]

REFUSED = {
    # by name or path, by every command
    "a test set in ood_val": (None, [*CHECK, PAINTING], 8, named("ood_test.painting", "ood_val.x")),
    "the same, to search": (None, [*SEARCH, PAINTING], 8, named("ood_test.painting", "ood_val.x")),
    "the same, to a training that goes on": (None, ["train", "recipe.yaml", "--out", "done", "--resume", PAINTING], 8,
     named("ood_test.painting", "ood_val.x")),
    "a test set as id_val": (None, [*CHECK, given("id_val", "photo_test")], 8, named("id_test", "id_val")),
    "training on the test set": (None, [*TRAIN, given("train", "photo_test")], 8, named("id_test", "train")),
    "ood_test is id_test": (None, [*CHECK, given("ood_test.x", "photo_test")], 8, named("ood_test.x", "id_test")),
    "the test split of the sandbox in ood_val": (None, [*CHECK, *SANDBOX], 8, named("id_test", "ood_val.x")),
    # by content
    "a copy in ood_val": (copied(), [*TRAIN, OOD_LEAK], 8, told("ood_val.leak", 10)),
    "a copy as id_val": (copied(), [*DEEP, given("id_val", "leak")], 8, told("id_val", 10)),
    "training on a copy": (copied(), [*TRAIN, given("train", "leak")], 8, told("train", 10)),
    "test images among those of train": (among_training, TRAIN, 8, told("train", 5, test="ood_test.painting")),
    "one image of a set": (one_image, [*DEEP, OOD_LEAK], 8, told("ood_val.leak", 1)),
    # by what the pictures show
    "a copy that was saved again": (copied(COPIES["JPEG 90"]), [*TRAIN, OOD_LEAK], 8,
     told("ood_val.leak", 10, "same picture")),
    # what chooses, and what is searched
    "an objective of a test set": (None, [*SEARCH, "--set", "search.objective.kind=id_test"], 3,
     "--set search.objective.kind=id_test: must be one of the allowed values, but got \"id_test\""),
    "data in the search space": (None, [*SEARCH, "--set", "search.space={data.id_val: {choices: [id_test]}}"], 3,
     "--set search.space="),
    "a role as a set's name": (None, [*CHECK, "--set=data.ood_val={id_test: {source: folder, path: images}}"], 3,
     "--set data.ood_val="),
    "alpha from a test set": (None, [*SEARCH, "--set=search.alpha.mode=id_test"], 3, "--set search.alpha.mode="),
    "evaluating a test set as a trial": (None, ["evaluate", "done", "--trial", "id_test"], 2,
     "--trial: must be the number or name"),
}  # fmt: skip

NOT_CAUGHT = {
    "larger crops: the thumbnail shows another part": copied(lambda im: im.crop((4, 4, im.width, im.height))),
    "mirrored: a picture and its mirror image are two": copied(ImageOps.mirror),
    "a border wider than a sixth of the side": copied(lambda im: ImageOps.expand(im, im.width // 4)),
}


@pytest.mark.parametrize("leak", NOT_CAUGHT.values(), ids=NOT_CAUGHT)
def test_what_the_documents_call_not_caught_is_not(here, run, leak):
    leak(here / "images")
    assert run(*DEEP, OOD_LEAK)[0] == 0
    assert run(*DEEP, PAINTING, "--set=data.ood_test=null")[0] == 0  # a test set that the recipe does not name


@pytest.mark.parametrize(("leak", "words", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_an_attempt_to_leak_a_test_set_is_refused(here, run, leak, words, code, message):
    if leak is not None:
        leak(here / "images")
    before = sorted(here.rglob("*"))
    found, out, err = run(*words)
    assert (found, out) == (code, ""), err
    said = re.sub(r"error: (\d+ problems\n  - )?", "", err)
    assert said.startswith(message.replace("{here}", str(here))), err
    assert sorted(here.rglob("*")) == before  # no folder of a training or study stays


def test_neither_preparation_nor_training_nor_evaluation_nor_export_touches_a_test_set(here, run):
    touched, is_watched = set(), True

    def listen(event, args):
        if is_watched and event in ("open", "os.listdir", "os.scandir") and not isinstance(args[0], int):
            touched.update(Path(os.fsdecode(args[0])).parts)

    sys.addaudithook(listen)  # for the rest of the process
    recipe = load_recipe(Path("recipe.yaml"), [f"data.cache_dir={here / 'cache'}"])
    evaluation.prepare(recipe, here / "prepared")
    evaluation.run_training(recipe, here / "trained", here / "prepared", RunContext())
    assert run("evaluate", "done")[0] == run("export", "done", "--to", "exported")[0] == 0
    is_watched = False
    assert "photo_val" in touched
    assert not touched & {*TESTS.values()}
