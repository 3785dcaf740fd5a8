"""The keys of the model that a fine-tuning starts from, and of its prompts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationInfo

from carft_ray.recipe.schema.fields import Config, Resume, key

TEMPLATE_FILE = "file:"  # of prompts.templates: the path of a text file, one template per line
LOCAL_DIR = "local-dir:"  # of model.name: a folder as open_clip or transformers writes it
TemplateSet = Literal["sandbox", "simple", "openai"]
START = Resume("identity", "the start of every training; a folder or file may move: its weights are compared")
HEADS = Resume("identity", "both heads are made from them")
TEMPLATES_RULE = "must be the name of a set of templates, file:PATH, or a list of texts with {}"
CLASS_NAMES_RULE = "must be the name of a benchmark or a list of texts"


def _templates(value: Any, info: ValidationInfo) -> Any:
    """Puts the lines of a file in its place, so that the recipe is complete; the context of a validation reads them."""
    if isinstance(value, str) and value.startswith(TEMPLATE_FILE) and info.context:
        return info.context(value.removeprefix(TEMPLATE_FILE))
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(template, str) for template in value):
        raise ValueError(TEMPLATES_RULE)
    return tuple(value)


def _words(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise ValueError(CLASS_NAMES_RULE)
    if not all(word.strip() for word in value):
        raise ValueError("must not contain an empty text")
    return tuple(value)


def is_weights_path(pretrained: str) -> bool:
    """Returns whether a text is the path of a weights file; else it is a tag of open_clip."""
    return "/" in pretrained or pretrained.endswith((".pt", ".pth", ".bin", ".safetensors"))


class ModelConfig(Config):
    """Which CLIP to start from."""

    name: str = key("sandbox", "sandbox", START, path_in="model")
    """`sandbox`, a model of open_clip, `local-dir:DIR` or `hf-hub:OWNER/NAME` ([models.md](../docs/models.md))"""
    pretrained: str | None = key(None, None, START, path_in="weights")
    """its weights: a tag of open_clip, the path of a weights file, or `random`; required for an open_clip name, not
    allowed for the others"""


class PromptsConfig(Config):
    """Text side: one sentence per (template, class). The templates are also the contexts of the KL term."""

    templates: Annotated[str | tuple[str, ...], BeforeValidator(_templates)] = key(
        "sandbox", ["a photo of a {}.", "a sketch of a {}."], HEADS
    )
    """`sandbox`, `simple`, `openai`, the name of a benchmark, or your own templates with one `{}` for the class: a
    list, or `file:PATH` of a text file with one template per line"""
    class_names: Annotated[str | tuple[str, ...] | None, BeforeValidator(_words)] = key(None, None, HEADS)
    """words for the classes: the name of a benchmark, or a list in label order, which may have duplicates; null: those
    of the benchmark in `data.train`, else the names of the class folders with `_` as a space"""
