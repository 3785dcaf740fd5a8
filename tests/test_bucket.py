"""A store in a bucket: what a server may do to it, and what is said then. The contract of all stores: test_store."""

import os

import pytest
from bucket_server import CUT, DONE_503, LATE, LOST, SECRET, bucket_server, refused

from carft_ray.errors import StorageError, UsageError
from carft_ray.store import bucket
from carft_ray.store.bucket import Bucket
from carft_ray.store.folder import UnknownError, probe


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(bucket, "MAX_RETRIES", 1)
    with bucket_server(monkeypatch) as server:
        yield server


def once(fault, method="PUT"):
    """Strikes the first request of a method."""
    faults = [fault]
    return lambda asked, path: faults.pop() if asked == method and faults else None


@pytest.mark.parametrize("fault", [LOST, LATE, CUT, DONE_503, refused(503, "SlowDown"), refused(500, "InternalError")])
def test_after_an_unclear_answer_it_is_not_known_whether_an_object_is_there(server, fault):
    server.strike = once(fault)
    with pytest.raises(UnknownError, match="log/00000001: must be writable"):
        Bucket(server.address("study")).put_new("log/00000001", b"1")
    assert [method for method, _ in server.requests] == ["PUT"], "no retry of its own"


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (refused(403, "AccessDenied"), "Let the keys list, read, write and delete below this address"),
        (refused(400, "ExpiredToken"), "Give keys that hold in the environment"),
        (refused(403, "InvalidAccessKeyId"), "Give keys that hold in the environment"),
        (refused(403, "RequestTimeTooSkewed"), "Set the clock of this machine"),
        (refused(501, "NotImplemented"), "refuses to create what is there"),
        (refused(404, "NoSuchBucket"), "Make the bucket first, or mend the address"),
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
        lambda: store.all(),
        lambda: store.remove("log"),
        lambda: store.upload("file", tmp_path / "file"),
        lambda: store.download("file", tmp_path / "other"),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        text = str(caught.value)
        assert caught.type is StorageError
        assert server.address("study") in text
        assert f"{fault[0]} {fault[1]}" in text
        assert step in text
        assert SECRET not in text
        assert "an-id-of-the-tests" not in text
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    assert os.listdir(tmp_path) == ["file"]


def test_what_passes_is_tried_again(server):
    store = Bucket(server.address("study"))
    server.strike = once(refused(503, "SlowDown"))
    store.put("a", b"1")
    server.strike = once(refused(503, "SlowDown"), "GET")
    assert store.get("a") == b"1"


def test_without_a_server_the_message_says_that_there_is_no_answer(monkeypatch):
    monkeypatch.setattr(bucket, "MAX_RETRIES", 1)
    with bucket_server(monkeypatch) as server:
        store = Bucket(server.address("study"))
    with pytest.raises(StorageError, match="must be readable, but got no answer\n    See whether the endpoint"):
        store.get("a")
    with pytest.raises(UnknownError):
        store.put_new("a", b"1")


def test_files_of_any_size_are_there_whole_or_not_at_all(server, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "PIECE_BYTES", 5 * 2**20)
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


def test_an_object_that_changes_while_it_is_read_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "PIECE_BYTES", 5 * 2**20)
    store = Bucket(server.address("study"))
    server.put("study/file", bytes(11 * 2**20))
    seen = []

    def strike(method, path):
        seen.append(path)
        if len(seen) == 3:
            server.put("study/file", b"1" * 11 * 2**20)

    server.strike = strike
    with pytest.raises(StorageError, match="412 PreconditionFailed"):
        store.download("file", tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_all_objects_are_listed_but_those_that_mark_folders(server):
    store = Bucket(server.address("study"))
    for name in ("manifest.json", "log/00000001", "trials/a/result.json", "trials/a-b", "test/summary.json"):
        store.put(name, name.encode())
    server.put("study/trials/", b"")
    server.put("other/file", b"")
    assert list(store.all()) == [
        "log/00000001",
        "manifest.json",
        "test/summary.json",
        "trials/a-b",
        "trials/a/result.json",
    ]
    assert list(store.all(without="log")) == list(store.all())[1:]
    assert list(store.all("trials/a")) == ["trials/a/result.json"]
    assert len(Bucket(f"s3://{server.bucket}").all()) == 6


@pytest.mark.parametrize("name", ["study/../up", "study/a\nb", "study/.x.12-ab.tmp", "study/a//b", "study/a/./b"])
def test_a_bucket_with_a_name_that_leads_out_is_refused(server, name):
    server.put(name, b"x")
    with pytest.raises(StorageError):
        Bucket(server.address("study")).all()


def test_a_server_that_writes_over_what_is_there_is_refused(server, monkeypatch):
    store = Bucket(server.address("study"))
    probe(store)
    assert server.objects() == {}
    monkeypatch.setattr(Bucket, "put_new", Bucket.put)
    with pytest.raises(StorageError, match="must refuse to create an object that is there"):
        probe(store)
    assert server.objects() == {}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s4://bucket/a", r"must be an address of a bucket; did you mean 's3://'\? \(allowed: s3://, gs://, az://\)"),
        ("s3://", "must be a bucket and perhaps a prefix"),
        ("s3://KEY:SECRET@bucket/a", "must be a bucket and perhaps a prefix"),
        ("s3://bucket/a/../b", "must be a name of an object"),
        ("bucket", "must be an address of a bucket"),
    ],
)
def test_an_address_that_is_none_is_refused(address, words):
    with pytest.raises((UsageError, StorageError), match=words) as caught:
        Bucket(address)
    assert "SECRET" not in str(caught.value)


def test_addresses_have_one_form(server):
    for text in ("s3://b-1/a/b", "s3://b-1/a/b/", "s3:/b-1/a/b"):
        assert str(Bucket(text)) == "s3://b-1/a/b"
    assert str(Bucket("s3://b-1")) == "s3://b-1"


def test_buckets_of_others_say_once_that_they_are_not_tested(caplog, monkeypatch):
    monkeypatch.setattr(bucket, "_warned", set())
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "name")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    for _ in range(2):
        Bucket("az://container/a")
    assert [record.getMessage() for record in caplog.records] == [
        "buckets of az:// were not tested with carft-ray; only those of s3:// were"
    ]


def test_without_obstore_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(UsageError, match=r"pip install 'carft-ray\[bucket\]'"):
        Bucket("s3://bucket/a")
