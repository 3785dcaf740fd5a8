"""The model card of an export: what it is, how well it does where, and how to use it, per format.

The text is in ``model_card.md`` and, per format, in ``use_<format>.md``: templates of ``string.Template``. How
images are resized is in ``resize.toml``.
"""

import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from string import Template

from carft_ray import __version__
from carft_ray.model.clip import Clip
from carft_ray.recipe.schema.data import plain
from carft_ray.results.reading.trained import Trained, evaluate_trained
from carft_ray.untrusted import markdown

_RESIZE = tomllib.loads(Path(__file__).with_name("resize.toml").read_text(encoding="utf-8"))


def model_card(trained: Trained, alpha: float, formats: Sequence[str], has_bias: bool) -> str:
    """Returns the card as Markdown. It holds validation numbers alone: nothing here opens a test set.

    Args:
        trained: The training.
        alpha: Mixing coefficient of the exported weights.
        formats: What the folder holds, names of ``export.FORMATS``.
        has_bias: The class head has a bias.
    """
    recipe, result, inputs = trained.recipe, trained.result, trained.inputs
    metrics = next((point for point in result["curve"] if point["alpha"] == alpha), None)
    metrics = metrics or evaluate_trained(trained, alpha)[0]
    accuracies = [
        f"| {markdown(name)} | {100 * metrics[f'accuracy/{name}']:.1f} | {count:,} |"
        for name, count in result["num_images"].items()
        if name != "train"
    ]
    is_sandbox = recipe.model.name == "sandbox"
    is_synthetic = plain(recipe.data.train).source == "sandbox"
    weights = f" with the weights {markdown(recipe.model.pretrained)}" if recipe.model.pretrained else ""
    named = {key for key, value in result["train"].items() if value is not None} - {"function_dir"}  # of this machine
    shared = "".join(f"- {markdown(line)}\n" for line in trained.shared)
    return _template("model_card").substitute(
        name=markdown(recipe.name),
        model=markdown(recipe.model.name),
        version=__version__,
        training=markdown(trained.name),
        alpha=f"{alpha:g}",
        synthetic=" (synthetic images)" if is_synthetic else "",
        chosen=", which was chosen on these sets" if alpha == result["alpha"] else "",
        id_only="" if recipe.data.ood_val else "Selected on ID only: the recipe has no ood_val.\n",
        accuracies="\n".join(accuracies),
        shared=f"\nImages that are in two roles:\n\n{shared}" if shared else "",
        values=markdown(", ".join(f"{key} {value}" for key, value in result["train"].items() if key in named)),
        usage="\n".join(usage(name, inputs.clip, has_bias) for name in formats),
        class_names=markdown(", ".join(inputs.class_names)),
        preprocessing=preprocessing(inputs.clip),
        base="the sandbox model of carft-ray" if is_sandbox else f"{markdown(recipe.model.name)}{weights}",
    )


def usage(name: str, clip: Clip, has_bias: bool) -> str:
    """Returns how to use a format: a whole program, which prints the class of each image, and notes."""
    resampling = f"Image.Resampling.{_resampling(clip).upper()}"
    code = _RESIZE[clip.config["preprocess_cfg"]["resize_mode"]]["code"]
    resize = textwrap.indent(code.format(size=clip.image_size, resampling=resampling), "    ")
    return _template(f"use_{name}").substitute(resize=resize, bias=' + head["class_bias"]' if has_bias else "")


def preprocessing(clip: Clip) -> str:
    """Returns the evaluation preprocessing of a model in words."""
    shape = _RESIZE[clip.config["preprocess_cfg"]["resize_mode"]]["words"].format(size=clip.image_size)
    mean, std = (", ".join(f"{value:.8g}" for value in values) for values in (clip.mean, clip.std))
    return f"RGB, {shape} ({_resampling(clip)}), divided by 255, mean ({mean}), std ({std})"


def _resampling(clip: Clip) -> str:
    return "bilinear" if clip.config["preprocess_cfg"]["interpolation"] == "bilinear" else "bicubic"


def _template(name: str) -> Template:
    return Template(Path(__file__).with_name(f"{name}.md").read_text(encoding="utf-8"))
