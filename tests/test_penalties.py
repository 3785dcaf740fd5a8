"""The penalties beside the KL of the contexts, moving teachers and the linear probe: formulas, limit cases, splits,
resume, random texts."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ArraySource
from families import FAMILIES, make_folder
from PIL import Image
from safetensors.torch import load_file
from scipy.special import log_softmax, softmax
from scipy.stats import beta
from test_loop import CPU, clip_and_heads, largest_difference, settings, unit, without_speed
from test_lost import gloo
from tiny import load_folder

from carft_ray.data.views import permutation
from carft_ray.model.classifier import build_classifier
from carft_ray.model.clip import load_clip
from carft_ray.model.lora import LowRank
from carft_ray.model.mixing import move_towards, teacher_shares
from carft_ray.model.tower import shape_tower
from carft_ray.recipe.schedule import learning_rate_at
from carft_ray.recipe.schema.model import ModelConfig
from carft_ray.recipe.schema.train import PENALTIES, SCHEDULED, TrainConfig
from carft_ray.results.page.data import method_of
from carft_ray.training import loop, targets
from carft_ray.training.car_ft_loss import Loss
from carft_ray.training.evaluate import Mixtures
from carft_ray.training.linear_probe import probe
from carft_ray.training.loop import StoppedRun, fine_tune
from carft_ray.training.other_penalties import Anchor, RandomTexts, Reference, feature_sums, share_at
from carft_ray.training.run_context import RunContext

B, C, D, M = 6, 5, 12, 9  # images, classes, width, texts
NONE = dict.fromkeys(PENALTIES, 0.0)
ALL = {"kl_weight": 2.0, "class_kl_weight": 0.5, "feature_weight": 3.0, "text_weight": 0.1, "l2_sp_weight": 0.5}
EACH = [
    *({name: ALL[name]} for name in PENALTIES),
    ALL,
    {**ALL, "penalty_schedule": "linear_to_zero"},
    {**ALL, "teacher": "average"},
    {"kl_weight": 2.0, "teacher": "average", "lora_rank": 2, "ema_decay": 0.8, "freeze_layers": 1},
    {"kl_weight": 2.0, "probe_epochs": 2, "ema_decay": 0.8, "head_bias": True},
]


def penalised(**values):
    return settings(**{**NONE, **values})


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


@pytest.fixture
def arrays():
    """Features of student and frozen model, class logits of both, texts times the scale; some far apart."""
    rng = np.random.default_rng(5)
    shapes = {"v": (B, D), "v0": (B, D), "z": (B, C), "z0": (B, C), "texts": (M, D)}
    return {name: 3 * rng.normal(size=shape) for name, shape in shapes.items()}


def sums_of(arrays, **weights):
    """The sums, and the gradients of their weighted sum with respect to features and class logits."""
    train = penalised(**weights)
    v, z = (torch.from_numpy(arrays[name]).requires_grad_() for name in ("v", "z"))
    reference = Reference(None, *(torch.from_numpy(each) for each in (unit(arrays["v0"]), arrays["z0"])))
    if train.text_weight:
        reference = reference._replace(texts_MD=torch.from_numpy(arrays["texts"]))
    sums = feature_sums(train, v, z, reference)
    total = sum(getattr(train, f"{name}_weight") * value for name, value in zip(train.feature_terms, sums, strict=True))
    total.backward()
    return [value.item() for value in sums], *(None if each.grad is None else each.grad.numpy() for each in (v, z))


def through_unit(v, of_unit):
    """The gradient with respect to v of a function of v / |v| with this gradient."""
    f = unit(v)
    return (of_unit - f * (f * of_unit).sum(axis=1, keepdims=True)) / np.linalg.norm(v, axis=1, keepdims=True)


def test_values_and_gradients_equal_numpy(arrays):
    v, z, z0, texts = (arrays[name] for name in ("v", "z", "z0", "texts"))
    f, f0 = unit(v), unit(arrays["v0"])
    expected = {
        "class_kl": ((softmax(z0, 1) * (log_softmax(z0, 1) - log_softmax(z, 1))).sum(), 0 * v),
        "feature": ((1 - (f * f0).sum(axis=1)).sum(), through_unit(v, -f0)),
        "text": ((((f - f0) @ texts.T) ** 2).sum() / (2 * M), through_unit(v, (f - f0) @ texts.T @ texts / M)),
    }
    for name, (value, gradient) in expected.items():
        [found], of_v, of_z = sums_of(arrays, **{f"{name}_weight": 0.7})
        assert found == pytest.approx(value, abs=1e-9)
        if name == "class_kl":
            np.testing.assert_allclose(of_z, 0.7 * (softmax(z, 1) - softmax(z0, 1)), atol=1e-9)
        else:
            np.testing.assert_allclose(of_v, 0.7 * gradient, atol=1e-9)
    together, of_v, _ = sums_of(arrays, class_kl_weight=1.0, feature_weight=2.0, text_weight=3.0)
    assert together == pytest.approx([value for value, _ in expected.values()], abs=1e-9)
    np.testing.assert_allclose(of_v, 2 * expected["feature"][1] + 3 * expected["text"][1], atol=1e-9)


def test_limit_cases_of_the_features(arrays):
    orthonormal = 4.0 * np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]  # s = 4, as many texts as D
    [found], _, _ = sums_of({**arrays, "texts": orthonormal}, text_weight=1.0)
    assert found == pytest.approx(16 / (2 * D) * ((unit(arrays["v"]) - unit(arrays["v0"])) ** 2).sum())
    longer = {**arrays, "v": 5 * arrays["v"]}
    weights = {"class_kl_weight": 1.0, "feature_weight": 1.0, "text_weight": 1.0}
    assert sums_of(longer, **weights)[0] == pytest.approx(sums_of(arrays, **weights)[0], rel=1e-12)
    shifted = {**arrays, "z": arrays["z"] + 7.0}
    assert sums_of(shifted, class_kl_weight=1.0)[0] == pytest.approx(sums_of(arrays, class_kl_weight=1.0)[0])
    same = {**arrays, "v": unit(arrays["v0"]), "z": arrays["z0"]}
    same["v0"] = same["v"] = unit(same["v"])  # whose lengths are 1 to the bit, or a bit beside it
    assert sums_of(same, **weights)[0] == pytest.approx([0, 0, 0], abs=1e-25)


def test_a_small_change_costs_half_the_variance_of_the_change_of_the_logits(arrays):
    z0, change = arrays["z0"], np.random.default_rng(9).normal(size=(B, C))
    p0, errors = softmax(z0, 1), []
    for size in (1e-2, 1e-3):
        dz = size * change
        expected = ((p0 * dz**2).sum(1) - (p0 * dz).sum(1) ** 2).sum() / 2
        [[found], _, _] = sums_of({**arrays, "z": z0 + dz}, class_kl_weight=1.0)
        errors.append(abs(found / expected - 1))
    assert errors[0] < 2e-2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)  # the error falls with the change


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def test_l2_sp_has_the_minimum_of_the_closed_form_and_no_pull_at_the_start():
    toy, (a, weight), target = Toy(), (3.0, 0.5), torch.tensor([4.0, 1.0, -1.0], dtype=torch.float64)
    anchor, start, optimizer = Anchor(toy, weight), toy.theta.detach().clone(), torch.optim.SGD(toy.parameters(), 0.1)
    toy.theta.grad = torch.zeros_like(start)
    assert anchor.pull() == 0
    assert torch.equal(toy.theta.grad, torch.zeros_like(start))
    for _ in range(300):
        optimizer.zero_grad()
        (a / 2 * (toy.theta - target).square().sum()).backward()
        value = anchor.pull()
        optimizer.step()
    assert torch.allclose(toy.theta.detach(), (a * target + weight * start) / (a + weight), rtol=0, atol=1e-12)
    assert value.item() == pytest.approx((toy.theta - start).square().sum().item() / 2)


def test_l2_sp_of_lora_is_that_of_the_merged_weights(clip64, heads64):
    train = penalised(l2_sp_weight=0.7, lora_rank=3, lora_alpha=4.5, precision="fp64")
    classifier = build_classifier(clip64, heads64[0], train, CPU)
    start = {name: tensor.clone() for name, tensor in classifier.state().items()}
    shape_tower(classifier, train)
    anchor, layers = Anchor(classifier.visual, 0.7), [m for m in classifier.modules() if isinstance(m, LowRank)]
    rng = np.random.default_rng(1)
    for layer in layers:
        for factor in (layer.A, layer.B):
            factor.data = torch.from_numpy(rng.normal(size=tuple(factor.shape)))
            factor.grad = torch.zeros_like(factor)
    moved = [(tensor - start[name]).square().sum().item() for name, tensor in classifier.state().items()]
    assert anchor.pull().item() == pytest.approx(sum(moved) / 2, rel=1e-12)
    assert len(layers) == 8  # queries, keys and values, their output, and two of the MLP, in two blocks
    for layer in layers:
        A, B = layer.A.detach().numpy(), layer.B.detach().numpy()
        np.testing.assert_allclose(layer.A.grad.numpy(), 0.7 * 1.5**2 * B.T @ B @ A, rtol=1e-9)
        np.testing.assert_allclose(layer.B.grad.numpy(), 0.7 * 1.5**2 * B @ A @ A.T, rtol=1e-9)


def test_without_a_weight_nothing_is_computed_and_training_is_plain(tiny_clip, heads, source, monkeypatch):
    rows, train = [], penalised(penalty_schedule="linear_to_zero")
    plain = fine_tune(tiny_clip, *heads, source, settings(kl_weight=0.0))
    for place in ("targets.build_classifier", "targets.RandomTexts", "loop.Anchor", "car_ft_loss.context_kl"):
        monkeypatch.setattr(f"carft_ray.training.{place}", None)
    again = fine_tune(tiny_clip, *heads, source, train, RunContext(report=rows.append))
    assert largest_difference(plain, again) == 0.0
    assert set(rows[0]) >= {"loss", "ce", "kl", "context_entropy", "grad_norm"}
    assert not set(rows[0]) & {"class_kl", "feature", "text", "l2_sp"}


@pytest.mark.parametrize("values", [{name: 50.0} for name in PENALTIES[1:]])
def test_at_step_zero_a_penalty_and_its_gradient_are_zero(clip64, heads64, source, values):
    rows, one_step = [], {"precision": "fp64", "epochs": 1, "batch_size": 40, "weight_decay": 0.0}
    report = RunContext(report=rows.append)
    plain = fine_tune(clip64, *heads64, source, penalised(**one_step))
    found = fine_tune(clip64, *heads64, source, penalised(**one_step, **values), report)
    [name] = values
    assert abs(rows[0][name.removesuffix("_weight")]) < 1e-20
    assert largest_difference(plain, found) < 1e-6 * settings().learning_rate  # Adam divides rounding by 1e-8


def test_what_a_penalty_measures_falls_with_its_weight(clip64, heads64, source):
    for name in PENALTIES:
        found = []
        for weight in (1e-6, 1.0, 100.0):
            rows, train = [], penalised(**{name: weight}, precision="fp64", weight_decay=0.0)
            fine_tune(clip64, *heads64, source, train, RunContext(report=rows.append))
            found.append(rows[-1][name.removesuffix("_weight")])
        assert found == sorted(found, reverse=True)
        assert found[0] > 1.5 * found[2] > 0


@pytest.mark.parametrize("schedule", ["constant", "linear_to_zero"])
def test_the_loss_of_a_row_is_the_weighted_sum_of_its_terms(clip64, heads64, source, every_step, schedule):
    rows, train = [], penalised(**ALL, precision="fp64", penalty_schedule=schedule, epochs=2)
    fine_tune(clip64, *heads64, source, train, RunContext(progress=rows.append))
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        share = 1 if schedule == "constant" else 1 - (row["step"] - 1) / 8
        assert share_at(train, row["step"] - 1, 8) == share
        terms = [share * ALL[name] * row[name.removesuffix("_weight")] for name in SCHEDULED]
        assert row["loss"] == pytest.approx(row["ce"] + sum(terms) + ALL["l2_sp_weight"] * row["l2_sp"], rel=1e-12)
    assert min(row["l2_sp"] for row in rows[1:]) > 0


def test_a_large_weight_of_l2_sp_holds_the_tower_at_its_start(clip64, heads64, source):
    found = []
    for weight in (1e-9, 1e6):
        rows, train = [], penalised(l2_sp_weight=weight, precision="fp64", batch_size=4)
        fine_tune(clip64, *heads64, source, train, RunContext(report=rows.append))
        found.append(rows[-1]["l2_sp"])
    assert found[1] < 0.1 * found[0]


def test_with_l2_sp_only_the_head_decays(clip64, heads64, source):
    ends = []
    for weight_decay in (0.0, 0.3):
        train = penalised(l2_sp_weight=0.01, weight_decay=weight_decay, precision="fp64", epochs=1, batch_size=40)
        ends.append(fine_tune(clip64, *heads64, source, train))
    differ = {name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])}
    assert differ == {"class_head"}


def test_any_split_into_micro_batches_has_the_same_gradient_and_one_frozen_pass(
    clip64, heads64, source, monkeypatch, every_step
):
    passes, build = [], targets.build_classifier

    def counted(*given):
        frozen = build(*given)
        frozen.register_forward_pre_hook(lambda module, images: passes.append(len(images[0])))
        return frozen

    monkeypatch.setattr(targets, "build_classifier", counted)
    found = {}
    for micro_batch in (None, 6, 5, 1):
        rows, train = [], penalised(**ALL, precision="fp64", batch_size=20, epochs=1, micro_batch=micro_batch)
        passes.clear()
        found[micro_batch] = fine_tune(clip64, *heads64, source, train, RunContext(progress=rows.append)), rows
        assert passes == 2 * {None: [20], 6: [6, 6, 6, 2], 5: [5] * 4, 1: [1] * 20}[micro_batch]
    whole, whole_rows = found.pop(None)
    for state, rows in found.values():
        assert largest_difference(without_keys(whole), without_keys(state)) < 1e-9
        for mine, theirs in zip(whole_rows, rows, strict=True):
            assert without_speed(mine) == pytest.approx(without_speed(theirs), rel=1e-9, abs=1e-8)


@pytest.mark.parametrize("values", EACH, ids=lambda values: "-".join(map(str, values)))
def test_a_training_that_stops_and_resumes_ends_with_the_same_bits(
    tiny_clip, heads, source, tmp_path, every_step, values
):
    train, whole_rows, rows = penalised(**values, epochs=2, batch_size=16), [], []
    whole = fine_tune(tiny_clip, *heads, source, train, RunContext(report=whole_rows.append))
    for attempt in range(1, 9):
        begun = []
        context = RunContext(report=rows.append, progress=begun.append, should_stop=lambda begun=begun: bool(begun))
        with contextlib.suppress(StoppedRun):
            state = fine_tune(tiny_clip, *heads, source, train, context, checkpoint_dir=tmp_path, attempt=attempt)
            break
    assert attempt == 6  # a step each
    assert largest_difference(whole, state) == 0.0
    assert [without_speed(row) for row in rows] == [without_speed(row) for row in whole_rows]


TWO = {**ALL, "penalty_schedule": "linear_to_zero", "teacher": "average", "precision": "fp64", "batch_size": 40}
TWO["probe_epochs"] = 2
NUM_IMAGES = 41  # the last batch has one image, so one of two workers has none


def train_as_two(context, folder):
    rows, (clip, heads) = [], clip_and_heads()
    context = replace(context, report=rows.append)
    state = fine_tune(clip, *heads, ArraySource(NUM_IMAGES), penalised(**TWO, micro_batch=8), context)
    torch.save((state, rows), folder / f"{context.rank}.pt")


def without_keys(state):
    """Leaves out the biases of the keys, which change no output: their gradient is rounding, which Adam divides by 1e-8
    and L2-SP returns to it as a gradient, so that it grows from step to step."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("in_proj_bias")}


