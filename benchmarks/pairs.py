"""Copies among images: found or not, and at what cost. ``python -m benchmarks.pairs [FOLDER [CSV]]``

FOLDER holds images as DOMAIN/CLASS/FILE. Without it the images are those of the sandbox, which are synthetic.

    copies   Of some images of each domain, copies of eight kinds are made. They are compared with all images of the
             domain, as two roles are before a search. A copy is found if it makes a pair with its original; a pair
             with another image is printed.
    pairs    The pairs of CSV (columns first, second, same_picture: yes or no; paths below FOLDER). Each is put in two
             roles. No pair marked "no" may be found.
    pass     All images once, in two roles of half of them each, with an empty cache. Wall time and CPU time are told as
             multiples of those in which Pillow decodes the same files with as many threads. Pairs that are found here
             and are not in CSV are printed: look at them.

The comparison is ``find.shared_pairs``, which `search` and `doctor` call. Exit code 1: a pair marked "no" is
found, a copy that is a PNG, a JPEG or of another size is not, or the pass takes more than ``MOST_TIMES``.
"""

import argparse
import csv
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from carft_ray.data.decode_images import decode_image
from carft_ray.data.duplicates.find_duplicates import SharedRow, shared_pairs
from carft_ray.data.formats.folder import folders, is_image
from carft_ray.data.sandbox import DOMAINS, SandboxSource
from carft_ray.data.source import reading_threads
from carft_ray.recipe.schema.recipe import Recipe

MOST_TIMES = 3.0  # of Pillow's decoding
BORDER, MARGIN = 0.06, 0.05  # of the shorter side; of each side
MARK = "(c) example"
CHUNK = 16  # files of a task
HALVES = ((0, 0.5), (0.5, 1))

Change = Callable[[Image.Image], Image.Image]


def resaved(image: Image.Image, form: str = "PNG", **settings: int) -> Image.Image:
    """Returns an image as it is read from a file of another format."""
    content = io.BytesIO()
    image.save(content, form, **settings)
    return Image.open(content).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    """Returns an image at another size."""
    return image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image) -> Image.Image:
    """Cuts off ``MARGIN`` of each side."""
    x, y = round(MARGIN * image.width), round(MARGIN * image.height)
    return image.crop((x, y, image.width - x, image.height - y))


def bordered(image: Image.Image) -> Image.Image:
    """Lays a border around: white if the first line of pixels is dark, else black."""
    colour = "white" if np.asarray(image.convert("L"))[0].mean() < 128 else "black"
    return ImageOps.expand(image, max(1, round(BORDER * min(image.size))), fill=colour)


def marked(image: Image.Image) -> Image.Image:
    """Writes a text over a third of the width into the lower right corner, white with a black outline."""
    copy = image.copy()
    draw, size = ImageDraw.Draw(copy), 1.0
    while draw.textlength(MARK, font=ImageFont.load_default(size + 1)) <= image.width / 3:
        size += 1
    place, font = (0.97 * image.width, 0.97 * image.height), ImageFont.load_default(size)
    draw.text(place, MARK, "white", font, "rb", stroke_width=max(1, round(size / 10)), stroke_fill="black")
    return copy


WHOLE: dict[str, Change] = {  # all of these are to be found
    "PNG": resaved,
    "JPEG 90": lambda image: resaved(image, "JPEG", quality=90),
    "JPEG 75": lambda image: resaved(image, "JPEG", quality=75),
    "half size": lambda image: resized(image, 0.5),
    "double size": lambda image: resized(image, 2),
}
COPIES = WHOLE | {"5 % margin off": cropped, "border": bordered, "small watermark": marked}


def write_sandbox(root: Path, num_per_class: int) -> None:
    """Writes images of all domains of the sandbox as DOMAIN/CLASS/NUMBER.png."""
    for domain in DOMAINS:
        source = SandboxSource(domain, "val", num_per_class, domain)
        for index in range(len(source)):
            path = root / domain / source.class_names[int(source.labels[index])] / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.pixels(index)).save(path)


def link_images(root: Path, into: Path, most: int | None) -> dict[str, list[str]]:
    """Links images of a folder into another; returns their paths below it by domain.

    Args:
        root: The folder, DOMAIN/CLASS/FILE.
        into: The other, which is empty.
        most: Images of a domain, drawn at random; None: all.
    """
    found: dict[str, list[str]] = {}
    for domain in folders(root):
        paths = sorted(path for path in (root / domain).glob("*/*") if is_image(path.name))
        drawn = np.sort(np.random.default_rng(0).permutation(len(paths))[:most])
        found[domain] = [paths[index].relative_to(root).as_posix() for index in drawn.tolist()]
        for name in found[domain]:
            link(root / name, into / name)
    return found


def link(path: Path, there: Path) -> None:
    """Makes a link to a file, and the folder of the link."""
    there.parent.mkdir(parents=True, exist_ok=True)
    there.symlink_to(path.absolute())


def pairs_of(train: dict[str, object], id_val: dict[str, object], cache: Path) -> list[SharedRow]:
    """Returns the pairs of two folders of images, as a search finds them."""
    sets = {"train": {"source": "folder", **train}, "id_val": {"source": "folder", **id_val}}
    recipe = Recipe.model_validate({"data": sets, "train": {"batch_size": 2}})
    return shared_pairs(recipe, cache)[0]


