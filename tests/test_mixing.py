"""Weight-space mixing: exact ends, NumPy in between, integers and constants untouched."""

import numpy as np
import pytest
import torch
from test_loop import CPU, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from carft_ray.model.mixing import mix_weights
from carft_ray.training.evaluate import Mixtures


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


class Made(TorchDispatchMode):
    """Counts the bytes of tensors that are made."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def tensors(tree):
            return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]

        given = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        found = func(*args, **kwargs or {})
        self.num_bytes += sum(each.nbytes for each in tensors(found) if each.untyped_storage().data_ptr() not in given)
        return found


def test_mixing_makes_one_copy_of_the_weights_and_none_at_an_alpha(tiny_clip, heads):
    mixtures = Mixtures(tiny_clip, heads[0], settings(), CPU)
    size = sum(each.nbytes for each in mixtures.zero_shot.values())
    fine_tuned = {name: tensor + 1 for name, tensor in mixtures.zero_shot.items()}
    with Made() as made, mixtures.between(lambda: fine_tuned) as mixed:  # on the CPU zero-shot's weights are there
        assert made.num_bytes == size
        for alpha in (0.0, 0.3, 1.0):
            mixed(alpha)
        assert made.num_bytes == size