@pytest.mark.slow
def test_two_workers_with_all_penalties_end_with_the_weights_of_one(clip64, heads64, tmp_path):
    rows = []
    one = fine_tune(clip64, *heads64, ArraySource(NUM_IMAGES), penalised(**TWO), RunContext(report=rows.append))
    assert gloo(train_as_two, tmp_path) == [0, 0]
    for rank, expected in enumerate((rows, [])):
        state, found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert largest_difference(without_keys(one), without_keys(state)) < 1e-9
        for mine, theirs in zip(expected, found, strict=True):
            assert without_speed(mine) == pytest.approx(without_speed(theirs), rel=1e-9, abs=1e-8)


@pytest.mark.parametrize("values", [{}, {"lora_rank": 2}, {"freeze_layers": 2, "ema_decay": 0.5}])
def test_a_moving_teacher_is_the_mean_of_the_merged_weights_with_beta_weights(
    clip64, heads64, source, tmp_path, monkeypatch, values
):
    looks, teachers, kept = [], [], []
    start = build_classifier(clip64, heads64[0], penalised(precision="fp64"), CPU).state()

    def recorded(average, weights, share, move=loop.move_towards):
        move(average, weights, share)
        looks.append({name: weights[name].detach().clone() for name in average})
        teachers.append({name: tensor.clone() for name, tensor in average.items()})

    class Kept(targets.Targets):
        def __init__(self, *given):
            super().__init__(*given)
            kept.append(self)

    monkeypatch.setattr(loop, "move_towards", recorded)
    monkeypatch.setattr(loop, "Targets", Kept)
    train = penalised(**ALL, **values, teacher="average", precision="fp64")
    places = {"checkpoint_dir": tmp_path / "checkpoints", "target_store": tmp_path / "store"}
    end = fine_tune(clip64, *heads64, source, train, **places)
    assert not (tmp_path / "store").exists()
    num_steps, weights = len(looks), beta.pdf((np.arange(len(looks) + 1) + 0.5) / (len(looks) + 1), 0.5, 0.5)
    assert num_steps == 12
    for name in looks[0]:
        thetas = torch.stack([start[name], *(look[name] for look in looks)]).numpy()
        for step in (1, 5, num_steps):
            expected = np.average(thetas[: step + 1], axis=0, weights=weights[: step + 1])
            np.testing.assert_allclose(teachers[step - 1][name].numpy(), expected, atol=1e-12)
    if "ema_decay" not in values:
        assert max(float((looks[-1][name] - end[name]).abs().max()) for name in looks[0]) < 1e-12  # as it is returned
    frozen = kept[0].frozen.state()
    assert torch.equal(frozen["class_head"], start["class_head"])
    assert {name for name in frozen if not torch.equal(frozen[name], start[name])} == set(looks[0])
    averages = load_file(tmp_path / "checkpoints" / "attempt-1" / "step-00000008" / "average.safetensors")
    mine = {name.removeprefix("teacher."): tensor for name, tensor in averages.items() if name.startswith("teacher.")}
    assert largest_difference(mine, teachers[7]) == 0.0
    assert any(not name.startswith("teacher.") for name in averages) == ("ema_decay" in values)


