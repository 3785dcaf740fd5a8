"""What is computed once for many trainings: the heads, against NumPy, and the targets of the frozen model."""

import dataclasses
import errno
import gzip
import math
import os
import threading

import attempts
import numpy as np
import open_clip
import pytest
import short_training
import stand_in
import torch
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from families import make_tokenizer
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file, save_file
from test_loop import CPU, clip_and_heads, largest_difference, unit
from tiny import make_tiny_clip

from carft_ray.data.cache import MARKER, list_entries
from carft_ray.launch.cluster.doctor import examine
from carft_ray.launch.command import Plan, train_once
from carft_ray.launch.workers.runtime import decide_targets, num_stored_visits
from carft_ray.model import heads
from carft_ray.model.clip import tokenizer_hash
from carft_ray.model.heads import build_heads, cached_heads, templates
from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.model import PromptsConfig
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training import targets
from carft_ray.training.loop import StoppedRun, fine_tune
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import BLOCK, read_block, store_dir, write_block
from carft_ray.words import time_left

NUM_IMAGES = 150  # blocks of 64, 64 and 22


def settings(**values):
    return TrainConfig(**{"learning_rate": 1e-3, "kl_weight": 5.0, "epochs": 2, "batch_size": 48, **values})


@pytest.fixture
def tuned(tiny_clip, heads):
    """Fine-tunes with a store; None for none."""
    images = ArraySource(NUM_IMAGES)

    def tune(store, num_threads=1, **values):
        return fine_tune(tiny_clip, *heads, images, settings(**values), target_store=store, num_threads=num_threads)

    return tune


def blocks_of(store, num_images=NUM_IMAGES):
    """The blocks of all visits that are there, by visit and number."""
    found = {}
    for path in store.glob("visit-*"):
        visit = int(path.name.removeprefix("visit-"))
        for number in range(math.ceil(num_images / BLOCK)):
            size = min(BLOCK, num_images - number * BLOCK)
            rows = read_block(store, visit, number, size, len(TEMPLATES))
            if rows is not None:
                found[visit, number] = rows.tobytes()
    return found


@pytest.mark.parametrize("values", [{}, {"batch_size": 7, "micro_batch": 5, "epochs": 1, "num_threads": 3}])
def test_trainings_that_compute_write_or_read_targets_end_with_the_same_weights(tuned, tmp_path, monkeypatch, values):
    writer, expected, before = tuned(tmp_path), tuned(None, **values), blocks_of(tmp_path)
    assert values or largest_difference(writer, expected) == 0.0
    assert {path.name for path in tmp_path.iterdir()} == {MARKER, "visit-0000", "visit-0001"}
    assert sum(map(len, before.values())) == 2 * NUM_IMAGES * len(TEMPLATES) * 2
    monkeypatch.setattr(targets, "build_classifier", None)  # no frozen model is built any more
    assert largest_difference(tuned(tmp_path, **values), expected) == 0.0
    assert blocks_of(tmp_path) == before


def compute_all(store, path):
    targets.read_block = lambda *_: None  # it finds every block missing
    clip, heads = clip_and_heads(torch.float32)
    save_file(fine_tune(clip, *heads, ArraySource(NUM_IMAGES), settings(), target_store=store), path)


def test_two_writers_at_once_leave_the_blocks_of_one(tuned, tmp_path):
    expected, paths = tuned(tmp_path / "one"), [tmp_path / name for name in ("first", "second")]
    processes = [attempts.forked(compute_all, tmp_path / "both", path) for path in paths]
    for process in processes:
        process.join()
    assert [largest_difference(load_file(path), expected) for path in paths] == [0.0, 0.0]
    assert blocks_of(tmp_path / "both") == blocks_of(tmp_path / "one")


def test_a_damaged_block_is_computed_again(tuned, tmp_path):
    whole = tuned(tmp_path)
    expected, path = blocks_of(tmp_path), tmp_path / "visit-0001"
    whole_file = path.read_bytes()
    half_written = bytes(100) + whole_file[100:]
    for damaged in (whole_file[:-1], b"", whole_file[:-1] + b"\xff", half_written):
        path.write_bytes(damaged)
        assert largest_difference(tuned(tmp_path), whole) == 0.0
        assert blocks_of(tmp_path) == expected


