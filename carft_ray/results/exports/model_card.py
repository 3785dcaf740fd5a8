"""The model card of an export: what it is, how well it does where, and how to use it, per format."""

from collections.abc import Sequence

from carft_ray import __version__
from carft_ray.learning.models.clip import Clip
from carft_ray.recipe.sets import plain
from carft_ray.results.reading.trained import Trained, evaluate_trained

_TITLES = {"open_clip": "open_clip", "huggingface": "transformers", "onnx": "onnxruntime"}


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
    metrics = metrics or evaluate_trained(trained, alpha)
    chosen = ", which was chosen on these very sets" if alpha == result["alpha"] else ""
    synthetic = recipe.model.name == "sandbox" or plain(recipe.data.train).source == "sandbox"
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
    if trained.shared:
        lines += ["", "Images that stand in two roles:", "", *(f"- {line}" for line in trained.shared)]
    values = ", ".join(f"{key} {value}" for key, value in result["train"].items() if value is not None)
    lines += ["", f"Training: {values}.", ""]
    bias = ' + head["class_bias"]' if has_bias else ""
    for name in formats:
        lines += [f"## Use with {_TITLES[name]}", "", "```python", *_code(name, inputs.clip, bias), "```", ""]
        lines += [*_NOTES[name], ""] if name in _NOTES else []
    lines += [
        f"Classes, in the order of the logits: {', '.join(inputs.class_names)}.",
        "",
        f"Images: {preprocessing(inputs.clip)}.",
        "",
        'Three kinds of images had other pixels here than `convert("RGB")` gives, which the code above calls: fully',
        "transparent pixels were white, grey of 16 bits was scaled to 8, photos turned upright. Change them first.",
        "",
        "## Licence",
        "",
        f"The weights come from {_base(trained)}: its licence holds for them, beside that of the training images.",
        "",
    ]
    return "\n".join(lines)


def preprocessing(clip: Clip) -> str:
    """Returns the evaluation preprocessing of a model in words."""
    preprocess, size = clip.config["preprocess_cfg"], clip.image_size
    shape = {
        "shortest": f"the shorter side resized to {size} pixels, {size} x {size} cut out of the middle",
        "longest": f"the longer side resized to {size} pixels, padded with black to {size} x {size}",
        "squash": f"resized to {size} x {size} pixels",
    }[preprocess["resize_mode"]]
    mean, std = (", ".join(f"{value:.8g}" for value in values) for values in (clip.mean, clip.std))
    return f"RGB, {shape} ({_resampling(clip).lower()}), divided by 255, mean ({mean}), std ({std})"


def _base(trained: Trained) -> str:
    model = trained.recipe.model
    if model.name == "sandbox":
        return "the sandbox model of carft-ray"
    if model.pretrained is None:
        return f"`{model.name}`"
    return f"`{model.name}` with the weights `{model.pretrained}`"


def _resampling(clip: Clip) -> str:
    return "BILINEAR" if clip.config["preprocess_cfg"]["interpolation"] == "bilinear" else "BICUBIC"


def _code(name: str, clip: Clip, bias: str) -> list[str]:
    """Returns a whole program, which prints the class of each image; its first lines are for the reader to change."""
    given = ['folder = "FOLDER"  # that of this file', 'paths = ["image.jpg"]', ""]
    head = [
        'with safe_open(f"{folder}/class_head.safetensors", "pt") as file:',
        "    head = {key: file.get_tensor(key) for key in file.keys()}",
        '    class_names = json.loads(file.metadata()["class_names"])',
    ]
    images = ["images = [Image.open(path) for path in paths]"]
    told = ["for path, index in zip(paths, logits.argmax(1)):", "    print(path, class_names[index])"]
    if name == "open_clip":
        return [
            "import json",
            "",
            "import open_clip",
            "import torch",
            "from PIL import Image",
            "from safetensors import safe_open",
            "",
            *given,
            'model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")',
            "model.eval()",
            *head,
            *images,
            "with torch.inference_mode():",
            "    features = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)",
            f'    logits = features @ head["class_head"].T{bias}',
            *told,
        ]
    if name == "huggingface":
        return [
            "import json",
            "",
            "import torch",
            "from PIL import Image",
            "from safetensors import safe_open",
            "from transformers import CLIPModel, CLIPProcessor",
            "",
            *given,
            "model = CLIPModel.from_pretrained(folder).eval()",
            'processor = CLIPProcessor.from_pretrained(folder, backend="pil")',
            *head,
            *images,
            "with torch.inference_mode():",
            '    inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")',
            "    features = torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)",
            f'    logits = features @ head["class_head"].T{bias}',
            *told,
        ]
    return [
        "import json",
        "",
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image",
        "",
        *given,
        "def pixels(image):",
        *(f"    {line}" for line in _resize_code(clip)),
        "",
        "",
        'session = onnxruntime.InferenceSession(f"{folder}/model.onnx")',
        'class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])',
        *images,
        'logits = session.run(["logits"], {"pixels": np.stack([pixels(image) for image in images])})[0]',
        *told,
    ]


def _resize_code(clip: Clip) -> list[str]:
    """Returns lines that make the model's input of a PIL image as open_clip does: resized, cropped, uint8 [S, S, 3]."""
    size, resampling = clip.image_size, f"Image.Resampling.{_resampling(clip)}"
    mode = clip.config["preprocess_cfg"]["resize_mode"]
    if mode == "squash":
        return ['image = image.convert("RGB")', f"return np.asarray(image.resize(({size}, {size}), {resampling}))"]
    if mode == "longest":
        return [
            'image = image.convert("RGB")',
            f"shape = [round(side / (max(image.size) / {size})) for side in image.size]",
            f'square = Image.new("RGB", ({size}, {size}))',
            f"square.paste(image.resize(shape, {resampling}), [({size} - side) // 2 for side in shape])",
            "return np.asarray(square)",
        ]
    return [
        'image = image.convert("RGB")',
        f"shape = [int({size} * side / min(image.size)) for side in image.size]",
        f"left, top = [round((side - {size}) / 2) for side in shape]",
        f"box = (left, top, left + {size}, top + {size})",
        f"return np.asarray(image.resize(shape, {resampling}).crop(box))",
    ]


_NOTES = {
    "open_clip": (
        "Zero-shot classification with prompts works as with any model of open_clip, and so does",
        "`clip_benchmark eval --model local-dir:FOLDER`.",
    ),
    "huggingface": ("Without `backend` the library resizes by torchvision, which rounds some pixels otherwise.",),
    "onnx": (
        "The input `pixels` is uint8 [batch, height, width, 3], RGB, of any batch; division by 255, mean and standard",
        "deviation are inside. `image_features` is a second output.",
    ),
}
