"""The driver, asked and told as Tune does it: attempts, failures, the end of a search. No Ray runs."""

import json
import random
import re
import time
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import killed_searches
import pytest
from logs import take
from ray.tune.search import Searcher
from stand_in import make_recipe
from study_steps import searching
from tune_stand_in import Tune, kinds, short_search, spec_of

from carft_ray.errors import NoSuccessfulTrialError, StorageError
from carft_ray.launch import tune_runner
from carft_ray.launch.cluster.capacity import AtATime
from carft_ray.launch.driver import STOP_UNLOGGED_S, Driver
from carft_ray.launch.events import BaselineFinished, Note, Stopping, TrialEpoch, TrialFinished, TrialSetAside
from carft_ray.launch.workers.mailbox import Post
from carft_ray.store.attempt_files import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.retries import LOST_ATTEMPTS
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_running
from carft_ray.study.training import Failure, TrialSpec


@pytest.fixture
def search(tmp_path):
    with short_search(tmp_path / "study") as make:
        yield make


@pytest.fixture
def tune(search):
    """A search of 6 trials, 2 at a time."""
    return search()


def test_a_poll_looks_at_the_log_once_however_many_trainings_have_posted(tune, monkeypatch):
    first, second, looks = tune.start(), tune.start(), []
    for trial in (first, second):
        tune.report(trial, {"epoch": 1, "step": 10}, {"epoch": 2, "step": 20})
    monkeypatch.setattr(tune.driver.study.log, "check", lambda: looks.append(1))
    tune.look()
    assert looks == [1]
    assert [type(each) for each in tune.events].count(TrialEpoch) == 4


def test_the_searcher_holds_its_own_limit_and_ends_by_itself(tune):
    assert tune.searcher.set_max_concurrency(1)
    live = []
    for number in range(7):
        while isinstance(trial := tune.start(), SimpleNamespace):
            live.append(trial)
        assert (trial, len(live)) == (None, min(2, 7 - number))  # two at a time
        tune.finish(ended := live.pop(0), 0.1 * number)
    assert tune.start() == Searcher.FINISHED
    assert [row.outcome for row in snapshot(tune.driver.study.study_dir).trials] == ["complete"] * 6
    assert kinds(tune.events).count(TrialFinished) == 6
    assert kinds(tune.events).count(BaselineFinished) == 1
    best = [event.row.objective for event in tune.events if isinstance(event, TrialFinished) and event.is_best]
    assert best == sorted(best)
    for stranger in ("stranger", ended.trial_id):  # and one that has ended
        tune.searcher.on_trial_complete(stranger, result=None, error=True)
    assert tune.driver.failure is None


def test_what_tune_ends_without_a_word_is_settled_at_the_next_suggestion(tune):
    first, second = tune.start(), tune.start()
    first.status = "ERROR"  # a reused actor that could not be reset: on_trial_complete is never called
    again = tune.start()
    assert again.config["spec"]["name"] == first.config["spec"]["name"]
    assert again.config["spec"]["attempt"] == 2
    assert tune.driver.live == [spec_of(trial) for trial in (second, again)]


def test_a_dead_process_gets_another_attempt_and_is_at_last_set_aside_with_the_cause(tune):
    tune.finish(tune.start())
    first = tune.start()
    name = first.config["spec"]["name"]
    tune.die(first)
    assert isinstance(tune.events[-1], Note)
    reason = "RuntimeError: The actor died unexpectedly."
    assert tune.events[-1].text == f"{name} gets another attempt: {reason}"
    for _ in range(LOST_ATTEMPTS - 2):
        tune.end(tune.start(), lost="a worker of the group died")
    last = tune.start()
    tune.die(last)
    assert tune.events[-1] == TrialSetAside(TrialSpec(**last.config["spec"]), reason)
    assert last.config["spec"]["attempt"] == LOST_ATTEMPTS
    assert "More." in (tune.folder(first) / "log.txt").read_text()  # all that Ray said
    for _ in range(5):
        tune.finish(tune.start())
    assert tune.start() == Searcher.FINISHED
    assert tune.driver.failure is None
    assert [row.name for row in tune.driver.study.snapshot().rows if row.set_aside] == [name]


