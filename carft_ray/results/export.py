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
from carft_ray.errors import Problem, StorageError
from carft_ray.files import new_folder, require_new, write_json, write_text
from carft_ray.learning.checkpoint import load_tensors, save_tensors
from carft_ray.learning.classifier import ImageClassifier
from carft_ray.learning.clip import CONFIG_NAME, WEIGHTS_NAME, load_folder
from carft_ray.recipe.loading import dump_recipe
from carft_ray.results.trained import Trained, evaluate_trained

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
        out_dir: Folder to make; it must not exist, or be empty.
        alpha: Mixing coefficient; None: the chosen one.

    Raises:
        UsageError: ``out_dir`` holds something.
        StorageError: It cannot be written, or the reopened model gives other logits.
    """
    out_dir = out_dir.resolve()
    require_new(out_dir, "--to")
    alpha = trained.result["alpha"] if alpha is None else alpha
    classifier = trained.classifier(alpha).to("cpu")
    classifier.autocast_dtype = None  # stock open_clip computes in float32
    clip = trained.materials.clip
    state = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    for name, tensor in classifier.visual.state_dict().items():
        state[f"visual.{name}"] = tensor.to(state[f"visual.{name}"].dtype)
    head = {"class_head": (classifier.logit_scale * classifier.unit_class_head()).float()}
    if classifier.form == "folded":
        head["class_head"] = classifier.class_head.detach().float()
    if classifier.class_bias is not None:
        head["class_bias"] = classifier.class_bias.detach().float()
    names = {"class_names": json.dumps(trained.materials.class_names), "form": "folded", "alpha": repr(alpha)}
    with new_folder(out_dir) as folder:
        write_json(folder / CONFIG_NAME, clip.config)
        save_tensors(folder / WEIGHTS_NAME, state)
        save_tensors(folder / HEAD_NAME, head, names)
        fixed = trained.recipe.model_copy(update={"train": trained.recipe.train.model_copy(update={"alpha": alpha})})
        write_text(folder / "recipe.yaml", dump_recipe(fixed))
        write_text(folder / "README.md", _model_card(trained, alpha, "class_bias" in head))
        difference, num_checked = _compare(trained, classifier, folder)
    return Exported(out_dir, alpha, difference, num_checked)


def _compare(trained: Trained, classifier: ImageClassifier, folder: Path) -> tuple[float, int]:
    """Returns the largest difference of logits between the export and the model, and over how many images."""
    reopened, head = load_folder(folder), load_tensors(folder / HEAD_NAME)
    images = trained.materials.validation[0].images_NHWC[:NUM_CHECKED]
    pixels = torch.from_numpy(images.copy())
    tower = ImageClassifier(
        reopened.model.visual,  # type: ignore[arg-type]  # open_clip is untyped
        head["class_head"],
        1.0,
        reopened.mean,
        reopened.std,
    ).eval()
    with torch.inference_mode():
        logits = tower(pixels)[1] + head.get("class_bias", 0)
        difference = float((logits - classifier(pixels)[1]).abs().max())
    if not difference <= TOLERANCE:
        rule = f"the export must give the logits of the model within {TOLERANCE}"
        raise StorageError(Problem(str(folder), rule, f"a difference of {difference:.3g}"))
    return difference, len(pixels)


def _model_card(trained: Trained, alpha: float, has_bias: bool) -> str:
    recipe, result = trained.recipe, trained.result
    metrics = next((point for point in result["curve"] if point["alpha"] == alpha), None)
    metrics = metrics or evaluate_trained(trained, alpha)
    chosen = ", which was chosen on these very sets" if alpha == result["alpha"] else ""
    synthetic = recipe.model.name == "sandbox" or recipe.data.train.source == "sandbox"
    lines = [
        f"# {recipe.name}: {recipe.model.name} fine-tuned with CAR-FT",
        "",
        f"Made by carft-ray {__version__} from `{trained.name}`. Weights are mixed at alpha = {alpha:g} (0 is the",
        "zero-shot model, 1 the fine-tuned one). The recipe is in `recipe.yaml`.",
        "",
        "## Accuracy on the validation sets" + (" (synthetic images)" if synthetic else ""),
        "",
        f"Measured at alpha = {alpha:g}{chosen}; test sets were not read.",
        *([] if recipe.data.ood_val else ["Selected on ID only: the recipe has no ood_val."]),
        "",
        "| set | accuracy, % | images |",
        "|---|---|---|",
    ]
    for name, count in result["num_images"].items():
        if name != "train":
            lines.append(f"| {name} | {100 * metrics[f'accuracy/{name}']:.1f} | {count:,} |")
    bias = ' + head["class_bias"]' if has_bias else ""
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
        'head = load_file("FOLDER/class_head.safetensors")',
        f'logits = model.eval().encode_image(images, normalize=True) @ head["class_head"].T{bias}',
        "```",
        "",
        f"Classes, in the order of the logits: {', '.join(trained.materials.class_names)}.",
        "",
    ]
    return "\n".join(lines)
