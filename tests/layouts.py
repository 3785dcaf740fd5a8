"""Public benchmarks in their true layouts, with tiny images: every file that a reader of the real ones needs."""

import json
import zlib

import numpy as np
from layouts_tables import encoded
from scipy.io import savemat

from carft_ray.recipe.benchmarks import BENCHMARKS

DEVKIT = "ILSVRC2012_devkit_t12/data"
OBJECTNET_ONLY = ("air_freshener", "baby_trap")  # folders that ImageNet has no class for
FMOW_DAYS = [("train", "2010-05-01T00:00:00Z"), ("val", "2012-12-31T23:59:59Z"), ("val", "2013-01-01T00:00:00Z")]
FMOW_DAYS += [("test", "2011-05-01T00:00:00Z"), ("test", "2016-01-01T00:00:00Z")]
CAMELYON = (("0", "0"), ("3", "1"), ("1", "0"), ("2", "1"))  # hospital, and the number of its split


def make_layout(name, root, per_class=1):
    """Writes a benchmark under a folder as its archives unpack there; so many images per class, and domain or split."""
    root.mkdir(parents=True, exist_ok=True)
    facts = BENCHMARKS[name]
    images = [(label, word, index) for label, word in enumerate(facts.classes) for index in range(per_class)]
    _MAKERS[name](root, facts, images)
    return root


def picture(name, kind="JPEG", side=8):
    pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(pixels, kind, quality=95)


def _save(path, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    name = "/".join(path.parts[-4:])  # set, domain or split, class, file
    path.write_bytes(picture(name, "PNG" if path.suffix == ".png" else "JPEG", side))


def _tree(root, images, pattern, side=8):
    """Writes a folder of each class; of an image its label, class, and number within the class are known."""
    for _, name, index in images:
        _save(root / name / pattern.format(name=name, index=index), side)


def _write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _imagenet(root, facts, images):
    _tree(root / "train", images, "{name}_{index}.JPEG")
    _tree(root / "val", images, "ILSVRC2012_val_{name}{index}.JPEG")


def make_flat_val(root, labels):
    """Writes ImageNet's flat ``val`` and the devkit beside it; label i of the class list for image i.

    The devkit numbers the classes in another order, and has inner nodes of WordNet too.
    """
    classes = BENCHMARKS["imagenet"].classes
    ids = {name: number for number, name in enumerate(reversed(classes), start=1)}
    for index in range(len(labels)):
        _save(root / "val" / f"ILSVRC2012_val_{index + 1:08d}.JPEG")
    truth = root / DEVKIT / "ILSVRC2012_validation_ground_truth.txt"
    _write_lines(truth, [str(ids[classes[label]]) for label in labels])
    rows = [(number, name, "words", "gloss", 0) for name, number in ids.items()] + [(1001, "n00001740", "all", "", 3)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    savemat(root / DEVKIT / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})


def _by_folder(folder, pattern, more=(), side=8):
    """A folder of the images of each class, in one of each domain where there are any, and further folders."""

    def make(root, facts, images):
        others = [(None, name, 0) for name in more]
        for domain in facts.domains or ("",):
            _tree(root / folder / domain, [*images, *others], pattern, side)

    return make


def _fmow(root, facts, images):
    rows = [(facts.classes[0], "seq", "2016-05-01T00:00:00Z")]  # sequestered: not among the images
    rows += [(name, own, day) for own, day in FMOW_DAYS for _, name, _ in images]
    rows.append((facts.classes[0], "train", "2014-01-01T00:00:00Z"))  # of no split
    lines = ["split,img_path,category,timestamp,country_code"]
    for index, (name, split, day) in enumerate(rows):
        lines.append(f"{split},x/{name}_{index}.tif,{name},{day},FRA")
        if split != "seq":
            _save(root / "fmow_v1.1" / "images" / f"rgb_img_{index}.png")
    _write_lines(root / "fmow_v1.1" / "rgb_metadata.csv", lines)


def _iwildcam(root, facts, images):
    lines = ["split,location_remapped,sequence_remapped,y,datetime,filename"]
    for split in ("train", "val", "test", "id_val", "id_test"):
        for label, _, index in images:
            if split == "train" or label % 7 == 0:  # the other splits lack many species
                file = f"{split}{label}-{index}.jpg"
                lines.append(f"{split},1,2,{label},2013-05-01 00:00:00.000,{file}")
                _save(root / "iwildcam_v2.0" / "train" / file)
    _write_lines(root / "iwildcam_v2.0" / "metadata.csv", lines)


def _camelyon17(root, facts, images):
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for hospital, number in CAMELYON:
        for tumor, _, index in images:
            patient, x = f"00{hospital}", 100 * tumor + index
            lines.append(f"{len(lines) - 1},{patient},1,{x},64,{tumor},{hospital},{hospital},{number}")
            folder = f"patient_{patient}_node_1"
            _save(root / "camelyon17_v1.0" / "patches" / folder / f"patch_{folder}_x_{x}_y_64.png")
    _write_lines(root / "camelyon17_v1.0" / "metadata.csv", lines)


def cifar_batches(name, labels):
    """Returns for each file of CIFAR the pixels, uint8 [N, 3072], and these labels in another order, a list."""
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if name == "cifar10" else ["train", "test"]
    rng = np.random.default_rng(0)
    return {
        file: (rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8), rng.permutation(labels).tolist())
        for file in files
    }


