"""The folder in which a driver works on a study in a bucket, and how its files get there.

A file that is missing in the folder is removed in the bucket only if the search has removed it: it has said so
(``forget_files``), or newer checkpoints have replaced this one, as trainings do. All other files stay in the bucket: a
cleaner or a user may have removed them from the folder, or it never had them.

A driver that was asleep while another one took the study over must not change a file of it. It may fall asleep at any
request: before each file the log is read, and a file is put over only that version which was there before this reading.
A file of more than ``PIECE_BYTES`` is uploaded in parts, which buckets do not bind to a version.

The log and the files in the bucket are the study. A commit is created there first. Before one that says how a training
ended, it is decided which of its files stay, and these are uploaded; checkpoints and the rest follow every
``UPLOAD_EVERY_S``, and all at the end. A thread of its own looks for requests to stop, since an upload may take long.
After a kill the folder may be behind the bucket or ahead of it: who has claimed the log makes it equal.
"""

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.layout import COMMITS, KEPT_CHECKPOINTS, MANIFEST, RAY_LOG, RESULT, STATE, STOP, STOP_REQUESTS, WEIGHTS
from carft_ray.store.attempt_files import checkpoint_of
from carft_ray.store.bucket import PIECE_BYTES, Tag
from carft_ray.store.copy import PER_IMAGE, Copy, files_in, is_needed, seen
from carft_ray.store.folder import Folder, RefusedError, UnknownError
from carft_ray.store.log import Log
from carft_ray.study.place import DRIVEN, address_in, stop_request

UPLOAD_EVERY_S = 10.0
MEANWHILE_EVERY_S = 0.1
PUT_TRIES = 5
_Version = tuple[int, int]  # of a file: bytes, time in ns


