"""Local copies of study files on nodes that cannot see the study.

A node that sees the study's folder uses it. Other nodes use a folder in their cache: the files that a training needs
are copied there first, and its results are copied back: from and to the bucket of the study, if the node reaches that,
else the driver's machine (``launch.workers.file_transfer``).

    CACHE/unseen/KEY/     as the study: prepared/, and trials/NAME/ while a training of this name runs
"""

import contextlib
import os
import platform
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.data.cache import cache_dir, key_of, own_folder, own_folders, remove_folder
from carft_ray.errors import CarftError, StorageError
from carft_ray.launch.workers.file_transfer import BucketFiles, Entry, StudyFiles, entries, reaches
from carft_ray.launch.workers.runtime import Runtime
from carft_ray.layout import (
    ATTEMPT,
    KEPT_CHECKPOINTS,
    METRICS,
    OWN,
    PREPARATION,
    PREPARED,
    RESULT,
    ROWS,
    STATE,
    STEP,
    WEIGHTS,
)
from carft_ray.store.folder import Folder
from carft_ray.store.log import Log
from carft_ray.study.training import TrialSpec
from carft_ray.training.run_context import RunContext

UNSEEN = "unseen"  # folder of the cache
BUCKET = "bucket.json"  # in place of the study's: whether this node reaches its bucket
SEND_EVERY_S = 1.0
KEPT_FOR_S = 7 * 24 * 3600.0  # what a killed process has left of another study


def sees(runtime: Runtime) -> bool:
    """Tells whether this node sees the study's folder: the commit by which the driver holds it lies there."""
    if runtime.files is None:
        return True
    with contextlib.suppress(StorageError):  # this user may not read it, say
        number, digest = runtime.commit
        return Log(Folder(runtime.study_dir)).digest_of(number) == digest and os.access(runtime.study_dir, os.W_OK)
    return False


def here(runtime: Runtime) -> Path:
    """Returns the folder in place of the study's on a node that does not see it; those of old studies go.

    Raises:
        StorageError: It cannot be made, or is none that carft-ray has made.
    """
    key = key_of([str(runtime.study_dir), runtime.first_commit, platform.node()])
    cache = cache_dir(runtime.recipe)
    place = cache / UNSEEN / key
    with files.writing(place), own_folder(cache, UNSEEN, key) as folder:
        os.utime(folder)
    for other, (state, *_) in own_folders(cache, UNSEEN).items():
        if time.time() - state.st_mtime > KEPT_FOR_S:
            remove_folder(cache, UNSEEN, other)
    return place


def uses_bucket(runtime: Runtime) -> bool:
    """Tells whether this node reads and writes the bucket of the study itself: tried once for each search.

    Raises:
        StorageError: The answer cannot be kept in the cache.
    """
    if not runtime.bucket:
        return False
    folder, asked = here(runtime), [runtime.bucket, *runtime.commit]
    kept = files.read_object(folder, BUCKET) or {}
    if kept.get("asked") != asked:
        kept = {"asked": asked, "reaches": reaches(runtime.bucket, runtime.commit)}
        files.write_json(folder / BUCKET, kept)
    return bool(kept["reaches"])


@contextlib.contextmanager
def prepared_at_hand(runtime: Runtime) -> Iterator[Path]:
    """Gives the folder of the preparation; what the block changes in it goes to the study, always through the driver.

    Raises:
        MachineError: The driver's machine does not answer.
        StorageError: A disk cannot be read or written.
    """
    if runtime.files is None or sees(runtime):
        yield runtime.study_dir / PREPARED
        return
    folder, there = here(runtime), runtime.files.entries(PREPARED)
    _remove_others(folder, PREPARED, there)  # of a preparation that was killed before all of it was sent
    runtime.files.get(there, folder)
    before = entries(folder, PREPARED)
    yield folder / PREPARED
    new = [each.name for each in entries(folder, PREPARED) if each not in before]
    for name in sorted(new, key=f"{PREPARED}/{PREPARATION}".__eq__):  # this one last
        runtime.files.send(folder, name)


