"""The cache of images: what is held, what goes; many processes, kills at any durable operation, full disks.

It is a program of ``crash_host`` too: ``call([KIND, FOLDER])`` opens a ``decoded`` or ``packed`` set of pictures,
or ``limited``: halves of their size with room for one set; every decoding appends to FOLDER/log. ``["builders",
FOLDER, KIND]`` does so in eight processes that begin at once; with "no-locks" behind it, on a disk without locks.
"""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
from pathlib import Path

import crash_host
import numpy as np
import pyarrow as pa
import pytest
from cached_pictures import Pictures, decoded

from carft_ray.data import cache, cached_sets
from carft_ray.data.cached_sets import Keeping, PackedSource, image_set, pays
from carft_ray.errors import CarftError, DataError, StorageError


def halve(image):
    return image.resize((image.width // 2, image.height // 2))


def names(cache_dir):
    return sorted(path.name for path in cache_dir.iterdir() if path.suffix != ".lock")


def keys(cache_dir):
    return {entry.key for entry in cache.list_entries(cache_dir)}


def opened(kind, cache_dir, on_image=None, source=None):
    source = source or Pictures()
    if kind == "packed":
        return PackedSource(source, Keeping(cache_dir, on_image=on_image))
    return image_set(source, None, "as-is", Keeping(cache_dir, on_image=on_image))


def pixels_of(found, index):
    return found.pixels(index) if isinstance(found, PackedSource) else found.images_NHWC[index]


@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_a_set_holds_pixels_labels_and_ids_of_the_source_in_any_number_of_batches(tmp_path, kind, monkeypatch):
    source = Pictures()
    monkeypatch.setattr(cached_sets, "BATCH_BYTES", 2 * len(source.content(0)))
    found = opened(kind, tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    assert (pa.ipc.open_file(path.read_bytes()).num_record_batches > 3) is (kind == "packed")
    assert (found.name, len(found)) == ("train", 12)
    for index in (0, 3, 11):
        np.testing.assert_array_equal(pixels_of(found, index), source.pixels(index))
    np.testing.assert_array_equal(found.labels, source.labels)
    np.testing.assert_array_equal(found.sample_ids, source.sample_ids)
    assert (found.labels.dtype, found.sample_ids.dtype) == (np.int64, np.uint64)
    if kind == "packed":
        assert (found.class_names, found.identity) == (source.class_names, source.identity)
        assert found.content(3) == source.content(3)  # of the file as it is now
    (entry,) = cache.list_entries(tmp_path)
    assert (entry.kind, entry.image_size, entry.in_use) == (kind, "" if kind == "packed" else "8 x 8", True)


def test_a_set_is_mapped_into_memory_and_not_read(tmp_path):
    source, before = Pictures(num_images=10, side=256), pa.total_allocated_bytes()
    found = [image_set(source, None, "as-is", Keeping(tmp_path)).images_NHWC for _ in range(2)]
    assert pa.total_allocated_bytes() - before < 0.1 * found[0].nbytes
    np.testing.assert_array_equal(*found)
    assert not any(images.flags.owndata or images.flags.writeable for images in found)


@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_a_set_is_built_once_and_again_for_another_identity_or_transform_but_not_name(tmp_path, kind):
    seen, log = [], tmp_path / "log"
    for change in ({}, {}, {"name": "other"}, {"number": 1}):
        found = opened(kind, tmp_path / "cache", lambda *counts: seen.append(counts), Pictures(log, **change))
        assert found.name == change.get("name", "train")
    assert len(log.read_text().splitlines()) == 2 * 12
    assert seen == [(number, 12) for number in range(1, 13)] * 2
    if kind == "decoded":
        image_set(Pictures(), halve, "halve", Keeping(tmp_path / "cache"))
        assert len(keys(tmp_path / "cache")) == 3


@pytest.mark.parametrize("kind", ["decoded", "packed"])
@pytest.mark.parametrize("damage", [0, 10, 500, -1, "other images"])
def test_a_damaged_entry_or_one_of_other_images_is_built_again_with_a_warning(tmp_path, caplog, kind, damage):
    opened(kind, tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    if damage != "other images":
        path.write_bytes(path.read_bytes()[:damage])
    (tmp_path / f".{path.name}.17-host.tmp").touch()  # of a build that was killed
    source = Pictures(num_images=11 if damage == "other images" else 12)
    found = opened(kind, tmp_path, None, source)
    assert f"{path} of the cache is damaged and will be built again" in caplog.text
    np.testing.assert_array_equal(pixels_of(found, 4), source.pixels(4))
    assert pa.ipc.open_file(path.read_bytes()).num_record_batches == 1
    assert names(tmp_path) == [path.name]


def test_an_entry_that_is_cut_off_is_unknown_and_can_be_removed(tmp_path):
    decoded(tmp_path, 0)
    (entry,) = cache.list_entries(tmp_path)
    path = tmp_path / f"{entry.key}.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    (entry,) = cache.list_entries(tmp_path)
    assert (entry.kind, entry.num_images, entry.in_use) == ("unknown", 0, False)
    assert entry.num_bytes == path.stat().st_size
    assert cache.remove(tmp_path, entry.key)
    assert keys(tmp_path) == set()


@pytest.mark.parametrize("content", [b"", b"{", b"ARROW1 of somebody else"])
def test_a_file_that_is_none_of_ours_is_no_entry_and_stays(tmp_path, content):
    path = tmp_path / f"{'0' * 32}.arrow"
    path.write_bytes(content)
    decoded(tmp_path, 0, limit_gb=1e-9)
    assert path.stem not in keys(tmp_path)
    cache.remove(tmp_path, path.stem)
    assert path.read_bytes() == content


def test_only_folders_with_our_marker_are_removed_and_no_link_is_followed(tmp_path):
    ours, victim, key = tmp_path / "cache", tmp_path / "victim", "0" * 32
    (victim / key / "deep").mkdir(parents=True)
    (victim / key / "deep" / "thesis.tex").write_text("precious")
    (victim / "ab").mkdir()
    (victim / "ab" / f"{key}.arrow").write_bytes(b"precious")
    with cache.own_folder(ours, "targets", key):
        (ours / "targets" / key / "visit-0000").write_bytes(b"x")
    (ours / "targets" / "1").mkdir()
    (ours / "targets" / ("2" * 32)).mkdir()
    (ours / "targets" / ("2" * 32) / "mine").write_text("precious")
    (ours / "targets" / ("3" * 32)).symlink_to(victim / key)
    for name in ("unseen", "index", "test_reads"):
        (ours / name).symlink_to(victim)
    before = sorted(path for path in tmp_path.rglob("*") if "targets" not in path.parts[:-1] or path.is_dir())
    assert [entry.key for entry in cache.list_entries(ours)] == [f"targets/{key}"]
    assert cache.notes(ours) == {}
    assert cache.own_folders(ours, "unseen") == {}
    for name in ("1", "2" * 32, "3" * 32, "..", ""):
        assert not cache.remove(ours, f"targets/{name}")
    assert not cache.remove_folder(ours, "unseen", key)
    for kind, name in (("unseen", "4" * 32), ("targets", "2" * 32), ("targets", "3" * 32)):
        with (
            pytest.raises(OSError, match=r"symbolic|Not a directory|did not create"),
            cache.own_folder(ours, kind, name),
        ):
            pass
    with pytest.raises(OSError, match=r"symbolic|Not a directory"):
        cache.made_folder(ours, "test_reads")
    with pytest.raises(StorageError):
        cache.remove_note(ours, f"index/ab/{key}.arrow")
    assert sorted(path for path in tmp_path.rglob("*") if "targets" not in path.parts[:-1] or path.is_dir()) == before
    assert cache.remove(ours, f"targets/{key}")
    assert not (ours / "targets" / key).exists()
    assert (victim / key / "deep" / "thesis.tex").read_text() == "precious"


def test_an_entry_or_a_lock_that_is_a_link_leads_nowhere(tmp_path):
    decoded(tmp_path / "cache", 0)
    (path,) = (tmp_path / "cache").glob("*.arrow")
    path.rename(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    path.symlink_to(tmp_path / "victim")
    assert keys(tmp_path / "cache") == set()
    assert len(decoded(tmp_path / "cache", 0)) == 12
    assert not path.is_symlink()
    assert (tmp_path / "victim").read_bytes() == before
    for old in (path, path.with_suffix(".lock")):
        old.unlink()
    path.with_suffix(".lock").symlink_to(tmp_path / "new")
    with pytest.raises(StorageError, match="symbolic"):
        decoded(tmp_path / "cache", 0)
    assert not (tmp_path / "new").exists()


def no_flock(handle, operation):
    """Stands in for ``fcntl.flock`` on a network disk that has none."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_disk_without_locks_has_a_cache_that_warns_once_and_removes_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fcntl.flock", no_flock)
    monkeypatch.setattr(cache, "_warned", set())
    first, again, second = (decoded(tmp_path, number, limit_gb=1e-9) for number in (0, 0, 1))
    np.testing.assert_array_equal(first.images_NHWC, again.images_NHWC)
    assert len(second) == 12
    entries = cache.list_entries(tmp_path)
    assert [entry.in_use for entry in entries] == [True, True]
    assert cache.surplus(entries, 0) == []
    assert not cache.remove(tmp_path, entries[0].key)
    (warning,) = caplog.messages
    assert "this disk has no locks" in warning
    (tmp_path / f"{entries[0].key}.arrow").write_bytes(b"damaged")
    assert len(decoded(tmp_path, 0)) == len(decoded(tmp_path, 1)) == 12
    assert keys(tmp_path) == {entry.key for entry in entries}


def test_another_fault_of_a_lock_or_no_folder_is_a_storage_error(tmp_path, monkeypatch):
    def broken(handle, operation):
        raise OSError(errno.EIO, "broken")

    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="must be writable"):
        decoded(tmp_path / "file" / "cache", 0)
    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(StorageError):
        decoded(tmp_path, 0)


# ---- what goes


def test_a_set_larger_than_the_limit_is_kept_alone_with_a_warning_and_opening_one_removes_none(tmp_path, caplog):
    for number in range(3):
        decoded(tmp_path, number)
    decoded(tmp_path, 0, 1e-9)
    assert len(keys(tmp_path)) == 3
    assert len(decoded(tmp_path, 3, 1e-9)) == 12
    assert "e-06 GB, more than data.cache_gb: 1e-09, and all of it is" in caplog.text
    assert len(keys(tmp_path)) == 1


def test_an_entry_that_is_removed_while_another_waits_for_it_is_built_again(tmp_path, monkeypatch):
    decoded(tmp_path, 0)
    (key,) = keys(tmp_path)
    plain = cache.fcntl.flock

    def flock(handle, how):  # the entry goes between opening the file and holding it
        monkeypatch.setattr(cache.fcntl, "flock", plain)
        assert cache.remove(tmp_path, key)
        plain(handle, how)

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    assert len(decoded(tmp_path, 0)) == 12
    assert keys(tmp_path) == {key}


def test_what_killed_builds_have_left_goes_but_not_a_build_that_runs(tmp_path):
    decoded(tmp_path, 0)
    (key,) = keys(tmp_path)
    for name in (f".{key}.arrow.17-host.tmp", f".{key}.arrow.18-host.tmp", f".{'0' * 32}.arrow.9-host.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / "studies").mkdir()
    with cache.lock(tmp_path / f"{key}.lock"):
        assert cache.remove_dead(tmp_path) == 1
    assert cache.remove_dead(tmp_path) == 2
    assert (tmp_path / "studies").is_dir()
    assert keys(tmp_path) == {key}


@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_who_waits_for_a_build_is_told_of_no_image_and_may_give_up_or_gets_what_was_built(tmp_path, kind):
    seen, builder = [], contextlib.ExitStack()

    def on_image(done, total):
        seen.append((done, total))
        if len(seen) == 2:
            raise DataError("stopped")
        if len(seen) == 3:
            (tmp_path / "built").rename(path)
            builder.close()

    opened(kind, tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    path.rename(tmp_path / "built")
    with builder:
        builder.enter_context(cache.lock(path.with_suffix(".lock")))
        with pytest.raises(DataError, match="stopped"):
            opened(kind, tmp_path, on_image)
        assert names(tmp_path) == ["built"]
        assert len(opened(kind, tmp_path, on_image)) == 12
    assert seen == [(0, 12)] * 3


@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_a_build_that_is_stopped_or_meets_another_size_leaves_nothing(tmp_path, kind):
    class Mixed(Pictures):
        def pixels(self, index):
            return np.zeros((6, 9 if index == 3 else 8, 3), dtype=np.uint8)

    def on_image(done, total):
        if done == 5:
            raise DataError("stopped")

    with pytest.raises(DataError, match="stopped"):
        opened(kind, tmp_path, on_image)
    with pytest.raises(DataError, match="one size, but got 9 x 6 for image 3 and 8 x 6 for image 0"):
        opened("decoded", tmp_path, None, Mixed())
    assert names(tmp_path) == []


def test_a_folder_that_two_processes_make_or_that_is_removed_while_one_writes_stays_ours(tmp_path, monkeypatch):
    key, answers, is_marked, unlink = "0" * 32, [False], cache._is_marked, os.unlink
    visit = tmp_path / "targets" / key / "visit-0000"
    with cache.own_folder(tmp_path, "targets", key):
        visit.write_bytes(b"x")
    with monkeypatch.context() as patched:  # the marker and the file come between two looks
        patched.setattr(cache, "_is_marked", lambda folder: answers.pop() if answers else is_marked(folder))
        with cache.own_folder(tmp_path, "targets", key):
            assert not answers

    def unlink_and_write(name, **where):
        unlink(name, **where)
        if name == cache.MARKER:
            visit.write_bytes(b"of a training")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink_and_write)
        assert not cache.remove(tmp_path, f"targets/{key}")
    with cache.own_folder(tmp_path, "targets", key):
        assert visit.read_bytes() == b"of a training"
    assert cache.remove(tmp_path, f"targets/{key}")
    assert not visit.parent.exists()


def test_stored_targets_are_an_entry_that_goes_as_others_do(tmp_path):
    visit = tmp_path / "targets" / ("0123456789abcdef" * 2) / "visit-0000"
    with cache.own_folder(tmp_path, "targets", visit.parent.name):
        visit.write_bytes(b"x" * 9000)
    os.utime(visit, (1e9, 1e9))
    decoded(tmp_path, 1)
    _, targets = cache.list_entries(tmp_path)
    assert (targets.kind, targets.last_used, targets.in_use) == ("targets", 1e9, False)
    assert targets.num_bytes >= 9000
    decoded(tmp_path, 2, limit_gb=1e-5)
    assert not visit.parent.exists()
    assert len(keys(tmp_path)) == 2


# ---- packed sets


@pytest.mark.parametrize("short_side", [7, 8])
def test_a_packed_set_may_hold_larger_images_made_smaller_and_others_as_they_are(tmp_path, short_side):
    source = Pictures()
    found = PackedSource(source, Keeping(tmp_path), short_side)
    for index in range(len(source)):
        if short_side == 8:
            assert found.packed_bytes(index) == source.content(index)
        assert found.pixels(index).shape == (short_side, short_side, 3)
        assert abs(found.pixels(index).mean() - source.pixels(index).mean()) < 2  # it is the same picture
    PackedSource(source, Keeping(tmp_path))
    assert len(cache.list_entries(tmp_path)) == 2


def test_packing_pays_for_files_of_no_own_disk_with_a_cache_elsewhere(tmp_path, monkeypatch):
    assert not pays(str(tmp_path / "shards" / "{00..12}.tar"), False, tmp_path / "cache")  # all on one disk
    network, other, own, another = (0, 40), (0, 50), (8, 1), (8, 2)
    for home, cache_dir in ((network, own), (network, other), (network, network), (another, own), (own, network)):
        devices = {Path("/home"): os.makedev(*home), Path("/cache"): os.makedev(*cache_dir)}
        monkeypatch.setattr(cached_sets, "_device", devices.__getitem__)
        assert pays("/home", False, Path("/cache")) is (home == network and cache_dir != network)
        assert pays("/home", True, Path("/cache"))


# ---- many processes


NUM_PROCESSES = 8


def import_everything():
    import pandas  # noqa: F401  (pyarrow would load it in every fork)


def pixel_sum(kind, folder):
    """Returns the sum of all pixels of a set, from the cache."""
    source = Pictures(folder / "log")
    if kind == "limited":
        limited = Keeping(folder / "cache", limit_gb=3e-6)  # of 4,042 B
        return int(image_set(source, halve, "halved", limited).images_NHWC.sum())
    found = opened(kind, folder / "cache", None, source)
    return sum(int(pixels_of(found, index).sum()) for index in range(len(found)))


def call(argv):
    kind, folder = argv[0], Path(argv[1])
    if argv[-1] == "no-locks":
        fcntl.flock = no_flock
    try:
        if kind == "builders":
            print(json.dumps(sums_at_once(argv[2], folder)))
        else:
            print(pixel_sum(kind, folder))
    except CarftError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


def sums_at_once(kind, folder):
    """Returns the sums of eight forks that begin together."""
    forks = multiprocessing.get_context("fork")
    begin = forks.Barrier(NUM_PROCESSES)

    def work(answer):
        begin.wait(60)
        answer.send(pixel_sum(kind, folder))

    pipes = [forks.Pipe(duplex=False) for _ in range(NUM_PROCESSES)]
    for _, answer in pipes:
        forks.Process(target=work, args=(answer,)).start()
        answer.close()
    return [there.recv() for there, _ in pipes]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with crash_host.started(tmp_path_factory.mktemp("builds"), "test_cache") as run:
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["locks", "no-locks"])
@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_eight_processes_that_ask_at_once_build_a_set_once_or_without_locks_one_entry(host, kind, locks):
    job = {"name": f"{kind}-{locks}", "commands": [{"argv": ["builders", ".", kind, locks]}]}
    ((place, (answer,)),) = host([job]).values()
    assert answer["code"] == 0, answer["log"]
    sums = json.loads(answer["log"].splitlines()[-1])
    assert (len(sums), len(set(sums))) == (NUM_PROCESSES, 1)
    assert answer["remains"] == []
    assert len(names(place / "cache")) == 1
    if locks == "locks":
        lines = [line.split() for line in (place / "log").read_text().splitlines()]
        assert sorted(int(index) for _, index in lines) == list(range(len(Pictures())))
        assert len({process for process, _ in lines}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoded", "packed", "limited"])
def test_a_build_killed_after_any_durable_operation_leaves_nothing_half_written_and_the_next_one_works(host, kind):
    build = {"argv": [kind, "."]}
    first = [{"argv": ["decoded", "."]}] if kind == "limited" else []  # a set that has to be removed
    ((place, answers),) = host([{"name": kind, "commands": [*first, {**build, "count_to": "kinds"}]}]).values()
    assert {answer["code"] for answer in answers} == {0}
    assert len(names(place / "cache")) == 1  # with a limit the newest one only
    number = len(json.loads((place / "kinds").read_text()))
    assert number >= 3  # flush, rename, flush of the folder
    killed = [[*first, {**build, "kill": (n, "after")}, build] for n in range(1, number + 1)]
    jobs = host([{"name": f"{kind}-{n}", "commands": commands} for n, commands in enumerate(killed)])
    for name, (folder, (*_, stopped, second)) in jobs.items():
        assert stopped["code"] == -signal.SIGKILL, name
        assert (second["code"], second["log"]) == (0, answers[-1]["log"]), name
        assert names(folder / "cache") == names(place / "cache"), name
        assert second["remains"] == [], name


@pytest.mark.slow
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
