"""How the images of each benchmark are listed: ImageNet and its test sets, DomainBed, WILDS, torchvision's and CIFAR.

The record of a set (``recipe.benchmarks``) names its function, which gets the root of the set, the set, the record, and
the set's place in the recipe.

- ImageNet and its test sets are trees of class folders named by wnid; ObjectNet's folders have their own names.
- DomainBed's sets are ``root/domain/class/*``, with DomainBed's own split of every domain into 80 % and 20 %.
- WILDS' sets are a table of metadata and a rule for the path of an image. Splits and rules are those of p-lambda/wilds,
  ``wilds/datasets/*_dataset.py``, with the official split scheme: ``train``, ``id_val`` and ``id_test`` are of the
  training domains, ``val`` and ``test`` of others.
- The sets of torchvision are as ``torchvision.datasets`` unpacks them, with its labels.
- CIFAR is read in its binary version: arrays of 32 x 32 pixels, mapped into memory. The Python version is a pickle,
  which may run any code when it is opened; it is not read.

What several have in common, trees of class folders and lists of images in files, comes first. All raise ``DataError``
for what is broken. ``found`` of a listing are the classes that are there; ``reader.py`` compares them with those that
should be.
"""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # its modules load when they are first used

from carft_ray.data.decode_images import CIFAR_SIDE
from carft_ray.data.formats.folder import file_listing, folders, is_image, missing_files
from carft_ray.data.listing import Listing, image_table
from carft_ray.data.table_rows import READ_ERRORS, read_columns, read_schema
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.benchmarks import Benchmark
from carft_ray.recipe.schema.data import BenchmarkSet
from carft_ray.untrusted import open_regular, parse_json, read_regular, read_text
from carft_ray.words import counted

KIND = "benchmark-1"  # changes when other images, names or labels are found
STEP = "See docs/data.md for the layout of each benchmark."
MOST_LIST_BYTES = 2**28  # of a list of images; the longest that a benchmark comes with has 40 MB
_MI_COMPRESSED = 15  # of a MATLAB file: kind of an element that zlib has packed
MOST_CIFAR_IMAGES = 1_000_000  # of a file; CIFAR's have at most 50,000
Row = tuple[str, str]  # file from the root of the set, with '/', and its class
DEVKIT = "ILSVRC2012_devkit_t12/data"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
HOLDOUT = 0.2  # DomainBed's holdout_fraction
TABLE = "metadata.csv"  # of iWildCam and Camelyon17
VAL_YEAR, TEST_YEAR = "2013", "2016"  # FMoW: first years of OOD validation and OOD test
VAL_HOSPITAL, TEST_HOSPITAL = "1", "2"  # Camelyon17
PARTITION = 1  # of DTD's ten and SUN397's ten: the one that is commonly used
BACKGROUND = "BACKGROUND_Google"  # Caltech-101: no class


def tree_rows(root: Path, prefix: str = "") -> list[Row]:
    """Returns the images in the class folders of a folder, in the order of torchvision's ``ImageFolder``.

    Args:
        root: Root of the set.
        prefix: The folder that holds the class folders, from the root; '' for the root.
    """
    rows: list[Row] = []
    for folder in folders(root / prefix):
        rows += [(f"{prefix}/{folder}/{file}".lstrip("/"), folder) for file in images_in(root / prefix / folder)]
    return rows


def images_in(folder: Path) -> list[str]:
    """Returns the sorted names of the images of a folder."""
    return sorted(filter(is_image, os.listdir(folder)))


def listing_of(root: Path, rows: Iterable[Row]) -> Listing:
    """Returns the listing of images that were found as files."""
    names, classes = zip(*sorted(rows), strict=True) if (rows := list(rows)) else ((), ())
    return file_listing(KIND, root, names, classes, sorted(set(classes)))


