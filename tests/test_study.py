"""The study on disk, without Ray: states, recovery, kills, and what is refused."""

import contextlib
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import curve_stand_in
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import commits, operations, rewrite
from optuna.trial import TrialState
from stand_in import make_recipe, objective
from study_steps import contents, failed, finish, optuna_study, run_all, run_search, searching, told, write_result

from carft_ray import files
from carft_ray.errors import CarftError, DataError, RecipeError, StorageError, UsageError
from carft_ray.recipe.loading import apply
from carft_ray.study import attributes, opening
from carft_ray.study.journal import trial_name
from carft_ray.study.opening import open_study
from carft_ray.study.retries import LOST_ATTEMPTS
from carft_ray.study.rows import best_row
from carft_ray.study.snapshot import snapshot


def begin_and_end(study_dir, recipe):
    with open_study(study_dir, recipe):
        pass


# what is told


def test_baselines_come_first_and_what_was_told_is_in_the_rows_and_in_optuna(study_dir):
    with searching(study_dir, make_recipe(3)) as study:
        assert study.add_zero_shot({"objective": 0.25, "id_accuracy": 0.3, "num_images": {"id_val": 64}})
        assert study.add_zero_shot({"objective": 0.9}) is None  # once
        specs = run_all(study, lambda spec: 0.1 * spec.number)
        assert (study.done(), study.next()) == (True, None)
    assert [(spec.kind, spec.number) for spec in specs] == [("baseline", 0), *(("trial", n) for n in range(3))]
    for spec in specs[1:]:
        assert 1e-5 <= spec.values["learning_rate"] <= 1e-2
        assert spec.name == trial_name(spec.number, spec.values)
    rows = snapshot(study_dir).trials
    assert [row.objective for row in rows] == [0.0, 0.1, 0.2]
    assert {(row.outcome, row.alpha, row.metrics["id_accuracy"], row.elapsed_s) for row in rows} == {
        ("complete", 0.4, 0.7, 2.0)
    }
    assert best_row(rows).number == 2
    beside = {row.name: row for row in snapshot(study_dir).baselines}
    assert set(beside) == {"plain", "zero_shot"}
    assert (beside["zero_shot"].objective, beside["plain"].values) == (0.25, {"kl_weight": 0})
    search = optuna_study(study_dir)
    assert [(trial.state, trial.constraints) for trial in search.trials] == [(TrialState.COMPLETE, {"trained": -1})] * 3
    assert search.direction.name == "MAXIMIZE"
    assert not any("alpha" in trial.params for trial in search.trials)


def test_the_time_of_a_training_includes_its_earlier_attempts(study_dir):
    with searching(study_dir, make_recipe(1, baselines={})) as study:
        first = study.next()
        advance(study_dir, first, 10)
        assert study.settle(first, failed(first, "error"), study.spent(first, 60.0, 0.0)) is None
        again = study.next()
        write_result(study_dir, again, 0.5)  # of 2 s
        assert study.settle(again, spent=study.spent(again, 3.0, 0.0)).elapsed_s == 62.0
    assert [row.elapsed_s for row in snapshot(study_dir).trials] == [62.0]


def test_diverged_is_pruned_with_a_constraint_and_an_exception_only_when_it_comes_back(study_dir):
    with searching(study_dir, make_recipe(3, baselines={})) as study:
        first, second = study.next(), study.next()
        for spec in (first, second):
            advance(study_dir, spec, 10)
        assert study.settle(first, failed(first, "diverged", "loss not finite")).outcome == "diverged"
        assert study.settle(second, failed(second, "error", "RuntimeError: once")) is None
        again = study.next()
        assert (again.number, again.attempt, again.values) == (second.number, 2, second.values)
        assert study.settle(again) is None
        row = study.settle(again, failed(again, "error", "RuntimeError: twice"))
        assert (row.outcome, row.reason, row.attempt) == ("error", "RuntimeError: twice", 2)
        assert not list(study_dir.glob("trials/*/attempt-*/*")), "neither weights nor checkpoints are kept"
    for trial, outcome in zip(optuna_study(study_dir).trials, ("diverged", "error"), strict=True):
        assert (trial.state, trial.constraints) == (TrialState.PRUNED, {"trained": 1.0})
        assert trial.user_attrs["outcome"] == outcome


