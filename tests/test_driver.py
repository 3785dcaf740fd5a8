"""The driver, asked and told as Tune does it; no Ray runs."""

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
from stand_in import make_recipe, save
from study_steps import searching

from carft_ray.errors import NoSuccessfulTrialError, StorageError
from carft_ray.launch import tune_runner
from carft_ray.launch.capacity import AtATime, Node, capacity_of
from carft_ray.launch.driver import STOP_UNLOGGED_S, Driver
from carft_ray.launch.events import BaselineFinished, Note, Stopping, TrialEpoch, TrialFinished, TrialSetAside
from carft_ray.launch.leaks import Leaks
from carft_ray.launch.mailbox import Exchange, Mailbox, Post, Process
from carft_ray.launch.nodes import BadNodes, Drains
from carft_ray.launch.tune_runner import DriverCallback, DriverSearcher
from carft_ray.store.attempt_files import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import best_row, rows_by_kind, trials
from carft_ray.study.study import LOST_ATTEMPTS
from carft_ray.study.training import Failure, TrialSpec


def spec_of(trial):
    return TrialSpec(**trial.config["spec"])


class Tune:
    """Asks and tells like Tune's controller, with a list of its trials."""

    def __init__(self, driver):
        self.driver = driver
        self.box, self.num_rows = Mailbox(), Counter()
        driver.exchange = Exchange(self.box)
        self.searcher = DriverSearcher(driver)
        self.callback = DriverCallback(driver, self.searcher)
        self.trials = []
        self.look()

    def look(self):
        self.searcher.see(self.trials)
        self.driver.exchange.now()
        self.driver.poll(at_once=True)

    def start(self):
        trial_id = f"id{len(self.trials)}"
        answer = self.searcher.suggest(trial_id)
        if answer in (None, Searcher.FINISHED):
            return answer
        trial = SimpleNamespace(trial_id=trial_id, config=answer, status="RUNNING", get_pickled_error=lambda: None)
        self.trials.append(trial)
        self.callback.on_trial_start(0, self.trials, trial)
        return trial

    def finish(self, trial, objective=0.5):
        content = {"objective": objective, "alpha": 0.5, "metrics": {}}
        write_result(self.place(trial), content)
        self.end(trial)

    def fail(self, trial, outcome, reason="because", exit_code=1, **more):
        spec = spec_of(trial)
        self.folder(trial).mkdir(parents=True, exist_ok=True)
        failure = Failure(outcome, reason, spec.attempt, exit_code, **more)
        self.box.post(Post(spec.training, spec.attempt, failure=failure))
        self.end(trial)

    def end(self, trial, lost="", **told):
        trial.status = "TERMINATED"
        self.searcher.on_trial_complete(trial.trial_id, result={"lost": lost, **told})

    def die(self, trial, message="The actor died unexpectedly.\nMore."):
        trial.status = "ERROR"
        trial.get_pickled_error = lambda: RuntimeError(message)
        self.callback.on_trial_error(0, self.trials, trial)
        self.searcher.on_trial_complete(trial.trial_id, error=True)

    def place(self, trial):
        return self.folder(trial) / f"attempt-{trial.config['spec']['attempt']}"

    def post(self, trial, steps=1, group="", nodes=()):
        """Posts as rank 0 of a trial; returns the order."""
        spec, nodes = spec_of(trial), tuple(map(tuple, nodes))
        process = Process(77, "5", nodes[0][0] if nodes else "n1", group, nodes)
        return self.box.post(Post(spec.training, spec.attempt, 0, steps, process)).order

    def report(self, trial, *rows):
        """Posts rows of epochs as rank 0 of a trial."""
        spec = spec_of(trial)
        first = self.num_rows[spec.training, spec.attempt]
        self.num_rows[spec.training, spec.attempt] += len(rows)
        self.box.post(Post(spec.training, spec.attempt, records=tuple(("row", row) for row in rows), first=first))

    def order(self, trial):
        """What the driver wants of a trial now."""
        self.driver.exchange.now()
        spec = spec_of(trial)
        return self.box.post(Post(spec.training, spec.attempt, 1)).order

    def folder(self, trial):
        return spec_of(trial).folder(self.driver.study.study_dir)


@pytest.fixture
def study(tmp_path):
    with searching(tmp_path / "study", make_recipe(6)) as study:
        yield study


@pytest.fixture
def search(study):
    """Gives a function that makes a search of 6 trials, 2 at a time, with further arguments for its driver."""

    def make(**how):
        events = []
        tune = Tune(Driver(study, AtATime(2), events.append, **how))
        tune.events = events
        return tune

    return make


