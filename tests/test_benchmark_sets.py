"""Public benchmarks by name: each read from its true layout, and each way of being another set told with its reason."""

import functools
import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as oracle
from layouts import DEVKIT, OBJECTNET_ONLY, cifar_batches, make_flat_val, make_layout, picture
from PIL import Image
from pydantic import TypeAdapter
from sources import open_set, recipe_of, told

from carft_ray.data.benchmarks.reader import benchmark_places, benchmark_words, num_expected
from carft_ray.data.class_names import class_names
from carft_ray.data.role_checks import check_roles
from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.schema.data import SetSpec
from carft_ray.recipe.schema.recipe import Recipe

pytestmark = pytest.mark.slow

IMAGENET = BENCHMARKS["imagenet"].classes
SPLITS = [(name, split) for name, known in BENCHMARKS.items() for split in known.splits or (None,)]
WHOLE = [(name, None) for name, known in BENCHMARKS.items() if known.splits and not known.needs_split]
COPIES = {("sun397", None): 2, ("cifar10", "train"): 5, ("fgvc-aircraft", "trainval"): 2}  # images per class


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return functools.cache(lambda name: make_layout(name, folder / name))


@pytest.fixture
def own(made, tmp_path):
    return lambda name: shutil.copytree(made(name), tmp_path / name)


def opened(root, name, split=None, class_list=None, **keys):
    class_list = IMAGENET if name == "objectnet" else class_list
    return open_set(class_list, source="benchmark", name=name, path=str(root), split=split, **keys)


def labelled(source):
    names = [source.listing.names[row] for row in source.rows.tolist()]
    return dict(zip(names, (source.class_names[label] for label in source.labels.tolist()), strict=True))


@pytest.mark.parametrize(("name", "split"), SPLITS + WHOLE)
def test_a_benchmark_is_read_with_its_own_class_list(name, split, made):
    source, facts = opened(made(name), name, split), BENCHMARKS[name]
    sizes, count = np.bincount(source.labels), len(facts.classes)
    if facts.domains:
        held_out = count // 5
        assert len(source) == {None: count, "out": held_out, "in": count - held_out}[split] * len(facts.domains)
    elif name == "iwildcam" and split != "train":
        assert np.flatnonzero(sizes).tolist() == list(range(0, 182, 7))
    else:
        assert len(source) == count * COPIES.get((name, split), 1)
        assert set(sizes.tolist()) <= {0, COPIES.get((name, split), 1)}
    if name not in ("imagenet-r", "imagenet-a"):
        assert source.class_names == (IMAGENET if name == "imagenet" or facts.within == "imagenet" else facts.classes)
    assert source.pixels(0).dtype == np.uint8
    spec = {"source": "benchmark", "name": name, "path": str(made(name)), "split": split}
    places = benchmark_places(TypeAdapter(SetSpec).validate_python(spec))
    assert all(source.place(index).startswith(tuple(places)) for index in range(len(source)))
    assert all(Path(place).is_dir() for place in places)
    assert len(np.unique(source.sample_ids)) == len(source)
    assert source.identity.startswith("benchmark-1/")


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a"])
def test_a_set_of_two_hundred_classes_is_told_apart_between_these_of_the_thousand(name, made):
    source, wnids = opened(made(name), name, class_list=IMAGENET), BENCHMARKS[name].classes
    assert source.groups == tuple((IMAGENET.index(wnid),) for wnid in wnids)
    assert labelled(source) == {file: file.split("/")[0] for file in labelled(source)}
    assert set(labelled(source).values()) == set(wnids)
    assert labelled(opened(made(name), name, class_list=IMAGENET[::-1])) == labelled(source)
    assert len(opened(made(name) / name, name)) == 200  # the folder of the images itself
    others = [wnid for wnid in IMAGENET if wnid != wnids[0]]
    assert f"in the class list, but got '{wnids[0]}'" in told(opened, made(name), name, class_list=others)


