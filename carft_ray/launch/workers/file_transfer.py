"""Files of a study on nodes that do not see its folder: through Ray, from and to the driver's machine, in pieces.

driver's machine    ``FileServer``: an actor that reads and writes below the folder what belongs to trainings; of a
                    study in a bucket it also reads what nodes have put there
node                ``StudyFiles``: gets files into a folder there, and sends others
node with a bucket  ``BucketFiles``: the same, for one attempt, without the driver's machine
"""

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from carft_ray import files
from carft_ray.errors import CarftError, MachineError, Problem, StorageError
from carft_ray.launch.workers.mailbox import NamedActor, started_here
from carft_ray.layout import FOLDERS, KEPT_CHECKPOINTS, PREPARED, STATE
from carft_ray.store.attempt_files import checkpoint_of, checkpoints
from carft_ray.store.bucket import Bucket
from carft_ray.store.commit import commit_name, digest_in
from carft_ray.store.copy import seen
from carft_ray.store.folder import Folder, RefusedError, check_name
from carft_ray.untrusted import is_name, open_regular, visible

PIECE_BYTES = 16 * 2**20
IN_FLIGHT = 2  # pieces of one file
THREADS = 8  # of the actor: it waits for the disk, and for Ray
CALL_TIMEOUT_S = 60.0  # for a piece
PATIENCE_S = 60.0  # with an actor that does not answer
RETRY_EVERY_S = 0.5


class Entry(NamedTuple):
    """A file below a study's folder: its name there, bytes, and when it was changed (ns since 1970)."""

    name: str
    size: int
    time_ns: int


def entries(folder: Path, prefix: str) -> list[Entry]:
    """Returns the files of this name or below it, in order, without those that are half written."""
    found, place = list[Entry](), folder / prefix
    for path in [place] if place.is_file() else files.whole_files(place):
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            found.append(Entry(path.relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns))
    return sorted(found)


def reaches(address: str, commit: tuple[int, str]) -> bool:
    """Tells whether this process reads a commit in a bucket and may write there; leaves nothing there.

    Args:
        address: Of the study.
        commit: Its number and digest.
    """
    number, digest = commit
    try:
        bucket = Bucket(address)
        data = bucket.look(commit_name(number))
        if data is not None and digest_in(data) == digest:
            bucket.put_new(commit_name(number), data)  # as it exists: whoever may not write there gets another answer
    except RefusedError:
        return True
    except CarftError:  # no keys, no network, no obstore: the files go through Ray
        pass
    return False


class FileServer:
    """Reads and writes for nodes. Each call may be repeated, and be answered by an actor that was started again.

    All methods raise a ``StorageError`` for what is no file of trainings, or when the disk fails.

    Args:
        folder: The study directory.
        address: Of a study in a bucket that this process reaches; empty: nodes put nothing there.
    """

    def __init__(self, folder: Path, address: str = "") -> None:
        self._folder, self._bucket = Folder(folder), Bucket(address) if address else None

    def reaches(self, address: str, commit: tuple[int, str]) -> bool:
        """As ``reaches``."""
        return reaches(address, commit)

    def entries(self, prefix: str) -> list[Entry]:
        """As ``entries``; of trainings also what only the bucket has, without checkpoints that are not whole there."""
        self._path(prefix)
        found = {each.name: each for each in entries(self._folder.path, prefix)}
        there = {}
        if self._bucket is not None and prefix.partition("/")[0] in FOLDERS.values():
            there = self._bucket.all(prefix)
        for name, each in there.items():
            if checkpoint_of(name) is None or f"{os.path.dirname(name)}/{STATE}" in there:
                found.setdefault(name, Entry(name, each.num_bytes, each.stamp_ns))
        return sorted(found.values())

    def read(self, name: str, offset: int) -> bytes | None:
        """Returns a piece of a file, of the folder or else of the bucket; None where there is no such file."""
        path = self._path(name)
        try:
            with open_regular(path, StorageError) as file:
                return os.pread(file.fileno(), PIECE_BYTES, offset)
        except FileNotFoundError:
            return None if self._bucket is None else self._bucket.piece(name, offset, PIECE_BYTES)
        except OSError as error:
            raise files.storage_error(path, error, "must be readable") from error

    def write(self, name: str, upload: str, inside: str, offset: int, data: bytes) -> None:
        """Writes a piece of what will have a name: a file, or one ``inside`` a folder."""
        path = _inside(self._temporary(name, upload), inside)
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(handle, data, offset)
            finally:
                os.close(handle)

    def finish(self, name: str, upload: str, times_ns: Mapping[str, int]) -> None:
        """Gives what was written its name, for good; a folder keeps what has its name already.

        Args:
            name: Of it.
            upload: As in ``write``.
            times_ns: When each file was changed, by its name inside.
        """
        path, temporary = self._path(name), self._temporary(name, upload)
        with files.writing(path):
            if not temporary.exists():
                return  # the answer of the first call was lost
            for inside, time_ns in times_ns.items():
                written = _inside(temporary, inside)
                os.utime(written, ns=(time_ns, time_ns))
                files.fsync_file(written)
            if temporary.is_dir():
                files.fsync_file(temporary)
                if path.exists():
                    shutil.rmtree(temporary)
                    return
            os.replace(temporary, path)
            files.fsync_file(path.parent)

    def remove(self, name: str, upload: str = "") -> None:
        """Removes a file that its node has removed, or what was written of an upload."""
        files.remove(self._temporary(name, upload) if upload else self._path(name))

    def keep_newest(self, training: str) -> None:
        """Removes all checkpoints of a training but the newest, as the one who writes them does."""
        for _, old in checkpoints(self._path(training))[KEPT_CHECKPOINTS:]:
            shutil.rmtree(old, ignore_errors=True)

    def _path(self, name: str) -> Path:
        if name.partition("/")[0] not in (*FOLDERS.values(), PREPARED):
            raise StorageError(Problem(name, "must be a file of trainings"))
        return self._folder.path_of(name)

    def _temporary(self, name: str, upload: str) -> Path:
        path = self._path(name)
        if not is_name(upload):
            raise StorageError(Problem(visible(upload), "must be the name of an upload"))
        return path.with_name(f".{path.name}.{upload}.tmp")


