"""Weights files: every form that loads, what is refused with which message, and the trap of QuickGELU."""

import hashlib
import json
import logging

import open_clip
import pytest
import torch
from families import FAMILIES, make_folder, make_tokenizer
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny import CONFIG, load_folder

from carft_ray.errors import DataError, RecipeError
from carft_ray.model.building import build_model
from carft_ray.model.catalog import model_warnings
from carft_ray.model.clip import load_clip, state_hash
from carft_ray.model.weights_files import OPENAI_SIZES
from carft_ray.recipe.schema.fine_tuning import ModelConfig

pytestmark = pytest.mark.slow

# models that the tests add to open_clip's list
NAME, QUICK, OTHER, WORDS = (f"carft-test-ViT{end}" for end in ("", "-quickgelu", "-4", "-words"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small models in open_clip's list; returns a state of the first."""
    folder = tmp_path_factory.mktemp("configs")
    other = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "patch_size": 4}}
    text = {"vocab_size": 18, "hf_tokenizer_name": "nobody/words", "pool_type": "last", "context_length": 8}
    words = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], **text}}
    for name, config in ((NAME, CONFIG), (QUICK, {**CONFIG, "quick_gelu": True}), (OTHER, other), (WORDS, words)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    state = build_model(NAME).state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name != "logit_scale":
                value.add_(0.3 * torch.randn_like(value))
    yield state
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    for name in (NAME, QUICK, OTHER, WORDS):
        open_clip.factory._MODEL_CONFIGS.pop(name)


def load(path, name=NAME):
    return load_clip(ModelConfig(name=name, pretrained=str(path)))


def message(path, name=NAME, error=DataError):
    with pytest.raises(error) as caught:
        load(path, name)
    [problem] = caught.value.problems
    return str(problem)


def test_every_form_of_file_gives_the_same_model(models, tmp_path):
    save_file(models, tmp_path / "plain.safetensors")
    torch.save(models, tmp_path / "plain.pt")
    wrapped = {f"module._orig_mod.{name}": value for name, value in models.items()}
    extra = {"epoch": 3, "name": "x", "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}
    torch.save({**extra, "state_dict": wrapped}, tmp_path / "epoch_3.bin")
    assert len({load(path).weights_hash for path in tmp_path.iterdir()}) == 1
    save_file({name: value.half() for name, value in models.items()}, tmp_path / "half.safetensors")
    half = load(tmp_path / "half.safetensors").model
    assert half.visual.proj.dtype == torch.float32
    torch.testing.assert_close(half.state_dict()["visual.proj"], models["visual.proj"], atol=1e-3, rtol=1e-3)


def test_what_is_no_file_of_tensors_is_refused_and_nothing_is_run(models, tmp_path):
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    pointer = f"model.pretrained: must be a weights file, but got the Git LFS pointer {tmp_path}/pointer.bin\n"
    assert message(tmp_path / "pointer.bin") == f"{pointer}    Run: git lfs pull"
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "must hold named tensors, or a checkpoint with state_dict, but got" in message(tmp_path / "empty.pt")
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes(b"\x00" * 100)
        assert message(tmp_path / name).startswith("model.pretrained: must be a weights file that can be read, but got")


def test_a_torch_script_archive_is_refused_with_the_call_that_opens_it(models, tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "ViT-B-32.pt"))
    text = message(tmp_path / "ViT-B-32.pt")
    assert text.startswith("model.pretrained: must be a file of tensors; a TorchScript archive, such as OpenAI's own")
    assert "torch.jit.load(FILE).state_dict()" in text


def test_missing_extra_and_reshaped_tensors_are_named(models, tmp_path):
    save_file(models, tmp_path / "fine.safetensors")
    text = message(tmp_path / "fine.safetensors", OTHER)
    assert text.startswith("model.pretrained: the tensors of fine.safetensors must be those of the model, but got size")
    assert "torch.Size([32, 3, 8, 8]) from checkpoint, the shape in current model is torch.Size([32, 3, 4, 4])" in text
    save_file({**models, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    assert message(tmp_path / "more.safetensors").endswith('but got Unexpected key(s) in state_dict: "more".')
    less = {name: value for name, value in models.items() if not name.startswith("visual.ln")}
    save_file(less, tmp_path / "less.safetensors")
    missing = 'but got Missing key(s) in state_dict: "visual.ln_pre.weight", "visual.ln_pre.bias", '
    assert missing in message(tmp_path / "less.safetensors")


def test_positions_of_another_image_size_are_interpolated_with_a_warning(models, tmp_path, caplog):
    larger = {**models, "visual.positional_embedding": torch.randn(1 + 9, 32)}
    save_file(larger, tmp_path / "larger.safetensors")
    with caplog.at_level(logging.WARNING, "carft_ray"):
        clip = load(tmp_path / "larger.safetensors")
    assert clip.model.visual.positional_embedding.shape == (5, 32)
    assert "interpolated (rows of visual.positional_embedding 10 to 5)" in caplog.text


def test_gelu_and_quick_gelu_give_other_logits_and_openais_state_is_refused_under_a_gelu_name(models, tmp_path):
    save_file(models, tmp_path / "weights.safetensors")
    clips = [load(tmp_path / "weights.safetensors", name) for name in (NAME, QUICK)]
    images, tokens = torch.randn(4, 3, 16, 16), clips[0].tokenizer(["a cat", "a dog"])
    with torch.inference_mode():
        logits = [clip.model.get_logits(images, tokens)[0] for clip in clips]
    assert (logits[0] - logits[1]).abs().max() > 0.01  # rounding: 1e-5
    torch.save({**models, **dict.fromkeys(OPENAI_SIZES, torch.tensor(1))}, tmp_path / "openai.pt")
    assert message(tmp_path / "openai.pt", NAME, RecipeError) == (
        "model.name: must compute the activation that openai.pt (OpenAI's own) was trained with (QuickGELU), or every "
        f"number is wrong, but got {NAME} (GELU)\n    Write model.name: {NAME}-quickgelu"
    )
    assert load(tmp_path / "openai.pt", QUICK).weights_hash == clips[1].weights_hash


def test_a_configuration_beside_the_file_tells_its_activation_and_preprocessing(models, tmp_path):
    save_file(models, tmp_path / "open_clip_model.safetensors")
    beside = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": {**CONFIG, "quick_gelu": True}, "preprocess_cfg": beside}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    text = message(tmp_path / "open_clip_model.safetensors", NAME, RecipeError)
    assert (
        f"(by its open_clip_config.json) was trained with (QuickGELU), or every number is wrong, but got {NAME}" in text
    )
    clip = load(tmp_path / "open_clip_model.safetensors", QUICK)
    assert (clip.mean, clip.std, clip.input_key) == ((0.5,) * 3, (0.25,) * 3, "16-bilinear-squash")


def test_a_file_that_open_clip_released_is_known_by_its_hash(models, tmp_path, monkeypatch):
    torch.save(models, tmp_path / "renamed.pt")
    start = hashlib.sha256((tmp_path / "renamed.pt").read_bytes()).hexdigest()[:8]
    known = {"url": f"http://127.0.0.1:9/vit-{start}.pt", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"tiny": known})
    text = message(tmp_path / "renamed.pt", NAME, RecipeError)
    assert "must compute the activation that renamed.pt ('tiny' by its hash) was trained with (QuickGELU)" in text
    assert load(tmp_path / "renamed.pt", QUICK).mean == (0.1, 0.2, 0.3)


def test_the_tokenizer_comes_from_the_folder_of_the_weights(models, tmp_path):
    state = build_model(WORDS).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    assert message(tmp_path / "weights.safetensors", WORDS).startswith(
        f"model.name: the tokenizer of {WORDS} must be in the hub's cache or fetched (nobody/words), but got not in "
        "the cache, and no connection to the hub\n    Without a network: "
    )
    make_tokenizer(tmp_path)
    clip = load(tmp_path / "weights.safetensors", WORDS)
    assert clip.tokenizer(["a photo of the cat"]).tolist() == [[4, 5, 6, 7, 13, 2, 1, 1]]
    too_many = ("more", "words", "than", "the", "model", "has", *map(str, range(20)), "a", "photo", "cat")
    make_tokenizer(tmp_path, too_many)
    told = "model.name: the tokenizer must be that of the model, which has 18 tokens, but got token 32"
    assert message(tmp_path / "weights.safetensors", WORDS) == told
    (tmp_path / "tokenizer.json").write_text("{}")
    told = f"model.name: the tokenizer files of {WORDS} (nobody/words) must be readable by transformers"
    assert message(tmp_path / "weights.safetensors", WORDS).startswith(told)


def test_weights_of_openai_need_quick_gelu_in_the_configuration_of_their_folder(models, tmp_path):
    openai = {**models, **dict.fromkeys(OPENAI_SIZES, torch.tensor(1))}
    torch.save(openai, tmp_path / "open_clip_pytorch_model.bin")
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": CONFIG}))
    with pytest.raises(DataError, match="must have quick_gelu: true for OpenAI's own weights"):
        load_folder(tmp_path)
    config.write_text(json.dumps({"model_cfg": {**CONFIG, "quick_gelu": True}}))
    assert load_folder(tmp_path).config["model_cfg"]["quick_gelu"]


@pytest.mark.parametrize(
    ("name", "path", "is_warned"),
    [
        ("ViT-B-32", "model.pt", True),
        ("ViT-B-32", "ViT-B-32-openai.pt", True),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k.pt", True),
        ("ViT-B-32-quickgelu", "vit_b_32-quickgelu-8a00ab3c.pt", False),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32-256", "model.pt", False),
        ("sandbox", None, False),
    ],
)
def test_a_bare_file_gets_a_warning_that_names_the_trap(name, path, is_warned, tmp_path):
    written = str(tmp_path / path) if path is not None and "." in path else path
    found = model_warnings(ModelConfig(name=name, pretrained=written))
    told = f"model.pretrained: {path} does not record which activation it was trained with. {name} computes "
    assert [text.startswith(told) for text in found] == [True] * is_warned


def test_a_hub_that_cannot_be_reached_is_told_at_once_with_the_local_ways(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for part, what in (
        (ModelConfig(name="ViT-B-32-quickgelu", pretrained="openai"), "the weights 'openai' of ViT-B-32-quickgelu"),
        (ModelConfig(name="hf-hub:nobody/nothing"), "hf-hub:nobody/nothing"),
    ):
        with pytest.raises(DataError) as caught:
            load_clip(part)
        text = str(caught.value)
        assert f"{what} must be in the hub's cache or fetched (" in text
        assert "but got not in the cache, and no connection to the hub\n    Without a network: " in text
        assert all(way in text for way in ("model.pretrained: a weights file", "model.name: local-dir:FOLDER"))
    assert not constants.HF_HUB_OFFLINE


def test_untrained_weights_are_the_same_in_every_process_and_draw_nothing_from_the_generator(tmp_path):
    make_folder(FAMILIES["openai-resnet"], tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = build_model(f"local-dir:{tmp_path}")
    torch.testing.assert_close(torch.rand(4), expected)
    torch.manual_seed(4)
    assert state_hash(first.state_dict()) == state_hash(build_model(f"local-dir:{tmp_path}").state_dict())
