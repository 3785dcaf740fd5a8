"""Data order and views: golden words, boxes and pixels; oracles; independence of rank, batch and epochs."""

import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from benchmarks.photos import photo
from carft_ray.data import views
from carft_ray.data.philox import STREAM_VIEW, philox4x32, words
from carft_ray.data.views import parts_of, permutation, view_batch

# Random123 1.14, tests/kat_vectors, lines "philox4x32 10": counter, key, expected
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def crop_box(seed, sample_id, visit, width, height, crop_scale):
    (tries,) = views.crop_tries(seed, np.array([sample_id], np.uint64), visit, crop_scale)
    return tuple(int(side) for side in views.crop_box(tries, width, height))


def view(pixels, seed, sample_id, visit, crop_scale, image_size):
    """One view of one image, step by step."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = crop_box(seed, sample_id, visit, width, height, crop_scale)
    crop_CHW = torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)
    shown_CHW = tv.resize(crop_CHW, [image_size, image_size], InterpolationMode.BICUBIC, antialias=True)
    return shown_CHW.permute(1, 2, 0).numpy()


def test_philox_gives_the_known_answers_of_random123_alone_and_many_at_once():
    counters, keys, expected = (
        np.array([[int(word, 16) for word in text.split()] for text in texts], dtype=np.uint32)
        for texts in zip(*KNOWN_ANSWERS, strict=True)
    )
    for counter, key, answer in zip(counters, keys, expected, strict=True):
        together = philox4x32(np.stack([counters, counters[::-1], [counter] * 3]), key)
        assert (together.shape, together.dtype) == ((3, 3, 4), np.uint32)
        np.testing.assert_array_equal(together[2], [answer] * 3)


def test_permutation_is_pinned_and_holds_every_index_once():
    assert permutation(0, 0, 10).tolist() == [0, 3, 6, 5, 7, 9, 8, 4, 1, 2]  # changes with VIEW_VERSION alone
    assert permutation(0, 1, 10).tolist() == [3, 4, 5, 7, 9, 1, 8, 2, 6, 0]
    assert permutation(2**63 - 1, 2**32 - 1, 10).tolist() == [5, 6, 3, 2, 9, 4, 0, 7, 1, 8]
    assert permutation(0, 0, 0).tolist() == []
    order = permutation(5, 3, 1000)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
def test_parts_of_all_ranks_are_the_global_batches_of_one_worker(world_size):
    def batches(rank, world_size):
        return [indices for _, indices in parts_of(permutation(3, 2, 50), 12, rank, world_size)]

    alone = batches(0, 1)
    parts = [batches(rank, world_size) for rank in range(world_size)]
    assert [len(batch) for batch in alone] == [12, 12, 12, 12, 2]
    np.testing.assert_array_equal(np.concatenate(alone), permutation(3, 2, 50))
    for i, batch in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), batch)
        sizes = [len(part[i]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def reference_box(seed, sample_id, visit, width, height, crop_scale):
    """torchvision's get_params (0.28), word for word, fed with our words."""
    low, high = np.log(3 / 4), np.log(4 / 3)
    for area_word, ratio_word, top_word, left_word in words(seed, STREAM_VIEW, visit, [sample_id], 10)[0].tolist():
        target_area = width * height * (crop_scale + (1 - crop_scale) * (area_word / 2**32))
        ratio = np.exp(low + (high - low) * (ratio_word / 2**32))
        w, h = round(np.sqrt(target_area * ratio)), round(np.sqrt(target_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = top_word * (height - h + 1) // 2**32, left_word * (width - w + 1) // 2**32
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < 3 / 4:
        h = round(w / (3 / 4))
    elif width / height > 4 / 3:
        w = round(h * (4 / 3))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


SIZES = [(32, 32), (640, 480), (100, 300), (300, 100), (1, 1), (2, 9), (1, 4000), (4000, 1)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("crop_scale", [0.08, 0.9, 1.0])
def test_boxes_follow_the_rule_of_torchvision(width, height, crop_scale):
    for sample_id in np.random.default_rng(1).integers(0, 2**64, 60, dtype=np.uint64).tolist():
        left, top, right, bottom = box = crop_box(11, sample_id, 4, width, height, crop_scale)
        assert box == reference_box(11, sample_id, 4, width, height, crop_scale)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def digest_of_many_views():
    draw, found = np.random.default_rng(0), hashlib.blake2b()
    for number in range(20):
        side, largest = int(draw.choice([16, 32, 224])), int(draw.choice([40, 700]))
        width, height = draw.integers(1, largest, 2).tolist()
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ids = np.array([number], dtype=np.uint64)
        found.update(view_batch(pixels[None], np.array([0]), ids, 0, 0, 0.5, side).tobytes())
    return found.hexdigest()[:16]


@pytest.mark.slow  # torch is loaded
def test_views_do_not_depend_on_the_instructions_of_the_processor():
    setting = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import test_views; print(test_views.digest_of_many_views())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=setting)
    assert done.stdout.strip() == digest_of_many_views() == "ccc08bbad7abe13e"  # changes with VIEW_VERSION, 2, alone


@pytest.mark.parametrize("image_size", [32, 24])
@pytest.mark.parametrize("crop_scale", [0.3, 0.9, 1.0])
def test_view_batch_equals_one_view_at_a_time(image_size, crop_scale):
    decoded = np.stack([photo(seed, 40, 36) for seed in range(6)])
    sizes = ((40, 36), (36, 40), (64, 20), (32, 32), (24, 24), (9, 50))
    mixed = SimpleNamespace(pixels=[photo(seed, *size) for seed, size in enumerate(sizes)].__getitem__)
    indices, visits = np.array([4, 0, 4, 2]), np.array([0, 1, 2, 3])
    ids = np.array([2**64 - 1, 8, 3, 0], dtype=np.uint64)
    for images, pixels in ((decoded, decoded.__getitem__), (mixed, mixed.pixels)):
        together = view_batch(images, indices, ids, 9, visits, crop_scale, image_size)
        for shown, index, sample_id, visit in zip(together, indices, ids.tolist(), visits.tolist(), strict=True):
            single = view(pixels(index), 9, sample_id, visit, crop_scale, image_size)
            np.testing.assert_array_equal(shown, single)
        assert together.flags.writeable
    nothing = view_batch(decoded, indices[:0], ids[:0], 0, 0, crop_scale, image_size)
    assert (nothing.shape, nothing.dtype) == ((0, image_size, image_size, 3), np.uint8)
    with pytest.raises(ValueError, match="one sample id per index"):
        view_batch(decoded, indices[:1], ids, 0, 0, crop_scale, image_size)
