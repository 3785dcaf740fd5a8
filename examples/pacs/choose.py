"""Measures variants of make_clip.py on pictures of packages that took no part in training, for the table of the page.

python examples/pacs/choose.py WORK [NAME OR FOLDER ...]

WORK is the work folder of make_clip.py. The pictures come from two packages of Debian 13 (apt-get) and one of npm.
"""

import dataclasses
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_clip
import numpy as np
import open_clip
import timm
import torch
from drawings import SIZE, STYLES, drawings_of
from make_clip import Centre, Prepared, imitation
from packages import MakeError, fetch, listed, read_member
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from wordnet import Nouns, synset_of_drawing, with_hypernyms

from carft_ray.model.heads import build_heads
from carft_ray.training.car_ft_loss import context_distribution, context_entropy

NUM_STEPS = 300  # of a variant: a fifth of the training
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "moon.png", "motorcycle_left.png", "rocket.jpg"),
)
PICTURES = """
pip scikit-image 0.25.2 24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641
apt gcompris-qt-data 25.0.12-1 7312aa5387d4c5a6a1145609db5e8c38e2e2a9056c8b3b9d44e52f12358ac41d
apt tuxpaint-stamps-default 2025.03.31-1 6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb
npm @iconify-json/emojione 1.2.3 26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e
"""
# GCompris's activities of each set, with the pictures in them
ACTIVITIES = {
    "animals": (
        ("erase", "explore_farm_animals", "explore_world_animals"),
        r"/resource/(animals/)?(?!dragon)\w+\.webp",
    ),
    "places and things": (("explore_monuments", "categorization"), r"resource/[\w/]+\.webp"),
    "cartoons": (("lang",), r"words_sample/\w+\.webp"),
    "paintings": (("paintings",), r"image/\w+\.webp"),
}
DRAWN = re.compile(r"cartoon|symbols|flags|seasonal|military|people|roadsigns|space|money|clothes")  # of Tux Paint


@dataclass(frozen=True)
class Set:
    """Pictures of one kind: features [N, F], and what they show, as far as it is known."""

    features: Tensor
    names: list[str]