class Driven(Copy):
    """The bucket of a study, for its driver: files get there from the folder, and back as far as they are needed.

    Attributes:
        log: By which the study is held.
    """

    log: Log

    def __init__(self, address: str, folder: Path) -> None:
        super().__init__(address, folder)
        self._known: dict[str, _Version | None] = {}  # files as the bucket has them; None: it may have one
        self._by_training: dict[str, list[str]] | None = None  # their names; None: these have changed
        self._forgotten: set[str] = set()  # files and folders that the search has removed
        self._written: set[str] = set()  # names that this process may have written
        self._ended: set[str] = set()  # attempts that are complete
        self._tags: dict[str, Tag | None] = {}  # of files as this driver has put or seen them
        self._locks = (threading.Lock(), threading.Lock())  # of files, and of checkpoints

    def begin(self, own_request: str) -> None:
        """Makes the folder equal to the bucket, and removes requests to stop earlier holders.

        Weights and checkpoints that the folder lacks stay away; who needs them brings them.
        """
        self._remove([STOP, *(name for name in self.list(STOP_REQUESTS) if name != own_request)])
        self._tags = {MANIFEST: self.tag(MANIFEST)}
        self._known = {name: (each.num_bytes, each.stamp_ns) for name, each in self.fetch(PER_IMAGE).items()}
        self._by_training = None

    def put_new(self, name: str, data: bytes) -> None:
        """As of ``Bucket``."""
        self._written.add(name)
        super().put_new(name, data)

    def put(self, name: str, data: bytes) -> None:
        """As of ``Bucket``."""
        self._written.add(name)
        super().put(name, data)

    def keep_files(self) -> None:
        """As of ``Store``."""
        with ThreadPoolExecutor(1, "keep") as pool:
            upload = pool.submit(self.upload_new, checkpoints=False)
            while not upload.done():
                self.meanwhile()
                wait((upload,), MEANWHILE_EVERY_S)
            upload.result()

    def has_ended(self, place: str) -> None:
        """As of ``Store``: the next upload takes result and weights of the attempt, but what is forgotten by then."""
        self._ended.add(place)

    def forget_files(self, name: str) -> None:
        """As of ``Store``: the next upload removes it."""
        self._forgotten.add(name)

    def learn(self, names: Iterable[str]) -> None:
        """As of ``Store``."""
        for name in names:
            self._known.setdefault(name, None)
        self._by_training = None

    def known(self, name: str) -> list[str]:
        """As of ``Store``."""
        found = self._by_training
        if found is None:  # at an opening it is asked of all, and nothing is learned meanwhile
            self._by_training = found = defaultdict(list)
            for each in sorted(self._known.copy()):
                found[_training_of(each)].append(each)
        return [each for each in found.get(_training_of(name), ()) if f"{each}/".startswith(f"{name}/")]

    def bring(self, name: str, need: int) -> None:
        """As of ``Store``."""
        folder = self.here.path
        for each in self.known(name):
            if is_needed(each, need) and not files.exists(folder / each) and self.download(each, folder / each):
                self._known[each] = seen(folder / each)

    def _waits(self, name: str) -> bool:
        """Tells whether a file is one of an attempt of which it is not decided yet what stays."""
        place, _, last = name.rpartition("/")
        return last in (RESULT, WEIGHTS) and checkpoint_of(name) is None and place not in self._ended

    def remove_written(self, request: str) -> None:
        """Removes what this process has written, and the request to stop it; names of others below the address stay.

        The log goes late, its last commit first: what is left of it if this fails is a log, too.
        """
        names = sorted({*self._written, request}, reverse=True)
        for name in sorted(names, key=lambda name: (name == MANIFEST, name.startswith(f"{COMMITS}/"))):
            self.delete([name])

    def upload_new(self, checkpoints: bool, is_last: bool = False) -> None:
        """Uploads files that are new or have changed, and removes what the search has removed.

        Args:
            checkpoints: Checkpoints, or else all others.
            is_last: Also weights of trainings that continue later.

        Raises:
            StorageError: A file cannot be read, or the bucket not be written.
        """
        with self._locks[checkpoints]:
            there = files_in(self.here.path)
            if MANIFEST not in there and self._known:  # what was cleared here must not be cleared there
                step = "Run the same command again: it continues from the bucket."
                problem = Problem(
                    str(self.here), "must not be removed while a search uses it", "cleared", next_step=step
                )
                raise StorageError(problem)
            names = [name for name in there if name != RAY_LOG] if MANIFEST in there else []
            names = [name for name in names if (checkpoint_of(name) is not None) == checkpoints]
            names = [name for name in names if name not in self._forgotten and (is_last or not self._waits(name))]
            names.sort(key=lambda name: (_is_late(name), name))
            for name in names:
                if self.log.is_unknown:
                    return
                self._upload(name, self.here.path / name)
            known = {name for name in self._known.copy() if (checkpoint_of(name) is not None) == checkpoints}
            gone = self._removed_by_us(known, there)
            self._remove(gone)
            for name in gone:
                del self._known[name]
            self._by_training = None

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.log.check(is_sure=True)
            self.delete([name])

    def _put_over(self, name: str, data: bytes) -> None:
        """Puts a file over the version that was there before the log was read; if that fails, reads both again."""
        for number in range(PUT_TRIES):
            if number:
                time.sleep(0.05 * 2**number)  # a server that is busy
                self.log.check(is_sure=True)  # after the tag was read: who takes over later changes it
            try:
                self._tags[name] = self.put_over(name, data, self._tags.get(name))
                return
            except (RefusedError, UnknownError) as error:  # also when the answer to an earlier try was lost
                self._tags[name], problems = self.tag(name), error.problems
                if self.get(name) == data:
                    return
        raise StorageError(problems)

    def _removed_by_us(self, known: set[str], there: Container[str]) -> list[str]:
        """Returns which names of the bucket are gone from the folder because the search has removed them."""
        newest: dict[str, list[tuple[int, int]]] = defaultdict(list)  # checkpoints of a training
        for name in known:
            if (found := checkpoint_of(name)) and name.endswith(f"/{STATE}"):  # others are not whole
                newest[found[0]].append(found[1])
        kept = {name: sorted(set(found))[-KEPT_CHECKPOINTS:] for name, found in newest.items()}
        gone = []
        for name in known:
            if name not in there:
                found, pieces = checkpoint_of(name), name.split("/")
                is_forgotten = any("/".join(pieces[:n]) in self._forgotten for n in range(1, len(pieces) + 1))
                if is_forgotten or (found and found[1] < kept.get(found[0], [found[1]])[0]):
                    gone.append(name)
        return sorted(gone)

    def _upload(self, name: str, path: Path) -> None:
        try:
            before, inode = seen(path), path.stat().st_ino
            if self._known.get(name, before) is None and (there := self.stat(name)):
                self._known[name] = there.num_bytes, there.stamp_ns
            if before == self._known.get(name):
                return
            if name in self._known and name not in self._tags:
                self._tags[name] = self.tag(name)
            self.log.check(is_sure=True)
            self._known[name] = self._by_training = None
            self._written.add(name)
            if path.stat().st_size > PIECE_BYTES:
                self.upload(name, path)
            else:
                self._put_over(name, files.read_whole(self.here.path, name))
            self._known[name], there = before, self.stat(name)
            if there is not None and (seen(path), path.stat().st_ino) == (before, inode):  # not changed since
                os.utime(path, ns=(there.stamp_ns, there.stamp_ns))  # by which ``fetch`` knows it
                self._known[name] = there.num_bytes, there.stamp_ns
        except (StorageError, FileNotFoundError):
            if path.exists():
                raise


