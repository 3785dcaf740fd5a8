"""Whether an export gives the logits of the model, opened by its own library in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from carft_ray.errors import Problem, StorageError
from carft_ray.model.classifier import ImageClassifier
from carft_ray.results.reading.trained import Trained
from carft_ray.training.checkpoint import load_tensors, save_tensors

TOLERANCE = 1e-3  # largest difference of two logits of size 10 to 100 that rounding explains


NUM_CHECKED = 32  # images


NUM_SENTENCES = 16


BATCH = 8  # images of one pass on the CPU


_REOPEN = Path(__file__).with_name("reopen.py")


def logits_to_give(trained: Trained, classifier: ImageClassifier) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns pixels and sentences to ask an export for, and the logits that it must give."""
    inputs, clip = trained.inputs, trained.inputs.clip
    pixels_NHWC = torch.from_numpy(inputs.validation[0].images_NHWC[:NUM_CHECKED].copy())
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
    return {"pixels": pixels_NHWC, "sentences": sentences}, expected


def farthest_logit(
    folder: Path, name: str, library: str, question: dict[str, Any], expected: dict[str, Tensor]
) -> float:
    """Opens the export in a new process and returns how far the farthest logit is from what it must be.

    Raises:
        StorageError: It does not open, or that is too far.
    """
    with tempfile.TemporaryDirectory() as place:
        asked, answer = Path(place) / "question.safetensors", Path(place) / "answer.safetensors"
        save_tensors(asked, {"pixels": question["pixels"]}, {"sentences": json.dumps(question["sentences"])})
        command = [sys.executable, "-P", "-W", "ignore", str(_REOPEN), name, str(folder), str(asked), str(answer)]
        own = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, **own}, cwd=place
        )
        if done.returncode != 0:
            value = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            value = value.replace(str(folder), "the export")  # the folder has a temporary name
            raise StorageError(Problem(str(folder), f"{library} must open the export", value))
        found = load_tensors(answer)
    # one tensor, since a not-a-number must not lose against a number
    difference = float(torch.cat([(logits - expected[key]).abs().flatten() for key, logits in found.items()]).max())
    if not difference <= TOLERANCE:
        rule = f"{library} must give the logits of the model within {TOLERANCE}"
        raise StorageError(Problem(str(folder), rule, f"a difference of {difference:.3g}"))
    return difference
