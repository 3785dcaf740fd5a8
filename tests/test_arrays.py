"""The cache of decoded sets: what is in an entry, one builder, damage, builders that die, disks that refuse."""

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from carft_ray.data.decoded import image_set
from carft_ray.errors import DataError, StorageError

REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Pictures:
    """Random images; with a log, every decoding appends a line to it."""

    num_images: int = 5
    size: tuple[int, int] = (6, 8)  # height, width
    name: str = "id_val"
    fingerprint: str = "pictures-1"
    class_names: tuple[str, ...] = ("bird", "fish")
    log_path: Path | None = None
    delay_s: float = 0.0
    groups: None = None
    home: str = "/nowhere"

    @property
    def labels(self):
        return np.arange(self.num_images, dtype=np.int64) % 2

    @property
    def sample_ids(self):
        return np.arange(self.num_images, dtype=np.uint64) + np.uint64(2**63)

    def __len__(self):
        return self.num_images

    def pixels(self, index):
        if self.log_path is not None:
            with open(self.log_path, "a") as log:
                log.write(f"{os.getpid()} {index}\n")
        time.sleep(self.delay_s)
        return np.random.default_rng(index).integers(0, 256, (*self.size, 3), dtype=np.uint8)


def halve(image):
    return image.resize((4, 3), Image.Resampling.BICUBIC)


def entries(cache_dir):
    return sorted(path.name for path in cache_dir.iterdir() if not path.name.endswith(".lock"))


def the_file(cache_dir):
    (entry,) = entries(cache_dir)
    return cache_dir / entry


def test_set_holds_pixels_labels_and_ids_of_the_source(tmp_path):
    source = Pictures()
    found = image_set(source, None, "none", tmp_path / "cache")
    assert found.name == "id_val"
    assert len(found) == 5
    np.testing.assert_array_equal(found.images_NHWC, np.stack([source.pixels(i) for i in range(5)]))
    np.testing.assert_array_equal(found.labels, source.labels)
    np.testing.assert_array_equal(found.sample_ids, source.sample_ids)
    assert (found.images_NHWC.dtype, found.labels.dtype, found.sample_ids.dtype) == (np.uint8, np.int64, np.uint64)


def test_transform_is_applied_and_grey_becomes_rgb(tmp_path):
    source = Pictures()
    found = image_set(source, lambda image: halve(image).convert("L"), "halve", tmp_path)
    expected = np.asarray(halve(Image.fromarray(source.pixels(2))).convert("L").convert("RGB"))
    assert found.images_NHWC.shape == (5, 3, 4, 3)
    np.testing.assert_array_equal(found.images_NHWC[2], expected)


def test_entry_is_an_arrow_file_that_other_tools_read(tmp_path):
    image_set(Pictures(), None, "none", tmp_path)
    with pa.memory_map(str(the_file(tmp_path))) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.column_names == ["image", "label", "sample_id"]
    assert table.schema.field("image").type == pa.binary(6 * 8 * 3)
    assert table.schema.metadata[b"height"] == b"6"
    assert table["image"][3].as_py() == Pictures().pixels(3).tobytes()


@pytest.mark.slow
def test_arrays_are_read_only_views_of_the_file(tmp_path):
    found = image_set(Pictures(num_images=4000), None, "none", tmp_path)
    allocated = pa.total_allocated_bytes()
    again = image_set(Pictures(num_images=4000), None, "none", tmp_path)
    assert pa.total_allocated_bytes() - allocated < 10_000  # 576,000 bytes of pixels
    assert not again.images_NHWC.flags.writeable
    assert not again.images_NHWC.flags.owndata
    np.testing.assert_array_equal(found.images_NHWC, again.images_NHWC)


def test_second_call_decodes_nothing_and_progress_is_told_once(tmp_path):
    log, seen = tmp_path / "log", []
    source = Pictures(log_path=log)
    for _ in range(2):
        image_set(source, None, "none", tmp_path / "cache", lambda done, total: seen.append((done, total)))
    assert len(log.read_text().splitlines()) == 5
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_other_fingerprint_or_transform_is_another_entry_and_the_name_is_not(tmp_path):
    source = Pictures()
    image_set(source, None, "none", tmp_path)
    assert image_set(replace(source, name="ood_val"), None, "none", tmp_path).name == "ood_val"
    assert len(entries(tmp_path)) == 1
    image_set(source, halve, "halve", tmp_path)
    image_set(replace(source, fingerprint="pictures-2"), None, "none", tmp_path)
    assert len(entries(tmp_path)) == 3


