"""Builds the tiny CLIP of the tests; importable by worker processes."""

import math

import open_clip
import torch

from carft_ray.model.clip import load_clip, wrap_model
from carft_ray.recipe.schema.fine_tuning import ModelConfig

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def make_tiny_clip(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20.0))
        for parameter in model.visual.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    open_clip.set_model_preprocess_cfg(model, {**vars(open_clip.transform.PreprocessCfg()), "size": 16})
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return wrap_model(model.to(dtype), tokenizer, CONFIG)


def make_resnet_clip():
    """A CLIP with BatchNorm: OpenAI's ResNet, 32 x 32 pixels, random weights, statistics other than those of data."""
    torch.manual_seed(0)
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 64}
    config = {**CONFIG, "vision_cfg": resnet}
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20.0))
    open_clip.set_model_preprocess_cfg(model, {**vars(open_clip.transform.PreprocessCfg()), "size": 32})
    return wrap_model(model, open_clip.SimpleTokenizer(context_length=16), config)


def load_folder(folder):
    return load_clip(ModelConfig(name=f"local-dir:{folder}"))