@pytest.mark.parametrize("is_good", [True, False])
def test_a_search_does_not_give_up_while_trainings_run_longer_than_those_that_failed(tmp_path, is_good, monkeypatch):
    now, recipe = [0.0], make_recipe(40, baselines={}, sampler={"name": "random"})
    monkeypatch.setattr("carft_ray.launch.driver.time", SimpleNamespace(monotonic=lambda: now[0]))
    with searching(tmp_path / "study", recipe) as study:
        tune = Tune(Driver(study, AtATime(8), lambda event: None))
        live = [tune.start() for _ in range(8)]
        now[0] = 10
        for trial in live[3:]:
            tune.fail(trial, "diverged", "too high")
        for _ in range(15):  # in all more than two waves
            trial = tune.start()
            now[0] += 1
            tune.fail(trial, "diverged", "too high")
        assert tune.driver.failure is None
        if is_good:
            tune.finish(live[0])
        for trial in live[is_good:3]:
            assert tune.driver.failure is None
            tune.fail(trial, "diverged", "at chance")
        assert isinstance(tune.driver.failure, NoSuccessfulTrialError) != is_good
        if not is_good:
            assert "20 of 23 failed in this way: too high" in str(tune.driver.failure)


def test_a_micro_batch_that_fits_is_sent_with_all_that_starts_later_and_in_the_next_search(tmp_path):
    with searching(tmp_path / "study", make_recipe(6, baselines={})) as study:
        tune = Tune(Driver(study, AtATime(3), lambda event: None))
        first, second = tune.start(), tune.start()
        assert spec_of(first).fits == {}
        tune.fail(first, "memory", device="cpu", fits=32)
        again = spec_of(tune.start())
        assert (again.name, again.attempt, again.fits) == (spec_of(first).name, 2, {"cpu": 32})
        tune.fail(second, "memory", device="cpu", fits=16)
    with searching(tmp_path / "study", make_recipe(6, baselines={})) as study:
        tune = Tune(Driver(study, AtATime(3), lambda event: None))
        waiting = [tune.start() for _ in range(3)]
        assert [spec_of(trial).fits for trial in waiting] == 3 * [{"cpu": 16}]
        tune.fail(waiting[0], "error", device="cpu")  # not one image has fitted
        assert spec_of(tune.start()).fits == {}


def test_a_fault_of_the_surroundings_stops_all_and_is_kept_for_the_driver(tune):
    first, second = tune.start(), tune.start()
    tune.fail(first, "fatal", "images are gone", exit_code=4)
    assert tune.start() is None  # the second one still writes its checkpoint
    tune.look()
    assert tune.order(second) == "stop"
    tune.end(second)
    assert tune.start() == Searcher.FINISHED
    assert tune.driver.failure.exit_code == 4
    assert "images are gone" in str(tune.driver.failure)


def test_a_search_whose_study_was_taken_over_ends_tune_and_leaves_the_folder_alone(tune):
    trial = tune.start()
    study_dir = tune.driver.study.study_dir
    take(study_dir)
    tune.finish(trial)
    assert tune.start() == Searcher.FINISHED
    assert not (study_dir / "stop").exists()
    with pytest.raises(StorageError, match="another search, which has taken the study over"):
        tune.look()
    assert tune.driver.failure.exit_code == 5


def test_a_search_whose_log_has_failed_lets_its_trainings_write_a_checkpoint_for_a_while(tune, monkeypatch):
    first, second = tune.start(), tune.start()
    with monkeypatch.context() as patched:
        full = StorageError("No space left on device")
        patched.setattr(tune.driver.study.log.store, "put_new", mock.Mock(side_effect=full))
        tune.end(first, lost="its node is gone")
    assert tune.driver.failure is full
    tune.look()
    assert tune.order(second) == "stop"
    assert kinds(tune.events).count(Stopping) == 1
    tune.look()
    tune.driver._stopping_since -= STOP_UNLOGGED_S
    with pytest.raises(StorageError, match="cannot be used any more by this process, since a commit failed"):
        tune.look()
    assert tune.start() is None
    tune.end(second)
    assert tune.start() == Searcher.FINISHED
    assert tune.driver.failure is full


