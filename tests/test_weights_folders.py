"""Folders of weights: what runs nothing, what is refused, and those of Hugging Face as transformers reads them."""

import copy
import gzip
import io
import json
import os
import pickle

import crash_host
import numpy as np
import open_clip
import pytest
import short_training
import torch
import transformers
from families import make_tokenizer, refused
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from tiny import CONFIG, TEXT, load_folder
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from carft_ray.errors import CarftError, DataError, RecipeError
from carft_ray.model.catalog import check_model
from carft_ray.model.clip import load_clip, wrap_model
from carft_ray.model.weights_files import build_model, read_weights
from carft_ray.recipe.schema.model import ModelConfig
from carft_ray.results.export.huggingface import misfits, write_huggingface

pytestmark = pytest.mark.slow


@pytest.fixture
def ran(tmp_path):
    """A file that only code of the weights would make."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def write_code(folder, ran, config_name):
    """Writes code, and has a configuration of transformers name it for all that it may be opened as."""
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    path = folder / config_name
    given = json.loads(path.read_text()) if path.is_file() else {}
    classes = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own", "AutoModel": "own.Own"}
    path.write_text(json.dumps({**given, "auto_map": classes}))


def write_config(folder, text=None, **towers):
    config = {**CONFIG, "text_cfg": {**TEXT, **(text or {})}, **towers}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


@pytest.fixture
def folder(tmp_path, ran):
    """A folder of open_clip whose tokenizer is code of its own, for who trusts it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    write_config(folder)
    save_file(build_model(f"local-dir:{folder}").state_dict(), folder / "open_clip_model.safetensors")
    make_tokenizer(folder)
    write_code(folder, ran, "tokenizer_config.json")
    return folder


TRUST = "open_clip_config.json: model_cfg.text_cfg.tokenizer_kwargs.trust_remote_code: must be left out: "


def test_a_folder_that_asks_for_trust_is_refused_by_the_name_of_the_key(folder):
    write_config(folder, {"tokenizer_kwargs": {"trust_remote_code": True, "clean": "canonicalize"}})
    text = refused(folder)
    assert TRUST in text
    assert "but got true (allowed: clean, strip_sep_token, bpe_path)" in text
    assert [str(problem) for problem in check_model(ModelConfig(name=f"local-dir:{folder}"))] == [text]


def test_doctor_runs_nothing_of_a_weights_folder(folder, capsys):
    quickstart = str(crash_host.HERE.parent / "search_spaces" / "quickstart.yaml")
    write_config(folder, {"tokenizer_kwargs": {"trust_remote_code": True}})
    assert crash_host.call(["doctor", quickstart, "--set", f"model={{name: 'local-dir:{folder}'}}"]) == 4
    said = capsys.readouterr()
    assert TRUST in said.out + said.err


def test_code_of_a_tokenizer_is_not_run_though_the_terminal_says_yes(folder, monkeypatch):
    """A class of transformers itself opens as if the code was not there."""
    assert load_folder(folder).tokenizer(["a cat"]).shape == (1, 8)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "Own"}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    assert "must be readable by transformers, but got" in refused(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert "does not have a padding token" in refused(folder)


def test_a_page_of_the_hub_is_read_as_a_folder_is(folder, tmp_path, monkeypatch):
    page = tmp_path / "hub" / "models--nobody--weights"
    (page / "refs").mkdir(parents=True)
    (page / "refs" / "main").write_text("0" * 40)
    (page / "snapshots").mkdir()
    (page / "snapshots" / ("0" * 40)).symlink_to(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_clip(ModelConfig(name="hf-hub:nobody/weights")).weights_hash == load_folder(folder).weights_hash
    write_config(folder, {"tokenizer_kwargs": {"trust_remote_code": True}})
    with pytest.raises(CarftError, match="trust_remote_code: must be left out"):
        load_clip(ModelConfig(name="hf-hub:nobody/weights"))


def test_a_text_tower_of_the_hub_runs_no_code(folder, ran, tmp_path, monkeypatch):
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"model_type": "roberta", "hidden_size": 16, "vocab_size": 18}))
    write_code(tower, ran, "config.json")
    write_config(folder, {"hf_model_name": "tower"})
    monkeypatch.chdir(tmp_path)  # where transformers finds it as it would a page
    assert "code that comes with weights is never run, but got a configuration with auto_map" in refused(folder)


