"""The verdict card: five lines on what a study has shown, to be pasted into an issue or a paper.

Its numbers and its sentences are those of `test`, else of `confirm`, else of `report`; nothing is computed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from carft_ray.results import test_summary
from carft_ray.results.statistics.intervals import in_points
from carft_ray.results.statistics.paired import headline_line, later_best
from carft_ray.study.ledger import WENT_ON
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.untrusted import latex, visible
from carft_ray.words import counted, times

FORMS = ("text", "latex")
CHOSEN_HERE = "Selection bias is not covered: the search chose the winner on these images."
NO_BASELINE = "no baseline to compare with"
ENOUGH_SEEDS = 3  # with two, intervals over seeds are very wide
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the card.

    Attributes:
        label: What it is about.
        passed: Whether nothing stands against it; else it is a warning.
        text: What was found.
    """

    label: str
    passed: bool
    text: str

    @property
    def mark(self) -> Literal["pass", "warn"]:
        """The mark in a word."""
        return "pass" if self.passed else "warn"


def verdict(document: Document) -> list[Line]:
    """Returns the five lines: result, accuracies, seeds, test sets, cost.

    Args:
        document: Of ``page.data.page_document``.
    """
    measured = next((kind for kind in ("test", "confirm") if document[kind] is not None), None)
    if measured is not None:
        first = _compared(document, document[measured], is_new=measured == "test")
    elif document["report"] is not None:
        first = _searched(document)
    else:
        states = ", ".join(f"{count} {name}" for name, count in document["status"]["trials"].items() if count)
        first = [Line("Result", False, f"no trial has finished: {states or 'none has begun'}")]
        first += [Line(label, False, "nothing is measured yet") for label in ("Accuracy", "Seeds")]
    return [*first, _tests(document), _cost(document)]


def card(document: Document, form: str = "text") -> str:
    """Returns the card of a study in one of ``FORMS``; its document is of ``page.data.page_document``."""
    synthetic = " (synthetic images)" if document["synthetic"] else ""
    title = f"{document['name']}{synthetic}: CAR-FT by carft-ray {document['made']['version']}"
    return {"text": text_card, "latex": latex_card}[form](verdict(document), title)


def _compared(document: Document, found: Document, is_new: bool) -> list[Line]:
    """Returns the lines of a confirm, or of a read of the test sets, whose images are new."""
    winner = next(row for row in found["rows"] if row["role"] == "winner")
    against = next((each for each in found["baselines"] if each["other"] == found["headline_baseline"]), None)
    best, without = document["status"]["best"], found.get("without_shared_images")
    said = [headline_line(found) or f"{NO_BASELINE}; {found['label']}.", *([headline_line(without)] if without else [])]
    said += later_best(found, best["name"]) if best else []
    said += [] if is_new else [CHOSEN_HERE]
    shown = {"ID": winner["id_accuracy"], "OOD mean": winner["ood_accuracy"]}
    numbers = {name: in_points(each["mean"], each["ends"]) for name, each in shown.items() if each}
    is_shown = against is not None and against["objective"]["ends"][0] > 0
    return [
        Line("Result", is_new and is_shown, " ".join(said)),
        _accuracy(numbers, found["headline_baseline"], against and against["keeps_id"], is_new),
        _seeds(winner["objective"]["num_seeds"] if found.get("confirmed", True) else 0),
    ]


def _searched(document: Document) -> list[Line]:
    """Returns the lines of a search that nothing has measured again."""
    against, metrics = document["report"]["headline"], document["status"]["best"]["metrics"]
    shown = {"ID": "id_accuracy", **({"OOD mean": "ood_accuracy"} if document["has_ood"] else {})}
    numbers = {name: f"{100 * metrics[key]:.1f}" for name, key in shown.items() if key in metrics}
    return [
        Line("Result", False, f"{against['line'] if against else NO_BASELINE + '.'} {CHOSEN_HERE}"),
        _accuracy(numbers, against and against["baseline"], None, is_new=False),
        _seeds(0),
    ]


