"""Weights: every form that loads, the trap of QuickGELU, the hub, and what is refused."""

import codecs
import hashlib
import itertools
import json
import zipfile
from collections import OrderedDict

import families
import open_clip
import pytest
import torch
from families import FAMILIES, make_tokenizer, refused
from huggingface_hub import constants
from safetensors.torch import save_file
from sources import absolute_paths
from tiny import CONFIG, TEXT, load_folder

from carft_ray.errors import DataError, RecipeError
from carft_ray.model.catalog import TOKENIZER_OPTIONS, activation_problems, check_model, model_warnings
from carft_ray.model.clip import load_clip, state_hash
from carft_ray.model.pretrained import fetched
from carft_ray.model.weights_files import OPENAI_SIZES, build_model, read_weights
from carft_ray.recipe.schema.model import ModelConfig

pytestmark = pytest.mark.slow

# models that the tests add to open_clip's list
NAME, QUICK, OTHER, WORDS = (f"carft-test-ViT{end}" for end in ("", "-quickgelu", "-4", "-words"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small models in open_clip's list; returns a state of the first."""
    folder = tmp_path_factory.mktemp("configs")
    other = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "patch_size": 4}}
    words = {**CONFIG, "text_cfg": {**TEXT, "pool_type": "last"}}
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
    wrapped = {f"_orig_mod.module.{name}": value for name, value in models.items()}
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
    assert "must contain named tensors, or a checkpoint with state_dict, but got" in message(tmp_path / "empty.pt")
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes(b"\x00" * 100)
        assert message(tmp_path / name).startswith("model.pretrained: must be a weights file that can be read, but got")
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "ViT-B-32.pt"))
    text = message(tmp_path / "ViT-B-32.pt")
    assert text.startswith("model.pretrained: must be a file of tensors; a TorchScript archive, such as OpenAI's own")
    assert "torch.jit.load(FILE).state_dict()" in text


