"""The recipe as one frozen, validated value. Every field that a user can write stands here, with its rule.

Units: learning rates are absolute, accuracies are fractions, sizes are pixels, counts are images unless a name says
otherwise. The keys are described for users in ``search_spaces/README.md``; a test holds the two together.
"""

import re
from decimal import Decimal
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

FORMAT_VERSION = 1


def _nothing_is_empty(value: Any) -> Any:
    """A key with nothing behind it (every line under it is a comment) is an empty mapping."""
    return {} if value is None else value


def _plain_value(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be a number, a text, true, false or null")
    return value


def _templates(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(template, str) for template in value):
        raise ValueError("must be the name of a set of templates, file:PATH, or a list of texts with {}")
    return tuple(value)


def _words(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise ValueError("must be the name of a benchmark or a list of texts")
    return tuple(value)


def _choices(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values:
        raise ValueError("must be a value of the other parameter, or a list of them")
    return tuple(_plain_value(one) for one in values)


def seconds_of(value: Any) -> Any:
    """Reads 90, '90s', '45m', '8h', '1h30m' as seconds."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value.strip())
    if found is None or not any(found.groups()):
        raise ValueError("must be seconds, or a text such as 45m, 8h or 1h30m")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


# Strict: true is no number, '3' is no number, 1 is not true.
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
FolderName = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]
ClassName = Annotated[str, Field(pattern=r"^[^\x00]+$")]  # 'F/A-18' is one
TemplateSet = Literal["sandbox", "simple", "openai"]
# ImageNet-C's fifteen, then its four extra ones
Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    "speckle_noise", "gaussian_blur", "spatter", "saturate",
]  # fmt: skip


class Part(BaseModel):
    """Base of every part of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return _nothing_is_empty(value)


class ModelPart(Part):
    """Which CLIP to start from."""

    name: str = "sandbox"  # 'sandbox', or a model name of open_clip
    pretrained: str | None = None  # tag of open_clip, or path of a weights file; None for the sandbox


class SandboxSet(Part):
    """A set of procedural images: one domain, every class equally often."""

    source: Literal["sandbox"]
    domain: str  # checked against the list of sandbox domains
    split: Literal["train", "val", "test"]  # other split, other images
    num_per_class: Count


def _interval(value: Any) -> Any:
    ends = tuple(value) if isinstance(value, list | tuple) else ()
    if len(ends) != 2 or not all(type(end) in (int, float) and 0 <= end <= 1 for end in ends) or ends[0] >= ends[1]:
        raise ValueError("must be two fractions [from, to] with 0 <= from < to <= 1")
    return tuple(float(end) for end in ends)


def _sample_ids(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    ids = tuple(value) if isinstance(value, list | tuple) else ()
    if not ids or not all(type(one) is int and 0 <= one < 2**64 for one in ids):
        raise ValueError(
            "must be a list of sample ids (whole numbers from 0 to 2**64 - 1), or the path of a file of them"
        )
    return ids


# sample ids, or the path of a text file with one per line or of a CSV file with a column sample_id
SampleIds = Annotated[tuple[int, ...] | str, BeforeValidator(_sample_ids)]


class StoredSet(Part):
    """What every set of stored images has: where it lies, and which of its images belong to it."""

    path_keys: ClassVar[tuple[str, ...]] = ("path", "exclude")  # whose texts are paths

    path: str  # a relative path counts from the recipe's folder
    # images whose fraction, a hash of the sample id, lies in [from, to): disjoint parts share no image
    part: Annotated[tuple[float, float], BeforeValidator(_interval)] | None = None
    shots: Count | None = None  # images per class, by a hash of seed and sample id; fewer are among more
    shots_seed: Seed = 0
    classes: Literal["all", "some"] = "all"  # 'some': images of part of the class list, told apart among those only
    on_bad_image: Literal["fail", "skip"] = "fail"  # an image that cannot be decoded
    exclude: SampleIds | None = None  # images that are left out, after part and shots


class FolderSet(StoredSet):
    """Images in a tree ``path/domain/class/*.png|jpg``, or ``path/class/*`` without domains."""

    source: Literal["folder"]
    # folders of the tree that belong to the set; None: the classes stand at the root
    domains: Annotated[tuple[FolderName, ...], Field(min_length=1)] | None = None


def _class_names(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    names = tuple(value) if isinstance(value, list | tuple) else ()
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("must be a list of texts, or the path of a text file with one name per line")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"must not hold a name twice, but got {', '.join(twice)}")
    return names


# names of the classes by the numbers of the labels, or the path of a text file with one per line
ClassNames = Annotated[tuple[str, ...] | str, BeforeValidator(_class_names)]


def _row_values(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(isinstance(one, bool | int | str) for one in values):
        raise ValueError("must be a text, a whole number, true or false, or a list of them")
    return values


# column -> values of the rows that belong to the set
Where = Annotated[dict[str, Annotated[Any, BeforeValidator(_row_values)]], BeforeValidator(_nothing_is_empty)]


class ColumnSet(StoredSet):
    """A row per image: which columns hold what, and which rows belong to the set."""

    path_keys: ClassVar[tuple[str, ...]] = ("path", "exclude", "root", "class_names")
    image: str | None = None  # column of paths or bytes; None: the one that can be meant
    label: str | None = None  # column of texts, or of whole numbers with class_names; None as above
    id: str | None = None  # column of stable names; None: the paths, else hashes of the bytes
    root: str | None = None  # folder that paths of images count from; None: the one that the files lie in
    where: Where = {}
    class_names: ClassNames | None = None  # None: as the file names them, else the texts


class TableSet(ColumnSet):
    """CSV, Parquet or Arrow files with equal columns."""

    source: Literal["table"]


class HuggingFaceSet(ColumnSet):
    """A folder that ``datasets`` has saved, or Parquet files as the hub lays them out."""

    source: Literal["huggingface"]
    split: str | None = None  # None: the only one


def _sample_label(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"json:.+|[^:/\s]+", value) is None:
        raise ValueError("must be the ending of a file such as cls, or json:KEY")
    return value


class WebDatasetSet(StoredSet):
    """Tar archives of samples: files of one name with several endings."""

    path_keys: ClassVar[tuple[str, ...]] = ("path", "exclude", "class_names")
    source: Literal["webdataset"]
    image: str | None = None  # ending of the images; None: the one image ending of each sample
    label: Annotated[str | None, BeforeValidator(_sample_label)] = None  # ending of its file, or json:KEY; None: cls
    class_names: ClassNames | None = None  # None: those of classnames.txt beside the shards, else the texts


class BenchmarkSet(StoredSet):
    """A public benchmark as its archives unpack, with its own class list, splits and masks."""

    source: Literal["benchmark"]
    name: str  # a key of recipe/benchmarks.py
    split: str | None = None  # of the benchmark; None: all images
    domains: Annotated[tuple[FolderName, ...], Field(min_length=1)] | None = None  # of DomainBed's sets; None: all
    trial_seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0  # DomainBed's; of its splits in and out


# every kind of set but those that are made of another
PlainSet = SandboxSet | FolderSet | TableSet | WebDatasetSet | HuggingFaceSet | BenchmarkSet


class CorruptedSet(Part):
    """Another set under ImageNet-C's corruptions, each image under one of them."""

    source: Literal["corrupted"]
    of: Annotated[PlainSet, Field(discriminator="source")]
    corruptions: Annotated[tuple[Corruption, ...], Field(min_length=1)] | None = None  # None: ImageNet-C's fifteen
    severity: Annotated[int, Field(ge=1, le=5, strict=True)]
    seed: Seed = 0  # of the draw of a corruption and of its noise, with the sample id
    size: Count = 224  # larger images are first resized and cropped to a square of this side, as ImageNet-C was


SetSpec = Annotated[PlainSet | CorruptedSet, Field(discriminator="source")]
SetSpecs = Annotated[dict[SetName, SetSpec], BeforeValidator(_nothing_is_empty)]


class DataPart(Part):
    """The sets by role. A set has one role; test roles are read by `test` alone."""

    train: SetSpec
    id_val: SetSpec
    ood_val: SetSpecs = {}
    id_test: SetSpec | None = None
    ood_test: SetSpecs = {}
    classes: Annotated[tuple[ClassName, ...], Field(min_length=2)] | None = (
        None  # class folders in label order; None: those of train, in its order
    )
    # images that stand in two roles: 'drop' leaves them to the role nearest to the test, 'fail' refuses them
    shared_images: Literal["drop", "keep", "fail"] = "drop"
    shared_limit: Fraction = 0.05  # largest share of a set that 'drop' may leave out
    cache_dir: str | None = None  # decoded and packed sets; None: the user's cache folder
    cache_gb: Positive | None = None  # size of the cache after a build, 10^9 bytes; None: no limit
    pack: Literal["auto", "always", "never"] = "auto"  # the files of train as one in the cache; auto: where it pays


# keys of ``data`` that say where and how images are kept: other values of them do not make another study
CACHE_KEYS = ("cache_dir", "cache_gb", "pack")


class PromptsPart(Part):
    """Text side: one sentence per (template, class). The templates are also the contexts of the KL term."""

    templates: Annotated[str | tuple[str, ...], BeforeValidator(_templates)] = (
        "sandbox"  # a TemplateSet, a benchmark, or a list
    )
    # words for the classes: those of a benchmark, or a list; None: those of the benchmark that is trained on, else the
    # class folders, '_' as a space
    class_names: Annotated[str | tuple[str, ...] | None, BeforeValidator(_words)] = None


class TrainPart(Part):
    """One fine-tuning. Every number here except the seed may be a parameter of the search space."""

    learning_rate: Positive = 1e-5  # peak
    kl_weight: NonNegative = 1.0  # 0 is plain fine-tuning
    alpha: Fraction | None = None  # fixed mixing coefficient; None: the best of the alpha curve
    epochs: Count = 10
    batch_size: Count = 512  # global batch
    micro_batch: Count | None = None  # images per forward pass and worker; None: the worker's whole part
    weight_decay: NonNegative = 0.1
    decay: Literal["all", "matrices"] = "all"  # which tensors decay
    warmup_steps: Whole | None = None  # None: min(500, 10 % of the steps)
    clip_norm: Positive | None = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    crop_scale: Annotated[float, Field(gt=0, le=1, strict=True)] = (
        0.9  # lower end of the area of the random crop; 1 is the upper
    )
    class_head_form: Literal["folded", "unit"] = "folded"
    head_bias: Flag = False
    head_lr_factor: NonNegative = 1.0  # 0 freezes the class head
    layer_decay: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0  # learning rate of a layer over the next one's
    freeze_layers: Whole = 0  # lowest layers of the image tower that do not train
    lora_rank: Count | None = None  # the tower's matrices train by corrections of this rank; None: all of the tower
    lora_alpha: Positive | None = None  # the corrections count lora_alpha / lora_rank times; None: once
    ema_decay: Annotated[float, Field(ge=0, lt=1, strict=True)] | None = None  # of the average of the steps' weights
    recalibrate_batches: Whole = 0  # clean batches for the BatchNorm statistics of mixed weights; 0: those of the start
    context_scale: Positive | None = None  # scale in the context softmax; None: the model's own logit scale
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"  # of the tower's compute; weights stay fp32 (fp64)
    grad_checkpointing: Flag = False  # activations of blocks are computed again, not kept
    compile: Flag = False  # the training computes with a compiled image tower
    seed: Seed = 0  # data order, views, and the start of LoRA


# categorical parameter -> its values for which this one is drawn; elsewhere the field keeps its value in `train`
When = Annotated[dict[str, Annotated[Any, BeforeValidator(_choices)]], BeforeValidator(_nothing_is_empty)]


class FloatParameter(Part):
    """A real number between two ends."""

    type: Literal["float"] = "float"
    low: Number
    high: Number
    log: Flag = False
    step: Positive | None = None
    when: When = {}

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _check_ends(self.low, self.high, self.log, self.step)
        return self


class IntParameter(Part):
    """A whole number between two ends, both included."""

    type: Literal["int"]
    low: Annotated[int, Field(strict=True)]
    high: Annotated[int, Field(strict=True)]
    log: Flag = False
    step: Count = 1
    when: When = {}

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _check_ends(self.low, self.high, self.log, None if self.step == 1 else self.step)
        return self


Choice = Annotated[bool | int | float | str | None, BeforeValidator(_plain_value)]


class CategoricalParameter(Part):
    """One of a list of values."""

    type: Literal["categorical"]
    choices: Annotated[tuple[Choice, ...], Field(min_length=1)]
    when: When = {}

    @field_validator("choices")
    @classmethod
    def _differ(cls, choices: tuple[Any, ...]) -> tuple[Any, ...]:
        if len({(isinstance(choice, bool), choice) for choice in choices}) < len(choices):
            raise ValueError(f"choices must differ, but got {list(choices)}")
        return choices


def _check_ends(low: float, high: float, log: bool, step: float | None) -> None:
    if low > high:
        raise ValueError(f"low <= high must hold, but got low={low}, high={high}")
    if log and low <= 0:
        raise ValueError(f"low > 0 must hold with log: true, but got low={low}")
    if log and step is not None:
        raise ValueError(f"log: true and step exclude each other, but got step={step}")
    # in decimals: 0.1 divides 0.9, which floats deny
    if step is not None and (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)) != 0:
        raise ValueError(f"high - low must be a multiple of step, but got low={low}, high={high}, step={step}")


Parameter = Annotated[FloatParameter | IntParameter | CategoricalParameter, Field(discriminator="type")]


def _name_types(space: Any) -> Any:
    """Names the type of each parameter that leaves it out: from `choices`, else from the field that it searches."""
    if not isinstance(space, dict):
        return _nothing_is_empty(space)
    return {name: _name_type(name, parameter) for name, parameter in space.items()}


def _name_type(name: str, parameter: Any) -> Any:
    if not isinstance(parameter, dict) or "type" in parameter:
        return parameter
    if "choices" in parameter:
        return {"type": "categorical", **parameter}
    return {"type": "int" if field_kind(name) is int else "float", **parameter}


def field_kind(name: str) -> type:
    """Returns what a field of ``train`` holds: float, int, bool or str; float for a name that is no field."""
    field = TrainPart.model_fields.get(name)
    if field is None:
        return float
    kind = core_type(field.annotation)
    return kind if kind in (float, int, bool) else str


def core_type(annotation: Any) -> Any:
    """Strips ``Annotated`` and ``| None`` from a type."""
    while True:
        others = [argument for argument in get_args(annotation) if argument is not NoneType]
        if get_origin(annotation) is Annotated or (len(others) == 1 and NoneType in get_args(annotation)):
            annotation = others[0]
        else:
            return annotation


class AlphaPart(Part):
    """How the mixing coefficient is found."""

    mode: Literal["profile", "sample"] = "profile"
    grid: Annotated[tuple[Fraction, ...], Field(min_length=2)] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    lowest: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.1  # lowest alpha that a trial may choose

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


class ObjectivePart(Part):
    """The number that ranks trials, always maximised; ``pareto`` keeps ID and OOD accuracy apart."""

    kind: Literal["weighted_mean", "harmonic", "worst_domain", "pareto"] = "weighted_mean"
    # of weighted_mean; with pareto of the number by which a running training is looked at
    id_weight: Fraction = 0.5
    id_margin: Fraction = 0.005  # "keeps ID" in reports: at most so much is lost with 97.5 % confidence; ranks nothing
    best: Literal["knee", "lexicographic"] = "knee"  # of pareto: which point of the front is the best trial
    tolerance: Fraction = 0.005  # of lexicographic: ID accuracy under the highest at which OOD accuracy decides


class ConstraintsPart(Part):
    """What the chosen weights of a trial must keep; part of its choice of alpha, and told to the sampler."""

    id_drop: dict[SetName, Fraction] = {}  # baseline, or zero_shot -> ID accuracy that may be lost under it
    ece: dict[SetName, Fraction] = {}  # id_val or a set of ood_val -> largest expected calibration error


class SamplerPart(Part):
    """Who proposes the next values."""

    name: Literal["tpe", "gp", "cmaes", "nsga2", "nsga3", "qmc", "random", "grid"] = "tpe"
    seed: Seed = 0
    startup_trials: Count | None = None  # random trials before tpe, gp (None: max(4, trials / 4)) and cmaes (None: 1)
    options: Annotated[dict[str, Any], BeforeValidator(_nothing_is_empty)] = {}  # see recipe/sampler_rules.py


class PrunerPart(Part):
    """Who cuts a training that will not be among the best. Shares are of a training's own schedule."""

    name: Literal["none", "successive_halving", "median", "percentile"] = "none"
    first: Annotated[float, Field(gt=0, lt=1, strict=True)] = 1 / 3  # share before which no training is cut
    factor: Annotated[int, Field(ge=2, strict=True)] = 2  # halving: next rung; 1/factor of the trials go on
    startup_trials: Count = 4  # median, percentile: finished trials before anything is cut
    percentile: Annotated[float, Field(gt=0, lt=100, strict=True)] = 25.0  # percentile: the best share that goes on


class SearchPart(Part):
    """What is searched and how long."""

    trials: Count = 16
    space: Annotated[dict[str, Parameter], BeforeValidator(_name_types)] = {}
    alpha: AlphaPart = AlphaPart()
    objective: ObjectivePart = ObjectivePart()
    constraints: ConstraintsPart = ConstraintsPart()
    sampler: SamplerPart = SamplerPart()
    pruner: PrunerPart = PrunerPart()
    points: tuple[dict[str, Any], ...] = ()  # values tried first; a parameter that is left out is drawn
    warm_start: tuple[str, ...] = ()  # other studies whose trials the sampler is told of
    # name -> values over `train`; trained before the trials, shown beside them, never told to the sampler
    baselines: Annotated[dict[SetName, dict[str, Any]], BeforeValidator(_nothing_is_empty)] = {}
    concurrency: Count | None = None  # trials at a time; None: what the machine or cluster holds
    keep_checkpoints: Count = 3  # best trials whose fine-tuned weights stay


class ResourcesPart(Part):
    """What one trial gets."""

    executor: Literal["auto", "inline", "ray-train"] = "auto"  # auto: one worker inline, more workers ray-train
    num_workers: Count = 1
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative | None = None  # None: 1 where the cluster has GPUs, else 0
    threads: Count | None = None  # torch threads per worker; None: cpus_per_worker
    hang_timeout_s: Positive | None = 3600.0  # an attempt without a step for so long is ended and begun again

    @property
    def threads_per_worker(self) -> int:
        """Torch threads of a worker; trials that fight for cores were measured 100 times slower."""
        return self.threads or max(1, int(self.cpus_per_worker))


class BudgetPart(Part):
    """When a search ends, with its best, before its trials are done. Their number is ``search.trials``."""

    wall_time: Annotated[Positive, BeforeValidator(seconds_of)] | None = None  # seconds, or a text such as 8h
    gpu_hours: Positive | None = None  # of all attempts of the study


class EvaluatePart(Part):
    """Evaluation while a training runs; the end is always evaluated in full."""

    every_epochs: Whole = 1  # 0: only at the end
    subset: Count = 250  # images per set, by a hash of the sample id
    batch_size: Count = 256


class Recipe(Part):
    """Everything about one study. A value of this type is valid."""

    format_version: Literal[1] = 1
    name: SetName = "study"
    model: ModelPart = ModelPart()
    data: DataPart
    prompts: PromptsPart = PromptsPart()
    train: TrainPart = TrainPart()
    evaluate: EvaluatePart = EvaluatePart()
    search: SearchPart = SearchPart()
    resources: ResourcesPart = ResourcesPart()
    budget: BudgetPart = BudgetPart()


def plain(spec: SetSpec) -> PlainSet:
    """Returns the set of images that a set is made of: itself, or that which is shown corrupted."""
    return spec.of if isinstance(spec, CorruptedSet) else spec
