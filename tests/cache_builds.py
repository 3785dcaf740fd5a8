"""Builds of the image cache, as a program of ``crash_host``.

call(["decoded", FOLDER])           opens a decoded set of the pictures below; every decoding appends to FOLDER/log
call(["packed", FOLDER])            the same, packed
call(["limited", FOLDER])           the same, decoded by halves of their size, with room for one set
call(["readers", FOLDER])           opens a decoded set in eight processes at once and tells what each has in memory
call(["builders", FOLDER, KIND])    opens a set of KIND in eight processes that begin at once

With "no-locks" behind it, on a disk without locks.
"""

import errno
import fcntl
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUM_PROCESSES = 8
LARGE = (400, 224)  # images, side in pixels: 60 MB, against 3 MB that any process needs to read


def import_everything():
    global image_set, PackedSource, errors, decode_image
    import pandas  # noqa: F401  (pyarrow would load it in every fork)

    from carft_ray import errors
    from carft_ray.data.decoded import image_set
    from carft_ray.data.images import decode_image
    from carft_ray.data.packed import PackedSource


@dataclass(frozen=True)
class Pictures:
    """Random images that are stored: bytes of a JPEG each."""

    log_path: Path | None = None
    num_images: int = 12
    side: int = 8
    name: str = "train"
    class_names: tuple[str, ...] = ("bird", "fish")
    fingerprint: str = "pictures-1/0"
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

    def place(self, index):
        return f"picture {index}"

    def content(self, index):
        import simplejpeg

        if self.log_path is not None:
            handle = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, f"{os.getpid()} {index}\n".encode())
            os.close(handle)
        pixels = np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return simplejpeg.encode_jpeg(pixels)

    def decode(self, content, index):
        return decode_image(content, self.place(index))

    def pixels(self, index):
        return self.decode(self.content(index), index)


class Plain(Pictures):
    """Many pictures of one colour each, which take no time."""

    def pixels(self, index):
        return np.full((self.side, self.side, 3), index % 256, dtype=np.uint8)


def halve(image):
    return image.resize((image.width // 2, image.height // 2))


def opened(kind, folder):
    """Returns the sum of all pixels of a set, from the cache."""
    source = Pictures(folder / "log")
    if kind == "packed":
        packed = PackedSource(source, folder / "cache")
        return sum(int(packed.pixels(index).sum()) for index in range(len(packed)))
    if kind == "limited":
        one_set = 3e-6  # GB: the sets have 2,106 and 3,834 bytes
        return int(image_set(source, halve, "halved", folder / "cache", limit_gb=one_set).images_NHWC.sum())
    return int(image_set(source, None, "as-is", folder / "cache").images_NHWC.sum())


def no_locks(handle, operation):
    """Stands in for ``fcntl.flock`` on a network disk that has none."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def call(argv):
    kind, folder = argv[0], Path(argv[1])
    if argv[-1] == "no-locks":
        fcntl.flock = no_locks
    try:
        if kind in ("readers", "builders"):
            print(json.dumps(at_once(readers(folder) if kind == "readers" else lambda: opened(argv[2], folder))))
        else:
            print(opened(kind, folder))
    except errors.CarftError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


def at_once(work):
    """Runs ``work`` in eight forks that begin together; returns what they answer."""
    ready, go = os.pipe(), os.pipe()
    answers = []
    for _ in range(NUM_PROCESSES):
        answer = os.pipe()
        if not os.fork():
            os.write(ready[1], b"x")
            os.close(go[1])
            os.read(go[0], 1)  # until the parent closes its end
            os.write(answer[1], json.dumps(work()).encode())
            os._exit(0)
        os.close(answer[1])
        answers.append(answer[0])
    for _ in range(NUM_PROCESSES):
        os.read(ready[0], 1)
    os.close(go[0])
    os.close(go[1])
    found = [json.loads(os.read(answer, 10_000)) for answer in answers]
    for _ in range(NUM_PROCESSES):
        if os.waitstatus_to_exitcode(os.wait()[1]):
            sys.exit("a process failed")
    return found


def readers(folder):
    """Returns what a reader does: it reads all pixels in batches and tells by how much its own memory has grown."""
    number, side = LARGE
    source = Plain(None, number, side, fingerprint="plain-1/0")
    image_set(source, None, "as-is", folder / "cache")
    met = folder / "met"
    met.mkdir()

    def own_bytes():
        """Memory that is this process's alone (USS), and all of it but what is shared with a file (bytes)."""
        found = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        kb = {name: int(value.split()[0]) for name, value in found.items()}
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * (kb["Private_Clean"] + kb["Private_Dirty"]), 1024 * int(status["RssAnon"].split()[0])

    def read():
        import time

        before = own_bytes()
        images_NHWC = image_set(source, None, "as-is", folder / "cache").images_NHWC
        total = sum(int(images_NHWC[start : start + 8].copy().sum()) for start in range(0, number, 8))
        (met / str(os.getpid())).touch()
        while len(os.listdir(met)) < NUM_PROCESSES:  # all have the whole set mapped
            time.sleep(0.01)
        after = own_bytes()
        (met / f"{os.getpid()} measured").touch()
        while len(os.listdir(met)) < 2 * NUM_PROCESSES:
            time.sleep(0.01)
        return {"total": total, "grown": [after[0] - before[0], after[1] - before[1]], "set": images_NHWC.nbytes}

    return read