@pytest.fixture
def tune(search):
    """A search of 6 trials, 2 at a time."""
    return search()


def kinds(events):
    return [type(event) for event in events]


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
    assert [row.outcome for row in trials(tune.driver.study.study_dir)] == ["complete"] * 6
    assert kinds(tune.events).count(TrialFinished) == 6
    assert kinds(tune.events).count(BaselineFinished) == 1
    best = [event.row.objective for event in tune.events if isinstance(event, TrialFinished) and event.is_best]
    assert best == sorted(best)
    for stranger in ("stranger", ended.trial_id):  # and one that has ended
        tune.searcher.on_trial_complete(stranger, result=None, error=True)
    assert tune.driver.failure is None


def test_an_attempt_that_was_lost_with_one_of_its_ranks_is_told_with_where_it_ran(tune):
    trial = tune.start()
    tune.post(trial, nodes=[("n1", "10.0.0.1"), ("n2", "10.0.0.2")])
    tune.look()
    tune.end(trial, "it was killed", dead_rank=1)
    told = f"{spec_of(trial).name} gets another attempt: rank 1 on 10.0.0.2: it was killed"
    assert tune.events[-1].text.startswith(told)


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
    assert [row.name for row in tune.driver.study.set_aside()] == [name]


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


def test_a_node_on_which_attempts_fail_again_and_again_is_named_and_left_out_for_a_while(tune):
    now = [0.0]
    nodes = {"n1": "10.0.0.1", "n2": "10.0.0.2", "n3": "10.0.0.3"}
    bad_nodes = tune.driver.bad_nodes = BadNodes(lambda: nodes, clock=lambda: now[0])
    tune.finish(tune.start())

    def run(node, end):
        trial = tune.start()
        tune.post(trial, nodes=[[node, nodes[node]]])
        tune.look()
        end(trial)
        return trial.config["avoid"]

    assert [run("n2", end) for end in (tune.die, tune.die, tune.finish)] == [[], [], []]
    assert [run("n2", tune.die) for _ in range(3)] == [[], [], []]  # as if the two before had not been
    said = Note("3 attempts in a row failed on node 10.0.0.2; it is left out for 10 minutes")
    assert [event for event in tune.events if event == said] == [said]
    assert tune.start().config["avoid"] == ["n2"]
    now[0] = 601.0
    assert bad_nodes.left_out() == []

    def broken(trial):
        tune.fail(trial, "error", "ImportError: libcudart.so.12")

    assert [run("n2", end) for end in (broken, broken, broken)] == [[], [], []]
    assert [event for event in tune.events if event == said] == [said] * 2
    assert tune.start().config["avoid"] == ["n2"]
    assert [bad_nodes.failed("n3") for _ in range(4)] == [""] * 4  # never more than half of them
    assert [bad_nodes.failed("gone") for _ in range(4)] == [""] * 4
    now[0] = 1202.0
    assert bad_nodes.left_out() == []


def test_an_attempt_that_was_asked_to_leave_is_repeated_again_and_again_and_no_failure_is_counted(tune):
    trial = tune.start()
    name, folder = trial.config["spec"]["name"], tune.folder(trial)
    for number in range(1, 20):
        save(folder, 1, number)
        for reason in ("node7 goes", "asked once more"):
            tune.driver.ask_to_leave(spec_of(trial), reason)
        assert tune.order(trial) == "leave"
        tune.end(trial)
        assert tune.events[-1] == Note(f"{name} gets another attempt: node7 goes")
        trial = tune.start()
        assert spec_of(trial).attempt == number + 1
        assert tune.order(trial) == "go"  # what an attempt before was asked means nothing
    tune.finish(trial)
    assert kinds(tune.events).count(BaselineFinished) == 1
    lines = (folder / "log.txt").read_text().splitlines()
    assert lines[0].endswith("attempt 1: left: node7 goes; the next attempt continues from step 10 (epoch 1)")
    assert len(lines) == 19
    tune.driver.ask_to_leave(spec_of(trial), "it has ended")
    assert tune.order(trial) == "go"
    trial = tune.start()
    tune.driver.exchange.heard -= 61  # it has slept, and the mailbox has asked
    tune.end(trial)
    assert tune.events[-1].text.endswith(" gets another attempt: the driver was silent for more than 60 s")


