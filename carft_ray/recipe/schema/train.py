"""The keys of one fine-tuning, and of the evaluations on the way."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from carft_ray.recipe.schema.fields import (
    Config,
    Duration,
    Flag,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Resume,
    Seed,
    core_type,
    key,
)

METHOD = Resume("identity", "another method: its objectives are not comparable")
ROUNDING = Resume("identity", "changes the rounding of every number")
SAVING = Resume("running", "when checkpoints are written, not what is computed")
MEMORY = Resume("running", "memory and speed, not what is computed")
SEED_REASON = (
    "A seed is not a hyperparameter: choosing the luckiest seed is selection on noise. "
    "Remove it; to see the spread, train the best recipe again with other seeds (--set train.seed=1)."
)
ONLY_SAVING = "It changes how much a failed machine loses, not the training. Choose one for all trials."
ONLY_SPEED = "It changes speed and memory, not the gradient. Choose one for all trials."
ONE_FUNCTION = "A study has one fine-tuning function. Compare two with two studies, or with a baseline."
ONLY_ROUNDING = "It changes speed and rounding, not the method. Choose one for all trials."
FUNCTION_RULE = "must be MODULE:NAME, the function NAME of the module MODULE"
FEATURE_TERMS = ("class_kl", "feature", "text")  # penalties of the loss that compare the features of both models
SCHEDULED = ("kl_weight", *(f"{name}_weight" for name in FEATURE_TERMS))
PENALTIES = (*SCHEDULED, "l2_sp_weight")


def _function(value: Any) -> Any:
    if isinstance(value, str):
        module, colon, name = value.partition(":")
        if not (colon and module.strip() and name.strip()) or ":" in name or "/" in module or module.endswith(".py"):
            raise ValueError(FUNCTION_RULE)
    return value


def _auto_or_flag(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("must be auto, true or false")
    return value


class TrainConfig(Config):
    """One fine-tuning. A field without ``not_searched`` may be a parameter of the search space."""

    learning_rate: PositiveFloat = key(1e-5, 3e-05, METHOD)
    """peak learning rate of AdamW"""
    kl_weight: NonNegativeFloat = key(1.0, 10, METHOD)
    """coefficient of the KL term of the contexts; 0 for all penalties is plain fine-tuning. Its size depends on the
    model's logit scale"""
    alpha: Fraction | None = key(None, 0.6, METHOD)
    """fixed mixing coefficient, 0 zero-shot, 1 fine-tuned; null: the best of the alpha curve. Not allowed in a search:
    see [One alpha for all trials](../docs/objectives.md#one-alpha-for-all-trials)"""
    epochs: PositiveInt = key(10, 6, METHOD)
    """passes over the training set"""
    batch_size: PositiveInt = key(512, 64, METHOD)
    """images per step over all workers; at most the size of the training set"""
    micro_batch: PositiveInt | None = key(None, 32, MEMORY, not_searched=ONLY_SPEED)
    """most images per forward pass of a worker; changes memory use, not the gradient; null: all of the worker's; halved
    if memory is short"""
    weight_decay: NonNegativeFloat = key(0.1, 0.05, METHOD)
    """weight decay of AdamW"""
    decay: Literal["all", "matrices"] = key("all", "matrices", METHOD)
    """which tensors decay; matrices: no norms, no biases"""
    warmup_steps: NonNegativeInt | None = key(None, 100, METHOD)
    """steps of linear warm-up; null: 500, but at most a tenth of all steps"""
    clip_norm: PositiveFloat | None = key(1.0, None, METHOD)
    """largest gradient norm; null: no clipping"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1, strict=True)] = key(0.0, 0.1, METHOD)
    """share of the label spread over all classes"""
    crop_scale: Annotated[float, Field(gt=0, le=1, strict=True)] = key(0.9, 0.6, METHOD)
    """smallest area of the random crop, as a fraction of the image"""
    head_bias: Flag = key(False, True, METHOD)
    """a trained bias in the class head"""
    head_lr_factor: NonNegativeFloat = key(1.0, 0, METHOD)
    """learning rate of the class head, relative to the tower's; 0 freezes it"""
    layer_decay: Annotated[float, Field(gt=0, le=1, strict=True)] = key(1.0, 0.75, METHOD)
    """learning rate of a layer of the image tower, relative to that of the layer above it; the class head is on top. 1:
    the same for all"""
    freeze_layers: NonNegativeInt = key(0, 2, METHOD)
    """number of lowest layers of the image tower that are not trained (stem, blocks, projection); with all of them,
    only the class head is"""
    lora_rank: PositiveInt | None = key(None, 8, METHOD)
    """rank of the corrections (LoRA) that train the matrices of the tower's blocks, at most the smallest side of a
    matrix; nothing else in the tower is trained; null: no LoRA"""
    lora_alpha: PositiveFloat | None = key(None, 16, METHOD)
    """LoRA's corrections are multiplied by `lora_alpha / lora_rank`; null: by 1"""
    ema_decay: Annotated[float, Field(ge=0, lt=1, strict=True)] | None = key(None, 0.99, METHOD)
    """decay of the average of the weights over all steps, which is the result; null: the weights of the last step"""
    context_scale: PositiveFloat | None = key(None, 50, METHOD)
    """scale in the context softmax; null: the model's own logit scale"""
    class_kl_weight: NonNegativeFloat = key(0.0, 1, METHOD)
    """coefficient of the KL term of the classes (logit distillation): the frozen model's zero-shot probabilities
    against the student's"""
    feature_weight: NonNegativeFloat = key(0.0, 10, METHOD)
    """coefficient of 1 - cosine of the image features of student and frozen model (feature distillation)"""
    text_weight: NonNegativeFloat = key(0.0, 1, METHOD)
    """coefficient of the squared change of the logits of 80 random texts, new ones in each step (Lipsum-FT)"""
    l2_sp_weight: NonNegativeFloat = key(0.0, 0.02, METHOD)
    """coefficient of half the squared distance of the image tower's weights from their start (L2-SP), with LoRA half
    the squared norm of the corrections; above 0 it replaces the weight decay of the tower"""
    penalty_schedule: Literal["constant", "linear_to_zero"] = key("constant", "linear_to_zero", METHOD)
    """weight of the penalties, except for L2-SP, over the steps: constant, or falling linearly to 0"""
    teacher: Literal["frozen", "average"] = key("frozen", "average", METHOD)
    """the model that the penalties, except for L2-SP, compare with: the frozen zero-shot model, or a running mean of
    this training's weights that starts there"""
    probe_epochs: NonNegativeInt = key(0, 5, METHOD)
    """epochs of a linear probe before the training (LP-FT): the class head alone, with learning rate 1e-3, on features
    of the frozen image tower for the whole images; not with `function`"""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = key("auto", "bf16", ROUNDING, not_searched=ONLY_ROUNDING)
    """precision of the image tower's computation; weights stay fp32 (fp64 with fp64). auto: bf16 on a GPU that supports
    it, else fp32; fp32 never uses TF32"""
    grad_checkpointing: Flag = key(False, True, MEMORY, not_searched=ONLY_SPEED)
    """compute the activations of a block again instead of keeping them: less memory, the same gradient, one more
    forward pass"""
    compile: Annotated[Literal["auto", True, False], BeforeValidator(_auto_or_flag)] = key(
        "auto", True, ROUNDING, not_searched=ONLY_ROUNDING
    )
    """train with a compiled image tower (`torch.compile`, needs a compiler): faster after a slow start, other rounding;
    auto: on a GPU with a working compiler, if a training has at least 1,000 steps. carft-ray decides this once, before
    the first training of a study"""
    deterministic: Flag = key(False, True, ROUNDING, not_searched=ONLY_ROUNDING)
    """use a fixed order of sums on a GPU as well, so that a training repeats bit for bit on the same card; slower. On a
    CPU every training does"""
    checkpoint_every: Duration | None = key(900.0, "5m", SAVING, not_searched=ONLY_SAVING)
    """time between checkpoints; null: one at the end of every
    epoch. A training also writes one if it must stop or leave its node"""
    function: Annotated[str | None, BeforeValidator(_function)] = key(
        None, "own_trainer:fine_tune", METHOD, not_searched=ONE_FUNCTION
    )
    """`MODULE:NAME`, your own fine-tuning in place of the built-in loop; runs only with `--trust`
    ([own_trainer.md](../docs/own_trainer.md))"""
    function_dir: str | None = key(
        None,
        "trainers",
        Resume("running", "a folder may move; the function has the same name"),
        not_searched=ONE_FUNCTION,
        path_in="path",
    )
    """folder from which `function` is imported, as if Python were started there; null: the folder of the recipe"""
    seed: Seed = key(
        0, 1, Resume("identity", "choosing a luckier seed is selection on noise"), not_searched=SEED_REASON
    )
    """seed of the order and random crops of the images, of random texts and of LoRA's initial values"""

    @property
    def feature_terms(self) -> tuple[str, ...]:
        """Those of ``FEATURE_TERMS`` that have a weight."""
        return tuple(name for name in FEATURE_TERMS if getattr(self, f"{name}_weight"))

    @property
    def compares_models(self) -> bool:
        """Whether a penalty runs the frozen model or reads what it has computed."""
        return bool(self.kl_weight or self.feature_terms)

    @property
    def moves_teacher(self) -> bool:
        """Whether penalties compare with a running mean of the weights."""
        return self.teacher == "average" and self.compares_models

    @property
    def shares_targets(self) -> bool:
        """Whether the frozen model is needed for nothing but the contexts, which can be stored; else it runs on each
        batch, if a penalty compares with it at all."""
        return bool(self.kl_weight) and not self.feature_terms and not self.moves_teacher


