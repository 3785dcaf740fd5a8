"""The study on disk, without Ray: states, recovery, kills, who holds it, identity."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import optuna
import pytest
import typer.main
from logs import HOLD, commits, holding, rewrite
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from stand_in import make_recipe, objective

from carft_ray.cli import app
from carft_ray.errors import CarftError, DataError, RecipeError, StorageError, UsageError
from carft_ray.files import temporary_name
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.trial_values import apply
from carft_ray.results.reading.trained import open_trained
from carft_ray.store import result
from carft_ray.study.holding import log_of
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import Failure, trial_name
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import baselines, best_row, trials
from carft_ray.study.study import LOST_ATTEMPTS

BASE = Path(__file__).parent


def optuna_study(study_dir, name="search"):
    return optuna.load_study(storage=JournalStorage(log_of(study_dir)), study_name=name)


def write_result(study_dir, spec, value=0.5, **more):
    content = {"objective": value, "alpha": 0.4, "metrics": {"id_accuracy": 0.7}, "elapsed_s": 2.0}
    result.write_result(spec.place(study_dir), {**content, **more})


def failed(spec, outcome, reason="because"):
    return Failure(outcome, reason, spec.attempt, 4, details="Traceback ...")


def run_all(study, value=lambda spec: 0.5):
    specs = []
    while (spec := study.next()) is not None:
        write_result(study.study_dir, spec, value(spec))
        assert study.settle(spec) is not None
        specs.append(spec)
    return specs


@pytest.fixture
def study_dir(tmp_path):
    return (tmp_path / "study").resolve()


@pytest.mark.slow
def test_a_study_runs_baselines_first_and_then_the_wanted_number_of_trials(study_dir):
    with open_study(study_dir, make_recipe(5)) as study:
        assert recover_running(study) == []
        specs = run_all(study)
        assert study.done()
    assert [spec.kind for spec in specs] == ["baseline"] + ["trial"] * 5
    assert [spec.number for spec in specs[1:]] == list(range(5))
    for spec in specs[1:]:
        assert 1e-5 <= spec.values["learning_rate"] <= 1e-2
        assert spec.name == trial_name(spec.number, spec.values)
        apply(make_recipe(), spec.values)
    assert len({spec.name for spec in specs}) == 6


@pytest.mark.slow
def test_what_was_told_is_in_the_rows_and_in_optuna(study_dir):
    with open_study(study_dir, make_recipe(3)) as study:
        recover_running(study)
        study.add_zero_shot({"objective": 0.25, "id_accuracy": 0.3, "num_images": {"id_val": 64}})
        assert study.add_zero_shot({"objective": 0.9}) is None  # once
        run_all(study, lambda spec: 0.1 * spec.number)
    rows = trials(study_dir)
    assert [row.objective for row in rows] == [0.0, 0.1, 0.2]
    assert {row.outcome for row in rows} == {"complete"}
    assert rows[0].alpha == 0.4
    assert rows[0].metrics == {"id_accuracy": 0.7}
    assert rows[0].elapsed_s == 2.0
    assert best_row(rows).number == 2
    beside = {row.name: row for row in baselines(study_dir)}
    assert set(beside) == {"plain", "zero_shot"}
    assert beside["zero_shot"].objective == 0.25
    assert beside["plain"].values == {"kl_weight": 0}
    search = optuna_study(study_dir)
    assert [trial.state for trial in search.trials] == [TrialState.COMPLETE] * 3
    assert all(trial.constraints == {"trained": -1.0} for trial in search.trials)
    assert search.direction.name == "MAXIMIZE"
    assert not any("alpha" in trial.params for trial in search.trials)


def test_diverged_is_pruned_with_a_constraint_and_an_exception_only_when_it_comes_back(study_dir):
    with open_study(study_dir, make_recipe(3, baselines={})) as study:
        recover_running(study)
        first, second = study.next(), study.next()
        assert study.settle(first, failed(first, "diverged", "loss not finite")).outcome == "diverged"
        assert study.settle(second, failed(second, "error", "RuntimeError: once")) is None
        again = study.next()
        assert (again.number, again.attempt, again.values) == (second.number, 2, second.values)
        assert study.settle(again) is None
        row = study.settle(again, failed(again, "error", "RuntimeError: twice"))
        assert (row.outcome, row.reason, row.attempt) == ("error", "RuntimeError: twice", 2)
    for trial, outcome in zip(optuna_study(study_dir).trials, ("diverged", "error"), strict=False):
        assert trial.state == TrialState.PRUNED
        assert trial.constraints == {"trained": 1.0}
        assert trial.user_attrs["outcome"] == outcome


@pytest.mark.slow
def test_the_sampler_leaves_the_region_where_trials_diverge(study_dir):
    limit = 3e-4
    recipe = make_recipe(40, baselines={})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        while (spec := study.next()) is not None:
            if spec.values["learning_rate"] > limit:
                study.settle(spec, failed(spec, "diverged"))
            else:
                write_result(study_dir, spec, objective(apply(recipe, spec.values).train))
                study.settle(spec)
    late = [row.values["learning_rate"] > limit for row in trials(study_dir)[20:]]
    assert np.mean(late) <= 0.4


def advance(study_dir, spec, step):
    """Leaves what stands for a checkpoint."""
    (spec.place(study_dir) / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.slow
def test_attempts_that_are_lost_without_advancing_set_the_training_aside_for_the_next_search(study_dir):
    with open_study(study_dir, make_recipe(2, baselines={})) as study:
        recover_running(study)
        for attempt in range(1, LOST_ATTEMPTS + 1):
            spec = study.next()
            assert (spec.number, spec.attempt) == (0, attempt)
            advance(study_dir, spec, 10)
            told = study.lost(spec, "the process died", "Traceback of the other rank")
            assert told == ("advanced" if attempt == 1 else "repeated" if attempt < LOST_ATTEMPTS else "set aside")
        other = study.next()  # the others go on
        assert other.number == 1
        write_result(study_dir, other)
        study.settle(other)
        assert study.done()
        assert [row.name for row in study.set_aside()] == [spec.name]
    row, _ = trials(study_dir)
    assert (row.outcome, row.set_aside) == ("running", True)
    assert row.reason == "5 attempts in a row did not advance; the last: the process died"
    trial = optuna_study(study_dir).trials[0]
    assert (trial.state, trial.constraints) == (TrialState.RUNNING, {})
    log = (spec.folder(study_dir) / "log.txt").read_text()
    assert log.index("attempt 1: lost: the process died") < log.index("Traceback of the other rank")
    with open_study(study_dir, make_recipe(2, baselines={})) as study:
        recover_running(study)
        assert study.set_aside() == []
        again = study.next()
        assert (again.name, again.attempt) == (spec.name, LOST_ATTEMPTS + 1)
        assert study.lost(again, "the process died") == "advanced"  # it has as many attempts as before


def test_lost_attempts_that_advance_have_no_limit(study_dir):
    with open_study(study_dir, make_recipe(1, baselines={})) as study:
        recover_running(study)
        for attempt in range(1, 4 * LOST_ATTEMPTS):
            spec = study.next()
            advance(study_dir, spec, 10 * (attempt // 2))
            assert study.lost(spec, "the node was taken away") in ("advanced", "repeated")
        assert study.next().attempt == 4 * LOST_ATTEMPTS


def test_an_exception_is_a_verdict_when_it_comes_back_and_no_attempt_has_advanced_in_between(study_dir):
    with open_study(study_dir, make_recipe(1, baselines={})) as study:
        recover_running(study)
        for step in (10, 20):
            spec = study.next()
            advance(study_dir, spec, step)
            assert study.settle(spec, failed(spec, "error", "IndexError")) is None
            assert study.settle(spec, failed(spec, "error", "IndexError")) is None  # told again, it is one exception
            study.waiting.pop()
        assert study.lost(study.next(), "its node is gone") == "repeated"
        spec = study.next()
        row = study.settle(spec, failed(spec, "error", "IndexError"))
        assert (row.outcome, row.reason, row.attempt) == ("error", "IndexError", 4)


def test_a_fault_of_disk_or_data_stops_the_search_and_is_no_verdict(study_dir):
    recipe = make_recipe(1, baselines={})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        spec = study.next()
        with pytest.raises(CarftError, match="a file is gone") as caught:
            study.settle(spec, failed(spec, "fatal", "a file is gone"))
        assert caught.value.exit_code == 4
    with open_study(study_dir, recipe) as study:  # mended meanwhile
        recover_running(study)
        assert study.next().attempt == 2


@pytest.mark.slow
def test_an_interrupted_search_recovers_its_running_trials_with_number_and_values(study_dir):
    recipe = make_recipe(4)
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        baseline, first, second = study.next(), study.next(), study.next()
        write_result(study_dir, second, 0.8)  # finished, but the driver died before it could tell
    assert [row.outcome for row in trials(study_dir)] == ["running", "running"]
    with open_study(study_dir, recipe) as study:
        [told] = recover_running(study)
        assert (told.number, told.objective) == (second.number, 0.8)
        specs = run_all(study)
    assert (specs[0].name, specs[0].attempt) == (baseline.name, 2)
    assert (specs[1].name, specs[1].values, specs[1].attempt) == (first.name, first.values, 2)
    assert [spec.number for spec in specs[2:]] == [2, 3]
    assert [row.outcome for row in trials(study_dir)] == ["complete"] * 4
    assert trials(study_dir)[1].attempt == 1  # told, not run again


@pytest.mark.slow
def test_a_finished_study_has_nothing_to_do_and_can_be_extended(study_dir):
    with open_study(study_dir, make_recipe(2)) as study:
        recover_running(study)
        run_all(study)
    before = trials(study_dir)
    with open_study(study_dir, make_recipe(2)) as study:
        recover_running(study)
        assert study.done()
        assert study.next() is None
    with open_study(study_dir, make_recipe(4)) as study:
        recover_running(study)
        assert [spec.number for spec in run_all(study)] == [2, 3]
    after = trials(study_dir)
    assert after[:2] == before
    assert len({row.values["learning_rate"] for row in after}) == 4  # the resumed sampler draws new values


def test_a_trial_is_one_commit_with_values_name_and_attempt(study_dir):
    recipe = make_recipe(1, baselines={})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        before = len(commits(study_dir))
        spec = study.next()
    [commit, _] = commits(study_dir)[before:]  # the other one is the release
    assert len([each for each in commit["operations"] if each["op_code"] == 4]) == 1
    rewrite(study_dir, commits(study_dir)[: before + 1])
    assert [(row.name, row.values, row.attempt) for row in trials(study_dir)] == [(spec.name, spec.values, 1)]
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        again = study.next()
    assert (again.number, again.name, again.values, again.attempt) == (0, spec.name, spec.values, 2)


def test_the_end_of_a_training_is_one_commit(study_dir):
    with open_study(study_dir, make_recipe(1, baselines={})) as study:
        recover_running(study)
        spec = study.next()
        before = len(commits(study_dir))
        write_result(study_dir, spec)
        study.settle(spec)
        assert len(commits(study_dir)) == before + 1


def test_optuna_lets_a_running_trial_be_recovered(tmp_path):
    """The contract that recovery rests on: number, values, intermediate values, attributes; then a normal tell."""
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
    study = optuna.create_study(storage=storage, study_name="search", direction="maximize")
    study.ask()
    trial = study.ask()
    rate = trial.suggest_float("rate", 0, 1)
    trial.report(0.5, 3)
    trial.set_user_attr("attempt", 1)

    again = optuna.load_study(
        storage=JournalStorage(JournalFileBackend(str(tmp_path / "journal"))), study_name="search"
    )
    [_, running] = again.get_trials(states=(TrialState.RUNNING,))
    recovered = optuna.trial.Trial(again, running._trial_id)
    assert recovered.number == 1
    assert recovered.params == {"rate": rate}
    assert recovered.suggest_float("rate", 0, 1) == rate
    assert recovered.user_attrs == {"attempt": 1}
    recovered.report(0.6, 4)
    recovered.set_constraint("trained", -1)
    again.tell(recovered, 0.7)
    told = again.trials[1]
    assert told.state == TrialState.COMPLETE
    assert told.value == 0.7
    assert told.intermediate_values == {3: 0.5, 4: 0.6}
    assert told.constraints == {"trained": -1}
    assert again.ask().number == 2


@pytest.mark.slow
@pytest.mark.parametrize("half", [b"", b'{"op_code":5,"work', b"\0\0\0\n"])
def test_what_a_killed_commit_has_left_is_removed_and_the_search_goes_on(study_dir, half):
    with open_study(study_dir, make_recipe(3)) as study:
        recover_running(study)
        spec = study.next()
    temporary_name(study_dir / "log" / "00000099").write_bytes(half)
    with open_study(study_dir, make_recipe(3)) as study:
        assert all(path.name.isdigit() for path in (study_dir / "log").iterdir())
        recover_running(study)
        assert run_all(study)[0].name == spec.name
    assert len(trials(study_dir)) == 3


def test_two_searches_on_one_study_are_refused(study_dir):
    code = f"{HOLD}import time\nwith holding({str(study_dir)!r}):\n    print('held', flush=True)\n    time.sleep(60)\n"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="is in use") as caught, open_study(study_dir, make_recipe()):
            pass
        assert f"process {other.pid} on " in str(caught.value)
        assert caught.value.exit_code == 5
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    with holding(study_dir):  # a killed search holds nothing
        pass


def test_a_study_of_another_recipe_is_refused_and_the_differing_keys_are_named(study_dir):
    with open_study(study_dir, make_recipe(2)):
        pass
    other = make_recipe(2, epochs=7)
    space = {**other.search.space, "learning_rate": other.search.space["learning_rate"].model_copy(update={"high": 1})}
    other = other.model_copy(update={"search": other.search.model_copy(update={"space": space})})
    with pytest.raises(RecipeError) as caught, open_study(study_dir, other):
        pass
    message = str(caught.value)
    assert "train.epochs: must be 2 as in " in message
    assert "but got 7" in message
    assert "search.space.learning_rate.high: must be 0.01" in message
    assert len(caught.value.problems) == 2
    assert caught.value.exit_code == 3


def test_where_and_how_long_a_search_runs_may_change(study_dir):
    with open_study(study_dir, make_recipe(2)):
        pass
    changed = make_recipe(9, max_concurrent_trials=1, resources={"num_workers": 3, "executor": "ray-train"})
    with open_study(study_dir, changed) as study:
        assert study.recipe.search.trials == 9


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    told = r"must be a study or empty, but got thesis\.tex"
    with pytest.raises(UsageError, match=told), open_study(tmp_path, make_recipe()):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "precious"


FOREIGN = {
    "operations of another Optuna": lambda found: [{**each, "operations": [{"op_code": 0}]} for each in found],
    "no attributes": lambda found: [*found, {**found[1], "operations": [{"op_code": 8, "worker_id": "x"}]}],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_log_that_optuna_cannot_read_is_one_message(study_dir, kind):
    with open_study(study_dir, make_recipe()) as study:
        recover_running(study)
    rewrite(study_dir, FOREIGN[kind](commits(study_dir)))
    for use in (lambda: open_study(study_dir, make_recipe()).__enter__(), lambda: trials(study_dir)):
        with pytest.raises(StorageError, match="log: must be the log of a study") as caught:
            use()
        assert caught.value.exit_code == 5
        assert "the results of finished trials are still in trials/" in str(caught.value)


def test_a_folder_that_is_no_study_has_no_trials(tmp_path):
    with pytest.raises(StorageError, match="must be a study"):
        trials(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reading_leaves_no_trace(study_dir):
    with open_study(study_dir, make_recipe(2)) as study:
        recover_running(study)
        study.next()
        before = {path.name: path.read_bytes() for path in study_dir.iterdir() if path.is_file()}
        assert [row.outcome for row in baselines(study_dir)] == ["running"]
        assert {path.name: path.read_bytes() for path in study_dir.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_categories_integers_and_steps_are_drawn_as_they_are_written(study_dir):
    recipe = make_recipe(20, baselines={})
    space = {
        "epochs": {"type": "int", "low": 2, "high": 8, "step": 3},
        "decay": {"type": "categorical", "choices": ["all", "matrices"]},
        "clip_norm": {"type": "categorical", "choices": [None, 1.0]},
        "label_smoothing": {"low": 0.0, "high": 0.3, "step": 0.1},
        "alpha": {"low": 0.1, "high": 1.0},
    }
    search = {**recipe.search.model_dump(), "space": space, "alpha": {"mode": "sample"}}
    recipe = type(recipe).model_validate({**recipe.model_dump(), "search": search})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        drawn = [spec.values for spec in run_all(study)]
    assert {values["epochs"] for values in drawn} == {2, 5, 8}
    assert {values["decay"] for values in drawn} == {"all", "matrices"}
    assert {values["clip_norm"] for values in drawn} == {None, 1.0}
    assert {round(values["label_smoothing"], 6) for values in drawn} <= {0.0, 0.1, 0.2, 0.3}
    assert len({values["alpha"] for values in drawn}) == 20
    for values in drawn:
        apply(recipe, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tpe", "random"])
def test_the_same_seed_draws_the_same_values(tmp_path, name):
    drawn = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        with open_study(tmp_path / folder, make_recipe(8, baselines={}, sampler={"name": name, "seed": seed})) as study:
            recover_running(study)
            drawn.append([spec.values for spec in run_all(study, lambda spec: spec.values["kl_weight"])])
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"format_version": 1, "metrics": {}}', "[1]", '{"format_version": 1, "objective": NaN, "metrics": {}}'],
)
def test_a_result_that_is_not_whole_does_not_count(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    assert result.read_result(tmp_path) is None


@pytest.mark.slow
def test_a_full_disk_is_one_message(study_dir):
    """In a process of its own, whose files may not grow: what fails is the commit."""
    code = f"""
        import resource, signal
        from pathlib import Path
        from stand_in import make_recipe
        from carft_ray.errors import StorageError
        from carft_ray.study.opening import open_study
        from carft_ray.study.recovery import recover_running
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        study_dir = Path({str(study_dir)!r})
        with open_study(study_dir, make_recipe()) as study:
            recover_running(study)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
            try:
                study.next()
            except StorageError as error:
                print(error)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BASE.parent), str(BASE)])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=True
    )
    assert re.search(r"log/\d{8}: must be writable, but got File too large", done.stdout)
    with open_study(study_dir, make_recipe(2)) as study:  # with space again, nothing is lost
        recover_running(study)
        run_all(study)
    assert len(trials(study_dir)) == 2


