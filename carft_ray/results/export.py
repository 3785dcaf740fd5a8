"""Exporting a mixed model: an open_clip folder that stock open_clip opens, the class head, and a model card.

    OUT/{open_clip_config.json, open_clip_model.safetensors, class_head.safetensors, recipe.yaml, README.md}

``logits = image_features @ class_head.T`` with normalised features (plus ``class_bias`` where there is one): the scale
is inside the head.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from carft_ray import __version__
from carft_ray.errors import Problem, StorageError, UsageError
from carft_ray.files import new_folder, write_json, write_text
from carft_ray.learning.checkpoint import save_tensors
from carft_ray.learning.classifier import ImageClassifier
from carft_ray.learning.clip import CONFIG_NAME, WEIGHTS_NAME, load_folder
from carft_ray.recipe.loading import dump_recipe
from carft_ray.results.trained import Trained

HEAD_NAME = "class_head.safetensors"
TOLERANCE = 1e-3  # largest difference of two logits of size 10 to 100 that rounding explains
NUM_CHECKED = 64  # images


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: The export.
        alpha: Mixing coefficient of its weights.
        largest_difference: Of a logit of the reopened export from the model's own, over ``num_checked`` images.
        num_checked: Images compared.
    """

    folder: Path
    alpha: float
    largest_difference: float
    num_checked: int


def export_model(trained: Trained, out_dir: Path, alpha: float | None = None) -> Exported:
    """Writes the mixed model, opens it again from its files, and compares logits before it takes its name.

    Args:
        trained: The training.
        out_dir: A folder that does not exist yet.
        alpha: Mixing coefficient; None: the chosen one.

    Raises:
        UsageError: ``out_dir`` exists.
        StorageError: It cannot be written, or the reopened model gives other logits.
    """
    out_dir = out_dir.resolve()
    if out_dir.exists():
        raise UsageError(Problem(str(out_dir), "must not exist yet", next_step="Give another folder with --to."))
    alpha = trained.result["alpha"] if alpha is None else alpha
    classifier = trained.classifier(alpha).to("cpu")
    clip = trained.materials.clip
    state = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    for name, tensor in classifier.visual.state_dict().items():
        state[f"visual.{name}"] = tensor.to(state[f"visual.{name}"].dtype)
    head = classifier.class_head.detach()
    tensors = {"class_head": head if classifier.form == "folded" else classifier.logit_scale * head}
    if classifier.class_bias is not None:
        tensors["class_bias"] = classifier.class_bias.detach()
    names = {"class_names": json.dumps(trained.materials.class_names), "form": "folded", "alpha": repr(alpha)}
    with new_folder(out_dir) as folder:
        write_json(folder / CONFIG_NAME, clip.config)
        save_tensors(folder / WEIGHTS_NAME, state)
        save_tensors(folder / HEAD_NAME, tensors, names)
        fixed = trained.recipe.model_copy(update={"train": trained.recipe.train.model_copy(update={"alpha": alpha})})
        write_text(folder / "recipe.yaml", dump_recipe(fixed))
        write_text(folder / "README.md", _model_card(trained, alpha))
        difference, num_checked = _compare(trained, classifier, folder)
    return Exported(out_dir, alpha, difference, num_checked)


def _compare(trained: Trained, classifier: ImageClassifier, folder: Path) -> tuple[float, int]:
    """Returns the largest difference of logits between the export and the model, and over how many images."""
    reopened = load_folder(folder)
    images = trained.materials.validation[0].images_NHWC[:NUM_CHECKED]
    pixels = torch.from_numpy(images.copy())
    head = ImageClassifier(
        reopened.model.visual,  # type: ignore[arg-type]  # open_clip is untyped
        classifier.unit_class_head(),
        reopened.logit_scale,
        reopened.mean,
        reopened.std,
        bias=classifier.class_bias is not None,
    ).eval()
    if classifier.class_bias is not None:
        head.class_bias = classifier.class_bias
    with torch.inference_mode():
        difference = float((head(pixels)[1] - classifier(pixels)[1]).abs().max())
    if not difference <= TOLERANCE:
        rule = f"the export must give the logits of the model within {TOLERANCE}"
        raise StorageError(Problem(str(folder), rule, f"a difference of {difference:.3g}"))
    return difference, len(pixels)


def _model_card(trained: Trained, alpha: float) -> str:
    recipe, result = trained.recipe, trained.result
    synthetic = recipe.model.name == "sandbox" or recipe.data.train.source == "sandbox"
    lines = [
        f"# {recipe.name}: {recipe.model.name} fine-tuned with CAR-FT",
        "",
        f"Made by carft-ray {__version__} from `{trained.name}`. Weights are mixed at alpha = {alpha:g} (0 is the",
        "zero-shot model, 1 the fine-tuned one). The recipe is in `recipe.yaml`.",
        "",
        "## Accuracy on the validation sets" + (" (synthetic images)" if synthetic else ""),
        "",
        f"Measured at alpha = {result['alpha']:g}, which was chosen on these very sets; test sets were not read.",
        "",
        "| set | accuracy, % | images |",
        "|---|---|---|",
    ]
    for name, count in result["num_images"].items():
        if name != "train":
            lines.append(f"| {name} | {100 * result['metrics'][f'accuracy/{name}']:.1f} | {count:,} |")
    values = ", ".join(f"{key} {value}" for key, value in result["train"].items() if value is not None)
    lines += [
        "",
        f"Training: {values}.",
        "",
        "## Use",
        "",
        "```python",
        "import open_clip",
        "from safetensors.torch import load_file",
        "",
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")',
        'head = load_file("FOLDER/class_head.safetensors")["class_head"]',
        "logits = model.eval().encode_image(images, normalize=True) @ head.T",
        "```",
        "",
        f"Classes, in the order of the logits: {', '.join(trained.materials.class_names)}.",
        "",
    ]
    return "\n".join(lines)
