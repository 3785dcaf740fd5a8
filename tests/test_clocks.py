"""Clocks that jump by a day, and files with dates in the future: nobody loses a study, no time is negative."""

import itertools
import json
import os
import re
import sys
import time

import attempts
import pytest
import report_studies
import stand_in
import verbs_host
from crash_host import call
from logs import commits
from study_steps import told
from test_holding import ELSEWHERE, holder, leave

from carft_ray.recipe.schema.recipe import BudgetConfig
from carft_ray.results.reading.status_and_ls import status
from carft_ray.results.reading.study_view import read_study
from carft_ray.store import heartbeat
from carft_ray.store.heartbeat import SILENT_FOR_S
from carft_ray.store.log import log_of
from carft_ray.study.opening import open_study
from carft_ray.study.running import left_behind, started
from carft_ray.study.training import TrialSpec

DAY_S = 24 * 3600.0
JUMPS = {"forward": (0.0, DAY_S), "back": (0.0, -DAY_S), "both": (0.0, DAY_S, 0.0, -DAY_S)}


def jumping(jumps, every=3):
    """Returns a clock that jumps each few times that it is asked."""
    turns, plain = itertools.count(), time.time
    return lambda: plain() + jumps[next(turns) // every % len(jumps)]


def search_with(path, jumps, study_dir, num_trials):
    """Searches with stand-in trainings while the clock jumps, with files dated by it."""
    import search_driver

    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
    clock, plain = jumping(jumps), os.replace
    time.time = clock

    def replace(old, new, **more):
        now = clock()
        os.utime(old, (now, now))
        plain(old, new, **more)

    os.replace = replace
    stand_in.make_recipe = with_budget(stand_in.make_recipe)
    heartbeat.BEAT_AFTER_S = 0.0
    sys.exit(
        search_driver.main(study_dir, num_trials, '{"executor": "debug"}', search='{"sampler": {"name": "random"}}')
    )


def with_budget(plain):
    def made(*given, **more):
        return plain(*given, **more).model_copy(update={"budget": BudgetConfig(wall_time=3600, gpu_hours=1)})

    return made


@pytest.mark.whole
def test_a_search_whose_clock_jumps_ends_as_any_other_and_its_budget_does_not(tmp_path):
    whole = {}
    for name, jumps in {"calm": (0.0,), **JUMPS}.items():
        study_dir, path = tmp_path / name / "study", tmp_path / name / "output.txt"
        path.parent.mkdir()
        process = attempts.forked(search_with, path, jumps, study_dir, 2)
        process.join()
        assert process.exitcode == 0, path.read_text()
        whole[name] = told(study_dir)
        found = json.dumps(status(read_study(study_dir)))
        assert '": -' not in found, found
        if name != "calm":
            times = [commit["time"] for commit in commits(study_dir)]
            assert max(times) - min(times) > DAY_S / 2
    assert all(each == whole["calm"] for each in whole.values())


@pytest.mark.parametrize("jumps", JUMPS.values(), ids=JUMPS)
def test_what_a_killed_attempt_took_of_the_budget_does_not_follow_the_clock(study_dir, monkeypatch, jumps):
    now, spec = [1.7e9], TrialSpec("trial", 0, "t0000-0000", {}, 1)
    monkeypatch.setattr(time, "time", lambda: now[0])
    with open_study(study_dir, stand_in.make_recipe(3)) as study:
        study.log.write(started(spec, 5.0, 2.0, 1, ""))
        for jump in (*jumps, 0.0):
            now[0] += 30 + jump
            study.log.write({"kind": "at work"})
    [(seconds, gpus)] = left_behind(log_of(study_dir)).values()
    num_jumps = sum(jump != 0 for jump in jumps)
    calm_s = 5.0 + 30 * (len(jumps) + 1 - num_jumps)
    assert (gpus, calm_s <= seconds <= calm_s + num_jumps * SILENT_FOR_S) == (2.0, True), seconds


@pytest.mark.parametrize("ahead_s", [DAY_S, -DAY_S])
def test_of_a_search_that_runs_the_time_used_is_neither_negative_nor_that_of_a_jump(
    study_dir, monkeypatch, ahead_s, capsys
):
    with open_study(study_dir, report_studies.make_recipe(3)) as study:
        report_studies.fill(study, 1)
        report_studies.start(study)
        plain = time.time
        monkeypatch.setattr(time, "time", lambda: plain() + ahead_s)
        for path in study_dir.rglob("*"):
            os.utime(path, (plain() - ahead_s,) * 2)
        found = status(read_study(study_dir))
        assert found["search"]["running"]
        assert 0 <= found["budget"]["wall_time_used_s"] <= 2 * SILENT_FOR_S
        for words in (["status", study_dir], ["ls", study_dir]):
            assert call(words) == 0
            assert not re.search(r"-\d+:\d\d|-1 day", capsys.readouterr().out)


@pytest.mark.slow
def test_a_study_of_a_dead_process_with_dates_in_the_future_is_taken_over_by_a_search_and_by_a_confirm(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(heartbeat, "SILENT_FOR_S", 0.3)
    monkeypatch.setattr(heartbeat, "LOOK_EVERY_S", 0.05)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("carft_ray.launch.workers.worker.RUNNER", verbs_host.RUNNER)
    (tmp_path / "recipe.yaml").write_text(verbs_host.RECIPE)
    study_dir = tmp_path / "study"
    assert call(["search", "recipe.yaml", "--study", study_dir]) == 0
    ways = (["resume", study_dir, "--trials", "+1"], ["confirm", study_dir, "--top", "1", "--seeds", "2"])
    for words in ways:
        leave(study_dir, **ELSEWHERE)
        for path in study_dir.rglob("*"):
            os.utime(path, (time.time() + DAY_S,) * 2)
        assert holder(study_dir) == "process 12 on node7, since noon"
        capsys.readouterr()
        assert call(words) == 0, capsys.readouterr().err
        assert "took over from process 12 on node7, since noon, which is gone" in capsys.readouterr().err