def advance(study_dir, spec, step):
    """Leaves what stands for a checkpoint."""
    files.write_json(spec.place(study_dir) / f"step-{step:08d}" / "state.json", {})


def test_attempts_that_are_lost_without_advancing_set_the_training_aside_for_the_next_search(study_dir):
    with searching(study_dir, make_recipe(2, baselines={})) as study:
        for attempt in range(1, LOST_ATTEMPTS + 1):
            spec = study.next()
            assert (spec.number, spec.attempt) == (0, attempt)
            advance(study_dir, spec, 10)
            answer = study.lost(spec, "the process died", "Traceback of the other rank")
            assert answer == ("advanced" if attempt == 1 else "repeated" if attempt < LOST_ATTEMPTS else "set aside")
        finish(study, study.next())  # the others go on
        assert study.done()
        assert [row.name for row in study.rows() if row.set_aside] == [spec.name]
    row, _ = snapshot(study_dir).trials
    assert (row.outcome, row.set_aside) == ("running", True)
    assert row.reason == "5 attempts in a row made no progress; the last: the process died"
    log = (spec.folder(study_dir) / "log.txt").read_text()
    assert log.index("attempt 1: lost: the process died") < log.index("Traceback of the other rank")
    with searching(study_dir, make_recipe(2, baselines={})) as study:
        assert not any(row.set_aside for row in study.rows())
        again = study.next()
        assert (again.name, again.attempt) == (spec.name, LOST_ATTEMPTS + 1)
        assert study.lost(again, "the process died") == "advanced"  # it has as many attempts as before


