"""Memory: of a training step, estimated; of an evaluation; and what is said where that is too little."""

import contextlib
import ctypes
import os
import resource

import attempts
import numpy as np
import pytest
import short_training
import torch
from conftest import TEMPLATES, ArraySource
from study_steps import searching
from test_loop import CPU, settings
from tiny import make_clip, make_resnet_clip, make_tiny_clip

from carft_ray.data.source import ImageSet
from carft_ray.errors import CarftError, DataError
from carft_ray.evaluation.predictions import OF_LOGITS
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.workers.micro_batch import noted
from carft_ray.launch.workers.runtime import Runner
from carft_ray.launch.workers.worker import run_worker
from carft_ray.model import classifier
from carft_ray.model.classifier import build_classifier
from carft_ray.recipe.loading import load_recipe
from carft_ray.store.log import log_of
from carft_ray.study.training import Failure
from carft_ray.training import evaluate, out_of_memory, run
from carft_ray.training.evaluate import predict, predict_all
from carft_ray.training.loop import fine_tune
from carft_ray.training.memory import StepMemory, step_memory
from carft_ray.training.run_context import RunContext

pytestmark = pytest.mark.slow

SIDE = 64
TOWERS = {
    "vit": {"layers": 3, "width": 192, "head_width": 64, "patch_size": 8},
    "resnet": {"layers": [1, 1, 1, 1], "width": 32, "head_width": 64},
    "convnext": {"timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear"},
}
SAVING = {"freeze_layers": 2, "lora_rank": 4, "ema_decay": 0.9}
FEW, MANY = 16, 80  # images of a pass
M_MMAP_THRESHOLD = -3  # of malloc.h: what is larger goes back to the system when it is free


def model_of(name):
    unit = torch.nn.functional.normalize(torch.randn(2, len(TEMPLATES), 16), dim=-1)
    return make_clip({**TOWERS[name], "image_size": SIDE}), tuple(unit)


