"""A CLIPModel folder of Hugging Face: the same logits as transformers, the same preprocessing, the right messages."""

import json
import os

import numpy as np
import pytest
import torch
from families import make_tokenizer
from PIL import Image

from carft_ray.errors import DataError, RecipeError
from carft_ray.model.clip import load_clip
from carft_ray.recipe.schema.fine_tuning import ModelConfig

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

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
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3}
    processor |= {"do_center_crop": True, "size": size[0], "crop_size": size[1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def load(folder):
    return load_clip(ModelConfig(name=f"local-dir:{folder}"))


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
    clip = load(tmp_path)
    ours, theirs = logits_of_both(clip, model)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert ours.std() > 0.1
    assert clip.config["model_cfg"]["quick_gelu"] is (activation == "quick_gelu")
    assert clip.tokenizer(SENTENCES).shape == (3, 20)
    assert (clip.mean, clip.std, clip.input_key) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "32-bicubic-shortest")
    changed(tmp_path, {"hidden_act": "gelu" if activation == "quick_gelu" else "quick_gelu"})
    ours, _ = logits_of_both(load(tmp_path), model)
    assert (ours - theirs).abs().max() > 1e-2  # the other activation would be seen


def test_preprocessing_is_that_of_the_image_processor(tmp_path):
    make_folder(tmp_path)
    clip = load(tmp_path)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.asarray(clip.to_input(image)).copy()).permute(2, 0, 1)
    ours = (pixels / 255 - torch.tensor(clip.mean)[:, None, None]) / torch.tensor(clip.std)[:, None, None]
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    step = 1 / 255 / min(clip.std)
    assert (ours - theirs).abs().max() <= 1.01 * step  # resized to whole values: torch and Pillow round one apart


def test_shards_pickled_weights_and_a_tokenizer_of_its_own_load_too(tmp_path):
    model = make_folder(tmp_path / "shards", max_shard_size="100KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    torch.testing.assert_close(*logits_of_both(load(tmp_path / "shards"), model), atol=1e-4, rtol=1e-5)
    other = make_folder(tmp_path / "own", {"vocab_size": 18, "eos_token_id": 2})
    torch.save(other.state_dict(), tmp_path / "own" / "pytorch_model.bin")
    os.remove(tmp_path / "own" / "model.safetensors")
    make_tokenizer(tmp_path / "own")
    changed(tmp_path / "own", {}, {"eos_token_id": 3})  # not the legacy 2: the first token of that id ends the sentence
    clip = load(tmp_path / "own")
    assert clip.config["model_cfg"]["text_cfg"]["pool_type"] == "eos"
    assert clip.tokenizer(["a photo"]).tolist() == [[4, 5, 2] + [1] * 17]


def test_what_open_clip_cannot_compute_or_is_no_clip_is_refused(tmp_path):
    make_folder(tmp_path)
    for keys, message in (
        ({"num_hidden_layers": 1}, r'Unexpected key\(s\) in state_dict: "visual\.transformer\.resblocks\.1\.'),
        ({"hidden_act": "relu"}, r"hidden_act must be one of quick_gelu, gelu, .* but got quick_gelu, relu in"),
    ):
        changed(tmp_path, keys)
        with pytest.raises(DataError, match=message):
            load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {}}))
    rule = r"model\.name: a Hugging Face folder must hold a CLIPModel .*, but got model_type: siglip in"
    with pytest.raises(RecipeError, match=rule):
        load(tmp_path)
