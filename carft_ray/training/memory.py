"""The memory of a training step, estimated from what autograd keeps of a forward pass of a few images.

The estimate leaves out what a device keeps for itself (some 0.5 to 1 GB on a GPU), what lies idle between pieces in
use, and what a compiled tower saves.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carft_ray.model.classifier import ImageClassifier, build_classifier
from carft_ray.model.clip import Clip
from carft_ray.model.device import compute_dtype, device_of
from carft_ray.model.heads import Say
from carft_ray.model.tower import layer_groups, shape_tower, training_bytes
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.out_of_memory import explained_shortage, micro_batch_of

FEW, MANY = 2, 4  # images of the two passes
USABLE = 0.9  # of a device's memory: see above


class StepMemory(NamedTuple):
    """The peak of a step in bytes, for a micro-batch of so many images: ``fixed + num_images * an_image``.

    It is at least ``least``: with few images the peak is in the optimizer, where all gradients exist.
    """

    least: float
    fixed: float
    an_image: float

    def of(self, num_images: int) -> float:
        """Returns the peak with a micro-batch of so many images."""
        return max(self.least, self.fixed + num_images * self.an_image)

    def largest(self, num_bytes: float, most: int) -> int:
        """Returns the micro-batch to begin with: the largest half of a half of ``most`` that fits; 0: not one image."""
        while most and self.of(most) > USABLE * num_bytes:
            most //= 2
        return most


def step_memory(clip: Clip, train: TrainConfig, class_head_CD: Tensor, device: torch.device) -> StepMemory:
    """Returns what a training step takes; some seconds for a large tower.

    Args:
        clip: The model.
        train: Its precision, and what shapes a tower; batch and micro-batch do not count. With a penalty
            that needs the frozen tower it takes part, as if targets are not stored.
        class_head_CD: Its form counts, [C, D].
        device: Where the passes run, with one copy of the weights.

    Raises:
        RecipeError: The tower cannot do what ``train`` asks.
        OutOfMemoryError: The passes do not fit.
    """
    again = 0.0
    if train.grad_checkpointing:  # one block at a time computes its activations again
        plain = train.model_copy(update={"grad_checkpointing": False})
        blocks = layer_groups(clip.model.visual)[1:-1]  # type: ignore[arg-type]  # open_clip is untyped
        again = step_memory(clip, plain, class_head_CD, device).an_image / max(1, len(blocks))
    with explained_shortage("a training step", MANY, clip.image_size, device):
        classifier = build_classifier(clip, class_head_CD, train, device).train()
        shape_tower(classifier, train)
        few, many = (_kept(classifier, clip.image_size, number) for number in (FEW, MANY))
    grown = (sum(many) - sum(few)) / (MANY - FEW)
    copies = sum(few) - FEW * grown  # of weights, in the precision of the pass
    gradient = max(Counter(many) - Counter(few), default=0) / MANY  # of the largest activation, beside all of them
    sizes = [(each.nbytes // 4, each.requires_grad) for each in classifier.parameters()]  # as numbers of fp32
    weights, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    least = training_bytes(weights, trained, train) - (0 if train.compares_models else 4 * weights)
    if train.text_weight:
        least += 4 * sum(p.numel() for name, p in clip.model.named_parameters() if not name.startswith("visual."))
    return StepMemory(least, least - 4 * trained + copies, grown + gradient + again)


def micro_batch_to_begin_with(
    recipe: Recipe,
    clip: Clip,
    class_head_CD: Tensor,
    memory_gb: float | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Returns which micro-batch fits a GPU by the estimate, and what a step takes with it; nothing for a CPU.

    Args:
        recipe: With the values of the training.
        clip: The model.
        class_head_CD: Its form counts, [C, D].
        memory_gb: Memory of the GPU; None: of this process's own, if it has one.
        say: Called before it takes some seconds.

    Returns:
        ``micro_batch``, the largest half of a half of a worker's part of the batch, 0: not one image fits; ``step_gb``
        with it, and ``gpu_gb`` of the device, or of its share that a worker gets.

    Raises:
        OutOfMemoryError: Same as in ``step_memory``.
    """
    device, train = device_of(recipe), recipe.train
    if memory_gb is None and device.type != "cuda":
        return {}
    say("estimating the memory of a step")
    is_bf16 = train.precision == "auto" if memory_gb is not None else compute_dtype(train, device) is not None
    train = train.model_copy(update={"precision": "bf16"}) if is_bf16 else train
    needed = step_memory(clip, train, class_head_CD, device)
    there = memory_gb * 1e9 if memory_gb is not None else float(torch.cuda.mem_get_info(device)[1])
    there *= min(1, recipe.resources.gpus_per_worker or 1)
    most = micro_batch_of(train.model_copy(update={"micro_batch": None}), recipe.resources.num_workers)
    fits = needed.largest(there, most)
    return {"micro_batch": fits, "step_gb": round(needed.of(max(fits, 1)) / 1e9, 2), "gpu_gb": round(there / 1e9, 1)}


def _kept(classifier: ImageClassifier, image_size: int, num_images: int) -> list[int]:
    """Returns the bytes of each tensor, other than weights, that a forward pass keeps for the backward pass."""
    weights = {each.untyped_storage().data_ptr() for each in classifier.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is kept as it is would refer to itself, and never be freed

    pixels_BHWC = torch.zeros(num_images, image_size, image_size, 3, dtype=torch.uint8, device=classifier.mean.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, logits_BC = classifier(pixels_BHWC)
    del logits_BC
    return [*kept.values()]
