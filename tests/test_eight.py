"""Eight trainings at a time: 24 that end in any order and way, killed or not; each command that trains, for real."""

import random
import re
from collections import Counter
from types import SimpleNamespace

import crash_host
import killed_searches
import pytest
import short_training
import stand_in
from stand_in import make_recipe
from test_driver import Tune, spec_of

from carft_ray.errors import NoSuccessfulTrialError
from carft_ray.launch.driver import Driver
from carft_ray.launch.events import BaselineFinished, TrialFinished
from carft_ray.launch.ray_cluster.concurrency import AtATime
from carft_ray.store.result import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import best_row, rows_by_kind

NUM_TRIALS, AT_A_TIME, EPOCHS = 24, 8, 4
WAYS = ("finish", "diverged", "error", "lost", "die", "memory")
HALVING = {"name": "successive_halving", "first": 0.25}

pytestmark = pytest.mark.slow


def search(study_dir, recipe, rng, ways, num_steps=10_000):
    """Searches with trainings that advance and end in any order, each in one of the ways; it is killed after so many.

    A kill comes to some trainings when their result is there and nobody has noted it.

    Returns:
        The driver, and the names of the trainings of which it was told that they ended.
    """
    live, told = [], []
    with open_study(study_dir, recipe) as study:
        told += [row.name for row in recover_running(study)]
        tune = Tune(Driver(study, AtATime(AT_A_TIME), told.append))
        for _ in range(num_steps):
            while len(live) < AT_A_TIME and not isinstance(trial := tune.start(), str | None):
                live.append(trial)
            assert len(live) == len(tune.driver.live) <= AT_A_TIME
            assert len({spec_of(trial).name for trial in live}) == len(live)
            if not live:
                break
            trial = rng.choice(live)
            if tune.order(trial) in ("stop", "cut"):
                tune.end(trial)
            elif not advance(tune, trial, rng.random()):
                end(tune, trial, rng.choice(ways), rng.random())
            live = [each for each in live if each.status == "RUNNING"]
            tune.look()
        for trial in live:
            if rng.random() < 0.3:
                write(tune.place(trial), rng.random())
    ended = [each if isinstance(each, str) else each.row.name for each in told if ends(each)]
    return tune.driver, ended


def ends(event):
    return isinstance(event, str | TrialFinished | BaselineFinished)


def advance(tune, trial, objective):
    """Adds an epoch to a training, as its last attempt left it; tells whether one was left."""
    path = tune.folder(trial) / "metrics.jsonl"
    epoch = 1 + (len(path.read_text().splitlines()) if path.exists() else 0)
    row = {"epoch": epoch, "step": epoch, "num_steps": EPOCHS, "loss": 1.0, "subset/objective": objective}
    if epoch <= EPOCHS:
        tune.report(trial, row)
    return epoch <= EPOCHS


def write(place, objective):
    write_result(place, {"objective": objective, "alpha": 0.5, "metrics": {}})


def end(tune, trial, way, objective):
    if way == "finish":
        tune.finish(trial, objective)
    elif way == "lost":
        tune.end(trial, lost="the node was taken away")
    elif way == "die":
        tune.die(trial)
    else:
        tune.fail(trial, way, f"{way} here")


@pytest.mark.parametrize(("seed", "pruner"), [(1, "none"), (2, "successive_halving")])
def test_a_search_has_its_trials_once_however_they_end_and_whenever_it_is_killed(tmp_path, seed, pruner):
    rng, told = random.Random(f"{seed} {pruner}"), []
    pruned = {"pruner": HALVING} if pruner != "none" else {}
    recipe = make_recipe(NUM_TRIALS, EPOCHS, sampler={"seed": seed}, **pruned)
    for num_steps in (*(rng.randrange(10, 80) for _ in range(seed)), 10_000):
        driver, names = search(tmp_path / "study", recipe, rng, WAYS, num_steps)
        assert driver.failure is None
        told += names
    rows = rows_by_kind(tmp_path / "study")
    assert [row.number for row in rows["trial"]] == list(range(NUM_TRIALS))
    everything = rows["trial"] + rows["baseline"]
    assert len({row.name for row in everything}) == NUM_TRIALS + 1
    assert all((row.outcome == "running") == row.set_aside for row in everything)
    assert Counter(told) == Counter(row.name for row in everything if not row.set_aside)
    assert best_row(rows["trial"]).name in (tmp_path / "study" / "best.yaml").read_text().splitlines()[0]
    killed_searches.check_told_once(tmp_path / "study")


