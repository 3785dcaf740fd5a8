"""The verdict card: five lines on what a study has shown, to be pasted into an issue or a paper.

Its numbers and its headline are those of `test`, else of `confirm`, else of `report`; nothing is computed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from carft_ray.results.statistics.headline import in_points
from carft_ray.results.statistics.paired import later_best
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.untrusted import latex, visible
from carft_ray.words import counted, times

FORMS = ("text", "latex")
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
    found = _evidence(document)
    if found is None:
        states = ", ".join(f"{count} {name}" for name, count in document["status"]["trials"].items() if count)
        none = Line("Result", False, f"no trial has finished: {states or 'none has begun'}")
        rest = [Line(label, False, "nothing is measured yet") for label in ("Accuracy", "Seeds")]
        return [none, *rest, _tests(document), _cost(document)]
    return [_result(found), _accuracy(found), _seeds(found), _tests(document), _cost(document)]


def card(document: Document, form: str = "text") -> str:
    """Returns the card of a study in one of ``FORMS``; its document is of ``page.data.page_document``."""
    synthetic = " (synthetic images)" if document["synthetic"] else ""
    title = f"{document['name']}{synthetic}: CAR-FT by carft-ray {document['made']['version']}"
    return {"text": text_card, "latex": latex_card}[form](verdict(document), title)


def _evidence(document: Document) -> Document | None:
    """Returns the best measurement that a study has of its winner; None before a trial has finished.

    Returns:
        ``label``: what was measured; ``sentence``: the headline, its ``baseline``, the ``ends`` of its difference, and
        ``keeps_id`` against that baseline, each None without a baseline; ``accuracies``: ID and OOD mean, in that
        order, as text with intervals where they are known; ``num_seeds``: fresh seeds, 0: one training each;
        ``is_new``: whether the images are those of test sets: others have chosen the winner.
    """
    return _of_comparison(document, "test") or _of_comparison(document, "confirm") or _of_search(document)


def _of_comparison(document: Document, kind: str) -> Document | None:
    """Returns what a read of the test sets or a confirm has shown."""
    found, best, is_new = document[kind], document["status"]["best"], kind == "test"
    if found is None:
        return None
    winner = next(row for row in found["rows"] if row["role"] == "winner")
    against = next((each for each in found["baselines"] if each["other"] == found["headline_baseline"]), None)
    label = found["label"]
    if found.get("without_shared_images"):
        headline = found["without_shared_images"]["headline"] or ""
        label += f" (without images of other roles: {headline.partition(': ')[2]})"
    if best is not None:
        label += "".join(f" ({line})" for line in later_best(found, best["name"]))
    return {
        "label": label,
        "sentence": found["headline"],
        "baseline": found["headline_baseline"],
        "ends": against and against["objective"]["ends"],
        "keeps_id": against and against["keeps_id"],
        "accuracies": [
            in_points(winner[name]["mean"], winner[name]["ends"])
            for name in ("id_accuracy", "ood_accuracy")
            if winner[name]
        ],
        "num_seeds": winner["objective"]["num_seeds"] if not is_new or found["confirmed"] else 0,
        "is_new": is_new,
    }


def _of_search(document: Document) -> Document | None:
    report, best = document["report"], document["status"]["best"]
    if report is None or best is None:
        return None
    against, metrics = report["headline"], best["metrics"]
    names = ("id_accuracy", "ood_accuracy") if document["has_ood"] else ("id_accuracy",)
    objective, label = document["objective"], "measured on the images used for selection"
    if objective["pareto"]:
        label += f", by {objective['id_weight']:g} ID + {1 - objective['id_weight']:g} OOD"
    return {
        "label": label,
        "sentence": against and f"{best['name']}: {against['sentence']}",
        "baseline": against and against["baseline"],
        "ends": against and against["ends"],
        "keeps_id": None,
        "accuracies": [f"{100 * metrics[name]:.1f}" for name in names if name in metrics],
        "num_seeds": 0,
        "is_new": False,
    }


def _result(found: Document) -> Line:
    if found["sentence"] is None:
        return Line("Result", False, f"no baseline to compare with; {found['label']}")
    covered = f"over {'seeds and images' if found['num_seeds'] else 'images'}"
    missing = [
        *([] if found["num_seeds"] else ["seeds"]),
        *([] if found["is_new"] else ["the selection on these images"]),
    ]
    if missing:
        covered += f"; not covered: {', '.join(missing)}"
    text = f"{found['sentence']}; {found['label']}; 95 %, {covered}"
    return Line("Result", found["ends"][0] > 0 and found["is_new"], text)


def _accuracy(found: Document) -> Line:
    names = ("ID", "OOD mean")
    text = ", ".join(f"{name} {value} %" for name, value in zip(names, found["accuracies"], strict=False))
    if found["baseline"] is not None:
        kept = {True: "keeps", False: "not shown to keep", None: "not yet tested whether it keeps"}[found["keeps_id"]]
        text += f"; {kept} the ID accuracy of {_spaced(found['baseline'])}"
    has_ood = len(found["accuracies"]) == len(names)
    if not has_ood:
        text += f"; there is no OOD {'test ' if found['is_new'] else ''}set"
    return Line("Accuracy", bool(found["keeps_id"]) and has_ood and found["is_new"], text)


def _seeds(found: Document) -> Line:
    number = found["num_seeds"]
    if not number:
        return Line("Seeds", False, "one training each: the effect of the seed is not covered")
    wide = "" if number >= ENOUGH_SEEDS else "; with two, intervals over seeds are very wide"
    return Line("Seeds", not wide, f"{counted(number, 'fresh seed')} of each configuration{wide}")


def _tests(document: Document) -> Line:
    ledger = document["status"]["ledger"]
    if not ledger["test_reads"]:
        return Line("Test sets", False, "not read: all numbers are of validation images")
    text = f"read {times(ledger['test_reads'])}"
    went_on = sum(entry["purpose"] == "search went on" for entry in document["ledger"])
    if went_on:
        text += f"; the search was continued {times(went_on)} after a read"
    elsewhere = (document["test"] or {}).get("elsewhere", ())
    if elsewhere:
        studies = {read["study"] for read in elsewhere}
        text += f"; other studies have also read these images {times(len(elsewhere))}: {', '.join(sorted(studies))}"
    return Line("Test sets", ledger["test_reads"] == 1 and not went_on and not elsewhere, text)


def _cost(document: Document) -> Line:
    """Returns what was spent on whom: only what had trials of its own was tuned."""
    status, methods = document["status"], document["methods"]
    each = [f"{counted(count, 'training')} of {_spaced(name)}" for name, count in methods.items()]
    fixed = [_spaced(row["name"]) for row in status["baselines"] if row["name"] != ZERO_SHOT]
    text = f"tuned with {' and '.join(each)}" if each else "no training has ended"
    if fixed:
        several = len(fixed) > 1
        text += f"; baseline{'s' * several} {' and '.join(fixed)} not tuned: one training{' each' * several}"
    if document["rivals"]:
        text += f"; {', '.join(document['rivals'])} tuned in a search of its own"
    if "own trainer" in methods:
        text += "; choices of your own trainer on the labelled validation sets are not counted"
    hours = status["budget"]["gpu_hours_used"]
    text += f"; {hours:.3g} GPU hours" if hours else f"; {_time(status['times']['training_s'])} without a GPU"
    is_equal = len(methods) > 1 and len({*methods.values()}) == 1
    return Line("Cost", is_equal and not fixed, text)


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
