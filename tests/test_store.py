"""Stores in folders and buckets: objects that are there or not, names that lead nowhere else, and what servers do."""

import os
import sys

import pytest
from bucket_server import SECRET, bucket_server, refused
from short_log import claimed, read
from study_steps import contents

from carft_ray import files
from carft_ray.errors import StorageError, UsageError
from carft_ray.files import temporary_name
from carft_ray.store import bucket
from carft_ray.store.bucket import Bucket
from carft_ray.store.folder import Folder, RefusedError, UnknownError, probe


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(bucket, "MAX_RETRIES", 1)
    monkeypatch.setattr(bucket, "PIECE_BYTES", 5 * 2**20)
    with bucket_server(monkeypatch) as server:
        yield server


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    """An empty store of each kind."""
    if request.param == "folder":
        return Folder(tmp_path / "new" / "study")
    return Bucket(request.getfixturevalue("server").address("study"))


# what holds for both


def test_an_object_is_read_back_listed_and_removed(store):
    assert (store.get("a/b"), store.list("a")) == (None, [])
    store.put_new("a/b", b"1")
    with pytest.raises(RefusedError, match="already exists"):
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
    for name in ("a/c", "a/c", "a/d"):
        store.remove(name)
    assert store.list("a") == ["a/b"]


@pytest.mark.parametrize(
    "name", ["", "/a", "../a", "a/../../b", "a//b", "a/", ".", "a\0b", "a\\b", "a\nb", "\ud800", ".a.12-0f.tmp"]
)
def test_a_name_that_leads_out_or_is_temporary_is_refused(store, tmp_path, name):
    writes = (lambda name: store.put_new(name, b""), lambda name: store.put(name, b""))
    for call in (store.get, store.list, store.remove, *writes):
        with pytest.raises(StorageError, match="must be a name of an object"):
            call(name)
    assert not list(tmp_path.iterdir())


def test_a_store_that_writes_over_what_is_there_is_refused(store, monkeypatch):
    probe(store)
    monkeypatch.setattr(type(store), "put_new", type(store).put)
    with pytest.raises(StorageError, match="must refuse to overwrite an object"):
        claimed(store)
    assert store.list("log") == []


# folders


def test_a_folder_is_no_object_and_what_a_dead_writer_has_left_is_never_listed(tmp_path):
    store = Folder(tmp_path)
    store.put_new("log/00000001", b"1")
    temporary_name(tmp_path / "log" / "00000002").write_bytes(b"half")
    assert store.list("log") == ["log/00000001"]
    with pytest.raises(StorageError, match="must be a regular file, but got a folder"):
        store.get("log")


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


def test_a_folder_without_hard_links_is_refused(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")  # as of FAT

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="must be on a disk with hard links, but got Operation not permitted"):
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
    log.write({"kind": "a"})
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


# buckets


def once(fault, method="PUT"):
    """Strikes the first request of a method."""
    faults = [fault]
    return lambda asked, path: faults.pop() if asked == method and faults else None


