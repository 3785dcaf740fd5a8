"""The recipe as one frozen, validated value. Every key that a user can write is a field, here or in the modules below.

A field holds the type, the range and the default of its key, its meaning, an example, and whether it may change when a
study is resumed (``fields.key``). ``docs/keys.py`` makes of them the tables of ``docs/recipe*.md`` and
``docs/resume.md`` and the JSON schema for editors. Rules that concern several keys are in ``rules.py``.

Units: learning rates are absolute, accuracies are fractions, sizes are pixels, counts are images unless a name says
otherwise.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from carft_ray.recipe.schema.data import DataConfig
from carft_ray.recipe.schema.fields import (
    Config,
    Duration,
    DurationText,
    Flag,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Resume,
    SetName,
    key,
    seconds_of,
)
from carft_ray.recipe.schema.model import ModelConfig, PromptsConfig
from carft_ray.recipe.schema.search import HOW_FAR, HOW_FAST, ConstraintsConfig, SearchConfig
from carft_ray.recipe.schema.train import EvaluateConfig, TrainConfig

LEAST_AMOUNT = 0.0001  # of a resource
TOLD = Resume("running", "who is notified; nothing is computed from it")
Wait = Annotated[NonNegativeFloat, BeforeValidator(seconds_of, json_schema_input_type=NonNegativeFloat | DurationText)]


def _amount(value: float) -> float:
    if 0 < value < LEAST_AMOUNT:
        raise ValueError(f"must be at least {LEAST_AMOUNT}, the least that Ray counts")
    return value


class ResourcesConfig(Config):
    """What one trial gets."""

    executor: Literal["auto", "inline", "ray-train", "debug"] = key("auto", "ray-train", HOW_FAST)
    """auto: one worker runs inline, more run as a Ray Train job; debug: this process, one training after the other,
    without Ray"""
    num_workers: PositiveInt = key(1, 1, HOW_FAST)
    """workers of one trial; 1 with `inline` and `debug`"""
    cpus_per_worker: Annotated[PositiveFloat, AfterValidator(_amount)] | None = key(None, 4, HOW_FAST)
    """CPU cores per worker, at least 0.0001, to decode and crop images; null: 1 without GPUs, else the same share of a
    node's cores as of its GPUs, on the node that has the fewest cores per GPU when the search starts"""
    gpus_per_worker: Annotated[NonNegativeFloat, AfterValidator(_amount)] | None = key(None, 0.5, HOW_FAST)
    """GPUs per worker: a whole number, or with one worker a share of one GPU, at least 0.0001 (with 0.3, three trials
    run on each GPU); null: 1 if the cluster has GPUs, else 0. A worker computes on one GPU: for several see
    `num_workers`"""
    accelerator: SetName | None = key(None, "H100", HOW_FAST)
    """trials run only on nodes with GPUs of this kind (Ray's resource `accelerator_type:H100`); null: on any"""
    wait_for_nodes: Wait | None = key(None, "10m", HOW_FAST)
    """on a cluster (`--address`): how long a command waits at its start for the head, and then for the first nodes on
    which a trial fits; null: without limit if an autoscaler may add nodes, else not at all"""
    threads: PositiveInt | None = key(None, 1, HOW_FAST)
    """threads per worker, to decode and crop images and to compute on a CPU; null: `cpus_per_worker`"""
    targets: Literal["auto", "online", "stored"] = key("auto", "online", HOW_FAST)
    """the frozen model's context distributions; online: computed in every training; stored: the first training that
    needs one keeps it in the cache of its node, and later trainings read it; auto: stored if several trainings share
    them. The numbers are the same"""
    hang_timeout_s: PositiveFloat | None = key(3600.0, 600, HOW_FAST)
    """in a search: after this many seconds without ten training steps, carft-ray ends a trial and tries it again; its
    log says what its threads did; null: never"""

    @property
    def threads_per_worker(self) -> int:
        """Threads of a worker; trials that compete for cores were measured 100 times slower.

        Of a recipe whose ``cpus_per_worker`` is resolved (``launch.workers.runtime``); else 1 where it is null.
        """
        return self.threads or max(1, int(self.cpus_per_worker or 1))


class BudgetConfig(Config):
    """When a search ends, with its best, before its trials are done. Their number is ``search.trials``."""

    wall_time: Duration | None = key(None, "8h", HOW_FAR)
    """time limit of one `search` or `resume`; the search then ends with its best
    trial so far and can be resumed"""
    gpu_hours: PositiveFloat | None = key(None, 24, HOW_FAR)
    """limit on the GPU hours of all attempts of the study, including baselines and confirm; then as with `wall_time`"""


class WandbConfig(Config):
    """Weights & Biases gets a run per training, epoch by epoch; extra ``wandb``."""

    project: SetName | None = key(None, "my_project", TOLD)
    """project for the runs; null: none"""
    entity: SetName | None = key(None, "my_team", TOLD)
    """user or team that owns the project; null: that of the login"""
    offline: Flag = key(False, True, TOLD)
    """keep runs in `tracking/` of the study until `wandb sync` sends them"""


class MlflowConfig(Config):
    """MLflow gets a run per training, epoch by epoch; extra ``mlflow``."""

    experiment: SetName | None = key(None, "my_experiment", TOLD)
    """experiment for the runs; null: none. `MLFLOW_TRACKING_URI` names the server"""


class TrackingConfig(Config):
    """Trackers that are notified of trainings as they run and end. If a tracker fails, carft-ray warns and the search
    continues."""

    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()


class Recipe(Config):
    """Everything about one study. A value of this type is valid."""

    format_version: Literal[1] = key(1, 1, Resume("identity", "the format of the folder"))
    """version of this format"""
    name: SetName = key("study", "my_search", Resume("running", "for people; nothing is computed from it"))
    """name of the study, for people"""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    prompts: PromptsConfig = PromptsConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    search: SearchConfig = SearchConfig()
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    tracking: TrackingConfig = TrackingConfig()


def with_keys(recipe: Recipe, **parts: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with other values of some keys, by the name of their part; the values are not checked."""
    return recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=new) for name, new in parts.items()})


def with_threads(recipe: Recipe, number: int) -> Recipe:
    """Returns the recipe with this number of torch threads per worker."""
    return with_keys(recipe, resources={"threads": number})


def without_tests(recipe: Recipe) -> Recipe:
    """Returns the recipe without its test sets, for code that must not find them."""
    return with_keys(recipe, data={"id_test": None, "ood_test": {}})


def alone(recipe: Recipe) -> Recipe:
    """Returns the recipe of a training that is no trial (a baseline, a fresh seed): free of constraints."""
    return with_keys(recipe, search={"constraints": ConstraintsConfig()})


def single(recipe: Recipe) -> Recipe:
    """Returns the recipe of one training: it searches nothing, and of ``search`` has what the training itself reads."""
    read = {name: getattr(recipe.search, name) for name in ("alpha", "objective", "constraints", "baselines")}
    search = SearchConfig(trials=1).model_copy(update=read)
    return recipe.model_copy(update={"search": search, "budget": BudgetConfig()})
