"""In which precision a tower computes, on which device, and what of it repeats bit for bit."""

import pytest
import torch
from stand_in import make_recipe
from test_loop import CPU, largest_difference, settings

from carft_ray.model import device
from carft_ray.model.device import compute_dtype, precision_words, set_up
from carft_ray.training import targets
from carft_ray.training.loop import fine_tune
from carft_ray.training.run_context import RunContext

GPU = torch.device("cuda")


@pytest.mark.parametrize("is_native", [True, False])  # a GPU that has bf16, and one for which torch emulates it
def test_auto_is_bf16_where_a_gpu_has_it_and_the_reason_is_said_where_it_has_not(monkeypatch, is_native):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native or including_emulation
    )
    monkeypatch.setattr(device, "device_name", lambda where: "Tesla T4")
    bf16, names = torch.bfloat16, ("auto", "bf16", "fp32", "fp64")
    assert [compute_dtype(settings(precision=name), GPU) for name in names] == [
        *(bf16 if is_native else None, bf16),
        None,
        None,
    ]
    words = [precision_words(settings(precision=name), GPU) for name in names]
    assert [bool(each) for each in words] == [not is_native, not is_native, False, False]
    assert is_native or words[0].startswith("auto is fp32 on Tesla T4, which has no units for bf16")
    assert is_native or words[1].startswith("bf16 is emulated and slow on Tesla T4")
    assert compute_dtype(settings(), CPU) is None
    assert not precision_words(settings(precision="bf16"), CPU)


@pytest.mark.parametrize("values", [{"precision": "fp64"}, {}, {"precision": "bf16"}, {"lora_rank": 4}])
def test_the_kl_at_step_zero_is_that_of_rounded_targets_in_every_precision(tiny_clip, heads, source, values):
    rows, train = [], settings(epochs=1, batch_size=40, **values)
    heads = [head.double() if train.precision == "fp64" else head for head in heads]
    fine_tune(tiny_clip, *heads, source, train, RunContext(report=rows.append))
    assert abs(rows[0]["kl"]) <= 2e-4


def test_a_process_computes_as_its_last_recipe_says():
    before = torch.get_num_threads()
    recipe = make_recipe(1, resources={"threads": 1})
    strict = recipe.model_copy(update={"train": recipe.train.model_copy(update={"deterministic": True})})
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
            set_up(strict)
            assert torch.are_deterministic_algorithms_enabled()
            assert device.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        set_up(recipe)
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)


def test_every_operation_of_a_training_has_a_deterministic_form(tiny_clip, heads, source):
    values = {"lora_rank": 2, "ema_decay": 0.5, "grad_checkpointing": True}
    plain = fine_tune(tiny_clip, *heads, source, settings(epochs=1, **values))
    try:
        torch.use_deterministic_algorithms(True)
        strict = fine_tune(tiny_clip, *heads, source, settings(epochs=1, deterministic=True, **values))
    finally:
        torch.use_deterministic_algorithms(False)
    assert largest_difference(plain, strict) == 0.0


# ---- the frozen model on the images of a batch


def test_targets_are_computed_for_batches_on_a_gpu_that_promises_no_bits_and_stores_none(tmp_path):
    assert targets.by_batches(settings(), GPU, None)
    for case in ((settings(deterministic=True), GPU, None), (settings(), GPU, tmp_path), (settings(), CPU, None)):
        assert not targets.by_batches(*case)


def test_targets_of_batches_are_those_of_blocks_up_to_rounding(clip64, heads64, source, monkeypatch):
    train = settings(precision="fp64", epochs=2, batch_size=7, micro_batch=4)
    blocks = fine_tune(clip64, *heads64, source, train)
    monkeypatch.setattr(targets, "by_batches", lambda *given: True)
    batches = fine_tune(clip64, *heads64, source, train)
    assert largest_difference(blocks, batches) < 1e-6
