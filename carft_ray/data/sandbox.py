"""The sandbox: procedural pictures of sixteen simple shapes in twelve domains, each made in under a millisecond.

A picture is a pure function of (domain, split, class, index). It is drawn at 64 pixels and reduced to 32. Every
attribute (colours, size, tilt) has the same distribution in every domain and class; only the domain differs.
The shapes are in ``sandbox.toml``.
"""

import functools
import hashlib
import math
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from carft_ray.data.source import IdArray, IntArray, PixelArray
from carft_ray.errors import Problem, nearest
from carft_ray.files import new_folder, require_new
from carft_ray.recipe.schema.data import SandboxSet

Points = npt.NDArray[np.float64]  # [P, 2], x and y
SHAPE_NAMES: tuple[str, ...] = (
    *("circle", "ring", "moon", "cloud"),  # round
    *("square", "cross", "house", "key"),  # boxy
    *("star", "triangle", "arrow", "bolt"),  # pointed
    *("fish", "tree", "flower", "heart"),  # living
)
FORMAT = 1  # rises when any picture changes
IMAGE_SIZE = 32  # pixels, width and height
CLASSES: tuple[str, ...] = tuple(sorted(SHAPE_NAMES))  # as a reader of folders would order them
SPLITS: tuple[str, ...] = ("train", "val", "test", "pretrain")
# domain -> how a caption names the picture
DOMAINS: dict[str, str] = {
    name.removesuffix(" picture").replace(" ", "_"): f"a {name} of a {{}}"
    for name in (
        *("photo", "noisy photo", "blurry photo", "painting", "negative", "sketch", "cartoon", "striped picture"),
        *("dark photo", "bright photo", "silhouette", "pixelated photo"),
    )
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 44),
    "orange": (242, 140, 40),
    "yellow": (244, 214, 60),
    "green": (60, 160, 70),
    "blue": (46, 98, 214),
    "purple": (142, 68, 173),
    "white": (240, 240, 236),
    "black": (44, 44, 48),
}
GROUND_COLOURS: tuple[str, ...] = ("red", "yellow", "green", "blue", "white", "black")
SMALL_SCALES = (0.48, 0.66)
LARGE_SCALES = (0.74, 0.92)
UPRIGHT_DEGREES = 8.0  # an upright figure leans less than this
TILTED_DEGREES = (18.0, 42.0)
# Every template is a caption that can be true; the same list makes the class head and the contexts of the KL term.
TEMPLATES: tuple[str, ...] = (
    *DOMAINS.values(),
    *(f"a {colour} {{}}" for colour in COLOURS),
    *(f"a {{}} on a {colour} ground" for colour in GROUND_COLOURS),
    *("a small {}", "a large {}", "an upright {}", "a tilted {}"),
    "a picture of a {}",
)
NUM_TRAIN, NUM_ID, NUM_OOD = 32, 125, 63  # images per class
# role -> set name -> the set: what the quickstart searches with and what `export_images` writes
QUICKSTART_SETS: dict[str, dict[str, SandboxSet]] = {
    role: {domain: SandboxSet(source="sandbox", domain=domain, split=split, num_per_class=count) for domain in domains}
    for role, split, count, domains in (
        ("train", "train", NUM_TRAIN, ("photo",)),
        ("id_val", "val", NUM_ID, ("photo",)),
        ("ood_val", "val", NUM_OOD, ("noisy_photo", "blurry_photo", "painting", "negative")),
        ("id_test", "test", NUM_ID, ("photo",)),
        ("ood_test", "test", NUM_OOD, ("sketch", "cartoon", "striped", "dark_photo", "bright_photo")),
    )
}
_Floats = npt.NDArray[np.float32]  # pixels [H, W, 3], 0 to 255
_DRAWN = 2 * IMAGE_SIZE  # pixels while drawing


def draw_mask(name: str, size: int, scale: float, angle: float, mirrored: bool, centre: Sequence[float]) -> Image.Image:
    """Draws a shape in white on black.

    Args:
        name: One of ``SHAPE_NAMES``.
        size: Width and height of the mask in pixels.
        scale: Extent of the shape as a fraction of the frame.
        angle: Rotation in degrees.
        mirrored: Whether left and right are swapped before the rotation.
        centre: Where the middle of the shape lies, x and y, as fractions of the frame.

    Returns:
        Grey image of ``size`` x ``size`` pixels, 255 inside the shape and 0 outside.

    Raises:
        KeyError: ``name`` is not in ``SHAPE_NAMES``.
    """
    turn = math.radians(angle)
    cos, sin = math.cos(turn) * scale * size / 2, math.sin(turn) * scale * size / 2
    flip = -1.0 if mirrored else 1.0
    matrix = np.array([[flip * cos, flip * sin], [-sin, cos]])
    offset = np.array([centre[0] * size, centre[1] * size])
    mask = Image.new("L", (size, size), 0)
    canvas = ImageDraw.Draw(mask)
    for points, is_hole in _shapes()[name]:
        corners = points @ matrix + offset
        canvas.polygon(corners.ravel().tolist(), fill=0 if is_hole else 255)
    return mask