def test_a_running_mean_with_equal_weights_is_the_mean():
    rows = torch.from_numpy(np.random.default_rng(2).normal(size=(6, 3)))
    average = {"w": rows[0].clone()}
    for step, row in enumerate(rows[1:], start=1):
        move_towards(average, {"w": row}, 1 / (step + 1))
    assert torch.allclose(average["w"], rows.mean(0), rtol=0, atol=1e-15)
    assert teacher_shares(1) == [1.0, 0.5]


@pytest.mark.parametrize("values", [{name: ALL[name]} for name in SCHEDULED])
def test_a_moving_teacher_begins_as_the_frozen_model_and_then_leaves_it(clip64, heads64, source, every_step, values):
    found = {}
    for teacher in ("frozen", "average"):
        rows, train = [], penalised(**values, teacher=teacher, precision="fp64", epochs=1)
        state = fine_tune(clip64, *heads64, source, train, RunContext(progress=rows.append))
        found[teacher] = state, [without_speed(row) for row in rows]
    (frozen, rows), (moved, others) = found.values()
    assert rows[:1] == [pytest.approx(others[0], rel=1e-6, abs=1e-7)]  # targets of contexts are in blocks of 64, or not
    [name] = [name.removesuffix("_weight") for name in values]
    assert 0 < others[-1][name] < rows[-1][name]
    assert largest_difference(frozen, moved) > 1e-6