class Huge:
    """What torch's unpickler would make of a few bytes: ``bytearray`` of a terabyte, ``encode`` of what was encoded."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_small_weights_file_that_would_fill_the_memory_is_refused(tmp_path, is_zip):
    huge = torch.zeros(1).expand(10**6, 10**5)
    many = {str(number): torch.zeros(1000) for number in range(9)}
    for name, state, said in (
        ("stride", {"a": torch.zeros(1), "b": huge}, "b has more numbers than the file contains"),
        ("checkpoint", {"state_dict": {"b": huge}}, "b has more numbers than the file contains"),
        ("shared", dict.fromkeys(many, torch.zeros(1000)), "has more numbers than the file contains"),
        ("sparse", {"b": torch.zeros(9).to_sparse()}, "b must be a dense tensor"),
        ("bytes", {**many, "c": Huge(bytearray, 10**12)}, "must contain only tensors and plain values"),
        ("encoded", {**many, "c": Huge(codecs.encode, b"x", "hex")}, "must contain only tensors and plain values"),
    ):
        path = tmp_path / f"{name}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(DataError, match=said):
            read_weights(path, "model.pretrained")


def test_a_compressed_weights_file_is_refused_and_every_ordinary_one_is_read(tmp_path):
    path, packed = tmp_path / "a.pt", tmp_path / "b.pt"
    half = torch.arange(6.0).view(2, 3)
    state = {"a": half.half(), "b": half.bfloat16(), "c": torch.nn.Parameter(half), "d": torch.tensor(3), "e": half.T}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(half)])
    checkpoint = {"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer.state_dict()}
    tied = OrderedDict(a=half, b=half)
    for content, is_zip in itertools.product((state, checkpoint, tied), (True, False)):
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        found, wanted = read_weights(path, "model.pretrained"), content.get("state_dict", content)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert all(found[name].dtype == value.dtype for name, value in wanted.items())
    torch.save(state, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(DataError, match=r"a compressed archive, which torch\.save does not write"):
        read_weights(packed, "model.pretrained")


def test_missing_extra_and_reshaped_tensors_are_named(models, tmp_path):
    save_file(models, tmp_path / "fine.safetensors")
    text = message(tmp_path / "fine.safetensors", OTHER)
    assert text.startswith("model.pretrained: the tensors of fine.safetensors must be those of the model, but got size")
    save_file({**models, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    assert message(tmp_path / "more.safetensors").endswith('but got Unexpected key(s) in state_dict: "more".')
    less = {name: value for name, value in models.items() if not name.startswith("visual.ln")}
    save_file(less, tmp_path / "less.safetensors")
    assert 'Missing key(s) in state_dict: "visual.ln_pre.weight", ' in message(tmp_path / "less.safetensors")


def test_positions_of_another_image_size_are_interpolated_with_a_warning(models, tmp_path, caplog):
    larger = {**models, "visual.positional_embedding": torch.randn(1 + 9, 32).half()}
    save_file(larger, tmp_path / "larger.safetensors")
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
    text = message(tmp_path / "openai.pt", NAME, RecipeError)
    assert "must compute the activation that openai.pt (OpenAI's own) was trained with (QuickGELU)" in text
    assert text.endswith(f"but got {NAME} (GELU)\n    Write model.name: {NAME}-quickgelu")
    assert load(tmp_path / "openai.pt", QUICK).weights_hash == clips[1].weights_hash


def test_activation_and_preprocessing_are_told_by_a_hash_or_a_configuration(models, tmp_path, monkeypatch):
    torch.save(models, tmp_path / "renamed.pt")
    start = hashlib.sha256((tmp_path / "renamed.pt").read_bytes()).hexdigest()[:8]
    known = {"url": f"http://127.0.0.1:9/vit-{start}.pt", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"tiny": known})
    text = message(tmp_path / "renamed.pt", NAME, RecipeError)
    assert "must compute the activation that renamed.pt ('tiny' by its hash) was trained with (QuickGELU)" in text
    assert load(tmp_path / "renamed.pt", QUICK).mean == (0.1, 0.2, 0.3)
    save_file(models, tmp_path / "open_clip_model.safetensors")
    beside = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": {**CONFIG, "quick_gelu": True}, "preprocess_cfg": beside}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    text = message(tmp_path / "open_clip_model.safetensors", NAME, RecipeError)
    assert "(by its open_clip_config.json) was trained with (QuickGELU)" in text
    clip = load(tmp_path / "open_clip_model.safetensors", QUICK)
    assert (clip.mean, clip.std, clip.input_key) == ((0.5,) * 3, (0.25,) * 3, "16-bilinear-squash")


def test_the_tokenizer_comes_from_the_folder_of_the_weights(models, tmp_path):
    state = build_model(WORDS).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    told = f"model.name: the tokenizer of {WORDS} must be in the hub's cache or be downloaded (nobody/words), but got"
    assert message(tmp_path / "weights.safetensors", WORDS).startswith(told)
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
    assert "must have quick_gelu: true for OpenAI's own weights" in refused(tmp_path)
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


def test_without_the_hub_what_its_cache_lacks_is_told_with_the_local_ways(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    told = "must be in the hub's cache or be downloaded .* but got FileNotFoundError: Failed to download file .*\n"
    ways = "    Without a network, set model.pretrained to a weights file.*model.name to local-dir:FOLDER"
    for name, pretrained in (("ViT-B-32-quickgelu", "openai"), ("hf-hub:nobody/nothing", None)):
        with pytest.raises(DataError, match=f"{name} {told}{ways}"):
            load_clip(ModelConfig(name=name, pretrained=pretrained))


@pytest.mark.parametrize("is_cached", [True, False])
def test_the_hub_is_asked_for_what_its_cache_lacks(is_cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def get():
        asked.append(not constants.HF_HUB_OFFLINE)
        if constants.HF_HUB_OFFLINE and not is_cached:
            raise FileNotFoundError("not in the cache")
        return "weights"

    assert fetched("model.name", "the model", "nobody/model", get) == "weights"
    assert asked == [False] if is_cached else [False, True]
    assert not constants.HF_HUB_OFFLINE


def test_untrained_weights_are_the_same_in_every_process_and_draw_nothing_from_the_generator(tmp_path):
    families.make_folder(FAMILIES["openai-resnet"], tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = build_model(f"local-dir:{tmp_path}")
    torch.testing.assert_close(torch.rand(4), expected)
    torch.manual_seed(4)
    assert state_hash(first.state_dict()) == state_hash(build_model(f"local-dir:{tmp_path}").state_dict())


def test_options_of_all_models_pass_and_each_tag_is_refused_under_the_name_of_the_other_activation():
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        for key, value in (config["text_cfg"].get("tokenizer_kwargs") or {}).items():
            assert value in TOKENIZER_OPTIONS[key]
        for tag in open_clip.list_pretrained_tags_by_model(name):
            quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
            found = check_model(ModelConfig(name=name, pretrained=tag))
            assert found == activation_problems(name, quick, f"'{tag}'")
            assert bool(found) is (quick != bool(config.get("quick_gelu", False)))


def test_a_bare_name_is_no_path_of_a_recipe_even_where_a_file_has_it(tmp_path, monkeypatch):
    """It would be read where the command runs, and no gate for the files of a study would see it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").touch()
    [problem] = check_model(ModelConfig(name="ViT-B-32", pretrained="weights"))
    assert "must be a tag of ViT-B-32, a weights file, or 'random'" in str(problem)
    assert "Write the file as ./weights" in str(problem)
    assert check_model(ModelConfig(name="ViT-B-32", pretrained="./weights")) == []


