"""`carft-ray model`: what it says of each family, that it holds no weights, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from families import FAMILIES, make_folder
from tiny import load_folder
from typer.testing import CliRunner

from carft_ray.cli import app
from carft_ray.errors import DataError, RecipeError
from carft_ray.learning.models.building import build_model
from carft_ray.learning.models.clip import state_hash
from carft_ray.learning.models.describe import describe
from carft_ray.recipe.fine_tuning import ModelConfig

SCRIPT = """
import resource, sys
from pathlib import Path
from carft_ray.learning.models.describe import describe
from carft_ray.recipe.fine_tuning import ModelConfig
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = describe(ModelConfig(name="ViT-bigG-14", pretrained="random"))
print(found["num_parameters"]["image"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openai-vit", "openai-resnet", "siglip", "mobileclip2"])
def test_what_is_told_is_what_the_loaded_model_has(kind, tmp_path):
    folder = make_folder(FAMILIES[kind], tmp_path)
    found, clip = describe(ModelConfig(name=f"local-dir:{folder}")), load_folder(folder)
    visual = clip.model.visual
    assert found["input"]["size"] == clip.image_size
    assert (tuple(found["input"]["mean"]), tuple(found["input"]["std"])) == (clip.mean, clip.std)
    assert clip.input_key == "-".join(str(found["input"][key]) for key in ("size", "interpolation", "resize_mode"))
    assert found["context_length"] == clip.tokenizer(["a"]).shape[1]
    assert found["logit_scale"] == pytest.approx(clip.logit_scale)
    assert (found["has_logit_bias"], found["logit_bias"]) == (kind == "siglip", clip.logit_bias)
    num_image = sum(parameter.numel() for parameter in visual.parameters())
    assert found["num_parameters"]["image"] == num_image
    assert sum(layer["num_parameters"] for layer in found["layers"]) == num_image
    assert sum(found["num_parameters"].values()) == sum(parameter.numel() for parameter in clip.model.parameters())
    assert found["num_blocks"] == FAMILIES[kind].layers - 2
    assert found["has_batch_norm"] is (kind in ("openai-resnet", "mobileclip2"))
    assert found["memory_bytes"]["training"] == 20 * num_image


@pytest.mark.slow
def test_what_is_told_of_known_names():
    found = describe(ModelConfig(name="RN50-quickgelu", pretrained="openai"))
    assert found["weights"] == "not on this machine"
    assert found["logit_scale"] is None
    assert found["activations"] == {"image": "ReLU", "text": "QuickGELU"}
    assert found["widths"] == {"image": 2048, "text": 512, "embedding": 1024}
    assert {"tag": "openai", "name": "RN50-quickgelu", "quick_gelu": True} in found["tags"]
    found = describe(ModelConfig(name="ViT-L-14", pretrained="random"))
    assert found["preprocessing_differs"]
    assert {tag["name"] for tag in found["tags"]} == {"ViT-L-14", "ViT-L-14-quickgelu"}
    assert [tag["tag"] for tag in found["tags"]] == open_clip.list_pretrained_tags_by_model("ViT-L-14")


@pytest.mark.slow
def test_a_model_of_ten_gigabytes_is_told_without_holding_it():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    num_image, kilobytes = map(int, done.stdout.split())
    assert num_image > 1.8e9
    assert kilobytes < 100_000


@pytest.mark.slow
def test_weights_that_do_not_fit_are_told_without_loading_them(tmp_path):
    folder = make_folder(FAMILIES["openai-vit"], tmp_path)
    file = folder / "open_clip_model.safetensors"
    (folder / "open_clip_config.json").rename(folder / "other.json")
    with pytest.raises(
        DataError, match=r"the tensors of open_clip_model\.safetensors must be those of the model, but got"
    ):
        describe(ModelConfig(name="ViT-B-32-quickgelu", pretrained=str(file)))
    file.write_bytes(b"\x00" * 100)
    with pytest.raises(DataError, match="must be a weights file that can be read"):
        describe(ModelConfig(name="ViT-B-32-quickgelu", pretrained=str(file)))
    with pytest.raises(RecipeError, match="did you mean 'ViT-B-32'"):
        describe(ModelConfig(name="ViT-B-33"))


def run(*words):
    return CliRunner().invoke(app, ["model", *map(str, words)], catch_exceptions=True)


@pytest.mark.slow
def test_the_command_takes_a_name_a_folder_and_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    named = run("ViT-B-16-SigLIP")
    assert named.exit_code == 0
    assert "left out: a constant shift of all logits changes no softmax" in named.output
    assert "carft-ray model ViT-B-16-SigLIP --pretrained webli" in named.output
    assert "trunk.attn_pool" in named.output
    settings = ["--set", "train.freeze_layers=2", "--set", "train.layer_decay=0.5"]
    layers = json.loads(run("search_spaces/quickstart.yaml", "--json", *settings).stdout)["layers"]
    assert layers[0]["name"].startswith("conv1")
    assert [layer["lr_factor"] for layer in layers] == [0, 0, 0.0625, 0.125, 0.25, 0.5]
    told = run("search_spaces/quickstart.yaml", *settings)
    assert re.search(r"1\s+layer1\.0\s+4,928\s+frozen\s+2\s+layer2\.0\s+24,192\s+0\.0625 x", told.output)
    folder = run(make_folder(FAMILIES["coca"], tmp_path / "coca"))
    assert folder.exit_code == 0
    assert "CoCa, ViT of open_clip" in folder.output


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["ViT-B-32", "--pretrained", "openai"],
            "must compute the activation that 'openai' was trained with (QuickGELU)",
        ),
        (["ViT-B-33"], "model.name: must be 'sandbox', 'local-dir:FOLDER', 'hf-hub:OWNER/NAME' or a model name of"),
        (["ViT-B-32", "--set", "model.name=x"], "--set: needs a recipe in place of the name of a model"),
        (["r.yaml", "--pretrained", "openai"], "--pretrained: must stand without a recipe, which names its weights"),
        (["sandbox", "--pretrained", "openai"], "model.pretrained: the sandbox has its own weights; leave the key out"),
    ],
)
def test_wrong_use_is_told(words, error):
    assert error in str(run(*words).exception)


@pytest.mark.slow
def test_a_page_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from carft_ray.learning.models.clip import load_clip

    page = tmp_path / "models--nobody--clip"
    make_folder(FAMILIES["openai-vit"], page / "snapshots" / ("a" * 40))
    (page / "refs").mkdir()
    (page / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    part = ModelConfig(name="hf-hub:nobody/clip")
    clip = load_clip(part)
    assert clip.weights_hash == load_folder(page / "snapshots" / ("a" * 40)).weights_hash
    assert describe(part)["logit_scale"] == pytest.approx(clip.logit_scale)
    assert torch.is_tensor(clip.tokenizer(["a"]))


@pytest.mark.slow
def test_untrained_weights_are_the_same_in_every_process_and_draw_nothing_from_the_generator(tmp_path):
    make_folder(FAMILIES["openai-resnet"], tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = build_model(f"local-dir:{tmp_path}")
    torch.testing.assert_close(torch.rand(4), expected)
    torch.manual_seed(4)
    assert state_hash(first.state_dict()) == state_hash(build_model(f"local-dir:{tmp_path}").state_dict())
