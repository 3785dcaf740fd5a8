"""Two ranks of a real gloo group end with the weights of one, and agree on what one of them has met.

Of the options of a training (compiled, checkpointed, accumulated, LoRA, average, frozen layers, one or two ranks)
sixteen trainings hold every combination of any three. What changes memory and speed alone changes no number beyond
rounding: the sixteen end in eight states, one for each choice of LoRA, average and frozen layers.
"""

import functools
import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from test_loop import CPU, largest_difference, settings, without_speed
from test_lost import gloo
from test_targets import blocks_of
from tiny import make_tiny_clip

from carft_ray.errors import CarftError
from carft_ray.model.heads import build_heads
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.training import loop
from carft_ray.training.loop import StoppedRun, fine_tune
from carft_ray.training.own_training import OwnInputs, own_fine_tune
from carft_ray.training.ranks import from_rank_0, gather
from carft_ray.training.run_context import RunContext

pytestmark = pytest.mark.slow

TWO = settings(precision="fp64", batch_size=40, checkpoint_every=1e-9)
NUM_IMAGES = 121  # two blocks of targets; the last batch has one image, so one of two workers has none


def train_as_two(context, folder):
    """A checkpoint is written after every other step."""
    loop.LOG_EVERY, rows = 2, []
    clip, images = make_tiny_clip(dtype=torch.float64), ArraySource(NUM_IMAGES)
    heads = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    train, context = TWO.model_copy(update={"micro_batch": 4}), replace(context, report=rows.append)
    store = folder / f"store-{context.rank}"
    state = fine_tune(clip, *heads, images, train, context, checkpoint_dir=folder / "two", target_store=store)
    grown = fine_tune(clip, *heads, images, train, context, checkpoint_dir=folder / "grown", attempt=2)
    torch.save((state, grown, rows), folder / f"{context.rank}.pt")


def test_two_workers_end_with_the_weights_and_targets_of_one(clip64, heads64, tmp_path, monkeypatch):
    """And so do two that continue from the checkpoint of one."""
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    rows, reported, images = [], [], ArraySource(NUM_IMAGES)
    alone = RunContext(report=rows.append)
    one = fine_tune(clip64, *heads64, images, TWO, alone, target_store=tmp_path / "store")
    ends = RunContext(report=reported.append, should_stop=lambda: bool(reported))
    with pytest.raises(StoppedRun, match="at step 4 of 12"):
        fine_tune(clip64, *heads64, images, TWO, ends, checkpoint_dir=tmp_path / "grown")
    assert gloo(train_as_two, tmp_path) == [0, 0]
    assert {path.name for path in tmp_path.glob("two/attempt-1/step-*")} == {"step-00000008", "step-00000010"}
    blocks = blocks_of(tmp_path / "store", NUM_IMAGES)
    for rank, expected in enumerate(([*rows, *rows[1:]], [])):
        state, grown, found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # Adam divides by 1e-8 where a gradient is nothing but rounding (1e-16)
        assert largest_difference(one, state) < 1e-9
        assert largest_difference(one, grown) < 1e-9
        assert blocks_of(tmp_path / f"store-{rank}", NUM_IMAGES).items() <= blocks.items()  # what it has met
        for mine, theirs in zip(expected, found, strict=True):
            assert without_speed(mine) == pytest.approx(without_speed(theirs), rel=1e-9, abs=1e-12)


class NotPickledError(Exception):
    def __init__(self):
        super().__init__("of a user")
        self.lock = (one for one in ())


class NotOpenedError(Exception):
    """Is pickled, and cannot be made again with what it was pickled with."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def own(context, folder, function, epochs, on_epoch=lambda state, epoch: {}):
    """Fine-tunes by a function of the user's own."""
    clip = make_tiny_clip()
    class_head_CD, _ = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    inputs = OwnInputs(clip, class_head_CD, CLASS_WORDS, ArraySource(), ())
    return own_fine_tune(function, TrainConfig(epochs=epochs), inputs, context, CPU, folder, on_epoch)


def meet_on_one_rank(context, folder):
    for error in (NotPickledError(), NotOpenedError(1, 2)):  # reach every rank in words

        def fail(error=error):
            raise error

        with pytest.raises(RuntimeError if context.rank else type(error), match=str(error)):
            from_rank_0(context, fail)
        assert gather(context, context.rank) == [0, 1]
    stops, epochs = [], []

    def told(function):
        asks = replace(context, should_stop=lambda: context.rank == 0 and bool(stops))
        with pytest.raises(CarftError) as caught:
            own(asks, folder, function, 2)
        return f"{type(caught.value).__name__}: {caught.value}"

    def diverges_on_one(values, own):
        own.report({"loss": float("inf") if own.rank else 1.0})

    def stops_on_one(values, own):
        stops.append(True)
        assert own.should_stop()

    def moves_on_one(values, own):
        own.report({"loss": 1.0})
        if own.rank == 1:
            with torch.no_grad():
                next(own.model.parameters()).add_(1)
        own.report({"loss": 1.0})
        own.report({"loss": 1.0}, own.model.state_dict() if own.rank == 0 else None)
        return own.model.state_dict() if own.rank == 0 else None

    assert "the loss must stay finite, but got loss inf" in told(diverges_on_one)
    assert "must return a state dict" in told(lambda values, own: None)
    assert "StoppedRun: stopped on request" in told(stops_on_one)
    # an evaluation is a collective
    own(context, folder, moves_on_one, 3, lambda state, epoch: epochs.append(gather(context, epoch)) or {})
    assert epochs == [[2, 2], [3, 3]]