@pytest.mark.parametrize("length", [0, 10, 500, -1])
def test_a_truncated_entry_is_built_again_with_a_warning(tmp_path, caplog, length):
    source = Pictures()
    image_set(source, None, "none", tmp_path)
    path = the_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with caplog.at_level(logging.WARNING):
        found = image_set(source, None, "none", tmp_path)
    assert f"{path} of the cache is damaged and will be built again" in caplog.text
    np.testing.assert_array_equal(found.images_NHWC[4], source.pixels(4))
    assert pa.ipc.open_file(path.read_bytes()).num_record_batches == 1


def test_an_entry_with_other_images_is_built_again_with_a_warning(tmp_path, caplog):
    image_set(Pictures(num_images=5), None, "none", tmp_path)
    with caplog.at_level(logging.WARNING):
        found = image_set(Pictures(num_images=4), None, "none", tmp_path)
    assert len(found) == 4
    assert "will be built again" in caplog.text


def test_images_of_two_sizes_are_refused_and_nothing_is_left(tmp_path):
    class Mixed(Pictures):
        def pixels(self, index):
            return np.zeros((6, 9 if index == 3 else 8, 3), dtype=np.uint8)

    with pytest.raises(DataError, match="one size, but got 9 x 6 for image 3 and 8 x 6 for image 0"):
        image_set(Mixed(), None, "none", tmp_path)
    assert entries(tmp_path) == []


def test_an_unreadable_image_leaves_nothing(tmp_path):
    class Broken(Pictures):
        def pixels(self, index):
            if index == 2:
                raise DataError("no image")
            return super().pixels(index)

    with pytest.raises(DataError, match="no image"):
        image_set(Broken(), None, "none", tmp_path)
    assert entries(tmp_path) == []


def build(source, cache_dir, queue):
    queue.put(int(image_set(source, None, "none", cache_dir).images_NHWC.sum()))


@pytest.mark.slow
def test_a_killed_builder_leaves_no_entry_and_the_next_one_clears_up(tmp_path):
    cache_dir, log = tmp_path / "cache", tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    slow = Pictures(num_images=1000, log_path=log, delay_s=0.1)  # killed long before its end
    queue = context.Queue()
    worker = context.Process(target=build, args=(slow, cache_dir, queue))
    worker.start()
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    assert [name for name in entries(cache_dir) if not name.startswith(".")] == []
    quick = Pictures(num_images=1000)
    found = image_set(quick, None, "none", cache_dir)
    np.testing.assert_array_equal(found.images_NHWC[999], quick.pixels(999))
    assert [name for name in entries(cache_dir) if name.startswith(".")] == []


def in_child(code, *arguments):
    """Runs code in a process of its own, with this module's names; it must print the error that it caught."""
    text = "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_arrays import *\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", text, str(Path(__file__).parent), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_a_storage_error_and_leaves_nothing(tmp_path):
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            image_set(Pictures(num_images=1000), None, "none", Path(sys.argv[2]))
        except StorageError as error:
            print(error.exit_code, error)
    """
    output = in_child(code, tmp_path)
    assert output.startswith("5 ")
    assert f"must be writable, but got {os.strerror(errno.EFBIG)}" in output
    assert entries(tmp_path) == []


@pytest.mark.slow
def test_a_folder_without_write_permission_is_a_storage_error(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    code = """
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        try:
            image_set(Pictures(), None, "none", Path(sys.argv[2]))
        except StorageError as error:
            print(error.exit_code, error)
    """
    output = in_child(code, closed)
    assert output.startswith("5 ")
    assert str(closed) in output
    assert os.strerror(errno.EACCES) in output


def test_a_cache_folder_below_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="must be writable"):
        image_set(Pictures(), None, "none", tmp_path / "file" / "cache")
