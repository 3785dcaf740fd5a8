"""Opening an export to classify with it, in whichever format it has: without a download, a pickle or a tokenizer.

An export comes from a stranger: its tensors, names and sizes are compared with each other before anything is computed.
open_clip's and Hugging Face's files are opened as ``model.name: local-dir:FOLDER`` of a recipe is, which needs no
transformers; an ONNX file by onnxruntime.

Shape letters: B images of a batch, S side, C classes, D embedding width.
"""

import importlib.util
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from carft_ray.data.source import PixelArray
from carft_ray.errors import CarftError, DataError, Problem, UsageError
from carft_ray.files import is_address
from carft_ray.model.catalog import HUGGING_FACE_CONFIG
from carft_ray.model.classifier import ImageClassifier, arranged
from carft_ray.model.clip import CONFIG_NAME, WEIGHTS_NAME, input_of
from carft_ray.model.pretrained import offline, open_model, preprocess_config
from carft_ray.model.weights_files import read_weights
from carft_ray.recipe.schema.model import LOCAL_DIR, ModelConfig
from carft_ray.results.export.onnx import ONNX_NAME
from carft_ray.results.reading.trained import HEAD_NAME
from carft_ray.study.holding import is_study
from carft_ray.untrusted import parse_json

# format -> files that it needs, the first choice first
FILES = {
    "open_clip": (CONFIG_NAME, WEIGHTS_NAME),
    "huggingface": (HUGGING_FACE_CONFIG, "model.safetensors"),
    "onnx": (ONNX_NAME,),
}
CLASS_NAMES, PREPROCESS = "class_names", "preprocess_cfg"  # in the metadata of the head
MOST_SIDE = 4096  # pixels of an input: the largest of open_clip's models has 512
_NUM_SHOWN = 200  # characters of a value
_AGAIN = "Restore the export from a copy, or write it again: carft-ray export STUDY --to DIR"


@dataclass(frozen=True, eq=False)
class Head:
    """The class head of an export.

    Attributes:
        class_head_CD: float32, with the scale.
        class_bias_C: None: it has none.
        class_names: C words.
        preprocess: How images are resized, open_clip's ``preprocess_cfg``; empty in older exports.
    """

    class_head_CD: Tensor
    class_bias_C: Tensor | None
    class_names: tuple[str, ...]
    preprocess: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Opened:
    """An export that classifies.

    Attributes:
        folder: The export.
        form: Which of its formats is used.
        class_names: In the order of the logits.
        image_size: S.
        to_input: Resize and crop, RGB in, RGB of S x S pixels out.
        device: Where it computes.
        logits: uint8 [B, S, S, 3] -> float32 [B, C] on any device.
    """

    folder: Path
    form: str
    class_names: tuple[str, ...]
    image_size: int
    to_input: Callable[[Image.Image], Image.Image]
    device: torch.device
    logits: Callable[[PixelArray], Tensor]


def require_export(folder: Path) -> str:
    """Returns the format with which an export is opened.

    Raises:
        UsageError: The folder is a study, is none, or nothing that ``export`` has written.
        DataError: It has no format whole.
    """
    if is_address(str(folder)) or not folder.is_dir():
        value = "an address" if is_address(str(folder)) else "a file" if folder.exists() else "no such folder"
        raise UsageError(Problem(str(folder), "EXPORT must be the folder of an export on this machine", value))
    if not (folder / HEAD_NAME).is_file():
        what, step = f"one without {HEAD_NAME}", "Write one: carft-ray export STUDY --to DIR"
        if is_study(folder):
            to = shlex.quote(str(Path("exports") / folder.resolve().name))
            what, step = "a study", f"Write it: carft-ray export {shlex.quote(str(folder))} --to {to}"
        raise UsageError(Problem(str(folder), "EXPORT must be the folder of an export", what, next_step=step))
    for form, names in FILES.items():
        if all((folder / name).is_file() for name in names):
            return form
    needed = "; or ".join(" and ".join(names) for names in FILES.values())
    raise DataError(Problem(str(folder), f"an export must contain {needed}", "none of them whole", next_step=_AGAIN))


def read_head(folder: Path) -> Head:
    """Returns the class head of an export.

    Raises:
        DataError: It is damaged, or its tensors and names do not match.
    """
    path = folder / HEAD_NAME
    tensors = read_weights(path, str(path))
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    names, preprocess = (_parsed(about.get(key, "")) for key in (CLASS_NAMES, PREPROCESS))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        rule = f"must have the names of the classes in its metadata ({CLASS_NAMES})"
        raise DataError(Problem(str(path), rule, about.get(CLASS_NAMES, "none")[:_NUM_SHOWN], next_step=_AGAIN))
    number, head_CD, bias_C = len(names), tensors.get("class_head"), tensors.get("class_bias", torch.zeros(len(names)))
    if head_CD is None or head_CD.ndim != 2 or len(head_CD) != number or tuple(bias_C.shape) != (number,):
        rule = f"must have class_head, with a row for each of its {number:,} classes, and class_bias alike or none"
        value = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise DataError(Problem(str(path), rule, value[:_NUM_SHOWN], next_step=_AGAIN))
    if not all(one.is_floating_point() and bool(one.isfinite().all()) for one in (head_CD, bias_C)):
        raise DataError(Problem(str(path), "must have finite numbers", "others", next_step=_AGAIN))
    return Head(
        head_CD.float(),
        bias_C.float() if "class_bias" in tensors else None,
        tuple(names),
        preprocess if isinstance(preprocess, dict) else {},
    )


