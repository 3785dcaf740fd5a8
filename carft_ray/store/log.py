"""The log of a study: numbered objects that never change, each one commit, and the journal of Optuna over them.

    log/00000001    a commit (``store.commit``)

A commit exists or not: creating its number is the only write that counts, and a process that finds the number taken
has lost the study. There is no other lock. A name in a listing exists; a missing name proves nothing.

Where reading is slow, the owner also writes packs: the objects of up to 500 commits, one after the other. A pack is
believed when its last commit is that of the log, to which the chain of digests binds the others.

    log/pack-00000501   commits from 501 to at most 1000

A search opens Optuna's ``JournalStorage`` over the log, calls ``claim``, writes in ``commit`` and calls ``release``
at the end. A reader calls ``follow`` instead, now and then. One thread commits; ``beat`` may have its own.
"""

import contextlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from carft_ray.errors import Problem, StorageError
from carft_ray.layout import COMMITS
from carft_ray.store import heartbeat
from carft_ray.store.commit import Commit, Pending, as_json, commit_name, decoded, digest_in, sealed, uncollected
from carft_ray.store.folder import Folder, RefusedError, Store, UnknownError, probe
from carft_ray.store.heartbeat import identity, is_gone, is_seen, is_this_process, named

OWNER, RELEASED = "owner", "released"  # kinds of records: who writes from here on; that nobody does
UNCLEAR_FOR_S = 30.0  # what a store is given to say whether a commit is there
RETRY_EVERY_S = 0.2
PACKED, PACK_EVERY = 500, 50  # commits in a pack; after so many it is written again
_NOBODY: tuple[str, dict[str, Any]] = "", {}  # in place of the word in an owner's commits, and its ``identity``
_OWNERS: set[str] = set()  # words of the logs that this process holds; of the spoiled ones, it holds none


