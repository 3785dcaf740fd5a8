"""What is written for transformers is, to transformers, the same model: logits, tokens, pixels."""

import copy
import dataclasses

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny import CONFIG, load_folder
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from carft_ray.model.clip import wrap_model
from carft_ray.results.export.huggingface import misfits, to_huggingface, write_huggingface

pytestmark = pytest.mark.slow

SENTENCES = [
    "a photo of a circle",
    "A Sketch of 2 hearts,  isn't it?",
    "caf\u00e9 \u2013 na\u00efve (\u4e2d) \U0001f600",
    "word " * 40,  # longer than the context
    "",
]


def make(custom_text=False, preprocess=None, tokenizer=None, text=None, vision=None, **model):
    """Returns a tiny CLIP with other settings than the usual one; its biases and scales are no zeros and ones."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config["vision_cfg"].update(vision or {})
    config["text_cfg"].update(text or {})
    config.update(model)
    clip = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**copy.deepcopy(config))
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
    "quick_gelu, a text tower of its own": {"custom_text": True, "quick_gelu": True},
    "other widths, squashed images, gelu by tanh": {
        "embed_dim": 24,
        "vision": {**WIDE, "act_kwargs": {"approximate": "tanh"}},
        "text": {"layers": 2, "width": 32, "heads": 4, "norm_kwargs": {"eps": 1e-3}},
        "preprocess": {"resize_mode": "squash", "interpolation": "bilinear", "mean": (0.5,) * 3},
    },
}


@pytest.mark.parametrize("settings", SAME.values(), ids=SAME)
def test_transformers_gives_the_same_pixels_tokens_and_logits(tmp_path, settings):
    clip = make(**settings)
    assert misfits(clip) == []
    write_huggingface(tmp_path, clip, clip.model.state_dict())
    model, loading = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())  # nothing missing, nothing left over
    processor = CLIPProcessor.from_pretrained(tmp_path, backend="pil")

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((16, 16), (50, 33), (19, 40))]
    inputs = processor(text=SENTENCES, images=images, padding=True, truncation=True, return_tensors="pt")
    pre = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**clip.model.visual.preprocess_cfg), False
    )
    pixels = torch.stack([pre(image) for image in images])
    torch.testing.assert_close(inputs.pixel_values, pixels, atol=1e-6, rtol=0)
    tokens = clip.tokenizer(SENTENCES)
    end = clip.tokenizer.eot_token_id
    for ours, theirs in zip(tokens.tolist(), inputs.input_ids.tolist(), strict=True):
        assert theirs[: theirs.index(end) + 1] == ours[: ours.index(end) + 1]
    with torch.no_grad():
        features = clip.model.encode_image(pixels, normalize=True)
        expected = clip.logit_scale * features @ clip.model.encode_text(tokens, normalize=True).T
        found = model.eval()(**inputs)
    torch.testing.assert_close(found.image_embeds, features, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits_per_image, expected, atol=1e-4, rtol=0)
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "CLIPProcessor"


@pytest.mark.parametrize("settings", SAME.values(), ids=SAME)
def test_what_is_written_is_read_back_as_the_same_model(tmp_path, settings):
    clip = make(**settings)
    write_huggingface(tmp_path, clip, clip.model.state_dict())
    again = load_folder(tmp_path)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        for name, inputs in (("get_logits", (images, clip.tokenizer(SENTENCES))), ("encode_image", (images,))):
            expected, found = getattr(clip.model, name)(*inputs), getattr(again.model, name)(*inputs)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert again.tokenizer(SENTENCES).tolist() == clip.tokenizer(SENTENCES).tolist()
    for name in ("image_size", "input_key", "mean", "std", "logit_scale"):
        assert getattr(again, name) == getattr(clip, name), name
    if not settings.get("custom_text"):
        assert again.weights_hash == clip.weights_hash


class OtherTokenizer(open_clip.SimpleTokenizer):
    pass


RESNET = {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "image_size": 32}
TIMM = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"}
CANONICAL = open_clip.SimpleTokenizer(context_length=16, clean="canonicalize")
MISFITS = {
    "an image tower of the kind ModifiedResNet": {"vision": RESNET},
    "an image tower of the kind TimmModel": {"vision": TIMM},
    "attention pooling": {"vision": {"attentional_pool": True, "attn_pooler_heads": 2}},
    "the image's pooling 'avg'": {"vision": {"pool_type": "avg"}},
    "no norm before the blocks": {"vision": {"no_ln_pre": True}},
    "blocks of another kind": {"vision": {"ls_init_value": 0.1}},
    "a text tower without causal mask": {"custom_text": True, "text": {"no_causal_mask": True}},
    "the text's pooling 'last'": {"text": {"pool_type": "last"}},
    "no text projection, or one with a bias": {"custom_text": True, "text": {"proj_bias": True}},
    "a logit_bias": {"init_logit_bias": -10.0},
    "a tokenizer of another kind": {"tokenizer": OtherTokenizer(context_length=16)},
    "a tokenizer that cleans otherwise": {"tokenizer": CANONICAL},
    "images that are padded": {"preprocess": {"resize_mode": "longest"}},
}


@pytest.mark.parametrize(("words", "settings"), MISFITS.items(), ids=MISFITS)
def test_a_model_that_transformers_does_not_have_is_known_by_what_differs(words, settings):
    assert misfits(make(**settings)) == [words]


def test_a_model_with_a_decoder_is_no_clip_and_a_tensor_without_a_place_an_error(tiny_clip):
    multimodal = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    clip = dataclasses.replace(tiny_clip, model=open_clip.CoCa(**copy.deepcopy(CONFIG), multimodal_cfg=multimodal))
    assert misfits(clip) == ["a model of the kind CoCa"]
    with pytest.raises(KeyError):
        to_huggingface({"visual.attn_pool.query": torch.zeros(2)})