def field_kind(name: str) -> type:
    """Returns what a field of ``train`` holds: float, int, bool or str; float for a name that is no field."""
    field = TrainConfig.model_fields.get(name)
    if field is None:
        return float
    kind = core_type(field.annotation)
    return kind if kind in (float, int, bool) else str


class EvaluateConfig(Config):
    """Evaluation while a training runs; the end is always evaluated in full."""

    every_epochs: NonNegativeInt | None = key(
        None, 2, Resume("identity", "a pruner can cut a training only at an evaluation")
    )
    """epochs between evaluations on a subset, at the best of alpha .25, .5, .75, 1 that is at least
    `search.alpha.lowest`; 0: only at the end; null: 1 with a pruner, else 0. The evaluation at the end always uses all
    images"""
    subset: PositiveInt = key(
        250, 1000, Resume("identity", "intermediate values of trainings are compared with each other")
    )
    """images per set in evaluations before the end"""
    batch_size: PositiveInt | None = key(None, 64, MEMORY)
    """images per forward pass, halved if memory is short; null: 32 on a CPU, 512 on a GPU"""
    thumbnails: Annotated[int, Field(ge=0, le=200, strict=True)] = key(
        48, 0, Resume("running", "pictures for the report; nothing is computed from them")
    )
    """small pictures that a training keeps for `report --html`: validation images whose prediction changes
    between zero-shot, the chosen alpha and alpha 1; those of the best trials stay; 0: none"""
