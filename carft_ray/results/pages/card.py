"""The verdict card: five lines on what a study has shown, to be pasted into an issue or a paper.

Its numbers and its headline are those of `test`, else of `confirm`, else of `report`; nothing is computed here.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from carft_ray.study.rows import ZERO_SHOT
from carft_ray.untrusted import html, latex, visible
from carft_ray.words import counted, times

FORMS = ("text", "svg", "latex")
ENOUGH_SEEDS = 3  # with two, intervals over seeds are very wide
_WIDTH = 92  # characters of a line of the SVG
_COLOURS = {"pass": "#00735c", "warn": "#b34700"}
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


@dataclass(frozen=True)
class _Evidence:
    """The best measurement that a study has of its winner.

    Attributes:
        label: What was measured.
        sentence: The headline; None without a baseline.
        baseline: Of the headline.
        difference: Interval of the headline's difference; None without a baseline.
        keeps_id: Whether ID is kept against that baseline; None where it is not tested.
        accuracies: ID and OOD mean, in that order, as text with intervals where they are known.
        num_seeds: Fresh seeds; 0: one training each.
        is_new: Whether the images are those of test sets: others have chosen the winner.
    """

    label: str
    sentence: str | None
    baseline: str | None
    difference: Sequence[float] | None
    keeps_id: bool | None
    accuracies: Sequence[str]
    num_seeds: int
    is_new: bool


def verdict(document: Document) -> list[Line]:
    """Returns the five lines: result, accuracies, seeds, test sets, cost.

    Args:
        document: Of ``pages.data.page_document``.
    """
    found = _evidence(document)
    if found is None:
        states = ", ".join(f"{count} {name}" for name, count in document["status"]["trials"].items() if count)
        none = Line("Result", False, f"no trial has finished: {states or 'none has begun'}")
        rest = [Line(label, False, "nothing is measured yet") for label in ("Accuracy", "Seeds")]
        return [none, *rest, _tests(document), _cost(document)]
    return [_result(found), _accuracy(found), _seeds(found), _tests(document), _cost(document)]


def card(lines: Sequence[Line], title: str, form: str) -> str:
    """Returns the card in one of ``FORMS``."""
    return {"text": _text, "svg": _svg, "latex": _latex}[form](lines, title)


def _evidence(document: Document) -> _Evidence | None:
    return _of_comparison(document["test"], True) or _of_comparison(document["confirm"], False) or _of_search(document)


def _of_comparison(found: Document | None, is_new: bool) -> _Evidence | None:
    """Returns what a read of the test sets or a confirm has shown."""
    if found is None:
        return None
    winner = next(row for row in found["rows"] if row["role"] == "winner")
    accuracies = [winner[name] for name in ("id_accuracy", "ood_accuracy") if winner[name]]
    against = next((each for each in found["baselines"] if each["other"] == found["headline_baseline"]), None)
    label = found["label"]
    if found.get("without_shared_images"):
        label += f" (without images of other roles: {_after_name(found['without_shared_images']['headline'])})"
    return _Evidence(
        label,
        found["headline"],
        found["headline_baseline"],
        against and against["objective"]["ends"],
        against and against["keeps_id"],
        [_percent(each["mean"], each["ends"]) for each in accuracies],
        winner["objective"]["num_seeds"] if not is_new or found["confirmed"] else 0,
        is_new,
    )


def _of_search(document: Document) -> _Evidence | None:
    report, best = document["report"], document["status"]["best"]
    if report is None or best is None:
        return None
    against, metrics = report["headline"], best["metrics"]
    names = ("id_accuracy", "ood_accuracy") if document["has_ood"] else ("id_accuracy",)
    objective, label = document["objective"], "measured on the images that chose"
    if objective["pareto"]:
        label += f", by {objective['id_weight']:g} ID + {1 - objective['id_weight']:g} OOD"
    return _Evidence(
        label,
        against and f"{best['name']}: {against['sentence']}",
        against and against["baseline"],
        against and against["ends"],
        None,
        [_percent(metrics[name]) for name in names if name in metrics],
        0,
        is_new=False,
    )


def _result(found: _Evidence) -> Line:
    if found.sentence is None or found.difference is None:
        return Line("Result", False, f"no baseline to compare with; {found.label}")
    text = f"{found.sentence}; {found.label}; 95 %, {_covered(found)}"
    return Line("Result", found.difference[0] > 0 and found.is_new, text)


def _covered(found: _Evidence) -> str:
    """Returns what the intervals cover and what they do not: images, seeds, the choice of the winner."""
    over = f"over {'seeds and images' if found.num_seeds else 'images'}"
    missing = [*([] if found.num_seeds else ["seeds"]), *([] if found.is_new else ["the choice by these images"])]
    return f"{over}; not covered: {', '.join(missing)}" if missing else over


def _accuracy(found: _Evidence) -> Line:
    names = ("ID", "OOD mean")
    text = ", ".join(f"{name} {value} %" for name, value in zip(names, found.accuracies, strict=False))
    if found.baseline is not None:
        kept = {True: "keeps", False: "not shown to keep", None: "not yet tested whether it keeps"}[found.keeps_id]
        text += f"; {kept} the ID accuracy of {_spaced(found.baseline)}"
    if len(found.accuracies) < 2:
        text += "; there is no OOD set"
    return Line("Accuracy", bool(found.keeps_id) and len(found.accuracies) == len(names) and found.is_new, text)


def _seeds(found: _Evidence) -> Line:
    if not found.num_seeds:
        return Line("Seeds", False, "one training each: the luck of the seed is not covered")
    wide = "" if found.num_seeds >= ENOUGH_SEEDS else "; with two, intervals over seeds are very wide"
    return Line("Seeds", not wide, f"{counted(found.num_seeds, 'fresh seed')} of each configuration{wide}")


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
        text += f"; other studies have read these very images {times(len(elsewhere))}: {', '.join(sorted(studies))}"
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
        text += "; what a trainer of your own has chosen on the labelled validation sets is not counted"
    hours = status["budget"]["gpu_hours_used"]
    text += f"; {hours:.3g} GPU hours" if hours else f"; {_time(status['times']['training_s'])} without a GPU"
    is_equal = len(methods) > 1 and len({*methods.values()}) == 1
    return Line("Cost", is_equal and not fixed, text)


def _time(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return counted(round(seconds / 3600, 1), "hour") if seconds >= 3600 else counted(round(seconds / 60), "minute")


def _percent(mean: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * mean:.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _after_name(headline: str | None) -> str:
    return (headline or "").partition(": ")[2]


def _text(lines: Sequence[Line], title: str) -> str:
    width = max(len(line.label) for line in lines)
    rows = [f"[{line.mark}] {line.label:{width}}  {line.text}" for line in lines]
    return visible("\n".join([title, *rows]) + "\n")


def _latex(lines: Sequence[Line], title: str) -> str:
    rows = [rf"    {line.mark} & {latex(line.label)} & {latex(line.text)} \\" for line in lines]
    head = [r"\begin{tabular}{@{}llp{0.75\linewidth}@{}}", rf"    \multicolumn{{3}}{{@{{}}l}}{{{latex(title)}}} \\"]
    return "\n".join([*head, *rows, r"\end{tabular}"]) + "\n"


def _svg(lines: Sequence[Line], title: str) -> str:
    parts, y = [], 34
    for piece in textwrap.wrap(visible(title), _WIDTH):
        parts.append(f'<text x="20" y="{y}" class="title">{html(piece)}</text>')
        y += 22
    y += 8
    for line in lines:
        colour = _COLOURS[line.mark]
        parts += [
            f'<rect x="20" y="{y - 14}" width="48" height="19" rx="4" fill="{colour}"/>',
            f'<text x="44" y="{y}" text-anchor="middle" class="mark">{line.mark}</text>',
            f'<text x="80" y="{y}" class="label">{line.label}</text>',
        ]
        for piece in textwrap.wrap(visible(line.text), _WIDTH):
            parts.append(f'<text x="160" y="{y}">{html(piece)}</text>')
            y += 20
        y += 8
    style = (
        "text{font:14px system-ui,Helvetica,Arial,sans-serif;fill:#1c1c1c}.title{font-weight:600;font-size:16px}"
        ".label{fill:#555}.mark{fill:#fff;font-size:12px;font-weight:600}"
    )
    size = f'width="820" height="{y}" viewBox="0 0 820 {y}"'
    frame = f'<rect x=".5" y=".5" width="819" height="{y - 1}" rx="8" fill="#fff" stroke="#ccc"/>'
    content = "\n".join([f"<style>{style}</style>", frame, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{content}\n</svg>\n'
