"""Exporting a mixed model in the formats that others open: open_clip, Hugging Face, ONNX.

    OUT/{class_head.safetensors, recipe.yaml, README.md}                   always
        {open_clip_config.json, open_clip_model.safetensors}               open_clip: stock open_clip opens it
        {config.json, model.safetensors, preprocessor_config.json, ...}    huggingface: transformers.CLIPModel opens it
        {model.onnx}                                                       onnx: image tower and class head in one

``logits = image_features @ class_head.T`` with normalised features (plus ``class_bias`` where there is one): the scale
is inside the head. Before the folder takes its name, the library of each format opens it
(``results/export/verify.py``), and must give the logits of the model.

The model card says what the export is, how well it does where, and how to use it. Its text is in ``model_card.md`` and,
per format, in ``use_<format>.md``: templates of ``string.Template``. How images are opened and resized is in
``images.toml``.
"""

import importlib.util
import json
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import torch

from carft_ray import __version__
from carft_ray.environment import outside_ranges
from carft_ray.errors import Problem, UsageError, require_choice
from carft_ray.evaluation.alpha_curve import point_at
from carft_ray.files import fsync_file, new_folder, require_new, write_json, write_text
from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.clip import CONFIG_NAME, WEIGHTS_NAME, Clip, write_tokenizer
from carft_ray.recipe.loading import dump_recipe, portable_paths
from carft_ray.recipe.schema.data import plain
from carft_ray.recipe.schema.recipe import with_keys
from carft_ray.results.delivered import Choice, Standing
from carft_ray.results.export.huggingface import misfits, write_huggingface
from carft_ray.results.export.onnx import write_onnx
from carft_ray.results.export.opened import CLASS_NAMES, PREPROCESS
from carft_ray.results.export.verify import farthest_logit, question_of
from carft_ray.results.reading.trained import HEAD_NAME, Trained, evaluate_trained
from carft_ray.training.checkpoint import save_tensors
from carft_ray.untrusted import markdown

