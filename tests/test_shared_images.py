"""Images that stand in two roles: who leaves, what is refused, a search and the list of its study; which are copies."""

import contextlib
import csv
import io
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ArraySource
from crash_host import call
from PIL import Image, ImageDraw
from short_training import write_model
from sources import open_train, open_validation

from benchmarks import pairs
from benchmarks.photos import photo
from carft_ray import words
from carft_ray.data.duplicates import find_duplicates as find
from carft_ray.data.duplicates import shared_images as shares
from carft_ray.data.listing import StoredSource, sample_id
from carft_ray.data.records import SIDE, Records, thumbnail_of
from carft_ray.data.role_checks import check_sets
from carft_ray.data.sets import excluded_ids, open_source
from carft_ray.data.source import DIGEST_BYTES, pixel_digest
from carft_ray.errors import DataError, HoldOutError, StorageError, UsageError
from carft_ray.layout import SHARED_IMAGES
from carft_ray.recipe.loading import load_recipe
from carft_ray.store.log import log_of
from carft_ray.study.provenance import provenance_of


def hills(seed, side=40):
    """Returns a picture of smooth hills of colour, as a photo has."""
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return noise.resize((side, side), Image.Resampling.BICUBIC)


def write_pictures(images, domains, classes, side=40):
    """Writes for each domain as many pictures per class as it is said to have; no two are alike."""
    for number, (domain, count) in enumerate(domains.items()):
        for label, name in enumerate(classes):
            (images / domain / name).mkdir(parents=True)
            for index in range(count):
                hills([number, label, index], side).save(images / domain / name / f"{index}.png")


def records_of(pictures, seed):
    """Returns the records of pictures; each has bytes of its own, so that copies are found by what they show."""
    digests = np.random.default_rng(seed).integers(0, 256, (len(pictures), DIGEST_BYTES), dtype=np.uint8)
    thumbnails = np.stack([thumbnail_of(picture) for picture in pictures])
    pixels = [pixel_digest(*each) for each in zip(pictures, map(np.ndarray.tobytes, thumbnails), strict=True)]
    return Records(digests, np.stack([np.frombuffer(each, np.uint8) for each in pixels]), thumbnails)


def are_one(first, second):
    """Tells whether two pictures are found to be the same one."""
    return len(find.same_pictures(records_of([first], 1), records_of([second], 2))[0]) == 1


CLASSES = ("cat", "dog")
RECIPE = """
format_version: 1
name: shared
model: {name: "local-dir:model"}
data:
  train: {source: folder, path: images, domains: [train]}
  id_val: {source: folder, path: images, domains: [val]}
  ood_val: {sketch: {source: folder, path: images, domains: [sketch]}}
  id_test: {source: folder, path: images, domains: [test]}
  ood_test: {paint: {source: folder, path: images, domains: [paint]}}
train: {learning_rate: 1e-2, kl_weight: 1, epochs: 1, batch_size: 16}
search:
  trials: 1
  space: {learning_rate: {low: 1e-3, high: 1e-2, log: true}}
  baselines: {plain: {kl_weight: 0}}
resources: {executor: debug}
"""
NUM = {"train": 24, "val": 20, "sketch": 20, "test": 20, "paint": 20}  # images per class


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_model(folder / "model")
    write_pictures(folder / "images", NUM, CLASSES)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "here")
    return tmp_path / "here"


def copy(here, source, target):
    """Copies an image; as JPEG it is saved again."""
    path, there = here / "images" / source, here / "images" / target
    if there.suffix == ".jpg":
        Image.open(path).save(there, quality=90)
    else:
        shutil.copy(path, there)


def loaded(here, *options):
    return load_recipe(here / "recipe.yaml", list(options))


def found(here, *options):
    return shares.find_shared(loaded(here, *options), here / "cache")


def leaving(rows):
    """Returns every image that leaves its set."""
    images = [(row.image, row.done) for row in rows] + [(row.other_image, row.other_done) for row in rows]
    return sorted({"/".join(Path(image).parts[-3:]) for image, done in images if done == "leaves"})