def open_export(folder: Path, form: str, head: Head) -> Opened:
    """Opens an export on the GPU, if there is one, else on the CPU.

    Args:
        folder: The export.
        form: As of ``require_export``.
        head: As of ``read_head``.

    Raises:
        UsageError: It needs a library that is missing.
        DataError: It is damaged, or its files do not match each other.
    """
    try:
        image_size, to_input, device, logits = (_open_onnx if form == "onnx" else _open_tower)(folder, head)
        found = tuple(logits(np.zeros((1, image_size, image_size, 3), np.uint8)).shape)
    except (RuntimeError, ValueError) as error:  # of torch, for sizes that do not go together
        rule = f"the model must give the {head.class_head_CD.shape[1]} numbers that {HEAD_NAME} takes"
        raise DataError(Problem(str(folder), rule, _said(error), next_step=_AGAIN)) from error
    except UsageError:
        raise
    except CarftError as error:  # of the model of a recipe
        places = [problem.place.replace("model.name", str(folder)) for problem in error.problems]
        problems = [replace(p, place=place, next_step=_AGAIN) for p, place in zip(error.problems, places, strict=True)]
        raise DataError(problems) from error
    if found != (1, len(head.class_names)):
        rule = f"must give a logit for each of its {len(head.class_names):,} classes"
        raise DataError(Problem(str(folder), rule, f"logits of the shape {found}", next_step=_AGAIN))
    return Opened(folder, form, head.class_names, image_size, to_input, device, logits)


Parts = tuple[int, Callable[[Image.Image], Image.Image], torch.device, Callable[[PixelArray], Tensor]]


def _open_tower(folder: Path, head: Head) -> Parts:
    with offline(True):
        model: Any = open_model(ModelConfig(name=f"{LOCAL_DIR}{folder}")).model
    preprocess = preprocess_config(model)
    image_size, to_input = _input_of(folder, preprocess)
    mean, std = preprocess["mean"], preprocess["std"]
    # as the evaluation of a training computes; in float32, as all exports are
    classifier = ImageClassifier(model.visual, head.class_head_CD, 1.0, mean, std, head.class_bias_C is not None)
    if classifier.class_bias is not None and head.class_bias_C is not None:
        classifier.class_bias.data.copy_(head.class_bias_C)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    arranged(classifier.eval().to(device))

    def logits(pixels_BHWC: PixelArray) -> Tensor:
        with torch.inference_mode():
            found: Tensor = classifier(torch.from_numpy(pixels_BHWC).to(device))[1]
            return found

    return image_size, to_input, device, logits


def _open_onnx(folder: Path, head: Head) -> Parts:
    path = folder / ONNX_NAME
    if importlib.util.find_spec("onnxruntime") is None:
        step = "Install it: pip install 'carft-ray[onnx]'"
        raise UsageError(Problem(str(path), "needs onnxruntime", "an installation without", next_step=step))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is in the exception
    there = onnxruntime.get_available_providers()
    kinds = [kind for kind in ("CUDAExecutionProvider", "CPUExecutionProvider") if kind in there]

    def run(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # onnxruntime raises many kinds
            rule = "onnxruntime must open and run the model"
            raise DataError(Problem(str(path), rule, _said(error), next_step=_AGAIN)) from error

    session = run(lambda: onnxruntime.InferenceSession(str(path), options, providers=kinds))
    given = [(one.name, one.type, *one.shape[1:]) for one in session.get_inputs()]
    side = given[0][2] if given and len(given[0]) > 2 else 0
    problem = None
    if given != [("pixels", "tensor(uint8)", side, side, 3)] or type(side) is not int:
        problem = ("must take only pixels, uint8 [batch, side, side, 3]", ", ".join(map(str, given)))
    elif "logits" not in [one.name for one in session.get_outputs()]:
        problem = ("must give logits", "none")
    elif not head.preprocess:
        problem = (f"{HEAD_NAME} must say how images are resized ({PREPROCESS})", "none: an older carft-ray wrote it")
    if problem:
        rule, value = problem
        raise DataError(Problem(str(path), rule, value[:_NUM_SHOWN], next_step=_AGAIN))
    image_size, to_input = _input_of(folder, {**vars(PreprocessCfg()), **head.preprocess, "size": side})

    def logits(pixels_BHWC: PixelArray) -> Tensor:
        found = run(lambda: session.run(["logits"], {"pixels": pixels_BHWC}))[0]
        return torch.from_numpy(np.asarray(found, np.float32))

    return image_size, to_input, torch.device("cuda" if kinds[0].startswith("CUDA") else "cpu"), logits


def _input_of(folder: Path, preprocess: dict[str, Any]) -> tuple[int, Callable[[Image.Image], Image.Image]]:
    size, to_input = input_of(preprocess)
    if not 1 <= size <= MOST_SIDE:
        rule = f"the model must take images of at most {MOST_SIDE:,} pixels a side"
        raise DataError(Problem(str(folder), rule, f"{size:,}"))
    return size, to_input


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_NUM_SHOWN]


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
