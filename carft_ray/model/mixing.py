"""Weights between and around two models: mixing, and the running average.

Mixing (WiSE-FT, arXiv 2109.01903): theta_alpha = (1 - alpha) * theta_0 + alpha * theta.

The exponential moving average of the weights over the steps of a training is

    average[t] = sum over i = 0..t of d^(t - i) w[i]  /  sum over i = 0..t of d^(t - i)        d = ema_decay

w[0] are the zero-shot weights and count as one step like the others: divided by the sum of its weights the average is
not pulled to its start (the bias correction of Adam, arXiv 1412.6980). Step by step it is

    average[t] = average[t - 1] + (1 - d) / (1 - d^(t + 1)) * (w[t] - average[t - 1])

A moving teacher is a running mean of w[0] to w[t], too. Its weights are the density of Beta(.5, .5), large at the first
and at the last of all T steps (as TRACER has it):

    teacher[t] = sum over i = 0..t of b[i] w[i]  /  sum over i = 0..t of b[i]
    b[i]       = 1 / sqrt(x (1 - x))  at  x = (i + .5) / (T + 1)
"""

from collections.abc import Mapping

import numpy as np
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
    mixed = {name: torch.empty_like(tensor) for name, tensor in zero_shot_state.items()}
    mix_into(mixed, zero_shot_state, fine_tuned_state, alpha)
    return mixed


@torch.no_grad()
def mix_into(mixed: State, zero_shot: State, fine_tuned: State, alpha: float) -> None:
    """Does ``mix_weights`` into the tensors of ``mixed``, beside which their device holds nothing of a model's size.

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


def update_average(average: State, weights: State, decay: float, step: int) -> None:
    """Takes the weights after step ``step`` (from 1) into the average, in place."""
    move_towards(average, weights, (1 - decay) / (1 - decay ** (step + 1)))


def teacher_shares(num_steps: int) -> list[float]:
    """Returns the share of the weights after each step in the teacher after it, from 1 for step 0."""
    places = (np.arange(num_steps + 1) + 0.5) / (num_steps + 1)
    density = 1 / np.sqrt(places * (1 - places))
    return [float(share) for share in density / np.cumsum(density)]


@torch.no_grad()
def move_towards(average: State, weights: State, share: float) -> None:
    """Takes weights into an average with a share, in place; on a GPU in a few kernels."""
    torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], share)