NOISE = "{source: corrupted, of: {source: folder, path: images, domains: [val]}, severity: 1, corruptions: [fog]}"
FRACTION = sample_id("train/cat/x.png") / 2**64  # where the image stands in its set
OUTSIDE = f"[0, {FRACTION}]" if FRACTION > 0.5 else f"[{FRACTION + 1e-9}, 1]"
# copies, as JPEG of the same picture alone; a setting; what leaves: an image stays in the role nearest to the test
ROLES = {
    "test and train": ("test/cat/0.png train/cat/a.png", "", "train/cat/a.png"),
    "test and validation": ("test/dog/1.png val/dog/b.jpg", "", "val/dog/b.jpg"),
    "validation and train": ("val/cat/3.png train/cat/c.jpg", "", "train/cat/c.jpg"),
    "two of validation": ("sketch/cat/4.png val/cat/d.png", "", "val/cat/d.png"),
    "two of test": ("test/cat/0.png paint/cat/x.png", "", ""),
    # A in train is re-encoded in val, B; its bytes are C in the test: both leave, whichever pairs were found
    "a chain": ("test/cat/5.png val/cat/b.png val/cat/b.png train/cat/a.jpg", "", "train/cat/a.jpg val/cat/b.png"),
    "every copy": (
        "val/cat/0.png train/cat/a.png val/cat/0.png train/cat/b.png val/cat/0.png val/cat/c.png "
        "val/cat/0.png train/dog/d.jpg",
        "data.shared_limit=0.1",
        "train/cat/a.png train/cat/b.png train/dog/d.jpg",
    ),
    "outside the part": ("val/cat/0.png train/cat/x.png", f"data.train.part={OUTSIDE}", ""),
    "shown under a corruption": ("val/cat/0.png train/cat/x.png", f"data.ood_val={{n: {NOISE}}}", "train/cat/x.png"),
    "kept": ("test/cat/0.png train/cat/a.png", "data.shared_images=keep", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "setting", "leave"), ROLES.values(), ids=ROLES)
def test_an_image_stays_in_the_role_nearest_to_the_test(here, copies, setting, leave):
    names = copies.split()
    for source, target in zip(names[::2], names[1::2], strict=True):
        copy(here, source, target)
    rows = found(here, *filter(None, [setting]))
    assert leaving(rows) == leave.split()
    assert bool(rows) is not setting.startswith("data.train.part")  # they are found, whether or not one leaves


@pytest.mark.slow
def test_corrupted_images_leave_the_set_that_is_shown(here):
    copy(here, "test/cat/0.png", "val/cat/x.png")
    recipe = loaded(here, f"data.ood_val={{noise: {NOISE}}}")
    id_val, ood_val = open_validation(shares.without_shared(recipe, shares.find_shared(recipe, here / "cache")))
    assert len(id_val) == len(ood_val["noise"]) == 40


@pytest.mark.slow
def test_pairs_are_found_once_with_the_time_that_is_left_and_what_is_kept_is_told_by_set(here, monkeypatch):
    copy(here, "test/cat/0.png", "train/cat/a.png")
    monkeypatch.setattr(words, "FIRST_AFTER_S", 0)
    monkeypatch.setattr(words, "THEN_EVERY_S", 0)
    said = []
    rows = shares.find_shared(loaded(here), here / "cache", said.append)
    assert len(rows) == 1
    for name, count in {"train": 49, "id_val": 40, "ood_val.sketch": 40, "id_test": 40}.items():
        begin = f"reading the images of data.{name}: 32 of {count}, about "
        assert any(line.startswith(begin) and line.endswith(" s left") for line in said)
    monkeypatch.setattr(StoredSource, "content", lambda *index: pytest.fail("an image was read again"))
    assert shares.find_shared(loaded(here), here / "cache", said.append) == rows
    assert shares.shared_lines(found(here, "data.shared_images=keep")) == [
        "data.id_test: 1 image kept, also in data.train",
        "data.train: 1 image kept, also in data.id_test",
    ]


