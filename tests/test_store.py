"""A store in a folder: objects that are there or not, and names that lead nowhere else."""

import os
import threading

import pytest
from bucket_server import bucket_server
from short_log import claimed, contents, read

from carft_ray import files
from carft_ray.errors import StorageError
from carft_ray.files import temporary_name
from carft_ray.store.bucket import Bucket
from carft_ray.store.folder import Folder, RefusedError, UnknownError, probe


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path, monkeypatch):
    """An empty store of each kind."""
    if request.param == "folder":
        yield Folder(tmp_path / "new" / "study")
    else:
        with bucket_server(monkeypatch) as server:
            yield Bucket(server.address("study"))


def test_an_object_is_read_back_listed_and_removed(store):
    assert (store.get("a/b"), store.list("a")) == (None, [])
    store.put_new("a/b", b"1")
    with pytest.raises(RefusedError, match="is there already"):
        store.put_new("a/b", b"2")
    store.put_new("a/c", b"3")
    store.put_new("ab", b"4")
    assert [store.get(name) for name in ("a/b", "a/c", "ab")] == [b"1", b"3", b"4"]
    assert store.list("a") == ["a/b", "a/c"]
    assert store.list("a", after="a/b") == ["a/c"]
    assert store.list("ab") == store.list("nothing") == []
    store.put("a/b", b"5")
    store.put("a/d/e", b"6")
    assert (store.get("a/b"), store.list("a")) == (b"5", ["a/b", "a/c", "a/d"])
    store.remove("a/c")
    store.remove("a/c")
    store.remove("a/d")
    assert store.list("a") == ["a/b"]


def test_a_folder_is_no_object(tmp_path):
    store = Folder(tmp_path)
    store.put("a/b", b"1")
    with pytest.raises(StorageError, match="must be a regular file, but got a folder"):
        store.get("a")


@pytest.mark.parametrize(
    "name", ["", "/a", "../a", "a/../../b", "a//b", "a/", ".", "a\0b", "a\\b", "a\nb", "\ud800", ".a.12-0f.tmp"]
)
def test_a_name_that_leads_out_or_is_temporary_is_refused(store, tmp_path, name):
    writes = (lambda name: store.put_new(name, b""), lambda name: store.put(name, b""))
    for call in (store.get, store.list, store.remove, *writes):
        with pytest.raises(StorageError, match="must be a name of an object"):
            call(name)
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "log").symlink_to(tmp_path / "outside")
    (tmp_path / "alias").symlink_to(tmp_path / "study")
    store = Folder(tmp_path / "alias")  # the folder itself may be a link
    for call in (lambda: store.put_new("log/1", b""), lambda: store.get("log/1"), lambda: store.remove("log")):
        with pytest.raises(StorageError, match="must not lead out of"):
            call()
    store.put_new("other", b"x")
    assert not list((tmp_path / "outside").iterdir())


def test_of_sixteen_threads_one_creates_an_object(store):
    won, start = [], threading.Barrier(16)

    def create(number):
        start.wait()
        try:
            store.put_new("log/00000001", b"%d" % number * 1000)
            won.append(number)
        except RefusedError:
            pass

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("log/00000001") == b"%d" % won[0] * 1000
    assert store.list("log") == ["log/00000001"]


def test_what_a_dead_writer_has_left_is_never_listed(tmp_path):
    store = Folder(tmp_path)
    store.put_new("log/00000001", b"1")
    temporary_name(tmp_path / "log" / "00000002").write_bytes(b"half")
    assert store.list("log") == ["log/00000001"]


def test_a_store_that_writes_over_what_is_there_is_refused(tmp_path):
    store = Folder(tmp_path)
    probe(store)
    assert contents(tmp_path) == {}

    class Careless(Folder):
        def put_new(self, name, data):
            files.write_bytes(self.path / name, data)

    with pytest.raises(StorageError, match="must refuse to create an object that is there"):
        claimed(Careless(tmp_path))
    assert contents(tmp_path) == {}


def test_a_folder_without_hard_links_is_refused(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")  # as of FAT

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="must lie on a disk with hard links, but got Operation not permitted"):
        claimed(Folder(tmp_path))
    assert contents(tmp_path) == {}


def test_a_write_whose_temporary_file_was_taken_for_remains_is_unclear_and_tried_again(tmp_path, monkeypatch):
    store, link, taken = Folder(tmp_path), os.link, []

    def late(source, target):
        if not taken:
            taken.append(target)
            files.remove_remains(tmp_path)
        link(source, target)

    log = claimed(store)
    monkeypatch.setattr(os, "link", late)
    with log.commit({"kind": "a"}):
        pass
    assert (len(taken), read(store).number) == (1, 2)


def test_a_flush_that_fails_after_the_link_is_unclear_and_settled_by_another_try(tmp_path, monkeypatch):
    store, flush, failures = Folder(tmp_path), os.fsync, [5, 5]

    def fsync(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("/log") and failures:
            raise OSError(failures.pop(), "Input/output error")
        flush(handle)

    claimed(store).release()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnknownError):
        store.put_new("log/x", b"")
    log = claimed(store)
    assert (failures, log.number, read(store).number) == ([], 3, 3)
