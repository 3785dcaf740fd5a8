"""Two trainings compared: what differs in their recipes and origin, and how far apart their numbers are. No torch.

Differences are paired image by image, where both were measured on the very same images.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from carft_ray.errors import DataError
from carft_ray.evaluation.objective import ID_SET, objective_spec
from carft_ray.evaluation.predictions import correct, sample_ids, select
from carft_ray.recipe.schema.data import CACHE_KEYS
from carft_ray.recipe.schema.recipe import alone, single
from carft_ray.results.evidence import differences as gaps_between
from carft_ray.results.reading.finished import Finished, open_finished, split_target
from carft_ray.results.statistics.images import with_images
from carft_ray.results.statistics.intervals import Interval
from carft_ray.study.place import named
from carft_ray.study.provenance import differences

ORIGIN = ("data", "model", "classes", "class_names", "templates", "augmentation", "code", "versions", "hardware")
WHAT = {ID_SET: "id_accuracy", "ood_accuracy": "ood_accuracy", "objective": "objective"}  # a set has its own name
ENVIRONMENT = ("torch", "device", "threads", "num_workers", "commit", "dirty", "source", "function_source")


def compare(a: str, b: str) -> dict[str, Any]:
    """Compares two trainings.

    Args:
        a: ``DIR`` (the best trial of a study) or ``DIR:TRIAL``.
        b: The other one, in the same form.

    Returns:
        ``a`` and ``b`` (``name``, ``folder``, ``trial``, ``alpha``, ``objective``), ``recipe`` and ``origin``
        (``key``, ``a``, ``b``), ``rows`` (``what``, ``a``, ``b``, ``difference`` = a - b, ``low``, ``high``:
        fractions; None where they are not comparable), ``reasons`` why not, by name, and ``words``: what the intervals
        are over.

    Raises:
        UsageError, NoSuccessfulTrialError, StorageError: As ``open_finished``.
    """
    first, second = (open_finished(*split_target(written)) for written in (a, b))
    recipes = [single(alone(each.recipe)).model_dump(mode="json") for each in (first, second)]  # not of their searches
    for recipe in recipes:
        recipe["data"] = {key: value for key, value in recipe["data"].items() if key not in CACHE_KEYS}
    tables = (first.predictions(), second.predictions())
    pairs, reasons = _pairs(first, second, tables)
    found = _intervals(first, second, tables[0], pairs, reasons)
    left, right = _values(first), _values(second)
    rows = []
    for what in {**left, **right}:
        difference, low, high = (found[what].mean, *found[what].ends) if what in found else (None, None, None)
        numbers = {"a": left.get(what), "b": right.get(what), "difference": difference, "low": low, "high": high}
        rows.append({"what": what, **numbers})
    return {
        "a": _side(first),
        "b": _side(second),
        "recipe": _listed(recipes[0], recipes[1]),
        "origin": _listed(origin(first), origin(second)),
        "rows": rows,
        "reasons": reasons,
        "words": next(iter(found.values())).words if found else None,
    }


def _side(finished: Finished) -> dict[str, Any]:
    return {
        "name": finished.title,
        "folder": named(finished.folder),
        "trial": finished.name,
        "alpha": finished.result["alpha"],
        "objective": finished.result["objective"],
    }


def _listed(a: Any, b: Any) -> list[dict[str, Any]]:
    return [{"key": key, "a": left, "b": right} for key, left, right in differences(a, b)]


def origin(finished: Finished) -> dict[str, Any]:
    """Returns where a training's numbers come from: the study's part, and the training's own."""
    own, kept = finished.result.get("environment", {}), finished.provenance
    if finished.is_zero_shot:  # measured when its study was begun
        own = {**kept.get("versions", {}), **kept.get("preparation", {}), **kept.get("code", {}), "num_workers": 1}
    ran_on = (own.get("source"), own.get("torch"))  # by which later searches are told apart
    later = [
        each
        for each in kept.get("history", [])
        if (each["code"].get("source"), each["versions"].get("torch")) == ran_on
    ]
    shared = {key: value for key, value in {**kept, **(later or [{}])[-1]}.items() if key in ORIGIN}
    if own:  # what the training itself ran on replaces what its study was begun with
        shared.pop("code", None)
    return {**shared, "training": {key: own[key] for key in ENVIRONMENT if key in own}}


def _values(finished: Finished) -> dict[str, float]:
    """Returns the numbers that are compared, by name: objective, ID, OOD mean, each OOD set; measured at alpha."""
    metrics = finished.result["metrics"]
    names = ["objective", "id_accuracy", "ood_accuracy", *(f"accuracy/{name}" for name in finished.recipe.data.ood_val)]
    return {name: metrics[name] for name in names if name in metrics}


def _pairs(
    a: Finished, b: Finished, tables: tuple[pa.Table, pa.Table]
) -> tuple[dict[str, tuple[Any, Any]], dict[str, str]]:
    """Returns per set which images each classifies right, bool [N] twice, and why a set cannot be compared."""
    pairs, reasons = {}, {}
    sets = [(ID_SET, *each.recipe.data.ood_val) for each in (a, b)]
    for name in dict.fromkeys([*sets[0], *sets[1]]):
        if name not in sets[0] or name not in sets[1]:
            reasons[name] = f"only {(a if name in sets[0] else b).title} has this set"
            continue
        digests = [each.provenance.get("data", {}).get(name, {}).get("digest") for each in (a, b)]
        if None not in digests and digests[0] != digests[1]:
            reasons[name] = f"the contents of the images differ: digest {digests[0][:12]} and {digests[1][:12]}"
            continue
        try:
            places = [(table, name, float(each.result["alpha"])) for table, each in zip(tables, (a, b), strict=True)]
            if not _images(*places[0]).equals(_images(*places[1])):
                reasons[name] = "the images or their labels differ"
                continue
            pairs[name] = (correct(*places[0]), correct(*places[1]))
        except DataError as error:
            reasons[name] = error.problems[0].rule
    return pairs, reasons


def _images(table: pa.Table, name: str, alpha: float) -> pa.Table:
    """Returns sample ids and labels, ordered by sample id."""
    return select(table, name, alpha).select(["sample_id", "label"]).sort_by("sample_id")


def _intervals(
    a: Finished, b: Finished, table: pa.Table, pairs: Mapping[str, tuple[Any, Any]], reasons: dict[str, str]
) -> dict[str, Interval]:
    """Returns the paired interval of every number that can be compared; adds why the others cannot."""
    specs = [objective_spec(each.recipe) for each in (a, b)]
    ids = {name: sample_ids(table, name, float(a.result["alpha"])) for name in specs[0].sets if name in pairs}
    specs[0] = with_images(specs[0], a.recipe, ids)
    left, right = ({name: pair[side][None] for name, pair in pairs.items()} for side in (0, 1))
    found = {WHAT.get(name, f"accuracy/{name}"): gap for name, gap in gaps_between(specs[0], left, right).items()}
    if {*specs[0].ood_sets} != {*specs[1].ood_sets}:
        reasons["ood_accuracy"] = "it is the mean of other sets"
    defined = [
        (spec.kind, spec.id_weight if spec.kind == "weighted_mean" else None, {*spec.ood_sets}) for spec in specs
    ]
    if defined[0] != defined[1]:
        reasons["objective"] = "the recipes define it differently"
    elif missing := [name for name in specs[0].sets if name not in pairs]:
        reasons["objective"] = f"it needs all its sets, and {', '.join(missing)} cannot be compared"
    return {what: gap for what, gap in found.items() if what not in reasons}
