"""Exponential moving average of the weights over the steps of a training.

    average[t] = sum over i = 0..t of d^(t - i) w[i]  /  sum over i = 0..t of d^(t - i)        d = ema_decay

w[0] are the zero-shot weights and count as one step like the others: divided by the sum of its weights the average has
no pull to its start (the bias correction of Adam, arXiv 1412.6980). Step by step it is

    average[t] = average[t - 1] + (1 - d) / (1 - d^(t + 1)) * (w[t] - average[t - 1])
"""

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def start_average(weights: State) -> dict[str, Tensor]:
    """Returns the average before the first step: a copy of the weights, in their precision."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def update_average(average: State, weights: State, decay: float, step: int) -> None:
    """Takes the weights after step ``step`` (from 1) into the average, in place."""
    share = (1 - decay) / (1 - decay ** (step + 1))
    with torch.no_grad():
        for name, tensor in average.items():
            tensor.lerp_(weights[name], share)