@contextlib.contextmanager
def training_at_hand(
    runtime: Runtime,
    spec: TrialSpec,
    context: RunContext,
    nodes: Sequence[tuple[str, bool]],
    record: Callable[[Any, Any], None] = lambda kind, value: None,
) -> Iterator[tuple[Path, RunContext, "Delivery | None"]]:
    """Gives the study's folder as this node has it, for one attempt at a training.

    Args:
        runtime: Of the search.
        spec: The attempt.
        context: Of this rank; every rank calls this.
        nodes: Of each rank, Ray's name of its node and whether it sees the study.
        record: As of ``BucketFiles``.

    Yields:
        The folder; the context of a training there; and what sends to the study what the attempt writes, on rank 0
        where that is needed.

    Raises:
        MachineError: The driver's machine does not answer.
        StorageError: A disk cannot be read or written.
    """
    node, seen = nodes[context.rank]
    if runtime.files is None or seen:
        folder, is_first = runtime.study_dir, False
    else:
        folder, is_first = here(runtime), nodes.index((node, False)) == context.rank
    source: StudyFiles | BucketFiles | None = runtime.files
    if is_first and runtime.files is not None and uses_bucket(runtime):
        source = BucketFiles(runtime.bucket, runtime.files, spec.attempt_name, record)
    counts = (0, 0) if source is None else source.counts
    is_behind = bool(runtime.bucket) and spec.attempt > 1  # the driver's folder may lack what is only in the bucket
    if is_behind or not all(seen for _, seen in nodes):
        from carft_ray.training.ranks import on_all_ranks

        gets = is_first or (is_behind and seen and [each for _, each in nodes].index(True) == context.rank)
        on_all_ranks(context, lambda: _get(source, spec, folder, seen) if gets and source else None)
    if not is_first or source is None:
        yield folder, context, None
        return
    delivery = Delivery(source, folder, spec, counts) if context.rank == 0 else None
    try:
        with delivery or contextlib.nullcontext():
            yield folder, replace(context, keeps_files=True), delivery
    finally:
        shutil.rmtree(spec.folder(folder), ignore_errors=True)


def _get(source: StudyFiles | BucketFiles, spec: TrialSpec, folder: Path, seen: bool) -> None:
    """Brings what an attempt reads of the study, and removes what else a killed one has left here of its training.

    Into the study's folder, if it is ``seen``, comes what an earlier attempt has put into the bucket alone.
    """
    wanted = needed(source.entries(spec.training), spec.training)
    attempts = [each["name"] for each in (spec.soup or {}).get("members", ())]  # they stay: others may need them
    members = [each for name in attempts for each in source.entries(name) if each.name == f"{name}/{WEIGHTS}"]
    if seen:
        source.get([each for each in wanted if not files.exists(folder / each.name)], folder)
        return
    _remove_others(folder, spec.training, wanted)
    source.get([*source.entries(PREPARED), *wanted, *members], folder)


def _remove_others(folder: Path, prefix: str, wanted: Sequence[Entry]) -> None:
    names = {each.name for each in wanted}
    for each in entries(folder, prefix):
        if each.name not in names:
            files.remove(folder / each.name)


def needed(found: Sequence[Entry], training: str) -> list[Entry]:
    """Returns which files of a training another attempt at it reads.

    These are its rows; the newest weights of a training that has ended, else the newest checkpoints; and what the
    newest attempt has kept of a fine-tuning of the user's own.
    """
    kept: dict[str, dict[tuple[int, ...], list[Entry]]] = {what: defaultdict(list) for what in (WEIGHTS, STEP, OWN)}
    rows = []
    for each in found:
        first, _, rest = each.name.removeprefix(f"{training}/").partition("/")
        what, attempt = rest.partition("/")[0], first.removeprefix(ATTEMPT)
        step = what.removeprefix(STEP)
        if first == METRICS:
            rows.append(each)
        elif not attempt.isdigit():
            continue
        elif what in (WEIGHTS, OWN):
            kept[what][int(attempt),].append(each)
        elif step.isdigit():
            kept[STEP][int(step), int(attempt)].append(each)
    numbers = {WEIGHTS: 1, STEP: 0 if kept[WEIGHTS] else KEPT_CHECKPOINTS, OWN: 1}
    steps = kept[STEP].items()
    kept[STEP] = {key: of for key, of in steps if any(each.name.endswith(f"/{STATE}") for each in of)}  # the whole ones
    newest = [each for what, by in kept.items() for key in sorted(by)[::-1][: numbers[what]] for each in by[key]]
    return [*rows, *newest]