def test_the_last_node_on_which_a_training_fits_is_never_left_out():
    """The head has no CPU; of two workers one is left out, and the other then goes."""
    there = {"head": Node(0, 0), "n1": Node(2, 0), "n2": Node(2, 0), "n3": Node(1, 0)}

    def fits(without):
        left = tuple(node for name, node in there.items() if name not in without)
        return capacity_of(make_recipe(6, resources={"cpus_per_worker": 2}), left, may_grow=True).concurrency > 0

    nodes = BadNodes(lambda: dict.fromkeys(there, "10.0.0.1"), fits)
    assert [bool(nodes.failed("n1")) for _ in range(3)] == [False, False, True]
    assert not any(nodes.failed("n2") for _ in range(9))
    assert nodes.left_out() == ["n1"]
    del there["n2"]
    assert nodes.left_out() == []


def test_an_attempt_that_ends_before_it_has_left_is_settled_as_any_other_and_one_that_dies_is_lost(tune):
    tune.finish(tune.start())
    for end, outcome in ((lambda trial: tune.fail(trial, "diverged"), "diverged"), (tune.finish, "complete")):
        trial = tune.start()
        tune.driver.ask_to_leave(spec_of(trial), "node7 goes")
        end(trial)
        assert tune.events[-1].row.outcome == outcome
    for _ in range(LOST_ATTEMPTS):
        trial = tune.start()
        tune.driver.ask_to_leave(spec_of(trial), "node7 goes")
        tune.die(trial)
    assert tune.events[-1] == TrialSetAside(spec_of(trial), "RuntimeError: The actor died unexpectedly.")


def test_what_has_a_rank_on_a_node_that_is_taken_away_leaves_it_and_nothing_is_put_there(tune):
    draining, now = {}, [0.0]
    tune.driver.drains = Drains(lambda: draining, lambda: now[0])
    first, second = tune.start(), tune.start()
    tune.post(first, nodes=[("n1", "10.0.0.1")])
    tune.post(second, nodes=[("n1", "10.0.0.1"), ("n2", "10.0.0.2")])
    tune.look()
    draining["n2"] = round(1000 * (time.time() + 1000))
    tune.look()  # Ray is asked once a second
    assert tune.order(second) == "go"
    now[0] = 1.0
    tune.look()
    assert (tune.order(first), tune.order(second)) == ("go", "leave")
    tune.end(second)
    assert re.search(r" gets another attempt: 10\.0\.0\.2 is being taken away within \d+ s$", tune.events[-1].text)
    again = tune.start()
    assert (again.config["spec"]["name"], again.config["avoid"]) == (second.config["spec"]["name"], ["n2"])
    del draining["n2"]  # it is gone
    now[0] = 2.0
    tune.finish(again)
    assert tune.start().config["avoid"] == []


def test_the_group_of_a_killed_trial_is_removed_once_it_is_known_or_keeps_others_from_theirs(search):
    groups, removed = {}, []  # of the job, with whether each has its resources

    def remove(name):
        removed.append(name)
        del groups[name]

    groups["of the program"] = True  # which has it for itself, and starts a search beside it
    tune = search(leaks=Leaks(lambda: dict(groups), remove))
    groups |= {"g1": True, "g2": True}
    first, second = tune.start(), tune.start()
    tune.die(first)
    tune.look()
    assert removed == []  # which of the two is the second one's is not known yet
    third = tune.start()
    groups["g3"] = True
    tune.post(second, group="g2")
    tune.look()
    assert removed == []  # the third one may have taken a group that was there
    tune.post(third, group="g3")
    tune.look()
    assert removed == ["g1"]
    assert tune.events[-1] == Note("removed 1 placement group that a killed trial had left behind")
    tune.end(second)
    groups["g4"] = False  # the next one waits for what the third one holds
    tune.start()
    tune.die(third)
    tune.look()
    assert "g3" in removed
    tune.driver.leaks.clear()
    assert [*groups] == ["of the program"]


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
    rows = rows_by_kind(study_dir)
    assert [row.number for row in rows["trial"]] == list(range(NUM_TRIALS))
    everything = rows["trial"] + rows["baseline"]
    assert len({row.name for row in everything}) == NUM_TRIALS + 1
    assert all((row.outcome == "running") == row.set_aside for row in everything)
    assert Counter(told) == Counter(row.name for row in everything if not row.set_aside)
    assert best_row(rows["trial"]).name in (study_dir / "best.yaml").read_text().splitlines()[0]
    killed_searches.check_told_once(study_dir)
