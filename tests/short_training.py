"""A training of a fraction of a second that uses everything that a real one does. ``make`` writes it: a folder with a
tiny CLIP as open_clip writes it, small PNG images in the layout of DomainBed, and a recipe."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("arrow", "circle", "heart", "square", "star")
RECIPE = """\
format_version: 1
name: short
model: {name: "local-dir:model"}
data:
  train: {source: folder, path: images, domains: [photo]}
  id_val: {source: folder, path: images, domains: [photo_val]}
  ood_val:
    sketch: {source: folder, path: images, domains: [sketch]}
prompts:
  templates: ["a photo of a {}", "a sketch of a {}", "a dark {}"]
train: {learning_rate: 1e-2, kl_weight: 1, epochs: 3, batch_size: 8, checkpoint_every: null}
search:
  trials: 2
  space:
    learning_rate: {low: 1e-3, high: 1e-2, log: true}
"""


def make(folder: Path, vision_cfg: dict | None = None) -> Path:
    """Writes model (with another image tower, if one is given), images and recipe; returns the path of the recipe."""
    write_model(folder / "model", vision_cfg)
    for domain, num_per_class, offset in (("photo", 4, 0), ("photo_val", 3, 100), ("sketch", 2, 200)):
        for label, name in enumerate(CLASSES):
            for index in range(num_per_class):
                write_image(folder / "images" / domain / name / f"{index}.png", label, offset + index)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return recipe


def training_in(out: Path) -> Path:
    """Returns the folder of the training in the one that `train` was given."""
    return out / "trials" / "train"


def place_in(out: Path) -> Path:
    """Returns the folder of its last attempt."""
    return max(training_in(out).glob("attempt-*"))


def write_image(path: Path, label: int, seed: int) -> None:
    """Writes a noisy image of 20 x 16 pixels with a corner that tells its class."""
    pixels = np.random.default_rng([label, seed]).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    pixels[:8, :10] = (50 * label, 255 - 50 * label, 128)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_model(folder: Path, vision_cfg: dict | None = None) -> None:
    """Writes a CLIP with a tokenizer of letters: the usual one takes half of the time of a whole short training."""
    import open_clip
    import torch
    from safetensors.torch import save_file
    from tiny import CONFIG

    folder.mkdir(parents=True)
    merges = folder / "no_merges.txt.gz"
    merges.write_bytes(gzip.compress(b"no merges"))
    config = {**CONFIG, "vision_cfg": vision_cfg or CONFIG["vision_cfg"]}
    text_cfg = {**CONFIG["text_cfg"], "context_length": 32, "vocab_size": 514}
    model_cfg = {**config, "text_cfg": {**text_cfg, "tokenizer_kwargs": {"bpe_path": str(merges)}}}
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**config, "text_cfg": text_cfg})
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20.0))
    preprocess = vars(open_clip.transform.PreprocessCfg())
    kept = {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": kept}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