class Delivery:
    """Sends what an attempt writes to the study: checkpoints and rows in a thread, all at the end, the result last.

    Used as a context. The rows of a checkpoint are there before it is.

    Args:
        target: The study's files.
        folder: In place of the study's folder on this node.
        spec: The attempt.
        counts: Those of ``target`` when the attempt began.
    """

    def __init__(
        self, target: StudyFiles | BucketFiles, folder: Path, spec: TrialSpec, counts: tuple[int, int] = (0, 0)
    ) -> None:
        self._target, self._folder, self._training = target, folder, spec.training
        self._place = f"{spec.training}/{ATTEMPT}{spec.attempt}"
        self._counts, self._sent = counts, dict[str, Entry]()
        self._sending, self._ends = threading.Lock(), threading.Event()
        self._failure: CarftError | None = None
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def __enter__(self) -> "Delivery":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        try:
            self.check()
            self.checkpoints()
            self.own()
            with files.writing(self._folder):
                left, last = [each.name for each in entries(self._folder, self._place)], f"{self._place}/{RESULT}"
                self._send([*(name for name in left if f"/{STEP}" not in name and name != last), last])
        except CarftError:
            if kind is None:
                raise

    def check(self) -> None:
        """Raises why something could not be sent.

        Raises:
            MachineError: The driver's machine does not answer.
            StorageError: A disk cannot be read or written.
        """
        if self._failure is not None:
            raise self._failure

    def checkpoints(self) -> None:
        """Sends rows and checkpoints that are new."""
        with self._sending, files.writing(self._folder):
            steps = sorted(path.name for path in (self._folder / self._place).glob(f"{STEP}*"))
            new = [name for step in steps if (name := f"{self._place}/{step}") not in self._sent]
            self._send([f"{self._place}/{ROWS}"])
            for name in new:
                with contextlib.suppress(FileNotFoundError):  # two newer ones are there
                    self._target.send(self._folder, name)
                    self._target.keep_newest(self._training)
                self._sent[name] = Entry(name, 0, 0)
            os.utime(self._folder)

    def own(self) -> None:
        """Sends what a fine-tuning of the user's own keeps, after the rows; what it has removed goes there, too."""
        with self._sending, files.writing(self._folder):
            prefix = f"{self._place}/{OWN}"
            there = [each.name for each in entries(self._folder, prefix)]
            self._send([f"{self._place}/{ROWS}", *there])
            for gone in [name for name in self._sent if name.startswith(f"{prefix}/") and name not in there]:
                self._target.remove(gone)
                del self._sent[gone]

    def words(self) -> str:
        """Returns how much has come and gone, and how, for the log."""
        got, sent = (now - before for now, before in zip(self._target.counts, self._counts, strict=True))
        return f"{got / 1e6:.1f} MB came {self._target.way}, {sent / 1e6:.1f} MB went"

    def _send(self, names: Sequence[str]) -> None:
        """Sends those files that are there and have changed since they were sent."""
        for each in (each for name in names for each in entries(self._folder, name)):
            if self._sent.get(each.name) != each:
                with contextlib.suppress(FileNotFoundError):  # the user's own function has removed it
                    self._target.send(self._folder, each.name)
                self._sent[each.name] = each

    def _run(self) -> None:
        while not self._ends.wait(SEND_EVERY_S):
            try:
                self.checkpoints()
            except CarftError as error:  # raised by ``check``
                self._failure = error
                return
