"""Soups of real trainings, of every kind of image tower."""

import numpy as np
import pytest
import short_training
from crash_host import call
from safetensors.torch import load_file, save_file

from carft_ray.layout import WEIGHTS
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import result_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")]

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
TIMM = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 32}
LAST = pytest.mark.whole
TOWERS = {
    "ViT with LoRA": (None, ["train.lora_rank=2"]),
    "ResNet": (RESNET, []),
    "timm": (TIMM, []),
    "weights in fp16": (None, []),
    "two workers": (
        None,
        ["resources.executor=ray-train", "resources.num_workers=2", "resources.cpus_per_worker=0.5"],
    ),
}


def searched(folder, tower, settings):
    """A search of two trainings and its soups; returns its folder."""
    recipe = short_training.make(folder, tower)
    words = ["resources.executor=debug", "search.baselines={}", "search.soups=[uniform, model_stock]"]
    words += [f"data.cache_dir={folder / 'cache'}"]
    overrides = [word for each in (*words, *settings) for word in ("--set", each)]
    assert call(["search", str(recipe), "--study", str(folder / "study"), *overrides]) == 0
    return folder / "study"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if "ViT" in name else LAST) for name in TOWERS])
def test_a_soup_of_any_tower_is_the_mean_of_the_files_of_its_members(tmp_path, name, monkeypatch):
    tower, settings = TOWERS[name]
    if "fp16" in name:
        plain = short_training.write_model

        def write(folder, *tower):
            plain(folder, *tower)
            path = folder / "open_clip_model.safetensors"
            save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)

        monkeypatch.setattr(short_training, "write_model", write)
    study_dir = searched(tmp_path, tower, settings)
    now = snapshot(study_dir)
    assert [row.outcome for row in now.soups] == ["complete", "complete"]
    by_name = {row.attempt_name: row for row in now.trials}
    for row in now.soups:
        result = result_of(study_dir, row)
        used = [load_file(by_name[name].place(study_dir) / WEIGHTS) for name in result["soup"]["members"]]
        found = load_file(row.place(study_dir) / WEIGHTS)
        assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
            name: (each.shape, each.dtype) for name, each in used[0].items()
        }
        if row.soup["kind"] == "mean":
            for name, tensor in found.items():
                if tensor.is_floating_point():
                    mean = np.mean([each[name].double().numpy() for each in used], axis=0)
                    np.testing.assert_allclose(tensor.double().numpy(), mean, rtol=1e-6, atol=1e-6)
        assert [point["alpha"] for point in result["curve"]]
