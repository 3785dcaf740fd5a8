"""How many copies of images are found, and whether what is found are copies: ``python -m benchmarks.pairs [FOLDER]``

Of the images of each domain (folders of FOLDER, or the sandbox's domains, which are synthetic) some are drawn, and of
each copies of eight kinds are made. A set of copies is compared with all images of its domain, as two roles are before
a search: a copy is found when it makes a pair with its original. The first number is what thumbnails alone found before
pictures were compared twice: those of the whole picture at most ``ALONE`` apart.

Every other pair is printed: between two originals, and between a copy and another original. On the sandbox none of them
is right. Of a folder, ``--labels`` says which are: a CSV file with the columns first, second and same_picture (yes or
no). A pair that it does not have is not judged: inspect the two images.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from carft_ray.data.content import DIGEST_BYTES
from carft_ray.data.copies.find import candidates, distances
from carft_ray.data.formats.folder import folders, is_image
from carft_ray.data.images import decode_image
from carft_ray.data.records import Records, thumbnails_of
from carft_ray.data.same_picture import LIMIT, grey_picture, picture_distance
from carft_ray.data.source import PixelArray
from carft_ray.data.synthetic.sandbox import DOMAINS, sandbox_source

ALONE = 0.15
BORDER = 0.06  # of the shorter side
MARGIN = 0.05  # of each side
MARK = "(c) example"
MARK_WIDTH = 1 / 3  # of the width

Change = Callable[[Image.Image], Image.Image]


def _saved(ending: str, quality: int | None = None) -> Change:
    def change(image: Image.Image) -> Image.Image:
        content = io.BytesIO()
        image.save(content, ending, **({} if quality is None else {"quality": quality}))
        return Image.open(content).convert("RGB")

    return change


def _resized(factor: float) -> Change:
    def change(image: Image.Image) -> Image.Image:
        return image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.BICUBIC)

    return change


def _cropped(image: Image.Image) -> Image.Image:
    x, y = round(MARGIN * image.width), round(MARGIN * image.height)
    return image.crop((x, y, image.width - x, image.height - y))


def _bordered(image: Image.Image) -> Image.Image:
    """Lays a border around: white where the picture begins dark, else black."""
    colour = "white" if np.asarray(image.convert("L"))[0].mean() < 128 else "black"
    return ImageOps.expand(image, max(1, round(BORDER * min(image.size))), fill=colour)


def _marked(image: Image.Image) -> Image.Image:
    """Writes a text over a third of the width into the lower right corner, white with a black outline."""
    marked = image.copy()
    draw, size = ImageDraw.Draw(marked), 1.0
    while draw.textlength(MARK, font=ImageFont.load_default(size + 1)) <= MARK_WIDTH * image.width:
        size += 1
    place, font = (0.97 * image.width, 0.97 * image.height), ImageFont.load_default(size)
    draw.text(place, MARK, "white", font, "rb", stroke_width=max(1, round(size / 10)), stroke_fill="black")
    return marked


COPIES: dict[str, Change] = {
    "PNG": _saved("PNG"),
    "JPEG 90": _saved("JPEG", 90),
    "JPEG 75": _saved("JPEG", 75),
    "half size": _resized(0.5),
    "double size": _resized(2),
    "5 % margin off": _cropped,
    "border": _bordered,
    "small watermark": _marked,
}
RE_ENCODED = ("PNG", "JPEG 90", "JPEG 75")
LEAST_RECALL = {kind: 0.99 if kind in RE_ENCODED else 0.95 for kind in COPIES} | {
    "5 % margin off": 0.85,
    "border": 0.85,
}
MOST_WRONG = 1 / 1000  # pairs of different pictures, for each image


def sandbox_domains(num_per_class: int) -> Iterator[tuple[str, list[str], list[PixelArray]]]:
    """Yields the domains of the sandbox: name, and names and pixels of its images."""
    for domain in DOMAINS:
        source = sandbox_source(domain, "val", num_per_class, domain)
        yield domain, [f"{domain}/{i}" for i in range(len(source))], [source.pixels(i) for i in range(len(source))]


def folder_domains(root: Path) -> Iterator[tuple[str, list[str], list[PixelArray]]]:
    """Yields the folders of a folder as domains: name, and paths and pixels of the images anywhere below."""
    for domain in folders(root):
        paths = sorted(path for path in (root / domain).rglob("*") if is_image(path.name) and path.is_file())
        names = [path.relative_to(root).as_posix() for path in paths]
        yield domain, names, [decode_image(path.read_bytes(), str(path)) for path in paths]


def signed(pictures: Sequence[PixelArray], seed: int) -> Records:
    """Returns the records of pictures; each has bytes of its own, so that copies are found by what they show."""
    digests = np.random.default_rng(seed).integers(0, 256, (len(pictures), DIGEST_BYTES), dtype=np.uint8)
    return Records(digests, np.stack([thumbnails_of(pixels) for pixels in pictures]))


def pairs_of(
    first: Sequence[PixelArray], mine: Records, second: Sequence[PixelArray], theirs: Records
) -> tuple[set[tuple[int, int]], int]:
    """Returns the pairs of two sets, as a search finds them, and the number of candidates."""
    maybe = candidates(mine, theirs).tolist()
    found = {(i, j) for i, j in maybe if picture_distance(grey_picture(first[i]), grey_picture(second[j])) <= LIMIT}
    return found, len(maybe)


def measure(
    names: Sequence[str], pictures: Sequence[PixelArray], num_copies: int
) -> tuple[dict[str, tuple[float, float]], set[tuple[str, str]], int]:
    """Returns recall by kind of copy (thumbnails alone, and pairs), all pairs of two originals by name, and the number
    of candidates of these."""
    mine = signed(pictures, 1)
    drawn = np.sort(np.random.default_rng(0).permutation(len(pictures))[:num_copies])
    recall = {}
    own, num_candidates = pairs_of(pictures, mine, pictures, mine)
    other = {(min(i, j), max(i, j)) for i, j in own if i != j}
    for kind, change in COPIES.items():
        copies = [np.asarray(change(Image.fromarray(pictures[index]))) for index in drawn.tolist()]
        theirs = signed(copies, 2)
        alone = distances(mine.thumbnails[drawn, 0], theirs.thumbnails[:, 0]) <= ALONE
        found = {(i, int(drawn[j])) for i, j in pairs_of(pictures, mine, copies, theirs)[0]}
        recall[kind] = (float(alone.mean()), float(np.mean([(index, index) in found for index in drawn.tolist()])))
        other |= {(min(i, j), max(i, j)) for i, j in found if i != j}
    return recall, {(names[i], names[j]) for i, j in other}, num_candidates // 2


def read_labels(path: Path) -> dict[frozenset[str], bool]:
    """Returns pairs of names and whether they show one picture."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {frozenset((row["first"], row["second"])): row["same_picture"] == "yes" for row in rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 every mark is reached, 1 one is not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description="Copies among images.")
    parser.add_argument("folder", nargs="?", type=Path, help="folder of domains; without it the sandbox (synthetic)")
    parser.add_argument(
        "--labels", type=Path, help="CSV file of pairs that were inspected: first, second, same_picture"
    )
    parser.add_argument("--copies", type=int, default=100, help="copies of each kind and domain (%(default)s)")
    parser.add_argument("--per-class", type=int, default=20, help="images of each class of the sandbox (%(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.copies, arguments.per_class) < 1:
        parser.error("--copies and --per-class must be at least 1")
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is no folder")
    labels = {} if arguments.labels is None else read_labels(arguments.labels)
    synthetic = arguments.folder is None
    unknown = False if synthetic else None  # no two pictures of the sandbox are one
    domains = sandbox_domains(arguments.per_class) if synthetic else folder_domains(arguments.folder)
    print(f"Copies that are found, %: thumbnails alone, then pairs; {'synthetic' if synthetic else arguments.folder}")
    print(f"{'':16s}" + "".join(f"{kind:>17s}" for kind in COPIES))
    recalls, printed, num_copies, num_images = [], [], 0, 0
    for domain, names, pictures in domains:
        recall, pairs, num_candidates = measure(names, pictures, arguments.copies)
        cells = "".join(f"{f'{100 * alone:.1f} {100 * both:.1f}':>17s}" for alone, both in recall.values())
        print(
            f"{domain:16s}{cells}   {len(pictures)} images, {num_candidates} candidates, {len(pairs)} pairs", flush=True
        )
        num_drawn = min(arguments.copies, len(pictures))
        recalls.append({kind: (num_drawn * alone, num_drawn * both) for kind, (alone, both) in recall.items()})
        num_copies += num_drawn
        num_images += len(pictures)
        printed += sorted(pairs)
    for first, second in printed:
        known = labels.get(frozenset((first, second)), unknown)
        print(f"  {first} and {second}: {'inspect them' if known is None else 'the same' if known else 'DIFFERENT'}")
    passed = True
    for kind, least in LEAST_RECALL.items():
        alone, both = (sum(one[kind][k] for one in recalls) / num_copies for k in (0, 1))
        least = max(least, alone) if kind in RE_ENCODED else least
        passed &= both >= least
        print(f"{'PASS' if both >= least else 'FAIL'}  {kind}: {100 * both:.1f} % found, at least {100 * least:.1f} %")
    right, wrong = (sum(labels.get(frozenset(pair), unknown) is same for pair in printed) for same in (True, False))
    most = int(MOST_WRONG * num_images)
    passed &= wrong <= most
    words = f"{wrong} pairs of different pictures among {num_images} images, at most {most}"
    print(
        f"{'PASS' if wrong <= most else 'FAIL'}  {words}; {right} of copies, {len(printed) - right - wrong} not judged"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