def open_log(study_dir: Path) -> Log:
    """Returns the log of a study that is to be claimed: in its folder, or in the bucket that the folder belongs to."""
    address = address_in(study_dir, DRIVEN)
    if address is None:
        return Log(Folder(study_dir))
    store = Driven(address, study_dir)
    store.log = Log(store)
    return store.log


@contextlib.contextmanager
def uploading(log: Log) -> Iterator[None]:
    """Within the block, the files of a claimed study get into its bucket, if it is in one; at its end, all.

    Raises:
        StorageError: The bucket cannot be read; or it lacks files of a study that is well otherwise.
    """
    store = log.store
    if not isinstance(store, Driven):
        yield
        return
    request = stop_request(log)
    store.begin(request)
    left = threading.Event()

    def repeat(work: Callable[[], None]) -> None:
        while not left.wait(UPLOAD_EVERY_S):
            with contextlib.suppress(StorageError):  # the next commit tells
                work()

    def follow_orders() -> None:
        if store.look(request) is not None:
            store.order = f"asked by {request}"

    def all_files(is_last: bool = False) -> None:
        if not log.is_lost:
            store.upload_new(checkpoints=False, is_last=is_last)
            store.upload_new(checkpoints=True)

    works = (all_files, follow_orders)  # an upload may take minutes
    threads = [threading.Thread(target=repeat, args=(work,), name=work.__name__, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException:
        left.set()
        for thread in threads:
            thread.join(0.0 if log.is_unknown else None)  # a bucket that does not answer keeps it for a minute
        with contextlib.suppress(StorageError):
            if log.is_abandoned:
                store.remove_written(request)
            else:
                all_files(is_last=True)
        raise
    left.set()
    for thread in threads:
        thread.join()
    all_files(is_last=True)


def _is_late(name: str) -> tuple[bool, bool]:
    """Orders uploads: files without a manifest are no study, and a result is believed without the rows beside it.

    A checkpoint is whole once its last file is there.
    """
    return name != MANIFEST, name.endswith((f"/{RESULT}", f"/{STATE}"))


def _training_of(name: str) -> str:
    """Returns the folder of the training that a file of a study belongs to."""
    return "/".join(name.split("/", 2)[:2])
