"""A CLIPModel folder of Hugging Face, read and written: the logits, tokens and pixels of transformers."""

import copy
import json
import os

import numpy as np
import open_clip
import pytest
import torch
import transformers
from families import make_tokenizer
from PIL import Image
from tiny import CONFIG, load_folder
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from carft_ray.errors import DataError, RecipeError
from carft_ray.model.clip import wrap_model
from carft_ray.results.export.huggingface import misfits, write_huggingface

pytestmark = pytest.mark.slow

TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT |= {"max_position_embeddings": 20, "vocab_size": 49408}
VISION = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
SENTENCES = ["a photo of a cat", "a sketch of the dog", "house"]


def make_folder(folder, text=None, vision=None, **saved):
    """Writes a CLIPModel with random weights as transformers writes it, and the files of its image processor."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**TEXT, **(text or {})}, vision_config={**VISION, **(vision or {})}, projection_dim=16
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder, **saved)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_center_crop": True}
    processor |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def logits_of_both(clip, model):
    images, tokens = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), clip.tokenizer(SENTENCES)
    with torch.inference_mode():
        ours = clip.model.get_logits(images, tokens)[0]
        theirs = model(input_ids=tokens, pixel_values=images).logits_per_image
    return ours, theirs


def changed(folder, *towers):
    """Changes keys of the vision tower of a folder, and those of the text tower if they are given."""
    config = json.loads((folder / "config.json").read_text())
    for name, keys in zip(("vision_config", "text_config"), towers, strict=False):
        config[name] |= keys
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("activation", "eos"), [("quick_gelu", 2), ("gelu", 49407), ("gelu_pytorch_tanh", 2), ("quick_gelu", 49407)]
)
def test_logits_are_those_of_transformers(tmp_path, activation, eos):
    changes = {"hidden_act": activation, "layer_norm_eps": 1e-6}
    model = make_folder(tmp_path, {**changes, "eos_token_id": eos}, changes)
    clip = load_folder(tmp_path)
    ours, theirs = logits_of_both(clip, model)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert ours.std() > 0.1
    assert clip.config["model_cfg"]["quick_gelu"] is (activation == "quick_gelu")
    assert clip.tokenizer(SENTENCES).shape == (3, 20)
    assert (clip.mean, clip.std, clip.input_key) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "32-bicubic-shortest")
    other = {"hidden_act": "gelu" if activation == "quick_gelu" else "quick_gelu"}
    changed(tmp_path, other, other)
    ours, _ = logits_of_both(load_folder(tmp_path), model)
    assert (ours - theirs).abs().max() > 1e-2  # the other activation would be seen


def test_shards_pickled_weights_and_a_tokenizer_of_its_own_load_too(tmp_path):
    model = make_folder(tmp_path / "shards", max_shard_size="100KB")
    torch.testing.assert_close(*logits_of_both(load_folder(tmp_path / "shards"), model), atol=1e-4, rtol=1e-5)
    other = make_folder(tmp_path / "own", {"vocab_size": 18, "eos_token_id": 2})
    torch.save(other.state_dict(), tmp_path / "own" / "pytorch_model.bin")
    os.remove(tmp_path / "own" / "model.safetensors")
    make_tokenizer(tmp_path / "own")
    changed(tmp_path / "own", {}, {"eos_token_id": 3})  # not the legacy 2: the first token of that id ends the sentence
    clip = load_folder(tmp_path / "own")
    assert clip.config["model_cfg"]["text_cfg"]["pool_type"] == "eos"
    assert clip.tokenizer(["a photo"]).tolist() == [[4, 5, 2] + [1] * 17]


def test_what_open_clip_cannot_compute_or_is_no_clip_is_refused(tmp_path):
    make_folder(tmp_path)
    for keys, message in (
        ({"num_hidden_layers": 1}, r'Unexpected key\(s\) in state_dict: "visual\.transformer\.resblocks\.1\.'),
        ({"hidden_act": "relu"}, r"hidden_act must be one of quick_gelu, gelu, .* but got relu, quick_gelu in"),
    ):
        changed(tmp_path, keys)
        with pytest.raises(DataError, match=message):
            load_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {}}))
    rule = r"model\.name: a Hugging Face folder must hold a CLIPModel .*, but got model_type: siglip in"
    with pytest.raises(RecipeError, match=rule):
        load_folder(tmp_path)


ODD_SENTENCES = [
    "a photo of a circle",
    "A Sketch of 2 hearts,  isn't it?",
    "caf\u00e9 \u2013 na\u00efve (\u4e2d) \U0001f600",
    "word " * 40,  # longer than the context
    "",
]


def make(kind=open_clip.CLIP, preprocess=None, tokenizer=None, text=None, vision=None, **model):
    """Returns a tiny CLIP with other settings than the usual one; its biases and scales are no zeros and ones."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config["vision_cfg"].update(vision or {})
    config["text_cfg"].update(text or {})
    config.update(model)
    clip = kind(**copy.deepcopy(config))
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        clip.logit_scale.fill_(3.0)
    open_clip.set_model_preprocess_cfg(
        clip, {**vars(open_clip.transform.PreprocessCfg()), "size": 16} | (preprocess or {})
    )
    return wrap_model(clip, tokenizer or open_clip.SimpleTokenizer(context_length=16), config)


