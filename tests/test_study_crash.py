"""A search that is killed at every durable operation and goes on: nothing lost, nothing doubled, the same values.

Without Ray, in forks of one process (``crash_host.py``); what is trained is a stand-in. Each day has its share of the
kills (``kill_points.py``), ``make crash-points`` makes all.
"""

import json
import re
import signal
from collections import Counter

import crash_host
import crash_points
import kill_points
import pytest
import stand_in
from sequential_search import DIVERGES, SEARCH

from carft_ray.study.rows import baselines, best_row, confirmations, trials

NUM_TRIALS = 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searches")
    stand_in.tell(folder, **{"seconds": 0, str(DIVERGES): "diverge"})
    return folder


@pytest.fixture(scope="module")
def host(folder):
    """Gives a function that runs jobs and returns for each name its study and its answers."""
    with crash_host.started(folder, "sequential_search") as run:
        yield lambda jobs: {name: (place / "study", answers) for name, (place, answers) in run(jobs).items()}


@pytest.fixture(scope="module")
def search(folder):
    return ["study", str(NUM_TRIALS)]


@pytest.fixture(scope="module")
def undisturbed(folder, host, search):
    """The study, and the durable operations, of a search that nothing disturbs."""
    kinds = folder / "kinds.json"
    study_dir, [answer] = host([{"name": "undisturbed", "commands": [{"argv": search, "count_to": str(kinds)}]}])[
        "undisturbed"
    ]
    assert answer["code"] == 0, answer["log"]
    return study_dir, json.loads(kinds.read_text())


def moments(kinds, number):
    """Returns when to kill at an operation; a flush of what was appended or renamed leaves what is there already."""
    if kinds[number - 1] == "append":
        return ("torn", "after")
    return () if kinds[number - 1] == "fsync" and kinds[number - 2] in ("append", "replace") else ("after",)