def listed(root: Path, rows: Iterable[Row], place: str) -> Listing:
    """Returns the listing of images that a list names.

    Raises:
        DataError: Files are not in the root, or are named twice.
    """
    rows = list(rows)
    names = sorted({name for name, _ in rows})
    problems = []
    outside = [index for index, name in enumerate(names) if ".." in name.split("/")]
    if absent := outside or missing_files(root, names):
        rule = "every image of the list must exist"
        value = f"{len(absent)} of {len(names)} that are missing in {root}, such as {names[absent[0]]}"
        problems.append(Problem(place, rule, value, next_step=STEP))
    if len(names) < len(rows):
        problems.append(Problem(place, "a list must name an image once", f"{len(rows) - len(names)} named again"))
    if problems:
        raise DataError(problems)
    return listing_of(root, rows)


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file that are not empty.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return [line.strip() for line in read_text(path, MOST_LIST_BYTES).splitlines() if line.strip()]
    except OSError as error:
        raise unreadable_list(path, error) from error


def read_json_list(path: Path) -> dict[str, list[str]]:
    """Returns a JSON file of class -> images.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    try:
        value = parse_json(read_regular(path, MOST_LIST_BYTES))
        return {str(name): [str(image) for image in images] for name, images in value.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise unreadable_list(path, error) from error


def read_matlab(path: Path, *keys: str) -> Any:
    """Returns one variable of a MATLAB file, or a field of a structure that it is: a list of its values.

    Raises:
        DataError: It cannot be read, has no such variable, or has more than ``MOST_LIST_BYTES`` without compression.
    """
    try:
        content = read_regular(path, MOST_LIST_BYTES)
        _require_few_bytes(content)
        value = scipy.io.loadmat(io.BytesIO(content), squeeze_me=True, variable_names=keys[:1])
        for key in keys:
            value = value[key]
        return [one.item() if hasattr(one, "item") else one for one in value.reshape(-1).tolist()]
    except DataError:
        raise
    except Exception as error:  # loadmat raises of every kind on damaged files
        raise unreadable_list(path, error) from error


def _require_few_bytes(content: bytes) -> None:
    """Raises ``ValueError`` for a MATLAB file whose compressed variables hold more than ``MOST_LIST_BYTES`` together.

    Elements of version 5 follow each other behind the header: kind, size, content. Files of version 4, which have a
    zero among the first four bytes, are not compressed.
    """
    tag, place, left = "<II" if content[126:128] == b"IM" else ">II", 128, MOST_LIST_BYTES
    while 0 not in content[:4] and place < len(content):
        kind, size = struct.unpack_from(tag, content, place)
        place += struct.calcsize(tag)
        if kind == _MI_COMPRESSED:
            left -= len(zlib.decompressobj().decompress(content[place : place + size], left + 1))
        if left < 0:
            raise ValueError(f"more than {MOST_LIST_BYTES:,} bytes, unpacked")
        place += size


def unreadable_list(path: Path, error: Exception) -> DataError:
    """Returns the error for a list of images that cannot be read."""
    cause = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
    return DataError(Problem(str(path), "must be the file that the benchmark comes with", cause, next_step=STEP))


def by_number(label: Any, first: int, facts: Benchmark, path: Path, image: str) -> str:
    """Returns the class of a numbered label.

    Args:
        label: The number, or a text of it.
        first: Number of the first class.
        facts: What is known of the set.
        path: File that the label stands in, for the message.
        image: What it is the label of, for the message.

    Raises:
        DataError: There is no such class.
    """
    try:
        index = int(label) - first
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(facts.classes):
        rule = f"a label must be a number from {first} to {first + len(facts.classes) - 1}"
        raise DataError(Problem(str(path), rule, f"{label} for {image}"))
    return facts.classes[index]


def fields(line: str, count: int, path: Path, separator: str | None = None) -> list[str]:
    """Returns the fields of a line of a list.

    Raises:
        DataError: There are fewer.
    """
    found = line.split(separator, count - 1)
    if len(found) < count:
        raise DataError(Problem(str(path), f"a line must have {count} fields", repr(line), next_step=STEP))
    return found


def class_tree(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``root/class/*``."""
    return listing_of(root, tree_rows(root))