def test_a_local_folder_is_checked_before_anything_is_loaded(tmp_path):
    name, config = f"local-dir:{tmp_path}", tmp_path / "open_clip_config.json"
    [problem] = check_model(ModelConfig(name=f"{name}/clop"))
    assert str(problem) == f"model.name: local-dir: must be followed by a folder that exists, but got {tmp_path}/clop"
    tokenizer = json.dumps({"model_cfg": {"text_cfg": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}}})
    for file, content, rule in (
        (None, "", "local-dir: needs a folder with open_clip_config.json, or one with a CLIPModel of Hugging Face"),
        (config, "{}", f"local-dir: needs a folder with weights, but got none in {tmp_path} that end in .safetensors"),
        (tmp_path / "model.safetensors", "", "open_clip_config.json must be JSON with model_cfg, as open_clip writes"),
        (config, tokenizer, "local-dir: needs the files of its tokenizer (timm/ViT-B-16-SigLIP) in the folder"),
    ):
        if file is not None:
            file.write_text(content)
        [problem] = check_model(ModelConfig(name=name))
        assert str(problem).startswith(f"model.name: {rule}")
    (tmp_path / "tokenizer.json").touch()
    assert check_model(ModelConfig(name=name)) == []
    rule = "must be left out for a model.name that begins with local-dir:, which has its weights"
    [problem] = check_model(ModelConfig(name=name, pretrained="openai"))
    assert str(problem) == f"model.pretrained: {rule}, but got 'openai'"


@pytest.mark.parametrize(
    ("name", "pretrained", "said"),
    [
        *(("ViT-B/32", pretrained, "") for pretrained in ("laion2b_s34b_b79k", "random", "weights.pt", "~/weights.pt")),
        ("hf-hub:timm/ViT-B-16-SigLIP", None, ""),
        ("hf-hub:nothing", None, "hf-hub: needs the owner and the name of a page, but got 'hf-hub:nothing'"),
        ("ViT-B-32", "~/", "must be a weights file, but got the folder FOLDER\n    Write model.name: local-dir:FOLDER"),
        ("ViT-B-32", "rndom", "did you mean 'random'?"),
    ],
)
def test_weights_are_a_tag_random_a_file_or_a_page_of_the_hub(tmp_path, monkeypatch, name, pretrained, said):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pt").touch()
    found = check_model(absolute_paths(ModelConfig(name=name, pretrained=pretrained), tmp_path))
    assert len(found) == bool(said)
    assert said.replace("FOLDER", str(tmp_path)) in "".join(map(str, found))