@pytest.mark.parametrize("name", ["imagenet-v2", "imagenet-sketch"])
def test_the_folders_of_imagenet_v2_are_labels_and_those_of_sketch_are_wnids(name, made):
    source = opened(made(name), name, class_list=IMAGENET)
    assert source.groups is None
    folders = [file.split("/")[0] for file in source.listing.names]
    labels = [int(folder) if name == "imagenet-v2" else IMAGENET.index(folder) for folder in folders]
    assert source.labels.tolist() == labels
    assert "got none for 'n09999999'" in told(opened, made(name), name, class_list=[*IMAGENET, "n09999999"])


def test_part_of_imagenet_is_a_set_of_some_classes(tmp_path):
    for wnid in IMAGENET[100:110]:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / f"{wnid}_1.JPEG").write_bytes(picture("x"))
    assert opened(tmp_path, "imagenet", "train", classes="some").class_names == IMAGENET[100:110]
    assert "must have an image, but got none of 'n01440764' and 989 more" in refused(tmp_path, "imagenet", "train")


def test_a_class_of_objectnet_scores_the_largest_of_its_imagenet_classes_and_its_red_frame_is_cut_off(made):
    source, facts = opened(made("objectnet"), "objectnet"), BENCHMARKS["objectnet"]
    assert (len(source.groups), sum(map(len, source.groups))) == (113, 125)
    bicycle = [label for name, label in zip(source.listing.names, source.labels, strict=True) if "bicycle/" in name]
    assert bicycle == [444]
    assert (444, 671) in source.groups  # bicycle-built-for-two, mountain bike
    assert sorted(source.groups) == sorted(facts.groups)
    assert not any(name.startswith(OBJECTNET_ONLY) for name in source.listing.names)
    whole = np.asarray(Image.open(source.place(5)).convert("RGB"))
    np.testing.assert_array_equal(source.pixels(5), whole[2:-2, 2:-2])
    assert source.content(5) == Path(source.place(5)).read_bytes()


def test_a_flat_val_of_imagenet_is_labelled_by_the_devkit(tmp_path):
    labels = np.random.default_rng(0).permutation(1000).tolist()
    make_flat_val(tmp_path, labels)
    source = opened(tmp_path, "imagenet", "val")
    assert source.labels.tolist() == labels
    assert source.listing.names[7] == "val/ILSVRC2012_val_00000008.JPEG"
    truth = tmp_path / DEVKIT / "ILSVRC2012_validation_ground_truth.txt"
    lines = truth.read_text().split()
    for written, message in (
        (["1001", *lines[1:]], "a label must be the number of a class in meta.mat, but got 1001"),
        (["tench", *lines[1:]], "a label must be the number of a class in meta.mat, but got tench"),
        (lines[:-1], "must have one line per image of val, 1000, but got 999"),
    ):
        truth.write_text("\n".join(written))
        assert message in refused(tmp_path, "imagenet", "val")
    truth.unlink()
    rule = f"train: must have a folder per class in val, or {DEVKIT}/{truth.name} next to it"
    assert f"{rule}, but got 1,000 images without labels" in refused(tmp_path, "imagenet", "val")


