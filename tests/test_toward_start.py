"""``search.alpha.rule: one_se``: models are delivered nearer to zero-shot where the validation images do not say."""

import dataclasses

import numpy as np
import pytest
from crash_host import call

from carft_ray.evaluation.predictions import correct_matrix, read_predictions
from carft_ray.results.delivered import delivered
from carft_ray.results.toward_start import delivered_at
from carft_ray.study.rows import predictions_path
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import result_of

SHORT = ["search.trials=3", "train.epochs=1", "search.baselines={}", "data.id_val.num_per_class=20"]
SHORT += ["resources.executor=debug", "search.alpha.rule=one_se", "search.soups=[uniform]"]


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory):
    """A finished search whose models are delivered by this rule."""
    folder = tmp_path_factory.mktemp("one_se") / "study"
    words = [word for each in SHORT for word in ("--set", each)]
    assert call(["search", "search_spaces/quickstart.yaml", "--study", str(folder), *words]) == 0
    return folder


def by_hand(study, row):
    """The smallest alpha whose objective, half ID and half the mean of the shifts, is within a standard error."""
    table = read_predictions(predictions_path(study.study_dir, row))
    names = ["id_val", *study.recipe.data.ood_val]
    weights = [0.5, *[0.5 / (len(names) - 1)] * (len(names) - 1)]

    def right(name, alpha):
        return correct_matrix([(table, alpha)], name)[0].astype(float)

    for point in sorted(result_of(study.study_dir, row)["curve"], key=lambda point: point["alpha"]):
        if study.recipe.search.alpha.lowest <= (alpha := point["alpha"]) < row.alpha:
            gaps = [right(name, row.alpha) - right(name, alpha) for name in names]
            mean = sum(weight * gap.mean() for weight, gap in zip(weights, gaps, strict=True))
            variance = sum(weight**2 * gap.var(ddof=1) / len(gap) for weight, gap in zip(weights, gaps, strict=True))
            if mean <= np.sqrt(variance):
                return alpha
    return row.alpha


def test_a_model_is_delivered_at_the_smallest_alpha_within_a_standard_error_of_the_paired_difference(study_dir):
    study = snapshot(study_dir)
    rows = [*study.trials, *study.soups]
    found = [delivered_at(study, [row]) for row in rows]
    assert found == [by_hand(study, row) for row in rows]
    model, _ = delivered(study)
    assert model["alpha"] in found


def test_the_rule_best_delivers_each_at_its_own_alpha_and_the_sampler_gets_the_best_of_the_curve(study_dir):
    study = snapshot(study_dir)
    search = study.recipe.search
    best = search.model_copy(update={"alpha": search.alpha.model_copy(update={"rule": "best"})})
    as_best = dataclasses.replace(study, recipe=study.recipe.model_copy(update={"search": best}))
    for row in study.trials:
        assert delivered_at(as_best, [row]) == row.alpha
        result = result_of(study_dir, row)
        allowed = [point["objective"] for point in result["curve"] if point["alpha"] >= search.alpha.lowest]
        assert result["objective"] == max(allowed)
