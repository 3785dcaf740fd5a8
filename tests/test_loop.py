"""Loop and losses: formulas and limit cases, splits that change nothing, and references written anew here."""

import contextlib
import itertools
import math
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from scipy.special import log_softmax
from stand_in import make_recipe
from tiny import make_tiny_clip
from torch.overrides import TorchFunctionMode

from carft_ray.data.views import permutation, view_batch
from carft_ray.errors import DivergedError, StorageError
from carft_ray.model import device
from carft_ray.model.classifier import build_classifier, normalised
from carft_ray.model.device import compute_dtype, precision_words, set_up
from carft_ray.model.heads import build_heads
from carft_ray.recipe.schedule import learning_rate_at, num_warmup_steps
from carft_ray.recipe.schema.train import PENALTIES, TrainConfig
from carft_ray.training import checkpoint, prefetch, targets
from carft_ray.training.car_ft_loss import Loss, context_distribution, context_entropy, context_kl
from carft_ray.training.loop import StoppedRun, _views, fine_tune
from carft_ray.training.other_penalties import Reference
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import Targets

CPU, GPU = torch.device("cpu"), torch.device("cuda")
B, D, T, S = 7, 12, 9, 20.0  # images, width, contexts, scale


def settings(**values):
    given = {"learning_rate": 1e-3, "kl_weight": 1.0, "epochs": 3, "batch_size": 12, "checkpoint_every": None}
    return TrainConfig(**{**given, **values})