def test_both_ranks_agree_on_what_one_of_them_has_met(tmp_path):
    assert gloo(meet_on_one_rank, tmp_path) == [0, 0]


def train_together(context, folder):
    rows, epochs = [], []

    def trains(values, own):
        model = torch.nn.parallel.DistributedDataParallel(own.model, broadcast_buffers=False)
        sampler = torch.utils.data.DistributedSampler(own.train_set, own.world_size, own.rank)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for images, labels in torch.utils.data.DataLoader(own.train_set, batch_size=10, sampler=sampler):
            assert not own.should_stop()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        own.report({"loss": 1.0 + own.rank})
        return own.model.state_dict() if own.rank == 0 else None

    def on_epoch(state, epoch):
        epochs.append(float(state()["class_head"].sum()))
        return {}

    state = own(replace(context, report=rows.append), folder, trains, 2, on_epoch)
    found = {"loss": [row["loss"] for row in rows], "head": [float(state["class_head"].sum()), epochs[0]]}
    (folder / f"{context.rank}.json").write_text(json.dumps(found))


def test_a_function_that_trains_on_two_ranks_reports_and_returns_on_the_first(tmp_path):
    assert gloo(train_together, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len({*first["head"], *second["head"]}) == 1
    assert (first["loss"], second["loss"]) == ([1.0], [])


# ---- combinations of options


FIRST_BUCKET = 20_000  # bytes of gradients that are sent first: torch splits the tiny tower, too, where it compiles


def combinations():
    """Returns (name, values, number of ranks) of sixteen trainings of five steps."""
    found = []
    for compiled, lora, average, again in itertools.product((False, True), repeat=4):
        frozen, accumulated, ranks = lora ^ average ^ again, compiled ^ lora ^ again, 1 + (compiled ^ average ^ again)
        values = {"compile": compiled, "grad_checkpointing": again, "micro_batch": 2 if accumulated else None}
        values |= {"lora_rank": 2 if lora else None, "ema_decay": 0.9 if average else None}
        values["freeze_layers"] = 2 if frozen else 0
        found.append(("".join(str(int(value)) for value in (compiled, lora, average, again)), values, ranks))
    return found


ALL = combinations()
SAMPLE = [each for each in ALL if each[0] in ("0111", "1111", "0001", "1001")]


def train_twice(context, folder, wanted, backend):
    """Trains each combination as a whole, and stopped after two steps and resumed; rank 0 keeps the states."""
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = FIRST_BUCKET
    loop.LOG_EVERY = 2
    clip = make_tiny_clip(dtype=torch.float64)
    heads = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        for name, values, _ in wanted:
            train = settings(precision="fp64", epochs=1, batch_size=8, **values)
            whole = fine_tune(clip, *heads, ArraySource(), train, context)
            stops = RunContext(context.rank, context.world_size, should_stop=lambda: True)
            with pytest.raises(StoppedRun, match="at step 2 of 5"):
                fine_tune(clip, *heads, ArraySource(), train, stops, checkpoint_dir=folder / name)
            again = fine_tune(clip, *heads, ArraySource(), train, context, checkpoint_dir=folder / name, attempt=2)
            assert largest_difference(whole, again) == 0.0, name
            if context.rank == 0:
                torch.save(whole, folder / f"{name}.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("wanted", [SAMPLE, pytest.param(ALL, marks=pytest.mark.whole)], ids=["four", "sixteen"])
def test_options_that_save_memory_or_time_change_no_number_in_any_combination(tmp_path, monkeypatch, wanted):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", FIRST_BUCKET)
    of_one, of_two = ([each for each in wanted if each[2] == number] for number in (1, 2))
    assert len(of_one) == len(of_two) == len(wanted) // 2
    assert gloo(train_twice, tmp_path, of_two, "aot_eager") == [0, 0]
    train_twice(RunContext(), tmp_path, of_one, "aot_eager")
    torch.compiler.reset()
    states = {}
    for name, values, _ in wanted:
        key = tuple(values[field] for field in ("lora_rank", "ema_decay", "freeze_layers"))
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert largest_difference(states.setdefault(key, state), state) < 1e-9, name
    assert len(states) == len(wanted) // 2


@pytest.mark.whole
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_two_ranks_train_with_a_tower_that_is_built_by_a_compiler_and_checkpointed(tmp_path):
    values = {"compile": True, "grad_checkpointing": True, "micro_batch": 2}
    assert gloo(train_twice, tmp_path, [("built", values, 2)], "inductor") == [0, 0]
