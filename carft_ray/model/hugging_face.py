"""A CLIPModel folder of Hugging Face (``transformers``) as an open_clip model: configuration, names and tensors.

    CLIPModel                                            open_clip.CLIP
    vision_model.embeddings.patch_embedding.weight       visual.conv1.weight
    vision_model.encoder.layers.N.self_attn.{q,k,v}_proj visual.transformer.resblocks.N.attn.in_proj (rows q, k, v)
    visual_projection.weight [D, W]                      visual.proj [W, D]

Both compute the same function; a test compares logits. transformers is not needed here.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from carft_ray.errors import DataError, Problem
from carft_ray.model.catalog import HUGGING_FACE_CONFIG
from carft_ray.untrusted import parse_json, read_text

PLACE = "model.name"  # of messages: the key that names the folder
# what a key that is left out means in transformers (CLIPTextConfig, CLIPVisionConfig)
_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_TEXT = _DEFAULTS | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_TEXT |= {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
_VISION = _DEFAULTS | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_VISION |= {"image_size": 224, "patch_size": 32, "num_channels": 3}
_BOTH = {"projection_dim": 512}
# hidden_act -> open_clip's quick_gelu, and its act_kwargs of the tower
_ACTIVATIONS: dict[str, tuple[bool, dict[str, str] | None]] = {
    "quick_gelu": (True, None),
    "gelu": (False, None),
    "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
}
_ARGMAX_EOS = 2  # eos_token_id of old configurations: the token with the highest id ends the sentence
_NUM_SHOWN = 100  # characters of a value
_EPS = 1e-5  # of open_clip's norms when nothing else is said
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# name in open_clip -> name in transformers
NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the library's spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
BLOCK_NAMES = {
    "ln_1.": ["layer_norm1"],
    "ln_2.": ["layer_norm2"],
    "attn.in_proj_": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],  # rows, in this order
    "attn.out_proj.": ["self_attn.out_proj"],
    "mlp.c_fc.": ["mlp.fc1"],
    "mlp.c_proj.": ["mlp.fc2"],
}
TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies from the right, a Linear from the left
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+[._])(weight|bias)")


def names_of(name: str) -> list[str]:
    """Returns the names in transformers of a tensor of open_clip; three for the stacked rows of an attention.

    Raises:
        KeyError: It has none.
    """
    if found := _BLOCK.fullmatch(name):
        layer = f"{'vision' if found[1] else 'text'}_model.encoder.layers.{found[2]}"
        return [f"{layer}.{part}.{found[4]}" for part in BLOCK_NAMES[found[3]]]
    return [NAMES[name]]


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns open_clip's ``model_cfg`` and ``preprocess_cfg`` of a CLIPModel folder.

    Raises:
        DataError: The configuration is none, or asks for what open_clip cannot compute.
    """
    path = folder / HUGGING_FACE_CONFIG
    config = read_object(path)
    text, vision = _tower(config, "text", _TEXT, path), _tower(config, "vision", _VISION, path)
    embed_dim = _values(config, _BOTH, f"{path}: ")["projection_dim"]
    activations = [vision["hidden_act"], text["hidden_act"]]
    known = [_ACTIVATIONS.get(activation) for activation in activations]
    if None in known or known[0][0] != known[1][0]:  # type: ignore[index]  # neither is None
        allowed = ", ".join(_ACTIVATIONS)
        rule = f"hidden_act must be one of {allowed} in both towers, and quick_gelu in both or in none"
        raise DataError(Problem(PLACE, rule, f"{', '.join(activations)} in {path}"))
    sizes = [tower[key] for tower in (vision, text) for key in ("hidden_size", "num_attention_heads")]
    if vision["num_channels"] != 3 or min(sizes) < 1 or sizes[0] % sizes[1]:
        raise DataError(Problem(PLACE, "must be a CLIPModel of 3 channels whose heads divide its width", str(path)))
    eos, last = text["eos_token_id"], text["vocab_size"] - 1
    pooling = {} if eos in (_ARGMAX_EOS, last) else {"pool_type": "eos", "eos_id": eos}
    model_config = {
        "embed_dim": embed_dim,
        "quick_gelu": _ACTIVATIONS[vision["hidden_act"]][0],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_sizes(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_sizes(text),
            **pooling,
        },
    }
    return model_config, _preprocessing(folder, vision["image_size"])