def test_a_moving_teacher_changes_neither_l2_sp_nor_a_training_without_a_penalty(tiny_clip, heads, source):
    for values in ({}, {"l2_sp_weight": 0.5}):
        ends = [fine_tune(tiny_clip, *heads, source, penalised(**values, teacher=t)) for t in ("frozen", "average")]
        assert largest_difference(*ends) == 0.0


PROBE = {"probe_epochs": 3, "batch_size": 16, "label_smoothing": 0.1, "weight_decay": 0.3, "precision": "fp64"}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"head_bias": True, "decay": "matrices", "clip_norm": 0.1},
        {"head_bias": True, "head_lr_factor": 0.0, "layer_decay": 0.7},
    ],
)
def test_a_linear_probe_trains_the_head_alone_as_torch_does(clip64, heads64, values):
    images, train = ArraySource(size=20), penalised(**PROBE, **values)
    images.labels.flags.writeable = False  # as those of a real set
    model = clip64.model.visual
    seen = [clip64.to_input(Image.fromarray(pixels)) for pixels in images.images]
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in seen])).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (clip64.mean, clip64.std))
    with torch.no_grad():
        features = torch.nn.functional.normalize(model((pixels - mean) / std), dim=-1)
    head = torch.nn.Linear(16, 5, bias=train.head_bias, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(clip64.logit_scale * heads64[0])
        if train.head_bias:
            head.bias.zero_()
    groups = [
        {"params": [each], "weight_decay": 0.3 if each.ndim > 1 or train.decay == "all" else 0.0}
        for each in head.parameters()
    ]
    optimizer, labels = torch.optim.AdamW(groups), torch.tensor(images.labels)
    steps = [rows for epoch in range(3) for rows in np.split(permutation(train.seed, epoch, 40), [16, 32])]
    for step, rows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, 1e-3, 0, 9)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features[rows]), labels[rows], label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), train.clip_norm)
        optimizer.step()
    classifier = build_classifier(clip64, heads64[0], train, CPU)
    start = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    asked = []
    probe(classifier.train(), clip64, images, train, RunContext(), 7, 2, lambda: asked.append(1))
    assert len(asked) == 6 + 3
    found = classifier.state_dict()
    assert torch.allclose(found.pop("class_head"), head.weight.detach(), rtol=0, atol=1e-11)
    if train.head_bias:
        assert torch.allclose(found.pop("class_bias"), head.bias.detach(), rtol=0, atol=1e-11)
    assert all(torch.equal(tensor, start[name]) for name, tensor in found.items())
    # a training that hardly moves ends with that head, and so does its average
    still = train.model_copy(update={"learning_rate": 1e-300, "ema_decay": 0.9, "lora_rank": 2})
    end = fine_tune(clip64, *heads64, images, still)
    assert torch.allclose(end["class_head"], head.weight.detach(), rtol=0, atol=1e-11)


