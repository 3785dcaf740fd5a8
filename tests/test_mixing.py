"""Weight-space mixing: exact ends, NumPy in between, integers and constants untouched."""

import numpy as np
import pytest
import torch
from test_towers import settings
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
    fine_tuned = {
        **zero_shot,
        "weight": zero_shot["weight"] + torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "num_batches_tracked": torch.tensor(9),
    }
    return zero_shot, fine_tuned


def test_mix_at_alpha_zero_and_one_returns_the_end_models_bit_for_bit(states):
    zero_shot, fine_tuned = states
    for alpha, end in ((0.0, zero_shot), (1.0, fine_tuned)):
        mixed = mix_weights(zero_shot, fine_tuned, alpha)
        assert all(torch.equal(mixed[name], end[name]) for name in ("weight", "running_mean", "mask"))


def test_mix_equals_numpy_in_float64(states):
    zero_shot, fine_tuned = states
    for alpha in (0.1, 0.5, 0.73):
        expected = (1 - alpha) * zero_shot["weight"].numpy() + alpha * fine_tuned["weight"].numpy()
        np.testing.assert_allclose(mix_weights(zero_shot, fine_tuned, alpha)["weight"].numpy(), expected, atol=1e-9)


def test_integers_and_tensors_equal_at_both_ends_come_from_zero_shot(states):
    mixed = mix_weights(*states, 0.37)
    for name in ("num_batches_tracked", "mask", "running_mean"):
        assert torch.equal(mixed[name], states[0][name])


def test_mixed_tensors_are_copies(states):
    mix_weights(*states, 0.0)["weight"].zero_()
    assert states[0]["weight"].abs().sum() > 0


def test_wrong_alpha_and_wrong_names_are_refused(states):
    with pytest.raises(ValueError, match="0 <= alpha <= 1"):
        mix_weights(*states, 1.5)
    with pytest.raises(ValueError, match="differ: extra"):
        mix_weights(states[0], {**states[1], "extra": torch.zeros(1)}, 0.5)
    with pytest.raises(ValueError, match="differ: weight"):
        mix_weights(states[0], {**states[1], "weight": torch.zeros(1)}, 0.5)


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
    mixtures = Mixtures(tiny_clip, heads[0], settings(), torch.device("cpu"))
    size = sum(each.nbytes for each in mixtures.zero_shot.values())
    fine_tuned = {name: tensor + 1 for name, tensor in mixtures.zero_shot.items()}
    with Made() as made, mixtures.between(lambda: fine_tuned) as mixed:  # on the CPU zero-shot's weights are there
        assert made.num_bytes == size
        for alpha in (0.0, 0.3, 1.0):
            mixed(alpha)
        assert made.num_bytes == size