@pytest.mark.slow
def test_what_cannot_be_left_out_is_refused(here):
    shutil.copytree(here / "images" / "sketch", here / "images" / "same")
    shutil.copytree(here / "images" / "train", here / "images" / "few")
    for path in sorted((here / "images" / "few" / "cat").glob("*.png"))[1:]:
        path.unlink()
    copy(here, "few/cat/0.png", "val/cat/x.png")
    for setting, limit, message in (
        ("data.train.domains=[same]", 0.05, r"data\.train: at most 5 % .* 40 of 40 images"),
        ("data.train.domains=[few]", 0.5, r"data\.train: every class must .* none in 'cat'"),
        ("data.shared_images=fail", 0.05, r"data\.id_val: .* must not share images with data\.train"),
    ):
        with pytest.raises(HoldOutError, match=message) as error:
            found(here, setting, f"data.shared_limit={limit}")
    assert "--pairs" in str(error.value)


@pytest.mark.slow
def test_the_list_is_made_once_and_decides_what_is_opened(here, tmp_path):
    study, recipe, told = tmp_path / "study", loaded(here), []
    study.mkdir()
    shares.write_shared(study, shares.shared_of_study(recipe, here / "cache", study))
    assert (study / SHARED_IMAGES).exists()
    assert shares.read_shared(study) == shares.read_shared(tmp_path) == []
    (study / SHARED_IMAGES).unlink()
    copy(here, "val/cat/0.png", "train/cat/x.png")
    shares.write_shared(study, shares.shared_of_study(recipe, here / "cache", study, told.append))
    assert told[-1] == "data.train: 1 image left out, also in data.id_val"
    rows = shares.read_shared(study)
    smaller = shares.without_shared(recipe, rows)
    before, after = open_train(recipe), open_train(smaller)
    assert set(before.sample_ids.tolist()) - set(after.sample_ids.tolist()) == {sample_id("train/cat/x.png")}
    assert before.identity != after.identity
    assert not check_sets(smaller)
    copy(here, "val/cat/1.png", "train/cat/y.png")
    assert shares.shared_of_study(recipe, here / "cache", study) == rows
    with (study / SHARED_IMAGES).open() as file:
        assert [row["found_by"] for row in csv.DictReader(file)] == ["same bytes"]


@pytest.mark.parametrize("text", ["set,image\na,b\n", "\x00", "set,image,sample_id,distance\na,b,c,d\n"])
def test_a_damaged_list_is_named(tmp_path, text):
    (tmp_path / SHARED_IMAGES).write_text(text)
    with pytest.raises(StorageError, match=f"{SHARED_IMAGES}: must be the list of shared images"):
        shares.read_shared(tmp_path)


@pytest.mark.slow
def test_excluded_images_leave_after_part_and_shots(here):
    ids = [sample_id("train/cat/0.png"), sample_id("train/dog/3.png")]
    (here / "list.txt").write_text(f"{ids[0]}\n\n{ids[1]}\n")
    (here / "list.csv").write_text(f"why,sample_id\nblurred,{ids[0]}\ntwice,{ids[1]}\n")
    for written in (f"[{ids[0]}, {ids[1]}]", "list.txt", "list.csv"):
        source = open_train(loaded(here, f"data.train.exclude={written}"))
        assert set(open_train(loaded(here)).sample_ids.tolist()) - set(source.sample_ids.tolist()) == set(ids)
    all_shots = open_train(loaded(here, "data.train.shots=24", "data.train.exclude=list.txt"))
    assert len(all_shots) == 46


def test_what_is_wrong_with_exclude_is_told(here):
    (here / "words.txt").write_text("train/cat/0.png\n")
    for written, message in {
        "[7]": r"train\.exclude: must name images of the set by their sample ids, but got 1, such as 7",
        "nowhere.txt": r"train\.exclude: must be a text file .* No such file",
        "words.txt": r"words.txt: every line must contain a sample id, a whole number .* 'train/cat/0.png'",
    }.items():
        recipe = loaded(here, f"data.train.exclude={written}")
        with pytest.raises(DataError, match=message):
            open_source(recipe.data.train, "data.train", None)
    assert excluded_ids((3, 4), "x").tolist() == [3, 4]