def clip_and_heads(dtype=torch.float64):
    """The tiny CLIP and its heads, in a process without fixtures."""
    clip = make_tiny_clip(dtype=dtype)
    return clip, build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def plain_fine_tuning(clip, class_head, source, train):
    """Plain fine-tuning as anybody would write it: no KL, no workers, no micro-batches, no checkpoints."""
    visual = make_tiny_clip(dtype=class_head.dtype).model.visual.requires_grad_().train()
    head = torch.nn.Parameter(clip.logit_scale * class_head)
    parameters = [*visual.parameters(), head]
    optimizer = torch.optim.AdamW(parameters, weight_decay=train.weight_decay, fused=True)
    mean, std = (torch.tensor(values, dtype=head.dtype) for values in (clip.mean, clip.std))
    cuts = range(train.batch_size, len(source), train.batch_size)
    orders = (np.split(permutation(train.seed, epoch, len(source)), cuts) for epoch in range(train.epochs))
    batches = [(epoch, indices) for epoch, order in enumerate(orders) for indices in order]
    for step, (epoch, indices) in enumerate(batches):
        ids = source.sample_ids[indices]
        pixels = view_batch(source, indices, ids, train.seed, epoch, train.crop_scale, clip.image_size)
        images = normalised(torch.from_numpy(pixels), mean, std)
        rate = learning_rate_at(step, train.learning_rate, min(500, len(batches) // 10), len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(F.normalize(visual(images), dim=-1) @ head.T, torch.from_numpy(source.labels[indices]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        optimizer.step()
    return {"class_head": head.detach(), **{f"visual.{k}": v.detach() for k, v in visual.state_dict().items()}}


def test_kl_weight_zero_is_plain_fine_tuning(clip64, heads64, source):
    train = settings(kl_weight=0.0, precision="fp64", seed=1)
    mine = fine_tune(clip64, *heads64, source, train)
    reference = plain_fine_tuning(clip64, heads64[0], source, train)
    # Adam divides by 1e-8 where a gradient is nothing but rounding (1e-16), as that of the bias of the keys
    assert largest_difference(mine, reference) < 1e-9


def test_one_context_and_kl_weight_zero_with_any_contexts_are_plain_fine_tuning_bit_for_bit(tiny_clip, heads, source):
    plain, *others = (
        fine_tune(tiny_clip, heads[0], context_head, source, settings(kl_weight=weight))
        for context_head, weight in ((heads[1], 0.0), (heads[1][:1], 0.0), (heads[1][:1], 50.0))
    )
    assert [largest_difference(plain, other) for other in others] == [0.0, 0.0]


def test_the_gradient_is_that_of_cross_entropy_and_weighted_kl_which_is_zero_at_step_zero(clip64, heads64, source):
    pixels, labels = torch.from_numpy(source.images), torch.from_numpy(source.labels)
    model = build_classifier(clip64, heads64[0], settings(precision="fp64"), CPU).train()

    def log_p(features):
        return context_distribution(features, heads64[1], clip64.logit_scale)

    with torch.no_grad():
        zero_shot = log_p(model.features(pixels))
    for weight, log_p0 in ((0.0, None), (1.0, zero_shot), (100.0, zero_shot), (3.0, zero_shot.roll(1, 0))):
        model.zero_grad()
        loss = Loss(heads64[1], clip64.logit_scale, settings(kl_weight=weight, precision="fp64"))
        reference = Reference(None if log_p0 is None else log_p0.exp())
        _, kl, _ = loss.backward(model, pixels, labels, reference, 1 / len(labels))
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert (abs(kl.item()) <= 1e-12) == (weight != 3.0)
        model.zero_grad()
        features, logits = model(pixels)
        expected = F.cross_entropy(logits, labels)
        if weight == 3.0:
            expected = expected + weight * context_kl(log_p(features), log_p0).mean()
        expected.backward()
        assert largest_difference(found, {name: p.grad for name, p in model.named_parameters()}) <= 1e-12


def test_the_whole_image_tower_trains_and_the_text_side_and_a_head_with_lr_factor_zero_do_not(tiny_clip, heads, source):
    before = {name: tensor.clone() for name, tensor in tiny_clip.model.state_dict().items()}
    state = fine_tune(tiny_clip, *heads, source, settings())
    start = build_classifier(tiny_clip, heads[0], settings(), CPU).state()
    assert [name for name in start if torch.equal(state[name], start[name])] == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_clip.model.state_dict().items())
    state = fine_tune(tiny_clip, *heads, source, settings(head_lr_factor=0.0))
    assert torch.equal(state["class_head"], start["class_head"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_are_normalised_by_the_formula_to_the_bit(dtype):
    mean, std = (torch.tensor(values, dtype=dtype) for values in ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
    pixels_BHWC = torch.randint(0, 256, (3, 5, 7, 3), dtype=torch.uint8)
    for pixels in (pixels_BHWC, pixels_BHWC[:0], pixels_BHWC.transpose(1, 2)):
        expected = (pixels.permute(0, 3, 1, 2).to(dtype) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        assert torch.equal(normalised(pixels, mean, std), expected)
        assert normalised(pixels, mean, std).is_contiguous(memory_format=torch.channels_last)


def test_schedule_rises_linearly_and_falls_as_a_cosine():
    rates = [learning_rate_at(step, 2.0, 4, 12) for step in range(12)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * k / 8) for k in range(8)])
    assert [num_warmup_steps(None, num_steps) for num_steps in (144, 25_000, 1)] == [14, 500, 0]
    assert num_warmup_steps(99, 10) == 9


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"learning_rate": 1e30}, "loss (inf|nan)"),  # the loss of the second step
        ({"kl_weight": 1e22, "learning_rate": 1e-2}, r"loss \d\.\d{1,3}e\+\d+; gradient (inf|nan)"),
    ],
)
def test_a_loss_or_a_gradient_that_is_not_finite_is_an_error_of_its_own(tiny_clip, heads, source, values, found):
    train = settings(**values, warmup_steps=0, clip_norm=None)
    with pytest.raises(DivergedError, match="must stay finite") as raised:
        fine_tune(tiny_clip, *heads, source, train)
    assert re.match(found, raised.value.problems[0].value)


@pytest.fixture
def frequent(monkeypatch):
    """Windows of two steps, and a clock that is a minute later at each look."""
    monkeypatch.setattr("carft_ray.training.loop.LOG_EVERY", 2)
    minutes = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 60.0 * next(minutes), perf_counter=time.perf_counter)
    monkeypatch.setattr("carft_ray.training.loop.time", clock)


TOGETHER = {"lora_rank": 3, "lora_alpha": 1.5, "ema_decay": 0.8, "layer_decay": 0.7, "freeze_layers": 1}


@pytest.mark.parametrize(("ends", "values"), [("killed", {}), ("killed", TOGETHER), ("stopped", TOGETHER)])
def test_a_kill_or_a_stop_inside_an_epoch_changes_no_number(tiny_clip, heads, source, tmp_path, frequent, values, ends):
    train = settings(epochs=2, batch_size=4, checkpoint_every="50s", **values)  # 10 steps an epoch
    whole_rows, rows = [], []
    whole = fine_tune(tiny_clip, *heads, source, train, RunContext(report=whole_rows.append))
    for attempt in range(1, 20):
        windows, asked = iter(range(100)), iter(range(100))

        def die(row, windows=windows):
            if ends == "killed" and next(windows) == 1:  # in the second window, before its own checkpoint
                raise KeyboardInterrupt

        def should_stop(asked=asked):
            return ends == "stopped" and next(asked) == 0

        context = RunContext(report=rows.append, progress=die, should_stop=should_stop)
        with contextlib.suppress(KeyboardInterrupt, StoppedRun):
            places = {"checkpoint_dir": tmp_path, "target_store": tmp_path / "targets"}
            state = fine_tune(tiny_clip, *heads, source, train, context, attempt=attempt, **places)
            break
        saved = list(tmp_path.glob("attempt-*/step-*"))
        assert max(int(path.name[5:]) for path in saved) == 2 * attempt  # one window is lost, no more
        assert all((path / "average.safetensors").exists() == bool(values) for path in saved)
    assert attempt == 10
    assert largest_difference(whole, state) == 0.0
    assert [without_speed(row) for row in rows] == [without_speed(row) for row in whole_rows]


