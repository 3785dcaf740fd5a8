"""Weight-space mixing: exact ends, NumPy in between, integers and constants untouched."""

import numpy as np
import pytest
import torch

from carft_ray.model.mixing import mix_weights


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    zero_shot = {
        "weight": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "running_mean": torch.randn(3, generator=generator),
        "num_batches_tracked": torch.tensor(7),
        "mask": torch.full((2, 2), -torch.inf),
    }
    moved = zero_shot["weight"] + torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return zero_shot, {**zero_shot, "weight": moved, "num_batches_tracked": torch.tensor(9)}


def test_a_mixture_is_that_of_numpy_and_its_ends_are_the_models_bit_for_bit(states):
    zero_shot, fine_tuned = (state["weight"].numpy().copy() for state in states)
    for alpha in (0.0, 0.1, 0.73, 1.0):
        mixed = mix_weights(*states, alpha)
        expected = (1 - alpha) * zero_shot + alpha * fine_tuned
        np.testing.assert_allclose(mixed["weight"].numpy(), expected, rtol=0, atol=1e-9 if 0 < alpha < 1 else 0)
        for name in ("num_batches_tracked", "mask", "running_mean"):  # integers, and what is equal at both ends
            assert torch.equal(mixed[name], states[0][name])
        mixed["weight"].zero_()  # a copy


def test_wrong_alpha_and_wrong_names_are_refused(states):
    with pytest.raises(ValueError, match="0 <= alpha <= 1"):
        mix_weights(*states, 1.5)
    for name in ("extra", "weight"):
        with pytest.raises(ValueError, match=f"differ: {name}"):
            mix_weights(states[0], {**states[1], name: torch.zeros(1)}, 0.5)
