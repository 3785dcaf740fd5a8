"""ImageNet and its test sets: trees of class folders named by wnid; ObjectNet's folders by their own names."""

from dataclasses import replace
from pathlib import Path

from carft_ray.data.benchmark_sets.facts import Facts
from carft_ray.data.benchmark_sets.layouts import STEP, images_in, listing_of, read_lines, read_matlab, tree_rows
from carft_ray.data.images import decode_image
from carft_ray.data.listing import Listing
from carft_ray.data.source import PixelArray
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.sets import BenchmarkSet
from carft_ray.words import counted

DEVKIT = "ILSVRC2012_devkit_t12/data"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
BORDER = 2  # pixels of ObjectNet's red frame


def class_tree(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``root/class/*``."""
    return listing_of(root, tree_rows(root))


def imagenet(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``train/wnid/*`` or ``val/wnid/*``; a flat ``val/*`` by the devkit's ground truth beside it."""
    rows = tree_rows(root, str(spec.split))
    images = images_in(root / "val") if spec.split == "val" and not rows else []
    if not images:
        return listing_of(root, rows)
    devkit = root / DEVKIT
    if not (devkit / TRUTH).is_file():
        rule = f"must have a folder per class in val, or {DEVKIT}/{TRUTH} beside it"
        raise DataError(Problem(place, rule, f"{counted(len(images), 'image')} without labels", next_step=STEP))
    numbers = read_lines(devkit / TRUTH)
    if len(images) != len(numbers):
        rule = f"must have one line per image of val, {len(images)}"
        raise DataError(Problem(str(devkit / TRUTH), rule, str(len(numbers))))
    keys = ("ILSVRC2012_ID", "WNID", "num_children")  # what has children is an inner node of WordNet
    nodes = zip(*(read_matlab(devkit / META, "synsets", key) for key in keys), strict=True)
    names = {int(number): str(wnid) for number, wnid, children in nodes if not children}
    if absent := next((number for number in numbers if int(number) not in names), None):
        raise DataError(Problem(str(devkit / TRUTH), f"a label must be the number of a class in {META}", absent))
    rows = [(f"val/{image}", names[int(number)]) for image, number in zip(images, numbers, strict=True)]
    return listing_of(root, rows)


def objectnet(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists the folders that ObjectNet shares with ImageNet; the others are left out. The red frame is cut off."""
    known = set(facts.classes)
    listing = listing_of(root, [row for row in tree_rows(root) if row[1] in known])

    def decode(content: bytes, index: int) -> PixelArray:
        place = listing.place(index)
        pixels = decode_image(content, place)
        if min(pixels.shape[:2]) <= 2 * BORDER:
            value = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
            raise DataError(Problem(place, f"must be larger than its frame of {BORDER} pixels", value))
        return pixels[BORDER:-BORDER, BORDER:-BORDER]

    return replace(listing, decode=decode)