def add_weights(study_dir, spec):
    (spec.place(study_dir) / "fine_tuned.safetensors").write_bytes(b"weights")


def weights(study_dir):
    return {path.parents[1].name for path in study_dir.glob("*/*/*/fine_tuned.safetensors")}


def run_with_weights(study, value):
    """Runs all that is left; returns the names by objective, best first."""
    while (spec := study.next()) is not None:
        train = apply(study.recipe, spec.values).train.model_dump(mode="json")
        write_result(study.study_dir, spec, value(spec), train=train)
        add_weights(study.study_dir, spec)
        row = study.settle(spec)
        best = best_row(study.rows())
        assert best is None or best.name in weights(study.study_dir)
        assert row.outcome == "complete"
    return [row.name for row in sorted(study.rows(), key=lambda row: (-row.objective, row.number))]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "mixed"])
def test_the_weights_of_the_best_trials_and_of_all_baselines_stay(study_dir, order):
    values = {"rising": lambda n: n, "falling": lambda n: -n, "equal": lambda n: 0.5, "mixed": lambda n: (7 * n) % 5}
    recipe = make_recipe(8, keep_checkpoints=3, baselines={"plain": {"kl_weight": 0}, "other": {"kl_weight": 1}})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        ranked = run_with_weights(study, lambda spec: values[order](spec.number) if spec.kind == "trial" else -100)
    assert weights(study_dir) == {"plain", "other", *ranked[:3]}
    assert len(list(study_dir.glob("trials/*/*/result.json"))) == 8


