"""Targets of the frozen model: the same numbers computed, written or read; blocks; which trainings share them."""

import contextlib
import errno
import itertools
import math
import os
import signal
import threading

import attempts
import numpy as np
import pytest
import stand_in
import torch
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from safetensors.torch import load_file, save_file
from test_loop import CPU
from tiny import make_tiny_clip

from carft_ray.model.heads import build_heads
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.recipe.shared_targets import decide_targets, num_stored_visits
from carft_ray.training import loop, targets
from carft_ray.training.loop import StoppedRun, fine_tune
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import BLOCK, read_block, store_dir, write_block

NUM_IMAGES = 150  # blocks of 64, 64 and 22


def settings(**values):
    return TrainConfig(**{"learning_rate": 1e-3, "kl_weight": 5.0, "epochs": 2, "batch_size": 48, **values})


@pytest.fixture
def images():
    return ArraySource(NUM_IMAGES)


@pytest.fixture
def tuned(tiny_clip, heads, images):
    """Fine-tunes with a store; None for none."""

    def tune(store, context=None, **values):
        train_values = {name: values.pop(name) for name in list(values) if name in TrainConfig.model_fields}
        return fine_tune(tiny_clip, *heads, images, settings(**train_values), context, target_store=store, **values)

    return tune


@pytest.fixture
def without_frozen_model(monkeypatch):
    """From the call on, building a frozen tower is an error."""

    def forbid():
        monkeypatch.setattr(targets, "build_classifier", None)

    return forbid


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


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the same numbers, whoever computes


@pytest.mark.parametrize("values", [{}, {"batch_size": 7, "micro_batch": 5, "epochs": 1, "num_threads": 3}])
def test_trainings_of_any_batch_size_and_length_that_compute_write_or_read_end_with_the_same_weights(
    tuned, tmp_path, without_frozen_model, values
):
    writer, expected, before = tuned(tmp_path), tuned(None, **values), blocks_of(tmp_path)
    assert values or same(writer, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"visit-0000", "visit-0001"}
    assert sum(map(len, before.values())) == 2 * NUM_IMAGES * len(TEMPLATES) * 2
    without_frozen_model()
    assert same(tuned(tmp_path, **values), expected)
    assert blocks_of(tmp_path) == before


def test_a_training_that_is_stopped_anywhere_resumes_to_the_same_weights(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    whole, store = tuned(None, batch_size=20), tmp_path / "store"
    for attempt in itertools.count(1):
        asked = iter(range(100))
        context = RunContext(should_stop=lambda asked=asked: next(asked) == 2)
        with contextlib.suppress(StoppedRun):
            state = tuned(store, context, batch_size=20, checkpoint_dir=tmp_path / "run", attempt=attempt)
            break
    assert attempt > 4
    assert same(whole, state)


# ---- killed, at once, damaged


def train_in_its_own_process(store, path=None):
    clip = make_tiny_clip()
    heads = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    state = fine_tune(clip, *heads, ArraySource(NUM_IMAGES), settings(), target_store=store)
    if path is not None:
        save_file(state, path)


def compute_all(store, path):
    targets.read_block = lambda *_: None  # it finds every block missing
    train_in_its_own_process(store, path)


def test_two_writers_at_once_leave_the_blocks_of_one(tuned, tmp_path):
    expected, paths = tuned(tmp_path / "one"), [tmp_path / name for name in ("first", "second")]
    processes = [attempts.forked(compute_all, tmp_path / "both", path) for path in paths]
    for process in processes:
        process.join()
    assert [same(load_file(path), expected) for path in paths] == [True, True]
    assert blocks_of(tmp_path / "both") == blocks_of(tmp_path / "one")


def write_and_die(store, number):
    calls, write = itertools.count(1), os.pwrite

    def half(handle, content, offset):
        if next(calls) == number:
            write(handle, content[: len(content) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, content, offset)

    os.pwrite = half
    train_in_its_own_process(store)


def test_a_block_that_a_killed_writer_has_half_written_is_none(tuned, tmp_path):
    whole = tuned(tmp_path / "whole")
    process = attempts.forked(write_and_die, tmp_path / "killed", 3)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left, expected = blocks_of(tmp_path / "killed"), blocks_of(tmp_path / "whole")
    assert len(left) == 2
    assert left.items() <= expected.items()
    assert same(tuned(tmp_path / "killed"), whole)
    assert blocks_of(tmp_path / "killed") == expected


def test_a_damaged_block_is_computed_again(tuned, tmp_path):
    whole = tuned(tmp_path)
    expected, path = blocks_of(tmp_path), tmp_path / "visit-0001"
    for damaged in (path.read_bytes()[:-1], b"", path.read_bytes()[:-1] + b"\xff"):
        path.write_bytes(damaged)
        assert same(tuned(tmp_path), whole)
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
        assert same(tuned(store), expected)
    assert len([record for record in caplog.records if "not kept" in record.getMessage()]) == 1
    assert blocks_of(store) == {}


# ---- the key


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
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("views", "batches"))]
    assert len(blocks_of(tmp_path, 3840)) == 10


# ---- which trainings share


def recipe_of(trials=6, baselines=(), targets="auto", **search):
    resources = {"gpus_per_worker": 0, "targets": targets}
    return stand_in.make_recipe(trials, baselines=dict(baselines), resources=resources, **search)


def decided(recipe, trainings=None):
    return decide_targets(recipe, trainings)[0].resources.targets


def test_trials_share_their_targets_unless_the_search_changes_them():
    recipe = recipe_of()
    assert decided(recipe) == "stored"
    assert "by the first training that needs them" in decide_targets(recipe)[1]
    assert num_stored_visits(recipe) == recipe.train.epochs
    searched = recipe_of(space={"crop_scale": {"low": 0.5, "high": 1.0}})
    assert decided(searched) == decided(recipe_of(1)) == "online"
    assert "no two trainings have the same seed, crop_scale, " in decide_targets(searched)[1]
    assert num_stored_visits(searched) == 0
    choices = {"crop_scale": {"choices": [0.5, 0.9]}}
    assert [decided(recipe_of(trials, space=choices)) for trials in (4, 3)] == ["stored", "online"]
    steps = recipe_of(18, space={"crop_scale": {"low": 0.1, "high": 0.9, "step": 0.1}})
    assert (decided(steps), num_stored_visits(steps)) == ("stored", 9 * recipe.train.epochs)


def test_baselines_share_too_and_what_is_asked_for_holds():
    own = {"one": {"crop_scale": 0.4}, "two": {"crop_scale": 0.4, "learning_rate": 1e-5}, "plain": {"kl_weight": 0.0}}
    assert decided(recipe_of(1, own)) == "stored"
    assert decided(recipe_of(1, {"one": own["one"]})) == "online"
    for mode in ("online", "stored"):
        assert decide_targets(recipe_of(1, own, mode)) == (recipe_of(1, own, mode), "")


def test_the_trainings_of_a_confirm_share_by_seed():
    recipe, trainings = recipe_of(), [{"seed": 7}, {"seed": 7, "learning_rate": 1e-5}, {"seed": 8, "kl_weight": 0.0}]
    assert decided(recipe, trainings) == "stored"
    assert decided(recipe, trainings[1:]) == "online"
    assert decide_targets(recipe, trainings[2:]) == (recipe, "")
