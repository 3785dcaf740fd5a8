"""The mailbox between the driver and the processes of its trainings: what they report goes in, orders come back.

    rank of a training    ``worker.Poster``: every second how far it is, and how it failed; rank 0 also rows of steps
                          and epochs and lines of the log; the answer is its order
    group of workers      what it has ended, and what it is to do next (``launch.workers.group``)
    ``Mailbox``           an actor on the driver's node, or an object of this process (executor ``debug``)
    driver                ``Exchange``: twice a second its orders go in, and what was posted comes out

Each message carries the sender's full state (a poster's: all records that the driver has not taken), so a restarted
mailbox recovers with the next exchange and the next posts; nothing else guards it. If the driver is silent for
``PATIENCE_S`` (it sleeps), or a mailbox cannot be reached for as long, trainings leave: they do not hold GPUs for a
driver that is gone.
"""

import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray.study.training import Failure

EXCHANGE_EVERY_S = 0.5
PATIENCE_S = 60.0
CALL_TIMEOUT_S = 10.0
RETRY_EVERY_S = 0.2
# stop: write a checkpoint and end; leave: so, too, and another attempt follows elsewhere; cut: end, and the same
# workers may get the next training; outdated: another attempt runs
Order = Literal["go", "cut", "stop", "leave", "outdated"]
Kind = Literal["step", "row", "log", "sent", "gone"]
# metrics of some steps; those of an epoch; text of the log; names of files that its node has put into the bucket of the
# study; names of those that it has removed since
Record = tuple[Kind, Any]
NAMESPACE = "carft-ray"  # of Ray's names of actors: workers of Ray Train are in another one by default


class Wish(NamedTuple):
    """What the driver says of a training: its newest attempt, the order, and how many of its records it has."""

    attempt: int
    order: Order = "go"
    num_taken: int = 0


class Answer(NamedTuple):
    """To a post: the order, and how many of its records the driver has."""

    order: Order
    num_taken: int = 0


@dataclass(frozen=True)
class Process:
    """The process of rank 0 of an attempt, and where the others are.

    Attributes:
        pid: Its number.
        started: When it began (``store.heartbeat.process_started``).
        node_id: Ray's name of its node; empty without Ray.
        group: Ray's name of the placement group of the workers; empty when there is none.
        nodes: Of each rank: Ray's name of its node, and the node's address; empty until the ranks have met.
        stacks: File on its node with what its threads do, should it hang; empty where nobody looks for that.
    """

    pid: int
    started: str
    node_id: str = ""
    group: str = ""
    nodes: tuple[tuple[str, str], ...] = ()
    stacks: str = ""


@dataclass(frozen=True)
class Post:
    """What a rank says of an attempt.

    Attributes:
        training: Folder of the training within the study.
        attempt: Number of the attempt.
        rank: Of the worker.
        steps: Signs of life that it has given.
        process: Of rank 0 alone.
        failure: How the attempt has ended for this rank, if not well.
        records: Of rank 0: those that the driver may not have.
        first: How many came before them in this attempt.
    """

    training: str
    attempt: int
    rank: int = 0
    steps: int = 0
    process: Process | None = None
    failure: Failure | None = None
    records: tuple[Record, ...] = ()
    first: int = 0


@dataclass
class Signs:
    """What was posted of an attempt.

    Attributes:
        attempt: Number of the attempt.
        steps: Signs of life by rank.
        process: Of rank 0, once it has posted.
        failure: The first that was posted: when one worker fails, the others fail after it.
        records: Of rank 0, in its last post.
        first: How many came before them.
    """

    attempt: int
    steps: dict[int, int] = field(default_factory=dict)
    process: Process | None = None
    failure: Failure | None = None
    records: tuple[Record, ...] = ()
    first: int = 0


class Box(Protocol):
    """A mailbox, wherever it is. Its calls raise an ``OSError`` when it cannot be reached."""

    def post(self, post: Post) -> Answer: ...
    def exchange(self, wishes: Mapping[str, Wish]) -> dict[str, Signs]: ...
    def ask(self, group: str, work: Any) -> Any: ...
    def answer(self, group: str, said: Any) -> Any: ...


