"""An export opens with stock open_clip in another process and gives the accuracy that was reported."""

import json
import subprocess
import sys

import pytest
import short_training

from carft_ray.launch.single import train_once
from carft_ray.learning.context import RunContext
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.export import export_model
from carft_ray.results.trained import open_trained

STOCK = """
import json, sys
from pathlib import Path
import open_clip, torch
from PIL import Image
from safetensors import safe_open

export, images = Path(sys.argv[1]), Path(sys.argv[2])
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{export}")
model.eval()
with safe_open(export / "class_head.safetensors", "pt") as file:
    head, names = file.get_tensor("class_head"), json.loads(file.metadata()["class_names"])
    bias = file.get_tensor("class_bias") if "class_bias" in file.keys() else 0
right = count = 0
for label, name in enumerate(names):
    for path in sorted((images / name).glob("*.png")):
        with torch.no_grad():
            feature = model.encode_image(preprocess(Image.open(path))[None], normalize=True)
        right += int((feature @ head.T + bias).argmax()) == label
        count += 1
assert not any(name.startswith("carft_ray") for name in sys.modules)
print(json.dumps([right, count]))
"""


def say(text):
    del text


@pytest.mark.parametrize("overrides", [[], ["train.class_head_form=unit", "train.head_bias=true"]])
def test_stock_open_clip_reproduces_the_reported_accuracy(tmp_path, monkeypatch, overrides):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe_path = short_training.make(tmp_path)
    recipe = load_recipe(recipe_path, overrides)
    context = RunContext()
    result, _ = train_once(recipe, tmp_path, tmp_path / "out", False, "", say, context.progress, context.report)
    exported = export_model(open_trained(tmp_path / "out"), tmp_path / "export")
    assert exported.alpha == result["alpha"]
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        STOCK,
        str(tmp_path / "export"),
        str(tmp_path / "images" / "photo_val"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    right, count = json.loads(done.stdout.splitlines()[-1])
    assert right / count == pytest.approx(result["metrics"]["accuracy/id_val"], abs=1e-12)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "test sets were not read" in card
    assert load_recipe(tmp_path / "export" / "recipe.yaml").train.alpha == result["alpha"]

    zero_shot = export_model(open_trained(tmp_path / "out"), tmp_path / "export0", alpha=0.0)
    assert zero_shot.alpha == 0.0
