"""Names of models and weights: what is refused before anything is loaded."""

import json

import open_clip
import pytest

from carft_ray.model.catalog import activation_problems, check_model, size_problems
from carft_ray.recipe.loading import absolute_paths
from carft_ray.recipe.schema.fine_tuning import ModelConfig


def test_each_tag_is_refused_under_the_name_of_the_other_activation_and_all_sizes_are_sizes():
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        assert size_problems(config, name) == []
        for tag in open_clip.list_pretrained_tags_by_model(name):
            quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
            found = check_model(ModelConfig(name=name, pretrained=tag))
            assert found == activation_problems(name, quick, f"'{tag}'")
            assert bool(found) is (quick != bool(config.get("quick_gelu", False)))


@pytest.mark.parametrize("pretrained", ["laion2b_s34b_b79k", "random", "weights.pt", "~/weights.pt"])
def test_a_tag_random_and_a_file_are_weights(tmp_path, monkeypatch, pretrained):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pt").touch()
    assert check_model(absolute_paths(ModelConfig(name="ViT-B/32", pretrained=pretrained), tmp_path)) == []


def problem_of(tmp_path, name, pretrained=None):
    [problem] = check_model(ModelConfig(name=name, pretrained=pretrained))
    return str(problem)


def test_a_local_folder_is_checked_before_anything_is_loaded(tmp_path):
    name, config = f"local-dir:{tmp_path}", tmp_path / "open_clip_config.json"
    tokenizer = json.dumps({"model_cfg": {"text_cfg": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}}})
    for file, content, rule in (
        (None, "", "local-dir: needs a folder with open_clip_config.json, or one with a CLIPModel of Hugging Face"),
        (config, "{}", f"local-dir: needs a folder with weights, but got none in {tmp_path} that end in .safetensors"),
        (tmp_path / "model.safetensors", "", "open_clip_config.json must be JSON with model_cfg, as open_clip writes"),
        (config, tokenizer, "local-dir: needs the files of its tokenizer (timm/ViT-B-16-SigLIP) in the folder"),
    ):
        if file is not None:
            file.write_text(content)
        assert problem_of(tmp_path, name).startswith(f"model.name: {rule}")
    (tmp_path / "tokenizer.json").touch()
    assert check_model(ModelConfig(name=name)) == []
    rule = "must be left out for a model.name that begins with local-dir:, which has its weights"
    assert problem_of(tmp_path, name, "openai") == f"model.pretrained: {rule}, but got 'openai'"


def test_a_page_of_the_hub_and_a_folder_as_weights_are_checked(tmp_path):
    assert check_model(ModelConfig(name="hf-hub:timm/ViT-B-16-SigLIP")) == []
    rule = "model.name: hf-hub: needs the owner and the name of a page, but got 'hf-hub:nothing'"
    assert problem_of(tmp_path, "hf-hub:nothing") == rule
    assert problem_of(tmp_path, "ViT-B-32", str(tmp_path)).startswith(
        f"model.pretrained: must be a weights file, but got the folder {tmp_path}\n    Write model.name: local-dir:"
    )


def test_a_wrong_tag_lists_random_the_tags_and_the_nearest():
    tags = open_clip.list_pretrained_tags_by_model("ViT-B-32")
    for given, near in (("laion2b_s34b_b79", "laion2b_s34b_b79k"), ("rndom", "random")):
        (problem,) = check_model(ModelConfig(name="ViT-B-32", pretrained=given))
        assert (problem.nearest, problem.allowed) == (near, ("random", *tags))