class Mailbox:
    """The state between one driver and its trainings; the actor is one of these, too.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard_at: float | None = None  # of the driver
        self._wishes: Mapping[str, Wish] = {}
        self._signs: dict[str, Signs] = {}
        self._work: dict[str, Any] = {}
        self._said: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Elsewhere it is another one."""
        return Mailbox, ()

    def post(self, post: Post) -> Answer:
        """Takes a heartbeat; returns the order.

        An attempt of which the driver has not told (it has just begun, or the mailbox has) goes on; it is outdated only
        where the driver has named a later one of its training.
        """
        with self._lock:
            wish = self._wishes.get(post.training, Wish(0))
            if wish.attempt > post.attempt:
                return Answer("outdated")
            known = self._signs.get(post.training)
            if known is None or known.attempt < post.attempt:
                known = self._signs[post.training] = Signs(post.attempt)
            if known.attempt == post.attempt:
                known.steps[post.rank] = post.steps
                known.process, known.failure = post.process or known.process, known.failure or post.failure
                if post.rank == 0:
                    known.records, known.first = post.records, post.first
            num_taken = wish.num_taken if wish.attempt == post.attempt else 0
            if self._heard_at is not None and self._clock() - self._heard_at >= PATIENCE_S:
                return Answer("leave", num_taken)
            return Answer(wish.order if wish.attempt == post.attempt else "go", num_taken)

    def exchange(self, wishes: Mapping[str, Wish]) -> dict[str, Signs]:
        """Takes all that the driver wants, by training.

        Returns:
            What was posted of these attempts; the rest is forgotten.
        """
        with self._lock:
            self._heard_at, self._wishes = self._clock(), dict(wishes)
            kept = {name: signs for name, signs in self._signs.items() if name in wishes}
            self._signs = {name: signs for name, signs in kept.items() if signs.attempt == wishes[name].attempt}
            return {name: replace(signs, steps=dict(signs.steps)) for name, signs in self._signs.items()}

    def ask(self, group: str, work: Any) -> Any:
        """Takes what a kept group of workers is to do next; returns what the group has said last, or None."""
        with self._lock:
            self._work[group] = work
            return self._said.get(group)

    def answer(self, group: str, said: Any) -> Any:
        """Takes what a kept group of workers says; returns what it is to do next, or None."""
        with self._lock:
            self._said[group] = said
            return self._work.get(group)


