"""The sentences of a recipe's prompts."""

import open_clip

from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.schema.model import PromptsConfig


def templates(prompts: PromptsConfig, sandbox_templates: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the sentences with ``{}`` that a recipe's prompts name.

    'openai' are the 80 ImageNet templates of CLIP, 'simple' the 7 of its notebook, both as open_clip has them; the name
    of a benchmark means its own.
    """
    if not isinstance(prompts.templates, str):
        return prompts.templates
    if prompts.templates in BENCHMARKS:
        return BENCHMARKS[prompts.templates].templates
    if prompts.templates == "sandbox":
        return sandbox_templates
    named = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    return tuple(template("{}") for template in named[prompts.templates])
