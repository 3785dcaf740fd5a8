"""Writing a CLIP as a folder of the Hugging Face library, without that library.

    FOLDER/{config.json, model.safetensors, preprocessor_config.json, vocab.json, merges.txt, tokenizer_config.json}

``transformers.CLIPModel`` holds one architecture: a ViT with a class token and a causal text transformer that reads
its sentence from the last token. ``misfits`` says what of a model is otherwise; such a model has no place there.
Its tokenizer gives the tokens of open_clip's, save that open_clip also undoes HTML entities and mends broken Unicode.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip import CLIP, CustomTextCLIP, SimpleTokenizer
from open_clip.tokenizer import get_clean_fn
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn

from carft_ray.files import write_json, write_text
from carft_ray.model.clip import Clip
from carft_ray.model.hugging_face import FILTERS, TRANSPOSED, names_of
from carft_ray.training.checkpoint import save_tensors

_START, _END = "<|startoftext|>", "<|endoftext|>"  # what the library's CLIP tokenizer calls them
_RESAMPLING = {name: number for number, name in FILTERS.items()}


def misfits(clip: Clip) -> list[str]:
    """Returns what of a model ``transformers.CLIPModel`` does not have, in words; empty where it holds the model."""
    model: Any = clip.model
    tokenizer: Any = clip.tokenizer
    visual, text = model.visual, getattr(model, "text", model)
    if type(model) not in (CLIP, CustomTextCLIP):
        return [f"a model of the kind {type(model).__name__}"]
    if not isinstance(visual, VisionTransformer):
        return [f"an image tower of the kind {type(visual).__name__}"]
    if not isinstance(getattr(text, "transformer", None), Transformer):
        return [f"a text tower of the kind {type(text).__name__}"]
    pool = model.text_pool_type if text is model else text.pool_type
    preprocess = clip.config["preprocess_cfg"]
    plain = type(tokenizer) is SimpleTokenizer
    found = {
        "attention pooling": visual.attn_pool is not None,
        f"the image's pooling '{visual.pool_type}'": visual.pool_type != "tok",
        "no norm before the blocks": isinstance(visual.ln_pre, nn.Identity),
        "patches that are not square": visual.patch_size[0] != visual.patch_size[1],
        "blocks of another kind": any(not _is_plain(block) for tower in (visual, text) for block in _blocks(tower)),
        "an activation of another kind": any(_activation(tower) is None for tower in (visual, text)),
        "a text tower without causal mask": text.attn_mask is None,
        f"the text's pooling '{pool}'": pool not in ("argmax", "eos"),
        "a class token in the text": getattr(text, "cls_emb", None) is not None,
        "no text projection, or one with a bias": not isinstance(text.text_projection, Tensor),
        "a logit_bias": getattr(model, "logit_bias", None) is not None,
        "a tokenizer of another kind": not plain or tokenizer.reduction_fn is not None,
        "a tokenizer that cleans text differently": plain and tokenizer.clean_fn is not get_clean_fn("lower"),
        "images that are padded": preprocess["resize_mode"] == "longest",
    }
    return [words for words, holds in found.items() if holds]


def write_huggingface(folder: Path, clip: Clip, state: Mapping[str, Tensor]) -> None:
    """Writes the files; the caller makes the folder appear whole.

    Args:
        folder: An existing folder.
        clip: A model without ``misfits``.
        state: Its weights under open_clip's names, with the image tower that is to be written.
    """
    write_json(folder / "config.json", _config(clip))
    save_tensors(folder / "model.safetensors", to_huggingface(state), {"format": "pt"})
    write_json(folder / "preprocessor_config.json", _preprocessing(clip))
    _write_tokenizer(folder, clip)


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns open_clip's tensors under the names of ``transformers.CLIPModel``, projections transposed.

    Args:
        state: State of a model without ``misfits``.

    Raises:
        KeyError: A tensor has no place there.
    """
    converted: dict[str, Tensor] = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("text.")  # prefix of a text tower of its own (CustomTextCLIP)
        theirs = names_of(name)
        pieces = [tensor] if len(theirs) == 1 else [piece.clone() for piece in tensor.chunk(len(theirs))]
        converted |= dict(zip(theirs, [piece.T if name in TRANSPOSED else piece for piece in pieces], strict=True))
    return converted


def _blocks(tower: Any) -> list[Any]:
    return list(tower.transformer.resblocks)


def _is_plain(block: nn.Module) -> bool:
    return type(block) is ResidualAttentionBlock and isinstance(block.ls_1, nn.Identity)


def _activation(tower: Any) -> str | None:
    """Returns the library's name for the activation of a tower's blocks, None where it has none."""
    module = getattr(_blocks(tower)[0].mlp, "gelu", None)
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    return None


def _config(clip: Clip) -> dict[str, Any]:
    model: Any = clip.model
    visual, text = model.visual, getattr(model, "text", model)
    tokenizer: Any = clip.tokenizer
    projection = visual.proj.shape[1]
    ends = {"bos_token_id": tokenizer.sot_token_id, "eos_token_id": tokenizer.eot_token_id}
    ends["pad_token_id"] = tokenizer.eot_token_id  # padding comes after the end, where the causal mask hides it
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": projection,
        "logit_scale_init_value": float(model.logit_scale),
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": len(text.positional_embedding),
            **_tower_config(text, projection),
            **ends,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
            **_tower_config(visual, projection),
        },
    }


def _tower_config(tower: Any, projection: int) -> dict[str, Any]:
    blocks = _blocks(tower)
    return {
        "hidden_size": blocks[0].attn.embed_dim,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "hidden_act": _activation(tower),
        "layer_norm_eps": blocks[0].ln_1.eps,
        "projection_dim": projection,
    }


def _preprocessing(clip: Clip) -> dict[str, Any]:
    preprocess, size = clip.config["preprocess_cfg"], clip.image_size
    square = {"height": size, "width": size}
    squash = preprocess["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": size},
        "resample": _RESAMPLING[preprocess["interpolation"]],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(clip.mean),
        "image_std": list(clip.std),
    }


def _write_tokenizer(folder: Path, clip: Clip) -> None:
    tokenizer: Any = clip.tokenizer
    renamed = {tokenizer.sot_token_id: _START, tokenizer.eot_token_id: _END}
    vocabulary = {renamed.get(index, word): index for word, index in tokenizer.encoder.items()}
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    lines = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get) if len(pair) == 2]
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines]) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context_length, "bos_token": _START}
    ends = dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END)
    write_json(folder / "tokenizer_config.json", config | ends)