def _tower(config: dict[str, Any], name: str, defaults: dict[str, Any], path: Path) -> dict[str, Any]:
    found = config.get(f"{name}_config") or {}
    if not isinstance(found, dict):
        raise DataError(Problem(f"{path}: {name}_config", "must be an object", str(found)[:_NUM_SHOWN]))
    return _values(found, defaults, f"{path}: {name}_config.")


def _values(config: dict[str, Any], defaults: dict[str, Any], place: str) -> dict[str, Any]:
    """Returns the values of a configuration for the keys of ``defaults``, of their types.

    Raises:
        DataError: They are none.
    """
    values = {name: config.get(name, default) for name, default in defaults.items()}
    wrong = [
        Problem(f"{place}{name}", f"must be of the type {type(defaults[name]).__name__}", repr(value)[:_NUM_SHOWN])
        for name, value in values.items()
        if type(value) is not type(defaults[name])
    ]
    if wrong:
        raise DataError(wrong)
    return values


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a CLIPModel under open_clip's names; a tensor that it does not know keeps its name."""
    # 0, 1, 2, ...: old versions stored position_ids
    rest = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
    layers = {found[1] for name in rest if (found := re.search(r"\.layers\.(\d+)\.", name))}
    blocks = itertools.product(("visual.", ""), sorted(layers), BLOCK_NAMES, ("weight", "bias"))
    renamed: dict[str, Tensor] = {}
    for ours in (*NAMES, *(f"{tower}transformer.resblocks.{i}.{part}{kind}" for tower, i, part, kind in blocks)):
        parts = [rest[theirs] for theirs in names_of(ours) if theirs in rest]
        if not parts or any(part.ndim == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts[1:]):
            continue  # what does not go together keeps its names, and fits no model
        for theirs in names_of(ours):
            rest.pop(theirs, None)
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        renamed[ours] = tensor.T.contiguous() if ours in TRANSPOSED and tensor.ndim == 2 else tensor
    return renamed | rest


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    tower: dict[str, Any] = {"width": config["hidden_size"], "layers": config["num_hidden_layers"]}
    tower["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    if config["layer_norm_eps"] != _EPS:
        tower["norm_kwargs"] = {"eps": config["layer_norm_eps"]}
    if (options := _ACTIVATIONS[config["hidden_act"]][1]) is not None:
        tower["act_kwargs"] = options
    return tower


def _preprocessing(folder: Path, side: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        found = read_object(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():  # transformers 5 writes both parts of a processor in one file
        found = read_object(folder / "processor_config.json").get("image_processor") or {}
        found = found if isinstance(found, dict) else {}
    resample = found.get("resample", 3)
    if type(resample) is not int or resample not in FILTERS:
        rule = "resample must be 2 (bilinear) or 3 (bicubic), which open_clip also has"
        raise DataError(Problem(PLACE, rule, f"{resample} in {folder}"))
    size = found.get("size")
    given = size.values() if isinstance(size, dict) else [size]
    if other := [each for each in given if isinstance(each, int) and each != side]:
        step = f'Write "size": {{"shortest_edge": {side}}} there, if the model was made for images of that size.'
        rule = f"its image processor must resize to the {side} pixels of the model, as open_clip does"
        raise DataError(Problem(PLACE, rule, f"{other[0]} in {folder}", next_step=step))
    is_squash = isinstance(size, dict) and "height" in size  # then no crop takes anything off
    return {
        "mean": found.get("image_mean", OPENAI_DATASET_MEAN),
        "std": found.get("image_std", OPENAI_DATASET_STD),
        "interpolation": FILTERS[resample],
        "resize_mode": "squash" if is_squash else "shortest",
    }


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a folder.

    Raises:
        DataError: It holds none.
    """
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(Problem(PLACE, "must be a JSON file", f"{path}: {error}")) from error
    if not isinstance(value, dict):
        raise DataError(Problem(PLACE, "must be a JSON object", str(path)))
    return value