def test_lost_attempts_that_advance_have_no_limit_and_exceptions_none_when_one_advanced_in_between(study_dir):
    with searching(study_dir, make_recipe(2, baselines={})) as study:
        for attempt in range(1, 2 * LOST_ATTEMPTS):
            spec = study.next()
            advance(study_dir, spec, 10 * (attempt // 2))
            assert study.lost(spec, "the node was taken away") in ("advanced", "repeated")
        for step in (100, 200):
            spec = study.next()
            advance(study_dir, spec, step)
            for _ in range(2):  # told again, it is one exception
                assert study.settle(spec, failed(spec, "error", "IndexError")) is None
            study.waiting.pop()
        assert study.lost(study.next(), "its node is gone") == "repeated"
        spec = study.next()
        assert study.settle(spec, failed(spec, "error", "IndexError")).attempt == 2 * LOST_ATTEMPTS + 3


def test_rows_are_added_once_and_void_what_an_earlier_attempt_has_reported_from_their_step_on(study_dir):
    with searching(study_dir, make_recipe(1, baselines={})) as study:
        spec, rows = study.next(), [{"step": step, "loss": 1.0} for step in (10, 20)]
        assert [study.add_row(spec, row) for row in (*rows, rows[0])] == [True, True, False]
        assert study.add_row(spec, {"step": 10, "loss": 2.0})
        assert files.read_json_lines(spec.folder(study_dir), "metrics.jsonl") == [{"step": 10, "loss": 2.0}]
        files.write_bytes(spec.place(study_dir) / "fine_tuned.safetensors", b"weights")
        study.stopped(spec)
        assert "resume continues from the end of its training" in (spec.folder(study_dir) / "log.txt").read_text()


def test_a_fault_of_disk_or_data_stops_the_search_and_is_no_verdict(study_dir):
    with searching(study_dir, make_recipe(1, baselines={})) as study:
        spec = study.next()
        with pytest.raises(CarftError, match="a file is gone") as caught:
            study.settle(spec, failed(spec, "fatal", "a file is gone"))
        assert caught.value.exit_code == 4
    with searching(study_dir, make_recipe(1, baselines={})) as study:  # mended meanwhile
        assert study.next().attempt == 2


@pytest.mark.parametrize("outcome", ["complete", "diverged", "error", "lost", "memory", "fatal", None])
def test_what_an_attempt_took_is_one_commit_with_its_verdict_and_is_noted_without_one(study_dir, outcome):
    with searching(study_dir, make_recipe(1, baselines={})) as study:
        spec, before = study.next(), study.log.number
        if outcome == "complete":
            write_result(study_dir, spec)
        failure = None if outcome in ("complete", None) else failed(spec, outcome)
        with pytest.raises(CarftError) if outcome == "fatal" else contextlib.nullcontext():
            row = study.settle(spec, failure, study.spent(spec, 90.0, 2.0))
            assert (row is not None) == (outcome in ("complete", "diverged"))
        assert study.gpu_seconds() == 180
        assert study.log.number == before + 1 + (outcome == "error")  # the exception is counted, too


# kills and what goes on


def go_on(study):
    """Searches to the end; what becomes of a trial depends on its number and values alone."""
    study.add_zero_shot(curve_stand_in.ZERO_SHOT)
    while (spec := study.next()) is not None:
        if study.recipe.search.objective.kind == "pareto":
            curve_stand_in.write_result(study, spec)
            study.settle(spec)
            continue
        value = objective(apply(study.recipe, spec.values).train)
        row = {"epoch": 1, "step": 10, "num_steps": 20, "subset/objective": value if spec.number != 4 else -9.0}
        study.add_row(spec, row)
        is_cut = study.report(spec, row)
        if is_cut or (spec.kind, spec.number) == ("trial", 2):
            study.settle(spec, None if is_cut else failed(spec, "diverged"))
        else:
            finish(study, spec, value)


SCALAR = {"pruner": {"name": "median", "startup_trials": 2}, "sampler": {"startup_trials": 2}}
PARETO = {"constraints": {"id_drop": {"zero_shot": 0.01}}, "sampler": {"startup_trials": 2}}
SEARCHES = {"scalar": make_recipe(6, **SCALAR), "pareto": curve_stand_in.make_recipe(4, **PARETO)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEARCHES)
def test_any_prefix_of_a_log_is_a_study_that_goes_on_to_the_same_end(study_dir, tmp_path, kind):
    """As after a kill at any moment, with and without a result of the training that ran."""
    recipe = SEARCHES[kind]
    with searching(study_dir, recipe) as study:
        go_on(study)
    expected, found = told(study_dir), commits(study_dir)
    assert len([each for each in found if each["operations"]]) <= 6 + 3 * recipe.search.trials
    written = {
        name for each in operations(study_dir) for key in ("user_attr", "user_attrs") for name in each.get(key, ())
    }
    assert written <= {value for name, value in vars(attributes).items() if name.isupper()}
    if kind == "scalar":
        assert {row[3] for row in expected} == {"complete", "diverged", "pruned"}
    for number in range(1, len(found)):
        part = tmp_path / str(number)
        shutil.copytree(study_dir, part)
        rewrite(part, found[:number])
        running = {row[1]: row[3] == "running" for row in told(part)} if number > 2 else {}
        for folder in (*part.glob("trials/*"), *part.glob("baselines/*")):
            if folder.name not in running:
                shutil.rmtree(folder)
            elif running[folder.name] and number % 2:
                shutil.rmtree(folder / "attempt-1", ignore_errors=True)  # but not the rows that the driver had
        with searching(part, recipe) as study:
            go_on(study)
        assert told(part) == expected, number
        assert sum(row.attempt - 1 for row in snapshot(part).rows) <= 1


STEPS = st.sampled_from(["ask", "ask", "finish", "result", "lose", "raise"])


@pytest.mark.slow
@settings(max_examples=8, derandomize=True, deadline=None)
@given(st.lists(st.lists(STEPS, max_size=8), max_size=4))
def test_whatever_happens_each_training_is_told_once_with_its_values(searches):
    """Each list is a search, killed at its end, and the next one wants a trial more; trainings run side by side."""
    rng, asked, ended, num_trials = random.Random(0), {}, {}, 2 + len(searches)
    with tempfile.TemporaryDirectory() as temporary:
        study_dir = Path(temporary).resolve() / "study"
        for number, steps in enumerate(searches):
            with searching(study_dir, make_recipe(2 + number)) as study:
                running = []
                for step in steps:
                    if step == "ask":
                        running += [spec] if (spec := study.next()) else []
                        assert all(spec.values == asked.setdefault(spec.name, spec.values) for spec in running)
                        continue
                    if not running:
                        continue
                    spec, row = running.pop(rng.randrange(len(running))), None
                    if step == "finish":
                        row = finish(study, spec)
                    elif step == "result":  # which the killed search has not told
                        write_result(study_dir, spec, 0.8)
                    elif step == "lose":
                        study.lost(spec, "the process died")
                    else:
                        row = study.settle(spec, failed(spec, "error"))
                    ended |= {spec.name: row} if row else {}
        run_search(study_dir, make_recipe(num_trials))
        rows = {row.name: row for row in snapshot(study_dir).rows}
        assert [row.number for row in snapshot(study_dir).trials] == list(range(num_trials))
        assert {name: replace(rows[name], expected=None, order=None) for name in ended} == ended
        assert {name: rows[name].values for name in asked} == asked
        assert {row.outcome for row in rows.values()} <= {"complete", "error"}


# what is refused, and what stays


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    told = r"must be a study or empty, but got thesis\.tex"
    with pytest.raises(UsageError, match=told), open_study(tmp_path, make_recipe()):
        pass
    with pytest.raises(StorageError, match="must be a study"):
        snapshot(tmp_path)
    assert {path.name for path in contents(tmp_path)} == {"thesis.tex"}


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file" / "study", Path("/proc/study")):
        with pytest.raises(StorageError, match="must be writable") as caught:
            begin_and_end(folder, make_recipe())
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("operation", [{"op_code": 0}, {"op_code": 8, "worker_id": "x"}])
def test_a_log_with_operations_of_another_optuna_is_one_message_and_nothing_is_changed(study_dir, operation):
    begin_and_end(study_dir, make_recipe())
    rewrite(study_dir, [{**each, "operations": [operation]} for each in commits(study_dir)])
    message = "log: must be the log of a study(.|\n)*the results of finished trials are still in trials/"
    before = contents(study_dir)
    for use in (lambda: begin_and_end(study_dir, make_recipe()), lambda: snapshot(study_dir).trials):
        with pytest.raises(StorageError, match=message) as caught:
            use()
        assert caught.value.exit_code == 5
    assert contents(study_dir) == before


def test_a_study_whose_preparation_fails_before_any_training_is_gone(study_dir):
    for error in (DataError, RecipeError):
        with pytest.raises(error), open_study(study_dir, make_recipe(2)):
            raise error("unfit")
        assert not study_dir.exists()
    with searching(study_dir, make_recipe(3, epochs=7)) as study:  # the mended recipe takes the same folder
        study.next()
    with pytest.raises(DataError), open_study(study_dir, make_recipe(3, epochs=7)):
        raise DataError("unfit")
    assert len(snapshot(study_dir).baselines) == 1


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_log_that_has_lost_trainings_is_an_error_and_nothing_is_removed(study_dir, number):
    run_search(study_dir, make_recipe(2))
    rewrite(study_dir, commits(study_dir)[:number])
    before = contents(study_dir)
    with pytest.raises(StorageError, match=r"log: must be the log of the trainings in") as caught:
        begin_and_end(study_dir, make_recipe(2))
    assert caught.value.exit_code == 5
    assert "one without trials/t000" in str(caught.value)
    assert "Restore it from a copy. If there is none, move those folders away" in str(caught.value)
    assert contents(study_dir) == before
    shutil.rmtree(study_dir / "trials")
    (study_dir / "baselines").rename(study_dir / "elsewhere")
    assert [spec.kind for spec in run_search(study_dir, make_recipe(2))][-2:] == ["trial", "trial"]


def test_a_study_whose_search_began_a_training_since_it_was_read_is_in_use_and_nothing_is_to_be_moved(
    study_dir, monkeypatch
):
    begin_and_end(study_dir, make_recipe(2))
    look = opening.foreign_names
    with contextlib.ExitStack() as other:

        def search_on(folder):  # between the look at the log and that at the folders
            monkeypatch.setattr(opening, "foreign_names", look)
            spec = other.enter_context(searching(folder, make_recipe(2))).next()
            spec.place(folder).mkdir(parents=True)
            return look(folder)

        monkeypatch.setattr(opening, "foreign_names", search_on)
        with pytest.raises(StorageError, match="is in use: two searches on one study would damage it"):
            begin_and_end(study_dir, make_recipe(2))


def test_what_this_call_did_not_make_stays_when_the_data_turn_out_unfit_or_the_recipe_is_another(study_dir):
    begin_and_end(study_dir, make_recipe(2))
    (study_dir / "trials" / "t0000-1234").mkdir(parents=True)
    with pytest.raises(RecipeError):
        begin_and_end(study_dir, make_recipe(2, epochs=7))
    rewrite(study_dir, [])
    for error in (DataError, RecipeError):
        with pytest.raises(error), open_study(study_dir, make_recipe(2)):
            raise error("one data set was changed")
    assert (study_dir / "trials" / "t0000-1234").is_dir()
