"""Whether an export gives the logits of the model when its own library opens it: offline, with nothing of ours."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from carft_ray.errors import Problem, StorageError
from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.pretrained import offline
from carft_ray.model.weights_files import quiet
from carft_ray.results.export.onnx import ONNX_NAME
from carft_ray.results.reading.trained import HEAD_NAME, Trained
from carft_ray.training.checkpoint import load_tensors

TOLERANCE = 1e-3  # largest difference of two logits of size 10 to 100 that rounding explains
NUM_CHECKED, SIDE = 32, 8  # pictures, and their random colours along a side
NUM_SENTENCES = 16
BATCH = 8  # images of one pass on the CPU


@dataclass(frozen=True, eq=False)
class Question:
    """What an export is asked, and the logits that it must give.

    Attributes:
        pixels_NHWC: Pictures, uint8, as the model takes them.
        sentences: M prompts.
        expected: ``class_logits`` [N, classes] and ``text_logits`` [N, M].
    """

    pixels_NHWC: Tensor
    sentences: list[str]
    expected: dict[str, Tensor]

    def images(self) -> list[list[Image.Image]]:
        """Returns the images in batches of ``BATCH``."""
        images = [Image.fromarray(pixels) for pixels in self.pixels_NHWC.numpy()]
        return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def question_of(trained: Trained, classifier: ImageClassifier) -> Question:
    """Returns pictures and prompts, with the logits that the model gives them.

    The pictures are drawn: smooth ones of ``SIDE`` x ``SIDE`` random colours. So an export needs no images.
    """
    inputs, clip = trained.inputs, trained.inputs.clip
    colours_NSS3 = np.random.default_rng(0).integers(0, 256, (NUM_CHECKED, SIDE, SIDE, 3), np.uint8)
    pictures = [Image.fromarray(colours).resize((clip.image_size, clip.image_size)) for colours in colours_NSS3]
    pixels_NHWC = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    sentences = [template.replace("{}", name) for template in inputs.templates for name in inputs.class_names]
    sentences = sentences[:: -(-len(sentences) // NUM_SENTENCES)]
    model: Any = clip.model
    with torch.inference_mode():
        features_ND = torch.cat([classifier.features(part_BHWC) for part_BHWC in torch.split(pixels_NHWC, BATCH)])
        texts_MD = functional.normalize(model.encode_text(clip.tokenizer(sentences)), dim=-1)
        expected = {
            "class_logits": classifier.logits(features_ND),
            "text_logits": clip.logit_scale * functional.normalize(features_ND, dim=-1) @ texts_MD.T,
        }
    return Question(pixels_NHWC, sentences, expected)


def farthest_logit(folder: Path, name: str, library: str, question: Question) -> float:
    """Opens the export as its user would, and returns how far the farthest logit is from what it must be.

    Args:
        folder: The export.
        name: Its format.
        library: What opens it.
        question: What it is asked.

    Raises:
        StorageError: It does not open, or that is too far.
    """
    try:
        # transformers shows on stderr how far it is
        with offline(True), quiet(), contextlib.redirect_stderr(io.StringIO()), torch.inference_mode():
            found = _LOGITS[name](folder, question)
    except Exception as error:  # the libraries raise many kinds
        said = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        said = said.replace(str(folder), "the export")  # the folder has a temporary name
        raise StorageError(Problem(str(folder), f"{library} must open the export", said)) from error
    # one tensor, since a not-a-number must not lose against a number
    gaps = [(logits - question.expected[key]).abs().flatten() for key, logits in found.items()]
    difference = float(torch.cat(gaps).max())
    if not difference <= TOLERANCE:
        rule = f"{library} must give the logits of the model within {TOLERANCE}"
        raise StorageError(Problem(str(folder), rule, f"a difference of {difference:.3g}"))
    return difference


def _of_open_clip(folder: Path, question: Question) -> dict[str, Tensor]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    texts_MD = model.encode_text(tokenizer(question.sentences), normalize=True)
    batches = (torch.stack([preprocess(image) for image in images]) for images in question.images())
    features_ND = torch.cat([model.encode_image(pixels_BCHW, normalize=True) for pixels_BCHW in batches])
    text_logits_NM = model.logit_scale.exp() * features_ND @ texts_MD.T
    return {"class_logits": _classify(folder, features_ND), "text_logits": text_logits_NM}


def _of_huggingface(folder: Path, question: Question) -> dict[str, Tensor]:
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    asked = {"text": question.sentences, "padding": True, "truncation": True, "return_tensors": "pt"}
    outputs = [model(**processor(images=images, **asked)) for images in question.images()]
    features_ND = torch.cat([output.image_embeds for output in outputs])
    text_logits_NM = torch.cat([output.logits_per_image for output in outputs])
    return {"class_logits": _classify(folder, features_ND), "text_logits": text_logits_NM}


def _of_onnx(folder: Path, question: Question) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / ONNX_NAME), providers=["CPUExecutionProvider"])
    pixels_NHWC = question.pixels_NHWC.numpy()
    # the first image alone: batches of any size must do
    batches = [pixels_NHWC[:1], *(pixels_NHWC[i : i + BATCH] for i in range(1, len(pixels_NHWC), BATCH))]
    logits = [session.run(["logits"], {"pixels": pixels_BHWC})[0] for pixels_BHWC in batches]
    return {"class_logits": torch.cat([torch.from_numpy(each) for each in logits])}


def _classify(folder: Path, features_ND: Tensor) -> Tensor:
    head = load_tensors(folder / HEAD_NAME)
    return features_ND @ head["class_head"].T + head.get("class_bias", torch.zeros(()))


_LOGITS: dict[str, Callable[[Path, Question], dict[str, Tensor]]] = {
    "open_clip": _of_open_clip,
    "huggingface": _of_huggingface,
    "onnx": _of_onnx,
}
