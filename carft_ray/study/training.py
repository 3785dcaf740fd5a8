"""A training of a study: an attempt, the row of the tables, a failure, a cut, and files checked by their hash."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from carft_ray import files, untrusted
from carft_ray.errors import CarftError, DivergedError, Problem, StorageError
from carft_ray.layout import ATTEMPT, COMMITS, FOLDERS, LOG, PREDICTIONS, RESULT
from carft_ray.recipe.schema.search import total_violation
from carft_ray.store.attempt_files import append_log, read_result, sha256
from carft_ray.study import typed
from carft_ray.study.typed import Outcome

Kind = Literal["trial", "baseline", "confirm", "soup"]
_MOST_PREDICTIONS = 2**32  # bytes; ``evaluation.predictions`` reads no more


@dataclass(frozen=True)
class TrialSpec:
    """One attempt at a training of a study.

    Attributes:
        kind: A trial of the search, a baseline, a training with a fresh seed that confirms one of them, or a mean of
            the weights of such (``study.soups``), which is a training without steps.
        number: Its number in the Optuna study of its kind.
        name: Name of its folder: ``t0007-3f9c``, the baseline's name, or either with ``-seed<seed>``.
        values: Values over the recipe's ``train``; none of a soup.
        attempt: Counts from 1; each lost or stopped attempt is followed by another one, which resumes.
        references: ID accuracies with which its constraints compare, by baseline.
        fits: What the study knows of micro-batches, by device (``launch.workers.micro_batch``).
        soup: What a soup is made of (``typed.Soup``); None of others.
    """

    kind: Kind
    number: int
    name: str
    values: dict[str, Any]
    attempt: int
    references: dict[str, float] = field(default_factory=dict, compare=False, kw_only=True)
    fits: dict[str, int] = field(default_factory=dict, compare=False, kw_only=True)
    soup: dict[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raises a ``StorageError`` when no folder may have the name."""
        require_name(self.name)

    @property
    def training(self) -> str:
        """The folder of the training within the study, which names it."""
        return f"{FOLDERS[self.kind]}/{self.name}"

    @property
    def called(self) -> str:
        """What `--trial` takes for it: its name, of a fresh seed or a soup with its folder."""
        return self.name if self.kind in ("trial", "baseline") else self.training

    def folder(self, study_dir: Path) -> Path:
        """Returns the folder of the training."""
        return study_dir / self.training

    def place(self, study_dir: Path) -> Path:
        """Returns the folder of the attempt."""
        return study_dir / self.attempt_name

    @property
    def attempt_name(self) -> str:
        """The folder of the attempt within the study."""
        return f"{self.training}/{ATTEMPT}{self.attempt}"


@dataclass(frozen=True)
class TrialRow(TrialSpec):
    """A training as tables show it, with its last attempt. Accuracies and objective are fractions.

    Attributes:
        elapsed_s: Seconds of training and evaluation; those of earlier attempts are included.
        at_chance: The fine-tuned weights, alpha 1, are not shown to be above chance; of zero-shot: it is not.
        outside: The search space has changed since, and the sampler no longer uses this trial.
        digest: Of a complete training, the SHA-256 of its ``result.json``; empty of the zero-shot model.
        points: ``alpha`` and metrics of each point of its curve that may be chosen; of trials and baselines. With
            ``expected`` the row stands at the alpha of its values: ``alpha``, ``objective`` and ``metrics``.
        repeat_of: The first training of the same values, which this one repeats with another seed; empty for none.
        expected: What a training of its values with a new seed is expected to measure (``study.expected``), a fraction.
        order: What the best values have least of, where that is known.
        standing: Of a Pareto search: 2 for the training that holds the best point, 1 for others with a point on the
            front. These stand at that point: ``alpha``, ``objective`` and ``metrics`` are its own (``pareto_front``).
    """

    outcome: Outcome
    reason: str = ""
    objective: float | None = None
    alpha: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    started: datetime | None = None
    elapsed_s: float | None = None
    outside: bool = False
    digest: str = ""
    points: tuple[dict[str, float], ...] = ()
    repeat_of: str = ""
    expected: float | None = None
    order: tuple[float, float, float] | None = None
    standing: int = 0
    intermediate_values: dict[int, float] = field(default_factory=dict)  # percent of schedule -> objective
    at_chance: bool = False
    set_aside: bool = False  # left to the next search: its attempts were lost without advancing; see ``reason``
    spent_s: float = 0.0  # of all attempts, with what Ray takes to start them
    gpu_s: float = 0.0  # GPUs x seconds of all attempts
    has_ended: bool = False  # its last attempt: it has a time in the log

    @property
    def is_open(self) -> bool:
        """Whether its last attempt may run: it has begun, and has not ended as far as the log says."""
        return self.outcome == "running" and self.attempt > 0 and not self.has_ended

    @cached_property
    def violation(self) -> float:
        """By how much all constraints are missed together; 0 when they are met."""
        return total_violation(self.metrics)


