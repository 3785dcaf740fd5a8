"""Which figures the page of a study has: only those that it has the numbers for.

The template has their titles, and ``page.js`` draws them, each by a function of its name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from carft_ray.study.importance import MIN_TRIALS

Document = Mapping[str, Any]


def figures(document: Document) -> dict[str, list[str]]:
    """Returns the names of the figures that a document has the numbers for, by part of the page, in its order."""
    return {
        part: [name for name, is_there in several.items() if is_there(document)] for part, several in FIGURES.items()
    }


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


FIGURES: dict[str, dict[str, Callable[[Document], bool]]] = {
    "Results": {
        "front": _pairs,
        "alphas": lambda document: bool(document["curves"]) and not _pairs(document),
        "sets": lambda document: bool(document["tables"]),
        "changes": lambda document: bool(document["changes"]),
    },
    "Search": {
        "history": lambda document: bool(_complete(document)),
        "slices": lambda document: _searched(document, 2),
        "importance": lambda document: bool(document["importance"]),
        "contour": _both_searched,
        "parallel": lambda document: _searched(document, 3),
        "pruning": lambda document: bool(document["status"]["pruner"]) and bool(document["intermediate_values"]),
        "timeline": lambda document: any(seconds > 0 for _, seconds in document["seconds"].values()),
    },
    "Trust": {
        "optimism": lambda document: (document["report"] or {}).get("corrected") is not None,
        "reliability": lambda document: bool(document["reliability"]),
    },
}
