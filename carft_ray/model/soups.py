"""Means of the weights of several trainings with one start (soups), in one pass with one member in memory at a time.

Mean ("Model soups", arXiv 2203.05482): theta = 1/k * sum over i of theta_i.

Model Stock (arXiv 2403.19522), tensor by tensor, with theta_0 the weights that all started from:

    d_i     = theta_i - theta_0
    cos     = mean of <d_i, d_j> / (|d_i| |d_j|) over the pairs i < j
    t       = k cos / (1 + (k - 1) cos), within [0, 1]
    theta   = t * mean + (1 - t) * theta_0

The paper has one angle for all pairs; the mean of their cosines stands for it. It comes from u = sum of d_i / |d_i|:
(|u|^2 - k) / (k (k - 1)). A tensor that no member has moved stays as it is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class Mean:
    """The running mean of states, summed in float32 (float64 tensors in their own type).

    Floating tensors are averaged, BatchNorm's statistics and the class head included; other tensors are those of the
    first state. Of one state the mean is that state, bit for bit.

    Args:
        start: The state that all began with, for ``stock``; None: only the mean is wanted.

    Attributes:
        number: States so far.
    """

    def __init__(self, start: State | None = None) -> None:
        self.number = 0
        self._start, self._first = start, dict[str, Tensor]()
        self._sums, self._units, self._moved = dict[str, Tensor](), dict[str, Tensor](), dict[str, int]()

    @torch.no_grad()
    def add(self, state: State) -> None:
        """Takes one more state in.

        Raises:
            ValueError: It has other names, shapes or types than those before.
        """
        if odd := self.differing(state):
            raise ValueError(f"all states must have the same tensors, but these differ: {', '.join(odd[:5])}")
        self._first = self._first or dict(state)
        self.number += 1
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                continue
            exact = _exact(tensor)
            if name in self._sums:
                self._sums[name] += exact
            else:
                self._sums[name] = exact.clone()
            if self._start is not None:
                moved = exact - _exact(self._start[name])
                if size := float(torch.linalg.vector_norm(moved, dtype=torch.float64)):
                    unit = moved / size
                    self._units[name] = unit if name not in self._units else self._units[name] + unit
                    self._moved[name] = self._moved.get(name, 0) + 1

    def differing(self, state: State) -> list[str]:
        """Returns the names of the tensors that a state has not as those before have them; none for the first one."""
        if not self._first:
            return []
        known = {name: (tensor.shape, tensor.dtype) for name, tensor in self._first.items()}
        given = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        return sorted(name for name in {**known, **given} if known.get(name) != given.get(name))

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """Returns the mean, in the types of the states; at least one was added."""
        means = {name: (total / self.number).to(self._first[name].dtype) for name, total in self._sums.items()}
        return {name: means.get(name, tensor) for name, tensor in self._first.items()}

    @torch.no_grad()
    def with_state(self, state: State) -> dict[str, Tensor]:
        """Returns the mean with one more state, which it does not keep.

        Raises:
            ValueError: As ``add``.
        """
        if odd := self.differing(state):
            raise ValueError(f"all states must have the same tensors, but these differ: {', '.join(odd[:5])}")
        found = dict(self._first)
        for name, total in self._sums.items():
            found[name] = ((total + _exact(state[name])) / (self.number + 1)).to(state[name].dtype)
        return found

    @torch.no_grad()
    def stock(self) -> dict[str, Tensor]:
        """Returns Model Stock's weights; of one state, that state.

        Raises:
            ValueError: The start is not known.
        """
        if self._start is None:
            raise ValueError("Model Stock needs the state that all began with")
        found = self.mean()
        if self.number < 2:
            return found
        for name, unit in self._units.items():
            share = stock_share(unit, self._moved[name])
            start, total = _exact(self._start[name]), self._sums[name]
            found[name] = torch.lerp(start, total / self.number, share).to(found[name].dtype)
        return found


def stock_share(unit: Tensor, number: int) -> float:
    """Returns t of Model Stock for one tensor.

    Args:
        unit: Sum of the unit vectors of its changes.
        number: How many changed it; with one alone there is no angle, and t is 1.
    """
    if number < 2:
        return 1.0
    squared = float(torch.linalg.vector_norm(unit, dtype=torch.float64)) ** 2
    cosine = (squared - number) / (number * (number - 1))
    return min(1.0, max(0.0, number * cosine / (1 + (number - 1) * cosine)))


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