def _cifar(root, facts, images):
    """Writes the binary version: per image the label (CIFAR-100: the coarse one before it) and 3072 bytes."""
    ten, own = len(facts.classes) == 10, [label for label, *_ in images]
    folder = root / ("cifar-10-batches-bin" if ten else "cifar-100-binary")
    folder.mkdir()
    for file, (pixels, labels) in cifar_batches("cifar10" if ten else "cifar100", own).items():
        heads = [[label] if ten else [0, label] for label in labels]
        (folder / f"{file}.bin").write_bytes(np.hstack([np.array(heads, np.uint8), pixels]).tobytes())
    _write_lines(folder / ("batches.meta.txt" if ten else "fine_label_names.txt"), [*facts.classes, *[""] * ten])


def _flowers102(root, facts, images):
    folder = root / "flowers-102"
    labels, parts = [], {"trnid": [], "valid": [], "tstid": []}
    for key in parts:
        for label, *_ in images:
            labels.append(label + 1)
            parts[key].append(len(labels))
            _save(folder / "jpg" / f"image_{len(labels):05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {key: np.array([numbers], np.uint16) for key, numbers in parts.items()})


def _fgvc_aircraft(root, facts, images):
    data = root / "fgvc-aircraft-2013b" / "data"
    lists = {"train": [], "val": [], "test": []}
    for lines in lists.values():
        for _, name, _ in images:
            number = f"{sum(map(len, lists.values())) + 34309:07d}"
            lines.append(f"{number} {name}")
            _save(data / "images" / f"{number}.jpg")
    lists["trainval"] = lists["train"] + lists["val"]
    for split, lines in lists.items():
        _write_lines(data / f"images_variant_{split}.txt", lines)
    _write_lines(data / "variants.txt", facts.classes)


def _stanford_cars(root, facts, images):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    kinds = [(key, "O") for key in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for split, file in files.items():
        rows = []
        for label, *_ in images:
            rows.append((1, 2, 3, 4, label + 1, f"{len(rows) + 1:05d}.jpg"))
            _save(folder / f"cars_{split}" / rows[-1][-1])
        savemat(folder / file, {"annotations": np.array(rows, dtype=kinds).reshape(1, -1)})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([list(facts.classes)], dtype=object)})


def _food101(root, facts, images):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for start, split in ((0, "train"), (1000, "test")):
        lists = {name: [] for name in facts.classes}
        for _, name, index in images:
            lists[name].append(f"{name}/{start + index}")
            _save(folder / "images" / f"{lists[name][-1]}.jpg")
        (folder / "meta" / f"{split}.json").write_text(json.dumps(lists))


def _dtd(root, facts, images):
    folder = root / "dtd" / "dtd"
    for start, split in ((1, "train"), (100, "val"), (200, "test")):
        lines = [f"{name}/{name}_{start + index:04d}.jpg" for _, name, index in images]
        _write_lines(folder / "labels" / f"{split}1.txt", lines)
        for line in lines:
            _save(folder / "images" / line)


def _sun397(root, facts, images):
    folder = root / "SUN397"
    _write_lines(folder / "ClassName.txt", [f"/{name[0]}/{name}" for name in facts.classes])
    for part in ("Training", "Testing"):
        lines = [f"/{name[0]}/{name}/sun_{part[1]}{index:014d}.jpg" for _, name, index in images]
        _write_lines(folder / f"{part}_01.txt", lines)
        for line in lines:
            _save(folder / line[1:])


def _oxford_pets(root, facts, images):
    folder = root / "oxford-iiit-pet"
    for start, split in ((1, "trainval"), (100, "test")):
        lines = []
        for label, name, index in images:
            image = f"{name.replace(' ', '_')}_{start + index}"
            lines.append(f"{image} {label + 1} 1 1")
            _save(folder / "images" / f"{image}.jpg")
        _write_lines(folder / "annotations" / f"{split}.txt", lines)


_MAKERS = {
    "imagenet": _imagenet,
    "imagenet-v2": _by_folder("imagenetv2-matched-frequency-format-val", "{index:040x}.jpeg"),
    "imagenet-r": _by_folder("imagenet-r", "art_{index}.jpg"),
    "imagenet-a": _by_folder("imagenet-a", "0.00{index}_x.jpg"),
    "imagenet-sketch": _by_folder("sketch", "sketch_{index}.JPEG"),
    "objectnet": _by_folder("objectnet-1.0/images", "{index:013x}.png", OBJECTNET_ONLY, side=10),
    "pacs": _by_folder("PACS", "pic_{index:03d}.jpg"),
    "vlcs": _by_folder("VLCS", "pic_{index:03d}.jpg"),
    "office-home": _by_folder("office_home", "pic_{index:03d}.jpg"),
    "terra-incognita": _by_folder("terra_incognita", "pic_{index:03d}.jpg"),
    "domain-net": _by_folder("domain_net", "pic_{index:03d}.jpg"),
    "fmow": _fmow,
    "iwildcam": _iwildcam,
    "camelyon17": _camelyon17,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "flowers102": _flowers102,
    "fgvc-aircraft": _fgvc_aircraft,
    "stanford-cars": _stanford_cars,
    "food101": _food101,
    "dtd": _dtd,
    "sun397": _sun397,
    "oxford-pets": _oxford_pets,
    "caltech101": _by_folder("caltech101/101_ObjectCategories", "image_{index:04d}.jpg", ("BACKGROUND_Google",)),
}
