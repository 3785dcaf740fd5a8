"""Batches made ahead: the same whatever the number of threads, in order, and no thread is left behind."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ArraySource

from carft_ray.data.views import view_batch
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.training import prefetch
from carft_ray.training.loop import _views
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import Targets

CPU = torch.device("cpu")


def threads_named(*names):
    return [each.name for each in threading.enumerate() if each.name.rpartition("_")[0] in names]


@pytest.mark.parametrize(("num_images", "num_threads"), [(0, 3), (37, 1), (37, 3)])
def test_views_of_several_threads_are_those_of_one(num_images, num_threads):
    source = ArraySource(num_images=40, size=36)
    indices = np.arange(num_images)[::-1].copy()
    visits = np.arange(num_images)
    arguments = (source, indices, source.sample_ids[indices], 3, visits, 0.5, 24)
    with prefetch.view_threads(num_threads) as make_views:
        np.testing.assert_array_equal(make_views(*arguments), view_batch(*arguments))
    assert threads_named("views") == []


@pytest.mark.parametrize("number", [0, 1, 3])
def test_values_come_in_order_before_an_error_and_few_are_made_ahead(number):
    begun, most = [], []

    def square(value):
        if value == 20:
            raise ValueError("twenty")
        return value * value

    def parts():
        for value in range(30):
            begun.append(value)
            yield (value,)

    values = prefetch.made_ahead(square, parts(), number)
    for expected in range(20):
        assert next(values) == expected**2
        most.append(len(begun) - expected - 1)
    with pytest.raises(ValueError, match="twenty"):
        next(values)
    assert max(most) <= number
    assert threads_named("batches") == []


@pytest.mark.parametrize("ahead", [False, True])
def test_images_read_ahead_are_those_of_the_batches(ahead):
    images_NHWC = np.random.default_rng(0).integers(0, 256, (31, 4, 4, 3), dtype=np.uint8)
    positions = np.arange(1, 31, 3)
    with prefetch.images_ahead(images_NHWC, positions, CPU, ahead) as images_of:
        for batch in np.split(positions, (4, 5, 6)):
            np.testing.assert_array_equal(images_of(batch).numpy(), images_NHWC[batch])
    assert threads_named("images") == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_on_a_cpu():
    train, source = TrainConfig(epochs=2, batch_size=16, kl_weight=0.0), ArraySource(num_images=40, size=36)
    without_model = SimpleNamespace(image_size=32, logit_scale=100.0)
    there, here = (
        _views(Targets(without_model, torch.zeros(1, 1), source, train, device), train, RunContext(), 1, 3)
        for device in (torch.device("cuda"), CPU)
    )
    for found, expected in zip(there, here, strict=True):
        assert found.pixels_BHWC.is_cuda
        assert torch.equal(found.pixels_BHWC.cpu(), expected.pixels_BHWC)
        assert torch.equal(found.labels_B.cpu(), expected.labels_B)
