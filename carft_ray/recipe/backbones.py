"""Ranges of the search for the models that people bring, by what their names begin with.

``learning_rate`` for ViT-B: 140 public runs of plain fine-tuning of ViT-B/16 on ImageNet have their best OOD accuracy
at or below 1e-6 and their best ID accuracy at 1e-5; at 3e-5 both fall. For the other real models no such table is
public: their ranges are those of ViT-B moved by what larger and smaller models usually want, and are wide.
``kl_weight`` grows with the square of the model's logit scale, so its range belongs to a scale of about 100.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranges:
    """What a recipe for a model says.

    Attributes:
        learning_rate: Low and high end, searched on a log scale.
        start: Learning rate of the baselines.
        kl_weight: Low and high end, searched on a log scale.
        kl_start: KL weight of the baseline ``paper``.
        batch_size: Global batch of the base recipe.
        sure: The range of the learning rate comes from public runs of this very kind of model.
    """

    learning_rate: tuple[str, str]
    start: str
    kl_weight: tuple[str, str]
    kl_start: str
    batch_size: int
    sure: bool


_REAL = ("0.01", "100")
BACKBONES = {
    "sandbox": Ranges(("1e-4", "5e-3"), "5e-4", ("0.1", "100"), "10", 64, True),
    "ViT-B-16": Ranges(("3e-7", "3e-5"), "1e-5", _REAL, "1", 512, True),
    "ViT-B-32": Ranges(("3e-7", "1e-4"), "3e-5", _REAL, "1", 512, False),
    "ViT-L": Ranges(("1e-7", "3e-5"), "1e-5", _REAL, "1", 512, False),
    "RN": Ranges(("1e-6", "3e-4"), "3e-5", _REAL, "1", 512, False),
    "": Ranges(("1e-7", "1e-4"), "1e-5", _REAL, "1", 512, False),
}


def ranges_for(model: str) -> Ranges:
    """Returns the ranges for a model name; the longest beginning that fits decides."""
    return BACKBONES[max((name for name in BACKBONES if model.startswith(name)), key=len)]