TORCHVISION = {
    "flowers102": (oracle.Flowers102, ("train", "val", "test"), "flowers-102"),
    "fgvc-aircraft": (oracle.FGVCAircraft, ("train", "val", "trainval", "test"), "fgvc-aircraft-2013b/data"),
    "stanford-cars": (oracle.StanfordCars, ("train", "test"), "stanford_cars"),
    "food101": (oracle.Food101, ("train", "test"), "food-101"),
    "dtd": (oracle.DTD, ("train", "val", "test"), "dtd/dtd"),
    "sun397": (oracle.SUN397, (None,), "SUN397"),
    "oxford-pets": (oracle.OxfordIIITPet, ("trainval", "test"), "oxford-iiit-pet"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_files_and_labels_are_those_of_torchvision(name, made, monkeypatch):
    kind, splits, folder = TORCHVISION[name]
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    for split in splits:
        theirs = kind(made(name), **({} if split is None else {"split": split}))
        if name == "stanford-cars":
            files, labels = zip(*theirs._samples, strict=True)
        else:
            files, labels = getattr(theirs, "_image_files", None) or theirs._images, theirs._labels
        names = [Path(file).relative_to(made(name) / folder).as_posix() for file in files]
        source = opened(made(name), name, split)
        found = [source.listing.names[row] for row in source.rows.tolist()]
        assert dict(zip(found, source.labels.tolist(), strict=True)) == dict(zip(names, map(int, labels), strict=True))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_by_torchvision(name, made, tmp_path, monkeypatch):
    """Which reads the Python version, here of the same images."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    names = ("cifar-10-batches-py", "labels", "batches.meta", "label_names", oracle.CIFAR10)
    if name == "cifar100":
        names = ("cifar-100-python", "fine_labels", "meta", "fine_label_names", oracle.CIFAR100)
    folder, labels_key, meta, classes_key, kind = names
    (tmp_path / folder).mkdir()
    classes = list(BENCHMARKS[name].classes)
    batches = cifar_batches(name, range(len(classes))).items()
    files = {file: {"data": each, labels_key: labels} for file, (each, labels) in batches}
    for file, value in {**files, meta: {classes_key: classes}}.items():
        (tmp_path / folder / file).write_bytes(pickle.dumps(value))
    for split in ("train", "test"):
        source, theirs = opened(made(name), name, split), kind(tmp_path, train=split == "train")
        assert (list(source.class_names), source.labels.tolist()) == (theirs.classes, theirs.targets)
        pixels = np.stack([source.pixels(index) for index in range(len(source))])
        np.testing.assert_array_equal(pixels, theirs.data)


YEARS = {"train": ("train", 0, 2012), "id_val": ("val", 0, 2012), "id_test": ("test", 0, 2012)}
YEARS |= {"val": ("val", 2013, 2015), "test": ("test", 2016, 9999)}


@pytest.mark.parametrize("split", YEARS)
def test_fmow_has_its_splits_by_year(split, made):
    own_split, first, last = YEARS[split]
    lines = (made("fmow") / "fmow_v1.1" / "rgb_metadata.csv").read_text().splitlines()[1:]
    expected = {
        f"images/rgb_img_{index}.png": row[2]
        for index, row in enumerate(line.split(",") for line in lines)
        if row[0] == own_split and first <= int(row[3][:4]) <= last
    }
    assert labelled(opened(made("fmow"), "fmow", split)) == expected


def test_camelyon_has_its_splits_by_hospital(made):
    patch = "patches/patient_001_node_1/patch_patient_001_node_1_x_{}_y_64.png"
    expected = {patch.format(x): label for x, label in ((0, "0"), (100, "1"))}
    assert labelled(opened(made("camelyon17"), "camelyon17", "val")) == expected


@pytest.mark.parametrize("trial_seed", [0, 2])
def test_in_and_out_are_domainbeds_images(trial_seed, tmp_path):
    """DomainBed's train.py: ImageFolder's samples, held out by a shuffle whose seed hashes (trial_seed, i)."""
    make_layout("pacs", tmp_path, per_class=4)
    for environment, domain in enumerate(BENCHMARKS["pacs"].domains):
        samples = oracle.ImageFolder(tmp_path / "PACS" / domain).samples
        names = [Path(path).relative_to(tmp_path / "PACS").as_posix() for path, _ in samples]
        seed = int(hashlib.md5(str((trial_seed, environment)).encode("utf-8")).hexdigest(), 16) % (2**31)
        np.random.RandomState(seed).shuffle(names)
        n = int(len(names) * 0.2)
        theirs = {"out": {*names[:n]}, "in": {*names[n:]}}
        for split, names in theirs.items():
            ours = opened(tmp_path, "pacs", split, domains=[domain], trial_seed=trial_seed)
            assert set(labelled(ours)) == names
    assert [len(names) for names in theirs.values()] == [5, 23]
    rule = "train.domains: must be a domain of PACS, but got 'foto'; did you mean 'photo'?"
    assert refused(tmp_path, "pacs", domains=["foto"]).startswith(rule)


SHARED = [
    ("food101", {"split": "train"}, {"split": "train"}, 1),
    ("food101", {"split": "train", "part": [0.1, 1]}, {"split": "train", "part": [0, 0.1]}, 0),
    ("fgvc-aircraft", {"split": "trainval"}, {"split": "test"}, 0),
    ("fgvc-aircraft", {"split": "trainval"}, {"split": "val"}, 1),
    ("sun397", {}, {"split": "test"}, 1),
    ("pacs", {"split": "in"}, {"split": "out", "trial_seed": 1}, 1),
    ("pacs", {"split": "in"}, {}, 1),
    ("pacs", {"domains": ["photo"]}, {"domains": ["sketch"]}, 0),
]


@pytest.mark.parametrize(("name", "first", "second", "num_problems"), SHARED)
def test_splits_of_one_benchmark_are_images_of_their_own(name, first, second, num_problems, made):
    sets = [{"source": "benchmark", "name": name, "path": str(made(name)), **one} for one in (first, second)]
    assert len(check_roles(recipe_of({"train": sets[0], "id_val": sets[1]}))) == num_problems


def test_the_same_folder_is_the_same_images(made):
    folder = {"source": "folder", "path": f"{made('pacs')}/PACS", "domains": ["photo"]}
    named = opened(made("pacs"), "pacs", domains=["photo"])
    np.testing.assert_array_equal(np.sort(open_set(**folder).sample_ids), np.sort(named.sample_ids))
    train = {"source": "benchmark", "name": "pacs", "path": str(made("pacs"))}
    (problem,) = check_roles(recipe_of({"train": train, "id_val": folder}))
    assert "must not share images with data.train" in str(problem)


NUMBERS = [
    ({"name": "imagenet", "split": "val"}, 50_000),
    ({"name": "pacs", "domains": ["photo", "sketch"], "split": "out"}, 334 + 785),
    ({"name": "pacs"}, 9991),
    ({"name": "pacs", "part": [0, 0.5]}, None),
    ({"name": "pacs", "shots": 4}, None),
    ({"name": "imagenet", "split": "train", "classes": "some"}, None),
    ({"name": "terra-incognita"}, None),  # two versions are around
]


@pytest.mark.parametrize(("keys", "number"), NUMBERS)
def test_the_number_of_images_is_known_where_sources_agree(keys, number):
    assert num_expected(TypeAdapter(SetSpec).validate_python({"source": "benchmark", "path": "x", **keys})) == number


def test_words_come_from_the_benchmark_by_class_and_not_by_position(made):
    def words(name, split, classes=None, **prompts):
        spec = {"source": "benchmark", "name": name, "path": str(made(name)), "split": split}
        data = {"train": {**spec, "part": [0, 0.5]}, "id_val": {**spec, "part": [0.5, 1]}, "classes": classes}
        return class_names(Recipe.model_validate({"data": data, "prompts": prompts}))

    imagenet = words("imagenet", "val")
    assert (imagenet[0], len(imagenet), len(set(imagenet))) == ("tench", 1000, 998)
    assert words("pacs", None)[-1] == "person"
    chosen = ["n01443537", "n01440764"]
    assert words("imagenet", "val", chosen, class_names="imagenet") == ("goldfish", "tench")
    assert benchmark_words("imagenet-r")["n01443537"] == "goldfish"
    twins = {name: word for name, word in benchmark_words("iwildcam").items() if "mazama temama" in name}
    assert twins == dict.fromkeys(("mazama temama", "mazama temama (181)"), "central american red brocket")
    assert benchmark_words("imagenet-v2")["n01440764"] == "tench"
    assert "but pacs has none 'n01443537'" in told(words, "imagenet", "val", chosen, class_names="pacs")


def refused(root, name, split=None, **keys):
    return told(opened, root, name, split, class_list=IMAGENET if name.startswith("imagenet-") else None, **keys)


def removed(name):
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def edited(name, old, new):
    def edit(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return edit


def copied(name, new):
    return lambda root: shutil.copytree(root / name, (root / name).with_name(new))


def written(name, content):
    return lambda root: (root / name).write_bytes(content)


CIFAR, OWN_FILE = "cifar-10-batches-bin", "must be the file that the benchmark comes with"
FOOD_LIST, PETS_LIST = "food-101/meta/train.json", "oxford-iiit-pet/annotations/test.txt"
# benchmark, split, what is done to its files, the message
BROKEN = [
    ("imagenet-r", None, removed("imagenet-r/n01443537"), "must have an image, but got none of 'n01443537'"),
    ("imagenet-r", None, copied("imagenet-r/n01443537", "n01440764"), "and no other, but got 'n01440764'"),
    ("office-home", None, copied("office_home/Art/Alarm_Clock", "Alarm_Clok"), "but got 'Alarm_Clok'; did you mean"),
    ("food101", "train", lambda root: (root / "food-101").rename(root / "food"), "meta/train.json must be in it, but"),
    ("food101", "test", removed("food-101/images/waffles/1000.jpg"), "but got 1 of 101 that are missing in"),
    ("food101", "train", edited(FOOD_LIST, '"waffles/0"', '"../images/waffles/0"'), "such as images/../images/waf"),
    ("food101", "train", edited(FOOD_LIST, '"waffles/0"', '"sushi/0"'), "name an image once, but got 1 named again"),
    ("food101", "train", edited(FOOD_LIST, "{", "["), f"{FOOD_LIST}: {OWN_FILE}, but got JSONDecodeError"),
    ("oxford-pets", "test", edited(PETS_LIST, " 37 ", " 38 "), "from 1 to 37, but got 38 for Yorkshire_Terrier_100"),
    ("oxford-pets", "test", edited(PETS_LIST, "_100 1 1 1", ""), "a line must have 2 fields, but got 'Abyssinian'"),
    ("iwildcam", "val", edited("iwildcam_v2.0/metadata.csv", "val,1,2,175", "val,1,2,182"), "0 to 181, but got 182"),
    ("camelyon17", "val", edited("camelyon17_v1.0/metadata.csv", "center", "centre"), "got no center; did you mean"),
    ("flowers102", "train", written("flowers-102/imagelabels.mat", b"x"), f"imagelabels.mat: {OWN_FILE}, but got"),
    ("cifar10", "test", written(f"{CIFAR}/test_batch.bin", bytes([10]) + bytes(3072)), "to 9, but got 10 for image 0"),
    ("cifar100", "test", written("cifar-100-binary/test.bin", bytes(9)), "whole images of 3074 bytes, but got 9 bytes"),
    ("cifar10", "train", removed(f"{CIFAR}/data_batch_3.bin"), f"data_batch_3.bin: {OWN_FILE}, but got No such file"),
    ("cifar10", "test", lambda root: [path.rename(path.with_suffix("")) for path in (root / CIFAR).glob("*.bin")],
     "Unpack the archive of the binary version, cifar-10-binary.tar.gz; the Python version, a pickle, is not read."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "split", "break_it", "message"), BROKEN)
def test_a_broken_benchmark_is_told_with_its_reason(name, split, break_it, message, own):
    root = own(name)
    break_it(root)
    text = refused(root, name, split)
    assert message in text
    assert text.count("\n") <= 1, "one problem, one next step"
