"""``examples/mini_carft.py``, the method written once more: its numbers are those of the package."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from by_path import module_at
from conftest import CLASS_WORDS, TEMPLATES
from tiny import make_tiny_clip

from carft_ray.data import sandbox
from carft_ray.data.source import ImageSet
from carft_ray.data.views import permutation, view_batch
from carft_ray.evaluation.objective import ObjectiveSpec, metrics_at
from carft_ray.evaluation.predictions import concat
from carft_ray.model.classifier import build_classifier
from carft_ray.model.clip import load_clip
from carft_ray.model.heads import build_heads
from carft_ray.model.mixing import mix_weights
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.model import ModelConfig
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.car_ft_loss import Loss, context_distribution
from carft_ray.training.evaluate import predict_all
from carft_ray.training.loop import fine_tune
from carft_ray.training.other_penalties import Reference
from carft_ray.training.run_context import RunContext

ROOT = Path(__file__).resolve().parents[1]
mini_carft = module_at(ROOT / "examples" / "mini_carft.py")
CPU = torch.device("cpu")


@pytest.fixture
def double():
    """Everything in float64, so that only formulas can differ."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny(double):
    """The tiny CLIP of the tests, its heads, and a batch."""
    clip = make_tiny_clip(dtype=torch.float64)
    heads = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    generator = torch.Generator().manual_seed(0)
    size = clip.image_size
    pixels = torch.randint(256, (7, size, size, 3), generator=generator, dtype=torch.uint8)
    return clip, heads, pixels, torch.randint(len(CLASS_WORDS), (7,), generator=generator)


def moved(state):
    """A state some way off, as after a training."""
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in state.items()}
    return {name: x + 0.3 * x.std() * noise[name] if x.numel() > 1 else x for name, x in state.items()}


def test_heads_are_those_of_the_package(tiny):
    clip, heads, *_ = tiny
    for ours, theirs in zip(mini_carft.heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES), heads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kl_weight", [0.0, 2.5])
def test_loss_and_gradient_are_those_of_the_package(tiny, kl_weight):
    clip, (class_head, context_head), pixels, labels = tiny
    train = TrainConfig(learning_rate=1e-3, kl_weight=kl_weight, precision="fp64")
    theirs = build_classifier(clip, class_head, train, CPU).train()
    contexts = None
    if kl_weight:
        with torch.no_grad():
            contexts = context_distribution(theirs.features(pixels), context_head, clip.logit_scale).exp()
    state = moved(theirs.state())
    theirs.load_state_dict(state)
    ce, kl, *_ = Loss(context_head, clip.logit_scale, train).backward(
        theirs, pixels, labels, Reference(contexts), 1 / len(labels)
    )
    frozen = mini_carft.Classifier(clip.model, class_head)
    ours = mini_carft.Classifier(clip.model, class_head).requires_grad_(True)
    ours.load_state_dict(state)
    loss = mini_carft.car_ft_loss(ours, frozen, context_head, pixels, labels, kl_weight)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(ce + kl_weight * kl) / len(labels), abs=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-6)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients.values())


def test_the_alpha_curve_and_its_objectives_are_those_of_the_package(tiny):
    clip, (class_head, _), pixels, labels = tiny
    frozen = mini_carft.Classifier(clip.model, class_head)
    end = moved(frozen.state_dict())
    sets = {"id_val": (pixels, labels), "sketch": (pixels.flip(1), labels.flip(0)), "dark": (pixels // 3, labels)}
    curve = mini_carft.alpha_curve(frozen, end, sets)
    train = TrainConfig(learning_rate=1e-3, precision="fp64")
    theirs, spec = (
        build_classifier(clip, class_head, train, CPU),
        ObjectiveSpec("weighted_mean", "id_val", ("sketch", "dark")),
    )
    images = [ImageSet(name, x.numpy(), y.numpy(), np.arange(len(y), dtype=np.uint64)) for name, (x, y) in sets.items()]
    tables = []
    for alpha in curve:
        theirs.load_state_dict(mix_weights(frozen.state_dict(), end, alpha))
        tables.append(predict_all(theirs, images, alpha, 4, RunContext()))
    for alpha, accuracies in curve.items():
        metrics = metrics_at(concat(tables), spec, alpha)
        assert {name: metrics[f"accuracy/{name}"] for name in sets} == pytest.approx(accuracies, abs=1e-6)
        assert mini_carft.objective(accuracies) == pytest.approx(metrics["objective"], abs=1e-6)
    assert len({tuple(each.values()) for each in curve.values()}) > 1


@pytest.mark.parametrize(("rounds", "bound"), [(False, 1e-9), (True, 2e-4)])
def test_an_epoch_on_the_views_of_the_package_ends_with_its_weights(double, monkeypatch, rounds, bound):
    """The package also rounds the frozen model's distribution to float16, which is the only difference.

    In float64: Adam's first steps have the size of the learning rate however small a gradient is, rounding too.
    """
    if not rounds:
        monkeypatch.setattr(torch.Tensor, "half", lambda tensor: tensor)
    settings = ["train.epochs=1", "train.precision=fp64"]
    recipe = load_recipe(ROOT / "search_spaces" / "quickstart.yaml", settings)
    train, source = recipe.train, sandbox.SandboxSource("photo", "train", 16, "train")
    clip = load_clip(ModelConfig(name="sandbox"))
    clip.model.double()
    class_head, context_head = build_heads(clip.model, clip.tokenizer, sandbox.CLASSES, sandbox.TEMPLATES)
    theirs = fine_tune(clip, class_head, context_head, source, train)
    labels = torch.tensor(source.labels)
    order = torch.tensor(permutation(train.seed, 0, len(source))).split(train.batch_size)

    def batches():
        for each in order:
            indices = each.numpy()
            ids = source.sample_ids[indices]
            views = view_batch(source, indices, ids, train.seed, 0, train.crop_scale, clip.image_size)
            yield torch.from_numpy(views), labels[each]

    frozen = mini_carft.Classifier(clip.model, class_head)
    ours = mini_carft.fine_tune(frozen, context_head, batches(), len(order), train.learning_rate, train.kl_weight)
    assert ours.keys() == theirs.keys()
    trained, expected, begun = (
        torch.cat([state[name].flatten() for name, x in theirs.items() if x.is_floating_point()])
        for state in (ours, theirs, frozen.state_dict())
    )
    assert float((trained - expected).norm()) <= bound * float(expected.norm())
    assert float((expected - begun).norm()) >= 1e-3 * float(begun.norm())


def test_it_is_one_page_whose_method_takes_nothing_from_the_package():
    text = (ROOT / "examples" / "mini_carft.py").read_text()
    assert len(text.splitlines()) <= 300
    tree = ast.parse(text)
    border = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "sandbox")
    inside = range(border.lineno, border.end_lineno + 1)
    named = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("carft_ray")
    ]
    assert named
    assert all(node.lineno in inside for node in named)


def test_a_search_prints_the_best_setting_with_its_spread(monkeypatch, capsys):
    threads = torch.get_num_threads()
    for name, value in {"NUM_VALUES": 2, "NUM_REPEATED": 1, "NUM_SEEDS": 2, "NUM_EPOCHS": 1}.items():
        monkeypatch.setattr(mini_carft, name, value)
    monkeypatch.setattr(mini_carft.sandbox, "__defaults__", (8, 4))
    mini_carft.main()
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if " +- " in line]) == 3  # the leading values, plain fine-tuning, the best
    assert lines[-1].startswith("Best: learning_rate ")
    assert " +- " in lines[-1]
