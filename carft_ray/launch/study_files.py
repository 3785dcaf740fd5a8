"""Files of a study on nodes that do not see its folder: through Ray, from and to the driver's machine, in pieces.

driver's machine    ``FileServer``: an actor that reads and writes below the folder what belongs to trainings
node                ``StudyFiles``: gets files into a folder there, and sends others
"""

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from carft_ray import files
from carft_ray.errors import MachineError, Problem, StorageError
from carft_ray.launch.named_actor import NamedActor, started_here
from carft_ray.layout import FOLDERS, KEPT_CHECKPOINTS, PREPARED
from carft_ray.store.folder import Folder, check_name
from carft_ray.store.result import checkpoints
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


class FileServer:
    """Reads and writes for nodes. Each call may be repeated, and be answered by an actor that was started again.

    All methods raise a ``StorageError`` for what is no file of trainings, or when the disk fails.

    Args:
        folder: The study directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Folder(folder)

    def entries(self, prefix: str) -> list[Entry]:
        """As ``entries``."""
        self._path(prefix)
        return entries(self._folder.path, prefix)

    def read(self, name: str, offset: int) -> bytes | None:
        """Returns a piece of a file; None where there is no such file."""
        path = self._path(name)
        try:
            with open_regular(path, StorageError) as file:
                return os.pread(file.fileno(), PIECE_BYTES, offset)
        except FileNotFoundError:
            return None
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
    """

    counts: tuple[int, int] = (0, 0)

    def entries(self, prefix: str) -> list[Entry]:
        """As ``FileServer.entries``."""
        found: list[Entry] = self._call("entries", prefix)
        return found

    def get(self, wanted: Iterable[Entry], folder: Path) -> None:
        """Gets files into a folder, those that are not there yet; what has vanished is passed over."""
        for each in wanted:
            path = folder / each.name
            if not _same(path, each):
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


def start_files(folder: Path) -> StudyFiles:
    """Starts the actor on this node."""
    return StudyFiles(*started_here(FileServer, "file server", folder, threads=THREADS))


def _same(path: Path, entry: Entry) -> bool:
    with contextlib.suppress(OSError):
        state = path.stat()
        return (state.st_size, state.st_mtime_ns) == entry[1:]
    return False
