"""The memory of a training step, foretold by tensors without content, against real steps on a CPU."""

import ctypes
import os
import resource

import attempts
import pytest
import torch
from conftest import TEMPLATES, ArraySource
from test_loop import settings
from tiny import make_clip

from carft_ray.training.loop import fine_tune
from carft_ray.training.memory import StepMemory, step_memory

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
def test_what_more_images_take_is_foretold_within_15_percent(tmp_path, name, values):
    peaks = []
    for number in (FEW, MANY):
        attempts.forked(train, name, values, number, tmp_path / str(number)).join()
        peaks.append(int((tmp_path / str(number)).read_text()))
    clip, heads = model_of(name)
    found = step_memory(clip, settings(precision="fp32", **values), *heads)
    assert peaks[1] - peaks[0] == pytest.approx(found.of(MANY) - found.of(FEW), rel=0.15)
    weights = 4 * sum(parameter.numel() for parameter in clip.model.visual.parameters())
    if name == "vit":  # plain: two towers and two moments, and all gradients
        assert found.fixed < 3.5 * weights if values else found.fixed == pytest.approx(4 * weights, rel=0.1)
        assert (found.least > 5 * weights) == (not values)


def test_the_micro_batch_to_begin_with_is_a_half_of_a_half_that_fits():
    needed = StepMemory(least=1.1e9, fixed=1e9, an_image=1e7)
    assert [needed.largest(there, 512) for there in (100e9, 5e9, 1.3e9, 1.2e9)] == [512, 256, 16, 0]


def test_an_average_takes_one_more_copy_of_the_weights_and_plain_fine_tuning_one_less():
    clip, heads = model_of("vit")
    plain, average, alone = (
        step_memory(clip, settings(precision="fp32", **values), *heads)
        for values in ({}, {"ema_decay": 0.9}, {"kl_weight": 0.0})
    )
    weights = 4 * sum(parameter.numel() for parameter in clip.model.visual.parameters())
    assert average.fixed == pytest.approx(plain.fixed + weights, rel=0.1)
    assert alone.fixed == pytest.approx(plain.fixed - weights, rel=0.1)
