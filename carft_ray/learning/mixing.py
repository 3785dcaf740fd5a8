"""Weight-space mixing (WiSE-FT, arXiv 2109.01903): theta_alpha = (1 - alpha) * theta_0 + alpha * theta."""

from collections.abc import Mapping

import torch
from torch import Tensor

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
    if not 0 <= alpha <= 1:
        raise ValueError(f"0 <= alpha <= 1 must hold, but got alpha={alpha}")
    odd = sorted(zero_shot_state.keys() ^ fine_tuned_state.keys()) or [
        name for name, tensor in zero_shot_state.items() if tensor.shape != fine_tuned_state[name].shape
    ]
    if odd:
        raise ValueError(f"both states must have the same names and shapes, but these differ: {', '.join(odd[:5])}")
    return {name: _mix(zero_shot_state[name], fine_tuned_state[name], alpha) for name in zero_shot_state}


def _mix(zero_shot: Tensor, fine_tuned: Tensor, alpha: float) -> Tensor:
    if not zero_shot.is_floating_point() or alpha == 0 or torch.equal(zero_shot, fine_tuned):
        return zero_shot.clone()
    if alpha == 1:
        return fine_tuned.clone()
    return (1 - alpha) * zero_shot + alpha * fine_tuned
