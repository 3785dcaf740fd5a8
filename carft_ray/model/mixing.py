"""Weights between and around two models: mixing, and the running average.

Mixing (WiSE-FT, arXiv 2109.01903): theta_alpha = (1 - alpha) * theta_0 + alpha * theta.

The exponential moving average of the weights over the steps of a training is

    average[t] = sum over i = 0..t of d^(t - i) w[i]  /  sum over i = 0..t of d^(t - i)        d = ema_decay

w[0] are the zero-shot weights and count as one step like the others: divided by the sum of its weights the average is
not pulled to its start (the bias correction of Adam, arXiv 1412.6980). Step by step it is

    average[t] = average[t - 1] + (1 - d) / (1 - d^(t + 1)) * (w[t] - average[t - 1])
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from carft_ray.model.classifier import ImageClassifier, arranged, build_classifier
from carft_ray.model.clip import Clip
from carft_ray.recipe.schema.fine_tuning import TrainConfig

State = Mapping[str, Tensor]


def mix_weights(zero_shot_state: State, fine_tuned_state: State, alpha: float) -> dict[str, Tensor]:
    """Returns the mixed state; at 0 and 1 bit for bit the end models.

    All floating tensors are mixed, class head and BatchNorm statistics included. Integer buffers and tensors that are
    the same at both ends (constant tables, statistics of a BatchNorm in eval mode) are copied from ``zero_shot_state``.

    Args:
        zero_shot_state: Name -> tensor of the model that training started from.
        fine_tuned_state: The same names and shapes after training.
        alpha: Weight of ``fine_tuned_state``, in [0, 1].

    Raises:
        ValueError: ``alpha`` is outside [0, 1], or names or shapes differ.
    """
    mixed = {name: torch.empty_like(tensor) for name, tensor in zero_shot_state.items()}
    _mix(mixed, zero_shot_state, fine_tuned_state, alpha)
    return mixed


@torch.no_grad()
def _mix(mixed: State, zero_shot: State, fine_tuned: State, alpha: float) -> None:
    """Mixes into the tensors of ``mixed``, beside which nothing of the size of a model is made on their device.

    ``zero_shot`` is on that device, ``fine_tuned`` may be on another.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"0 <= alpha <= 1 must hold, but got alpha={alpha}")
    odd = sorted(zero_shot.keys() ^ fine_tuned.keys()) or [
        name for name, tensor in zero_shot.items() if tensor.shape != fine_tuned[name].shape
    ]
    if odd:
        raise ValueError(f"both states must have the same names and shapes, but these differ: {', '.join(odd[:5])}")
    for name, start in zero_shot.items():
        into = mixed[name]
        if not start.is_floating_point() or alpha == 0:
            into.copy_(start)
            continue
        into.copy_(fine_tuned[name])
        if torch.equal(start, into):
            into.copy_(start)  # the sign of a zero, too
        elif alpha < 1:
            torch.lerp(start, into, alpha, out=into)


class Mixtures:
    """The mixtures of one training, one after the other in the same classifier.

    Outside of ``between`` the classifier shares the weights of ``clip`` and takes no memory of its own. Within, a GPU
    holds the classifier and one copy of the zero-shot weights.

    Args:
        clip: The model that training starts from.
        class_head_CD: Unit rows [C, D].
        train: The values of the training.
        device: Where to compute.

    Attributes:
        zero_shot: The zero-shot state, on the CPU.
    """

    def __init__(self, clip: Clip, class_head_CD: Tensor, train: TrainConfig, device: torch.device) -> None:
        self._classifier, self._device = build_classifier(clip, class_head_CD, train, device), device
        tower = {f"visual.{name}": tensor for name, tensor in clip.model.visual.state_dict().items()}  # type: ignore[union-attr]  # open_clip is untyped
        own = self._classifier.state_dict()
        self.zero_shot = {name: tower.get(name, own[name]).to("cpu", own[name].dtype) for name in own}
        self._classifier.load_state_dict(self.zero_shot, assign=True)

    @contextlib.contextmanager
    def between(self, fine_tuned: State) -> Iterator[Callable[[float], ImageClassifier]]:
        """Gives a function that mixes the weights at an alpha and returns the classifier, the same one each time.

        Args:
            fine_tuned: The state at alpha 1, on the CPU or the device.
        """
        try:
            start = {name: tensor.to(self._device) for name, tensor in self.zero_shot.items()}
            self._classifier.load_state_dict({name: tensor.clone() for name, tensor in start.items()}, assign=True)
            arranged(self._classifier)
            mixed = self._classifier.state_dict()

            def at(alpha: float) -> ImageClassifier:
                _mix(mixed, start, fine_tuned, alpha)
                return self._classifier

            yield at
        finally:
            self._classifier.load_state_dict(self.zero_shot, assign=True)


def update_average(average: State, weights: State, decay: float, step: int) -> None:
    """Takes the weights after step ``step`` (from 1) into the average, in place; on a GPU in a few kernels."""
    share = (1 - decay) / (1 - decay ** (step + 1))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], share)