@pytest.mark.slow
def test_keep_checkpoints_may_change_and_holds_for_the_whole_study(study_dir):
    def value(spec):
        return (7 * spec.number) % 9 / 9

    for num_trials, keep in ((6, 4), (6, 2), (9, 3)):
        recipe = make_recipe(num_trials, keep_checkpoints=keep, baselines={})
        with open_study(study_dir, recipe) as study:
            recover_running(study)
            ranked = run_with_weights(study, value)
            assert weights(study_dir) <= set(ranked[:keep])
            assert ranked[0] in weights(study_dir)


def test_a_failed_training_keeps_neither_weights_nor_checkpoints(study_dir):
    with open_study(study_dir, make_recipe(2, baselines={})) as study:
        recover_running(study)
        for outcome in ("diverged", "error"):
            for _ in range({"diverged": 1, "error": 2}[outcome]):
                spec = study.next()
                folder = spec.folder(study_dir)
                (spec.place(study_dir) / "step-00000010").mkdir(parents=True)
                add_weights(study_dir, spec)
                row = study.settle(spec, failed(spec, outcome))
                assert spec.place(study_dir).exists() == (row is None)
            assert {path.name for path in folder.iterdir()} <= {"log.txt"}
    assert [row.outcome for row in trials(study_dir)] == ["diverged", "error"]


