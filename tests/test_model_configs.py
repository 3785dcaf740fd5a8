"""Configurations of models from strangers: one message, whatever they hold, and no memory for what does not fit."""

import contextlib
import copy
import gzip
import json
import zipfile

import pytest
import short_training
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import load_folder

from carft_ray.errors import CarftError
from carft_ray.model.weights_files import read_weights

NUMBERS = st.sampled_from([0, -1, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), 1e-320])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.sampled_from(["", "\0", "8", "../x", "x" * 999]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
PAGE, TIMM = "must be the name of a page of the hub, but got", "must be a model name of timm, but got"
WRONG = [
    ("open_clip", "model_cfg.embed_dim", "8", "TypeError"),
    ("open_clip", "model_cfg.vision_cfg.layers", 10**9, "must be a number of at most 1,000, but got 1000000000"),
    ("open_clip", "model_cfg.vision_cfg.width", 2**40, "must be a number of at most 4,194,304"),
    ("open_clip", "model_cfg.vision_cfg.image_size", 2**20, "the tensors of"),
    ("open_clip", "model_cfg.text_cfg.heads", 0.5, "text_cfg.heads: must be a whole number of at least 1, but got 0.5"),
    ("open_clip", "model_cfg.text_cfg.width", [], "must be of a model that open_clip can build"),
    ("open_clip", "preprocess_cfg.mean", [0.5, 0.5], "must have three numbers as mean"),
    ("open_clip", "preprocess_cfg.std", [0.5, 0.5, "1"], "must have three numbers as std"),
    ("open_clip", "preprocess_cfg.resize_mode", [None], "must have a known resize_mode"),
    # no other place is named
    ("open_clip", "model_cfg.text_cfg.hf_model_name", "/srv/model", f"text_cfg.hf_model_name: {PAGE}"),
    ("open_clip", "model_cfg.text_cfg.hf_model_name", "../model", PAGE),
    ("open_clip", "model_cfg.text_cfg.hf_model_name", ["a"], PAGE),
    ("open_clip", "model_cfg.vision_cfg.timm_model_name", "hf-hub:nobody/model", f"vision_cfg.timm_model_name: {TIMM}"),
    ("open_clip", "model_cfg.vision_cfg.timm_model_name", "local-dir:/srv", TIMM),
    ("open_clip", "model_cfg.text_cfg.tokenizer_kwargs.bpe_path", "/etc/shadow.gz", "must name a file in the folder"),
    ("open_clip", "model_cfg.text_cfg.tokenizer_kwargs.reduction_mask", "syntax", "reduction_mask: must be left out"),
    ("open_clip", "model_cfg.text_cfg.tokenizer_kwargs.clean", "eval", "clean: must be a value of open_clip"),
    ("clip", "projection_dim", "8", "projection_dim: must be of the type int, but got '8'"),
    ("clip", "vision_config", [], "the tensors of"),
    ("clip", "text_config", "x", "text_config: must be an object, but got x"),
    ("clip", "vision_config.num_attention_heads", 0, "num_attention_heads: must be a whole number of at least 1"),
    ("clip", "vision_config.patch_size", 2**31 - 1, "must be a number of at most 4,194,304"),
    ("clip", "vision_config.image_size", 2**14, "the tensors of"),
    ("clip", "text_config.num_hidden_layers", 1001, "must be a number of at most 1,000, but got 1001"),
    ("clip", "text_config.layer_norm_eps", None, "must be of the type float, but got None"),
    ("clip", "text_config.hidden_act", ["gelu"], "hidden_act: must be of the type str"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of open_clip and one of a CLIPModel: name of its configuration, its content, the folder."""
    base = tmp_path_factory.mktemp("models")
    short_training.write_model(base / "open_clip")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "max_position_embeddings": 12, "vocab_size": 49408}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).save_pretrained(base / "clip")
    paths = {"open_clip": base / "open_clip" / "open_clip_config.json", "clip": base / "clip" / "config.json"}
    return {kind: (path, json.loads(path.read_text())) for kind, path in paths.items()}


def opened(folders, kind, change):
    """Loads the model of a folder whose configuration is changed."""
    path, sound = folders[kind]
    config = copy.deepcopy(sound)
    change(config)
    path.write_text(json.dumps(config))
    return load_folder(path.parent)


@pytest.mark.parametrize(("kind", "key", "value", "message"), WRONG)
def test_what_is_no_size_preprocessing_or_place_is_told(folders, kind, key, value, message):
    def put(config):
        *places, name = key.split(".")
        for place in places:
            config = config[place]
        config[name] = value

    with pytest.raises(CarftError) as caught:
        opened(folders, kind, put)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8bx", gzip.compress(b"\xff\n"), gzip.compress(b"a b\n" * 9)[:-9]],
    ids=["no archive", "no text", "cut off"],  # the bytes hold the time
)
def test_merges_that_cannot_be_read_are_told(folders, content):
    merges = folders["open_clip"][0].parent / "no_merges.txt.gz"
    sound = merges.read_bytes()
    merges.write_bytes(content)
    with pytest.raises(CarftError, match="merges of the tokenizer must be readable"):
        opened(folders, "open_clip", lambda config: None)
    merges.write_bytes(sound)


def test_a_damaged_archive_of_weights_is_told(tmp_path):
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, path)
    path.write_bytes(path.read_bytes().replace(b"/data.pkl", b"/d\x8dta.pkl"))
    with zipfile.ZipFile(tmp_path / "flags", "w") as archive:
        archive.writestr("ü", b"")
    marked = (tmp_path / "flags").read_bytes().replace("ü".encode(), b"\x8d\x8d")
    for content in (path.read_bytes(), marked):
        path.write_bytes(content)
        with pytest.raises(CarftError, match="must be a weights file that can be read"):
            read_weights(path, "model.name")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_other_files_of_a_folder_that_are_no_json_are_told(folders, name):
    path = folders["clip"][0].parent / name
    path.write_text('{"a": "\1"}')
    with pytest.raises(CarftError, match=f"must be a JSON file, but got .*{name}"):
        opened(folders, "clip", lambda config: None)
    path.unlink()


@pytest.mark.parametrize("kind", ["open_clip", "clip"])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_gives_a_model_or_one_message(folders, kind, data):
    def change(config):
        inside = config
        while isinstance(inside, dict) and inside:
            holder, key = inside, data.draw(st.sampled_from(sorted(inside)))
            inside = holder[key]
        holder[key] = data.draw(VALUES)

    with contextlib.suppress(CarftError):
        opened(folders, kind, change)
