"""Evaluation of a set: what leaves the device, what it takes of memory, and what is said where that is too little."""

import contextlib
import json

import attempts
import evaluation_memory
import numpy as np
import pytest
import short_training
import torch
from conftest import ArraySource
from test_loop import CPU, settings
from tiny import make_resnet_clip
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from carft_ray.data.source import ImageSet
from carft_ray.errors import CarftError
from carft_ray.evaluation.predictions import OF_LOGITS
from carft_ray.launch.runs.search import run_search
from carft_ray.model import classifier
from carft_ray.model.classifier import build_classifier
from carft_ray.recipe.loading import load_recipe
from carft_ray.study.rows import trials
from carft_ray.training import evaluate, run
from carft_ray.training.evaluate import predict, predict_all
from carft_ray.training.run_context import RunContext

META = torch.device("meta")


class Left(TorchDispatchMode):
    """Notes the bytes of each tensor that leaves the device ``meta``, which stands for a GPU, for the host.

    The host gets zeros. What needs a value in another way, as ``numpy``, ``nonzero`` and a mask as an index do, is an
    error of this device.
    """

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name()
        there = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor) and each.device == META]
        if there and (name.startswith("aten::_local_scalar_dense") or CPU in tree_leaves((args[1:], kwargs))):
            self.bytes += [each.nbytes for each in there]
            return 0 if name.startswith("aten::_local") else torch.zeros(there[0].shape, dtype=there[0].dtype)
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_meta(images, positions, device, ahead):
    yield lambda batch: torch.from_numpy(images[batch]).to(device)


@pytest.mark.parametrize("groups", [None, ((0, 3), (2,))])
def test_nothing_waits_for_a_batch_and_an_image_leaves_40_bytes(tiny_clip, heads, monkeypatch, groups):
    monkeypatch.setattr(evaluate, "images_ahead", on_meta)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    for clip, class_head_CD, side in ((tiny_clip, heads[0], 16), (make_resnet_clip(), torch.eye(5, 16), 32)):
        classifier = build_classifier(clip, class_head_CD, settings(), CPU).to(META)
        source = ArraySource(num_images=22, size=side)
        labels = np.zeros(22, np.int64) if groups else source.labels
        images = ImageSet("id_val", source.images, labels, source.sample_ids, groups)
        with Left() as left:
            assert torch.ones(1, device=META).item() == 0
            table = predict_all(classifier, [images] * 2, 0.5, 4, RunContext())
        assert left.bytes == [4, *[22 * 8 * len(OF_LOGITS)] * 2]  # one copy at the end of each set
        assert len(table) == 44


def test_labels_of_a_set_of_groups_must_be_their_first_classes(tiny_clip, heads, source):
    classifier = build_classifier(tiny_clip, heads[0], settings(), CPU)
    groups = ImageSet("id_val", source.images, 0 * source.labels, source.sample_ids, ((1, 0), (2,)))
    with pytest.raises(ValueError, match="first class of a group"):
        predict(classifier, groups, 0.5, 4, RunContext())


def measured(out, *args):
    out.write_text(json.dumps(evaluation_memory.measure(*args)))


@pytest.mark.whole
@pytest.mark.slow
def test_memory_does_not_grow_with_images_times_classes(tmp_path):
    """Of 1,500 images, 4,000 classes, 2,000 groups; all logits are 24 MB, softmax over them in float64 150 more."""
    assert attempts.forked(measured, tmp_path / "found", 1500, 4000, 2000).join() is None
    assert json.loads((tmp_path / "found").read_text())["bytes"] < 20e6


# ---- too little memory


def short(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def search(folder, *overrides):
    always = [f"data.cache_dir={folder / 'cache'}", "resources.executor=debug", "search.trials=1", "train.epochs=2"]
    run_search(load_recipe(short_training.make(folder), [*always, *overrides]), folder / "study")


def in_forward(monkeypatch):
    """Every forward pass of an evaluation of mixed weights; the preparation's, of alpha 0, is none."""
    real = evaluate.predict_all

    def call(model, sets, alpha, *rest):
        with monkeypatch.context() as patches:
            if alpha > 0:
                patches.setattr(evaluate, "answers", short)
            return real(model, sets, alpha, *rest)

    monkeypatch.setattr(run, "predict_all", call)


COPIES = "mixing: two more copies of the model's weights"
PLACES = [
    (in_forward, 0, "evaluation: 1 image of 16 x 16 pixels at a time must fit into memory"),
    (in_forward, 1, "evaluation: 1 image of 16 x 16 pixels at a time must fit into memory"),
    (lambda patches: patches.setattr(torch, "lerp", short), 0, COPIES),
    (lambda patches: patches.setattr(evaluate, "arranged", short), 0, COPIES),  # the copy to the device
    (lambda patches: patches.setattr(classifier.ImageClassifier, "state", short), 1, COPIES),
]


@pytest.mark.parametrize(("patch", "every_epochs", "text"), PLACES)
def test_a_shortage_of_an_evaluation_is_named_and_not_taken_for_another(
    tmp_path, monkeypatch, patch, every_epochs, text
):
    patch(monkeypatch)
    with pytest.raises(CarftError) as caught:
        search(tmp_path, f"evaluate.every_epochs={every_epochs}")
    assert text in str(caught.value)
    assert "too little on the device cpu" in str(caught.value)
    assert caught.value.exit_code == 5
    assert not (tmp_path / "study" / "fits.json").exists()


def test_an_evaluation_takes_half_until_it_fits(tmp_path, monkeypatch):
    real, sizes = evaluate.answers, []

    def tight(logits_BC, labels_B):
        sizes.append(len(logits_BC))
        return short() if len(logits_BC) > 4 else real(logits_BC, labels_B)

    monkeypatch.setattr(evaluate, "answers", tight)
    search(tmp_path, "evaluate.every_epochs=1")
    assert [(row.outcome, row.attempt) for row in trials(tmp_path / "study")] == [("complete", 1)]
    assert {15, 7, 3} <= set(sizes)
    assert not (tmp_path / "study" / "fits.json").exists()
