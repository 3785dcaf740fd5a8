"""Names of models and weights, read without torch, against what open_clip itself says."""

import open_clip
import pytest

from carft_ray.learning.catalog import SANDBOX, check_model, model_names, pretrained_tags
from carft_ray.recipe.schema import ModelPart


def test_names_and_tags_are_those_of_open_clip():
    assert model_names() == (SANDBOX, *sorted(open_clip.list_models()))
    for name in open_clip.list_models():
        assert list(pretrained_tags(name)) == open_clip.list_pretrained_tags_by_model(name)


@pytest.mark.parametrize("pretrained", ["openai", "random", "weights.pt", "~/weights.pt", "plain"])
def test_a_tag_random_and_a_file_are_weights(tmp_path, monkeypatch, pretrained):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("weights.pt", "plain"):
        (tmp_path / name).touch()
    assert check_model(ModelPart(name="ViT-B/32", pretrained=pretrained), tmp_path) == []


def test_a_local_folder_without_weights_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    [problem] = check_model(ModelPart(name=f"local-dir:{tmp_path}"), tmp_path)
    assert str(problem).startswith(
        f"model.name: local-dir: needs a folder with weights, but got none in {tmp_path} that end in .safetensors"
    )
    (tmp_path / "model.safetensors").touch()
    assert check_model(ModelPart(name=f"local-dir:{tmp_path}"), tmp_path) == []
