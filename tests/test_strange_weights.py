"""Weights of a stranger: what a folder or a page of the hub names runs no code, and is read from its place alone."""

import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import re
import zipfile

import crash_host
import open_clip
import pytest
import short_training
import torch
import transformers
from families import make_tokenizer
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import CONFIG, load_folder

from carft_ray.errors import CarftError, DataError
from carft_ray.model.building import build_model
from carft_ray.model.catalog import TOKENIZER_OPTIONS, check_model
from carft_ray.model.clip import load_clip
from carft_ray.model.weights_files import read_weights
from carft_ray.recipe.schema.fine_tuning import ModelConfig

pytestmark = pytest.mark.slow

TEXT = {**CONFIG["text_cfg"], "vocab_size": 18, "hf_tokenizer_name": "nobody/words", "context_length": 8}
RAN = "ran"


@pytest.fixture
def ran(tmp_path):
    """A file that only code of the weights would make."""
    yield tmp_path / RAN
    assert not (tmp_path / RAN).exists()


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


def refused(folder):
    with pytest.raises(CarftError) as caught:
        load_folder(folder)
    return str(caught.value)


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


def test_code_beside_a_tokenizer_of_transformers_itself_is_not_run(folder):
    """Its class is one of the library, so the folder opens as if the code was not there."""
    assert load_folder(folder).tokenizer(["a cat"]).shape == (1, 8)


def test_code_that_is_the_only_tokenizer_is_refused_though_the_terminal_says_yes(folder, monkeypatch):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "Own"}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    assert "must be readable by transformers, but got" in refused(folder)


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


def test_the_options_of_open_clips_own_models_pass():
    configs = map(open_clip.get_model_config, open_clip.list_models())
    given = [(config["text_cfg"].get("tokenizer_kwargs") or {}).items() for config in configs]
    allowed = {(key, value) for key, values in TOKENIZER_OPTIONS.items() for value in values}
    assert {item for items in given for item in items} <= allowed


class Trap:
    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return open, (str(self.ran), "w")


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "pytorch_model.pth"])
@pytest.mark.parametrize("form", ["torch", "pickle", "type_error"])
def test_a_pickle_is_refused_whatever_the_environment_says(folder, ran, monkeypatch, name, form):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = folder / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(ran)))
    else:
        torch.save({"state_dict": {"a": torch.zeros(1)}, "trap": Trap(ran)}, path)
    if form == "type_error":  # a first read that ends in a TypeError is not followed by one that trusts
        real = torch.load

        def load(file, **options):
            if options.get("weights_only") is True:
                raise TypeError
            return real(file, **options)

        monkeypatch.setattr(torch, "load", load)
    with pytest.raises(DataError, match="nothing else is unpickled" if form == "torch" else "must"):
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
    assert f"must be a weights file that is there, but got {folder}/other.bin" in refused(folder)
    index.write_text("[]")
    assert "must be JSON with weight_map" in refused(folder)


def test_an_error_without_a_word_is_told_by_its_kind(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("carft_ray.model.clip.HFTokenizer", fail)
    assert re.search("must be readable by transformers, but got.*: RuntimeError", refused(folder))


def test_a_tokenizer_that_cannot_pad_is_told_when_it_is_opened(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert "must be readable by transformers, but got" in refused(folder)
    assert "does not have a padding token" in refused(folder)


# ---- configurations

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
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