def _accuracy(numbers: Mapping[str, str], baseline: str | None, keeps_id: bool | None, is_new: bool) -> Line:
    text = ", ".join(f"{name} {value} %" for name, value in numbers.items())
    if baseline is not None:
        kept = {True: "keeps", False: "not shown to keep", None: "not yet tested whether it keeps"}[keeps_id]
        text += f"; {kept} the ID accuracy of {_spaced(baseline)}"
    has_ood = len(numbers) > 1
    if not has_ood:
        text += f"; there is no OOD {'test ' if is_new else ''}set"
    return Line("Accuracy", bool(keeps_id) and has_ood and is_new, text)


def _seeds(number: int) -> Line:
    """Returns the line of the seeds; 0: one training each, that of the search."""
    if not number:
        return Line("Seeds", False, "one training each: the effect of the seed is not covered")
    wide = "" if number >= ENOUGH_SEEDS else "; with two, intervals over seeds are very wide"
    return Line("Seeds", not wide, f"{counted(number, 'fresh seed')} of each configuration{wide}")


def _tests(document: Document) -> Line:
    number = document["status"]["ledger"]["test_reads"]
    if not number:
        return Line("Test sets", False, "not read: all numbers are of validation images")
    went_on = sum(entry["purpose"] == WENT_ON for entry in document["ledger"])
    later = [f"The search was continued {times(went_on)} after a read."] if went_on else []
    later += test_summary.lines_of_other_reads((document["test"] or {}).get("elsewhere", ()))
    return Line("Test sets", number == 1 and not later, " ".join([f"read {times(number)}.", *later]))


def _cost(document: Document) -> Line:
    """Returns what was spent on whom: only what had trials of its own was tuned.

    It passes if the winner and the baseline of the headline are the best of equal numbers of trainings.
    """
    status, methods = document["status"], document["methods"]
    each = [f"{counted(count, 'training')} of {_spaced(name)}" for name, count in methods.items()]
    fixed = [_spaced(row["name"]) for row in status["baselines"] if row["name"] != ZERO_SHOT]
    text = f"tuned with {' and '.join(each)}" if each else "no training has ended"
    if fixed:
        several = len(fixed) > 1
        text += f"; baseline{'s' * several} {' and '.join(fixed)} not tuned: one training{' each' * several}"
    rows = (document["confirm"] or {}).get("rows", ())
    best_of = {row["name"]: row.get("chosen_from", 0) for row in rows}
    for rival in document["rivals"]:
        text += f"; {rival} tuned in a search of its own, the best of {best_of.get(rival, 0)}"
    if "own trainer" in methods:
        text += "; choices of your own trainer on the labelled validation sets are not counted"
    hours = status["budget"]["gpu_hours_used"]
    text += f"; {hours:.3g} GPU hours" if hours else f"; {_time(status['times']['training_s'])} without a GPU"
    winner = next((row["name"] for row in rows if row["role"] == "winner"), "")
    against = (document["test"] or document["confirm"] or {}).get("headline_baseline")
    return Line("Cost", 0 < best_of.get(against, 0) == best_of.get(winner), text)


def _time(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return counted(round(seconds / 3600, 1), "hour") if seconds >= 3600 else counted(round(seconds / 60), "minute")


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def text_card(lines: Sequence[Line], title: str) -> str:
    """Returns the card as text, a line per line."""
    width = max(len(line.label) for line in lines)
    rows = [f"[{line.mark}] {line.label:{width}}  {line.text}" for line in lines]
    return visible("\n".join([title, *rows]) + "\n")


def latex_card(lines: Sequence[Line], title: str) -> str:
    """Returns the card as a table of LaTeX."""
    rows = [rf"    {line.mark} & {latex(line.label)} & {latex(line.text)} \\" for line in lines]
    head = [r"\begin{tabular}{@{}llp{0.75\linewidth}@{}}", rf"    \multicolumn{{3}}{{@{{}}l}}{{{latex(title)}}} \\"]
    return "\n".join([*head, *rows, r"\end{tabular}"]) + "\n"
