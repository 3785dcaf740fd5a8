"""The keys of the sampler, which proposes the values of trials, and of the pruner, which cuts trainings.

What each sampler can do is in ``docs/samplers.md``; ``study/proposals`` makes the samplers and decides on cuts.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from carft_ray.recipe.schema.fields import Config, Flag, Fraction, PositiveInt, Resume, Seed, key

CUT = Resume("identity", "it decides which trainings end early; they are compared with earlier trainings")
SAMPLING = Resume("running", "a sampler reads the trials and proposes the next one; it judges none")


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
    """`tpe`, `gp`: number of random trials at the start, at most `search.trials`; null: a quarter of the trials, at
    least 4"""


class TpeSampler(_Starting):
    """Compares where good and bad trials lie."""

    name: Literal["tpe"] = key("tpe", "tpe", SAMPLING)
    """the sampler, which proposes the next values"""
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

    @property
    def percentile(self) -> float:
        """The percentage of the trainings that continues."""
        return 50.0


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