# format -> libraries that open it, and the extra of this package that installs them
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "open_clip": (("open_clip",), ""),
    "huggingface": (("transformers",), "hf"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
}
DEFAULT_FORMATS = ("open_clip",)
RECIPE_HEAD = (
    "# Paths of the machine that trained are left out. To repeat the training, put images and weights next to this\n"
    "# file under the names below, or give their paths with --set.\n"
)
_IMAGES = tomllib.loads(Path(__file__).with_name("images.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: The export.
        trial: The training, as `--trial` takes it.
        alpha: Mixing coefficient of its weights.
        standing: What has been done with the model (``delivered.STANDING``); ``other``: it is another one.
        sha256: Of its fine-tuned weights in the study, as in the ledger.
        said: Which model it is, in a sentence.
        num_checked: Images compared.
        formats: Of each format the largest difference of a logit of the reopened export from the model's own, over
            ``num_checked`` images.
    """

    folder: Path
    trial: str
    alpha: float
    standing: Standing
    sha256: str | None
    said: str
    num_checked: int
    formats: dict[str, float]


def parse_formats(words: Sequence[str]) -> tuple[str, ...]:
    """Returns the formats that ``--format`` asks for, each once, in the order of ``FORMATS``.

    Args:
        words: Names, or several with commas between; none is the default.

    Raises:
        UsageError: A name is no format.
    """
    asked = [name.strip() for word in words for name in word.split(",")]
    for name in asked:
        require_choice("--format", "must be a format", name, FORMATS)
    return tuple(name for name in FORMATS if name in asked) or DEFAULT_FORMATS


def export_model(trained: Trained, out_dir: Path, choice: Choice, formats: Sequence[str] = DEFAULT_FORMATS) -> Exported:
    """Writes the mixed model, opens it again from its files, and compares logits before it takes its name.

    Args:
        trained: The training.
        out_dir: Folder to make; it must not exist, or be empty.
        choice: Which model of the study it is, and its alpha.
        formats: Names of ``FORMATS``; all are written into the one folder.

    Raises:
        UsageError: ``out_dir`` holds something, or a format cannot hold this model or needs a library that is missing.
        StorageError: It cannot be written, or the reopened model gives other logits.
    """
    out_dir = out_dir.resolve()
    require_new(out_dir, "--to")
    _require_possible(trained.inputs.clip, formats)
    alpha = choice.alpha
    classifier = trained.classifier(alpha).to(device="cpu", dtype=torch.float32)
    classifier.autocast_dtype = None  # all these libraries compute in float32
    question = question_of(trained, classifier)
    head = {"class_head": classifier.class_head.detach().float()}
    if classifier.class_bias is not None:
        head["class_bias"] = classifier.class_bias.detach().float()
    about = {CLASS_NAMES: json.dumps(trained.inputs.class_names), "alpha": repr(alpha)}
    about[PREPROCESS] = json.dumps(trained.inputs.clip.config["preprocess_cfg"])
    with new_folder(out_dir) as folder:
        save_tensors(folder / HEAD_NAME, head, about)
        recipe = portable_paths(trained.recipe)
        fixed = with_keys(recipe, train={"alpha": alpha})
        write_text(folder / "recipe.yaml", RECIPE_HEAD + dump_recipe(fixed))
        card = model_card(replace(trained, recipe=recipe), choice, formats, "class_bias" in head)
        write_text(folder / "README.md", card)
        _write(folder, trained.inputs.clip, classifier, formats, about)
        for path in folder.iterdir():
            fsync_file(path)
        differences = {name: farthest_logit(folder, name, FORMATS[name][0][-1], question) for name in formats}
    which = (choice.trial, alpha, choice.standing, choice.sha256, choice.said)
    return Exported(out_dir, *which, len(question.pixels_NHWC), differences)


def _require_possible(clip: Clip, formats: Sequence[str]) -> None:
    """Raises for every format that this installation or this model cannot have."""
    problems = []
    for name in formats:
        libraries, extra = FORMATS[name]
        missing = [library for library in libraries if importlib.util.find_spec(library) is None]
        if missing:
            rule = f"{name} needs {' and '.join(missing)}, to write the export and to open it again"
            step = f"Install it: pip install 'carft-ray[{extra}]'"
            problems.append(Problem("--format", rule, "an installation without", next_step=step))
        elif extra:
            problems += outside_ranges(extra)[0]
    if "huggingface" in formats and (found := misfits(clip)):
        rule = "huggingface needs a model for transformers.CLIPModel: a ViT with a class token and CLIP's text tower"
        others = tuple(name for name in FORMATS if name != "huggingface")
        problems.append(Problem("--format", rule, f"a model with {', '.join(found)}", others))
    if problems:
        raise UsageError(problems)


def _write(
    folder: Path, clip: Clip, classifier: ImageClassifier, formats: Sequence[str], about: dict[str, str]
) -> None:
    state = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    for name, tensor in classifier.visual.state_dict().items():
        state[f"visual.{name}"] = tensor.to(state[f"visual.{name}"].dtype)
    if "open_clip" in formats:
        write_json(folder / CONFIG_NAME, clip.config)
        save_tensors(folder / WEIGHTS_NAME, state)
        write_tokenizer(clip, folder)
    if "huggingface" in formats:
        write_huggingface(folder, clip, state)
    if "onnx" in formats:
        write_onnx(folder, classifier, clip.image_size, about)


def model_card(trained: Trained, choice: Choice, formats: Sequence[str], has_bias: bool) -> str:
    """Returns the card as Markdown, with the numbers of `test`, else of `confirm`, else of the search.

    Nothing here opens a test set.

    Args:
        trained: The training.
        choice: Which model it is, and what has measured it.
        formats: What the folder holds, names of ``export.FORMATS``.
        has_bias: The class head has a bias.
    """
    recipe, result, inputs = trained.recipe, trained.result, trained.inputs
    alpha, accuracies, on = choice.alpha, choice.accuracies, choice.on
    num_images = {**result["num_images"], **choice.num_images}
    if not on:
        metrics = point_at(result["curve"], alpha) or evaluate_trained(trained, alpha)[0]
        accuracies = {
            name: f"{100 * metrics[f'accuracy/{name}']:.1f}" for name in result["num_images"] if name != "train"
        }
        on = (
            f"the validation sets{', and chosen on these sets' if alpha == result['alpha'] else ''}; none is a test set"
        )
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
        said=markdown(choice.said),
        sha256=choice.sha256,
        on=on,
        lines="".join(f"- {markdown(line)}\n" for line in choice.lines),
        id_only="" if recipe.data.ood_val else "Selected on ID only: the recipe has no ood_val.\n",
        accuracies="\n".join(
            f"| {markdown(name)} | {text} | {num_images.get(name, 0):,} |" for name, text in accuracies.items()
        ),
        shared=f"\nImages that are in two roles:\n\n{shared}" if shared else "",
        values=markdown(", ".join(f"{key} {value}" for key, value in result["train"].items() if key in named)),
        training_of="Training of the first member" if "soup" in result else "Training",
        usage="\n".join(usage(name, inputs.clip, has_bias) for name in formats),
        class_names=markdown(", ".join(inputs.class_names)),
        preprocessing=preprocessing(inputs.clip),
        base="the sandbox model of carft-ray" if is_sandbox else f"{markdown(recipe.model.name)}{weights}",
    )


def usage(name: str, clip: Clip, has_bias: bool) -> str:
    """Returns how to use a format: a whole program, which prints class and probability of each image, and notes."""
    resampling = f"Image.Resampling.{clip.config['preprocess_cfg']['interpolation'].upper()}"
    code = _IMAGES["resize"][clip.config["preprocess_cfg"]["resize_mode"]]["code"]
    resize = textwrap.indent(code.format(size=clip.image_size, resampling=resampling), "    ")
    bias = ' + head["class_bias"]' if has_bias else ""
    return _template(f"use_{name}").substitute(opening=_IMAGES["opening"], resize=resize, bias=bias)


def preprocessing(clip: Clip) -> str:
    """Returns the evaluation preprocessing of a model in words."""
    shape = _IMAGES["resize"][clip.config["preprocess_cfg"]["resize_mode"]]["words"].format(size=clip.image_size)
    mean, std = (", ".join(f"{value:.8g}" for value in values) for values in (clip.mean, clip.std))
    how = clip.config["preprocess_cfg"]["interpolation"]
    return f"RGB, {shape} ({how}), divided by 255, mean ({mean}), std ({std})"


def _template(name: str) -> Template:
    return Template(Path(__file__).with_name(f"{name}.md").read_text(encoding="utf-8"))
