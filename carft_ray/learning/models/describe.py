"""What a model is, without its weights: sizes, input, tokens, layers, memory.

The model is built without memory, so that a ViT-L/14 at 336 pixels is described on any machine in a second or two.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import open_clip
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from carft_ray.learning.models.catalog import QUICK, model_names
from carft_ray.learning.models.clip import square_size
from carft_ray.learning.models.opening import PREPROCESSING, open_model, preprocess_config, preprocessing_kinds
from carft_ray.learning.models.tower import layer_factors, layer_groups, layer_label, training_bytes
from carft_ray.learning.models.weights import fitted, read_header
from carft_ray.recipe.fine_tuning import ModelConfig, TrainConfig

FLOAT32 = 4  # bytes
ACTIVATIONS = ("GELU", "GELUTanh", "QuickGELU", "ReLU", "SiLU")  # classes of torch and timm


def describe(part: ModelConfig, train: TrainConfig | None = None) -> dict[str, Any]:
    """Returns what ``carft-ray model`` shows; nothing is fetched but the configuration of a page of the hub.

    Args:
        part: Name and weights; weights that are not on this machine are described as far as open_clip's list knows.
        train: When given, each layer has its learning rate relative to that of the class head, 0 where it is frozen.

    Raises:
        RecipeError: The name, tag or folder is none, or the weights belong to another name.
        DataError: The weights cannot be read, or do not fit the model.
    """
    opened = open_model(part, device="meta", read=read_header, may_fetch=False)
    model, config = opened.model, opened.config
    visual: nn.Module = model.visual  # type: ignore[assignment]  # untyped
    state = {} if opened.state is None else fitted(model, opened.state, opened.weights, opened.place)[0]
    preprocess = preprocess_config(model)
    groups, factors = layer_groups(visual), layer_factors(visual, 1.0 if train is None else train.layer_decay)
    sizes = {name: parameter.numel() for name, parameter in visual.named_parameters()}
    num_image, num_all = sum(sizes.values()), sum(parameter.numel() for parameter in model.parameters())
    text, name = config["text_cfg"], part.name.replace("/", "-")
    scale, bias = state.get("logit_scale"), state.get("logit_bias")
    quick, activations = bool(config.get("quick_gelu", False)), ", ".join(_modules(visual, ACTIVATIONS.__contains__))
    layers: list[dict[str, Any]] = []
    for i, names in enumerate(groups):
        num_parameters = sum(sizes[each] for each in names)
        layers.append({"layer": i, "name": layer_label(names), "num_parameters": num_parameters})
        if train is not None:
            layers[i]["lr_factor"] = factors[names[0]] * (i >= train.freeze_layers)
    return {
        "name": part.name,
        "pretrained": part.pretrained,
        "weights": "here" if state else "untrained" if part.pretrained in (None, "random") else "not on this machine",
        "family": _family(visual, config),
        "input": {"size": square_size(preprocess), **{key: preprocess[key] for key in PREPROCESSING}},
        "context_length": text.get("context_length", 77),
        "tokenizer": text.get("hf_tokenizer_name") or "CLIP",
        "vocabulary": open_clip.get_model_tokenize_cfg(model).get("vocab_size"),
        "logit_scale": None if scale is None else scale.float().exp().item(),
        "has_logit_bias": getattr(model, "logit_bias", None) is not None,
        "logit_bias": None if bias is None else bias.float().item(),
        "activations": {"image": activations or "its own", "text": "QuickGELU" if quick else "GELU"},
        "num_parameters": {"image": num_image, "text and rest": num_all - num_image},
        "widths": {"image": _width(visual), "text": text.get("width"), "embedding": config["embed_dim"]},
        "num_blocks": len(groups) - 2,
        "norms": _modules(visual, lambda name: "Norm" in name and "Conv" not in name),
        "has_batch_norm": any(isinstance(module, _BatchNorm) for module in visual.modules()),
        "layers": layers,
        "memory_bytes": {"weights": FLOAT32 * num_all, "training": training_bytes(num_image, num_image)},
        "tags": _tags(name),
        "preprocessing_differs": len(preprocessing_kinds(name)) > 1 and not state,
    }


def _family(visual: nn.Module, config: dict[str, Any]) -> str:
    tower = config["vision_cfg"].get("timm_model_name") or type(visual).__name__
    kind = "CoCa" if "multimodal_cfg" in config else "CLIP"
    named = {"VisionTransformer": "ViT", "ModifiedResNet": "ResNet"}.get(tower)
    return f"{kind}, {named} of open_clip" if named else f"{kind}, {tower} of timm"


def _modules(visual: nn.Module, is_meant: Callable[[str], bool]) -> dict[str, int]:
    """Returns how many modules of a kind a tower has, by the name of their class, the most frequent first."""
    found = Counter(type(module).__name__ for module in visual.modules())
    return {name: count for name, count in found.most_common() if is_meant(name)}


def _width(visual: nn.Module) -> int:
    if hasattr(visual, "trunk"):
        return int(visual.trunk.num_features)  # type: ignore[union-attr,arg-type]  # untyped
    if hasattr(visual, "transformer"):
        return int(visual.transformer.width)  # type: ignore[union-attr,arg-type]  # untyped
    return int(visual.attnpool.k_proj.in_features)  # type: ignore[union-attr,arg-type]  # untyped


def _tags(name: str) -> list[dict[str, Any]]:
    base = name.removesuffix(QUICK)
    return [
        {"tag": tag, "name": base + QUICK * (quick and base + QUICK in model_names()), "quick_gelu": quick}
        for tag in open_clip.list_pretrained_tags_by_model(base)
        for quick in [bool(open_clip.get_pretrained_cfg(base, tag).get("quick_gelu", False))]
    ]
