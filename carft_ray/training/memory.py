"""The memory of a training step, known before it runs: the step is made with tensors that have shapes and no content.

The functions are those of the training loop, so that the estimate follows them. It leaves out what a device keeps for
itself (some 0.5 to 1 GB on a GPU), what lies idle between pieces in use, and what a compiled tower saves.
"""

import copy
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.clip import Clip
from carft_ray.model.device import compute_dtype, device_of
from carft_ray.model.heads import Say
from carft_ray.model.lora import trained_weights
from carft_ray.model.mixing import update_average
from carft_ray.model.tower import shape_tower
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.losses import Loss, context_distribution
from carft_ray.training.optimizer import build_optimizer, clip_gradients
from carft_ray.training.out_of_memory import micro_batch_of

MEASURED = (256, 512)  # images of a pass: so many that the peak lies at its end, and grows by the same for each image
USABLE = 0.9  # of a device's memory: see above


class StepMemory(NamedTuple):
    """The peak of a step in bytes, for a micro-batch of so many images: ``fixed + num_images * an_image``.

    It is at least ``least``: with few images it lies where all gradients are there, or in the optimizer.
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


def step_memory(clip: Clip, train: TrainConfig, class_head_CD: Tensor, context_head_TD: Tensor) -> StepMemory:
    """Returns what a training step takes; some 10 s for a large tower, and no memory.

    Args:
        clip: The model.
        train: Its precision, ``auto`` being fp32, and what shapes a tower; batch and micro-batch do not count. With
            ``kl_weight`` above 0 the frozen tower takes part, as where targets are not stored.
        class_head_CD: Its form counts, [C, D].
        context_head_TD: Its form counts, [T, D].

    Raises:
        RecipeError: The tower cannot do what ``train`` asks.
    """
    least, few, many = (_peak(clip, train, (class_head_CD, context_head_TD), number) for number in (1, *MEASURED))
    an_image = (many - few) / (MEASURED[1] - MEASURED[0])
    return StepMemory(least, few - MEASURED[0] * an_image, an_image)


def micro_batch_to_begin_with(
    recipe: Recipe,
    clip: Clip,
    heads: Mapping[str, Tensor],
    memory_gb: float | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Returns which micro-batch fits a GPU by the estimate, and what a step takes with it; nothing for a CPU.

    Args:
        recipe: With the values of the training.
        clip: The model.
        heads: ``class_head`` and ``context_head``.
        memory_gb: Memory of the GPU; None: of this process's own, if it has one.
        say: Called before it takes some seconds.

    Returns:
        ``micro_batch``, the largest half of a half of a worker's part of the batch, 0: not one image fits; ``step_gb``
        with it, and ``gpu_gb`` of the device.
    """
    device, train = device_of(recipe), recipe.train
    if memory_gb is None and device.type != "cuda":
        return {}
    say("estimating the memory of a step")
    is_bf16 = train.precision == "auto" if memory_gb is not None else compute_dtype(train, device) is not None
    train = train.model_copy(update={"precision": "bf16"}) if is_bf16 else train
    needed = step_memory(clip, train, heads["class_head"], heads["context_head"])
    there = memory_gb * 1e9 if memory_gb is not None else float(torch.cuda.mem_get_info(device)[1])
    most = micro_batch_of(train.model_copy(update={"micro_batch": None}), recipe.resources.num_workers)
    fits = needed.largest(there, most)
    return {"micro_batch": fits, "step_gb": round(needed.of(max(fits, 1)) / 1e9, 2), "gpu_gb": round(there / 1e9, 1)}


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's initialisation has no types
    """Counts the bytes of all tensors that are alive at a time; ``most`` is their largest number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, size)
        return made

    def _freed(self, size: int) -> None:
        self.now -= size


def _peak(clip: Clip, train: TrainConfig, given: tuple[Tensor, Tensor], num_images: int) -> float:
    """Returns the largest number of bytes that two steps hold at a time; the first makes the optimizer's tensors."""
    dtype = torch.float64 if train.precision == "fp64" else torch.float32
    held = _Held()
    with FakeTensorMode(), held:
        heads = [torch.empty(head.shape, dtype=dtype) for head in given]
        classifier = _classifier(clip, heads[0], train).train()
        shape_tower(classifier, train)
        optimizer = build_optimizer(classifier, train)
        frozen = _classifier(clip, heads[1], train).eval() if train.kl_weight else None
        averaged = trained_weights(classifier) if train.ema_decay is not None else {}
        average = {name: tensor.detach().clone() for name, tensor in averaged.items()}
        loss = Loss(heads[1], clip.logit_scale, train.model_copy(update={"micro_batch": None}))
        pixels_BHWC = torch.empty(num_images, clip.image_size, clip.image_size, 3, dtype=torch.uint8)
        labels_B = torch.empty(num_images, dtype=torch.int64)
        for step in (1, 2):
            _step(classifier, frozen, loss, pixels_BHWC, labels_B)
            clip_gradients(list(classifier.parameters()), train.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if train.ema_decay is not None:
                update_average(average, trained_weights(classifier), train.ema_decay, step)
    return held.most


def _step(classifier: nn.Module, frozen: Any, loss: Loss, pixels_BHWC: Tensor, labels_B: Tensor) -> None:
    target_BT = None
    if frozen is not None:
        with torch.no_grad():
            features_BD = frozen.features(pixels_BHWC)
            target_BT = context_distribution(features_BD, loss.context_head_TD, loss.context_scale).exp().half()
    loss.backward(classifier, pixels_BHWC, labels_B, target_BT, 1 / len(labels_B))


def _classifier(clip: Clip, head: Tensor, train: TrainConfig) -> ImageClassifier:
    """Returns what ``build_classifier`` does, whose tensors have shapes alone; they can be neither moved nor copied."""
    dtype = compute_dtype(train, torch.device("cpu"))
    classifier = ImageClassifier(nn.Identity(), head, clip.logit_scale, clip.mean, clip.std, train.head_bias, dtype)
    visual: nn.Module = clip.model.visual  # type: ignore[assignment]  # open_clip is untyped
    made: dict[int, Any] = {}
    for tensor in (*visual.parameters(), *visual.buffers()):
        hollow = torch.empty(tensor.shape, dtype=head.dtype if tensor.is_floating_point() else tensor.dtype)
        made[id(tensor)] = nn.Parameter(hollow) if isinstance(tensor, nn.Parameter) else hollow
    classifier.visual = copy.deepcopy(visual, made)
    return classifier
