"""Which figures the page of a study has: only those that it has the numbers for. ``page.js`` draws them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from carft_ray.study.importance import MIN_TRIALS

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        id: Of its element, and of the function that draws it.
        group: ``Results``, ``Search`` or ``Trust``.
        title: Its title.
        note: What is drawn, for a reader who sees it for the first time.
        is_there: Whether a document has the numbers for it.
        is_wide: Whether it takes the whole width.
    """

    id: str
    group: str
    title: str
    note: str
    is_there: Callable[[Document], bool]
    is_wide: bool = False


def figures(document: Document) -> list[Figure]:
    """Returns the figures that a document has the numbers for, in the order of the page."""
    return [figure for figure in FIGURES if figure.is_there(document)]


def _complete(document: Document) -> list[Mapping[str, Any]]:
    return [row for row in document["trials"] if row["outcome"] == "complete" and row["objective"] is not None]


def _pairs(document: Document) -> bool:
    rows = [*_complete(document), *document["baselines"]]
    return document["has_ood"] and any("ood_accuracy" in row["metrics"] for row in rows)


def _searched(document: Document, at_least: int) -> bool:
    """Returns whether a parameter takes two values over at least so many complete trials."""
    rows = _complete(document)
    if len(rows) < at_least:
        return False
    return any(len({str(row["values"].get(name)) for row in rows}) > 1 for name in document["space"])


def _both_searched(document: Document) -> bool:
    rows = _complete(document)
    numeric = all(document["space"].get(name, {}).get("low") is not None for name in ("learning_rate", "kl_weight"))
    return numeric and len(rows) >= MIN_TRIALS


FIGURES = (
    Figure(
        "front",
        "Results",
        "ID against OOD accuracy",
        "A point per trial at its alpha, both axes on the logit scale. Lines are alpha curves of the best trials, from "
        "zero-shot to fine-tuned; the diamonds on them move with the slider. Up and to the right is better.",
        _pairs,
        is_wide=True,
    ),
    Figure(
        "alphas",
        "Results",
        "Accuracy over alpha",
        "The alpha curves of the best trials, from zero-shot (0) to fine-tuned (1), as measured. Diamonds move with "
        "the slider.",
        lambda document: bool(document["curves"]) and not _pairs(document),
        is_wide=True,
    ),
    Figure(
        "sets",
        "Results",
        "Accuracy per set",
        "The best configuration beside the baselines, on every set. Bars are 95 % intervals, where there are any.",
        lambda document: bool(document["tables"]),
    ),
    Figure(
        "changes",
        "Results",
        "Answers that change",
        "Images of the validation sets that the best trial gets right where it was wrong before (to the right), and "
        "wrong where it was right (to the left).",
        lambda document: bool(document["changes"]),
    ),
    Figure(
        "history",
        "Search",
        "History",
        "The objective of each trial, and the best so far. Crosses at the foot are trials without a result.",
        lambda document: bool(_complete(document)),
        is_wide=True,
    ),
    Figure(
        "slices",
        "Search",
        "Each parameter",
        "The objective over each parameter that was searched. Colour: the alpha that was chosen.",
        lambda document: _searched(document, 2),
        is_wide=True,
    ),
    Figure(
        "importance",
        "Search",
        "Importance of the parameters",
        "How much a parameter decides whether a trial is among the best tenth (PED-ANOVA; shares of 1). What matters "
        "for ID need not matter for OOD.",
        lambda document: bool(document["importance"]),
    ),
    Figure(
        "contour",
        "Search",
        "Learning rate and KL weight",
        "The objective, smoothed over the trials (a kernel of 12 % of each axis). Empty: no trial near.",
        _both_searched,
    ),
    Figure(
        "parallel",
        "Search",
        "Parallel coordinates",
        "A line per trial through its values, its alpha and what came of them. “Top” above leaves the best.",
        lambda document: _searched(document, 3),
        is_wide=True,
    ),
    Figure(
        "pruning",
        "Search",
        "Intermediate values",
        "The objective on a subset of images while a trial trains. Trials that the pruner has cut end with a cross.",
        lambda document: bool(document["status"]["pruner"]) and bool(document["intermediate_values"]),
    ),
    Figure(
        "timeline",
        "Search",
        "Timeline",
        "When each training ran, on the fewest lines. The pattern of a bar says how it ended.",
        lambda document: any(seconds > 0 for _, seconds in document["seconds"].values()),
        is_wide=True,
    ),
    Figure(
        "optimism",
        "Trust",
        "What the best is worth",
        "The number that chose the best trial is too high. Below it: the same number corrected for the choice, and "
        "what fresh seeds and the test sets gave. Test images are others, so their level may differ.",
        lambda document: (document["report"] or {}).get("corrected") is not None,
    ),
    Figure(
        "reliability",
        "Trust",
        "Reliability",
        "Accuracy over confidence of the best trial, in bins of 1/15. Below the diagonal it is too sure. The larger a "
        "mark, the more images.",
        lambda document: bool(document["reliability"]),
        is_wide=True,
    ),
)
