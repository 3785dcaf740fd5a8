"""The model that is trained: image tower plus class head.

Shape letters: B images, C classes, D embedding width.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from carft_ray.model.clip import Clip
from carft_ray.model.device import compute_dtype
from carft_ray.model.lora import merged_state
from carft_ray.recipe.schema.train import TrainConfig


class ImageClassifier(nn.Module):
    """An image tower with a trainable class head, starting as the zero-shot classifier.

    The scale is inside the parameter (``W' = s * class_head``, logits ``f @ W'.T``): the learning rates of the
    literature belong to this form.

    Args:
        visual: Image tower [B, 3, H, W] -> [B, D]; it is copied.
        class_head_CD: Unit rows [C, D].
        logit_scale: s, frozen.
        mean: Per channel, for pixels in [0, 1].
        std: Per channel.
        bias: Adds a trained bias, 0 at the start (as wise-ft has it).
        autocast_dtype: Precision of the tower's compute; None is the precision of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        visual: nn.Module,
        class_head_CD: Tensor,
        logit_scale: float,
        mean: Iterable[float],
        std: Iterable[float],
        bias: bool = False,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.visual = deepcopy(visual).requires_grad_(True)
        self.logit_scale = logit_scale
        self.autocast_dtype = autocast_dtype
        self.fixed_batch = 0  # images that the tower always gets, blank ones behind the given; 0: as many as there are
        # convolutions were measured a quarter faster with the channels last, on the CPU too
        self.memory_format = torch.contiguous_format if _needs_channels_first(visual) else torch.channels_last
        head_CD = class_head_CD.detach().clone()
        self.class_head = nn.Parameter(logit_scale * head_CD)
        self.class_bias = nn.Parameter(torch.zeros(len(head_CD), dtype=head_CD.dtype)) if bias else None
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(tuple(values), dtype=head_CD.dtype).view(1, 3, 1, 1), False)

    def features(self, pixels_BHWC: Tensor) -> Tensor:
        """Returns the un-normalised image embeddings [B, D] of uint8 pixels [B, H, W, 3], float32 or wider."""
        return self.embed(normalised(pixels_BHWC, self.mean, self.std))

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Returns the un-normalised image embeddings [B, D] of normalised images [B, 3, H, W], float32 or wider."""
        dtype = self.autocast_dtype
        if self.fixed_batch:
            num_images = len(images_BCHW)
            images_BCHW = functional.pad(images_BCHW, (0, 0, 0, 0, 0, 0, 0, max(0, self.fixed_batch - num_images)))
        images_BCHW = images_BCHW.contiguous(memory_format=self.memory_format)
        with torch.autocast(images_BCHW.device.type, dtype, enabled=dtype is not None):
            output = self.visual(images_BCHW)
        # CoCa's tower gives its tokens too
        features_BD = output[0] if isinstance(output, tuple) else output
        if self.fixed_batch:
            features_BD = features_BD[:num_images]
        return at_least_float32(features_BD)

    def logits(self, features_BD: Tensor) -> Tensor:
        """Returns the class logits [B, C] of embeddings [B, D], outside autocast."""
        with torch.autocast(features_BD.device.type, enabled=False):
            unit_BD = functional.normalize(features_BD, dim=-1)
            return functional.linear(unit_BD, self.class_head, self.class_bias)

    def forward(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Returns embeddings [B, D] and class logits [B, C] of uint8 pixels [B, H, W, 3]."""
        features_BD = self.features(pixels_BHWC)
        return features_BD, self.logits(features_BD)

    def train(self, mode: bool = True) -> "ImageClassifier":
        """Switches to training; the image tower stays in eval mode.

        So the statistics of BatchNorm are those of pre-training, and the KL at step 0 is 0 for towers, too, whose
        pre-training used stochastic depth, dropout, as modules or as functions, or left out patches.
        """
        super().train(mode)
        for module in self.visual.modules():
            # without dropout, attention computes the same in both modes, but in eval mode of frozen layers by another
            # path, with other last bits. Some of timm's keep in eval mode what they have made of other weights, and in
            # some releases forget it only in training mode, in which these modules do nothing else
            plain = isinstance(module, nn.MultiheadAttention) and module.dropout == 0
            module.training = (mode and plain) or hasattr(module, "attention_bias_cache")
        return self

    def state(self) -> dict[str, Tensor]:
        """Returns a copy of everything that training changes and mixing mixes, on the CPU: plain merged weights."""
        return copies(merged_state(self))


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of tensors on the CPU, without gradients."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _needs_channels_first(visual: nn.Module) -> bool:
    """Finds a convolution whose gradient crashes the process on the CPU when the channels come last.

    That is oneDNN's (3.12 in torch 2.13), for 1 x 1 kernels with a stride over fewer than 16 channels: the first layer
    of FastViT, which MobileCLIP has.
    """
    convolutions = (module for module in visual.modules() if isinstance(module, nn.Conv2d))
    return any(c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 16 for c in convolutions)


def normalised(pixels_BHWC: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns ``(pixels / 255 - mean) / std`` of uint8 pixels, [B, 3, H, W] in the memory layout of the pixels.

    On the CPU in half the time of the formula: a whole row is one vector there, three colours are none.

    Args:
        pixels_BHWC: uint8 [B, H, W, 3].
        mean: [1, 3, 1, 1] or [3]; its precision is that of the result.
        std: As ``mean``.
    """
    num_images, height, width, _ = pixels_BHWC.shape
    rows = pixels_BHWC.reshape(num_images, height, 3 * width).to(mean.dtype).div_(255)
    rows.sub_(mean.flatten().repeat(width)).div_(std.flatten().repeat(width))
    return rows.view(num_images, height, width, 3).permute(0, 3, 1, 2)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns ``tensor`` in float32, or as it is when it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def build_classifier(
    clip: Clip,
    class_head_CD: Tensor,
    train: TrainConfig,
    device: torch.device,
    kind: type["ImageClassifier"] = ImageClassifier,
) -> ImageClassifier:
    """Returns the zero-shot classifier that a training starts from, on ``device``, in the precision of the recipe.

    See ``device.compute_dtype``.
    """
    dtype = compute_dtype(train, device)
    visual: nn.Module = clip.model.visual  # type: ignore[assignment]  # open_clip is untyped
    classifier = kind(visual, class_head_CD, clip.logit_scale, clip.mean, clip.std, train.head_bias, dtype)
    classifier.to(device=device, dtype=torch.float64 if train.precision == "fp64" else torch.float32)
    return arranged(classifier)


def arranged(classifier: ImageClassifier) -> ImageClassifier:
    """Brings the weights on a GPU into the memory layout of the images, in place; else cuDNN does so in every pass."""
    if classifier.class_head.is_cuda:
        classifier.to(memory_format=classifier.memory_format)  # type: ignore[call-overload]  # torch's form for it alone
    return classifier
