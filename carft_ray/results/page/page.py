"""The page of a study: one HTML file with everything in it, readable without JavaScript and without a network.

Whatever a study holds, the page runs its own scripts alone and loads nothing: its policy says so to the browser.

It has only the figures that it has the numbers for (``FIGURES``). The template has their titles, and ``page.js`` draws
them, each by a function of its name.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from carft_ray.errors import StorageError
from carft_ray.layout import FOLDERS
from carft_ray.recipe.schema.search import total_violation
from carft_ray.results.figure import rendered, study_figure
from carft_ray.results.reading.study_view import Overview
from carft_ray.results.study_card import verdict
from carft_ray.study.importance import MIN_TRIALS
from carft_ray.untrusted import require_nothing_outside, visible

HERE = Path(__file__).parent
NUM_STATIC = 100  # trials that stand in the page without JavaScript
NAMES = {  # as people read them
    "id_val": "ID (id_val)",
    "id_test": "ID (id_test)",
    "ood_val": "OOD val",
    "ood_mean": "OOD mean",
    "kl_weight": "KL weight",
}
# before the page is drawn
_FIRST = """document.documentElement.className = "js"; try { const t = localStorage.getItem("carft-theme"); \
if (t) document.documentElement.dataset.theme = t; } catch (e) {}"""
_DRAWN = ("id_accuracy", "ood_accuracy")  # metrics of a trial
Document = Mapping[str, Any]


def page(view: Overview, document: Mapping[str, Any], path: Path) -> str:
    """Returns the page as HTML.

    Args:
        view: The study.
        document: Of ``page_document``.
        path: Where it will stand: links to the folders of trainings begin there.

    Raises:
        StorageError: A link leads out of the study: the page shows the ends of logs, and is passed on.
    """
    require_nothing_outside(view.study_dir, StorageError)
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow to import, as the next one
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    filters: dict[str, Callable[..., str]] = {"percent": _percent, "value": _value, "number": _number, "words": _words}
    environment.filters.update(filters)
    groups = figures(document)
    shown = [name for names in groups.values() for name in names]
    base = quote(os.path.relpath(view.study_dir / FOLDERS["trial"], path.resolve().parent))
    picture = ""  # without JavaScript
    if "front" in shown:
        picture = f"data:image/svg+xml;base64,{base64.b64encode(figure_svg(view)).decode()}"
    own = (HERE / "page.js").read_text(encoding="utf-8")
    scripts = {"first": _FIRST, "plotly": get_plotlyjs() if shown else "", "page": own}
    return environment.get_template("page.html.jinja").render(
        doc=document,
        lines=verdict(document),
        groups=groups,
        picture=picture,
        base=base,
        best_rows=_best_rows(document),
        num_static=NUM_STATIC,
        columns=_columns(document),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        policy=_policy(scripts.values()),
        data=embedded({**packed(document), "base": base, "names": NAMES, "figures": shown}),
    )


def _policy(scripts: Iterable[str]) -> str:
    """Returns a Content-Security-Policy: these scripts, styles and pictures in the page, and nothing else."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def packed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the document as the page holds it: of trials what is drawn, by columns; no texts of other commands."""
    metrics = [name for name in _DRAWN if any(name in row["metrics"] for row in document["trials"])]
    kept = ("number", "name", "outcome", "reason", "alpha", "objective", "expected", "elapsed_s")
    values = _columns(document)
    rows = [
        [
            *(row[key] for key in kept),
            total_violation(row["metrics"]),
            *(row["values"].get(name) for name in values),
            *(row["metrics"].get(name) for name in metrics),
        ]
        for row in document["trials"]
    ]
    trials = {"kept": [*kept, "violation"], "values": values, "metrics": metrics, "rows": rows}
    report = document["report"] and {name: value for name, value in document["report"].items() if name != "lines"}
    several = {} if len(document["methods"]) < 2 else document["method_of"]
    left_out = ("recipe", "provenance", "ledger", "shared_images", "changed_images")
    kept_parts = {key: value for key, value in document.items() if key not in left_out}
    return {**kept_parts, "report": report, "trials": trials, "method_of": several}


def embedded(value: Any) -> str:
    """Returns JSON that may stand in a script element."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    """Returns nested content with None for what is no finite number, and texts that steer nothing."""
    if isinstance(value, Mapping):
        return {visible(str(key)): _finite(child) for key, child in value.items()}
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(document: Mapping[str, Any]) -> list[str]:
    """Returns the names of the values that differ between trials, those of the space first."""
    names = dict.fromkeys([*document["space"], *(name for row in document["trials"] for name in row["values"])])
    return [name for name in names if name != "alpha"]


def _best_rows(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the trials that stand in the page without JavaScript: the best, then others in their order."""

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, float, float]:
        value = row["objective"] if row["expected"] is None else row["expected"]
        return not row["best"], value is None, total_violation(row["metrics"]), -(value or 0.0)

    return sorted(document["trials"], key=rank)[:NUM_STATIC]


def figure_svg(view: Overview) -> bytes:
    """Returns the figure of a study, ID against OOD accuracy, as SVG."""
    return rendered(study_figure(view.recipe, view.study_dir, view.trials, view.baselines), "svg")


def _percent(value: float | None, signed: bool = False) -> str:
    return "" if value is None else f"{100 * value:{'+' if signed else ''}.1f}"


def _words(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _value(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


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
        "expected": lambda document: bool(document["expected"]),
        "optimism": lambda document: bool(document["expected"]),
        "reliability": lambda document: bool(document["reliability"]),
    },
}