@dataclass(frozen=True)
class Failure:
    """How an attempt ended that did not end well; its worker posts it.

    Attributes:
        outcome: ``diverged`` and ``error`` are verdicts on the values. ``lost`` is none: a worker, node, connection,
            device or disk failed, and another attempt follows. ``memory`` is none: the micro-batch was too large for
            the device, and the next attempt takes a smaller one. ``fatal`` is none: disk, data or recipe are at fault
            and every other trial would end the same way, so the search stops.
        reason: One line.
        attempt: The attempt that failed.
        exit_code: Of the error.
        details: A traceback for the log; of ``lost`` those of the workers that were left.
        device: Of a shortage of memory: the key under which the study notes what fits (``launch.workers.micro_batch``).
        fits: Of ``memory``: the micro-batch that may fit there; else 0, and what was noted is void.
        node: Of ``lost``: Ray's name of the node that failed; empty where it is not known.
    """

    outcome: Literal["diverged", "error", "lost", "memory", "fatal"]
    reason: str
    attempt: int
    exit_code: int = 1
    details: str = ""
    node: str = ""
    device: str = ""
    fits: int = 0


@dataclass(frozen=True)
class Cut:
    """The pruner's decision; whatever attempt comes later, the training stays cut.

    Attributes:
        attempt: The attempt that was evaluated.
        percent: Of its schedule.
        reason: One line.
    """

    attempt: int
    percent: int
    reason: str


def require_name(name: Any, place: str = f"{COMMITS}/") -> None:
    """Raises a ``StorageError`` unless what a file of a study calls a training may be the name of a folder.

    Args:
        name: What the file has.
        place: The file, for the message.
    """
    if not isinstance(name, str) or not untrusted.is_name(name):
        rule = "a training must have a name of letters, digits and . _ - (at most 200), the same as its folder"
        step = "carft-ray has not written this. Nothing was changed; take the study from a source that you trust."
        raise StorageError(Problem(place, rule, untrusted.visible(repr(name)), next_step=step))


def result_of(study_dir: Path, row: TrialRow) -> dict[str, Any]:
    """Returns the result of a complete training, as the study has it; empty of another one, or the zero-shot model.

    Raises:
        StorageError: It is missing, or not the one that the study has recorded.
    """
    if row.outcome != "complete" or not row.digest:
        return {}
    files.inside(study_dir, f"{row.attempt_name}/{RESULT}")
    found = read_result(row.place(study_dir))
    place = row.place(study_dir) / RESULT
    if found is None or found[1] != row.digest:
        raise StorageError(_not_recorded(place))
    content = typed.checked(typed.Result, found[0], str(place))
    if (said := content.get("files", {}).get(PREDICTIONS, {}).get("bytes", 0)) > _MOST_PREDICTIONS:
        raise typed.wrong(str(place), f"files.{PREDICTIONS}.bytes: must be at most {_MOST_PREDICTIONS:,}", said)
    for metrics in (content["metrics"], *(content.get("curve") or ())):
        typed.check_accuracies(metrics, str(place))
    if any("alpha" not in point for point in content.get("curve") or ()):
        raise typed.wrong(str(place), "each point of the curve must have its alpha", None)
    return content


def file_of(study_dir: Path, row: TrialRow, name: str) -> Path:
    """Returns where a file of a complete training is, once its content is known to be that of its result.

    Args:
        study_dir: The study directory.
        row: The training.
        name: Its name (``layout.OF_RESULT``). Whether it is there is for the caller to find out.

    Raises:
        StorageError: It is another one, or so is the result.
    """
    path = files.inside(study_dir, f"{row.attempt_name}/{name}")
    recorded = result_of(study_dir, row).get("files", {}).get(name)
    if files.exists(path) and (recorded is None or not _is_recorded(path, recorded)):
        raise StorageError(_not_recorded(path))
    return path


def _is_recorded(path: Path, recorded: Mapping[str, Any]) -> bool:
    with files.writing(path):
        return bool(path.stat().st_size == recorded["bytes"]) and sha256(path) == recorded["sha256"]


def _not_recorded(path: Path) -> Problem:
    step = "Restore it from a copy; no command changes a finished training."
    value = "another one" if files.exists(path) else "none"
    return Problem(str(path), "must be the file that the study has recorded", value, next_step=step)


def log_failure(folder: Path, failure: Failure) -> None:
    """Appends a failure with its details to the log of its training.

    Raises:
        StorageError: The log cannot be written.
    """
    append_log(folder, f"attempt {failure.attempt}: {failure.outcome}: {failure.reason}\n{failure.details.rstrip()}")


def failure_error(failure: Failure, place: str, folder: Path) -> CarftError:
    """Returns the error that a worker met, with its exit code, for the one who waits in the driver."""
    kind = DivergedError if failure.outcome == "diverged" else CarftError
    error = kind(Problem(place, failure.reason, next_step=f"Details are in {folder / LOG}."))
    error.exit_code = failure.exit_code
    return error
