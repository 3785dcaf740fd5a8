"""The sets of torchvision, as ``torchvision.datasets`` unpacks them, with its labels; CIFAR stands in ``cifar.py``."""

from pathlib import Path

from carft_ray.data.benchmark_sets.facts import Facts
from carft_ray.data.benchmark_sets.layouts import (
    Row,
    by_number,
    fields,
    images_in,
    listed,
    listing_of,
    read_json_list,
    read_lines,
    read_matlab,
    tree_rows,
)
from carft_ray.data.listing import Listing
from carft_ray.recipe.sets import BenchmarkSet

PARTITION = 1  # of DTD's ten and SUN397's ten: the one that is commonly used
BACKGROUND = "BACKGROUND_Google"  # Caltech-101: no class


def flowers102(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
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


def fgvc_aircraft(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``images/0034309.jpg`` by ``images_variant_<split>.txt``."""
    path = root / f"images_variant_{spec.split}.txt"
    lines = [fields(line, 2, path) for line in read_lines(path)]
    return listed(root, [(f"images/{image}.jpg", variant) for image, variant in lines], place)


def stanford_cars(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``cars_<split>/00001.jpg`` by the annotations of the devkit."""
    own = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    path = root / own[str(spec.split)]
    files, labels = (read_matlab(path, "annotations", key) for key in ("fname", "class"))
    rows = [
        (f"cars_{spec.split}/{file}", by_number(label, 1, facts, path, file))
        for file, label in zip(files, labels, strict=True)
    ]
    return listed(root, rows, place)


def food101(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``images/<class>/<number>.jpg`` by ``meta/<split>.json``."""
    lists = read_json_list(root / "meta" / f"{spec.split}.json")
    rows = [(f"images/{image}.jpg", name) for name, images in lists.items() for image in images]
    return listed(root, rows, place)


def dtd(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``images/<class>/*`` by ``labels/<split>1.txt``."""
    path = root / "labels" / f"{spec.split}{PARTITION}.txt"
    rows = [(f"images/{line}", fields(line, 2, path, "/")[0]) for line in read_lines(path)]
    return listed(root, rows, place)


def sun397(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
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


def oxford_pets(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``images/<breed>_<number>.jpg`` by ``annotations/<split>.txt``."""
    path = root / "annotations" / f"{spec.split}.txt"
    lines = [fields(line, 2, path) for line in read_lines(path)]
    rows = [(f"images/{image}.jpg", by_number(rest.split()[0], 1, facts, path, image)) for image, rest in lines]
    return listed(root, rows, place)


def caltech101(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``<class>/image_0001.jpg``; the background is no class."""
    return listing_of(root, [row for row in tree_rows(root) if row[1] != BACKGROUND])