# ---- copies of a picture


def drawing(code, side=224):
    """Diagonal strokes on white, one in each of ten squares, rising or falling as the bits of the code have it."""
    image = Image.new("RGB", (side, side), "white")
    draw, step = ImageDraw.Draw(image), side // 8
    for bit, (x, y) in enumerate(((2, 1), (3, 1), (4, 1), (2, 2), (4, 3), (3, 4), (2, 5), (4, 5), (5, 5), (3, 6))):
        left, right = step * x + 4, step * (x + 1) - 5
        top, bottom = (step * y + 4, step * (y + 1) - 5)[:: 1 if code >> bit & 1 else -1]
        draw.line((left, top, right, bottom), "black", 2)
    return np.asarray(image)


PICTURES = {"photo": photo(3, 227, 181), "small photo": photo(4, 48, 64), "drawing": drawing(0)}


@pytest.mark.parametrize("kind", pairs.WHOLE)
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_another_format_or_size_is_the_same(name, kind):
    original = PICTURES[name]
    assert are_one(original, np.asarray(pairs.COPIES[kind](Image.fromarray(original))))


def test_the_same_pixels_are_found_whatever_they_show():
    blank, bare = np.full((40, 40, 3), 90, np.uint8), np.full((40, 41, 3), 90, np.uint8)
    assert are_one(blank, np.asarray(pairs.resaved(Image.fromarray(blank))))
    assert not are_one(blank, bare)  # without contrast only the pixels are compared


def test_drawings_that_are_alike_are_not_one_picture():
    drawings = [drawing(code) for code in (0, 0b0000011111, 0b1111100000, 0b1111111111)]  # half differ, or all
    for one, other in itertools.combinations(drawings, 2):
        assert not are_one(one, other)


