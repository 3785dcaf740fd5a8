"""Class head and context head against NumPy and against open_clip's own zero-shot classifier."""

import dataclasses
import gzip

import numpy as np
import open_clip
import pytest
import short_training
import torch
from conftest import CLASS_WORDS, TEMPLATES
from families import make_tokenizer
from open_clip.tokenizer import HFTokenizer
from stand_in import make_recipe
from test_loop import unit
from tiny import make_tiny_clip

from carft_ray.data.benchmarks.facts import load_facts
from carft_ray.data.cache import list_entries
from carft_ray.launch.runs.single import train_once
from carft_ray.model import heads
from carft_ray.model.clip import tokenizer_hash
from carft_ray.model.heads import build_heads, cached_heads
from carft_ray.model.prompts import templates
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.fine_tuning import PromptsConfig
from carft_ray.training.doctor import examine
from carft_ray.words import time_left


def test_both_heads_equal_numpy_in_float64(monkeypatch):
    clip = make_tiny_clip(dtype=torch.float64)
    monkeypatch.setattr(heads, "BATCH_SIZE", 2)
    class_head, context_head = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    with torch.no_grad():
        raw = np.stack(
            [clip.model.encode_text(clip.tokenizer([t.format(c) for c in CLASS_WORDS])).numpy() for t in TEMPLATES]
        )

    np.testing.assert_allclose(class_head.numpy(), unit(unit(raw).mean(axis=0)), atol=1e-9)
    np.testing.assert_allclose(context_head.numpy(), unit(unit(raw).mean(axis=1)), atol=1e-9)
    equal_words, _ = build_heads(clip.model, clip.tokenizer, ("missile", "missile", "dog"), TEMPLATES)
    torch.testing.assert_close(equal_words[0], equal_words[1])


def test_templates_are_those_of_the_benchmark_that_is_named():
    mine = ("a {}", "the {}")
    assert templates(PromptsConfig(templates=mine), ()) == mine
    assert templates(PromptsConfig(templates="dtd"), ()) == load_facts("dtd").templates
    assert templates(PromptsConfig(templates="imagenet"), ()) == templates(PromptsConfig(templates="openai"), ())


@pytest.fixture
def passes(monkeypatch):
    """A list with an entry for each pass through a text tower."""
    made, encode = [], open_clip.CLIP.encode_text
    monkeypatch.setattr(open_clip.CLIP, "encode_text", lambda *given, **keys: made.append(1) or encode(*given, **keys))
    return made


def kept(tmp_path, clip, class_names=CLASS_WORDS, prompts=TEMPLATES, say=str):
    recipe = make_recipe()
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_dir": str(tmp_path / "cache")})})
    return cached_heads(recipe, clip, class_names, prompts, torch.device("cpu"), say)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_from_the_cache_are_the_very_bits_and_are_embedded_once(tmp_path, passes, dtype, monkeypatch):
    clip, said = make_tiny_clip(dtype=dtype), []
    expected = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    for _ in range(2):
        found = kept(tmp_path, clip, say=said.append)
        assert len(passes) == 2 * len(TEMPLATES)
        for name, tensor in zip(("class_head", "context_head"), expected, strict=True):
            assert found[name].dtype == tensor.dtype == dtype
            assert torch.equal(found[name], tensor)
        # the second time not even a sentence is tokenised
        fresh = open_clip.SimpleTokenizer(context_length=clip.tokenizer.context_length)
        clip = dataclasses.replace(clip, tokenizer=fresh)
        monkeypatch.setattr(open_clip.SimpleTokenizer, "__call__", None)
    assert said == ["embedding 25 sentences for the heads", "the heads are in the cache: 25 sentences"]
    [entry] = list_entries(tmp_path / "cache")
    assert (entry.kind, entry.source, entry.in_use) == ("heads", "25 sentences", False)


def test_everything_that_decides_the_heads_makes_others(tmp_path, passes, tiny_clip, monkeypatch):
    def embeds(*args, clip=tiny_clip):
        passes.clear()
        kept(tmp_path, clip, *args)
        return bool(passes)

    assert embeds()
    assert not embeds()
    for words in (("circle", "square", "star", "heart", "bow"), CLASS_WORDS[::-1]):
        assert embeds(words)
    for prompts in (("a {}", *TEMPLATES[1:]), TEMPLATES[::-1]):
        assert embeds(CLASS_WORDS, prompts)
    assert embeds(clip=make_tiny_clip(seed=1))
    shorter = dataclasses.replace(tiny_clip, tokenizer=open_clip.SimpleTokenizer(context_length=15))
    with pytest.raises(RuntimeError):  # another length is looked for under another name, and does not fit this model
        embeds(clip=shorter)
    quick = {**tiny_clip.config, "model_cfg": {**tiny_clip.config["model_cfg"], "quick_gelu": True}}
    assert embeds(clip=dataclasses.replace(tiny_clip, config=quick))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)  # last bits may differ
    assert embeds()


def test_a_tokenizer_has_another_hash_where_it_may_give_other_tokens(tmp_path, tiny_clip):
    def hash_of(tokenizer):
        return tokenizer_hash(dataclasses.replace(tiny_clip, tokenizer=tokenizer))

    (tmp_path / "no_merges.txt.gz").write_bytes(gzip.compress(b"no merges"))
    options = ({}, {"context_length": 15}, {"clean": "canonicalize"}, {"bpe_path": tmp_path / "no_merges.txt.gz"})
    found = [hash_of(open_clip.SimpleTokenizer(**each)) for each in (*options, {})]
    for words in (("cat", "dog"), ("dog", "cat")):
        make_tokenizer(tmp_path, words)
        found += [hash_of(HFTokenizer(str(tmp_path), 8, **each)) for each in ({}, {"clean": "canonicalize"}, {})]
    assert (found[0], found[5], found[8]) == (found[4], found[7], found[10])
    assert len(set(found)) == len(found) - 3


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_second_pass(tmp_path, passes, tiny_clip, caplog):
    (tmp_path / "cache").write_text("no folder")
    assert kept(tmp_path, tiny_clip)["class_head"].shape == (len(CLASS_WORDS), 16)
    assert len(passes) == len(TEMPLATES)
    assert caplog.text.count("The heads are not kept for the next command") == 1


def test_how_long_the_embedding_takes_is_told_after_a_moment_and_not_too_often():
    said, now = [], [0.0]
    on_progress = time_left(said.append, "embedding sentences", lambda: now[0])
    for done in range(1, 41):
        now[0] = float(done)
        on_progress(7 * done, 280)
    assert said[0] == "embedding sentences: 21 of 280, about 37 s left"
    assert [line.split()[2] for line in said] == ["21", "91", "161", "231"]


def test_the_doctor_embeds_for_the_training_that_follows(tmp_path, passes):
    path, said = short_training.make(tmp_path), []
    recipe = load_recipe(path, ["data.cache_dir=cache", "train.epochs=1", "resources.threads=1"])
    assert not examine(recipe).errors
    assert passes
    passes.clear()
    train_once(recipe, tmp_path / "out", False, "", said.append, lambda row: None, lambda row: None)
    assert not passes
    assert "the heads are in the cache: 15 sentences" in said
