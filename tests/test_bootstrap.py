"""The bootstrap of the selection against plain loops, its limit cases, and the overtuning curve."""

import numpy as np
import pytest

from carft_ray.evaluation.alpha import choose_alpha, fitted_curve, objective_covariance
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.results.statistics.bootstrap import Candidate, bbc, incumbent_values, overtuning, resample

GRID = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SIZES = {"id_val": 40, "a": 25, "b": 30}
SPEC = ObjectiveSpec("weighted_mean", "id_val", ("a", "b"), 0.5)


def make_candidates(num=4, fixed=1, sizes=SIZES, seed=0):
    """Candidates with a curve, neighbouring alphas alike; the last ``fixed`` have one alpha."""
    rng = np.random.default_rng(seed)
    candidates = []
    for i in range(num):
        grid = GRID if i < num - fixed else (0.7,)
        share = 0.55 + 0.1 * i / num + 0.3 * np.array(grid)[:, None] * (1 - np.array(grid)[:, None])
        correct = {
            name: 0.8 * rng.random(n) + 0.2 * rng.random((len(grid), n)) < share - 0.02 for name, n in sizes.items()
        }
        candidates.append(Candidate(f"t{i}", grid, correct))
    return candidates


def slow(candidates, spec, lowest, num_resamples, seed):
    """The same by plain loops over resamples, candidates and sets, with the functions of one curve."""
    rng = np.random.default_rng(seed)
    names = (spec.id_set, *spec.ood_sets)
    sizes = {name: candidates[0].correct[name].shape[1] for name in names}
    draws = {name: rng.integers(0, n, (num_resamples, n)) for name, n in sizes.items()}
    in_bag, out_of_bag, alphas, fits = (np.zeros((num_resamples, len(candidates))) for _ in range(4))
    for b in range(num_resamples):
        inside = {name: draws[name][b] for name in names}
        outside = {name: np.setdiff1d(np.arange(sizes[name]), inside[name]) for name in names}
        for i, candidate in enumerate(candidates):
            points = range(len(candidate.alphas))
            drawn, left = (
                [{name: candidate.correct[name][a][images[name]] for name in names} for a in points]
                for images in (inside, outside)
            )
            values, others = (
                [spec.value({name: float(point[name].mean()) for name in names}) for point in curve]
                for curve in (drawn, left)
            )
            if len(values) == 1:
                in_bag[b, i], out_of_bag[b, i], alphas[b, i] = values[0], others[0], candidate.alphas[0]
                continue
            stacked = {name: np.stack([point[name] for point in drawn]) for name in names}
            choice = choose_alpha(candidate.alphas, values, lowest, objective_covariance(stacked, spec))
            in_bag[b, i], alphas[b, i], fits[b, i] = choice.value, choice.alpha, choice.fitted
            if choice.fitted:
                out_of_bag[b, i] = fitted_curve(candidate.alphas, others, [choice.alpha])[0]
            else:
                out_of_bag[b, i] = others[candidate.alphas.index(choice.alpha)]
    return in_bag, out_of_bag, alphas, fits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weighted_mean", "harmonic", "worst_domain"])
def test_it_agrees_with_plain_loops_with_and_without_a_fit(kind):
    spec = ObjectiveSpec(kind, "id_val", ("a", "b"), 0.3)
    candidates = make_candidates()
    found = resample(candidates, spec, 0.1, 60, seed=3)
    in_bag, out_of_bag, alphas, fits = slow(candidates, spec, 0.1, 60, seed=3)
    assert found.in_bag == pytest.approx(in_bag, abs=1e-12)
    assert found.out_of_bag == pytest.approx(out_of_bag, abs=1e-12)
    assert (found.alphas == alphas).all()
    assert 0 < fits[:, :-1].mean() < 1
    value, wins = bbc(found)
    winners = in_bag.argmax(axis=1)
    assert value == pytest.approx(out_of_bag[np.arange(60), winners].mean(), abs=1e-12)
    assert {win.name: win.share for win in wins} == {f"t{i}": np.mean(winners == i) for i in set(winners)}
    for t, honest in enumerate(incumbent_values(found)):
        first = in_bag[:, : t + 1].argmax(axis=1)
        assert honest == pytest.approx(out_of_bag[np.arange(60), first].mean(), abs=1e-12)


def test_one_candidate_without_a_choice_is_its_accuracy():
    candidate = make_candidates(1)[0]
    value, wins = bbc(resample([candidate], SPEC, 0.1, 4000))
    assert value == pytest.approx(
        SPEC.value({name: rows.mean() for name, rows in candidate.correct.items()}), abs=0.004
    )
    assert [(win.name, win.share, win.alpha) for win in wins] == [("t0", 1.0, 0.7)]


def test_of_equal_candidates_the_earliest_wins_always():
    candidate = make_candidates(1, fixed=0)[0]
    twins = [Candidate(name, candidate.alphas, candidate.correct) for name in ("first", "second")]
    assert [win.name for win in bbc(resample(twins, SPEC, 0.1, 50))[1]] == ["first"]


@pytest.mark.slow
def test_the_best_of_equal_coins_is_corrected_to_the_coin():
    rng = np.random.default_rng(0)
    naive, honest = [], []
    for _ in range(30):
        coins = [
            Candidate(str(i), (1.0,), {name: rng.random((1, 200)) < 0.6 for name in ("id_val", "a", "b")})
            for i in range(20)
        ]
        naive.append(max(SPEC.value({name: rows.mean() for name, rows in coin.correct.items()}) for coin in coins))
        honest.append(bbc(resample(coins, SPEC, 0.1, 200))[0])
    assert np.mean(naive) > 0.63
    assert np.mean(honest) == pytest.approx(0.6, abs=0.012)


def test_the_seed_decides_everything():
    candidates = make_candidates()
    one, two, other = (resample(candidates, SPEC, 0.1, 20, seed) for seed in (1, 1, 2))
    assert (one.in_bag == two.in_bag).all()
    assert not (one.in_bag == other.in_bag).all()


def test_a_resample_that_leaves_nothing_out_is_drawn_anew():
    tiny = make_candidates(2, sizes={"id_val": 2, "a": 2, "b": 3})
    found = resample(tiny, SPEC, 0.1, 100)
    assert found.in_bag.shape == (100, 2)
    assert np.isfinite(found.out_of_bag).all()


def test_no_candidate_and_sets_of_one_image_are_refused():
    with pytest.raises(ValueError, match="at least one candidate"):
        resample([], SPEC, 0.1)
    with pytest.raises(ValueError, match="two images"):
        resample(make_candidates(2, sizes={"id_val": 9, "a": 1, "b": 9}), SPEC, 0.1)


def test_without_an_ood_set_the_id_set_is_all():
    spec = ObjectiveSpec("harmonic", "id_val", ())
    candidates = make_candidates()
    assert resample(candidates, spec, 0.1, 10).in_bag == pytest.approx(slow(candidates, spec, 0.1, 10, 0)[0])


def test_overtuning_is_the_loss_against_the_best_incumbent_so_far():
    curve = overtuning([0.70, 0.74, 0.71, 0.73])
    assert curve.absolute == pytest.approx((0, 0, 0.03, 0.01))
    assert curve.relative == (None, 0.0, pytest.approx(0.75), pytest.approx(0.25))
    assert overtuning([0.7, 0.6]).relative == (None, None)