@pytest.mark.parametrize("seed", range(2))
def test_a_search_in_which_no_training_is_good_says_so_with_the_commonest_reason(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr("carft_ray.launch.driver.time", SimpleNamespace(monotonic=iter(range(10**9)).__next__))
    recipe = make_recipe(NUM_TRIALS, EPOCHS, sampler={"seed": seed}, baselines={})
    driver, names = search(tmp_path / "study", recipe, rng, ("diverged", "diverged", "error"))
    assert isinstance(driver.failure, NoSuccessfulTrialError)
    number, total, reason = re.search(r"; (\d+) of (\d+) failed in this way: (.+)", str(driver.failure)).groups()
    assert 2 * AT_A_TIME <= int(total) <= len(names) <= NUM_TRIALS  # what ran then has ended since
    rows = {row.name: row for row in rows_by_kind(tmp_path / "study")["trial"]}
    reasons = Counter(rows[name].reason for name in names[: int(total)])
    assert reasons.most_common(1) == [(reason, int(number))]


# ---- for real


RESOURCES = {"cpus_per_worker": 0.25, "gpus_per_worker": 0}  # two cores hold eight


@pytest.mark.whole
def test_a_search_killed_with_eight_running_has_its_trials_once(tmp_path):
    """Its driver and Ray are killed while eight trainings are past their first epoch and held there."""
    stand_in.tell(tmp_path)
    (tmp_path / "base" / "hold").touch()
    study_dir, search = tmp_path / "study", {"max_concurrent_trials": AT_A_TIME}
    process = killed_searches.driver(study_dir, 10, search=search, **RESOURCES)
    try:
        killed_searches.wait_until(
            lambda: killed_searches.ended(process) or len(killed_searches.running_pids(study_dir)) == AT_A_TIME,
            "eight run",
        )
    finally:
        killed_searches.kill_group(process)
    killed_searches.wait_until(lambda: not killed_searches.running_pids(study_dir), "they end with their Ray")
    (tmp_path / "base" / "hold").unlink()
    code, output = killed_searches.finish(killed_searches.driver(study_dir, 10, search=search, **RESOURCES))
    assert code == 0, output
    killed_searches.check(study_dir, 10)
    again = [row.attempt for kind in rows_by_kind(study_dir).values() for row in kind if row.attempt > 1]
    assert again == [2] * AT_A_TIME


@pytest.mark.whole
def test_one_at_a_time_in_this_process_has_the_numbers_of_eight_slots_bit_for_bit(tmp_path):
    settings = ["resources.cpus_per_worker=0.25", f"search.max_concurrent_trials={AT_A_TIME}"]
    settings += [f"search.trials={AT_A_TIME}", "search.baselines={plain: {kl_weight: 0}}", "train.epochs=1"]
    settings += ["search.sampler.name=random"]  # which sees no results: the values are the same in whatever order
    words = [word for each in settings for word in ("--set", each)]
    recipe = short_training.make(tmp_path)
    assert crash_host.call(["search", recipe, "--study", tmp_path / "study", *words]) == 0
    assert crash_host.call(["search", recipe, "--study", tmp_path / "one", *words, "--executor", "debug"]) == 0
    assert numbers(tmp_path / "one") == numbers(tmp_path / "study")


def numbers(study_dir):
    rows = rows_by_kind(study_dir)
    return [(row.name, row.values, row.objective, row.alpha, row.metrics) for row in rows["trial"] + rows["baseline"]]