@functools.cache
def _shapes() -> dict[str, list[tuple[Points, bool]]]:
    """Returns the parts of each shape: corners, and whether they cut a hole."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return {
        name: [(_corners(part), part.get("hole", False)) for part in parts]
        for name, parts in tomllib.loads(text).items()
    }


def _corners(part: dict[str, Any]) -> Points:
    if "polygon" in part:
        return np.array(part["polygon"])
    x, y, width, height, count = part["ellipse"]
    turn = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([x + width * np.cos(turn), y + height * np.sin(turn)], axis=1)


@dataclass(frozen=True)
class Attributes:
    """What a picture shows.

    Attributes:
        domain: A key of ``DOMAINS``.
        figure_colour: A key of ``COLOURS``.
        ground_colour: A name of ``GROUND_COLOURS``, never the figure's.
        scale: Extent of the figure as a fraction of the frame, before rotation.
        angle: Rotation in degrees.
        mirrored: Whether left and right are swapped.
        centre: Middle of the figure, x and y, as fractions of the frame.
    """

    domain: str
    figure_colour: str
    ground_colour: str
    scale: float
    angle: float
    mirrored: bool
    centre: tuple[float, float]


class SandboxSource:
    """The ``Source`` of one domain and split: class by class, every class ``num_per_class`` times.

    Args:
        domain: A key of ``DOMAINS``.
        split: One of ``SPLITS``.
        num_per_class: Images of each class.
        name: Role or name of the set, for messages.
    """

    class_names = CLASSES
    groups: None = None  # the pictures are told apart between all classes

    def __init__(self, domain: str, split: str, num_per_class: int, name: str) -> None:
        self.name, self._domain, self._split, self._num_per_class = name, domain, split, num_per_class
        self.identity = f"sandbox-{FORMAT}/{domain}/{split}/{num_per_class}"  # names the pictures completely
        ids = [_key(domain, split, class_name, i)[0] for class_name in CLASSES for i in range(num_per_class)]
        self.sample_ids: IdArray = np.array(ids, dtype=np.uint64)
        self.labels: IntArray = np.repeat(np.arange(len(CLASSES), dtype=np.int64), num_per_class)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.labels)

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages."""
        return f"{self.identity}, image {index}"

    def content(self, index: int) -> bytes:
        """Returns the pixels of image ``index``."""
        return self.pixels(index).tobytes()

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index``, uint8 [32, 32, 3]."""
        class_name = CLASSES[self.labels[index]]
        return render(self._domain, self._split, class_name, index % self._num_per_class)[0]


def domain_problems(domain: str, place: str) -> list[Problem]:
    """Returns a problem for a name that is no domain of the sandbox."""
    if domain in DOMAINS:
        return []
    rule, allowed = "must be a domain of the sandbox", tuple(DOMAINS)
    return [Problem(f"{place}.domain", rule, repr(domain), allowed, nearest(domain, allowed))]


def class_problems(classes: tuple[str, ...], place: str) -> list[Problem]:
    """Returns a problem for a class list that is not the sandbox's."""
    if classes == CLASSES:
        return []
    rule = "a sandbox set has all classes of the sandbox, in their order, so the class list must be the same"
    return [Problem(place, rule, ", ".join(classes[:5]), CLASSES, next_step="Leave data.classes out.")]


def render(domain: str, split: str, class_name: str, index: int) -> tuple[PixelArray, Attributes]:
    """Draws one picture.

    Args:
        domain: A key of ``DOMAINS``.
        split: One of ``SPLITS``; other split, other pictures.
        class_name: A name of ``CLASSES``.
        index: Number of the picture within (domain, split, class).

    Returns:
        Pixels, uint8 [32, 32, 3], and what they show.

    Raises:
        KeyError: The domain or the class is unknown.
    """
    rng = np.random.Generator(np.random.Philox(key=_key(domain, split, class_name, index)))
    shown = _attributes(rng, domain)
    large, finish = _STYLES[domain]
    mask = draw_mask(class_name, _DRAWN, shown.scale, shown.angle, shown.mirrored, shown.centre)
    figure, ground = _tint(rng, shown.figure_colour), _tint(rng, shown.ground_colour)
    pixels = large(rng, mask, figure, ground)
    rows = pixels[0::2] + pixels[1::2]
    return _to_bytes(finish(rng, (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25))), shown