def test_other_pictures_are_far_apart_and_the_order_makes_no_difference():
    shapes = []
    for box in ((10, 10, 60, 60), (30, 40, 90, 100)):  # the same shape elsewhere on a plain ground
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).ellipse(box, fill="black")
        shapes.append(np.asarray(image))
    small = [thumbnail_of(picture)[None] for picture in (*PICTURES.values(), photo(5, 200, 160), *shapes)]
    assert [find.distances(one, one).item() for one in small] == [0] * len(small)
    for one, other in itertools.combinations(small, 2):
        assert find.LIMIT < find.distances(one, other).item() == find.distances(other, one).item()
    paler = (0.8 * PICTURES["photo"] + 20).astype(np.uint8)
    assert are_one(PICTURES["photo"], paler)  # gain and offset are taken out
    assert not are_one(PICTURES["photo"], np.roll(paler, 1, axis=2))  # colours are other ones
    grey = Image.fromarray(PICTURES["drawing"]).point([225 + level // 9 for level in range(256)] * 3)
    assert not are_one(PICTURES["drawing"], np.asarray(grey))  # a ninth of the contrast: another drawing
    assert find.distances(small[0], np.zeros_like(small[0])).item() == np.inf


def test_of_many_images_with_the_same_pixels_each_stands_in_a_pair():
    digests = [np.repeat(np.array(rows, np.uint8)[:, None], 16, axis=1) for rows in ((7, 1, 7, 7), (2, 7, 7))]
    mine, theirs = (Records(each, each, np.zeros((len(each), SIDE, SIDE, 3), np.uint8)) for each in digests)
    found, apart = find.same_pictures(mine, theirs)
    assert {*found[:, 0].tolist()} == {0, 2, 3}
    assert {*found[:, 1].tolist()} == {1, 2}
    assert (len(found), apart.max()) == (4, 0)


def test_pairs_are_the_same_in_blocks_of_any_size_and_few_for_an_image_of_which_there_are_many(monkeypatch):
    rng = np.random.default_rng(0)
    frames = [np.clip(PICTURES["photo"] + rng.integers(-3, 4, PICTURES["photo"].shape), 0, 255) for _ in range(30)]
    frames = [frame.astype(np.uint8) for frame in frames]
    mine, theirs = records_of([*frames, drawing(0)], 1), records_of([drawing(0b1111), *frames[:2]], 2)
    everything, _ = find.same_pictures(mine, theirs)
    assert np.bincount(everything[:, 1]).tolist() == [0, 30, 30]
    monkeypatch.setattr(find, "NEAREST", 8)
    found, apart = find.same_pictures(mine, theirs)
    assert {*found[:, 0].tolist()} == {*everything[:, 0].tolist()} == {*range(30)}  # each of them is in a pair
    assert len(found) <= 2 * 9 + 30  # 8 nearest and the one with the same pixels; one pair for each of the others
    assert sorted(apart.tolist())[:3] == [0, 0, apart[apart > 0].min()]
    monkeypatch.setattr(find, "_ROWS", 2)
    monkeypatch.setattr(find, "_BLOCK", 7)
    again, distances = find.same_pictures(mine, theirs)
    assert (again.tolist(), distances.tolist()) == (found.tolist(), apart.tolist())


@pytest.mark.slow
def test_all_of_230_copies_of_one_test_image_leave_the_training_set(tmp_path):
    """Copies as JPEG of many qualities and sizes; the 64 nearest alone would leave 166 in the training set."""
    copies = []
    for quality, side in itertools.product(range(72, 95), range(130, 230, 10)):
        file = io.BytesIO()
        Image.fromarray(PICTURES["photo"]).resize((side, side), Image.Resampling.BICUBIC).save(
            file, "JPEG", quality=quality
        )
        with Image.open(file) as image:
            copies.append(np.asarray(image))
    assert len(copies) == 230
    mine, theirs = records_of([*copies, photo(5, 200, 160)], 1), records_of([PICTURES["photo"]], 2)
    found, apart = find.same_pictures(mine, theirs)
    assert {*found[:, 0].tolist()} == {*range(230)}
    assert apart.max() <= find.LIMIT


def test_pairs_are_written_as_a_table_or_a_page_of_its_own(tmp_path):
    sources = [ArraySource(num_images=3, seed=seed, name=f"set {seed}") for seed in range(2)]
    for source in sources:
        source.place = f"{source.name}/<b>, {{}}.png".format
        source.pixels = source.images.__getitem__
    rows = [(1, 2, "same picture", 0.1234), (0, 0, "same bytes", 0.0), (2, 0, "same picture", 0.05)]
    of = dict(zip(("data.train", "data.id_test"), sources, strict=True))

    def image(place, index):
        return place, of[place].place(index), int(of[place].sample_ids[index]), "stays"

    pairs = [find.SharedRow(*image("data.train", i), *image("data.id_test", j), *found) for i, j, *found in rows]
    shares.write_pairs(tmp_path / "pairs.csv", pairs, of)
    ids = [pairs[0].sample_id, pairs[0].other_sample_id]
    lines = (tmp_path / "pairs.csv").read_text().splitlines()
    assert lines[0] == "set,image,sample_id,other_set,other_image,other_sample_id,found_by,distance"
    assert lines[3] == (
        f'data.train,"set 0/<b>, 1.png",{ids[0]},data.id_test,"set 1/<b>, 2.png",{ids[1]},same picture,0.1234'
    )
    assert [line.rsplit(",", 2)[1:] for line in lines[1:3]] == [["same bytes", "0.0"], ["same picture", "0.05"]]
    leaving = {pair.sample_id for pair in pairs}
    assert {*excluded_ids(str(tmp_path / "pairs.csv"), "x").tolist()} == leaving  # the table may be given to `exclude`
    shares.write_pairs(tmp_path / "none.csv", [], {})
    assert (tmp_path / "none.csv").read_text() == f"{lines[0]}\n"
    with pytest.raises(UsageError, match=r"--pairs: the name must end in \.csv or \.html, but got "):
        shares.check_pairs_path(tmp_path / "pairs.txt")
    shares.write_pairs(tmp_path / "pairs.html", pairs, of)
    page = (tmp_path / "pairs.html").read_text()
    assert page.count("<article>") == 3
    assert page.count('src="data:image/jpeg;base64,') == 6
    assert "<b>, 1" not in page
    assert "&lt;b&gt;, 1.png" in page
    assert not re.search(r"https?://", page)


# ---- a search and the commands that read its study


SHARED = 2  # of 48 and 44 images: one with the same bytes, one saved again
LEFT = {"train": 46, "id_val": 42, "sketch": 40}
LINE = f"data.train: {SHARED} images left out, also in data.id_val"


@pytest.fixture(scope="module")
def searched(tree, tmp_path_factory):
    """The study of a recipe with copies in two roles, and what its search told."""
    folder, told = tmp_path_factory.mktemp("searched") / "here", io.StringIO()
    shutil.copytree(tree, folder)
    copy(folder, "train/cat/0.png", "val/cat/x.png")
    copy(folder, "train/dog/1.png", "val/dog/y.jpg")
    with contextlib.redirect_stderr(told):
        assert call(["search", folder / "recipe.yaml", "--study", folder / "study"]) == 0
    return folder / "study", told.getvalue()


def num_images(folder):
    return [json.loads(path.read_text())["num_images"] for path in sorted(folder.glob("*/*/result.json"))]


@pytest.mark.slow
def test_a_search_leaves_copies_out_and_what_goes_on_compares_nothing_again(searched, tmp_path, run, monkeypatch):
    study, told = searched
    assert told.count(LINE) == told.count("left out") == 1
    with (study / SHARED_IMAGES).open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["found_by"] for row in rows) == {"same bytes": 1, "same picture": 1}
    assert {(row["set"], row["done"], row["other_set"]) for row in rows} == {("data.train", "leaves", "data.id_val")}
    provenance = provenance_of(log_of(study))
    assert provenance["shared_images"] == {"policy": "drop", "counts": {"data.train": {"leaves": SHARED}}}
    assert {name: one["num_images"] for name, one in provenance["data"].items()} == LEFT
    assert [*num_images(study / "trials"), *num_images(study / "baselines")] == [LEFT, LEFT]
    assert json.loads(run("report", study, "--json")[1])["shared_images"] == {"data.train": {"leaves": SHARED}}
    assert LINE in run("report", study)[1]
    assert run("export", study, "--trial", "0", "--alpha", "1", "--to", tmp_path / "model")[0] == 0
    assert LINE in (tmp_path / "model" / "README.md").read_text()
    assert run("doctor", study.parent / "recipe.yaml")[0] == 0
    resumed, before = shutil.copytree(study, tmp_path / "study"), (study / SHARED_IMAGES).read_bytes()
    monkeypatch.setattr(shares, "shared_pairs", None)  # it is not called
    name = next((study / "trials").glob("t*")).name
    assert "the same, bit for bit" in run("reproduce", study, name)[1]
    code, _, err = run("resume", resumed, "--trials", "+1")
    assert code == 0, err
    assert "left out" not in err
    assert (resumed / SHARED_IMAGES).read_bytes() == before
    assert num_images(resumed / "trials") == [LEFT, LEFT]


@pytest.mark.whole
@pytest.mark.slow
def test_confirm_trains_on_what_the_search_trained_on(searched, tmp_path, run, monkeypatch):
    study = shutil.copytree(searched[0], tmp_path / "study")
    monkeypatch.setattr(shares, "shared_pairs", None)  # it is not called
    code, _, err = run("confirm", study, "--top", "1", "--seeds", "2")
    assert code == 0, err
    again = num_images(study / "confirm")
    assert again == [LEFT] * len(again)
    shared = json.loads((study / "confirm" / "summary.json").read_text())["shared_images"]
    assert shared == {"data.train": {"leaves": SHARED}}
