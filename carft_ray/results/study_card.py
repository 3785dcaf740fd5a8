"""The verdict card: five lines on what a study has shown, to be pasted into an issue or a paper.

Its numbers and its sentences are those of `test`, else of `confirm`, else of the search; nothing is computed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from carft_ray.results import test_summary
from carft_ray.results.evidence import ENOUGH_SEEDS, NO_BASELINE, headline_lines, in_points, later_best, winner_of
from carft_ray.study.ledger import WENT_ON
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.untrusted import latex, visible
from carft_ray.words import counted, times

FORMS = ("text", "latex")
CHOSEN_HERE = "Selection bias is not covered: the search chose the winner on these images."
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
    found = document["test"] or document["confirm"] or (document["report"] or {}).get("evidence")
    if found is not None:
        first = _measured(document, found)
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


def _measured(document: Document, found: Document) -> list[Line]:
    """Returns the lines of the best evidence (``results.evidence``): result, accuracies, seeds."""
    winner = winner_of(found["rows"])
    is_new, more = found["kind"] == "test", (found.get("without_shared_images"), found.get("model"))
    said = headline_lines(found) or [f"{NO_BASELINE}; {found['label']}."]
    said += [line for each in more if each for line in headline_lines(each)]
    said += later_best(found, document["status"]["best"]["name"]) if document["status"]["best"] else []
    said += [] if is_new else [CHOSEN_HERE]
    shown = {"ID": winner["id_accuracy"], "OOD mean": winner["ood_accuracy"]}
    text = ", ".join(f"{name} {in_points(each['mean'], each['ends'])} %" for name, each in shown.items() if each)
    kept = next((gap["keeps_id"] for gap in found["baselines"] if gap["other"] == found["nearest"]), None)
    if kept is not None:
        text += f"; {'keeps' if kept else 'not shown to keep'} the ID accuracy of {found['nearest']}"
    has_ood = winner["ood_accuracy"] is not None
    if not has_ood:
        text += f"; there is no OOD {'test ' if is_new else ''}set"
    is_of_values = found["subject"] == "values"
    return [
        Line("Result", is_of_values and found["shown"], " ".join(said)),
        Line("Accuracy", bool(kept) and has_ood and is_new, text),
        _seeds(winner["seeds"] if is_of_values else 0),
    ]


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
    if (document["test"] or {}).get("read") != number:
        later.append("The last read has not ended: `carft-ray test` continues it.")
    return Line("Test sets", number == 1 and not later, " ".join([f"read {times(number)}.", *later]))


def _cost(document: Document) -> Line:
    """Returns what was spent on whom: only what had trials of its own was tuned.

    It passes if one of the baselines is the best of at least as many trainings as the winner.
    """
    status, methods = document["status"], document["methods"]
    each = [f"{counted(count, 'training')} of {name}" for name, count in methods.items()]
    fixed = [row["name"] for row in status["baselines"] if row["name"] != ZERO_SHOT]
    text = f"tuned with {' and '.join(each)}" if each else "no training has ended"
    if fixed:
        several = len(fixed) > 1
        text += f"; baseline{'s' * several} {' and '.join(fixed)} not tuned: "
        number = len(fixed) + len(document["repeats"])
        text += f"{number} trainings" if document["repeats"] else f"one training{' each' * several}"
    rows = (document["confirm"] or {}).get("rows", ())
    best_of = {row["name"]: row.get("chosen_from", 0) for row in rows}
    for rival in document["rivals"]:
        text += f"; {rival} tuned in a search of its own, the best of {best_of.get(rival, 0)}"
    if "own trainer" in methods:
        text += "; choices of your own trainer on the labelled validation sets are not counted"
    hours = status["budget"]["gpu_hours_used"]
    text += f"; {hours:.3g} GPU hours" if hours else f"; {_time(status['times']['training_s'])} without a GPU"
    winner = next((row["name"] for row in rows if row["role"] == "winner"), "")
    rivals = [best_of.get(gap["other"], 0) for gap in (document["confirm"] or {}).get("baselines", ())]
    return Line("Cost", 0 < best_of.get(winner, 0) <= max(rivals, default=0), text)


def _time(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return counted(round(seconds / 3600, 1), "hour") if seconds >= 3600 else counted(round(seconds / 60), "minute")


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
