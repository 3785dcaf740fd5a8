"""Identities of the context KL (science of CAR-FT: each holds for any model)."""

import math

import numpy as np
import pytest
import torch

from carft_ray.training.losses import context_distribution, context_entropy, context_kl

B, D, T, S = 7, 12, 9, 20.0


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(3)
    return rng.normal(size=(B, D)), rng.normal(size=(B, D)), unit(rng, T, D)


@pytest.fixture
def tensors(arrays):
    return tuple(torch.from_numpy(array) for array in arrays)


def mean_kl(features, features0, head, scale):
    """The KL term of a batch, by the functions that training calls."""
    return context_kl(context_distribution(features, head, scale), context_distribution(features0, head, scale)).mean()


def numpy_log_p(features, head, scale):
    z = scale * (features / np.linalg.norm(features, axis=1, keepdims=True)) @ head.T
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def numpy_kl(features, features0, head, scale):
    log_p, log_p0 = numpy_log_p(features, head, scale), numpy_log_p(features0, head, scale)
    return float((np.exp(log_p0) * (log_p0 - log_p)).sum(axis=1).mean())


def test_kl_and_distribution_equal_numpy(arrays, tensors):
    np.testing.assert_allclose(
        context_distribution(tensors[0], tensors[2], S).numpy(), numpy_log_p(arrays[0], arrays[2], S), atol=1e-9
    )
    assert mean_kl(*tensors, S).item() == pytest.approx(numpy_kl(*arrays, S), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_identical_features_and_of_one_context_is_exactly_zero(tensors, dtype):
    features, features0, head = (tensor.to(dtype) for tensor in tensors)
    assert mean_kl(features, features.clone(), head, S).item() == 0.0
    assert mean_kl(features, features0, head[:1], S).item() == 0.0


def test_kl_is_never_negative():
    rng = np.random.default_rng(0)
    head = torch.from_numpy(unit(rng, T, D))
    for step in (1e-8, 1e-4, 1e-2, 1.0):
        features0 = torch.from_numpy(rng.normal(size=(200, D)))
        features = features0 + step * torch.from_numpy(rng.normal(size=(200, D)))
        log_p, log_p0 = context_distribution(features, head, 100.0), context_distribution(features0, head, 100.0)
        assert context_kl(log_p, log_p0).min().item() >= -1e-10


def test_kl_ignores_the_order_of_contexts_and_a_constant_logit(tensors):
    features, features0, head = tensors
    value = pytest.approx(mean_kl(*tensors, S).item(), abs=1e-10)
    order = torch.from_numpy(np.random.default_rng(1).permutation(T))
    assert mean_kl(features, features0, head[order], S).item() == value
    shifted = [torch.log_softmax(context_distribution(each, head, S) + 3.7, dim=-1) for each in (features, features0)]
    assert context_kl(*shifted).mean().item() == value


def test_two_equal_contexts_act_as_one_with_log_two_added(arrays, tensors):
    features, features0, head = arrays
    doubled = np.concatenate([head, head[:1]])

    def log_p(f):
        z = numpy_log_p(f, head, S)
        z[:, 0] += math.log(2)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    expected = (np.exp(log_p(features0)) * (log_p(features0) - log_p(features))).sum(axis=1).mean()
    value = mean_kl(tensors[0], tensors[1], torch.from_numpy(doubled), S).item()
    assert value == pytest.approx(expected, abs=1e-10)


def test_small_changes_cost_half_the_variance_of_the_logits():
    rng = np.random.default_rng(5)
    head, features0 = torch.from_numpy(unit(rng, T, D)), torch.from_numpy(unit(rng, 1, D))
    direction = torch.from_numpy(unit(rng, 1, D))
    errors = []
    for size in (0.1, 0.01, 0.001):
        features = torch.nn.functional.normalize(features0 + size * direction, dim=-1)
        p0 = context_distribution(features0, head, S).exp()
        dz = S * (features - features0) @ head.T
        variance = (p0 * dz**2).sum() - (p0 * dz).sum() ** 2
        errors.append(abs(mean_kl(features, features0, head, S) / (variance / 2) - 1).item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.35)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.35)


def test_gradient_with_respect_to_the_logits_is_p_minus_p0_over_b(arrays):
    z = torch.from_numpy(np.random.default_rng(2).normal(size=(B, T))).requires_grad_()
    log_p0 = torch.log_softmax(torch.from_numpy(np.random.default_rng(4).normal(size=(B, T))), dim=-1)
    context_kl(torch.log_softmax(z, dim=-1), log_p0).mean().backward()
    p = np.exp(z.detach().numpy())
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(z.grad.numpy(), (p - log_p0.exp().numpy()) / B, atol=1e-10)


def test_stored_half_precision_targets_stay_within_the_stated_bounds():
    rng = np.random.default_rng(8)
    head = torch.from_numpy(unit(rng, 80, 512)).float()
    features0 = torch.from_numpy(rng.normal(size=(300, 512))).float()
    features = features0 + 0.05 * torch.from_numpy(rng.normal(size=(300, 512))).float()
    log_p0 = context_distribution(features0, head, 100.0)
    stored = log_p0.exp().half()
    online = context_kl(context_distribution(features, head, 100.0), log_p0)
    found = context_kl(context_distribution(features, head, 100.0), stored, log_target=False)
    assert ((found - online).abs() <= 2e-4).all()
    assert ((stored.float() - log_p0.exp()).abs() <= 1e-3 * log_p0.exp() + 1e-7).all()
    at_identity = context_kl(log_p0, stored, log_target=False).mean().item()
    assert at_identity >= -1e-6


def test_half_precision_features_are_scored_in_float32_and_the_entropy_of_a_uniform_distribution_is_log_t(tensors):
    features, _, head = (tensor.float() for tensor in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p = context_distribution(features, head, 100.0)
    assert log_p.dtype == torch.float32
    assert torch.equal(log_p, context_distribution(features, head, 100.0))
    assert context_entropy(torch.full((3, 8), -math.log(8.0))).item() == pytest.approx(math.log(8))
