"""The keys of a search: its parameters, sampler, pruner, constraints and objective.

What each sampler can do is in ``docs/samplers.md``; ``study/proposals`` makes the samplers and decides on cuts.

The violation of a constraint is a difference of fractions: 0 or less if the constraint is met. Measured violations are
among the metrics of a training under ``violation/<name>``. Nothing is measured here.
"""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from carft_ray.recipe.schema.fields import (
    REQUIRED,
    Config,
    Flag,
    Fraction,
    Number,
    PositiveFloat,
    PositiveInt,
    Resume,
    Seed,
    SetName,
    key,
    not_searched,
    nothing_is_empty,
    plain_value,
)
from carft_ray.recipe.schema.train import PENALTIES, TrainConfig, field_kind

_MOST_STEPS = 10**9
# field of train -> why no search space may have it
NOT_SEARCHABLE = {name: why for name, field in TrainConfig.model_fields.items() if (why := not_searched(field))}
SEARCHABLE = tuple(key for key in TrainConfig.model_fields if key not in NOT_SEARCHABLE)
SPACE = Resume("space", "the sampler needs one space; earlier trials inside it still count")
CUT = Resume("identity", "it decides which trainings end early; they are compared with earlier trainings")
SAMPLING = Resume("running", "a sampler reads the trials and proposes the next one; it judges none")
VIOLATION = "violation/"  # before the name of a constraint, in metrics
ID_DROP = "id_drop"
ALPHA = Resume("identity", "part of the choice of alpha")
OBJECTIVE = Resume("identity", "part of the objective")
RANKING = Resume("identity", "ranks the trials")
BEST = Resume("identity", "chooses the best trial")
PROPOSED = Resume("running", "only later proposals")
HOW_FAR = Resume("running", "how far the search goes")
HOW_FAST = Resume("running", "where and how fast trainings run")
# of fields of ``train``; checked where they are applied
Values = Annotated[dict[str, Any], BeforeValidator(nothing_is_empty, json_schema_input_type=TrainConfig)]
Baselines = Annotated[dict[SetName, Values], BeforeValidator(nothing_is_empty)]


