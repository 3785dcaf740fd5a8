"""The methods by name: which keys of ``train`` each sets, and which it searches, read from ``methods.toml``.

A method is CE plus penalties that hold the model to the frozen one (``training.other_penalties``), or another way to
begin. It changes its own keys and nothing else of a recipe, so that studies of two methods differ in the method alone.
"""

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carft_ray.errors import Problem, UsageError, require_choice
from carft_ray.recipe.schema.train import PENALTIES, TrainConfig

METHOD = "method"  # in the place of a key: the override that names one
OWN = (*PENALTIES, "penalty_schedule", "teacher", "probe_epochs")  # of ``train``: what tells one method from another


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        words: What it does, for tables.
        source: Who has published it.
        cost: Of a step, in those of plain fine-tuning.
        sets: Values of ``train``; the weights that it names neither here nor in ``start`` are 0.
        start: Values of the weights that it has, where the recipe's own are 0.
        searched: Their ranges, where the recipe has none.
    """

    words: str
    source: str
    cost: str
    sets: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)
    searched: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@functools.cache
def methods() -> dict[str, Method]:
    """Returns all methods by name."""
    with Path(__file__).with_suffix(".toml").open("rb") as file:
        return {name: Method(**values) for name, values in tomllib.load(file).items()}


def with_method(value: Any, name: str, overrides: Sequence[str] = ()) -> Any:
    """Returns what a recipe holds with the keys of a method.

    Every baseline keeps the values of these keys that it has without the method.

    Args:
        value: What the recipe's file holds, with the overrides set.
        name: Of the method.
        overrides: What ``--set`` has set over the recipe.

    Raises:
        UsageError: There is no such method, or an override sets a key of methods.
    """
    require_choice("--method", "must be a method", name, methods())
    keys = {text.partition("=")[0].strip() for text in overrides}
    set_twice = sorted(f"{part}.{own}" for part in ("train", "search.space") for own in OWN if f"{part}.{own}" in keys)
    if set_twice:
        rule = f"cannot be used with --method {name}, which sets it"
        step = "Leave one of them out: the range of a method's weight can also be written in the recipe."
        raise UsageError([Problem(f"--set {key}", rule, next_step=step) for key in set_twice])
    if not isinstance(value, dict):
        return value
    train, search = (part if isinstance(part := value.get(key), dict) else {} for key in ("train", "search"))
    space, baselines = (part if isinstance(part := search.get(key), dict) else {} for key in ("space", "baselines"))
    method, fields = methods()[name], TrainConfig.model_fields
    before = {key: train.get(key, fields[key].default) for key in OWN}
    after = {key: 0 if key in PENALTIES else fields[key].default for key in OWN}
    after |= {**method.sets} | {key: before[key] or start for key, start in method.start.items()}
    kept = {key: one for key, one in before.items() if one != after[key]}
    ranges = {key: space.get(key, one) for key, one in method.searched.items()}
    search = search | {"space": {key: one for key, one in space.items() if key not in OWN} | ranges}
    if baselines:
        search["baselines"] = {
            key: kept | (one or {}) if isinstance(one, dict | None) else one for key, one in baselines.items()
        }
    return value | {"train": train | after, "search": search}