def _inside(path: Path, inside: str) -> Path:
    """Returns where a file of an upload is written: in its folder, or the upload itself (``.``)."""
    return path if inside == "." else path / check_name(inside)


class _GoneError(Exception):
    """A file is not there any more."""


class StudyFiles(NamedActor):
    """The actor, for the nodes. All methods raise what its own raise, and a ``MachineError`` when it does not answer.

    Attributes:
        counts: Bytes that this process has got, and has sent.
        way: How they come and go, for the log.
    """

    counts: tuple[int, int] = (0, 0)
    way = "through Ray"

    def reaches(self, address: str, commit: tuple[int, str]) -> bool:
        """As ``FileServer.reaches``."""
        return bool(self._call("reaches", address, commit))

    def entries(self, prefix: str) -> list[Entry]:
        """As ``FileServer.entries``."""
        found: list[Entry] = self._call("entries", prefix)
        return found

    def get(self, wanted: Iterable[Entry], folder: Path) -> None:
        """Gets files into a folder, those that are not there yet; what has vanished is passed over."""
        for each in wanted:
            path = folder / each.name
            if seen(path) != each[1:]:
                with contextlib.suppress(_GoneError):
                    self._download(each, path)

    def send(self, folder: Path, name: str) -> None:
        """Sends a file, or a folder whose files nobody changes any more; it is whole there, or not there.

        Raises:
            FileNotFoundError: It has vanished here meanwhile.
        """
        upload = files.temporary_name(folder).name.split(".")[-2]  # of this process and call alone
        sources = {os.path.relpath(each.name, name): each for each in entries(folder, name)}
        try:
            for inside, each in sources.items():
                with open(folder / each.name, "rb") as file:
                    pieces = (
                        ("write", name, upload, inside, offset, os.pread(file.fileno(), PIECE_BYTES, offset))
                        for offset in range(0, each.size or 1, PIECE_BYTES)
                    )
                    deque(self._in_flight(pieces), maxlen=0)
                self.counts = self.counts[0], self.counts[1] + each.size
        except FileNotFoundError:
            self._call("remove", name, upload)
            raise
        self._call("finish", name, upload, {inside: each.time_ns for inside, each in sources.items()})

    def remove(self, name: str) -> None:
        """As ``FileServer.remove``."""
        self._call("remove", name)

    def keep_newest(self, training: str) -> None:
        """As ``FileServer.keep_newest``."""
        self._call("keep_newest", training)

    def _download(self, each: Entry, path: Path) -> None:
        with files.new_file(path) as temporary, open(temporary, "wb") as file:
            for data in self._in_flight(("read", each.name, at) for at in range(0, each.size, PIECE_BYTES)):
                if data is None:
                    raise _GoneError
                file.write(data)
                self.counts = self.counts[0] + len(data), self.counts[1]
            file.flush()
            os.fsync(file.fileno())
            os.utime(temporary, ns=(each.time_ns, each.time_ns))

    def _in_flight(self, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Gives the results of calls in their order; begins the next ones meanwhile."""
        waiting: deque[tuple[Any, tuple[Any, ...]]] = deque()
        for call in calls:
            waiting.append((self._begun(call), call))
            if len(waiting) >= IN_FLIGHT:
                yield self._answer(*waiting.popleft())
        while waiting:
            yield self._answer(*waiting.popleft())

    def _call(self, *call: Any) -> Any:
        return self._answer(self._begun(call), call)

    def _begun(self, call: tuple[Any, ...]) -> Any:
        with contextlib.suppress(ConnectionError):
            return self.begin(*call)
        return None

    def _answer(self, begun: Any, call: tuple[Any, ...]) -> Any:
        """Returns what a call returns, which is made again when there is no answer."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.result(begun or self.begin(*call), CALL_TIMEOUT_S)
            except ConnectionError as error:
                if time.monotonic() >= end:
                    raise MachineError(f"the driver's machine does not answer: {error}") from error
            begun = None
            time.sleep(RETRY_EVERY_S)


class BucketFiles:
    """As ``StudyFiles``, for one attempt, on a node that reaches the bucket of the study: it reads and writes there.

    What the bucket lacks comes through Ray. If the bucket fails, the rest of the attempt goes through Ray. The node
    removes nothing in the bucket; the driver does, which is told what has been sent and what is gone.

    Args:
        address: Of the study.
        rest: The files through Ray.
        place: Folder of the attempt within the study. All that is sent lies below it.
        record: Tells the driver (``Poster.record``): ``sent`` and ``gone``, each with names, and texts for the ``log``.

    Attributes:
        counts: Bytes that have come from the bucket, and have gone there.
        way: As of ``StudyFiles``.
    """

    way = "from the bucket"

    def __init__(self, address: str, rest: StudyFiles, place: str, record: Callable[[Any, Any], None]) -> None:
        self._bucket, self._rest, self._place, self._record = Bucket(address), rest, place, record
        self._works = True
        self.counts = (0, 0)

    def entries(self, prefix: str) -> list[Entry]:
        """As ``FileServer.entries``."""
        return self._rest.entries(prefix)

    def get(self, wanted: Iterable[Entry], folder: Path) -> None:
        """As ``StudyFiles.get``."""
        for each in wanted:
            path = folder / each.name
            if self._works and seen(path) != each[1:]:
                with contextlib.suppress(StorageError):
                    if self._bucket.download(each.name, path):
                        self.counts = self.counts[0] + each.size, self.counts[1]
            self._rest.get([each], folder)  # which is there by now, unless the bucket lacks this version

    def send(self, folder: Path, name: str) -> None:
        """As ``StudyFiles.send``, but the files of a folder appear one by one, ``STATE`` last."""
        if not f"{check_name(name)}/".startswith(f"{self._place}/"):
            raise StorageError(Problem(name, f"must be a file of {self._place}"))
        found = sorted(entries(folder, name), key=lambda each: each.name.endswith(f"/{STATE}"))
        try:
            for each in found if self._works else ():
                self._bucket.upload(each.name, folder / each.name)
                self.counts = self.counts[0], self.counts[1] + each.size
        except StorageError as error:
            if not all((folder / each.name).exists() for each in found):
                raise FileNotFoundError(name) from None
            self._works = False
            why = "; ".join(str(replace(each, next_step="")) for each in error.problems)
            self._record("log", f"the files of this attempt go through Ray from here on: {why}")
        if self._works:
            self._record("sent", [each.name for each in found])
        else:
            self._rest.send(folder, name)

    def remove(self, name: str) -> None:
        """As ``FileServer.remove``; from the bucket the driver removes it."""
        self._rest.remove(name)
        self._record("gone", [name])

    def keep_newest(self, training: str) -> None:
        """As ``FileServer.keep_newest``; in the bucket the driver does this."""
        if not self._works:
            self._rest.keep_newest(training)


def start_files(folder: Path, address: str, commit: tuple[int, str]) -> tuple[StudyFiles, str]:
    """Starts the actor on this node.

    Args:
        folder: The study directory.
        address: Of a study in a bucket; else empty.
        commit: Number and digest of a commit of the study.

    Returns:
        The actor; and the address if the actor reaches the bucket. Nodes may then use the bucket themselves, since the
        others get from the actor what is only there.
    """
    found = StudyFiles(*started_here(FileServer, "file server", folder, threads=THREADS))
    if not address or not found.reaches(address, commit):
        return found, ""
    return StudyFiles(*started_here(FileServer, "file server", folder, address, threads=THREADS)), address