def photographs(wheel: Path, crops: int = 48) -> list[Image.Image]:
    """Returns random squares of the photographs that scikit-image ships, 112 by 112 pixels.

    Args:
        wheel: The package.
        crops: Squares per photograph.
    """
    draw, found = np.random.default_rng(0), []
    for name in PHOTOGRAPHS:
        image = Image.open(io.BytesIO(read_member(wheel, f"skimage/data/{name}"))).convert("RGB")
        for _ in range(crops):
            side = int(min(image.size) * draw.uniform(0.4, 1))
            left, top = (int(draw.integers(0, length - side + 1)) for length in image.size)
            square = image.crop((left, top, left + side, top + side))
            found.append(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return found


def among_photographs(photos_NF: Tensor, noise: float = 0.0) -> Centre:
    """Returns another centre of imitated photographs: the mean of features of real ones.

    Args:
        photos_NF: Features of photographs.
        noise: Weight of the deviation of one of them from the mean.
    """
    mean_F = photos_NF.mean(0)

    def centre(number: int, draw: np.random.Generator) -> Tensor:
        return mean_F + noise * (photos_NF[draw.integers(0, len(photos_NF), number)] - mean_F)

    return centre


def qt_files(content: bytes) -> dict[str, bytes]:
    """Returns the files in a resource of Qt (`.rcc`), by path."""
    version, tree, data, names = struct.unpack(">4I", content[4:20])
    size, found = 14 if version < 2 else 22, {}

    def walk(number: int, above: str) -> None:
        entry = tree + number * size
        name, flags = struct.unpack(">IH", content[entry : entry + 6])
        (length,) = struct.unpack(">H", content[names + name : names + name + 2])
        own = content[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be")
        path = f"{above}/{own}" if number else ""
        if flags & 2:
            count, first = struct.unpack(">2I", content[entry + 6 : entry + 14])
            for child in range(first, first + count):
                walk(child, path)
            return
        start = data + struct.unpack(">I", content[entry + 10 : entry + 14])[0]
        (length,) = struct.unpack(">I", content[start : start + 4])
        raw = content[start + 4 : start + 4 + length]
        found[path] = zlib.decompress(raw[4:]) if flags & 1 else raw

    walk(0, "")
    return found


def on_white(image: Image.Image) -> Image.Image:
    """Returns an image without transparency."""
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def middle(image: Image.Image, whole: bool) -> Image.Image:
    """Returns a square of 112 pixels: the middle, or the whole image on white."""
    image, size = on_white(image), SIZE
    if whole:
        ground = Image.new("RGB", (max(image.size),) * 2, "white")
        left, top = ((max(image.size) - side) // 2 for side in image.size)
        ground.paste(image, (left, top))
        return ground.resize((size, size), Image.Resampling.BICUBIC)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def debian_files(package: Path, pattern: str) -> dict[str, bytes]:
    """Returns the files of a Debian package whose paths match, by path; nothing is unpacked."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(None, "r|", process.stdout) as archive,
    ):
        chosen = (one for one in archive if one.isfile() and re.search(pattern, one.name))
        return {one.name: stream.read() for one in chosen if (stream := archive.extractfile(one))}


def name_of(path: str) -> str:
    """Returns the words in the name of a picture, without numbers and letters that count."""
    words = re.sub(r"[-_]", " ", Path(path).stem)
    return re.sub(r"( ?\d+| \w)$", "", words).strip()


def held_out(work: Path, prepared: Prepared, padding: str = "") -> dict[str, Set]:
    """Returns the sets of pictures, with features from the work folder or new.

    Args:
        work: The work folder.
        prepared: Has the tower.
        padding: Part of the folder's name.
    """
    digests = listed(PICTURES)
    files = {package[1]: fetch(package, work / "packages", digests) for package in digests}
    folder = work / f"held-out{padding}-{make_clip.FEATURES}"
    folder.mkdir(exist_ok=True)
    sets = {}

    def add(name: str, images: dict[str, bytes], whole: bool) -> None:
        names = sorted(images)

        def features() -> Tensor:
            pictures = (middle(Image.open(io.BytesIO(images[one])), whole) for one in names)
            return make_clip.features_of(prepared.tower, pictures)

        sets[name] = Set(make_clip.kept(folder / f"{name}.safetensors", features), [name_of(one) for one in names])

    resources = debian_files(files["gcompris-qt-data"], r"/rcc/\w+\.rcc$")
    for name, (activities, pattern) in ACTIVITIES.items():
        images: dict[str, bytes] = {}
        for path, content in resources.items():
            if Path(path).stem in activities:
                images |= {one: raw for one, raw in qt_files(content).items() if re.search(pattern, one)}
        add(name, images, whole=False)
    stamps = debian_files(files["tuxpaint-stamps-default"], r"/stamps/.*\.png$")
    add("stamps", {path: raw for path, raw in stamps.items() if not DRAWN.search(path)}, whole=True)
    stored = folder / "photographs.safetensors"
    squares = photographs(files["scikit-image"])
    sets["photographs"] = Set(make_clip.kept(stored, lambda: make_clip.features_of(prepared.tower, squares)), [])
    icons = json.loads(read_member(files["@iconify-json/emojione"], "package/icons.json"))
    chosen = drawings_of(icons, prepared.nouns)
    stored = folder / "drawings.safetensors"
    features = make_clip.kept(stored, lambda: make_clip.drawn_features(prepared.tower, chosen, 1000))
    for number, style in enumerate(STYLES):
        sets[f"drawings, {style}"] = Set(features[:, number].float(), [name for name, _, _ in chosen])
    return sets


def measure(model: Any, sets: dict[str, Set], nouns: Nouns) -> dict[str, float]:
    """Returns accuracies and masses of contexts in percent, by carft-ray's heads and context distribution."""
    tokenizer = open_clip.SimpleTokenizer(context_length=make_clip.MODEL["text_cfg"]["context_length"])
    fits, found = make_clip.fits(make_clip.TEMPLATES), {}
    with torch.no_grad():
        scale = float(model.logit_scale.exp())
        images = {name: functional.normalize(model.visual.head(one.features), dim=1) for name, one in sets.items()}
        for name in ("animals", "stamps", "cartoons", *(one for one in sets if one.startswith("drawings"))):
            things = [synset_of_drawing(one.lower(), nouns) for one in sets[name].names]
            rows = [row for row, thing in enumerate(things) if thing]
            classes = sorted({str(things[row]) for row in rows})
            class_head, contexts = build_heads(
                model, tokenizer, [nouns.words[one][0] for one in classes], make_clip.TEMPLATES
            )
            guesses = (images[name][rows] @ class_head.T).argmax(1).tolist()
            right = [classes[guess] == things[row] for guess, row in zip(guesses, rows, strict=True)]
            found[f"{name} ({len(rows)} of {len(classes)})"] = 100 * sum(right) / len(right)
            if name == "animals":
                context_head = contexts
        for name in ("animals", "places and things", "stamps", "cartoons", "paintings", "drawings, lines"):
            log_p = context_distribution(images[name], context_head, scale)
            masses = {
                kind: log_p.exp()[:, fit].sum(1).mean() for kind, fit in zip(("photo", *STYLES), fits, strict=True)
            }
            found |= {f"{name} -> {kind}": 100 * float(mass) for kind, mass in masses.items()}
            found[f"{name}: contexts in effect"] = float(context_entropy(log_p).exp())
    return found


def compare_padding(work: Path, prepared: Prepared) -> None:
    """Prints how well both of timm's networks classify labelled photographs: TensorFlow's padding, and its own.

    A guess among the classes of ImageNet is right if the photograph's thing is the class or above it; things with no
    class or with more than 150 are left out. TensorFlow's BatchNorm adds 1e-3 to the variance, timm's own 1e-5.
    """
    own: Any = timm.create_model("efficientnet_lite0", pretrained=False).double().eval().requires_grad_(False)
    own.load_state_dict(
        {
            name: tensor + (1e-3 - 1e-5 if name.endswith("running_var") else 0)
            for name, tensor in prepared.tower.state_dict().items()
        }
    )
    chains = [set(with_hypernyms(one, prepared.nouns)) for one in prepared.classes]
    for padding, tower in (("", prepared.tower), ("-symmetric", own)):
        sets = held_out(work, dataclasses.replace(prepared, tower=tower), padding)
        ranks, losses = [], []
        for name in ("animals", "stamps"):
            log_p = tower.classifier(sets[name].features.double()).log_softmax(1)
            for row, thing in enumerate(synset_of_drawing(one.lower(), prepared.nouns) for one in sets[name].names):
                right = [number for number, chain in enumerate(chains) if thing in chain]
                if 0 < len(right) <= 150:
                    ranks.append(int(log_p[row].argmax()) in right)
                    losses.append(-float(log_p[row, right].logsumexp(0)))
        accuracy, loss = 100 * sum(ranks) / len(ranks), sum(losses) / len(losses)
        print(f"padding{padding or ' of TensorFlow'}: {accuracy:.1f} % of {len(ranks)} photographs, loss {loss:.3f}")


def main(words: Sequence[str]) -> int:
    """Trains and measures the named variants, or all; measures a folder of make_clip.py."""
    work = Path(words[0])
    prepared = make_clip.prepare(work, print)
    sets = held_out(work, prepared)
    tower, photos_NF = prepared.tower, sets["photographs"].features
    near, around = (imitation(tower, among_photographs(photos_NF, noise)) for noise in (0.0, 0.3))
    variants: dict[str, dict[str, Any]] = {
        "no photograph": {},
        "photographs": {"imitate": near},
        "photographs, one style": {"imitate": near, "split": False},
        "photographs and noise, one style": {"imitate": around, "split": False},
    }
    for name in words[1:] or ["padding", *variants]:
        if name == "padding":
            compare_padding(work, prepared)
            continue
        if Path(name).is_dir():
            model = open_clip.CLIP(**make_clip.MODEL).eval()
            model.load_state_dict(load_file(Path(name) / "open_clip_model.safetensors"))
        else:
            model = make_clip.train(prepared, print, num_steps=NUM_STEPS, **variants[name])
        print(f"{name}: logit scale {model.logit_scale.exp().item():.1f}")
        for key, value in measure(model, sets, prepared.nouns).items():
            print(f"  {key}: {value:.1f}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MakeError as error:
        sys.exit(f"choose: {error}")