class NamedActor:
    """The actor; travels to workers by its name.

    Tune keeps what it was given, and pickles it again with the next Ray of this process when it could not before; the
    handle of an actor that is gone would end the process there.

    Args:
        name: Of the actor.
        actor: Its first handle, which keeps it alive.
    """

    def __init__(self, name: str, actor: Any = None) -> None:
        self._name, self._actor, self._what = name, actor, name.rpartition("-")[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves the handle out."""
        return type(self), (self._name,)

    def begin(self, method: str, *given: Any) -> Any:
        """Calls a method; returns Ray's reference to what it will return.

        Raises:
            ConnectionError: There is no such actor, or Ray cannot carry the call: its store and the disk are full, say.
        """
        try:
            try:
                self._actor = self._actor or ray.get_actor(self._name, NAMESPACE)
            except ValueError as error:
                raise ConnectionError(f"the {self._what} is gone") from error
            return getattr(self._actor, method).remote(*given)
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the {self._what} cannot be asked: {type(error).__name__}") from error

    def result(self, begun: Any, timeout_s: float) -> Any:
        """Returns what a call that was begun returns.

        Raises:
            ConnectionError: There is no answer in time, or the actor's process has ended.
            Exception: What the method has raised.
        """
        try:
            return ray.get(begun, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", error) from None
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the {self._what} does not answer: {type(error).__name__}") from error


def started_here(make: type, name: str, *given: Any, threads: int = 1) -> tuple[str, Any]:
    """Starts an actor on this node; it ends with this driver, and Ray starts it again when its process dies.

    Args:
        make: Its class.
        name: What its name begins with.
        given: To the class.
        threads: Calls at a time.

    Returns:
        What a ``NamedActor`` takes.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"{name}-{uuid.uuid4().hex}"
    named: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    remote: Any = ray.remote
    return name, remote(**named, max_concurrency=threads, scheduling_strategy=here)(make).remote(*given)


class RemoteMailbox(NamedActor):
    """The actor, for whoever holds this."""

    def post(self, post: Post) -> Answer:
        """As ``Mailbox.post``; raises an ``OSError`` when it has no answer in time."""
        return self._call("post", post)  # type: ignore[no-any-return]

    def exchange(self, wishes: Mapping[str, Wish]) -> dict[str, Signs]:
        """As ``Mailbox.exchange``; raises an ``OSError`` when it has no answer in time."""
        return self._call("exchange", wishes)  # type: ignore[no-any-return]

    def ask(self, group: str, work: Any) -> Any:
        """As ``Mailbox.ask``; raises an ``OSError`` when it has no answer in time."""
        return self._call("ask", group, work)

    def answer(self, group: str, said: Any) -> Any:
        """As ``Mailbox.answer``; raises an ``OSError`` when it has no answer in time."""
        return self._call("answer", group, said)

    def _call(self, method: str, *given: Any) -> Any:
        return self.result(self.begin(method, *given), CALL_TIMEOUT_S)


def start_mailbox() -> RemoteMailbox:
    """Starts the actor on this node."""
    return RemoteMailbox(*started_here(Mailbox, "mailbox"))


@dataclass(frozen=True)
class Mail:
    """What the driver knows of an attempt from its posts.

    Attributes:
        signs: What was posted last.
        seen: When its last step was seen, of ``time.monotonic``.
        longest_s: The longest between two of its steps.
    """

    signs: Signs
    seen: float
    longest_s: float = 0.0


class Exchange:
    """The driver's side of a mailbox.

    Args:
        box: The mailbox.

    Attributes:
        heard: When it answered last, of ``time.monotonic``.
        woke: The same, of its last answer after ``PATIENCE_S`` without one: what ran before has been told to leave.
    """

    def __init__(self, box: Box) -> None:
        self.heard, self.woke = time.monotonic(), -math.inf
        self._box = box
        self._wishes: dict[str, Wish] = {}  # that the driver's thread alone changes
        self._mail: dict[str, Mail] = {}
        self._exchanging = threading.Lock()

    def order(self, training: str, attempt: int, order: Order = "go") -> None:
        """Names the newest attempt of a training, and what it is to do; earlier ones are outdated."""
        before = self._wishes.get(training, Wish(0))
        self._wishes[training] = Wish(attempt, order, before.num_taken if before.attempt == attempt else 0)

    def ordered(self, training: str) -> Order:
        """Returns what the newest attempt of a training is to do."""
        return self._wishes.get(training, Wish(0)).order

    def forget(self, training: str) -> None:
        """Drops a training whose attempt has ended by itself."""
        self._wishes.pop(training, None)

    def mail(self, training: str, attempt: int) -> Mail | None:
        """Returns what is known of an attempt; None before its first post."""
        found = self._mail.get(training)
        return found if found is not None and found.signs.attempt == attempt else None

    def records(self, training: str, attempt: int) -> Sequence[Record]:
        """Takes what the newest attempt of a training has recorded since it was asked for last."""
        mail, wish = self.mail(training, attempt), self._wishes.get(training)
        if mail is None or wish is None or wish.attempt != attempt:
            return ()
        new = mail.signs.records[max(0, wish.num_taken - mail.signs.first) :]
        self._wishes[training] = wish._replace(num_taken=wish.num_taken + len(new))
        return new

    def now(self) -> None:
        """Exchanges at once; a mailbox that does not answer is asked again with the next exchange."""
        with self._exchanging, contextlib.suppress(OSError):
            found, now = self._box.exchange(dict(self._wishes)), time.monotonic()
            has_slept = now - self.heard >= PATIENCE_S
            self._mail = {training: self._read(training, signs, now, has_slept) for training, signs in found.items()}
            self.woke = now if has_slept else self.woke
            self.heard = now  # last: who reads this first has the mail of then, or newer

    def _read(self, training: str, signs: Signs, now: float, has_slept: bool) -> Mail:
        before = self.mail(training, signs.attempt)
        if before is None:
            return Mail(signs, now)
        if signs.steps == before.signs.steps:
            return replace(before, signs=signs)
        return Mail(signs, now, max(before.longest_s, 0.0 if has_slept else now - before.seen))

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Exchanges twice a second while the block lasts, in a thread that nothing of the driver's delays."""
        ends = threading.Event()

        def run() -> None:
            while not ends.wait(EXCHANGE_EVERY_S):
                self.now()

        thread = threading.Thread(target=run, name="exchange", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()
