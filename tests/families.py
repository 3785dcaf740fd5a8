"""A folder for each family of CLIP models, laid out as open_clip publishes them: true configuration, random weights.

Towers keep their kind, input size, preprocessing, pooling, activation and tokens; widths, depths and vocabularies are
small. timm towers are the real ones with smaller numbers, registered under a name of their own.
"""

import json
from dataclasses import dataclass, field

import open_clip
import pytest
import timm
import torch
from timm.models import register_model
from tiny import load_folder

from carft_ray.errors import CarftError
from carft_ray.model.weights_files import quiet
from carft_ray.training.checkpoint import save_tensors

WORDS = ("a", "photo", "of", "the", "sketch", "dark", "painting", "in", "fog", "cat", "dog", "car", "tree", "house")
VIT = {"width": 32, "head_width": 16, "layers": 2}
TEXT = {"width": 32, "heads": 2, "layers": 1}
TIMM = {
    "vit_base_patch16_siglip_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "vit_pe_core_base_patch16_224": {"embed_dim": 64, "depth": 2, "num_heads": 2, "attn_pool_num_heads": 2},
    "eva02_base_patch16_clip_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext_base": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
    "fastvit_mci0": {"layers": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128)},
}


@dataclass(frozen=True)
class Family:
    """What is made, and what the model must say of itself."""

    name: str
    tag: str
    context_length: int
    layers: int
    vision: dict = field(default_factory=dict)
    has_tokenizer: bool = False


FAMILIES = {
    "openai-vit": Family("ViT-B-32-quickgelu", "openai", 77, 4, VIT),
    "openai-resnet": Family("RN50-quickgelu", "openai", 77, 6, {"layers": [1, 1, 1, 1], "width": 16}),
    "siglip": Family("ViT-B-16-SigLIP", "webli", 64, 4, has_tokenizer=True),
    "siglip2": Family("ViT-B-16-SigLIP2", "webli", 64, 4, has_tokenizer=True),
    "metaclip2": Family("ViT-H-14-worldwide-quickgelu", "metaclip2_worldwide", 77, 4, VIT, has_tokenizer=True),
    "dfn": Family("ViT-H-14-378-quickgelu", "dfn5b", 77, 4, VIT),
    "mobileclip2": Family("MobileCLIP2-S0", "dfndr2b", 77, 7),
    "perception-encoder": Family("PE-Core-B-16", "meta", 32, 4),
    "eva02": Family("EVA02-B-16", "merged2b_s8b_b131k", 77, 4, {"patch_dropout": 0.5}),
    "coca": Family("coca_ViT-B-32", "laion2b_s13b_b90k", 76, 4, {**VIT, "attn_pooler_heads": 2}),
    "convnext": Family("convnext_base_w", "laion2b_s13b_b82k", 77, 7),
}


def _register(real, small):
    def entry(pretrained=False, **kwargs):
        return timm.create_model(real, pretrained=False, **small, **kwargs)

    entry.__name__, entry.__module__ = f"small_{real}", __name__
    register_model(entry)


for _real, _small in TIMM.items():
    _register(_real, _small)


def make_config(family):
    """Returns open_clip's ``model_cfg`` of the family, made small."""
    config = open_clip.get_model_config(family.name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision.update(family.vision)
    text.update(TEXT)
    if "timm_model_name" in vision:
        vision["timm_model_name"] = f"small_{vision['timm_model_name']}"
    config["embed_dim"] = 32  # the width where the projection is none
    if family.has_tokenizer:
        text["vocab_size"] = len(WORDS) + 4
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update({**TEXT, "attn_pooler_heads": 2})
    return config


def make_folder(family, folder, seed=0):
    """Writes configuration, weights and, where the family has its own, the tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    known = open_clip.get_pretrained_cfg(family.name, family.tag)
    preprocess = {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": make_config(family), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    with quiet():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for name, value in model.named_parameters():  # towers that start at zero would give nothing
            if name not in ("logit_scale", "logit_bias"):
                value.add_(0.05 * torch.randn_like(value))
    save_tensors(folder / "open_clip_model.safetensors", model.state_dict())
    if family.has_tokenizer:
        make_tokenizer(folder)
    return folder


def make_tokenizer(folder, words=WORDS):
    """Writes a tokenizer of few words, in the files of Hugging Face: ends each sentence with </s>, pads with <pad>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>", "bos_token": "<s>"}))


def refused(folder):
    """Returns the message for a folder that cannot be loaded."""
    with pytest.raises(CarftError) as caught:
        load_folder(folder)
    return str(caught.value)