WIDE = {"layers": 3, "mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-3}, "patch_size": 4}
SAME = {
    "gelu": {},
    "quick_gelu, a text tower of its own": {"kind": open_clip.CustomTextCLIP, "quick_gelu": True},
    "other widths, squashed images, gelu by tanh": {
        "embed_dim": 24,
        "vision": {**WIDE, "act_kwargs": {"approximate": "tanh"}},
        "text": {"layers": 2, "width": 32, "heads": 4, "norm_kwargs": {"eps": 1e-3}},
        "preprocess": {"resize_mode": "squash", "interpolation": "bilinear", "mean": (0.5,) * 3},
    },
}


@pytest.mark.parametrize("settings", SAME.values(), ids=SAME)
def test_transformers_gives_the_same_pixels_tokens_and_logits_and_so_does_the_model_read_back(tmp_path, settings):
    clip = make(**settings)
    assert misfits(clip) == []
    write_huggingface(tmp_path, clip, clip.model.state_dict())
    model, loading = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())  # nothing missing, nothing left over
    processor = CLIPProcessor.from_pretrained(tmp_path, backend="pil")

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((16, 16), (50, 33), (19, 40))]
    inputs = processor(text=ODD_SENTENCES, images=images, padding=True, truncation=True, return_tensors="pt")
    cfg = open_clip.transform.PreprocessCfg(**clip.model.visual.preprocess_cfg)
    pixels = torch.stack([open_clip.transform.image_transform_v2(cfg, False)(image) for image in images])
    torch.testing.assert_close(inputs.pixel_values, pixels, atol=1e-6, rtol=0)
    tokens = clip.tokenizer(ODD_SENTENCES)
    end = clip.tokenizer.eot_token_id
    for ours, theirs in zip(tokens.tolist(), inputs.input_ids.tolist(), strict=True):
        assert theirs[: theirs.index(end) + 1] == ours[: ours.index(end) + 1]
    again = load_folder(tmp_path)
    with torch.no_grad():
        features, expected = clip.model.encode_image(pixels, normalize=True), clip.model.get_logits(pixels, tokens)[0]
        found, read_back = model.eval()(**inputs), again.model.get_logits(pixels, tokens)[0]
    torch.testing.assert_close(found.image_embeds, features, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits_per_image, expected, atol=1e-4, rtol=0)
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "CLIPProcessor"
    torch.testing.assert_close(read_back, expected, atol=1e-5, rtol=1e-5)
    assert again.tokenizer(ODD_SENTENCES).tolist() == tokens.tolist()
    for name in ("image_size", "input_key", "mean", "std", "logit_scale"):
        assert getattr(again, name) == getattr(clip, name), name
    if not settings.get("kind"):
        assert again.weights_hash == clip.weights_hash


RESNET = {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "image_size": 32}
TIMM = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"}
CANONICAL = open_clip.SimpleTokenizer(context_length=16, clean="canonicalize")
MISFITS = {
    "a model of the kind CoCa": {"kind": open_clip.CoCa, "multimodal_cfg": CONFIG["text_cfg"]},
    "an image tower of the kind ModifiedResNet": {"vision": RESNET},
    "an image tower of the kind TimmModel": {"vision": TIMM},
    "attention pooling": {"vision": {"attentional_pool": True, "attn_pooler_heads": 2}},
    "the image's pooling 'avg'": {"vision": {"pool_type": "avg"}},
    "no norm before the blocks": {"vision": {"no_ln_pre": True}},
    "blocks of another kind": {"vision": {"ls_init_value": 0.1}},
    "a text tower without causal mask": {"kind": open_clip.CustomTextCLIP, "text": {"no_causal_mask": True}},
    "the text's pooling 'last'": {"text": {"pool_type": "last"}},
    "no text projection, or one with a bias": {"kind": open_clip.CustomTextCLIP, "text": {"proj_bias": True}},
    "a logit_bias": {"init_logit_bias": -10.0},
    "a tokenizer of another kind": {"tokenizer": type("Other", (open_clip.SimpleTokenizer,), {})(context_length=16)},
    "a tokenizer that cleans otherwise": {"tokenizer": CANONICAL},
    "images that are padded": {"preprocess": {"resize_mode": "longest"}},
}


@pytest.mark.parametrize(("words", "settings"), MISFITS.items(), ids=MISFITS)
def test_a_model_that_transformers_does_not_have_is_known_by_what_differs(words, settings):
    assert misfits(make(**settings)) == [words]
