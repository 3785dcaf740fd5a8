"""Opens an export as its user would: with the stock library alone, in a process of its own, offline.

    python -P reopen.py FORMAT FOLDER QUESTION ANSWER

QUESTION is a safetensors file with ``pixels`` (uint8 [N, S, S, 3]) and the texts ``sentences`` (JSON) in its metadata;
ANSWER gets ``class_logits`` [N, classes] and, where the format has a text tower, ``text_logits`` [N, sentences].
Nothing of carft_ray is imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

BATCH = 8  # images of one pass


def from_open_clip(folder: Path, images: list[Image.Image], sentences: list[str]) -> dict[str, Any]:
    """Returns the logits of an open_clip folder."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.inference_mode():
        texts_MD = model.encode_text(tokenizer(sentences), normalize=True)
        parts = []
        for start in range(0, len(images), BATCH):
            pixels_BCHW = torch.stack([preprocess(image) for image in images[start : start + BATCH]])
            parts.append(model.encode_image(pixels_BCHW, normalize=True))
        features_ND = torch.cat(parts)
        text_logits_NM = model.logit_scale.exp() * features_ND @ texts_MD.T
    return {"class_logits": _classify(folder, features_ND.numpy()), "text_logits": text_logits_NM.numpy()}


def from_huggingface(folder: Path, images: list[Image.Image], sentences: list[str]) -> dict[str, Any]:
    """Returns the logits of a folder of transformers."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    features, logits = [], []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            inputs = processor(text=sentences, images=batch, padding=True, truncation=True, return_tensors="pt")
            output = model(**inputs)
            features.append(output.image_embeds)
            logits.append(output.logits_per_image)
    return {"class_logits": _classify(folder, torch.cat(features).numpy()), "text_logits": torch.cat(logits).numpy()}


def from_onnx(folder: Path, images: list[Image.Image], sentences: list[str]) -> dict[str, Any]:
    """Returns the logits of an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    pixels_NHWC = np.stack([np.asarray(image) for image in images])
    # the first image alone: batches of any size must do
    batches = [pixels_NHWC[:1], *(pixels_NHWC[i : i + BATCH] for i in range(1, len(images), BATCH))]
    return {"class_logits": np.concatenate([session.run(["logits"], {"pixels": batch})[0] for batch in batches])}


FORMATS = {"open_clip": from_open_clip, "huggingface": from_huggingface, "onnx": from_onnx}


def _classify(folder: Path, features_ND: Any) -> Any:
    head = load_file(folder / "class_head.safetensors")
    return features_ND @ head["class_head"].T + head.get("class_bias", np.float32(0))


def main(name: str, folder: str, question: str, answer: str) -> None:
    """Opens the folder and writes the answer."""
    with safe_open(question, "numpy") as file:
        pixels_NHWC, sentences = file.get_tensor("pixels"), json.loads(file.metadata()["sentences"])
    images = [Image.fromarray(pixels) for pixels in pixels_NHWC]
    found = FORMATS[name](Path(folder), images, sentences)
    save_file({key: np.ascontiguousarray(value, dtype=np.float32) for key, value in found.items()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