def copies_found(root: Path, domain: str, names: Sequence[str], num: int, work: Path) -> dict[str, float]:
    """Returns the shares of copies of a domain that are found, by kind, and prints pairs with other images."""
    shares = {}
    drawn = np.sort(np.random.default_rng(1).permutation(len(names))[:num]).tolist()
    for kind, change in COPIES.items():
        folder = work / "copies" / domain
        for index in drawn:
            path = folder / kind / f"{index}.{'jpg' if 'JPEG' in kind else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(decode_image((root / names[index]).read_bytes(), names[index]))
            if "JPEG" in kind:
                image.save(path, quality=int(kind.removeprefix("JPEG ")))
            else:
                change(image).save(path)
        where: dict[str, object] = {"path": str(work / "copies"), "domains": [domain]}
        found = set()
        for pair in pairs_of({"path": str(root), "domains": [domain]}, where, work / "cache"):
            original = names[int(Path(pair.other_image).stem)]
            if pair.image.endswith(original):
                found.add(original)
            else:
                print(f"  {kind} of {original} and {pair.image}: distance {pair.distance:.4f}")
        shares[kind] = len(found) / len(drawn)
        for path in (folder / kind).iterdir():
            path.unlink()
        (folder / kind).rmdir()
    return shares


def labelled(root: Path, labels: Path, work: Path) -> list[tuple[str, str, str, float | None]]:
    """Returns the pairs of a CSV file: first, second, same_picture, and the distance at which a pair was found."""
    with open(labels, newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        for side in ("first", "second"):
            link(root / row[side], work / "labels" / side / "x" / f"{number}{Path(row[side]).suffix}")
    sides: list[dict[str, object]] = [{"path": str(work / "labels"), "domains": [side]} for side in ("first", "second")]
    pairs = pairs_of(sides[0], sides[1], work / "cache")
    found = {
        Path(pair.image).stem: pair.distance for pair in pairs if Path(pair.image).stem == Path(pair.other_image).stem
    }
    return [(row["first"], row["second"], row["same_picture"], found.get(str(i))) for i, row in enumerate(rows)]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Returns the wall time and the CPU time of a call, seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def decode_all(paths: Sequence[Path]) -> None:
    """Decodes files with Pillow, with as many threads as a set is read."""

    def decode(some: Sequence[Path]) -> None:
        for path in some:
            with Image.open(path) as image:
                image.load()

    with ThreadPoolExecutor(reading_threads()) as pool:
        list(pool.map(decode, [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]))


def passed_over(root: Path, names: Sequence[str], work: Path) -> tuple[list[SharedRow], list[tuple[float, float]]]:
    """Returns the pairs of two halves of all images, and the times of Pillow, of the pass, and of Pillow again."""
    paths, pairs = [root / name for name in names], list[SharedRow]()
    both: list[dict[str, object]] = [{"path": str(root), "domains": folders(root), "part": p} for p in HALVES]
    before = [timed(lambda: decode_all(paths)) for _ in range(2)][1]  # the first one fills the cache of files
    own = timed(lambda: pairs.extend(pairs_of(both[0], both[1], work / "empty")))
    return pairs, [before, own, timed(lambda: decode_all(paths))]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description="Copies among images.")
    parser.add_argument("folder", nargs="?", type=Path, help="DOMAIN/CLASS/FILE; without it the sandbox (synthetic)")
    parser.add_argument("labels", nargs="?", type=Path, help="CSV file of pairs: first, second, same_picture")
    parser.add_argument("--copies", type=int, default=100, help="of each kind and domain; 0: none (%(default)s)")
    parser.add_argument("--images", type=int, help="images of each domain, drawn at random (all)")
    parser.add_argument("--per-class", type=int, default=20, help="images of each class of the sandbox (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is no folder")
    is_good = True
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = arguments.folder
        if folder is None:
            folder = work / "sandbox"
            write_sandbox(folder, arguments.per_class)
        domains = link_images(folder, work / "images", arguments.images)
        print(f"{'synthetic: sandbox' if arguments.folder is None else folder}, {os.cpu_count()} CPUs")

        rows = [] if arguments.labels is None else labelled(folder, arguments.labels, work)
        for mark in ("yes", "no"):
            distances = [row[3] for row in rows if row[2] == mark]
            found = sum(distance is not None for distance in distances)
            print(f"pairs marked {mark!r}: {found} of {len(distances)} found")
            is_good &= mark == "yes" or found == 0
        for first, second, mark, distance in rows:
            if (distance is None) == (mark == "yes"):
                print(f"  {mark}: {first} and {second}: {'not found' if distance is None else f'{distance:.4f}'}")

        names = [name for some in domains.values() for name in some]
        pairs, times = passed_over(work / "images", names, work)
        known = {frozenset(row[:2]): row[2] for row in rows}
        begin = str(work / "images") + "/"
        print(f"pass: {len(names)} images, {len(pairs)} pairs")
        for pair in sorted(pairs, key=lambda pair: pair.distance):
            ends = [name.removeprefix(begin) for name in (pair.image, pair.other_image)]
            mark = known.get(frozenset(ends), "look at them")
            is_good &= mark != "no"
            print(f"  {mark}: {ends[0]} and {ends[1]}: {pair.found_by}, {pair.distance:.4f}")
        for what, k in (("wall", 0), ("CPU", 1)):
            pillow = (times[0][k] + times[2][k]) / 2
            is_good &= times[1][k] <= MOST_TIMES * pillow
            print(f"{what}: {times[1][k]:.2f} s, Pillow {pillow:.2f} s, {times[1][k] / pillow:.2f} times")

        if arguments.copies:
            print(
                f"copies found, %, {arguments.copies} of each kind and domain\n" + " | ".join(["", "domain", *COPIES])
            )
        for domain, some in domains.items() if arguments.copies else ():
            shares = copies_found(work / "images", domain, some, arguments.copies, work)
            print(" | ".join(["", domain, *(f"{100 * share:.1f}" for share in shares.values())]), flush=True)
            is_good &= all(shares[kind] == 1 for kind in WHOLE)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