def train(name, values, num_images, out):
    """Makes two steps and writes the most memory that this process had, in bytes."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    torch.set_num_threads(1)
    clip, heads = model_of(name)
    source = ArraySource(num_images, SIDE)
    fine_tune(clip, *heads, source, settings(epochs=2, batch_size=num_images, precision="fp32", **values))
    out.write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    os._exit(0)


@pytest.mark.whole
@pytest.mark.parametrize(("name", "values"), [*((name, {}) for name in TOWERS), ("vit", SAVING)])
def test_what_more_images_take_is_estimated_within_15_percent(tmp_path, name, values):
    peaks = []
    for number in (FEW, MANY):
        attempts.forked(train, name, values, number, tmp_path / str(number)).join()
        peaks.append(int((tmp_path / str(number)).read_text()))
    clip, heads = model_of(name)
    found = step_memory(clip, settings(precision="fp32", **values), heads[0], CPU)
    assert peaks[1] - peaks[0] == pytest.approx(found.of(MANY) - found.of(FEW), rel=0.15)


def test_the_micro_batch_to_begin_with_is_a_half_of_a_half_that_fits():
    needed = StepMemory(least=1.1e9, fixed=1e9, an_image=1e7)
    assert [needed.largest(there, 512) for there in (100e9, 5e9, 1.3e9, 1.2e9)] == [512, 256, 16, 0]


def test_car_ft_takes_four_copies_of_the_weights_an_average_or_l2_sp_one_more_and_plain_fine_tuning_one_less():
    clip, heads = model_of("vit")
    weights = 4 * sum(parameter.numel() for parameter in clip.model.visual.parameters())
    cases = ({}, 4), ({"ema_decay": 0.9}, 5), ({"l2_sp_weight": 1.0}, 5), ({"kl_weight": 0.0}, 3)
    for values, copies in (*cases, ({"kl_weight": 0.0, "feature_weight": 1.0}, 4)):
        found = step_memory(clip, settings(precision="fp32", **values), heads[0], CPU)
        assert found.fixed == pytest.approx(copies * weights, rel=0.1)
        assert found.least > (copies + 1) * weights


def test_an_estimate_leaves_no_memory_taken():
    clip, heads = model_of("vit")
    before = None
    for number in range(11):
        step_memory(clip, settings(precision="fp32", grad_checkpointing=number == 0), heads[0], CPU)
        before = anonymous_mb() if before is None else before
    assert anonymous_mb() - before < 50


@contextlib.contextmanager
def on_meta(images, positions, device, ahead):
    yield lambda batch: torch.from_numpy(images[batch]).to(device)


@pytest.mark.parametrize("groups", [None, ((0, 3), (2,))])
def test_nothing_waits_for_a_batch_and_an_image_leaves_40_bytes(tiny_clip, heads, monkeypatch, groups):
    """The device ``meta`` stands for a GPU: whatever needs a value, but for ``cpu`` here, is an error there."""
    left = []

    def host(there):
        left.append(there.nbytes)
        return torch.zeros(there.shape, dtype=there.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", host)
    monkeypatch.setattr(evaluate, "images_ahead", on_meta)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    for clip, class_head_CD, side in ((tiny_clip, heads[0], 16), (make_resnet_clip(), torch.eye(5, 16), 32)):
        classifier = build_classifier(clip, class_head_CD, settings(), CPU).to("meta")
        source = ArraySource(num_images=22, size=side)
        labels = np.zeros(22, np.int64) if groups else source.labels
        images = ImageSet("id_val", source.images, labels, source.sample_ids, groups)
        left.clear()
        assert len(predict_all(classifier, [images] * 2, 0.5, 4, RunContext())) == 44
        assert left == [22 * 8 * len(OF_LOGITS)] * 2  # one copy at the end of each set


def test_images_of_another_size_and_labels_that_are_no_first_classes_of_groups_are_refused(tiny_clip, heads, source):
    classifier, larger = build_classifier(tiny_clip, heads[0], settings(), CPU), ArraySource(size=24)
    with pytest.raises(RuntimeError, match="must match the size"):  # as it is: no want of memory
        predict(classifier, ImageSet("id_val", larger.images, larger.labels, larger.sample_ids), 0.5, 4, RunContext())
    groups = ImageSet("id_val", source.images, 0 * source.labels, source.sample_ids, ((1, 0), (2,)))
    with pytest.raises(ValueError, match="first class of a group"):
        predict(classifier, groups, 0.5, 4, RunContext())


def measure(out, num_images, num_classes, num_groups):
    """Writes how many bytes the evaluation of groups of two classes adds to the peak of this process."""
    torch.set_num_threads(1)
    classifier = build_classifier(make_tiny_clip(), torch.randn(num_classes, 16), settings(), CPU)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, 16, 16, 3), dtype=np.uint8)
    labels, ids = 2 * rng.integers(0, num_groups, num_images), np.arange(num_images, dtype=np.uint64)
    groups = tuple((2 * index, 2 * index + 1) for index in range(num_groups))
    peaks = []
    for number in (8, num_images):  # the first: what a process needs once
        given = ImageSet("id_val", images[:number], labels[:number], ids[:number], groups)
        predict(classifier, given, 1.0, 128, RunContext())
        peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    out.write_text(str(peaks[1] - peaks[0]))


@pytest.mark.whole
def test_memory_does_not_grow_with_images_times_classes(tmp_path):
    """Of 1,500 images, 4,000 classes, 2,000 groups; all logits are 24 MB, softmax over them in float64 150 more."""
    attempts.forked(measure, tmp_path / "found", 1500, 4000, 2000).join()
    assert int((tmp_path / "found").read_text()) < 20e6


def short(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def search(folder, *overrides):
    always = [f"data.cache_dir={folder / 'cache'}", "resources.executor=debug", "search.trials=1", "train.epochs=2"]
    run_search(Plan(load_recipe(short_training.make(folder), [*always, *overrides]), folder / "study"))


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
def test_a_shortage_of_an_evaluation_is_named(tmp_path, monkeypatch, patch, every_epochs, text):
    patch(monkeypatch)
    with pytest.raises(CarftError) as caught:
        search(tmp_path, f"evaluate.every_epochs={every_epochs}")
    assert text in str(caught.value)
    assert caught.value.exit_code == 5
    assert noted(log_of(tmp_path / "study")) == {}


def anonymous_mb():
    """Returns the memory that this process holds besides files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) / 1024


@pytest.mark.parametrize("ends", ["well", "fails"])
def test_a_training_that_has_ended_leaves_no_memory_taken_in_its_process(study_dir, ends):
    """The allocator keeps what was freed below a block that is still there."""
    kept, held = [], []

    def train(recipe, out_dir, *given):
        blocks = [b"x" * 2**16 for _ in range(4_000)]
        kept.append(blocks[-1])
        held.append(anonymous_mb())
        if ends == "fails":
            raise DataError("an image is gone")
        return attempts.stand_in.train(recipe, out_dir, *given)

    runner = Runner(attempts.stand_in.prepare, train)
    with searching(study_dir, attempts.stand_in.make_recipe(epochs=1)) as study:
        out_of_memory.free_host()
        before = anonymous_mb()
        ended = run_worker(attempts.plan_of(study, runner), attempts.stand_in.spec(1), RunContext())
    assert isinstance(ended, Failure) == (ends == "fails")
    assert held[0] - before > 200
    assert anonymous_mb() - before < 50


def test_a_c_library_that_cannot_give_memory_back_is_left_alone(monkeypatch):
    monkeypatch.setattr(out_of_memory.ctypes, "CDLL", lambda name: object())
    out_of_memory.free_host()
