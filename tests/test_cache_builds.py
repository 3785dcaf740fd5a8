"""The cache of images under many processes: one builder, kills at every durable operation, full disks, memory.

It is a program of ``crash_host`` too: ``call([KIND, FOLDER])`` opens a ``decoded`` or ``packed`` set of the pictures
below, or ``limited``: halves of their size with room for one set; every decoding appends to FOLDER/log. ``["readers",
FOLDER]`` opens one in eight processes at once and tells what each has in memory, ``["builders", FOLDER, KIND]`` in as
many that begin at once. With "no-locks" behind it, on a disk without locks.
"""

import errno
import fcntl
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import crash_host
import numpy as np
import pytest
import simplejpeg

from carft_ray import errors
from carft_ray.data.decoded import image_set
from carft_ray.data.images import decode_image
from carft_ray.data.packed import PackedSource

pytestmark = pytest.mark.slow

NUM_PROCESSES = 8
LARGE = (400, 224)  # images, side in pixels: 60 MB, against 3 MB that any process needs to read


def import_everything():
    import pandas  # noqa: F401  (pyarrow would load it in every fork)


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

    def __len__(self):
        return self.num_images

    @property
    def labels(self):
        return np.arange(self.num_images, dtype=np.int64) % 2

    @property
    def sample_ids(self):
        return np.arange(self.num_images, dtype=np.uint64) + np.uint64(2**63)

    def place(self, index):
        return f"picture {index}"

    def content(self, index):
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
    source, cache = Pictures(folder / "log"), folder / "cache"
    if kind == "packed":
        packed = PackedSource(source, cache)
        return sum(int(packed.pixels(index).sum()) for index in range(len(packed)))
    if kind == "limited":
        return int(image_set(source, halve, "halved", cache, limit_gb=3e-6).images_NHWC.sum())  # of 3,834 bytes
    return int(image_set(source, None, "as-is", cache).images_NHWC.sum())


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
    ready, go, answers = os.pipe(), os.pipe(), []
    for _ in range(NUM_PROCESSES):
        answers.append(os.pipe())
        if not os.fork():
            os.write(ready[1], b"x")
            os.close(go[1])
            os.read(go[0], 1)  # until the parent closes its end
            os.write(answers[-1][1], json.dumps(work()).encode())
            os._exit(0)
        os.close(answers[-1][1])
    for _ in range(NUM_PROCESSES):
        os.read(ready[0], 1)
    os.close(go[0])
    os.close(go[1])
    found = [json.loads(os.read(answer[0], 10_000)) for answer in answers]
    if any(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(NUM_PROCESSES)):
        sys.exit("a process failed")
    return found


def readers(folder):
    """Returns what a reader does: it reads all pixels in batches and tells by how much its own memory has grown."""
    source = Plain(None, *LARGE, fingerprint="plain-1/0")
    image_set(source, None, "as-is", folder / "cache")
    met = folder / "met"
    met.mkdir()

    def own_bytes():
        """Memory that is this process's alone."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    def meet(what):
        (met / f"{os.getpid()} {what}").touch()
        while len(list(met.glob(f"* {what}"))) < NUM_PROCESSES:
            time.sleep(0.01)

    def read():
        before = own_bytes()
        images_NHWC = image_set(source, None, "as-is", folder / "cache").images_NHWC
        total = sum(int(images_NHWC[start : start + 8].copy().sum()) for start in range(0, len(source), 8))
        meet("mapped")  # all have the whole set mapped
        grown = own_bytes() - before
        meet("measured")
        return {"total": total, "grown": grown, "set": images_NHWC.nbytes}

    return read


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with crash_host.started(tmp_path_factory.mktemp("builds"), "test_cache_builds") as run:
        yield run


def names(place):
    """What the cache of a job holds, but for lock files."""
    return sorted(path.name for path in (place / "cache").glob("*") if path.suffix != ".lock")


def one_job(host, name, *argv):
    """Runs one command line; returns the folder of its job and its answer."""
    ((place, (answer,)),) = host([{"name": name, "commands": [{"argv": argv}]}]).values()
    assert answer["code"] == 0, answer["log"]
    return place, answer


@pytest.mark.parametrize("locks", ["locks", "no-locks"])
@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_eight_processes_that_ask_at_once_build_a_set_once_or_without_locks_one_entry(host, kind, locks):
    place, answer = one_job(host, f"{kind}-{locks}", "builders", ".", kind, locks)
    sums = json.loads(answer["log"].splitlines()[-1])
    assert (len(sums), len(set(sums))) == (NUM_PROCESSES, 1)
    assert answer["remains"] == []
    assert len(names(place)) == 1
    if locks == "locks":
        lines = [line.split() for line in (place / "log").read_text().splitlines()]
        assert sorted(int(index) for _, index in lines) == list(range(len(Pictures())))
        assert len({process for process, _ in lines}) == 1


def test_eight_readers_share_one_copy_in_memory(host):
    found = json.loads(one_job(host, "readers", "readers", ".")[1]["log"])
    assert len({each["total"] for each in found}) == 1
    assert max(each["grown"] / each["set"] for each in found) < 0.1, found


@pytest.mark.parametrize("kind", ["decoded", "packed", "limited"])
def test_a_build_killed_after_any_durable_operation_leaves_nothing_half_written_and_the_next_one_works(host, kind):
    build = {"argv": [kind, "."]}
    first = [{"argv": ["decoded", "."]}] if kind == "limited" else []  # a set that has to be removed
    ((place, answers),) = host([{"name": kind, "commands": [*first, {**build, "count_to": "kinds"}]}]).values()
    assert {answer["code"] for answer in answers} == {0}
    assert len(names(place)) == 1  # with a limit the newest one only
    number = len(json.loads((place / "kinds").read_text()))
    assert number >= 3  # flush, rename, flush of the folder
    killed = [[*first, {**build, "kill": (n, "after")}, build] for n in range(1, number + 1)]
    jobs = host([{"name": f"{kind}-{n}", "commands": commands} for n, commands in enumerate(killed)])
    for name, (folder, (*_, stopped, second)) in jobs.items():
        assert stopped["code"] == -signal.SIGKILL, name
        assert (second["code"], second["log"]) == (0, answers[-1]["log"]), name
        assert names(folder) == names(place), name
        assert second["remains"] == [], name


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(host):
    """A limit on the size of files stands for a full disk: each write fails where the first byte does not fit."""
    jobs = [
        {"name": f"full-{kind}-{size}", "commands": [{"argv": [kind, "."], "file_size": size}, {"argv": [kind, "."]}]}
        for kind in ("decoded", "packed")
        for size in (0, 700, 2500)  # of a set: 290 and 2,990 bytes, or 2,550
    ]
    answers = host(jobs)
    failed = [name for name, (_, (first, _)) in answers.items() if first["code"]]
    assert len(failed) >= 5
    for name, (_, (first, second)) in answers.items():
        assert second["code"] == 0, second["log"]
        if name in failed:
            assert first["code"] == 5, first["log"]
            assert ": must be writable, but got File too large" in first["log"], name
            assert "cache/" in first["log"], name
            assert first["remains"] == [], name