def test_what_a_training_reports_is_written_and_told_once_however_often_its_attempts_say_it(tune):
    tune.finish(tune.start())
    rows = [{"epoch": epoch, "step": 10 * epoch, "loss": 1 / epoch} for epoch in (1, 2, 3)]
    trial = tune.start()
    tune.report(trial, *rows[:2])
    tune.look()
    tune.report(trial, rows[2])
    tune.die(trial)
    again = tune.start()
    other = {**rows[2], "loss": 0.5}  # of the epoch after its checkpoint, trained anew
    tune.report(again, *rows[:2], other)
    tune.look()
    told = [event.metrics for event in tune.events if isinstance(event, TrialEpoch)]
    assert told == [*rows, other]
    lines = (tune.folder(trial) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*rows[:2], other]


@pytest.mark.slow
def test_a_training_without_a_step_is_ended_with_a_note_and_gets_another_attempt(search):
    ended = []
    tune = search(hang_timeout_s=0.2, end_process=lambda each: ended.append(each) or (lambda: "what it hung in"))
    tune.finish(tune.start())
    trial = tune.start()
    name = trial.config["spec"]["name"]
    for step in range(5):  # each look sees another step
        tune.post(trial, step)
        tune.look()
        time.sleep(0.1)
    time.sleep(0.2)
    tune.driver.poll(at_once=True)  # it has slept, and not heard of any step meanwhile
    assert ended == []
    tune.look()
    assert [alive.pid for alive in ended] == [77]
    reason = "no step for 0.2 s (resources.hang_timeout_s); process 77 was ended; what its threads did is in "
    reason += f"trials/{name}/log.txt"
    assert tune.events[-1] == Note(f"{name} hangs: {reason}")
    tune.die(trial)
    assert tune.events[-1] == Note(f"{name} gets another attempt: {reason}")
    assert "what it hung in" in (tune.folder(trial) / "log.txt").read_text()
    again = tune.start()
    time.sleep(0.3)
    tune.post(trial, 9)  # of the attempt before
    tune.look()
    assert len(ended) == 1
    assert again.config["spec"]["attempt"] == 2


def test_a_training_whose_process_does_not_come_is_told_once(tune, monkeypatch):
    monkeypatch.setattr("carft_ray.launch.driver.WAIT_NOTE_AFTER_S", 0)
    trial = tune.start()
    for _ in range(4):
        tune.look()
    told = [event.text for event in tune.events if isinstance(event, Note)]
    name = trial.config["spec"]["name"]
    assert told == [f"{name} has waited 0 s for its process: is the cluster full? See `ray status`"]


@pytest.mark.parametrize(("error", "code", "told"), [(3, 5, "no route to node7"), (11, 6, "no GPU")])
def test_many_failed_attempts_in_a_row_end_a_search_that_was_good_before(tune, error, code, told):
    tune.finish(tune.start())
    tune.finish(tune.start())
    for _ in range(2):
        tune.end(tune.start(), lost="no route to node7")
    tune.fail(tune.start(), "diverged")  # a verdict: the machines are well
    for number in range(12):
        assert tune.driver.failure is None
        trial = tune.start()
        tune.fail(trial, "error", "no GPU") if number == error else tune.end(trial, lost="no route to node7")
    assert tune.start() == Searcher.FINISHED
    failure = tune.driver.failure
    assert failure.exit_code == code  # by the last one
    assert re.search(f"12 attempts in a row failed; the last one: {told}\n.* run the same command again", str(failure))