def imagenet(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``train/wnid/*`` or ``val/wnid/*``; a flat ``val/*`` by the devkit's ground truth next to it."""
    rows = tree_rows(root, str(spec.split))
    images = images_in(root / "val") if spec.split == "val" and not rows else []
    if not images:
        return listing_of(root, rows)
    devkit = root / DEVKIT
    if not (devkit / TRUTH).is_file():
        rule = f"must have a folder per class in val, or {DEVKIT}/{TRUTH} next to it"
        raise DataError(Problem(place, rule, f"{counted(len(images), 'image')} without labels", next_step=STEP))
    numbers = read_lines(devkit / TRUTH)
    if len(images) != len(numbers):
        rule = f"must have one line per image of val, {len(images)}"
        raise DataError(Problem(str(devkit / TRUTH), rule, str(len(numbers))))
    keys = ("ILSVRC2012_ID", "WNID", "num_children")  # what has children is an inner node of WordNet
    nodes = zip(*(read_matlab(devkit / META, "synsets", key) for key in keys), strict=True)
    names = {str(int(number)): str(wnid) for number, wnid, children in nodes if not children}
    if absent := next((number for number in numbers if number not in names), None):
        raise DataError(Problem(str(devkit / TRUTH), f"a label must be the number of a class in {META}", absent))
    rows = [(f"val/{image}", names[number]) for image, number in zip(images, numbers, strict=True)]
    return listing_of(root, rows)


def objectnet(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists the folders that ObjectNet shares with ImageNet; the others are left out. The red frame is cut off."""
    known = set(facts.classes)
    listing = listing_of(root, [row for row in tree_rows(root) if row[1] in known])
    return replace(listing, form="framed")


def domainbed(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists the domains of a set, or the ``in`` or ``out`` part of each."""
    rows: list[Row] = []
    classes: set[str] = set()
    for domain in chosen_domains(spec, facts):
        found = tree_rows(root, domain)
        classes |= {name for _, name in found}
        if spec.split is not None:
            held_out = holdout(len(found), spec.trial_seed, facts.domains.index(domain))
            found = [row for i, row in enumerate(found) if (i in held_out) == (spec.split == "out")]
        rows += found
    return replace(listing_of(root, rows), found=tuple(sorted(classes)))  # a fifth may lack some


def chosen_domains(spec: BenchmarkSet, facts: Benchmark) -> tuple[str, ...]:
    """Returns the domains that a set names; all where it names none."""
    return spec.domains or facts.domains


def holdout(num_images: int, trial_seed: int, environment: int) -> set[int]:
    """Returns which images of a domain DomainBed holds out (its ``out`` split).

    facebookresearch/DomainBed, ``scripts/train.py`` and ``lib/misc.py`` (``split_dataset``, ``seed_hash``): the seed is
    the MD5 of the text of the pair, modulo 2**31; it shuffles the indices, and the first fifth is held out.

    Args:
        num_images: Images of the domain, in ``ImageFolder``'s order.
        trial_seed: DomainBed's ``--trial_seed``.
        environment: Position of the domain among the sorted domains.
    """
    text = str((trial_seed, environment))
    seed = int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 2**31
    order = list(range(num_images))
    np.random.RandomState(seed).shuffle(order)
    return set(order[: int(num_images * HOLDOUT)])


def fmow(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``images/rgb_img_<row>.png``: rows of the table, counted from 0 with the sequestered ones."""
    table = _columns(root / "rgb_metadata.csv", "split", "category", "timestamp")
    rows: list[Row] = []
    for index, (split, category, timestamp) in enumerate(zip(*table, strict=True)):
        year = timestamp[:4]  # 2016-01-01T00:00:00Z
        shifted = "test" if year >= TEST_YEAR else "val" if year >= VAL_YEAR else None
        own = {"train": "train", "val": "id_val", "test": "id_test"}.get(split) if shifted is None else None
        if (own or (shifted if split == shifted else None)) == spec.split:
            rows.append((f"images/rgb_img_{index}.png", category))
    return listed(root, rows, place)


def iwildcam(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``train/<filename>``, which holds the images of all splits."""
    path = root / TABLE
    table = zip(*_columns(path, "split", "filename", "y"), strict=True)
    rows = [(f"train/{file}", by_number(y, 0, facts, path, file)) for split, file, y in table if split == spec.split]
    return listed(root, rows, place)


def camelyon17(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``patches/patient_P_node_N/patch_patient_P_node_N_x_X_y_Y.png``."""
    path = root / TABLE
    rows: list[Row] = []
    names = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
    for patient, node, x, y, tumor, center, number in zip(*_columns(path, *names), strict=True):
        own = {"0": "train", "1": "id_val"}.get(number)
        if {VAL_HOSPITAL: "val", TEST_HOSPITAL: "test"}.get(center, own) == spec.split:
            folder = f"patient_{patient}_node_{node}"
            file = f"patches/{folder}/patch_{folder}_x_{x}_y_{y}.png"
            rows.append((file, by_number(tumor, 0, facts, path, file)))
    return listed(root, rows, place)


def _columns(path: Path, *names: str) -> list[list[str]]:
    """Returns columns of a CSV file as texts."""
    try:
        there = tuple(read_schema(path).names)
        if absent := [name for name in names if name not in there]:
            rule = f"must have the columns {', '.join(names)}"
            raise DataError(Problem(str(path), rule, f"no {absent[0]}", there, nearest(absent[0], there), STEP))
        table = read_columns(path, names)
    except READ_ERRORS as error:
        raise unreadable_list(path, error) from error
    return [table[name].to_pylist() for name in names]


def flowers102(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``jpg/image_00001.jpg`` by ``setid.mat`` and ``imagelabels.mat``."""
    labels_path = root / "imagelabels.mat"
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[str(spec.split)]
    labels, numbers = read_matlab(labels_path, "labels"), read_matlab(root / "setid.mat", key)
    rows: list[Row] = []
    for number in map(int, numbers):
        file = f"jpg/image_{number:05d}.jpg"
        label = labels[number - 1] if 0 < number <= len(labels) else "none"
        rows.append((file, by_number(label, 1, facts, labels_path, file)))
    return listed(root, rows, place)


def fgvc_aircraft(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``images/0034309.jpg`` by ``images_variant_<split>.txt``."""
    path = root / f"images_variant_{spec.split}.txt"
    lines = [fields(line, 2, path) for line in read_lines(path)]
    return listed(root, [(f"images/{image}.jpg", variant) for image, variant in lines], place)


def stanford_cars(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``cars_<split>/00001.jpg`` by the annotations of the devkit."""
    own = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    path = root / own[str(spec.split)]
    files, labels = (read_matlab(path, "annotations", key) for key in ("fname", "class"))
    rows = [
        (f"cars_{spec.split}/{file}", by_number(label, 1, facts, path, file))
        for file, label in zip(files, labels, strict=True)
    ]
    return listed(root, rows, place)


def food101(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``images/<class>/<number>.jpg`` by ``meta/<split>.json``."""
    lists = read_json_list(root / "meta" / f"{spec.split}.json")
    rows = [(f"images/{image}.jpg", name) for name, images in lists.items() for image in images]
    return listed(root, rows, place)


def dtd(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``images/<class>/*`` by ``labels/<split>1.txt``."""
    path = root / "labels" / f"{spec.split}{PARTITION}.txt"
    rows = [(f"images/{line}", fields(line, 2, path, "/")[0]) for line in read_lines(path)]
    return listed(root, rows, place)


def sun397(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``<letter>/<class>/*``, where a class may be two folders, or what the first partition's file names."""
    if spec.split is not None:
        path = root / f"{'Training' if spec.split == 'train' else 'Testing'}_{PARTITION:02d}.txt"
        names = [line.lstrip("/") for line in read_lines(path)]
        return listed(root, [(name, _sun_class(name)) for name in names], place)
    folders = sorted({folder.parent for folder in root.glob("?/**/sun_*.jpg")})
    names = [f"{folder.relative_to(root).as_posix()}/{file}" for folder in folders for file in images_in(folder)]
    return listing_of(root, [(name, _sun_class(name)) for name in names])


def _sun_class(name: str) -> str:
    """Returns the class of ``a/abbey/sun_1.jpg`` or ``c/church/indoor/sun_1.jpg``: the folders below the letter."""
    return "/".join(name.split("/")[1:-1])


def oxford_pets(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``images/<breed>_<number>.jpg`` by ``annotations/<split>.txt``."""
    path = root / "annotations" / f"{spec.split}.txt"
    lines = [fields(line, 2, path) for line in read_lines(path)]
    rows = [(f"images/{image}.jpg", by_number(rest.split()[0], 1, facts, path, image)) for image, rest in lines]
    return listed(root, rows, place)


def caltech101(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``<class>/image_0001.jpg``; the background is no class."""
    return listing_of(root, [row for row in tree_rows(root) if row[1] != BACKGROUND])


def cifar10(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``data_batch_1.bin`` to ``data_batch_5.bin``, or ``test_batch.bin``."""
    files = [f"data_batch_{i}" for i in range(1, 6)] if spec.split == "train" else ["test_batch"]
    return _cifar(root, files, 1, facts)


def cifar100(root: Path, spec: BenchmarkSet, facts: Benchmark, place: str) -> Listing:
    """Lists ``train.bin`` or ``test.bin``, with the fine labels."""
    return _cifar(root, [str(spec.split)], 2, facts)


def _cifar(root: Path, files: list[str], label_bytes: int, facts: Benchmark) -> Listing:
    """Lists the rows of files: the labels, the fine one last, then the red, green and blue plane."""
    row_bytes = label_bytes + 3 * CIFAR_SIDE * CIFAR_SIDE
    labels = {name: _cifar_labels(root / f"{name}.bin", row_bytes, label_bytes - 1) for name in files}
    rows = [(name, row, label) for name in files for row, label in enumerate(labels[name])]
    classes = [by_number(label, 0, facts, root / f"{name}.bin", f"image {row}") for name, row, label in rows]
    names, paths = [f"{name}/{row:05d}" for name, row, _ in rows], [f"{name}.bin" for name, *_ in rows]
    places = [row * row_bytes + label_bytes for _, row, _ in rows]
    home = str(root.resolve())
    table = image_table(names, classes, paths, home, places, [3 * CIFAR_SIDE * CIFAR_SIDE] * len(names))
    return Listing(KIND, home, table, tuple(sorted(set(classes))), str(root), form="planes")


def _cifar_labels(path: Path, row_bytes: int, position: int) -> list[int]:
    """Returns the label of each row of a file: the byte at a position of the row."""
    try:
        open_regular(path).close()
        size = path.stat().st_size
        if size // row_bytes > MOST_CIFAR_IMAGES:
            rule = f"must have at most {MOST_CIFAR_IMAGES:,} images"
            raise DataError(Problem(str(path), rule, f"{size // row_bytes:,}"))
        if not size or size % row_bytes:
            rule = f"must contain whole images of {row_bytes} bytes"
            raise DataError(Problem(str(path), rule, f"{size} bytes", next_step="Unpack the archive again."))
        rows = np.memmap(path, np.uint8, "r", shape=(size // row_bytes, row_bytes))
        return list(rows[:, position].tolist())
    except OSError as error:
        raise unreadable_list(path, error) from error
