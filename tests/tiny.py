"""Builds the tiny CLIP of the tests; importable by worker processes."""

import math

import open_clip
import torch

from carft_ray.model.clip import load_clip, wrap_model
from carft_ray.recipe.schema.model import ModelConfig

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# of a text tower whose tokenizer is the one of ``families``
TEXT = {**CONFIG["text_cfg"], "vocab_size": 18, "hf_tokenizer_name": "nobody/words", "context_length": 8}


def make_clip(vision_cfg, dtype=torch.float32, seed=0, noise=0.0):
    """A CLIP with another image tower, random weights, s = 20."""
    torch.manual_seed(seed)
    config = {**CONFIG, "vision_cfg": vision_cfg}
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20.0))
        for parameter in model.visual.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    preprocess = {**vars(open_clip.transform.PreprocessCfg()), "size": vision_cfg["image_size"]}
    open_clip.set_model_preprocess_cfg(model, preprocess)
    return wrap_model(model.to(dtype), open_clip.SimpleTokenizer(context_length=16), config)


def make_tiny_clip(seed=0, dtype=torch.float32):
    return make_clip(CONFIG["vision_cfg"], dtype, seed, noise=0.02)


def make_resnet_clip():
    """One with BatchNorm, whose statistics are others than those of data."""
    return make_clip({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 64})


def load_folder(folder):
    return load_clip(ModelConfig(name=f"local-dir:{folder}"))
