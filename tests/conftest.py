"""Shared fixtures: a tiny real CLIP with random weights and small real image sets."""

import gc
import os
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a recipe may ask for more: on busy cores they must not spin
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 leaves them nothing of a machine that others keep busy
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub is never asked; what needs one says so at once

import numpy as np
import pytest

gc.disable()  # until all is collected: half a million objects of torch, transformers and others are no garbage
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in its background is deaf to Ctrl-C

CLASS_WORDS = ("circle", "square", "star", "heart", "arrow")
TEMPLATES = ("a photo of a {}", "a sketch of a {}", "a dark photo of a {}", "a painting of a {}", "a {} in the fog")
LONGEST = (  # longest first
    "test_kills",
    "test_filling",
    "test_study_crash",
    "test_search_ray",
    "test_examples",
    "test_crash",
    "test_lost",
    "test_growth",
    "test_own_ray",
    "test_export",
    "test_page_in_browser",
    "test_documents",
    "test_failures",
    "test_log_struck",
    "test_holding",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first, so that with several processes none of them is left for the end."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # workers take it over: one cache for all, and not the user's own
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="carft-tests-")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _one_thread():
    """A training in this process leaves torch with the threads of its recipe: back to one for the next test."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


class ArraySource:
    """Images in memory, as a Source."""

    def __init__(self, num_images=40, size=16, seed=0, name="train"):
        rng = np.random.default_rng(seed)
        self.name = name
        self.class_names = CLASS_WORDS
        self.labels = np.arange(num_images, dtype=np.int64) % len(CLASS_WORDS)
        self.sample_ids = rng.integers(0, 2**63, num_images, dtype=np.uint64)
        self.images = rng.integers(0, 256, (num_images, size, size, 3), dtype=np.uint8)
        self.images[:, :4, :4, 0] = (self.labels * 50)[:, None, None]  # something to learn
        self.identity = f"array-{num_images}-{size}-{seed}"
        self.groups = None

    def __len__(self):
        return len(self.images)

    def place(self, index):
        return f"{self.name}, image {index}"

    def content(self, index):
        return self.images[index].tobytes()

    def pixels(self, index):
        return self.images[index]


@pytest.fixture
def study_dir(tmp_path):
    """Where a study of this test will be."""
    return (tmp_path / "study").resolve()


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The working directory of this test, which has a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Runs a command line in the folder ``here`` of a module; every command that it suggests must parse."""
    import crash_host
    from suggestions import check_suggestions

    capsys.readouterr()

    def call(*words):
        code = crash_host.call(words)
        captured = capsys.readouterr()
        check_suggestions(captured.err)
        assert "Traceback (" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def tiny_clip():
    """A CLIP of two small transformers, 16 x 16 pixels, random weights, s = 20."""
    from tiny import make_tiny_clip

    return make_tiny_clip()


@pytest.fixture
def source():
    return ArraySource()


@pytest.fixture(scope="session")
def clip64():
    """The tiny CLIP in float64."""
    import torch
    from tiny import make_tiny_clip

    return make_tiny_clip(dtype=torch.float64)


@pytest.fixture(scope="session")
def heads64(clip64):
    """Class and context head of ``clip64``."""
    return _heads(clip64)


@pytest.fixture(scope="session")
def heads(tiny_clip):
    """Class and context head of ``tiny_clip``."""
    return _heads(tiny_clip)


def _heads(clip):
    from carft_ray.model.heads import build_heads

    return build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