class Trap:
    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return open, (str(self.ran), "w")


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "pytorch_model.pth"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_is_refused_whatever_the_environment_says(folder, ran, monkeypatch, name, form):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = folder / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(ran)))
    else:
        torch.save({"state_dict": {"a": torch.zeros(1)}, "trap": Trap(ran)}, path)
    with pytest.raises(DataError, match="carft-ray unpickles nothing else" if form == "torch" else "must"):
        read_weights(path, "model.pretrained")
    (folder / "open_clip_model.safetensors").unlink()
    refused(folder)


def test_a_weights_file_is_regular_and_of_sane_size(folder):
    path = folder / "open_clip_model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="must be a regular file, but got a pipe, device or socket"):
        read_weights(path, "model.name")
    assert "must be a regular file" in refused(folder)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(10**12)
    assert "must have at most 68,719,476,736 bytes" in refused(folder)


def test_the_index_of_shards_names_files_of_the_folder_alone(folder):
    (folder / "open_clip_model.safetensors").rename(folder / "part.bin")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "/srv/elsewhere/other.bin"}}))
    assert f"must be an existing weights file, but got {folder}/other.bin" in refused(folder)
    index.write_text("[]")
    assert "must be JSON with weight_map" in refused(folder)


PAGE, TIMM = "must be the name of a page of the hub, but got", "must be a model name of timm, but got"
WRONG = [
    ("open_clip", "model_cfg.embed_dim", "8", "TypeError"),
    ("open_clip", "model_cfg.vision_cfg.layers", 10**9, "got ValueError: more than 5,000 tensors"),
    ("open_clip", "model_cfg.vision_cfg.width", 2**40, "must be of a model that open_clip can build, but got RuntimeE"),
    ("open_clip", "model_cfg.vision_cfg.image_size", 2**20, "the tensors of"),
    ("open_clip", "model_cfg.text_cfg.heads", 0.5, "text_cfg.heads: must be a whole number, but got 0.5"),
    ("open_clip", "model_cfg.vision_cfg.patch_size", 0, "can build, but got ZeroDivisionError"),
    ("open_clip", "model_cfg.vision_cfg.pos_embed_type", "sin_cos_2d", "pos_embed_type: must be learnable"),
    ("open_clip", "model_cfg.text_cfg.width", [], "must be of a model that open_clip can build"),
    ("open_clip", "preprocess_cfg.std", [0.5, 0.5, "1"], "must have three numbers as std"),
    ("open_clip", "preprocess_cfg.resize_mode", [None], "must have a known resize_mode"),
    # no other place is named
    ("open_clip", "model_cfg.text_cfg.hf_model_name", "/srv/model", f"text_cfg.hf_model_name: {PAGE}"),
    ("open_clip", "model_cfg.text_cfg.hf_model_name", "../model", PAGE),
    ("open_clip", "model_cfg.vision_cfg.timm_model_name", "hf-hub:nobody/model", f"vision_cfg.timm_model_name: {TIMM}"),
    ("open_clip", "model_cfg.vision_cfg.timm_model_name", "local-dir:/srv", TIMM),
    ("open_clip", "model_cfg.text_cfg.tokenizer_kwargs.bpe_path", "/etc/shadow.gz", "must name a file in the folder"),
    ("open_clip", "model_cfg.text_cfg.tokenizer_kwargs.reduction_mask", "syntax", "reduction_mask: must be left out"),
    ("open_clip", "model_cfg.text_cfg.tokenizer_kwargs.clean", "eval", "clean: must be a value of open_clip"),
    ("clip", "projection_dim", "8", "projection_dim: must be of the type int, but got '8'"),
    ("clip", "text_config", "x", "text_config: must be an object, but got x"),
    ("clip", "vision_config.num_attention_heads", 0, "of 3 channels whose heads divide its width"),
    ("clip", "vision_config.num_hidden_layers", 10**9, "got ValueError: more than 5,000 tensors"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of open_clip and one of a CLIPModel: name of its configuration, its content, the folder."""
    base = tmp_path_factory.mktemp("models")
    short_training.write_model(base / "open_clip")
    make_folder(base / "clip")
    (base / "clip" / "preprocessor_config.json").unlink()
    paths = {"open_clip": base / "open_clip" / "open_clip_config.json", "clip": base / "clip" / "config.json"}
    return {kind: (path, json.loads(path.read_text())) for kind, path in paths.items()}


NO_ARCHIVES = (b"\x1f\x8bx", gzip.compress(b"\xff\n", mtime=0), gzip.compress(b"a b\n" * 9, mtime=0)[:-9])


@pytest.mark.parametrize(("kind", "key", "value", "message"), WRONG)
def test_what_is_no_size_preprocessing_or_place_is_told(folders, kind, key, value, message):
    path, sound = folders[kind]
    config = changed = copy.deepcopy(sound)
    *places, name = key.split(".")
    for place in places:
        changed = changed[place]
    changed[name] = value
    path.write_text(json.dumps(config))
    assert message in refused(path.parent)
    path.write_text(json.dumps(sound))


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        *(("open_clip", "no_merges.txt.gz", bad, "merges of the tokenizer must be readable") for bad in NO_ARCHIVES),
        pytest.param("open_clip", "no_merges.txt.gz", gzip.compress(bytes(2**26 + 1)), "bytes, unpacked", id="large"),
        ("clip", "tokenizer_config.json", b'{"a": "\1"}', "must be a JSON file"),
        ("clip", "preprocessor_config.json", b'{"a": "\1"}', "must be a JSON file"),
    ],
)
def test_other_files_of_a_folder_that_cannot_be_read_are_told(folders, kind, name, content, message):
    path = folders[kind][0].parent / name
    before = path.read_bytes() if path.exists() else b"{}"
    path.write_bytes(content)
    assert message in refused(path.parent)
    path.write_bytes(before)


TEXT_TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT_TOWER |= {"max_position_embeddings": 20, "vocab_size": 49408}
VISION_TOWER = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION_TOWER |= {"image_size": 32, "patch_size": 8}
SENTENCES = ["a photo of a cat", "a sketch of the dog", "house"]


def make_folder(folder, text=None, vision=None, **saved):
    """Writes a CLIPModel with random weights as transformers writes it, and the files of its image processor."""
    torch.manual_seed(0)
    towers = {"text_config": TEXT_TOWER | (text or {}), "vision_config": VISION_TOWER | (vision or {})}
    config = transformers.CLIPConfig(**towers, projection_dim=16)
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
    processor = tmp_path / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace('{"shortest_edge": 32}', '{"height": 32, "width": 32}'))
    assert load_folder(tmp_path).input_key == "32-bicubic-squash"  # and the crop takes nothing off
    processor.write_text(processor.read_text().replace('"width": 32', '"width": 36'))
    with pytest.raises(DataError, match="must resize to the 32 pixels of the model, as open_clip does, but got 36 in"):
        load_folder(tmp_path)


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
    rule = r"model\.name: a Hugging Face folder must contain a CLIPModel .*, but got model_type: siglip in"
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
    vision_cfg, text_cfg = CONFIG["vision_cfg"] | (vision or {}), CONFIG["text_cfg"] | (text or {})
    config = {**CONFIG, "vision_cfg": vision_cfg, "text_cfg": text_cfg, **model}
    clip = kind(**copy.deepcopy(config))
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        clip.logit_scale.fill_(3.0)
    given = {**vars(open_clip.transform.PreprocessCfg()), "size": 16, **(preprocess or {})}
    open_clip.set_model_preprocess_cfg(clip, given)
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
TIMM_TOWER = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"}
CANONICAL = open_clip.SimpleTokenizer(context_length=16, clean="canonicalize")
MISFITS = {
    "a model of the kind CoCa": {"kind": open_clip.CoCa, "multimodal_cfg": CONFIG["text_cfg"]},
    "an image tower of the kind ModifiedResNet": {"vision": RESNET},
    "an image tower of the kind TimmModel": {"vision": TIMM_TOWER},
    "attention pooling": {"vision": {"attentional_pool": True, "attn_pooler_heads": 2}},
    "the image's pooling 'avg'": {"vision": {"pool_type": "avg"}},
    "no norm before the blocks": {"vision": {"no_ln_pre": True}},
    "blocks of another kind": {"vision": {"ls_init_value": 0.1}},
    "a text tower without causal mask": {"kind": open_clip.CustomTextCLIP, "text": {"no_causal_mask": True}},
    "the text's pooling 'last'": {"text": {"pool_type": "last"}},
    "no text projection, or one with a bias": {"kind": open_clip.CustomTextCLIP, "text": {"proj_bias": True}},
    "a logit_bias": {"init_logit_bias": -10.0},
    "a tokenizer of another kind": {"tokenizer": type("Other", (open_clip.SimpleTokenizer,), {})(context_length=16)},
    "a tokenizer that cleans text differently": {"tokenizer": CANONICAL},
    "images that are padded": {"preprocess": {"resize_mode": "longest"}},
}


@pytest.mark.parametrize(("words", "settings"), MISFITS.items(), ids=MISFITS)
def test_a_model_that_transformers_does_not_have_is_known_by_what_differs(words, settings):
    assert misfits(make(**settings)) == [words]
