"""Options of a training together: compiled, checkpointed, accumulated, LoRA, average, frozen layers, one and two ranks.

Sixteen trainings hold every combination of any three of the seven. What changes memory and speed alone changes no
number beyond rounding: the sixteen end in eight states, one for each choice of LoRA, average and frozen layers.
"""

import functools
import itertools
import shutil

import pytest
import torch
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from test_loop import largest_difference, settings
from test_lost import gloo
from tiny import make_tiny_clip

from carft_ray.model.heads import build_heads
from carft_ray.training import loop
from carft_ray.training.loop import StoppedRun, fine_tune
from carft_ray.training.run_context import RunContext

pytestmark = pytest.mark.slow

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
