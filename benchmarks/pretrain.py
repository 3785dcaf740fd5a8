"""Makes the sandbox's tiny CLIP from nothing. ``python -m benchmarks.effect --pretrain DIR``

Contrastive pre-training on procedural pictures and their captions: so the packaged weights were made
(``carft_ray/model/sandbox_weights``). Takes about ten minutes on one idle core.

Shape letters: B pictures of a batch, U distinct captions of the batch, D embedding dimension.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from carft_ray.data.sandbox import (
    CLASSES,
    DOMAINS,
    IMAGE_SIZE,
    SHAPE_NAMES,
    SMALL_SCALES,
    TEMPLATES,
    UPRIGHT_DEGREES,
    Attributes,
    render,
)
from carft_ray.data.source import IntArray, PixelArray
from carft_ray.files import new_folder, require_new, write_bytes, write_json

NUM_STEPS = 2400
SEED = 0
SPLIT = "pretrain"  # of no set of the quickstart
GROUPS: dict[str, tuple[str, ...]] = {
    f"{kind} thing": SHAPE_NAMES[4 * i : 4 * i + 4] for i, kind in enumerate(("round", "boxy", "pointed", "living"))
}

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESS_CONFIG: dict[str, Any] = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}

_NUM_PICTURES = 60_000
_BATCH_SIZE = 256
_PEAK_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.1
_CLIP_NORM = 1.0
# Captions are incomplete: part of them name only the shape's group, part another shape of the group. So the tower
# separates the shapes well, but the words do not, which leaves fine-tuning something to gain.
_COARSE_FRACTION = 0.45
_WRONG_FRACTION = 0.17

# what a caption cannot say of a domain: the colour of the figure, that of the ground
_COLOURLESS = {"negative": (True, True), "silhouette": (True, False), "sketch": (False, True)}

Progress = Callable[[int, int, Mapping[str, float]], None]
# images [N, H, W, 3], labels [N], and which templates are true of each: all that a caption may say
Pictures = tuple[PixelArray, IntArray, list[tuple[int, ...]]]


def pretrain(out_dir: Path, num_steps: int = NUM_STEPS, seed: int = SEED, progress: Progress | None = None) -> None:
    """Pre-trains the sandbox model and writes it as a folder that ``open_clip`` opens as ``local-dir:out_dir``.

    Every picture of every batch gets one caption: a template drawn from those that are true of it, with its class
    word. The loss is the symmetric contrastive loss over the distinct captions of the batch; AdamW, one-cycle
    schedule. The result is a function of the
    arguments, the versions of torch and Pillow, and the number of threads.

    Args:
        out_dir: Folder to make; it must not exist, or be empty. It gets ``open_clip_config.json`` and
            ``open_clip_model.safetensors`` in half precision (9.2 MB).
        num_steps: Number of batches, at least 10, as the one-cycle schedule needs.
        seed: Of initial weights, order and captions. The pictures are the same for every seed.
        progress: Called with (steps or pictures done, all of them, numbers to show).

    Raises:
        UsageError: The folder is not empty.
        StorageError: It cannot be written.
    """
    require_new(out_dir, "--pretrain")
    state = train_model(draw_pictures(_NUM_PICTURES, progress), num_steps, seed, progress)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with new_folder(out_dir) as folder:
        write_json(folder / "open_clip_config.json", {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG})
        write_bytes(folder / "open_clip_model.safetensors", safetensors.torch.save(halves, {"format": "pt"}))


def draw_pictures(count: int, progress: Progress | None) -> Pictures:
    """Draws pictures of all domains and classes in equal parts."""
    domains = list(DOMAINS)
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) // len(domains) % len(CLASSES)
    templates = []
    for i in range(count):
        index = i // (len(domains) * len(CLASSES))
        images[i], shown = render(domains[i % len(domains)], SPLIT, CLASSES[labels[i]], index)
        templates.append(true_templates(shown))
        if progress is not None and (i + 1) % 1000 == 0:
            progress(i + 1, count, {})
    return images, labels, templates


def true_templates(shown: Attributes) -> tuple[int, ...]:
    """Returns the indices of all ``TEMPLATES`` that are true of a picture."""
    hides_figure, hides_ground = _COLOURLESS.get(shown.domain, (False, False))
    captions = [DOMAINS[shown.domain], "a picture of a {}"]
    captions.append("a small {}" if shown.scale <= SMALL_SCALES[1] else "a large {}")
    captions.append("an upright {}" if abs(shown.angle) <= UPRIGHT_DEGREES else "a tilted {}")
    if not hides_figure:
        captions.append(f"a {shown.figure_colour} {{}}")
    if not hides_ground:
        captions.append(f"a {{}} on a {shown.ground_colour} ground")
    return tuple(sorted(TEMPLATES.index(caption) for caption in captions))


def train_model(pictures: Pictures, num_steps: int, seed: int, progress: Progress | None) -> dict[str, Tensor]:
    """Trains from nothing and returns the state; arguments as those of ``pretrain``."""
    images_NHWC, labels, templates = pictures
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = open_clip.CLIP(**MODEL_CONFIG).train().to(memory_format=torch.channels_last)  # a third faster
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=num_steps)
    words = (*CLASSES, *GROUPS)
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CONFIG["text_cfg"]["context_length"])
    tokens = tokenizer([template.format(word) for template in TEMPLATES for word in words])
    num_epochs = math.ceil(num_steps * _BATCH_SIZE / len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(num_epochs)])
    mean, std = (torch.tensor(PREPROCESS_CONFIG[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for step in range(num_steps):
        rows = order[step * _BATCH_SIZE : (step + 1) * _BATCH_SIZE]
        captions = [
            templates[i][int(rng.random() * len(templates[i]))] * len(words) + _word(rng, int(labels[i])) for i in rows
        ]
        distinct, caption_B = torch.unique(torch.tensor(captions), return_inverse=True)
        images_BCHW = (torch.from_numpy(images_NHWC[rows]).permute(0, 3, 1, 2) / 255 - mean) / std
        features_BD = F.normalize(model.encode_image(images_BCHW), dim=-1)
        texts_UD = F.normalize(model.encode_text(tokens[distinct]), dim=-1)
        logits_BU = model.logit_scale.exp() * features_BD @ texts_UD.T
        loss = contrastive_loss(logits_BU, caption_B)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        optimizer.step()
        schedule.step()
        if progress is not None:
            accuracy = (logits_BU.argmax(1) == caption_B).float().mean().item()
            progress(step + 1, num_steps, {"loss": loss.item(), "caption_accuracy": accuracy})
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def contrastive_loss(logits_BU: Tensor, caption_B: Tensor) -> Tensor:
    """Returns CLIP's symmetric loss where pictures may share a caption.

    A picture must find its caption among the distinct captions; a caption must find its pictures, each with equal
    probability. Without shared captions this is the loss of CLIP.

    Args:
        logits_BU: Scaled similarities of pictures and distinct captions.
        caption_B: Column of every picture's caption; every column occurs.
    """
    is_caption_BU = F.one_hot(caption_B, logits_BU.shape[1]).to(logits_BU)
    target_BU = is_caption_BU / is_caption_BU.sum(dim=0)
    finds_pictures = -(target_BU * logits_BU.log_softmax(dim=0)).sum(dim=0).mean()
    return (F.cross_entropy(logits_BU, caption_B) + finds_pictures) / 2


def _word(rng: np.random.Generator, label: int) -> int:
    """Draws the word for a class: its own, its group's, or that of another member of the group."""
    name, draw = CLASSES[label], rng.random()
    if draw >= _COARSE_FRACTION + _WRONG_FRACTION:
        return label
    group = next(i for i, members in enumerate(GROUPS.values()) if name in members)
    if draw < _COARSE_FRACTION:
        return len(CLASSES) + group
    others = [member for member in tuple(GROUPS.values())[group] if member != name]
    return CLASSES.index(others[rng.integers(len(others))])


def show(done: int, total: int, metrics: Mapping[str, float]) -> None:
    """Prints how far it is, now and then."""
    if done == total or done % (50 if metrics else 5000) == 0:
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"{'step' if metrics else 'picture'} {done}/{total}  {numbers}")
