"""The keys of one fine-tuning: the model, its prompts, the training, and evaluations on the way."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from carft_ray.recipe.fields import (
    Config,
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

TemplateSet = Literal["sandbox", "simple", "openai"]

METHOD = Resume("identity", "another method: its objectives do not compare")
START = Resume("identity", "the start of every training; a folder or file may move, its weights are compared")
HEADS = Resume("identity", "both heads are made of them")
ROUNDING = Resume("identity", "changes the rounding of every number")
MEMORY = Resume("running", "memory and speed, not what is computed")
SEED_REASON = (
    "Seeds are no hyperparameters: choosing the luckiest seed is selection on noise. "
    "Remove it; to see the spread, train the best recipe again with other seeds (--set train.seed=1)."
)
ONLY_SPEED = "It changes speed and memory, not the gradient. Choose one for all trials."
ONLY_ROUNDING = "It changes speed and rounding, not the method. Choose one for all trials."


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
    if not all(word.strip() for word in value):
        raise ValueError("must not hold an empty text")
    return tuple(value)


class ModelConfig(Config):
    """Which CLIP to start from."""

    name: str = key(
        "sandbox",
        "`sandbox`, a model of open_clip, or a folder or hub page with its prefix ([models.md](../docs/models.md))",
        "sandbox",
        START,
        range="`sandbox`, an open_clip name, `local-dir:DIR`, `hf-hub:OWNER/NAME`",
    )
    pretrained: str | None = key(
        None,
        "its weights; required for an open_clip name, left out for the others",
        "null",
        START,
        range="a tag of open_clip, the path of a weights file, or `random`",
    )


class PromptsConfig(Config):
    """Text side: one sentence per (template, class). The templates are also the contexts of the KL term."""

    templates: Annotated[str | tuple[str, ...], BeforeValidator(_templates)] = key(
        "sandbox",
        "a set of templates, those of a benchmark, or your own: a list, or a text file with one on each line, which is "
        "read when the recipe is",
        '["a photo of a {}.", "a sketch of a {}."]',
        HEADS,
        range="`sandbox`, `simple`, `openai`; a benchmark with templates; `file:PATH`; or texts with one `{}` for the "
        "class",
    )
    class_names: Annotated[str | tuple[str, ...] | None, BeforeValidator(_words)] = key(
        None,
        "words for the classes: those of a benchmark, or a list in label order, which may repeat; null: those of the "
        "benchmark that is trained on, else the class folders, `_` as a space",
        "null",
        HEADS,
        range="a benchmark that has the classes; or as many as classes",
    )


class TrainConfig(Config):
    """One fine-tuning. A field without ``not_searched`` may be a parameter of the search space."""

    learning_rate: PositiveFloat = key(1e-5, "peak learning rate of AdamW", "3e-5", METHOD)
    kl_weight: NonNegativeFloat = key(
        1.0,
        "coefficient of the KL term; 0 is plain fine-tuning. Its size depends on the model's logit scale",
        "10",
        METHOD,
    )
    alpha: Fraction | None = key(
        None,
        "fixed mixing coefficient, 0 zero-shot, 1 fine-tuned; null: the best of the alpha curve. Not with `search`",
        "0.6",
        METHOD,
    )
    epochs: PositiveInt = key(10, "passes over the training set", "6", METHOD)
    batch_size: PositiveInt = key(
        512, "images per step, over all workers", "64", METHOD, range=">= 1, at most the training set"
    )
    micro_batch: PositiveInt | None = key(
        None,
        "images per forward pass and worker, changes memory and not the gradient; null: the worker's whole part; "
        "halved where memory is short",
        "32",
        MEMORY,
        range="1 to `batch_size`",
        not_searched=ONLY_SPEED,
    )
    weight_decay: NonNegativeFloat = key(0.1, "weight decay of AdamW", "0.05", METHOD)
    decay: Literal["all", "matrices"] = key(
        "all", "which tensors decay: all, or only matrices (no norms, no biases)", "matrices", METHOD
    )
    warmup_steps: NonNegativeInt | None = key(
        None, "steps of linear warm-up; null: 500, but at most a tenth of all steps", "100", METHOD
    )
    clip_norm: PositiveFloat | None = key(1.0, "largest gradient norm; null: no clipping", "null", METHOD)
    label_smoothing: Annotated[float, Field(ge=0, lt=1, strict=True)] = key(
        0.0, "share of the label spread over all classes", "0.1", METHOD
    )
    crop_scale: Annotated[float, Field(gt=0, le=1, strict=True)] = key(
        0.9, "smallest area of the random crop, as a fraction of the image", "0.6", METHOD
    )
    class_head_form: Literal["folded", "unit"] = key(
        "folded",
        "logit scale inside the class head or outside; the same model either way",
        "unit",
        Resume("identity", "changes the form of the stored weights"),
        not_searched="Both forms give the same model at the same settings: only the stored numbers differ.",
    )
    head_bias: Flag = key(False, "a trained bias in the class head", "true", METHOD)
    head_lr_factor: NonNegativeFloat = key(
        1.0, "learning rate of the class head, relative to the tower's; 0 freezes it", "0", METHOD
    )
    layer_decay: Annotated[float, Field(gt=0, le=1, strict=True)] = key(
        1.0,
        "learning rate of a layer of the image tower, relative to that of the layer above it; the class head stands "
        "above all. 1: one learning rate",
        "0.75",
        METHOD,
    )
    freeze_layers: NonNegativeInt = key(
        0,
        "lowest layers of the image tower that do not train (stem, blocks, projection); all of them: the class head "
        "alone trains",
        "2",
        METHOD,
        range="0 to the number of layers",
    )
    lora_rank: PositiveInt | None = key(
        None,
        "the matrices of the tower's blocks train by corrections of this rank (LoRA), nothing else of the tower "
        "trains; null: all trains",
        "8",
        METHOD,
        range="1 to the smallest side of a matrix",
    )
    lora_alpha: PositiveFloat | None = key(
        None, "LoRA's corrections count `lora_alpha / lora_rank` times; null: once", "16", METHOD
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1, strict=True)] | None = key(
        None,
        "the result is the average of the weights after each step, an older step counts this much of the next; null: "
        "the last step",
        "0.99",
        METHOD,
    )
    recalibrate_batches: NonNegativeInt = key(
        0,
        "for towers with BatchNorm: batches of 128 clean training images from which the running statistics of mixed "
        "weights are computed anew; 0: they stay those of the zero-shot model",
        "10",
        METHOD,
    )
    context_scale: PositiveFloat | None = key(
        None, "scale in the context softmax; null: the model's own logit scale", "50", METHOD
    )
    precision: Literal["auto", "fp32", "bf16", "fp64"] = key(
        "auto",
        "precision of the image tower's compute; weights stay fp32 (fp64 with fp64)",
        "bf16",
        ROUNDING,
        not_searched=ONLY_ROUNDING,
    )
    grad_checkpointing: Flag = key(
        False,
        "compute the activations of a block again instead of keeping them: less memory, the same gradient, one more "
        "forward pass",
        "true",
        MEMORY,
        not_searched=ONLY_SPEED,
    )
    compile: Flag = key(
        False,
        "train with a compiled image tower (`torch.compile`, needs a compiler): faster after a slow start, other "
        "rounding",
        "true",
        ROUNDING,
        not_searched=ONLY_ROUNDING,
    )
    seed: Seed = key(
        0,
        "order of the images and their random crops, and LoRA's start",
        "1",
        Resume("identity", "choosing a luckier seed is selection on noise"),
        not_searched=SEED_REASON,
    )


def field_kind(name: str) -> type:
    """Returns what a field of ``train`` holds: float, int, bool or str; float for a name that is no field."""
    field = TrainConfig.model_fields.get(name)
    if field is None:
        return float
    kind = core_type(field.annotation)
    return kind if kind in (float, int, bool) else str


class EvaluateConfig(Config):
    """Evaluation while a training runs; the end is always evaluated in full."""

    every_epochs: NonNegativeInt = key(
        1,
        "epochs between looks at a subset, mixed at the best of alpha .25, .5, .75, 1; 0: only at the end, which is "
        "always in full",
        "2",
        Resume("identity", "when a training is looked at decides when a pruner may cut it"),
    )
    subset: PositiveInt = key(
        250,
        "images per set in the evaluations on the way",
        "1000",
        Resume("identity", "the looks at trainings are compared with each other"),
    )
    batch_size: PositiveInt = key(256, "images per forward pass; halved where memory is short", "64", MEMORY)
