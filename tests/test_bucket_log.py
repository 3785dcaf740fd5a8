"""A log in a bucket: whatever happens to a request, what was committed is there; packs make reading quick."""

import pytest
from bucket_server import CUT, DONE_503, LATE, LOST, bucket_server, refused
from short_log import ELSEWHERE, Clock, claimed, read, search, state

from carft_ray.errors import StorageError
from carft_ray.store import bucket
from carft_ray.store import log as module
from carft_ray.store.bucket import Bucket
from carft_ray.store.folder import Folder, RefusedError, UnknownError


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)
    with bucket_server(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The state of a search that nothing has happened to."""
    folder = Folder(tmp_path_factory.mktemp("whole"))
    search(claimed(folder)).release()
    return state(read(folder))


@pytest.mark.parametrize("fault", [LOST, LATE, CUT, DONE_503, refused(503, "SlowDown"), refused(409, "Conflict")])
def test_a_fault_at_any_write_of_the_log_loses_nothing(server, whole, fault):
    """The first three writes are those by which a store is tried out, and the claim."""
    for k in range(4, 100):
        store, puts = Bucket(server.address(str(k))), []

        def strike(method, path, puts=puts, k=k):
            if method == "PUT":
                puts.append(path)
            return fault if method == "PUT" and len(puts) == k else None

        server.strike = strike
        search(claimed(store)).release()
        assert state(read(store)) == whole
        if len(puts) < k:
            break
    assert k > 10


@pytest.mark.parametrize("code", [(403, "AccessDenied"), (400, "ExpiredToken"), (404, "NoSuchBucket")])
def test_a_refused_write_ends_with_one_message_and_the_next_search_goes_on(server, whole, code):
    store, puts = Bucket(server.address("study")), []

    def strike(method, path):
        puts.append(path) if method == "PUT" else None
        return refused(*code) if method == "PUT" and len(puts) > 6 else None

    server.strike = strike
    with pytest.raises(StorageError, match=code[1]) as caught:
        search(claimed(store))
    assert (caught.type, caught.value.exit_code) == (StorageError, 5)
    server.strike = lambda method, path: None
    search(claimed(store)).release()
    assert state(read(store)) == whole


def test_a_refusal_after_an_unclear_answer_leaves_it_unknown(server):
    """The first write was done and its answer lost: the keys have expired meanwhile."""
    log = claimed(Bucket(server.address("study")))
    faults = [LOST, *[refused(400, "ExpiredToken")] * 20]
    server.strike = lambda method, path: faults.pop(0) if faults else None
    with pytest.raises(UnknownError, match="ExpiredToken"), log.commit({"kind": "a"}):
        pass
    server.strike = lambda method, path: None
    assert read(Bucket(server.address("study"))).records[-1][1] == {"kind": "a"}


def test_a_bucket_that_does_not_answer_ends_a_search_after_a_bound(server):
    log = claimed(Bucket(server.address("study")), clock := Clock())
    server.strike = lambda method, path: CUT
    with (
        pytest.raises(UnknownError, match=r"did not say for 30 s whether it has log/00000002.*no answer"),
        log.commit({"kind": "a"}),
    ):
        pass
    assert 30 <= clock.now - 1000 < 31


def test_of_two_owners_the_first_finds_out_at_its_next_write(server):
    store = Bucket(server.address("study"))
    first = claimed(store, me=ELSEWHERE)
    second = claimed(Bucket(server.address("study")))
    with (
        pytest.raises(RefusedError, match=rf"{store}/log/00000002: was written by another search"),
        first.commit({"kind": "late"}),
    ):
        pass
    with second.commit({"kind": "mine"}):
        pass
    assert [record["kind"] for _, record in read(store).records] == ["owner", "owner", "mine"]


# packs


@pytest.fixture
def packed(server, monkeypatch):
    """A log of 33 commits, with packs of ten."""
    monkeypatch.setattr(module, "PACKED", 10)
    monkeypatch.setattr(module, "PACK_EVERY", 4)
    store = Bucket(server.address("study"))
    for number in range(3):
        log = claimed(store)
        for each in range(9):
            with log.commit({"kind": "a", "number": each + 10 * number}):
                pass
        log.release()
    server.requests.clear()
    return store


def numbers(store):
    return [record["number"] for _, record in read(store).records if record["kind"] == "a"]


WHOLE = [each + 10 * number for number in range(3) for each in range(9)]


def test_a_log_is_read_from_its_packs(packed, server):
    assert packed.list("log", after="log/1") == [f"log/pack-000000{first}1" for first in range(4)]
    server.requests.clear()
    assert numbers(packed) == WHOLE
    gets = [path.rpartition("/")[2] for method, path in server.requests if method == "GET"]
    assert len(gets) <= 4 * 2 + 2, "of a pack two, and the end"
    pack = packed.get("log/pack-00000011")
    assert pack == b"".join(packed.get(f"log/{number:08d}") for number in range(11, 21))


@pytest.mark.parametrize("harm", ["gone", "cut", "changed", "of another log", "empty", "longer"])
def test_a_pack_that_is_not_of_the_log_is_passed_over(packed, server, harm):
    pack = packed.get("log/pack-00000011")
    if harm == "of another log":
        other = claimed(Bucket(server.address("other")))
        for each in range(19):
            with other.commit({"kind": "a", "number": -each}):
                pass
        harmed = Bucket(server.address("other")).get("log/pack-00000011")
        assert harmed
    else:
        longer = pack + packed.get("log/00000021").replace(b'"a"', b'"b"')
        harmed = {"cut": pack[:-7], "changed": pack.replace(b'"a"', b'"b"'), "empty": b"", "longer": longer}.get(harm)
    packed.remove("log/pack-00000011")
    if harmed is not None:
        packed.put("log/pack-00000011", harmed)
    assert numbers(packed) == WHOLE


def test_the_next_owner_continues_the_last_pack(packed):
    log = claimed(packed)
    for _ in range(8):
        with log.commit({"kind": "b"}):
            pass
    log.release()
    assert packed.get("log/pack-00000031").count(b"\n") == 2 * 10
    assert packed.get("log/pack-00000041").count(b"\n") == 2 * (read(packed).number - 40)


def test_a_pack_that_cannot_be_written_harms_nothing(server, monkeypatch):
    monkeypatch.setattr(module, "PACK_EVERY", 1)
    server.strike = lambda method, path: refused(403, "AccessDenied") if "pack" in path else None
    store = Bucket(server.address("study"))
    search(claimed(store)).release()
    assert read(store).number > 5
    assert not [name for name in server.objects() if "pack" in name]
