"""Sizes of image towers, what a forward pass of one image takes, and what cards can do."""

from typing import NamedTuple

# dense bf16, in 10^12 operations per second: half of what the makers' sheets say with sparsity; the first that matches
PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("A30", 165.0),
    ("L40S", 362.0),
)


class Tower(NamedTuple):
    """Sizes of an image tower, and of its batches: of a step, and of a forward pass."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    embed_dim: int
    batch_size: int = 512
    micro_batch: int = 512


TOWERS = {
    "ViT-B-16": Tower(224, 16, 768, 12, 512),
    "ViT-B-32": Tower(224, 32, 768, 12, 512),
    "ViT-L-14": Tower(224, 14, 1024, 24, 768, 256, 128),
    "tiny": Tower(32, 8, 32, 2, 16, 4, 4),
}


def num_operations(tower: Tower) -> float:
    """Returns the floating-point operations of a forward pass of one image; a multiplication and an addition are two.

    n tokens of width d, L layers, patches of p pixels, embedding D (of the layers' products alone; training takes three
    times as many):

        L * (24 n d^2 + 4 n^2 d)  +  2 (n - 1) 3 p^2 d  +  2 d D
    """
    num_patches, d = (tower.image_size // tower.patch_size) ** 2, tower.width
    n = num_patches + 1
    layers = tower.layers * (24 * n * d**2 + 4 * n**2 * d)
    return float(layers + 2 * num_patches * 3 * tower.patch_size**2 * d + 2 * d * tower.embed_dim)


def peak_of(device_name: str) -> float | None:
    """Returns the operations per second that a card's maker states for dense bf16; None: not known here."""
    words = device_name.split()
    for name, peak in PEAKS:
        if all(any(word == part or word.startswith(f"{part}-") for word in words) for part in name.split()):
            return 1e12 * peak
    return None
