"""Evaluation of a set: what leaves the device, what it takes of memory, and what is said where that is too little."""

import json

import attempts
import evaluation_memory
import pytest
import short_training
import torch
from test_loop import CPU, settings

from carft_ray.data.source import ImageSet
from carft_ray.errors import CarftError
from carft_ray.launch.runs.search import run_search
from carft_ray.model import classifier
from carft_ray.model.classifier import build_classifier
from carft_ray.recipe.loading import load_recipe
from carft_ray.study.rows import trials
from carft_ray.training import evaluate, run
from carft_ray.training.evaluate import predict
from carft_ray.training.run_context import RunContext


def test_labels_of_a_set_of_groups_must_be_their_first_classes(tiny_clip, heads, source):
    classifier = build_classifier(tiny_clip, heads[0], settings(), CPU)
    groups = ImageSet("id_val", source.images, 0 * source.labels, source.sample_ids, ((1, 0), (2,)))
    with pytest.raises(ValueError, match="first class of a group"):
        predict(classifier, groups, 0.5, 4, RunContext())


def measured(out, *args):
    out.write_text(json.dumps(evaluation_memory.measure(*args)))


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
