"""Tune for the tests of the driver: it asks and is told as Tune does it; no Ray runs."""

import contextlib
from collections import Counter
from types import SimpleNamespace

from ray.tune.search import Searcher
from stand_in import make_recipe
from study_steps import searching

from carft_ray.launch.cluster.capacity import AtATime
from carft_ray.launch.driver import Driver
from carft_ray.launch.tune_runner import DriverCallback, DriverSearcher
from carft_ray.launch.workers.mailbox import Exchange, Mailbox, Post, Process
from carft_ray.store.attempt_files import write_result
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


@contextlib.contextmanager
def short_search(study_dir):
    """Gives a function that makes a search of 6 trials, 2 at a time, with further arguments for its driver."""
    with searching(study_dir, make_recipe(6)) as study:

        def make(**how):
            events = []
            tune = Tune(Driver(study, AtATime(2), events.append, **how))
            tune.events = events
            return tune

        yield make


def kinds(events):
    return [type(event) for event in events]
