"""A CLIPModel folder of Hugging Face (``transformers``) as an open_clip model: configuration, names and tensors.

    CLIPModel                                            open_clip.CLIP
    vision_model.embeddings.patch_embedding.weight       visual.conv1.weight
    vision_model.encoder.layers.N.self_attn.{q,k,v}_proj visual.transformer.resblocks.N.attn.in_proj (rows q, k, v)
    visual_projection.weight [D, W]                      visual.proj [W, D]

Both compute the same function; a test compares logits. transformers is not needed here.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from carft_ray.errors import DataError, Problem
from carft_ray.learning.catalog import HUGGING_FACE_CONFIG

# what a key that is left out means in transformers (CLIPTextConfig, CLIPVisionConfig)
_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_TEXT = _DEFAULTS | {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_VISION = _DEFAULTS | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_ARGMAX_EOS = 2  # eos_token_id of old configurations: the token with the highest id ends the sentence
_EPS = 1e-5  # of open_clip's norms when nothing else is said
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

_NAMES = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.weight$", "visual.conv1.weight"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # spelt so
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
_TRANSPOSED = ("visual.proj", "text_projection")


def read_config(folder: Path, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns open_clip's ``model_cfg`` and ``preprocess_cfg`` of a CLIPModel folder.

    Raises:
        DataError: The configuration is none, or asks for what open_clip cannot compute.
    """
    path = folder / HUGGING_FACE_CONFIG
    config = _read(path, place)
    text = {**_TEXT, **(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    vision = {**_VISION, **(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    activations = (vision["hidden_act"], text["hidden_act"])
    if activations[0] != activations[1] or activations[0] not in _ACTIVATIONS:
        rule, value = "hidden_act must be quick_gelu or gelu, the same in both towers", ", ".join(activations)
        raise DataError(Problem(place, rule, f"{value} in {path}"))
    if vision.get("num_channels", 3) != 3 or vision["hidden_size"] % vision["num_attention_heads"]:
        raise DataError(Problem(place, "must be a CLIPModel of 3 channels whose heads divide its width", str(path)))
    eos, last = text["eos_token_id"], text["vocab_size"] - 1
    pooling = {} if eos in (_ARGMAX_EOS, last) else {"pool_type": "eos", "eos_id": eos}
    model_config = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[activations[0]],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_tower(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_tower(text),
            **pooling,
        },
    }
    return model_config, _preprocessing(folder, vision["image_size"], place)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a CLIPModel under open_clip's names; a tensor that it does not know keeps its name."""
    renamed: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.endswith(".position_ids"):  # 0, 1, 2, ...: old versions stored it
            continue
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        if found := re.fullmatch(r"(.*\.)self_attn\.([qkv])_proj\.(weight|bias)", name):
            rows.setdefault(f"{found[1]}attn.in_proj_{found[3]}", {})[found[2]] = tensor
        else:
            renamed[name] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
    for name, parts in rows.items():
        renamed[name] = torch.cat([parts[key] for key in "qkv" if key in parts])
    return renamed


def _tower(config: dict[str, Any]) -> dict[str, Any]:
    tower = {"width": config["hidden_size"], "layers": config["num_hidden_layers"]}
    tower["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    return tower if config["layer_norm_eps"] == _EPS else {**tower, "norm_kwargs": {"eps": config["layer_norm_eps"]}}


def _preprocessing(folder: Path, image_size: int, place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        found = _read(folder / "preprocessor_config.json", place)
    elif (folder / "processor_config.json").is_file():  # transformers 5 writes both parts of a processor in one file
        found = _read(folder / "processor_config.json", place).get("image_processor") or {}
    resample = found.get("resample", 3)
    if resample not in _FILTERS:
        rule = "resample must be 2 (bilinear) or 3 (bicubic), which open_clip has too"
        raise DataError(Problem(place, rule, f"{resample} in {folder}"))
    size = found.get("size", image_size)
    is_squash = isinstance(size, dict) and "height" in size
    side = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    if side != image_size:
        text = "%s: the folder's preprocessing resizes to %s pixels; the model's input of %s is used instead."
        logging.getLogger(__name__).warning(text, place, side, image_size)
    return {
        "mean": tuple(found.get("image_mean", OPENAI_DATASET_MEAN)),
        "std": tuple(found.get("image_std", OPENAI_DATASET_STD)),
        "interpolation": _FILTERS[resample],
        "resize_mode": "squash" if is_squash and not found.get("do_center_crop", False) else "shortest",
    }


def _read(path: Path, place: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(Problem(place, "must be a JSON file", f"{path}: {error}")) from error
    if not isinstance(value, dict):
        raise DataError(Problem(place, "must be a JSON object", str(path)))
    return value