@pytest.mark.parametrize(("every", "steps"), [(None, [10]), (50, [16, 18]), (130, [12, 18]), (1e6, [])])
def test_checkpoints_come_after_a_time_or_an_epoch(tiny_clip, heads, source, tmp_path, frequent, every, steps):
    train = settings(epochs=2, batch_size=4, checkpoint_every=every)
    fine_tune(tiny_clip, *heads, source, train, checkpoint_dir=tmp_path)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("attempt-1/step-*")) == steps  # the last two stay


@pytest.fixture
def held(monkeypatch, frequent):
    """An event until which no checkpoint is written."""
    go, plain = threading.Event(), checkpoint.save_checkpoint

    def save(*given):
        assert go.wait(60)
        return plain(*given)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    yield go
    go.set()


def threads_named(name):
    return [each.name for each in threading.enumerate() if each.name.rpartition("_")[0] == name]


def test_steps_wait_for_no_checkpoint_which_holds_the_state_of_its_step(tiny_clip, heads, source, tmp_path, held):
    train = settings(epochs=3, batch_size=4, ema_decay=0.5, lora_rank=2)  # 10 steps an epoch

    def progress(row):
        if row["step"] == 18:
            assert not list(tmp_path.glob("late/attempt-1/step-*"))
            held.set()

    context = RunContext(progress=progress)
    late = fine_tune(tiny_clip, *heads, source, train, context, checkpoint_dir=tmp_path / "late")
    soon = fine_tune(tiny_clip, *heads, source, train, checkpoint_dir=tmp_path / "soon")
    assert largest_difference(late, soon) == 0.0
    for step in ("step-00000010", "step-00000020"):
        one, other = (sorted((tmp_path / name / "attempt-1" / step).iterdir()) for name in ("late", "soon"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    assert threads_named("checkpoint") == []


def test_a_stop_and_an_error_wait_for_the_checkpoint_that_is_being_written(tiny_clip, heads, source, tmp_path, held):
    def interrupt(row):
        if row["step"] == 12:
            threading.Timer(0.1, held.set).start()
            raise KeyboardInterrupt

    def should_stop():
        threading.Timer(0.1, held.set).start()
        return True

    train = settings(epochs=2, batch_size=4)
    for name, context, kind, step in (
        ("error", RunContext(progress=interrupt), KeyboardInterrupt, 10),
        ("stop", RunContext(should_stop=should_stop), StoppedRun, 2),
    ):
        held.clear()
        with pytest.raises(kind):
            fine_tune(tiny_clip, *heads, source, train, context, checkpoint_dir=tmp_path / name)
        assert threads_named("checkpoint") == []
        assert [path.name for path in tmp_path.glob(f"{name}/attempt-1/step-*")] == [f"step-{step:08d}"]


@pytest.mark.parametrize("stops", [False, True])
def test_a_checkpoint_that_cannot_be_written_ends_the_training(tiny_clip, heads, source, tmp_path, frequent, stops):
    rows, folder = [], tmp_path / "checkpoint"
    folder.write_text("a file")
    train = settings(epochs=3, batch_size=4)
    context = RunContext(progress=rows.append, should_stop=lambda: stops)
    with pytest.raises(StorageError, match="must be writable"):
        fine_tune(tiny_clip, *heads, source, train, context, checkpoint_dir=folder)
    assert rows[-1]["step"] <= (2 if stops else 20)


class Copies(TorchFunctionMode):
    """Counts how often a tensor is turned into what Python or the host reads, in this thread.

    ``numpy`` is not among it: views are made by it, and on a GPU it is refused without ``cpu``.
    """

    NAMES = ("item", "cpu", "tolist", "__bool__", "__float__", "__int__")
    number = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.number += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalties", [(), PENALTIES])
def test_no_number_is_read_from_the_device_between_two_rows_of_progress(tiny_clip, heads, source, penalties):
    values = {"ema_decay": 0.9, "lora_rank": 2, "micro_batch": 3, **dict.fromkeys(penalties, 0.1)}
    with Copies() as copied:
        assert float(torch.ones(())) == 1.0
        fine_tune(tiny_clip, *heads, source, settings(batch_size=4, epochs=2, **values))  # 20 steps
    assert copied.number == 1 + 2  # a row after every tenth step


def without_speed(row):
    return {name: value for name, value in row.items() if name != "images_per_s"}


@pytest.mark.parametrize("is_native", [True, False])  # a GPU that has bf16, and one for which torch emulates it
def test_auto_is_bf16_where_a_gpu_has_it_and_the_reason_is_said_where_it_has_not(monkeypatch, is_native):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native or including_emulation
    )
    monkeypatch.setattr(device, "device_name", lambda where: "Tesla T4")
    for name, has_bf16, said in (
        ("auto", is_native, "auto is fp32 on Tesla T4, which has no units for bf16"),
        ("bf16", True, "bf16 is emulated and slow on Tesla T4"),
        *((name, False, "") for name in ("fp32", "fp64")),
    ):
        assert compute_dtype(settings(precision=name), GPU) == (torch.bfloat16 if has_bf16 else None)
        words = precision_words(settings(precision=name), GPU)
        assert words.startswith(said) if said and not is_native else not words
    assert compute_dtype(settings(), CPU) is None
    assert not precision_words(settings(precision="bf16"), CPU)


@pytest.mark.parametrize("values", [{"precision": "fp64"}, {}, {"precision": "bf16"}, {"lora_rank": 4}])
def test_the_kl_at_step_zero_is_that_of_rounded_targets_in_every_precision(tiny_clip, heads, source, values):
    rows, train = [], settings(epochs=1, batch_size=40, **values)
    heads = [head.double() if train.precision == "fp64" else head for head in heads]
    fine_tune(tiny_clip, *heads, source, train, RunContext(report=rows.append))
    assert abs(rows[0]["kl"]) <= 2e-4


def test_a_process_computes_as_its_last_recipe_says_deterministic_or_not(tiny_clip, heads, source, monkeypatch):
    def state_with(deterministic):
        values = {"lora_rank": 2, "ema_decay": 0.5, "grad_checkpointing": True, "deterministic": deterministic}
        return fine_tune(tiny_clip, *heads, source, settings(epochs=1, **values))

    recipe = make_recipe(1, resources={"threads": 1})
    strict = recipe.model_copy(update={"train": recipe.train.model_copy(update={"deterministic": True})})
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_up(strict)
        assert torch.are_deterministic_algorithms_enabled()
        assert device.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        found = state_with(deterministic=True)
        set_up(recipe)
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        assert largest_difference(found, state_with(deterministic=False)) == 0.0
    finally:
        torch.use_deterministic_algorithms(False)


def test_targets_of_batches_are_those_of_blocks(clip64, heads64, source, monkeypatch, tmp_path):
    assert targets.by_batches(settings(), GPU, None)
    for case in ((settings(deterministic=True), GPU, None), (settings(), GPU, tmp_path), (settings(), CPU, None)):
        assert not targets.by_batches(*case)
    train = settings(precision="fp64", epochs=2, batch_size=7, micro_batch=4)
    blocks = fine_tune(clip64, *heads64, source, train)
    monkeypatch.setattr(targets, "by_batches", lambda *given: True)
    batches = fine_tune(clip64, *heads64, source, train)
    assert largest_difference(blocks, batches) < 1e-6


@pytest.mark.parametrize("number", [0, 1, 3])
def test_values_come_in_order_before_an_error_and_few_are_made_ahead(number):
    begun = []

    def parts():
        for value in range(30):
            begun.append(value)
            yield (value,)

    values = prefetch.made_ahead(lambda value: 1 / (20 - value), parts(), number)
    for value in range(20):
        assert next(values) == 1 / (20 - value)
        assert len(begun) - value - 1 <= number
    with pytest.raises(ZeroDivisionError):
        next(values)
    assert threads_named("ThreadPool") == []


@pytest.mark.parametrize("ahead", [False, True])
def test_images_read_ahead_are_those_of_the_batches(ahead):
    images_NHWC = np.random.default_rng(0).integers(0, 256, (31, 4, 4, 3), dtype=np.uint8)
    positions = np.arange(1, 31, 3)
    with prefetch.images_ahead(images_NHWC, positions, CPU, ahead) as images_of:
        for batch in np.split(positions, (4, 5, 6)):
            np.testing.assert_array_equal(images_of(batch).numpy(), images_NHWC[batch])
    assert threads_named("images") == []


def test_a_thread_that_uploads_is_on_the_gpu_of_the_stream_before_and_after_it(monkeypatch):
    current, on = [0], []  # the GPU of a thread; that on which the stream was begun and left

    @contextlib.contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    @contextlib.contextmanager
    def on_stream(stream):
        on.append(current[-1])
        yield
        on.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(prefetch, "_pinned", lambda tensor: tensor)
    stream = SimpleNamespace(device=CPU, record_event=lambda: "copied")
    assert prefetch.upload([np.arange(3)], stream).tensors[0].tolist() == [0, 1, 2]
    assert on == [CPU, CPU]
    assert current == [0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_on_a_cpu():
    train, source = TrainConfig(epochs=2, batch_size=16, kl_weight=0.0), ArraySource(num_images=40, size=36)
    without_model = SimpleNamespace(image_size=32, logit_scale=100.0)
    there, here = (
        _views(Targets(without_model, torch.zeros(1, 1), source, train, device), train, RunContext(), 1, 3)
        for device in (GPU, CPU)
    )
    for found, expected in zip(there, here, strict=True):
        assert found.pixels_BHWC.is_cuda
        assert torch.equal(found.pixels_BHWC.cpu(), expected.pixels_BHWC)
        assert torch.equal(found.labels_B.cpu(), expected.labels_B)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(3)
    arrays = rng.normal(size=(B, D)), rng.normal(size=(B, D)), unit(rng.normal(size=(T, D)))
    return tuple(map(torch.from_numpy, arrays))


def mean_kl(features, features0, head, scale):
    """The KL term of a batch, by the functions that training calls."""
    return context_kl(context_distribution(features, head, scale), context_distribution(features0, head, scale)).mean()


def test_kl_and_distribution_equal_numpy(tensors):
    features, features0, head = (tensor.numpy() for tensor in tensors)
    log_p, log_p0 = (log_softmax(S * unit(rows) @ head.T, axis=1) for rows in (features, features0))
    np.testing.assert_allclose(context_distribution(tensors[0], tensors[2], S).numpy(), log_p, atol=1e-9)
    expected = (np.exp(log_p0) * (log_p0 - log_p)).sum(axis=1).mean()
    assert mean_kl(*tensors, S).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_identical_features_and_of_one_context_is_exactly_zero_and_never_negative(tensors, dtype):
    features, features0, head = (tensor.to(dtype) for tensor in tensors)
    assert mean_kl(features, features.clone(), head, S).item() == 0.0
    assert mean_kl(features, features0, head[:1], S).item() == 0.0
    rng, head = np.random.default_rng(0), tensors[2]
    for step in (1e-8, 1e-4, 1e-2, 1.0):
        features0 = torch.from_numpy(rng.normal(size=(200, D)))
        features = features0 + step * torch.from_numpy(rng.normal(size=(200, D)))
        log_p, log_p0 = context_distribution(features, head, 100.0), context_distribution(features0, head, 100.0)
        assert context_kl(log_p, log_p0).min().item() >= -1e-10


def test_stored_half_precision_targets_stay_within_the_stated_bounds():
    rng = np.random.default_rng(8)
    head = torch.from_numpy(unit(rng.normal(size=(80, 512)))).float()
    features0 = torch.from_numpy(rng.normal(size=(300, 512))).float()
    features = features0 + 0.05 * torch.from_numpy(rng.normal(size=(300, 512))).float()
    log_p0 = context_distribution(features0, head, 100.0)
    stored = log_p0.exp().half()
    online = context_kl(context_distribution(features, head, 100.0), log_p0)
    found = context_kl(context_distribution(features, head, 100.0), stored, log_target=False)
    assert ((found - online).abs() <= 2e-4).all()
    at_identity = context_kl(log_p0, stored, log_target=False).mean().item()
    assert at_identity >= -1e-6


def test_half_precision_features_are_scored_in_float32_and_the_entropy_of_a_uniform_distribution_is_log_t(tensors):
    features, _, head = (tensor.float() for tensor in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p = context_distribution(features, head, 100.0)
    assert torch.equal(log_p, context_distribution(features, head, 100.0))
    assert context_entropy(torch.full((3, 8), -math.log(8.0))).item() == pytest.approx(math.log(8))