def test_what_passes_is_tried_again_and_without_a_server_there_is_no_answer(monkeypatch):
    monkeypatch.setattr(bucket, "MAX_RETRIES", 1)
    with bucket_server(monkeypatch) as server:
        store = Bucket(server.address("study"))
        server.strike = once(refused(503, "SlowDown"))
        store.put("a", b"1")
        server.strike = once(refused(503, "SlowDown"), "GET")
        assert store.get("a") == b"1"
    with pytest.raises(StorageError, match="must be readable, but got no answer\n    Check that the endpoint"):
        store.get("a")
    with pytest.raises(UnknownError):
        store.put_new("a", b"1")


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (refused(403, "AccessDenied"), "Let the keys list, read, write and delete below this address"),
        (refused(400, "ExpiredToken"), "Set valid keys in the environment"),
        (refused(403, "InvalidAccessKeyId"), "Set valid keys in the environment"),
        (refused(403, "RequestTimeTooSkewed"), "Set the clock of this machine"),
        (refused(501, "NotImplemented"), "refuses to overwrite an object"),
        (refused(404, "NoSuchBucket"), "Create the bucket first, or correct the address"),
    ],
)
def test_a_refusal_names_address_code_and_next_step_and_no_key(server, tmp_path, fault, step):
    server.strike = lambda method, path: fault
    store = Bucket(server.address("study"))
    (tmp_path / "file").write_bytes(b"x")
    for call in (
        lambda: store.put_new("log/1", b"1"),
        lambda: store.put("log/1", b"1"),
        lambda: store.get("log/1"),
        lambda: store.list("log"),
        store.all,
        lambda: store.remove("log"),
        lambda: store.upload("file", tmp_path / "file"),
        lambda: store.download("file", tmp_path / "other"),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        text = str(caught.value)
        assert caught.type is StorageError
        for words in (server.address("study"), f"{fault[0]} {fault[1]}", step):
            assert words in text
        assert SECRET not in text
        assert "an-id-of-the-tests" not in text
        assert (caught.value.__cause__, caught.value.__suppress_context__) == (None, True)
    assert os.listdir(tmp_path) == ["file"]


def test_files_of_any_size_are_there_whole_or_not_at_all(server, tmp_path):
    store, path = Bucket(server.address("study")), tmp_path / "file"
    for size in (0, 5, 11 * 2**20):
        path.write_bytes(os.urandom(size))
        store.upload("a/file", path)
        assert store.download("a/file", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
        found, stat = store.all()["a/file"], (tmp_path / "back").stat()
        assert (found.num_bytes, found.stamp_ns) == (stat.st_size, stat.st_mtime_ns)
    assert not store.download("other", tmp_path / "none")
    server.strike = lambda method, path: refused(403, "AccessDenied") if method == "PUT" else None
    with pytest.raises(StorageError, match="403 AccessDenied"):
        store.upload("cut", path)
    assert "cut" not in {name.rpartition("/")[2] for name in server.objects()}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["back", "file"]


def test_an_object_that_changes_while_it_is_read_is_refused(server, tmp_path):
    server.put("study/file", bytes(11 * 2**20))
    seen = []

    def strike(method, path):
        seen.append(path)
        if len(seen) == 3:
            server.put("study/file", b"1" * 11 * 2**20)

    server.strike = strike
    with pytest.raises(StorageError, match="412 PreconditionFailed"):
        Bucket(server.address("study")).download("file", tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_an_object_is_put_over_the_version_that_is_known_only(server, monkeypatch):
    store = Bucket(server.address("study"))
    assert store.tag("a") is None
    first = store.put_over("a", b"1", None)
    assert store.tag("a") == first
    second = store.put_over("a", b"2", first)
    for old in (first, None):
        with pytest.raises(RefusedError):
            store.put_over("a", b"3", old)
    assert (store.get("a"), store.tag("a")) == (b"2", second)
    counted, modes = {"e_tag": "x", "version": "7"}, []  # what gs:// answers, which asks for the number
    monkeypatch.setattr(store._api, "head", lambda *given: {**counted, "size": 1})
    monkeypatch.setattr(store._api, "put", lambda *given, mode, **named: modes.append(mode) or counted)
    assert store.put_over("a", b"4", store.tag("a")) == counted
    assert modes == [counted]


def test_all_objects_are_listed_but_those_that_mark_folders(server):
    store = Bucket(server.address("study"))
    names = ["log/00000001", "manifest.json", "test/summary.json", "trials/a-b", "trials/a/result.json"]
    for name in names:
        store.put(name, name.encode())
    for name in ("study/", "study/trials/"):
        server.put(name, b"")
    server.put("other/file", b"")
    assert list(store.all()) == names
    assert list(store.all(without="log")) == names[1:]
    assert list(store.all("trials/a")) == ["trials/a/result.json"]
    assert len(Bucket(f"s3://{server.bucket}").all()) == 6


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s4://bucket/a", r"must be an address of a bucket; did you mean 's3://'\? \(allowed: s3://, gs://, az://\)"),
        ("s3://", "must be a bucket and perhaps a prefix"),
        ("s3://KEY:SECRET@bucket/a", "must be a bucket and perhaps a prefix"),
        ("s3://bucket/a/../b", "must be a name of an object"),
        ("bucket", "must be an address of a bucket"),
        ("s3:bucket/a", r"must be an address of a bucket: s3://bucket/prefix; did you mean 's3://bucket/a'\?"),
        ("s3:KEY:SECRET@bucket/a", "must be an address of a bucket"),
    ],
)
def test_an_address_that_is_none_is_refused(address, words):
    with pytest.raises((UsageError, StorageError), match=words) as caught:
        Bucket(address)
    assert "SECRET" not in str(caught.value)


def test_addresses_have_one_form_and_buckets_of_others_say_once_that_they_are_not_tested(server, caplog, monkeypatch):
    for text in ("s3://b-1/a/b", "s3://b-1/a/b/", "s3:/b-1/a/b"):
        assert str(Bucket(text)) == "s3://b-1/a/b"
    assert str(Bucket("s3://b-1")) == "s3://b-1"
    monkeypatch.setattr(bucket, "_warned", set())
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "name")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    for _ in range(2):
        Bucket("az://container/a")
    [record] = caplog.records
    assert record.getMessage() == "buckets of az:// were not tested with carft-ray; only those of s3:// were"


def test_without_obstore_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UsageError, match=r"pip install 'carft-ray\[bucket\]'"):
        Bucket("s3://bucket/a")