def test_a_process_under_which_memory_or_a_machine_has_failed_is_not_used_again(search, monkeypatch):
    tune = search()
    runtime = SimpleNamespace(nested=False, capacity=None)
    trial, outcomes = tune.start(), ("memory", "lost", "error", "diverged")

    def ended(outcome):
        failure = Failure(outcome, "the GPU is gone", 1, details="where it was")
        monkeypatch.setattr(tune_runner, "run_worker", lambda runtime, spec, context: failure)
        try:
            return tune_runner.tune_trainable(runtime)(trial.config)
        except RuntimeError as error:  # Ray ends a process whose training raises
            return str(error)

    gone = f"{spec_of(trial).name}: the GPU is gone"
    assert [ended(outcome) for outcome in outcomes] == [gone, gone, {"lost": ""}, {"lost": ""}]
    spec = spec_of(trial)
    tune.box.post(Post(spec.training, 1, failure=Failure("lost", "the GPU is gone", 1, details="where it was")))
    tune.die(trial, gone)  # what was posted wins over what Tune knows
    assert tune.events[-1].text == f"{spec.name} gets another attempt: the GPU is gone"
    assert "where it was" in (tune.folder(trial) / "log.txt").read_text()
    assert spec_of(tune.start()) == TrialSpec(**{**trial.config["spec"], "attempt": 2})


# searches whose trainings end in any order and way

NUM_TRIALS, EIGHT, EPOCHS = 24, 8, 4
WAYS = ("finish", "diverged", "error", "lost", "die", "memory")


def simulated(study_dir, recipe, rng, ways, num_steps=10_000):
    """Searches with trainings that advance and end in any order, each in one of the ways; it is killed after so many.

    A kill comes to some trainings when their result is there and nobody has noted it.

    Returns:
        The driver, and the names of the trainings of which it was told that they ended.
    """
    live, told = [], []
    with open_study(study_dir, recipe) as study:
        names = [row.name for row in recover_running(study)]
        tune = Tune(Driver(study, AtATime(EIGHT), told.append))
        for _ in range(num_steps):
            while len(live) < EIGHT and not isinstance(trial := tune.start(), str | None):
                live.append(trial)
            assert len(live) == len(tune.driver.live) <= EIGHT
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
                write_result(tune.place(trial), {"objective": rng.random(), "alpha": 0.5, "metrics": {}})
    return tune.driver, names + [each.row.name for each in told if isinstance(each, TrialFinished | BaselineFinished)]


def advance(tune, trial, objective):
    """Adds an epoch to a training, as its last attempt left it; tells whether one was left."""
    path = tune.folder(trial) / "metrics.jsonl"
    epoch = 1 + (len(path.read_text().splitlines()) if path.exists() else 0)
    row = {"epoch": epoch, "step": epoch, "num_steps": EPOCHS, "loss": 1.0, "subset/objective": objective}
    if epoch <= EPOCHS:
        tune.report(trial, row)
    return epoch <= EPOCHS


def end(tune, trial, way, objective):
    if way == "finish":
        tune.finish(trial, objective)
    elif way == "lost":
        tune.end(trial, lost="the node was taken away")
    elif way == "die":
        tune.die(trial)
    else:
        tune.fail(trial, way, f"{way} here")


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "pruner"), [(1, {}), (2, {"name": "successive_halving", "first": 0.25})])
def test_a_search_has_its_trials_once_however_they_end_and_whenever_it_is_killed(tmp_path, seed, pruner):
    rng, told, study_dir = random.Random(seed), [], tmp_path / "study"
    recipe = make_recipe(NUM_TRIALS, EPOCHS, sampler={"seed": seed}, pruner=pruner)
    for num_steps in (*(rng.randrange(10, 80) for _ in range(seed)), 10_000):
        driver, names = simulated(study_dir, recipe, rng, WAYS, num_steps)
        assert driver.failure is None
        told += names
    study = snapshot(study_dir)
    assert [row.number for row in study.trials] == list(range(NUM_TRIALS))
    everything = study.trials + study.baselines
    assert len({row.name for row in everything}) == NUM_TRIALS + 1
    assert all((row.outcome == "running") == row.set_aside for row in everything)
    assert Counter(told) == Counter(row.name for row in everything if not row.set_aside)
    assert study.best.name in (study_dir / "best.yaml").read_text().splitlines()[0]
    killed_searches.check_told_once(study_dir)
