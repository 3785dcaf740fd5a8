"""What the functions of ``carft_ray`` return: numbers, and how a terminal and a notebook show them."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.table import Table

from carft_ray import files
from carft_ray.api.studies import Study, rows_table
from carft_ray.errors import CarftError, DataError, Problem, require_choice
from carft_ray.layout import PAGE
from carft_ray.results.reading.study_view import Overview, read_study
from carft_ray.study.training import TrialRow
from carft_ray.ui import console, notebook


@dataclass(frozen=True, repr=False)
class Answer:
    """Numbers with their tables, which ``print`` and a notebook show.

    Attributes:
        recipe_name: Of the study or training.
        numbers: What the command of the same name prints with ``--json``.
        tables: The tables that this command prints.
        lines: The sentences below them.
    """

    recipe_name: str
    numbers: dict[str, Any]
    tables: tuple[Table, ...] = field(compare=False)
    lines: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return notebook.as_text(*self.tables, *self.lines)

    def _repr_html_(self) -> str:
        return notebook.as_html(*self.tables, *self.lines)


@dataclass(frozen=True, repr=False)
class Predicted(Answer):
    """What ``predict`` has done.

    Attributes:
        rows: The answers (columns ``file``, ``class``, ``probability``), if they were not written to a file.
    """

    rows: pa.Table | None = field(default=None, compare=False)

    def check(self) -> None:
        """Raises a ``DataError`` if an image could not be read."""
        numbers = self.numbers
        unreadable = numbers["unreadable"]
        if unreadable:
            value = f"{len(unreadable):,} of {numbers['num_images'] + len(unreadable):,} that are not, such as"
            step = f"The answers of the others are in {numbers['to']}." if numbers["to"] else ""
            rule = "every image must be readable"
            raise DataError(Problem(numbers["images"][0], rule, f"{value} {unreadable[0]['file']}", next_step=step))


@dataclass(frozen=True)
class Searched(Study):
    """The study after a search, for reading; ``print`` and a notebook show its table.

    Attributes:
        numbers: What ``carft-ray search --json`` prints.
        out_of_budget: Which limit of the budget ended the search; empty when all trials are finished.
        set_aside: Trials and baselines whose attempts were lost repeatedly; another search tries them again.
        resume_command: The command for that search.
    """

    numbers: dict[str, Any] = field(repr=False)
    out_of_budget: str = ""
    set_aside: tuple[TrialRow, ...] = ()
    resume_command: str = ""

    @property
    def table(self) -> Table:
        """Baselines, then trials from the best down."""
        return console.trial_table(self.numbers["rows"])

    @property
    def lines(self) -> tuple[str, ...]:
        """The numbers in sentences."""
        budget = self.numbers["budget"]["line"]
        return (*self.numbers["lines"], *([budget] if budget else []))

    def check(self) -> None:
        """Raises a ``MachineError`` with the reasons when trainings were set aside."""
        from carft_ray.launch.cluster.ray_errors import set_aside_error

        if self.set_aside:
            raise set_aside_error(self.set_aside, self.resume_command)

    def __str__(self) -> str:
        return notebook.as_text(self.table, *self.lines)

    def _repr_html_(self) -> str:
        return notebook.as_html(self.table, *self.lines)


@dataclass(frozen=True, repr=False)
class Report:
    """What the best trial of a study is worth. A notebook shows it as the page of the study, ``print`` as text.

    It shows the study at the time of its creation. Only ``save`` writes, and no test set is opened.

    Attributes:
        view: The study.
    """

    view: Overview

    @functools.cached_property
    def numbers(self) -> dict[str, Any]:
        """What ``carft-ray report --json`` prints.

        Raises:
            NoSuccessfulTrialError: No trial has finished.
            HoldOutError: The ledger was changed, so how often the test sets were read is unknown.
            StorageError, DataError: Stored predictions are missing, damaged or of different images.
        """
        from carft_ray.results.report import study_report

        return study_report(self.view)

    @functools.cached_property
    def document(self) -> dict[str, Any]:
        """Everything that the page shows; raises the same errors as ``numbers``, but needs no finished trial."""
        from carft_ray.results.page.data import page_document

        return page_document(self.view)

    @property
    def html(self) -> str:
        """The page, one file that needs no network; raises the same errors as ``document``."""
        return self._page(self.default_path)

    @property
    def default_path(self) -> Path:
        """Path of the page of the study; for a study in a bucket it is in the local copy."""
        return self.view.study_dir / PAGE

    def card(self, form: str = "text", place: str = "form") -> str:
        """Returns the five-line verdict; raises the same errors as ``document``.

        Args:
            form: ``text`` or ``latex``.
            place: Where ``form`` was given, for the message.

        Raises:
            UsageError: ``form`` is neither of these.
        """
        from carft_ray.results.study_card import FORMS, card

        require_choice(place, "must be a form of the card", form, FORMS)
        return card(self.document, form)

    @functools.cached_property
    def tables(self) -> dict[str, pa.Table]:
        """The tables behind the page: ``trials`` and ``baselines`` as ``Study`` has them, ``curves``, ``sets``.

        ``curves`` has a row per measured alpha of a training, ``sets`` one per configuration (or difference) and
        set, with its interval. Raises the same errors as ``document``.
        """
        from carft_ray.results.report import curves_table, sets_table

        own = {"trials": rows_table(self.view.trials), "baselines": rows_table(self.view.all_baselines)}
        return {**own, "curves": curves_table(self.view), "sets": sets_table(self.document["tables"])}

    def save_tables(self, folder: str | Path) -> list[Path]:
        """Writes the tables, each as CSV; returns the paths.

        Raises:
            StorageError: A file cannot be written.
        """
        from carft_ray.results.report import write_tables

        return write_tables(self.tables, Path(folder))

    def save(self, path: str | Path | None = None) -> Path:
        """Writes the page, whole or not at all.

        Args:
            path: The file; None: ``report.html`` in the study.

        Raises:
            StorageError: It cannot be written.
        """
        path = self.default_path if path is None else Path(path)
        files.write_bytes(path, self._page(path).encode())
        return path

    def _page(self, path: Path) -> str:
        from carft_ray.results.page.page import page

        return page(self.view, self.document, path)

    def __repr__(self) -> str:
        try:
            return "\n".join(self.numbers["lines"])
        except CarftError as error:  # to show a report is no place for a traceback
            return str(error)

    def _repr_html_(self) -> str:
        try:
            return notebook.framed(self.html)
        except CarftError as error:  # as above
            return notebook.as_html(str(error))


def report(study: str | Path) -> Report:
    """Returns what the best trial of a study is worth: corrected for selection bias, and against the baselines.

    Reads no test set, writes nothing, and loads neither torch nor Ray; a search may be running.

    Args:
        study: The study directory, or the address of one in a bucket.

    Raises:
        UsageError: It is not a study.
        RecipeError, StorageError: It is damaged, or its bucket cannot be read.
    """
    return Report(read_study(study))
