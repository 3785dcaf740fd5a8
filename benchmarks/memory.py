"""What a training step takes on a GPU: ``python -m benchmarks.gpu --memory``, some ten minutes, no GPU

The table of docs/gpu.md, by ``carft_ray.training.memory``: towers with random weights, 1,000 classes, the frozen tower
online, AdamW. The last columns: the largest micro-batch, at most 512, for cards of so many GB.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from carft_ray.errors import DataError
from carft_ray.model.clip import load_clip
from carft_ray.recipe.schema.model import ModelConfig
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.memory import step_memory

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "RN50", "ViT-B-16-SigLIP")
WAYS = (
    ("bf16", {"precision": "bf16"}),
    ("bf16, checkpointing", {"precision": "bf16", "grad_checkpointing": True}),
    ("bf16, LoRA 8", {"precision": "bf16", "lora_rank": 8}),
    ("fp32", {"precision": "fp32"}),
)
CARDS = (16, 24, 40, 80)
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- memory -->", "<!-- end -->"


def rows(name: str) -> list[str]:
    """Returns the rows of a model."""
    clip, found = load_clip(ModelConfig(name=name, pretrained="random")), []
    width = clip.config["model_cfg"]["embed_dim"]
    class_head_CD = torch.zeros(1000, width)
    for way, values in WAYS:
        if name.startswith("RN") and {"lora_rank", "grad_checkpointing"} & set(values):
            continue  # a ResNet has neither
        needed = step_memory(clip, TrainConfig.model_validate(values), class_head_CD, torch.device("cpu"))
        fits = " | ".join(str(needed.largest(1e9 * card, 512)) for card in CARDS)
        found.append(f"| {name} | {way} | {needed.fixed / 1e9:.1f} | {needed.an_image / 1e6:.0f} | {fits} |")
    return found


def table(names: Sequence[str]) -> None:
    """Prints the table; of all models, also writes it into the document."""
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lines = [f"| model | | fixed, GB | per image, MB | {cards} |", "|---|---|---|---|" + "---|" * len(CARDS)]
    for name in names or MODELS:
        try:
            found = rows(name)
        except DataError as error:  # its tokenizer is not here
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        print("\n".join(found), flush=True)
        lines += found
    if not names:
        before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        DOCUMENT.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), "utf-8")