def test_a_block_of_another_visit_or_place_and_a_hole_are_none(tmp_path):
    rows = np.random.default_rng(0).random((BLOCK, 3)).astype(np.float16)
    for number in (0, 2):
        write_block(tmp_path, 1, number, rows)
    found = [read_block(tmp_path, 1, number, BLOCK, 3) for number in range(4)]
    assert [each is not None and bool((each == rows).all()) for each in found] == [True, False, True, False]
    os.rename(tmp_path / "visit-0001", tmp_path / "visit-0002")
    assert read_block(tmp_path, 2, 0, BLOCK, 3) is None
    content = (tmp_path / "visit-0002").read_bytes()
    (tmp_path / "visit-0001").write_bytes(content[len(content) * 2 // 3 :] + content)
    assert read_block(tmp_path, 1, 0, BLOCK, 3) is None  # block 2 in the place of block 0


@pytest.mark.parametrize("why", ["a file stands there", "no space"])
def test_a_training_goes_on_where_its_targets_cannot_be_kept(tuned, tmp_path, caplog, monkeypatch, why):
    expected, write, store = tuned(None), os.pwrite, tmp_path / "store"

    def full(handle, content, offset):
        write(handle, content[:20], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        if why == "a file stands there":
            store.write_text(why)
        assert largest_difference(tuned(store), expected) == 0.0
    assert len([record for record in caplog.records if "not kept" in record.getMessage()]) == 1
    assert blocks_of(store) == {}


def test_a_store_of_other_weights_views_machines_or_versions_is_not_read(tiny_clip, heads, tmp_path, monkeypatch):
    def name(key="inputs", context_head=heads[1], **values):
        return store_dir(tmp_path, key, tiny_clip, context_head, settings(**values), CPU).name

    first = name()
    assert first == name(learning_rate=1e-5, kl_weight=0.1, batch_size=4, epochs=9, compile=True, lora_rank=2)
    others = [name("other inputs"), name(context_head=heads[1][:2]), name(context_head=heads[1].flip(0))]
    others += [name(seed=1), name(crop_scale=0.5), name(context_scale=3.0), name(precision="bf16")]
    for target, other in (
        ("carft_ray.environment.versions_of", lambda names: dict.fromkeys(names, "99.0")),
        ("torch.get_num_threads", lambda: 77),
        ("carft_ray.environment.cpu_model", lambda: "another processor"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, other)
            others.append(name())
    assert len({first, *others}) == 1 + 10


def test_a_training_begins_with_the_first_blocks(tiny_clip, heads, tmp_path, monkeypatch):
    shown, pixels = [], ArraySource.pixels
    monkeypatch.setattr(ArraySource, "pixels", lambda self, index: shown.append(index) or pixels(self, index))
    source, train = ArraySource(3840), settings(epochs=10, batch_size=64)
    context = RunContext(should_stop=lambda: True)  # after the first ten steps
    for _ in range(2):
        shown.clear()
        with pytest.raises(StoppedRun, match="at step 10 of 600"):
            fine_tune(tiny_clip, *heads, source, train, context, target_store=tmp_path, num_threads=2)
        assert len(shown) <= 13 * 64  # and those that are made ahead
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("views", "ThreadPool"))]
    assert len(blocks_of(tmp_path, 3840)) == 10


def recipe_of(trials=6, baselines=(), targets="auto", **search):
    resources = {"gpus_per_worker": 0, "targets": targets}
    return stand_in.make_recipe(trials, baselines=dict(baselines), resources=resources, **search)


STEPS = {"crop_scale": {"low": 0.1, "high": 0.9, "step": 0.1}}
CHOICES = {"crop_scale": {"choices": [0.5, 0.9]}}
OWN = {"one": {"crop_scale": 0.4}, "two": {"crop_scale": 0.4, "learning_rate": 1e-5}, "plain": {"kl_weight": 0.0}}
SEEDS = [{"seed": 7}, {"seed": 7, "learning_rate": 1e-5}, {"seed": 8, "kl_weight": 0.0}]  # of a confirm
FEATURES = {"feature_weight": {"low": 1.0, "high": 9.0}}
DISTILLED = {f"kd_{index}": {"class_kl_weight": 1.0, "learning_rate": 10.0**-index} for index in (4, 5)}
STORED, ONLINE, EACH_BATCH, MOVES = (
    "stored, the first training that needs them keeps them",
    "online, since no two trainings have the same seed, ",
    "online, since the penalties run the frozen model on each batch",
    "online, since the targets of a moving teacher are never stored",
)


@pytest.mark.parametrize(
    ("recipe", "trainings", "said", "num_visits"),
    [
        (recipe_of(), None, STORED, 2),
        (recipe_of(1), None, ONLINE, 0),
        (recipe_of(space={"crop_scale": {"low": 0.5, "high": 1.0}}), None, ONLINE, 0),
        (recipe_of(4, space=CHOICES), None, STORED, 4),
        (recipe_of(3, space=CHOICES), None, ONLINE, 0),
        (recipe_of(18, space=STEPS), None, STORED, 18),
        (recipe_of(1, OWN), None, STORED, 2),
        (recipe_of(1, {"one": OWN["one"]}), None, ONLINE, 0),
        (recipe_of(), SEEDS, STORED, 2),
        (recipe_of(), SEEDS[1:], ONLINE, 2),
        (recipe_of(), SEEDS[2:], "", 2),
        (recipe_of(1, OWN, "online"), None, "", 0),
        (recipe_of(1, OWN, "stored"), None, "", 2),
        (recipe_of(space=FEATURES), None, EACH_BATCH, 0),
        (recipe_of(space=FEATURES, targets="stored"), None, EACH_BATCH, 0),
        (recipe_of(6, OWN, space=FEATURES), None, STORED, 2),
        (recipe_of(1, DISTILLED), [{"seed": 7, "text_weight": 1.0, "kl_weight": 0.0}], EACH_BATCH, 0),
        (recipe_of(1, DISTILLED), None, ONLINE, 0),
        (recipe_of(train={"teacher": "average"}), None, MOVES, 0),
        (recipe_of(targets="stored", train={"teacher": "average"}), None, MOVES, 0),
        (recipe_of(), [{"teacher": "average"}, {"teacher": "average", "kl_weight": 0.0}], MOVES, 2),
        (recipe_of(), [*SEEDS, {"teacher": "average"}], STORED, 2),
        (recipe_of(space=STEPS, train={"teacher": "average", "kl_weight": 0.0}), None, "", 0),
    ],
)
def test_trainings_share_their_targets_where_two_have_the_same(recipe, trainings, said, num_visits):
    decided, text = decide_targets(recipe, trainings)
    assert text.startswith(f"resources.targets: {said}") if said else not text
    assert decided.resources.targets == (said.partition(",")[0] or recipe.resources.targets)
    assert num_stored_visits(recipe) == num_visits


def test_both_heads_equal_numpy_in_float64(monkeypatch):
    clip = make_tiny_clip(dtype=torch.float64)
    monkeypatch.setattr(heads, "BATCH_SIZE", 2)
    class_head, context_head = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    with torch.no_grad():
        tokens = [clip.tokenizer([template.format(name) for name in CLASS_WORDS]) for template in TEMPLATES]
        raw = np.stack([clip.model.encode_text(each).numpy() for each in tokens])
    np.testing.assert_allclose(class_head.numpy(), unit(unit(raw).mean(axis=0)), atol=1e-9)
    np.testing.assert_allclose(context_head.numpy(), unit(unit(raw).mean(axis=1)), atol=1e-9)
    equal_words, _ = build_heads(clip.model, clip.tokenizer, ("missile", "missile", "dog"), TEMPLATES)
    torch.testing.assert_close(equal_words[0], equal_words[1])


def test_templates_are_those_of_the_benchmark_that_is_named():
    mine = ("a {}", "the {}")
    assert templates(PromptsConfig(templates=mine)) == mine
    assert templates(PromptsConfig(templates="dtd")) == BENCHMARKS["dtd"].templates
    assert templates(PromptsConfig(templates="imagenet")) == templates(PromptsConfig(templates="openai"))


@pytest.fixture
def passes(monkeypatch):
    """A list with an entry for each pass through a text tower."""
    made, encode = [], open_clip.CLIP.encode_text
    monkeypatch.setattr(open_clip.CLIP, "encode_text", lambda *given, **keys: made.append(1) or encode(*given, **keys))
    return made


def kept(tmp_path, clip, class_names=CLASS_WORDS, prompts=TEMPLATES, say=str):
    recipe = stand_in.make_recipe()
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


def test_a_model_leaves_the_device_also_when_its_sentences_cannot_be_embedded(tmp_path, tiny_clip, monkeypatch):
    places = []
    monkeypatch.setattr(tiny_clip.model, "to", lambda device: places.append(str(device)) or tiny_clip.model)
    shorter = dataclasses.replace(tiny_clip, tokenizer=open_clip.SimpleTokenizer(context_length=15))
    with pytest.raises(RuntimeError):
        kept(tmp_path, shorter)
    assert places == ["cpu", "cpu"]  # to the device, which is one here, and back


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
    train_once(Plan(recipe, tmp_path / "out", on_event=lambda event: said.append(event.line())))
    assert not passes
    assert "the heads are in the cache: 15 sentences" in said