def test_a_linear_probe_can_be_stopped_and_changes_neither_schedule_nor_zero_shot(tiny_clip, heads, source, tmp_path):
    rows = {}
    for epochs in (0, 2):
        rows[epochs] = []
        train = settings(probe_epochs=epochs, grad_checkpointing=True)
        fine_tune(tiny_clip, *heads, source, train, RunContext(report=rows[epochs].append))
    for name in ("step", "num_steps", "epoch", "learning_rate"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[2]]
    assert rows[2][0]["ce"] < rows[0][0]["ce"]
    mixtures = [Mixtures(tiny_clip, heads[0], settings(probe_epochs=epochs), CPU).zero_shot for epochs in (0, 2)]
    assert largest_difference(*mixtures) == 0.0
    stops = RunContext(should_stop=lambda: True)
    with pytest.raises(StoppedRun, match="stopped on request in the linear probe"):
        fine_tune(tiny_clip, *heads, source, settings(probe_epochs=1), stops, checkpoint_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_random_texts_depend_on_seed_and_step_alone(tiny_clip):
    texts, again, other = (RandomTexts(tiny_clip, TrainConfig(seed=seed), CPU) for seed in (3, 3, 4))
    again.of(7)
    first, start, end = texts.tokens(5), 49406, 49407
    assert torch.equal(first, again.tokens(5))
    assert first.shape == (80, 16)
    assert (first[:, 0] == start).all()
    assert (first[:, 9] == end).all()
    assert (first[:, 10:] == 0).all()
    drawn = first[:, 1:9]
    assert len(drawn.unique()) > 600
    assert 0 < int(drawn.min()) < 500
    assert 49000 < int(drawn.max()) < start
    assert not torch.equal(first, texts.tokens(6))
    assert not torch.equal(first, other.tokens(5))
    found = texts.of(5)
    assert torch.allclose(found.norm(dim=1), torch.full((80,), 20.0))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(tiny_clip.model.encode_text(first), dim=-1)
    assert torch.allclose(found, 20 * expected, atol=1e-5)
    assert not any(name.startswith("visual") for name, _ in texts.model.named_parameters())
    assert any(name.startswith("visual") for name, _ in tiny_clip.model.named_parameters())


def test_texts_of_the_sandbox_have_only_tokens_on_which_it_was_trained():
    clip = load_clip(ModelConfig(name="sandbox"))
    texts = RandomTexts(clip, TrainConfig(), CPU)
    known = set(clip.tokenizer(list(clip.captions)).flatten().tolist())
    assert len(clip.captions) == 31 * 16
    assert (
        set(texts.tokens(0)[:, 1:9].flatten().tolist()) == known - {49406, 49407, 0} == set(texts.vocabulary.tolist())
    )


@pytest.mark.parametrize("name", ["siglip", "metaclip2", "coca"])
def test_random_texts_have_start_and_end_of_the_models_own_tokenizer(name, tmp_path):
    family = FAMILIES[name]
    clip = load_folder(make_folder(family, tmp_path / name))
    tokens = RandomTexts(clip, TrainConfig(), CPU).tokens(0)
    [empty, other] = clip.tokenizer(["", "a photo of the cat in the fog"])
    assert tokens.shape == (80, len(empty))
    number_of_starts = int((empty != other).int().argmax())
    assert torch.equal(tokens[:, :number_of_starts], empty[:number_of_starts].expand(80, -1))
    rest = tokens[:, number_of_starts + 8 :]
    assert torch.equal(rest, empty[number_of_starts : len(empty) - 8].expand(80, -1))
    assert not set(tokens[:, number_of_starts : number_of_starts + 8].flatten().tolist()) & set(empty.tolist())
    assert RandomTexts(clip, TrainConfig(), CPU).of(0).shape == (80, 32)


def test_the_page_names_the_penalties_of_a_training():
    view = SimpleNamespace(recipe=SimpleNamespace(train=penalised(feature_weight=2.0)))
    cases = {
        "plain fine-tuning": {"feature_weight": 0.0},
        "CAR-FT": {"feature_weight": 0.0, "kl_weight": 1.0},
        "penalties: feature": {},
        "penalties: kl, feature, l2_sp": {"kl_weight": 1.0, "l2_sp_weight": 0.1},
    }
    for method, values in cases.items():
        assert method_of(view, SimpleNamespace(values=values)) == method


def test_the_loss_names_what_it_sums():
    heads = torch.eye(3)
    assert Loss(heads, 1.0, settings()).names == ("ce", "kl", "context_entropy")
    assert Loss(heads, 1.0, penalised(**ALL)).names == ("ce", "kl", "context_entropy", "class_kl", "feature", "text")


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["to"]), ("cuda", ["pin", "to"])])
def test_the_tokens_of_random_texts_reach_a_gpu_without_a_wait(device, expected):
    done = []

    class Tokens:
        def pin_memory(self):
            done.append("pin")
            return self

        def to(self, place, non_blocking=False):
            assert (place.type, non_blocking) == (device, True)
            done.append("to")
            return torch.ones(2, 3)

    model = SimpleNamespace(encode_text=lambda tokens_ML: tokens_ML)
    texts = SimpleNamespace(model=model, autocast_dtype=None, device=torch.device(device), logit_scale=2.0)
    texts.tokens = lambda step: Tokens()
    found = RandomTexts.of(texts, 0)
    assert done == expected
    assert torch.allclose(found, torch.full((2, 3), 2 / 3**0.5))