class Log(BaseJournalBackend):
    """The log of one study, for one ``JournalStorage``.

    After a commit that failed, or whose block raised, Optuna's memory may be ahead of the store: the object is spoiled
    and raises whatever is asked of it; a new one reads what is there.

    Args:
        store: Where it lies.
        clock: Seconds that never go back.
        sleep: Waits for seconds.

    Attributes:
        number: Of the last commit that was read or written; 0 in an empty log.
        digest: BLAKE2 of that commit: with its number it names a state of the study.
        time: When that commit was made, in seconds since 1970; 0 in an empty log.
        records: All of our own, each with the number of its commit.
        is_abandoned: Whether ``abandon`` was called.
        store: Where it lies.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.number, self.digest, self.time = 0, "", 0.0
        self.records: list[tuple[int, dict[str, Any]]] = []
        self.store, self._clock, self._sleep = store, clock, sleep
        self._nonce = secrets.token_hex(8)
        self._is_owner, self._is_read = False, False
        self._spoiled_by: BaseException | None = None
        self.is_abandoned = False
        self._holder = _NOBODY  # who has claimed the log and not released it
        self._claims: list[int] = []  # numbers of the commits by which processes have claimed the log
        # of each commit, and before the first: its time, and seconds up to it in which its process was not silent
        self._times: list[tuple[float, float]] = [(0.0, 0.0)]
        self._operations: list[dict[str, Any]] = []  # those that Optuna has not said to have applied
        self._num_dropped = 0  # the others
        self._unpacked: list[bytes] = []  # commits of the pack that is not full, where the store has packs
        self._pending, self._depth = Pending(), 0  # of the open commit: blocks in each other
        self._last_at = clock()  # when the last commit was written
        self._lock = threading.RLock()  # of all above but what a commit collects

    def __str__(self) -> str:
        return str(self.store)

    def claim(self, tell: Callable[[str], None] = lambda text: None, me: Mapping[str, Any] | None = None) -> None:
        """Makes this process the owner: reads all, and waits while the last owner may be alive.

        Args:
            tell: Told once what is waited for, and from whom the study was taken over.
            me: The ``identity`` of this process.

        Raises:
            StorageError: Another search goes on, or the log is damaged or cannot be read or written.
        """
        self._read_on()
        try:
            if not self.number:
                probe(self.store)
        except StorageError:  # another search may have begun, and removed what it took for remains
            if not self._read_on():
                raise
        record = as_json({"kind": OWNER, **(me or identity())})[0]
        since, has_grown, is_told = self._clock(), False, False
        while True:
            nonce, before = self._holder
            is_silent = not has_grown and self._clock() - since >= heartbeat.SILENT_FOR_S
            if _is_free(self._holder) or is_silent:
                with contextlib.suppress(RefusedError):  # another one was quicker
                    self._write(Pending(records=[record]))
                    self._is_owner = True
                    _OWNERS.add(self._nonce)
                    if nonce:
                        tell(f"took over from {named(before)}, which is gone")
                    return
                self._read_on()
                since, has_grown = self._clock(), False
            elif has_grown or is_seen(before):
                rule, step = "is in use: two searches on one study would damage it", "Wait until the other search ends"
                step += ", or end it with Ctrl-C; then run the command again."
                raise StorageError(Problem(str(self.store), rule, named(before), next_step=step))
            elif not is_told:
                tell(f"waiting {heartbeat.SILENT_FOR_S:.0f} s for a write of {named(before)}, which may be gone")
                is_told = True
            self._sleep(heartbeat.LOOK_EVERY_S)
            has_grown = self._read_on()

    def follow(self) -> bool:
        """Reads what was committed since; never writes.

        Returns:
            Whether there was anything. An owner never finds anything.

        Raises:
            StorageError: The log is damaged, or cannot be read.
        """
        self._require_sound()
        return not self._is_owner and self._read_on()

    def holder(self, also_silent: bool = False) -> str | None:
        """Returns which live process holds the log, in words, as far as the log was read; None when none does.

        Args:
            also_silent: One of another machine counts until it has released the log; else until its last commit is
                ``heartbeat.READERS_SILENT_FOR_S`` old, by the clock of the store.
        """
        if _is_free(self._holder):
            return None
        if not also_silent and not is_seen(self._holder[1]):
            written = self.store.written(commit_name(self.number))
            if written is not None and time.time() - written >= heartbeat.READERS_SILENT_FOR_S:
                return None
        return named(self._holder[1])

    @property
    def is_held_here(self) -> bool:
        """Whether a live process of this machine holds the log, as far as it was read."""
        return is_seen(self._holder[1]) and not _is_free(self._holder)

    @property
    def claimed(self) -> int:
        """The number of the newest commit by which a process has claimed the log, as far as it was read; else 0."""
        return self._claims[-1] if self._claims else 0

    @property
    def holds_only_claims(self) -> bool:
        """Whether nothing was committed, as far as the log was read, but who claimed and released it."""
        only_claims = all(record.get("kind") in (OWNER, RELEASED) for _, record in self.records)
        return only_claims and not self._num_dropped and not self._operations

    def digest_of(self, number: int) -> str:
        """Returns the BLAKE2 of a commit; empty when there is none."""
        return digest_in(self.store.get(commit_name(number)) or b"")

    def time_of(self, number: int) -> float:
        """Returns when a commit was made, in seconds since 1970; else 0."""
        return self._times[number][0] if number <= self.number else 0.0

    def lasted(self, number: int) -> float:
        """Returns for how many seconds the process that has made a commit went on to make others.

        From one to the next, 0 to ``heartbeat.SILENT_FOR_S`` count: a clock may jump, a machine may sleep.
        """
        last = next((claim - 1 for claim in self._claims if claim > number), self.number)
        return self._times[last][1] - self._times[min(number, last)][1]

    def check(self, is_sure: bool = False) -> None:
        """Raises a ``RefusedError`` when another search has taken the study over; writes nothing.

        Args:
            is_sure: A store that does not answer raises, too.

        Raises:
            StorageError: The log was spoiled before, or is not claimed.
        """
        with self._spoiling((RefusedError,)), self._lock:
            name = commit_name(self.number + 1)
            if (self.store.get(name) if is_sure else self._found(name)) is not None:
                raise self._refused()

    @property
    def is_lost(self) -> bool:
        """Whether another search has taken the study over."""
        with contextlib.suppress(StorageError):
            self.check()
        return isinstance(self._spoiled_by, RefusedError)

    @property
    def is_unknown(self) -> bool:
        """Whether it is not known if the last commit is there: what follows from it must not be written."""
        return isinstance(self._spoiled_by, UnknownError)

    def abandon(self) -> None:
        """Ends the ownership of a log that this process is about to remove."""
        _OWNERS.discard(self._nonce)
        self._spoiled_by, self.is_abandoned = StorageError("its folder was removed"), True

    @contextlib.contextmanager
    def commit(self, *records: Mapping[str, Any]) -> Iterator[None]:
        """Writes what Optuna appends in the block, and our own records, as one commit when the block ends.

        A block within another one is part of its commit. When there is nothing to write, nothing is.

        Args:
            records: Of our own.

        Raises:
            RefusedError: Another search has taken the study over.
            UnknownError: Whether the commit is there could not be found out: the process should end.
            StorageError: The log could not be written, was spoiled before, or is not claimed.
        """
        with self._spoiling():
            self._depth += 1
            self._pending.records += [as_json(each)[0] for each in records]
            yield
            self._depth -= 1
            if not self._depth and self._pending != Pending():
                pending, self._pending = self._pending, Pending()
                self._write(pending)

    def write(self, *records: Mapping[str, Any]) -> None:
        """Writes records of our own as one commit; within a block of ``commit``, as a part of its commit.

        Raises:
            StorageError: As ``commit``.
        """
        with self.commit(*records):
            pass

    def beat(self) -> None:
        """Makes an empty commit if the last one is long ago: a heartbeat. To be called every few seconds.

        One that was plainly not made spoils nothing: the next one is tried as soon.

        Raises:
            StorageError: As ``commit``.
        """
        if self._clock() - self._last_at >= heartbeat.BEAT_AFTER_S:
            with self._spoiling((RefusedError, UnknownError)):
                self._write(Pending())

    def release(self) -> None:
        """Ends the ownership: another search may begin at once.

        Raises:
            StorageError: As ``commit``.
        """
        self.write({"kind": RELEASED})
        self._pack()
        self._is_owner = False
        _OWNERS.discard(self._nonce)

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Gives Optuna the operations from a number on; it has applied those before, which are forgotten."""
        self._require_sound()
        with self._lock:
            num_applied = log_number_from - self._num_dropped
            if num_applied < 0:
                rule = "can be opened by one storage of Optuna; open the log again"
                raise StorageError(Problem(str(self.store), rule))
            del self._operations[:num_applied]
            self._num_dropped = log_number_from
            return list(self._operations)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Takes operations of Optuna for the open commit; outside of one, they are a commit of their own.

        Raises:
            TypeError: JSON cannot hold them; nothing has changed.
            ValueError: As above.
            StorageError: As ``commit``.
        """
        taken = [as_json(each) for each in logs]
        with self.commit(), self._lock:
            self._pending.operations += [text for text, _ in taken]
            self._operations += [operation for _, operation in taken]

    def _require_sound(self) -> None:
        if isinstance(self._spoiled_by, RefusedError):
            raise self._refused()
        if self._spoiled_by is not None:
            step = "Run the same command again: it continues from the last commit."
            rule = "cannot be used any more by this process, since a commit failed"
            cause = f"{type(self._spoiled_by).__name__}: {self._spoiled_by}".partition("\n")[0]
            raise StorageError(Problem(str(self.store), rule, cause, next_step=step))

    @contextlib.contextmanager
    def _spoiling(self, errors: tuple[type[BaseException], ...] = (BaseException,)) -> Iterator[None]:
        self._require_sound()
        if not self._is_owner:
            raise StorageError(Problem(str(self.store), "is open for reading only"))
        try:
            yield
        except errors as error:
            _OWNERS.discard(self._nonce)
            self._spoiled_by = self._spoiled_by or error
            raise

    def _write(self, pending: Pending) -> None:
        with self._lock:
            self._require_sound()
            name, head = commit_name(self.number + 1), {"number": self.number + 1, "previous": self.digest}
            lists = f'"records":[{",".join(pending.records)}],"operations":[{",".join(pending.operations)}]'
            head |= {"time": round(time.time(), 3), "owner": self._nonce}
            data = sealed(f"{as_json(head)[0][:-1]},{lists}}}".encode())
            commit = decoded(data, self.number + 1, self.digest, f"{self.store}/{name}")  # none that cannot be read
            self._create(name, data)
            self._take(commit, data)
            if self.number % PACKED == 0 or len(self._unpacked) % PACK_EVERY == 0:
                self._pack()
            self._last_at = self._clock()

    def _pack(self) -> None:
        """Writes the pack that the last commit belongs to; without it, reading takes longer."""
        if self._unpacked:
            with contextlib.suppress(StorageError):
                self.store.put(pack_name(self.number), b"".join(self._unpacked))

    def _create(self, name: str, data: bytes) -> None:
        """Creates an object and finds out whether it was done: an answer may be lost, or be about an earlier try."""
        end, is_first = self._clock() + UNCLEAR_FOR_S, True
        while True:
            try:
                return self.store.put_new(name, data)
            except StorageError as error:
                if not isinstance(error, RefusedError | UnknownError):  # refused; but what of the tries before?
                    raise error if is_first else UnknownError(error.problems) from error
                is_first, found = False, self._found(name)
                if found == data and isinstance(error, RefusedError):
                    return None
                if found not in (None, data):
                    raise self._refused() from error
                if self._clock() >= end:
                    rule = f"did not say for {UNCLEAR_FOR_S:.0f} s whether it has {name}"
                    step = "Run the same command again: it checks this."
                    raise UnknownError(Problem(str(self.store), rule, str(error), next_step=step)) from error
            self._sleep(RETRY_EVERY_S)

    def _refused(self) -> RefusedError:
        rule = "was written by another search, which has taken the study over"
        step = "The other search continues from all commits; this one has ended."
        return RefusedError(Problem(f"{self.store}/{commit_name(self.number + 1)}", rule, next_step=step))

    def _found(self, name: str) -> bytes | None:
        with contextlib.suppress(StorageError):
            return self.store.look(name)
        return None

    def _read_on(self) -> bool:
        """Reads commits to the end of the log; tells whether there were any."""
        with self._lock, uncollected():
            before = self.number
            while True:
                if found := self._next():
                    for commit, data in found:
                        self._take(commit, data)
                        self._operations += commit["operations"]
                elif self._is_read or not self._has_later():
                    break
            self._is_read = True
            return self.number > before

    def _next(self) -> list[tuple[Commit, bytes]]:
        """Returns the commits of the next pack; without one that is whole, the next commit, or nothing."""
        name = commit_name(self.number + 1)
        if (one := self.store.get(name)) is None:  # first of all: a server that does not answer is waited for once
            return []
        if self.store.has_packs and not self._is_read and self.number % PACKED == 0:
            pack, found = pack_name(self.number + 1), list[tuple[Commit, bytes]]()
            with contextlib.suppress(StorageError):
                lines = (self.store.get(pack) or b"").split(b"\n")
                before = self.digest
                for number, (head, body) in enumerate(zip(lines[:-1:2], lines[1::2], strict=False), self.number + 1):
                    data = b"%s\n%s\n" % (head, body)
                    found.append((decoded(data, number, before, f"{self.store}/{pack}"), data))
                    before = digest_in(data)
                if found and self.store.get(commit_name(self.number + len(found))) == found[-1][1]:
                    return found
        return [(decoded(one, self.number + 1, self.digest, f"{self.store}/{name}"), one)]

    def _has_later(self) -> bool:
        """Tells whether a listing shows commits after one that was not there; then it must be there by now."""
        name = commit_name(self.number + 1)
        later = [each for each in self.store.list(COMMITS, after=name) if re.fullmatch(rf"{COMMITS}/\d{{8}}", each)]
        if later and self.store.get(name) is None:
            rule, step = "must exist, as later ones do", f"Restore {COMMITS}/ from a copy of the study."
            raise StorageError(Problem(f"{self.store}/{name}", rule, "none", next_step=step))
        return bool(later)

    def _take(self, commit: Commit, data: bytes) -> None:
        self.number, self.digest, self.time = commit["number"], digest_in(data), commit["time"]
        before, lasted = self._times[-1]
        self._times.append((self.time, lasted + min(max(self.time - before, 0.0), heartbeat.SILENT_FOR_S)))
        if self.store.has_packs:
            if self.number % PACKED == 1:
                self._unpacked = []
            self._unpacked.append(data)
        for record in commit["records"]:
            self.records.append((self.number, record))
            if record.get("kind") == OWNER:
                self._claims.append(self.number)
            if record.get("kind") in (OWNER, RELEASED):
                self._holder = (commit["owner"], record) if record["kind"] == OWNER else _NOBODY
        self.store.took(commit_name(self.number), data)


def _is_free(holder: tuple[str, dict[str, Any]]) -> bool:
    """Tells whether a log can be claimed at once: nobody holds it, or a process that has ended or failed at it."""
    nonce, process = holder
    return not nonce or is_gone(process) or (is_this_process(process) and nonce not in _OWNERS)


def pack_name(number: int) -> str:
    """Returns the name of the pack that a commit belongs to."""
    return f"{COMMITS}/pack-{(number - 1) // PACKED * PACKED + 1:08d}"


def log_of(folder: Path) -> Log:
    """Returns the log of a study, read to its end; one with nothing in it where there is none.

    Raises:
        StorageError: It is damaged, or cannot be read.
    """
    log = Log(Folder(folder))
    log.follow()
    return log