def export_images(to: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Writes the sets of the quickstart as PNG files, ``to/<set>/<class>/<n>.png`` (the layout of DomainBed).

    The photo sets get the folders ``photo_train``, ``photo_id_val`` and ``photo_id_test``, every other set that of
    its domain. ``to`` appears only when everything is written.

    Args:
        to: Folder to make; it must not exist, or be empty.
        progress: Called with the number of images written and the number in all.

    Raises:
        UsageError: The folder is not empty.
        StorageError: It cannot be written.
    """
    sets = {
        spec.domain if role.startswith("ood") else f"{spec.domain}_{role}": spec
        for role, specs in QUICKSTART_SETS.items()
        for spec in specs.values()
    }
    require_new(to, "--to")
    total, done = sum(spec.num_per_class * len(CLASSES) for spec in sets.values()), 0
    with new_folder(to) as folder:
        for set_name, spec in sets.items():
            for class_name in CLASSES:
                (folder / set_name / class_name).mkdir(parents=True)
                for index in range(spec.num_per_class):
                    path = folder / set_name / class_name / f"{index:04d}.png"
                    Image.fromarray(render(spec.domain, spec.split, class_name, index)[0]).save(path)
                    done += 1
                if progress is not None:
                    progress(done, total)
        os.sync()  # one flush for all: a flush per file took longer than drawing them


def _key(domain: str, split: str, class_name: str, index: int) -> Any:
    text = f"sandbox-{FORMAT}/{domain}/{split}/{class_name}/{index}"
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8")


def _attributes(rng: np.random.Generator, domain: str) -> Attributes:
    u = rng.random(9).tolist()
    figure = list(COLOURS)[int(u[0] * len(COLOURS))]
    others = [colour for colour in GROUND_COLOURS if colour != figure]
    ground = others[int(u[1] * len(others))]
    low, high = SMALL_SCALES if u[2] < 0.5 else LARGE_SCALES
    scale = low + (high - low) * u[3]
    lean = TILTED_DEGREES[0] + (TILTED_DEGREES[1] - TILTED_DEGREES[0]) * u[5] if u[4] < 0.5 else UPRIGHT_DEGREES * u[5]
    slack = (1 - scale) * 0.8
    centre = (0.5 + slack * (u[6] - 0.5), 0.5 + slack * (u[7] - 0.5))
    sign, mirrored = (1.0 if u[8] < 0.5 else -1.0), int(u[8] * 4) % 2 == 1
    return Attributes(domain, figure, ground, scale, sign * lean, mirrored, centre)


# How a domain is drawn at 64 pixels -> float32 [64, 64, 3], 0 to 255.


def _tint(rng: np.random.Generator, colour: str) -> _Floats:
    return (np.array(COLOURS[colour], dtype=np.float32) + rng.uniform(-16, 16, 3)).astype(np.float32)


def _weight(mask: Image.Image) -> _Floats:
    return (np.asarray(mask, dtype=np.float32) / 255.0)[:, :, None]


def _ramp(rng: np.random.Generator, low: float, high: float) -> _Floats:
    """A brightness that rises in a random direction, [64, 64, 1]."""
    turn = rng.uniform(0, 2 * np.pi)
    line = np.linspace(-0.5, 0.5, _DRAWN, dtype=np.float32)
    height = np.float32(np.cos(turn)) * line[None, :] + np.float32(np.sin(turn)) * line[:, None]
    return ((low + high) / 2 + (high - low) * 0.7 * height)[:, :, None].astype(np.float32)


def _patches(rng: np.random.Generator, cells: int, strength: float) -> _Floats:
    """Smooth noise of ``cells`` x ``cells`` hills, standard deviation about ``strength``, [64, 64, 1]."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32) * np.float32(strength))
    return np.asarray(coarse.resize((_DRAWN, _DRAWN), Image.Resampling.BICUBIC))[:, :, None]


def _photo(rng: np.random.Generator, mask: Image.Image, figure: _Floats, ground: _Floats) -> _Floats:
    body = _weight(mask)
    shadow = _weight(mask.filter(ImageFilter.BoxBlur(3)))
    shadow = np.roll(shadow, (4, 3), axis=(0, 1))
    scene = ground * _ramp(rng, 0.72, 1.1) * (1 - 0.4 * shadow) + _patches(rng, 6, 14)
    scene += body * (figure * _ramp(rng, 0.72, 1.15) - scene)
    scene += rng.standard_normal((_DRAWN, _DRAWN, 1), dtype=np.float32) * 8
    return scene


def _painting(rng: np.random.Generator, mask: Image.Image, figure: _Floats, ground: _Floats) -> _Floats:
    body = _weight(mask)
    scene = ground + body * (figure - ground) + _patches(rng, 10, 20)
    line = np.arange(_DRAWN)
    rows = line[:, None] + _patches(rng, 12, 3.2)[..., 0].astype(np.int64)
    columns = line[None, :] + _patches(rng, 12, 3.2)[..., 0].astype(np.int64)
    scene = scene[rows.clip(0, _DRAWN - 1), columns.clip(0, _DRAWN - 1)]
    strokes = rng.standard_normal((_DRAWN // 2, 8, 1), dtype=np.float32) * 16
    scene = scene + np.repeat(np.repeat(strokes, 2, axis=0), 8, axis=1)
    return np.asarray(np.round(scene / 36) * np.float32(36))


def _sketch(rng: np.random.Generator, mask: Image.Image, figure: _Floats, ground: _Floats) -> _Floats:
    soft = _weight(mask.filter(ImageFilter.BoxBlur(1)))
    edge = np.minimum(5 * soft * (1 - soft), 1)
    line = np.arange(_DRAWN)
    slant = (line[None, :] + line[:, None] * (1 if rng.random() < 0.5 else -1)) % 7 < 2
    hatching = _weight(mask) * slant[:, :, None] * np.float32(0.45)
    paper = 232 + 0.06 * (ground - 128) + _patches(rng, 16, 5)
    ink = np.minimum(figure * 0.75, 150)
    return np.asarray(paper + np.maximum(edge, hatching) * (ink - paper))


def _cartoon(rng: np.random.Generator, mask: Image.Image, figure: _Floats, ground: _Floats) -> _Floats:
    body, outline = _weight(mask), np.minimum(12 * _weight(mask.filter(ImageFilter.BoxBlur(3))), 1)
    scene = np.broadcast_to(ground * 0.7 + 76, (_DRAWN, _DRAWN, 3))
    scene = scene * (1 - outline) + outline * 12
    vivid = np.clip((figure - 128) * 1.3 + 128, 0, 255)
    return np.asarray(scene + body * (vivid - scene))


def _striped(rng: np.random.Generator, mask: Image.Image, figure: _Floats, ground: _Floats) -> _Floats:
    body = _weight(mask)
    scene = ground + body * (figure - ground)
    turn, period = rng.uniform(0, np.pi), rng.uniform(8, 12)
    line = np.arange(_DRAWN)
    phase = np.cos(turn) * line[None, :] + np.sin(turn) * line[:, None] + rng.uniform(0, period)
    bars = (phase % period < period * 0.45)[:, :, None]
    return np.where(bars, scene * np.float32(0.3) + np.float32(82), scene)


def _silhouette(rng: np.random.Generator, mask: Image.Image, figure: _Floats, ground: _Floats) -> _Floats:
    scene = (ground * 0.6 + 102) * _ramp(rng, 0.85, 1.1)
    return scene + _weight(mask) * (14 - scene)


# What happens to the picture at 32 pixels.


def _keep(rng: np.random.Generator, picture: _Floats) -> _Floats:
    return picture


def _noisy(rng: np.random.Generator, picture: _Floats) -> _Floats:
    return picture + rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32) * 55


def _blurry(rng: np.random.Generator, picture: _Floats) -> _Floats:
    return np.asarray(Image.fromarray(_to_bytes(picture)).filter(ImageFilter.GaussianBlur(2.1)), dtype=np.float32)


def _negative(rng: np.random.Generator, picture: _Floats) -> _Floats:
    return 255 - picture


def _dark(rng: np.random.Generator, picture: _Floats) -> _Floats:
    return picture * 0.22 + rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32) * 3


def _bright(rng: np.random.Generator, picture: _Floats) -> _Floats:
    return np.clip(picture, 0, 255) * 0.3 + 178 + rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32) * 3


def _pixelated(rng: np.random.Generator, picture: _Floats) -> _Floats:
    tiny = Image.fromarray(_to_bytes(picture)).resize((11, 11), Image.Resampling.BOX)
    return np.asarray(tiny.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST), dtype=np.float32)


def _to_bytes(picture: _Floats) -> PixelArray:
    return np.asarray(np.clip(picture + 0.5, 0, 255), np.uint8)


_Large = Callable[[np.random.Generator, Image.Image, _Floats, _Floats], _Floats]
_Finish = Callable[[np.random.Generator, _Floats], _Floats]
_STYLES: dict[str, tuple[_Large, _Finish]] = {
    "photo": (_photo, _keep),
    "noisy_photo": (_photo, _noisy),
    "blurry_photo": (_photo, _blurry),
    "painting": (_painting, _keep),
    "negative": (_photo, _negative),
    "sketch": (_sketch, _keep),
    "cartoon": (_cartoon, _keep),
    "striped": (_striped, _keep),
    "dark_photo": (_photo, _dark),
    "bright_photo": (_photo, _bright),
    "silhouette": (_silhouette, _keep),
    "pixelated_photo": (_photo, _pixelated),
}