def _choices(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values:
        raise ValueError("must be a value of the other parameter, or a list of them")
    return tuple(plain_value(one) for one in values)


Choice = Annotated[bool | int | float | str | None, BeforeValidator(plain_value)]
Choices = Annotated[Any, BeforeValidator(_choices, json_schema_input_type=Choice | list[Choice])]
When = Annotated[dict[str, Choices], BeforeValidator(nothing_is_empty)]


class FloatParameter(Config):
    """A real number between two ends."""

    type: Literal["float"] = key("float", "float", SPACE)
    """kind of the parameter; if left out, it follows from the keys and the field"""
    low: Number = key(REQUIRED, 0.0001, SPACE)
    """lower bound, included; inside the field's own range"""
    high: Number = key(REQUIRED, 0.1, SPACE)
    """upper bound, included"""
    log: Flag = key(False, True, SPACE)
    """draw on a log scale; needs low > 0 and no step"""
    step: PositiveFloat | None = key(None, None, SPACE)
    """distance between the values that are drawn; divides high - low; 1 for an int parameter by default"""
    when: When = key({}, {"head_bias": True}, SPACE)
    """condition: a categorical parameter, and its value or values for which this one is drawn; otherwise the field
    keeps its value in `train`; not for `alpha`"""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _check_ends(self.low, self.high, self.log, self.step)
        return self


class IntParameter(Config):
    """A whole number between two ends, both included; ``FloatParameter`` documents the keys."""

    type: Literal["int"] = key("int", "int", SPACE)
    low: Annotated[int, Field(strict=True)] = key(REQUIRED, 4, SPACE)
    high: Annotated[int, Field(strict=True)] = key(REQUIRED, 16, SPACE)
    log: Flag = key(False, True, SPACE)
    step: PositiveInt = key(1, 2, SPACE)
    when: When = key({}, {"head_bias": True}, SPACE)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _check_ends(self.low, self.high, self.log, None if self.step == 1 else self.step)
        return self


class CategoricalParameter(Config):
    """One of a list of values."""

    type: Literal["categorical"] = key("categorical", "categorical", SPACE)
    choices: Annotated[tuple[Choice, ...], Field(min_length=1)] = key(REQUIRED, [0.05, 0.1], SPACE)
    """the values of a categorical parameter, without duplicates"""
    when: When = key({}, {"head_bias": True}, SPACE)

    @field_validator("choices")
    @classmethod
    def _differ(cls, choices: tuple[Any, ...]) -> tuple[Any, ...]:
        if len({(isinstance(choice, bool), choice) for choice in choices}) < len(choices):
            raise ValueError(f"choices must differ, but got {list(choices)}")
        return choices


def decimal(value: float) -> Decimal:
    """Returns a number as it is written: 0.1 divides 0.9 then, which is not so for floats."""
    return Decimal(str(value))


def _check_ends(low: float, high: float, log: bool, step: float | None) -> None:
    if low > high:
        raise ValueError(f"low <= high must hold, but got low={low}, high={high}")
    if log and low <= 0:
        raise ValueError(f"low > 0 must hold with log: true, but got low={low}")
    if log and step is not None:
        raise ValueError(f"log: true and step exclude each other, but got step={step}")
    if not math.isfinite(high - low):
        raise ValueError(f"high - low must be a finite number, but got low={low}, high={high}")
    if step is not None and (decimal(high) - decimal(low)) / decimal(step) > _MOST_STEPS:
        raise ValueError(f"low to high must have at most {_MOST_STEPS:,} steps, but got step={step}")
    if step is not None and (decimal(high) - decimal(low)) % decimal(step) != 0:
        raise ValueError(f"high - low must be a multiple of step, but got low={low}, high={high}, step={step}")


AnyParameter = FloatParameter | IntParameter | CategoricalParameter
Parameter = Annotated[AnyParameter, Field(discriminator="type")]


def name_types(space: Any) -> Any:
    """Names the type of each parameter that leaves it out: from `choices`, else from the field that it searches."""
    if not isinstance(space, dict):
        return nothing_is_empty(space)
    return {name: _name_type(name, parameter) for name, parameter in space.items()}


def _name_type(name: str, parameter: Any) -> Any:
    if not isinstance(parameter, dict) or "type" in parameter:
        return parameter
    if "choices" in parameter:
        return {"type": "categorical", **parameter}
    return {"type": "int" if field_kind(name) is int else "float", **parameter}


Searched: Any = Literal[SEARCHABLE]
Space = Annotated[
    dict[str, Parameter],
    BeforeValidator(name_types, json_schema_input_type=dict[Searched, AnyParameter]),  # `type` may be left out
]


def named(default: str) -> Callable[[Any], Any]:
    """Returns a function that names the kind of a mapping that leaves its ``name`` out."""
    return lambda value: {"name": default, **(value or {})} if isinstance(value, dict | None) else value


class _Sampler(Config):
    """The sampler, which proposes the next values."""

    seed: Seed = key(
        0, 1, Resume("identity", "choosing a luckier seed is selection on noise; qmc continues its own sequence")
    )
    """seed of the sampler"""


class _Starting(_Sampler):
    startup_trials: PositiveInt | None = key(None, 8, SAMPLING)
    """`tpe`, `gp`: random trials at the start, at most `search.trials`; null: a quarter of the trials, at
    least 4"""


class TpeSampler(_Starting):
    """Compares where good and bad trials lie."""

    name: Literal["tpe"] = key("tpe", "tpe", SAMPLING)
    """which sampler proposes the next values"""
    multivariate: Flag | None = key(None, False, SAMPLING)
    """`tpe`: draws the parameters together; null: true with one objective, false with two"""
    group: Flag = key(False, True, SAMPLING)
    """`tpe`, with conditions: draws those parameters together that occur in the same trials"""
    constant_liar: Flag = key(True, False, SAMPLING)
    """`tpe`: avoids the values of running trials"""
    n_ei_candidates: PositiveInt = key(24, 48, SAMPLING)
    """`tpe`: candidates of which the best is taken"""

    @model_validator(mode="after")
    def _group(self) -> Self:
        if self.group and self.multivariate is False:
            raise ValueError("group: true needs multivariate: true, but got multivariate: false")
        return self


class GpSampler(_Starting):
    """Fits a Gaussian process to the objective."""

    name: Literal["gp"] = key("gp", "gp", SAMPLING)
    deterministic: Flag = key(False, True, SAMPLING)
    """`gp`: assumes an objective without noise"""


class NsgaSampler(_Sampler):
    """A population whose best have children."""

    name: Literal["nsga2"] = key("nsga2", "nsga2", SAMPLING)
    population_size: Annotated[int, Field(ge=2, strict=True)] | None = key(None, 10, SAMPLING)
    """`nsga2`: trials per generation; null: a quarter of the trials, 4 to 50"""
    mutation_prob: Fraction | None = key(None, 0.2, SAMPLING)
    """`nsga2`: probability that a parameter is drawn at random; null: 1 / parameters"""
    crossover_prob: Fraction = key(0.9, 0.5, SAMPLING)
    """`nsga2`: probability that a child has two parents"""
    swapping_prob: Fraction = key(0.5, 0.3, SAMPLING)
    """`nsga2`: probability that a parameter comes from the other parent"""


class QmcSampler(_Sampler):
    """Fills the space evenly, whatever the results."""

    name: Literal["qmc"] = key("qmc", "qmc", SAMPLING)
    type: Literal["sobol", "halton"] = key("sobol", "halton", SAMPLING)
    """`qmc`: the sequence"""
    scramble: Flag = key(True, False, SAMPLING)
    """`qmc`: random shift by the seed; false: the sequence starts in a corner of the space"""


class RandomSampler(_Sampler):
    """Draws at random."""

    name: Literal["random"] = key("random", "random", SAMPLING)


class GridSampler(_Sampler):
    """Tries every point of a space of choices, whole numbers and steps."""

    name: Literal["grid"] = key("grid", "grid", SAMPLING)


AnySampler = TpeSampler | GpSampler | NsgaSampler | QmcSampler | RandomSampler | GridSampler
Sampler = Annotated[
    AnySampler, Field(discriminator="name"), BeforeValidator(named("tpe"), json_schema_input_type=AnySampler)
]


class NoPruner(Config):
    """Every training goes to its end."""

    name: Literal["none"] = key("none", "median", CUT)
    """how a training is compared with the others"""


class _Cutting(Config):
    """Cuts a training that will not be among the best. Shares are of a training's own schedule."""

    first: Annotated[float, Field(gt=0, lt=1, strict=True)] = key(1 / 3, 0.25, CUT)
    """share of the schedule before which no training is cut; the first rung"""


class HalvingPruner(_Cutting):
    """Successive halving without waiting."""

    name: Literal["successive_halving"] = key("successive_halving", "successive_halving", CUT)
    factor: Annotated[int, Field(ge=2, strict=True)] = key(2, 3, CUT)
    """`successive_halving`: one in `factor` trainings continues, and the next rung is `factor` times later"""


class MedianPruner(_Cutting):
    """The best value so far must reach the median."""

    name: Literal["median"] = key("median", "median", CUT)
    startup_trials: PositiveInt = key(4, 8, CUT)
    """`median`, `percentile`: complete trials before any training is cut"""
    percentile: ClassVar[float] = 50.0  # the percentage of the trainings that continues


class PercentilePruner(_Cutting):
    """The best value so far must be among the best of the trainings."""

    name: Literal["percentile"] = key("percentile", "percentile", CUT)
    startup_trials: PositiveInt = key(4, 8, CUT)
    """`median`, `percentile`: complete trials before any training is cut"""
    percentile: Annotated[float, Field(gt=0, lt=100, strict=True)] = key(25.0, 50.0, CUT)
    """`percentile`: this percentage of the trainings, the best ones, continues"""


AnyPruner = NoPruner | HalvingPruner | MedianPruner | PercentilePruner
Pruner = Annotated[
    AnyPruner, Field(discriminator="name"), BeforeValidator(named("none"), json_schema_input_type=AnyPruner)
]


class ConstraintsConfig(Config):
    """What the chosen weights of a trial must keep; part of its choice of alpha, and passed to the sampler."""

    id_drop: Annotated[dict[SetName, Fraction], BeforeValidator(nothing_is_empty)] = key({}, {"zero_shot": 0.01}, ALPHA)
    """ID accuracy that may be lost under `zero_shot` or a baseline; trials wait for it"""


def constraint_names(constraints: ConstraintsConfig) -> tuple[str, ...]:
    """Returns the names of all constraints, ``id_drop/<baseline>``."""
    return tuple(f"{ID_DROP}/{name}" for name in constraints.id_drop)


def violations(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the measured violations among metrics, by the name of the constraint."""
    return {name.removeprefix(VIOLATION): value for name, value in metrics.items() if name.startswith(VIOLATION)}


def total_violation(metrics: Mapping[str, float]) -> float:
    """Returns the sum of the positive parts of the violations among metrics; 0 means that all constraints are met."""
    return sum(max(0.0, value) for value in violations(metrics).values())


def violation_words(metrics: Mapping[str, float]) -> str:
    """Returns which constraints are missed and by how much: ``violates id_drop zero_shot by 0.6 points``; else ''."""
    missed = {name.replace("/", " "): 100 * value for name, value in violations(metrics).items() if value > 0}
    words = [f"{name} by {value:{'.1f' if value >= 0.1 else '.1g'}} points" for name, value in missed.items()]
    return "violates " + " and ".join(words) if words else ""


DEFAULT_GRID = (0.0, 0.2, 0.4, 0.6, 1.0)  # of alphas; .8 more gains nothing (`python -m benchmarks.samplers grids`)


class AlphaConfig(Config):
    """How the mixing coefficient is found."""

    mode: Literal["profile", "sample"] = key("profile", "profile", OBJECTIVE)
    """profile: each trial takes the best of its alpha curve, without further training; sample: alpha is a parameter of
    the space"""
    grid: Annotated[tuple[Fraction, ...], Field(min_length=2)] = key(DEFAULT_GRID, [0, 0.25, 0.5, 0.75, 1], OBJECTIVE)
    """alphas at which the curve is measured, in addition to `lowest`"""
    lowest: Annotated[float, Field(gt=0, le=1, strict=True)] = key(0.1, 0.2, OBJECTIVE)
    """lowest alpha that a trial may choose, always measured; alpha 0 is a baseline"""
    rule: Literal["best", "one_se"] = key("best", "one_se", Resume("running", "at which alpha models are delivered"))
    """alpha of the models that are confirmed, tested and exported. best: the highest objective; one_se: the smallest
    alpha whose objective is lower by at most one standard error of the difference, over images"""

    @property
    def measured(self) -> tuple[float, ...]:
        """The alphas at which every curve is measured, rising: the grid, and the lowest one that may be chosen."""
        there = any(abs(alpha - self.lowest) < 1e-9 for alpha in self.grid)
        return self.grid if there else tuple(sorted((*self.grid, self.lowest)))

    @field_validator("grid")
    @classmethod
    def _rises(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if list(grid) != sorted(set(grid)) or grid[0] != 0 or grid[-1] != 1:
            raise ValueError(f"must rise strictly from 0 to 1, but got {list(grid)}")
        return grid


class ObjectiveConfig(Config):
    """The number that ranks trials, always maximised; ``pareto`` keeps ID and OOD accuracy apart."""

    kind: Literal["weighted_mean", "harmonic", "worst_domain", "pareto"] = key("weighted_mean", "harmonic", RANKING)
    """how ID and OOD accuracy are combined; `pareto`: both as a Pareto front, which needs `alpha.mode: sample`"""
    id_weight: Fraction = key(0.5, 0.3, RANKING)
    """weight of ID accuracy in `weighted_mean`; with `pareto`: its weight in the
    intermediate values of a running training"""
    id_margin: Fraction = key(
        0.005, 0.01, Resume("identity", "the claim of a confirm is fixed before its result is seen")
    )
    """in `confirm` and `test`: the largest loss of ID accuracy, by the 95 % interval, that counts as "keeps ID"; it
    affects no ranking"""
    best: Literal["knee", "lexicographic"] = key("knee", "lexicographic", BEST)
    """with `pareto`: the best trial is the knee of the front, or the highest OOD among points that keep ID"""
    tolerance: Fraction = key(0.005, 0.01, BEST)
    """with `lexicographic`: trials this close to the best ID accuracy are ranked by OOD accuracy"""


class SearchConfig(Config):
    """What is searched and how long."""

    trials: PositiveInt = key(16, 30, HOW_FAR)
    """number of trials, without baselines"""
    space: Space = key({}, {"learning_rate": {"low": 0.0001, "high": 0.005, "log": True}}, SPACE)
    """the search space: fields of `train` marked *; `search` needs at least one"""
    alpha: AlphaConfig = AlphaConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    constraints: ConstraintsConfig = ConstraintsConfig()
    sampler: Sampler = TpeSampler()
    pruner: Pruner = NoPruner()
    enqueue: tuple[Values, ...] = key((), [{"learning_rate": 0.0005, "kl_weight": 10}], PROPOSED)
    """values inside the space to try first, in this order; a parameter left out is drawn; each entry
    counts as a trial"""
    warm_start: tuple[str, ...] = key((), ["../studies/first"], PROPOSED, path_in="study")
    """folders or addresses of other studies whose trials are passed to the sampler; they do not count as trials of this
    study"""
    baselines: Baselines = key(
        {},
        {"fine_tuning": dict.fromkeys(PENALTIES, 0)},
        Resume("identity", "a trained baseline keeps its values; further ones may be added"),
    )
    """by name, values that replace those of `train`; trained before the trials and shown with them, never passed to the
    sampler; any name but `zero_shot`, which is always shown"""
    max_concurrent_trials: PositiveInt | None = key(None, 2, HOW_FAST)
    """trials at a time; null: as many as fit; carft-ray lowers it by one each time that Ray ends a trial that is out of
    memory"""
    repeats: Annotated[float, Field(ge=0, le=0.8, strict=True)] = key(0.0, 0.4, PROPOSED)
    """share of the trials that train earlier values again with another seed, so that luck is averaged out; values that
    may be the best are repeated most, baselines included; 0: none"""
    stop_gain: PositiveFloat | None = key(None, 0.1, HOW_FAR)
    """ends the search before `trials` if 8 more trainings are expected to raise the best expected objective by fewer
    points; null: never"""
    soups: tuple[Literal["repeats", "greedy", "uniform", "model_stock"], ...] = key(
        (), ["repeats", "greedy"], Resume("running", "which soups are made once the trainings have ended")
    )
    """means of the weights of trained models, made and measured when the search ends: of the `repeats` of the best
    values; of the best trainings, `greedy`, `uniform` or by `model_stock`; the best model is exported; []: none"""
    keep_checkpoints: PositiveInt = key(8, 10, Resume("running", "which weights are kept"))
    """number of best trials whose fine-tuned weights are kept, besides all trainings of the best three values, all
    baselines, soups and a Pareto front; all results are kept"""
