"""The objective: its formulas, limit cases and derivatives."""

import math

import numpy as np
import pytest

from carft_ray.evaluation.objective import ObjectiveSpec

KINDS = ["weighted_mean", "harmonic", "worst_domain"]
OOD = {"noisy": 0.5, "blurry": 0.7}


def objective(kind, id_weight, id_accuracy, ood):
    return ObjectiveSpec(kind, "id_val", tuple(ood), id_weight).value({"id_val": id_accuracy, **ood})


def objective_weights(kind, id_weight, id_accuracy, ood):
    return ObjectiveSpec(kind, "id_val", tuple(ood), id_weight).weights({"id_val": id_accuracy, **ood})


def test_formulas():
    assert objective("weighted_mean", 0.25, 0.8, OOD) == pytest.approx(0.25 * 0.8 + 0.75 * 0.6)
    assert objective("harmonic", 0.25, 0.8, OOD) == pytest.approx(2 * 0.8 * 0.6 / 1.4)
    assert objective("worst_domain", 0.25, 0.8, OOD) == 0.5
    assert objective("weighted_mean", 1.0, 0.7, OOD) == 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_limit_cases(kind):
    assert objective(kind, 0.5, 0.0, {"a": 0.0}) == 0
    assert objective(kind, 0.5, 1.0, {"a": 1.0}) == 1
    assert objective(kind, 0.3, 0.6, {"a": 0.6, "b": 0.6}) == pytest.approx(0.6)
    assert objective(kind, 0.5, 0.7, {}) == 0.7
    assert objective_weights(kind, 0.5, 0.4, {}) == {"id_val": 1.0}
    assert all(map(math.isfinite, objective_weights(kind, 0.5, 0.0, {"a": 0.0, "b": 0.0}).values()))
    of_equal = objective_weights("worst_domain", 0.5, 0.1, {"a": 0.3, "b": 0.3})
    assert of_equal == {"id_val": 0, "a": 1, "b": 0}  # the first


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_derivatives(kind):
    step, point = 1e-6, {"id_val": 0.8, **OOD}
    for name, weight in objective_weights(kind, 0.3, 0.8, OOD).items():
        spec = ObjectiveSpec(kind, "id_val", tuple(OOD), 0.3)
        up, down = (spec.value({**point, name: point[name] + sign * step}) for sign in (1, -1))
        assert weight == pytest.approx((up - down) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ood_sets", [("a", "b"), ()])
def test_values_of_many_models_are_those_of_each(kind, ood_sets):
    rng = np.random.default_rng(0)
    spec = ObjectiveSpec(kind, "id_val", ood_sets, 0.3)
    accuracies = {name: rng.random((3, 4)) for name in ("id_val", *ood_sets)}
    for array in accuracies.values():
        array[0, 0] = 0.0
    values = spec.values(accuracies)
    for index in np.ndindex(3, 4):
        one = {name: float(array[index]) for name, array in accuracies.items()}
        assert values[index] == pytest.approx(spec.value(one), abs=1e-14)