@pytest.fixture(scope="module")
def killed(host, search, undisturbed):
    """Searches killed within or after durable operations, each then run to its end; some killed twice."""
    _, kinds = undisturbed
    jobs = []
    for number, kind in enumerate(kinds, start=1):
        for moment in moments(kinds, number):
            commands = [{"argv": search, "kill": (number, moment)}, {"argv": search}]
            jobs.append({"name": f"{number:03d}-{kind}-{moment}", "commands": commands})
    for number in range(1, len(kinds), len(kinds) // 12):
        again = {"argv": search, "kill": (3 + number * 7 % 17, "after")}
        commands = [{"argv": search, "kill": (number, "after")}, again, {"argv": search}]
        jobs.append({"name": f"{number:03d}-twice", "commands": commands})
    return host(kill_points.share(jobs))


def told(study_dir):
    """All that a search has told about its trials and baselines, without times and attempts."""
    rows = trials(study_dir) + baselines(study_dir)
    return [(row.kind, row.name, row.values, row.outcome, row.reason, row.objective, row.metrics) for row in rows]


def results(study_dir):
    return {path.parents[1].name: json.loads(path.read_text()) for path in study_dir.glob("*/*/*/result.json")}


def weights(study_dir):
    return {path.parents[1].name for path in study_dir.glob("*/*/*/fine_tuned.safetensors")}


def files(study_dir):
    """Names of all that a search leaves; of commits a search that was killed has more."""
    found = {re.sub(r"attempt-\d+", "attempt", str(path.relative_to(study_dir))) for path in study_dir.rglob("*")}
    return {name for name in found if not re.fullmatch(r"log/\d{8}", name)}


def test_the_undisturbed_search_is_what_the_others_are_compared_with(undisturbed):
    study_dir, kinds = undisturbed
    assert Counter(row.outcome for row in trials(study_dir)) == {"complete": NUM_TRIALS - 2, "diverged": 1, "pruned": 1}
    assert {row.name for row in baselines(study_dir)} == {"zero_shot", "plain"}
    assert min(Counter(kinds)[kind] for kind in ("append", "fsync", "link", "replace")) > 10
    assert stand_in.make_recipe(**SEARCH).search.keep_checkpoints == 2
    complete = sorted((row for row in trials(study_dir) if row.objective), key=lambda row: -row.objective)
    assert weights(study_dir) == {"plain", complete[0].name, complete[1].name}


def test_every_kill_struck_and_every_search_then_ended(undisturbed, killed):
    codes = {name: [answer["code"] for answer in answers] for name, (_, answers) in killed.items()}
    assert len(codes) * kill_points.OF > 0.75 * len(undisturbed[1])
    assert {name: found for name, found in codes.items() if found[0] != -signal.SIGKILL or found[-1]} == {}
    second = [found[1] for name, found in codes.items() if "twice" in name]
    assert second.count(-signal.SIGKILL) > len(second) / 4 or kill_points.OF > 1
    logs = [answer["log"] for _, answers in killed.values() for answer in answers]
    assert [log for log in logs if "Traceback (" in log or "arning" in log] == []


def test_a_killed_search_ends_with_the_very_trials_of_the_undisturbed_one(undisturbed, killed):
    expected = told(undisturbed[0])
    assert {name: told(study) for name, (study, _) in killed.items() if told(study) != expected} == {}
    different = {name for name, (study, _) in killed.items() if results(study) != results(undisturbed[0])}
    assert different == set()


def test_the_best_weights_stay_and_no_others_and_no_remains(undisturbed, killed):
    study_dir, _ = undisturbed
    kept = weights(study_dir)
    assert best_row(trials(study_dir)).name in kept
    assert {name: weights(study) for name, (study, _) in killed.items() if weights(study) != kept} == {}
    left = {name: files(study) ^ files(study_dir) for name, (study, _) in killed.items()}
    assert {name: found for name, found in left.items() if found} == {}


def test_the_best_trial_is_the_same_recipe_whatever_was_killed(undisturbed, killed):
    study_dir, _ = undisturbed
    expected = (study_dir / "best.yaml").read_text()
    assert best_row(trials(study_dir)).name in expected.splitlines()[0]
    assert {name for name, (study, _) in killed.items() if (study / "best.yaml").read_text() != expected} == set()


def test_what_was_finished_is_told_and_not_run_again(undisturbed, killed):
    """A second attempt begins only when the first one had no result; so at most one training has two."""
    for name, (study, answers) in killed.items():
        rows = trials(study) + baselines(study)
        again = [row.name for row in rows if row.attempt > 1]
        assert len(again) < len(answers), name


# searches, their continuation and a confirm as the commands run them: ``make crash-points``


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Gives the runner of jobs, and what the undisturbed commands have left."""
    folder = tmp_path_factory.mktemp("points")
    crash_points.prepare(folder)
    with crash_points.started(folder) as host:
        yield host, crash_points.undisturbed(host, folder)


def test_a_search_more_of_it_and_a_confirm_killed_around_any_write_of_the_log_lose_and_double_nothing(points):
    host, calm = points
    jobs = kill_points.share(crash_points.jobs_of(calm))
    found = crash_points.killed(host, jobs)
    assert {crash_points.command_of(name) for name in found} == set(crash_points.COMMANDS)
    assert len(found) == len(jobs)
    assert crash_points.differences(found, calm) == ([], [])


@pytest.mark.whole
def test_they_lose_and_double_nothing_when_killed_around_writes_to_a_bucket(tmp_path):
    crash_points.prepare(tmp_path)
    with crash_points.started(tmp_path, "bucket") as host:
        calm = crash_points.undisturbed(host, tmp_path)
        found = crash_points.killed(host, crash_points.jobs_of(calm, host.kind)[::37])
        assert {crash_points.command_of(name) for name in found} == set(crash_points.COMMANDS)
        assert crash_points.differences(found, calm) == ([], [])


def test_what_the_kills_are_compared_with_was_cut_extended_and_confirmed(points):
    _, calm = points
    outcomes = [Counter(row.outcome for row in trials(place / "study")) for place, _ in calm.values()]
    assert outcomes[0] == {"complete": 4, "diverged": 1, "pruned": 1}
    assert sum(outcomes[1].values()) == 8
    assert outcomes[2] == outcomes[1]
    rows = confirmations(calm["confirm"][0] / "study")
    assert [row.outcome for row in rows] == ["complete"] * 4
