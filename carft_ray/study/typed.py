"""What the files of a study may hold: types and ranges, checked where they are read; later code meets nothing else.

What is not named here is passed on as it is: ``files.read_json`` has left nothing in it that cannot be computed with.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from carft_ray.errors import Problem, StorageError
from carft_ray.untrusted import visible

Outcome = Literal["complete", "pruned", "diverged", "error", "running"]
FAILED: tuple[Outcome, ...] = ("error", "diverged")
Content = TypeVar("Content")
Made = TypeVar("Made")

Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]  # also a time since 1970: until the year 2286
Count = Annotated[int, Field(ge=0, le=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # as in a recipe
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]
Metrics = dict[str, Number]
Words = Annotated[str, Field(max_length=2**20)]
_STEP = "Restore it from a copy, or take the study from a source that you trust; carft-ray has not written this."
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class _Strict(BaseModel):
    """A number is no text, and a text no number."""

    model_config = _STRICT


class Before(_Strict):
    """A trial outside the space: what it was (``study.space_revisions``)."""

    state: Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING"]
    objectives: list[Number] | None


class Member(_Strict):
    """A training in a soup."""

    name: Words  # its last attempt, in the study
    sha256: Words  # of its weights
    objective: Number | None


class Soup(_Strict):
    """What a soup is made of (``study.soups``)."""

    kind: Literal["mean", "greedy", "model_stock"]
    members: Annotated[list[Member], Field(min_length=1)]
    alpha: Share  # at which tries are measured
    train: dict[str, Any]  # values of the first member


class Attributes(_Strict):
    """User attributes of a trial in the log that is a training (``study.rows``)."""

    name: Words = ""
    values: dict[str, Any] = {}
    outcome: Outcome = "error"
    attempt: Count = 0
    reason: Words | None = None
    set_aside: Words | None = None
    alpha: Share | None = None
    at_chance: bool = False
    objective: Number | None = None
    metrics: Metrics = {}
    points: list[Metrics] = []
    elapsed_s: Seconds | None = None
    attempts_s: dict[str, Annotated[list[Seconds], Field(min_length=2, max_length=2)]] = {}
    digest: Words = ""
    repeat_of: Words = ""
    seed: Seed | None = None
    soup: Soup | None = None
    outside: Before | None = None


class OptunaTrial(_Strict):
    """What a row takes from Optuna itself."""

    params: dict[str, Any]
    values: Annotated[list[Number], Field(min_length=1, max_length=2)] | None
    intermediate_values: dict[int, Number]
    duration: Number | None  # by two clocks, or one that was set back: it may be negative


class Kept(_Strict):
    """Size and hash of a file that belongs to a result."""

    bytes: Annotated[int, Field(ge=0, le=2**36)]  # its hash is made before it is opened
    sha256: Words


class Tried(_Strict):
    """What was measured on the way to a soup."""

    member: Words
    objective: Number


class SoupMade(_Strict):
    """What a soup has become, in its ``result.json`` (``training.soup``)."""

    kind: Words
    members: Annotated[list[Words], Field(min_length=1)]
    left_out: list[Words]
    tried: list[Tried]


class Result(_Strict):
    """``result.json`` of an attempt (``store.attempt_files``)."""

    alpha: Share | None = None
    metrics: Metrics
    curve: list[Metrics] | None = None
    num_images: dict[str, Annotated[int, Field(ge=1, le=2**53)]] = {}
    files: dict[str, Kept] = {}
    train: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    references: dict[str, Share] = {}
    soup: SoupMade | None = None


class MadeOn(_Strict):
    """``environment`` of a result, as ``study.take_over`` takes it."""

    num_workers: Annotated[int, Field(ge=0, le=10**6)] = 1
    device: Words = "cpu"


class Took(_Strict):
    """What an attempt took, in its ``result.json``."""

    elapsed_s: Seconds | None = None
    environment: MadeOn | None = None


class RecipeRecord(_Strict):
    """The recipe of a study, in the log (``study.records`` has its kinds)."""

    recipe: dict[str, Any]


class ProvenanceRecord(_Strict):
    """A ``Provenance``, in the log."""

    provenance: dict[str, Any]


class Stopping(_Strict):
    """That a search stops, in the log."""

    reason: Words


class TakenIn(_Strict):
    """A study of ``search.warm_start``, in the log."""

    id: Words
    path: Words
    test_reads: Count = 0


class Started(_Strict):
    """An attempt that has begun, in the log (``study.running``)."""

    training: Words
    attempt: Count
    began: Seconds
    gpus: Seconds


class AtATime(_Strict):
    """How many trainings run at a time, in the log (``study.running``)."""

    number: Count
    reason: Words


class Fits(_Strict):
    """The micro-batch that may fit into the memory of a device, in the log (``launch.workers.micro_batch``)."""

    device: Words
    micro_batch: Count


class Manifest(_Strict):
    """``manifest.json`` (``study.recipe_identity``)."""

    format_version: Count
    id: Words
    created: Words | None = None


class Contents(_Strict):
    """What a set held, in the provenance."""

    digest: Words
    num_images: Count


class TestSets(_Strict):
    """Digests of the test sets when the search began (``study.ledger``)."""

    __test__ = False  # no class of tests

    digests: dict[str, Words] = {}
    with_classes: dict[str, Words] = {}


class Details(TestSets):
    """Of a line of the ledger; those of a read are ``Fixed``, too."""

    against: dict[str, Count] = {}


class Line(_Strict):
    """A line of the ledger (``study.ledger.Entry``)."""

    model_config = ConfigDict(extra="forbid")

    number: Count
    time: Words
    user: Words
    recipe_hash: Words
    version: Words
    purpose: Words
    sets: list[Words]
    details: Details = Details()
    reason: Words = ""


class LedgerRecord(_Strict):
    """A line, in the log."""

    line: Line


class Origin(_Strict):
    """Code and machines of a search."""

    code: dict[str, Any]
    versions: dict[str, Words | None]  # None: the library does not say
    hardware: dict[str, Any]


class Provenance(Origin):
    """Where the numbers of a study come from (``study.provenance``)."""

    seeds: dict[str, Any]
    test_sets: dict[str, Any]
    data: dict[str, Contents] = {}
    classes: list[Words] | None = None
    class_names: list[Words] = []
    templates: list[Words] = []
    model: dict[str, Any] = {}
    augmentation: dict[str, Any] = {}
    preparation: dict[str, Any] = {}
    history: list[Origin] = []


class Prepared(_Strict):
    """``prepared.json``, as readers take it."""

    metrics: Metrics


Ends = Annotated[list[Number], Field(min_length=2, max_length=2)]


class Interval(_Strict):
    """``results.statistics.intervals.Interval.data``, as readers take it."""

    mean: Number
    ends: Ends
    num_seeds: Count
    p_value: Share
    over: Words
    notes: list[Words]


class Row(_Strict):
    """A configuration of a comparison (``results.evidence.compare``)."""

    name: Words
    role: Words
    alpha: Share
    seeds: Count
    chosen_from: Count = 0
    objective: Interval
    id_accuracy: Interval
    ood_accuracy: Interval | None
    sets: dict[str, Interval]


class Difference(_Strict):
    """The winner minus another one."""

    other: Words
    objective: Interval
    id_accuracy: Interval | None = None
    ood_accuracy: Interval | None = None
    sets: dict[str, Interval]
    keeps_id: bool


class Optimism(_Strict):
    """Of the search."""

    searched: Number
    value: Number
    se: Number | None


class Model(_Strict):
    """A delivered model (``results.delivered``), as the ledger has fixed it."""

    name: Words
    role: Words
    trial: Words | None
    runs: Annotated[list[Words], Field(max_length=1)]
    alpha: Share
    objective: Number
    sha256: Words | None
    chosen_from: Count


class ReadRow(_Strict):
    """A configuration that is read: its trainings and their alpha."""

    name: Words
    role: Words
    alpha: Share
    objective: Number
    runs: list[Words]


class Fixed(_Strict):
    """What a read of the test sets has fixed, as ``results.delivered`` takes it from the ledger."""

    confirmed: bool
    seeds: list[Seed]
    rows: Annotated[list[ReadRow], Field(min_length=1)]
    models: list[Model] = []
    missing: list[Words] = []


class Comparison(_Strict):
    """A document of ``results.evidence``, without what is judged anew when it is read."""

    label: Words
    winner: Words
    id_margin: Number
    rows: Annotated[list[Row], Field(min_length=1)]
    baselines: list[Difference]
    others: list[Difference]
    optimism: Optimism | None
    missing: list[Words] = []
    without_shared_images: "Comparison | None" = None


class Compared(Comparison):
    """``summary.json`` of a confirm or a test."""

    confirmed: bool = False
    seeds: list[Seed] = []
    chosen_by: Words = ""
    failed: list[Words] = []
    model: Comparison | None = None


class OtherRead(_Strict):
    """A read of the same images by another study."""

    study: Words
    time: Words
    user: Words
    sets: list[Words]


class Tested(Compared):
    """``summary.json`` of a test."""

    confirmed: bool
    seeds: list[Seed]
    sets: dict[str, Count]
    read: Count
    time: Words
    user: Words
    reason: Words | None
    searches_after_a_read: Count
    elsewhere: list[OtherRead]
    changed_sets: list[Words] = []


def checked(kind: type[BaseModel], value: Content, place: str) -> Content:
    """Returns a value that is of a kind, as it is.

    Args:
        kind: Of this module.
        value: What was read.
        place: The file, for the message.

    Raises:
        StorageError: It is not; names the first key at fault.
    """
    with _one_message(place):
        kind.model_validate(value)
    return value


def made(kind: type[Made], value: Any, place: str) -> Made:
    """Returns a dataclass, whose fields have the types of this module, with what was read.

    Args:
        kind: The dataclass. No field is of another type than written, and there are no others.
        value: What was read, as JSON holds it.
        place: The file, for the message.

    Raises:
        StorageError: It is none; names the first key at fault.
    """
    with _one_message(place):
        found: Made = TypeAdapter(with_config(_STRICT | ConfigDict(extra="forbid"))(kind)).validate_json(
            json.dumps(value)
        )
    return found


@contextlib.contextmanager
def _one_message(place: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"])) or "the content"
        raise wrong(place, f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}", first["input"]) from None


def check_accuracies(metrics: Mapping[str, float], place: str) -> None:
    """Raises a ``StorageError`` if an accuracy is no fraction, or that of the OOD sets is given without that of ID."""
    for name, value in metrics.items():
        if name.partition("/")[0] in ("accuracy", "id_accuracy", "ood_accuracy") and not 0 <= value <= 1:
            raise wrong(place, f"{name}: must be a fraction from 0 to 1", value)
    if "ood_accuracy" in metrics and "id_accuracy" not in metrics:
        raise wrong(place, "metrics with ood_accuracy must have id_accuracy", None)


def wrong(place: str, rule: str, value: Any) -> StorageError:
    """Returns the error of a file that holds what it cannot."""
    shown = "" if value is None or isinstance(value, dict | list) else visible(repr(value)[:60])
    return StorageError(Problem(place, visible(rule[:300]), shown, next_step=_STEP))