@pytest.mark.slow
def test_the_weights_of_a_trial_that_are_gone_are_one_message_with_the_command_that_makes_them_again(study_dir):
    recipe = make_recipe(3, keep_checkpoints=1, baselines={})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        run_with_weights(study, lambda spec: spec.number)
        (study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
        row = study.rows()[0]
    with pytest.raises(StorageError, match="its weights are gone: a study keeps those of its best 1 trial") as caught:
        open_trained(study_dir, row.name)
    for written in ("0", "t0", "t0000"):  # as other commands take them
        with pytest.raises(StorageError) as by_number:
            open_trained(study_dir, written)
        assert str(by_number.value) == str(caught.value)
    with pytest.raises(UsageError, match="--trial: must be the number or name of a trial or baseline, but got '7'"):
        open_trained(study_dir, "7")
    step = str(caught.value).splitlines()[1].strip()
    words = shlex.split(step.removeprefix("Train it again: carft-ray reproduce "))
    given = typer.main.get_command(app).commands["reproduce"].make_context("reproduce", words).params
    assert (given["folder"], given["trial"], given["out"]) == (str(study_dir.resolve()), row.name, Path("DIR"))


def test_a_study_whose_preparation_fails_before_any_training_is_gone(study_dir):
    for error in (DataError, RecipeError):
        with pytest.raises(error), open_study(study_dir, make_recipe(2)):
            raise error("unfit")
        assert not study_dir.exists()
    with open_study(study_dir, make_recipe(3, epochs=7)) as study:  # the mended recipe takes the same folder
        recover_running(study)
        study.next()
    with pytest.raises(DataError), open_study(study_dir, make_recipe(3, epochs=7)):
        raise DataError("unfit")
    assert len(baselines(study_dir)) == 1


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_log_that_has_lost_trainings_is_an_error_and_nothing_is_removed(study_dir, number):
    with open_study(study_dir, make_recipe(2)) as study:
        recover_running(study)
        run_all(study)
    rewrite(study_dir, commits(study_dir)[:number])
    before = {path: path.read_bytes() for path in study_dir.rglob("*") if path.is_file()}
    with pytest.raises(StorageError, match=r"log: must be the log of the trainings in") as caught:
        open_study(study_dir, make_recipe(2)).__enter__()
    assert caught.value.exit_code == 5
    assert "one that knows nothing of trials/t000" in str(caught.value)
    assert "Restore it from a copy. Without one: move those folders elsewhere" in str(caught.value)
    assert {path: path.read_bytes() for path in study_dir.rglob("*") if path.is_file()} == before
    shutil.rmtree(study_dir / "trials")
    (study_dir / "baselines").rename(study_dir / "elsewhere")
    with open_study(study_dir, make_recipe(2)) as study:
        recover_running(study)
        assert [spec.kind for spec in run_all(study)][-2:] == ["trial", "trial"]


def test_what_this_call_did_not_make_stays_when_the_data_turn_out_unfit(study_dir):
    with open_study(study_dir, make_recipe(2)):
        pass
    (study_dir / "trials" / "t0000-1234").mkdir(parents=True)
    rewrite(study_dir, [])
    for error in (DataError, RecipeError):
        with pytest.raises(error), open_study(study_dir, make_recipe(2)):
            raise error("one data set was changed")
    assert (study_dir / "trials" / "t0000-1234").is_dir()


def test_a_study_of_another_recipe_is_not_removed_even_when_nothing_has_begun(study_dir):
    with open_study(study_dir, make_recipe(2)):
        pass
    with pytest.raises(RecipeError), open_study(study_dir, make_recipe(2, epochs=7)):
        pass
    with open_study(study_dir, make_recipe(2)):
        pass


def test_what_killed_writes_have_left_is_removed_at_opening(study_dir):
    with open_study(study_dir, make_recipe(2)):
        pass
    folder = study_dir / "trials" / "t0000-1234"
    (folder / ".step-3.77.tmp").mkdir(parents=True)
    (study_dir / ".manifest.json.77.tmp").write_text("half")
    with open_study(study_dir, make_recipe(2)):
        assert list(study_dir.rglob("*.tmp")) == []


def test_the_zero_shot_baseline_is_one_commit_and_told_once(study_dir):
    with open_study(study_dir, make_recipe(1, baselines={})) as study:
        recover_running(study)
        before = len(commits(study_dir))
        assert study.add_zero_shot({"objective": 0.25}).objective == 0.25
        assert len(commits(study_dir)) == before + 1
    with open_study(study_dir, make_recipe(1, baselines={})) as study:
        recover_running(study)
        assert study.next().kind == "trial"
        assert study.add_zero_shot({"objective": 0.5}) is None
        assert [row.objective for row in study.rows("baseline")] == [0.25]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_search_that_is_opened_again_for_each_trial_draws_what_it_would_have_drawn(tmp_path, name):
    recipe = make_recipe(8, sampler={"name": name, **({"startup_trials": 3} if name == "tpe" else {})})
    with open_study(tmp_path / "whole", recipe) as study:
        recover_running(study)
        run_all(study, lambda spec: objective(apply(recipe, spec.values).train))
    for _ in range(9):
        with open_study(tmp_path / "parts", recipe) as study:
            recover_running(study)
            spec = study.next()
            write_result(study.study_dir, spec, objective(apply(recipe, spec.values).train))
            study.settle(spec)
    drawn = [[row.values for row in trials(tmp_path / place)] for place in ("whole", "parts")]
    assert drawn[0] == drawn[1]
    assert len({values["kl_weight"] for values in drawn[0]}) == 8


@pytest.mark.parametrize("garbage", [b"\0" * 300 + b"\n", b"{half a li", b"no json\n"])
def test_garbage_in_the_middle_of_a_log_is_one_message_and_nothing_is_lost(study_dir, garbage):
    with open_study(study_dir, make_recipe(2)) as study:
        recover_running(study)
        run_all(study)
    commit = study_dir / "log" / "00000005"
    whole = commit.read_bytes()
    for spoilt in (garbage, whole[:100] + garbage + whole[100:], whole + garbage):
        commit.write_bytes(spoilt)
        for use in (lambda: open_study(study_dir, make_recipe(2)).__enter__(), lambda: trials(study_dir)):
            with pytest.raises(StorageError, match="00000005: must be a whole commit, but got a damaged one") as caught:
                use()
            assert caught.value.exit_code == 5
        assert commit.read_bytes() == spoilt
    commit.write_bytes(whole)  # restored from a copy
    assert len(trials(study_dir)) == 2


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file" / "study", Path("/proc/study")):
        with pytest.raises(StorageError, match="must be writable") as caught, open_study(folder, make_recipe()):
            pass
        assert caught.value.exit_code == 5
        assert len(caught.value.problems) == 1
