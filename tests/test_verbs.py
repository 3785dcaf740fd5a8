"""The verbs of a study on the command line: status, ls, logs, stop, resume; what they suggest next. No Ray runs."""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import crash_host
import pytest
import stand_in
from logs import commits, holding, note_stop, replace, rewrite, set_recipe, take, write_line
from stand_in import make_recipe
from study_steps import failed, finish, searching
from suggestions import check_suggestions
from test_checkpoint import limited

from carft_ray.api import actions
from carft_ray.cli.common import suggest
from carft_ray.errors import InterruptedRunError, UsageError
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.events import TrialEpoch
from carft_ray.launch.stop import ask_to_stop, wait_until_free
from carft_ray.launch.workers.runtime import Runner
from carft_ray.layout import BEST
from carft_ray.recipe.loading import dump_recipe, recipe_of
from carft_ray.recipe.schema.recipe import Recipe, single
from carft_ray.results.adviser import BEHIND, behind_zero_shot, next_steps
from carft_ray.results.confirm_plan import PlanRow, Stage, write_plan
from carft_ray.results.reading.study_view import find_row, read_study, total_trials
from carft_ray.store.attempt_files import append_log
from carft_ray.study.ledger import WENT_ON
from carft_ray.study.opening import open_study
from carft_ray.study.running import at_a_time_record, started
from carft_ray.ui.live import SearchView

RECIPE = make_recipe(8, train={"batch_size": 4})


def start(study):
    """Starts the next attempt: its log begins, and the driver says that it runs."""
    spec = study.next()
    folder = spec.folder(study.study_dir)
    folder.mkdir(parents=True, exist_ok=True)
    append_log(folder, f"attempt {spec.attempt}: starts on 127.0.0.1")
    study.log.write(started(spec, 1.0, 0.0, 1, ""))
    return spec


def make_study(study_dir, recipe=RECIPE):
    """A study of a search that was killed: three trials finished, one diverged, one begun."""
    with searching(study_dir, recipe) as study:
        (study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
        study.add_zero_shot({"objective": 0.25, "id_accuracy": 0.3, "ood_accuracy": 0.2})
        for objective in (0.4, 0.5, 0.7, 0.6):  # the first of a baseline
            finish(study, start(study), objective, elapsed_s=61.0)
        study.settle(spec := start(study), failed(spec, "diverged", "loss not finite at step 3"))
        spec = start(study)
        (spec.folder(study_dir) / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n')
    return study_dir


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("studies") / "first")


@pytest.fixture
def here(original, tmp_path, monkeypatch):
    """A folder with a copy of the study ``first``, the working directory."""
    shutil.copytree(original, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


@pytest.mark.slow
def test_status_counts_what_the_study_holds_and_writes_nothing(run, here):
    before = everything(here)
    code, out, err = run("status", "first", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    found = {state: count for state, count in answer["trials"].items() if count}
    assert found == {"complete": 3, "diverged": 1, "stopped": 1}
    assert (answer["wanted"], answer["finished"], answer["study"]) == (8, 4, str(here / "first"))
    assert (answer["best"]["number"], answer["best"]["objective"]) == (1, 0.7)
    assert answer["selected_on"] == ["id_val"]
    assert [row["name"] for row in answer["baselines"]] == ["plain", "zero_shot"]
    assert (answer["search"]["running"], answer["search"]["holder"]) == (False, None)
    assert answer["times"]["training_s"] >= 4 * 61
    _, out, err = run("status", "first")
    assert out.splitlines()[0] == "study: 4 of 8 trials finished."
    assert out.splitlines()[-1] == "Selected on ID only: the recipe has no ood_val."
    assert "# Selected on ID only: the recipe has no ood_val.\n" in (here / "first" / BEST).read_text()
    assert "No search is running." in err
    assert "  carft-ray resume first\n" in err
    assert everything(here) == before
    with open_study(here / "new", make_recipe(4)):
        pass
    rewrite(here / "new", commits(here / "new")[:2])  # killed before it held anything
    answer = json.loads(run("status", "new", "--json")[1])
    assert (answer["finished"], answer["wanted"], answer["best"]) == (0, 4, None)
    assert "No trial has begun yet." in run("ls", "new")[2]


@pytest.mark.slow
def test_a_begun_trial_runs_only_while_a_search_holds_the_study_and_has_started_it(run, here):
    study_dir = here / "first"

    def counts():
        answer = json.loads(run("status", "first", "--json")[1])
        found = {state: answer["trials"][state] for state in ("running", "stopped", "waiting")}
        running = [row["epoch"] for row in answer["running"]]
        return {state: count for state, count in found.items() if count}, answer["search"]["running"], running

    assert counts() == ({"stopped": 1}, False, [])
    with searching(study_dir, RECIPE) as study:
        assert counts() == ({"waiting": 1}, True, [])  # it waits to be recovered
        spec = start(study)
        assert spec.attempt == 2
        assert counts() == ({"running": 1}, True, [1])
        _, out, err = run("status", "first")
        assert "running, epoch 1 done" in out
        assert f"A search is running: process {os.getpid()} on " in err
        assert f"carft-ray logs first {spec.name} --follow" in err
        study.settle(spec, failed(spec, "error", "RuntimeError: once"), study.spent(spec, 1.0, 0.0))
        study.log.write(at_a_time_record(3, "3 GPUs, 1 per trial"))
        assert counts() == ({"waiting": 1}, True, [])  # for another attempt
        assert "3 at a time (3 GPUs, 1 per trial)." in run("status", "first")[2]
        assert " · 3 at a time (3 GPUs, 1 per trial) · " in SearchView.of(read_study(study_dir)).line()
        start(study)
    assert counts() == ({"stopped": 1}, False, [])
    _, out, err = run("status", "first")
    assert "stopped, epoch 1 done" in out
    assert "at a time" not in err
    assert "stopped, epoch 1 done" in run("ls", "first")[1]


@pytest.mark.slow
def test_ls_lists_baselines_and_then_the_trials_from_the_best_down(run, here):
    before = everything(here)
    answer = json.loads(run("ls", "first", "--json")[1])
    assert [row["objective"] for row in answer["trials"]] == [0.7, 0.6, 0.5, None, None]
    assert [row["outcome"] for row in answer["trials"]] == ["complete"] * 3 + ["diverged", "stopped"]
    assert [row["best"] for row in answer["trials"]] == [True] + [False] * 4
    by_number = json.loads(run("ls", "first", "--json", "--sort", "number", "--limit", "2")[1])
    assert [row["number"] for row in by_number["trials"]] == [0, 1]
    assert by_number["num_trials"] == 5
    code, out, err = run("ls", "first", "--limit", "3")
    lines = out.splitlines()
    assert code == 0
    assert "learning_rate" in lines[0]
    assert [line.split()[0][:5] for line in lines[1:]] == ["plain", "zero_", "t0001", "t0002", "t0000"]
    assert lines[3].split()[-2:] == ["1:01", "best"]
    assert "2 more trials" in err
    assert "diverged: loss not finite at step 3" in run("ls", "first")[1]
    assert everything(here) == before


@pytest.mark.slow
def test_ls_of_a_folder_lists_its_studies_and_passes_over_none_that_is_damaged(run, here):
    make_study(here / "second", make_recipe(20))
    shutil.copytree(here / "first", here / "third")
    (here / "third" / "log" / "00000001").write_text("nonsense\nnonsense\n")
    (here / "notes").mkdir()
    first, second, third = json.loads(run("ls", ".", "--json")[1])["studies"]
    assert (first["name"], first["wanted"], first["best_objective"], first["running"]) == ("first", 8, 0.7, False)
    assert second["trials"]["complete"] == 3
    assert "log/00000001: must be a whole commit, but got a damaged one" in third["problem"]
    code, out, _ = run("ls", ".")
    assert code == 0
    lines = out.splitlines()
    assert lines[1].split() == ["first", "8", "3", "1", "1", "70.0"]
    assert "cannot be read" in lines[3]


def test_logs_finds_a_training_by_number_and_name_and_says_where_there_is_no_log(run, here):
    rows = read_study(here / "first").trials
    assert find_row(rows, rows[2].name[:7]).number == 2  # the beginning of a name is enough when it is of one
    name = rows[3].name
    for word in ("3", "t3", "t0003", name, "0003"):
        code, out, err = run("logs", "first", word)
        assert code == 0, err
        assert out == (here / "first" / "trials" / name / "log.txt").read_text()
    assert "diverged: loss not finite at step 3" in out
    [line] = json.loads(run("logs", "first", "plain", "--json")[1])
    assert line.endswith("attempt 1: starts on 127.0.0.1")
    (here / "first" / "trials" / rows[4].name / "log.txt").unlink()  # without one it is no error
    code, out, err = run("logs", "first", "4")
    assert (code, out) == (0, "")
    assert err.startswith(f"{rows[4].name} has no log: it is stopped.\n")
    assert "zero_shot has no log: the zero-shot model is not trained." in run("logs", "first", "zero_shot")[2]
    assert json.loads(run("logs", "first", "4", "--json")[1]) == []


@pytest.mark.slow
def test_follow_prints_whole_lines_as_they_come_until_the_training_has_ended(run, here):
    study_dir = here / "first"
    with searching(study_dir, RECIPE) as study:
        spec = start(study)

        def training():
            for text in ("half a ", "line\nand more\n", "last\n"):
                time.sleep(0.15)
                with open(spec.folder(study_dir) / "log.txt", "a") as file:
                    file.write(text)
            study.settle(spec, failed(spec, "diverged", "loss not finite at step 9"))

        thread = threading.Thread(target=training)
        thread.start()
        code, out, _ = run("logs", "first", "4", "--follow")
        thread.join()
    assert code == 0
    *lines, end, _ = out.splitlines()
    assert lines[-3:] == ["half a line", "and more", "last"]
    assert end.endswith("attempt 2: diverged: loss not finite at step 9")


@pytest.mark.slow
def test_stop_asks_a_training_too(run, here, monkeypatch):
    with contextlib.ExitStack() as held:
        held.enter_context(open_study(here / "one", single(RECIPE)))
        monkeypatch.setattr("carft_ray.launch.stop.wait_until_free", lambda *given: held.close())
        code, out, err = run("stop", "one")
    assert (code, out) == (0, "")
    assert f"Asked process {os.getpid()} on " in err
    assert "The training has ended; 0 of 1 trial finished." in err
    assert "  carft-ray train one/resolved.yaml --out one --resume" in err


@pytest.mark.slow
def test_stop_without_waiting_returns_at_once_and_writes_nothing_where_nothing_runs(run, here):
    before = everything(here)
    code, _, err = run("stop", "first")
    assert code == 0
    assert err.startswith("Nothing to stop: no search is running on first; 4 of 8 trials finished.\n")
    assert json.loads(run("stop", "first", "--json")[1])["asked"] is None
    assert everything(here) == before
    with open_study(here / "first", RECIPE):
        answer = json.loads(run("stop", "first", "--no-wait", "--json")[1])
        assert answer["ended"] is False
        assert answer["asked"].startswith("process ")
        assert json.loads(run("status", "first", "--json")[1])["search"]["stopping"]
    assert (here / "first" / "stop").exists()
    assert not json.loads(run("status", "first", "--json")[1])["search"]["stopping"]


@pytest.mark.slow
def test_ctrl_c_ends_the_waiting_only(run, here, monkeypatch):
    monkeypatch.setattr("carft_ray.launch.stop.wait_until_free", lambda *given: signal.raise_signal(signal.SIGINT))
    with open_study(here / "first", RECIPE):
        code, _, err = run("stop", "first")
    assert code == 130
    assert err.endswith("no longer waiting; the trainings still stop\n    See: carft-ray status first\n")


def test_stop_says_what_it_waits_for_and_ends_with_the_command_that_shows_it(run, here, monkeypatch):
    monkeypatch.setattr("carft_ray.launch.stop.TELL_AFTER_S", 0.0)
    monkeypatch.setattr("carft_ray.launch.stop.END_WITHIN_S", 0.6)
    with holding(here / "first"):
        code, _, err = run("stop", "first")
    assert code == 5
    assert f"process {os.getpid()} on " in err
    _, told, error, step = err.splitlines()
    assert told.endswith(" still runs: its trainings end at their next checkpoint")
    assert error.endswith(": must end within 0.6 s of being asked to stop, but got it still runs")
    assert step == "    See: carft-ray status first"


def test_stop_waits_for_the_process_that_was_asked_and_not_for_the_next_one(here):
    with holding(here / "first"):
        asked = ask_to_stop(here / "first")
    take(here / "first")
    wait_until_free(here / "first", asked, pytest.fail, "")
    assert read_study(here / "first").holder.startswith("process 12 on node7")


@pytest.mark.slow
def test_stop_ends_a_real_search_as_its_own_ctrl_c_does(run, here):
    (stand_in.tell(here) / "hold").touch()  # no training gets further than its first epoch
    seen = []

    def on_event(event):
        if isinstance(event, TrialEpoch) and not seen:
            seen.append(json.loads(run("status", "live", "--json")[1]))
            assert run("stop", "live", "--no-wait")[0] == 0

    recipe, runner = make_recipe(6, resources={"executor": "debug"}), Runner(stand_in.prepare, stand_in.train)
    with pytest.raises(InterruptedRunError, match="Resume with: carft-ray resume") as ended:
        run_search(Plan(recipe, here / "live", None, on_event, runner))
    assert ended.value.exit_code == 130
    assert (seen[0]["search"]["running"], [row["epoch"] for row in seen[0]["running"]]) == (True, [1])
    with open_study(here / "live", recipe):
        assert ask_to_stop(here / "live")
        assert (here / "live" / "stop").exists()  # this search is the one that was asked
    after = json.loads(run("status", "live", "--json")[1])
    assert (after["trials"]["running"], after["running"], after["search"]["running"]) == (0, [], False)


def test_trials_are_a_total_or_how_many_more_once_all_have_ended(here):
    view = read_study(here / "first")
    assert [total_trials(written, view) for written in ("20", "5")] == [20, 5]
    assert [total_trials(written, view) for written in ("+4", " +1")] == [8, 8]  # 4 of 8: what was asked for before
    set_recipe(here / "first", make_recipe(2))  # a shorter recipe came after
    assert total_trials("+4", read_study(here / "first")) == 9


def test_resume_is_search_with_the_recipe_of_the_study(run, here, monkeypatch):
    (here / "first" / "resolved.yaml").unlink()  # for people alone
    asked = []

    def search(recipe, study, **options):
        asked.append((recipe_of(recipe), study, options))
        raise UsageError("no further")

    monkeypatch.setattr(actions, "search", search)
    words = "resume first --trials 12 --executor ray-train --num-workers 2 --json --address auto"
    assert run(*words.split())[0] == UsageError.exit_code
    [(recipe, study, options)] = asked
    assert (recipe.search.trials, recipe.train.batch_size) == (12, 4)
    assert (recipe.resources.executor, recipe.resources.num_workers) == ("ray-train", 2)
    assert (study, options["address"], options["progress"]) == (Path("first"), "auto", False)


@pytest.fixture
def refused(run, here):
    """Runs a command line that must end with a code and one message, and change nothing; returns the message."""

    def call(code, *words):
        before = everything(here)
        found, out, err = run(*words)
        assert (found, out) == (code, ""), err
        assert err.count("error: ") == 1
        told = err[err.index("error: ") :]  # without the warning that the recipe has no ood_val
        after = everything(here)
        assert before.keys() <= after.keys()
        changed = [name for name in after if name not in before or after[name][1] != before[name][1]]
        assert {name.split("/")[1] for name in changed} <= {"log"}  # who has held the study since
        return told

    return call


# the command line, the beginning of the message

MADE = "\n    Give the folder that `search --study` was given.\n"
ONE_TRAINING = (
    "one: must be the study of a search, but got one training\n"
    "    Continue it: carft-ray train one/resolved.yaml --out one --resume\n"
    "    To search, give another folder with --study.\n"
)
TRIAL = "TRIAL: must be the number or name of a trial or baseline, but got "
MISTAKES = [
    ("resume frist", "frist: must be a study, but got no such folder; did you mean 'first'?\n    Begin one: "),
    ("status first/trials", "first/trials: must be a study, but got one without log/" + MADE),
    ("status first/manifest.json", "first/manifest.json: must be a study, but got a file" + MADE),
    ("status .", ".: must be a study, but got one without log/ (allowed: first, one)" + MADE),
    ("ls empty", "empty: must be a study, or a folder with studies in it, but got one without log/"),
    ("resume one", ONE_TRAINING),
    ("search first/resolved.yaml --study one", ONE_TRAINING),
    ("search first/resolved.yaml --study mine", "{here}/mine: must be a study or empty, but got log, owner\n"),
    ("search first/resolved.yaml --study mine/owner", "{here}/mine/owner: must be a folder, but got a file\n"),
    ("stop empty", "empty: must be a study or the folder of a training, but got one without log/" + MADE),
    ("resume first --trials 3", "--trials: must be at least 5: the study has 4 finished trials and 1 begun, but got"),
    ("resume first --trials many", "--trials: must be a whole number of trials from 1, or +N for N more, but got 'ma"),
    ("logs first t0009", f"{TRIAL}'t0009'; did you mean 't000"),
    ("logs first 3 -f --json", "--json: cannot be used with --follow\n"),
    ("resume first --notify-url ftp://x", "--notify-url: must begin with http:// or https://, but got 'ftp://x'"),
    ("ls first --sort objektive", "--sort: must be an order, but got 'objektive'; did you mean 'objective'?"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_gives_one_message_exit_code_2_and_leaves_nothing(refused, here, line, message):
    (here / "empty").mkdir()
    (here / "mine").mkdir()
    for name in ("log", "owner"):
        (here / "mine" / name).write_text("precious")
    with open_study(here / "one", single(RECIPE)):
        pass  # that of a `train` which has not begun
    assert refused(2, *line.split()).startswith("error: " + message.replace("{here}", str(here)))


SEARCH = ("search", "first/resolved.yaml", "--study")
RESUME = ("resume", "first")


@pytest.mark.slow
def test_an_address_where_nothing_answers_is_told_and_leaves_no_folder(refused):
    training = ("train", "first/resolved.yaml", "--out", "new", "--num-workers", "2", "--executor", "ray-train")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        for words in ((*SEARCH, "new"), RESUME, training):
            told = refused(5, *words, "--address", address)
            assert f"no Ray answers at {address}: " in told
            assert "Start one with 'ray start --head', or leave the address out to use this machine." in told


def test_a_full_disk_at_the_first_write_leaves_no_folder(refused):
    """Files that may not grow stand for it."""
    with limited(20):
        told = refused(5, *SEARCH, "new")
    assert "must be writable, but got File too large" in told
    assert "run the same command again" in told


def test_a_manifest_that_is_damaged_or_of_another_version(refused, here):
    manifest = here / "first" / "manifest.json"
    whole = manifest.read_text()
    newer = json.dumps({**json.loads(whole), "format_version": 99})
    for content in ("", "[]", '{"format_version": 2}', "\0", newer):
        manifest.write_text(content)
        for words in ((*SEARCH, "first"), RESUME):
            told = refused(5, *words)
            assert told.startswith(f"error: {manifest}: ")
    assert "must have format_version 2, but got 99" in told
    assert "search in another folder" in told


# ---- what commands suggest next: nothing that a study would refuse as it stands, nothing that is done


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Gives a function that makes a study of so many finished trials; one more has begun where the recipe has more."""
    monkeypatch.chdir(tmp_path)

    def make(trials, num_finished, objective=0.5, **search):
        values = make_recipe(trials, baselines={}, **search).model_dump(mode="json")
        values["data"]["id_test"] = {**values["data"]["id_val"], "split": "test"}  # which is not opened
        recipe, study_dir = Recipe.model_validate(values), tmp_path / f"{num_finished}-of-{trials}"
        with searching(study_dir, recipe) as study:
            study.add_zero_shot({"objective": 0.25, "id_accuracy": 0.3, "ood_accuracy": 0.2})
            for _ in range(num_finished):
                finish(study, start(study), objective)
            if not study.done():
                start(study)
        return study_dir.relative_to(tmp_path)

    return make


def steps(study_dir, after="status"):
    """The suggestions without the program and the folder."""
    lines = next_steps(read_study(study_dir), study_dir, after)
    check_suggestions("".join(f"\n  {line}\n" for line in lines))
    return [" ".join(line.partition("  #")[0].replace(f" {study_dir}", "").split()[1:]) for line in lines]


def plan(study_dir, training=None):
    best = read_study(study_dir).best
    row = PlanRow(best.name, "winner", training, 0.5, {}, best.objective)
    ablation = PlanRow(f"{best.name}, no penalties", "ablation", training, 0.5, {}, 0.0)
    write_plan(study_dir, Stage(best.name, (11, 12), (row, ablation)), None)


def confirm(study_dir):
    """What a finished confirm leaves, without its trainings."""
    plan(study_dir)
    (study_dir / "confirm" / "summary.json").write_text('{"rows": []}')


def write_summary(study_dir, objectives):
    """Writes a comparison of configurations with these objectives."""
    rows = []
    for name, mean in objectives.items():
        interval = {"mean": mean, "ends": [mean, mean], "num_seeds": 1, "p_value": 1.0, "over": "", "notes": []}
        whole = dict.fromkeys(("objective", "id_accuracy", "ood_accuracy"), interval)
        rows.append({"name": name, "role": "winner", "alpha": 0.5, "seeds": 1, "sets": {"id_val": interval}, **whole})
    nothing = {"optimism": None}
    whole = {"label": "", "winner": next(iter(objectives)), "id_margin": 0.0, "baselines": [], "others": [], **nothing}
    (study_dir / "confirm" / "summary.json").write_text(json.dumps({**whole, "rows": rows}))


def read_tests(study_dir, number):
    write_line(study_dir.resolve(), read_study(study_dir).recipe, sets=("id_test",))
    (study_dir / "test" / f"read-{number}").mkdir(parents=True)
    (study_dir / "test" / f"read-{number}" / "summary.json").write_text("{}")


def test_a_study_is_led_from_its_search_to_its_test_and_no_step_is_told_twice(study, tmp_path):
    study_dir = study(2, 2)
    export = "export --to exports/study"
    assert steps(study_dir) == ["report", "confirm", export, "resume --trials +4", "ls"]
    assert steps(study_dir, after="report")[0] == "confirm"
    plan(study_dir, "its-own")  # stopped before its end
    assert steps(study_dir)[:2] == ["report", "confirm --top 1 --seeds 2"]
    confirm(study_dir)
    assert steps(study_dir) == ["report", "test", export, "resume --trials +4", "ls"]
    (tmp_path / "exports" / "study").mkdir(parents=True)
    read_tests(study_dir, 1)
    assert steps(study_dir) == ["report", f"{export}-2", "ls"]  # more trials would need a reason
    (study_dir / "test" / "read-1" / "summary.json").unlink()  # that read was killed
    assert "test" in steps(study_dir)
    grid = {"space": {"learning_rate": {"choices": [1e-4, 1e-3]}}, "sampler": {"name": "grid"}}
    assert not any(step.startswith("resume") for step in steps(study(8, 2, **grid)))  # which is used up


def test_what_is_not_finished_goes_on_with_a_reason_once_tests_were_read(study):
    study_dir = study(4, 1)
    assert steps(study_dir)[:2] == ["resume", "report"]
    assert steps(study_dir, after="resume")[0] == "report"
    read_tests(study_dir, 1)
    assert steps(study_dir)[0] == "resume --again REASON"
    write_line(study_dir.resolve(), read_study(study_dir).recipe, WENT_ON, details={"trials": 4}, reason="why")
    assert steps(study_dir)[0] == "resume"
    recipe = read_study(study_dir).recipe
    set_recipe(study_dir, recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"gpu_hours": 3})}))
    note_stop(study_dir, "budget: 3 GPU hours are used (budget.gpu_hours, 3)")
    assert steps(study_dir)[0] == "resume --set budget.gpu_hours=6"
    assert steps(study(4, 0)) == ["resume", "ls"]


def test_the_next_trainings_are_suggested_on_the_cluster_that_has_trained(study, capsys):
    study_dir = study(2, 2)
    suggest(str(study_dir), "search", address="10.0.0.1:6379")
    told = capsys.readouterr().err
    check_suggestions(told)
    assert f"carft-ray confirm {study_dir} --address 10.0.0.1:6379\n" in told
    assert f"carft-ray report {study_dir}\n" in told


def test_a_best_behind_zero_shot_is_not_to_be_exported(study, capsys):
    study_dir = study(1, 1, objective=0.2)
    assert behind_zero_shot(read_study(study_dir))
    assert not any(step.startswith("export") for step in steps(study_dir))
    assert crash_host.call(["status", str(study_dir)]) == 0
    assert BEHIND in capsys.readouterr().err
    better = study(2, 2)
    confirm(better)
    for name, is_measured in ((read_study(better).best.name, True), ("t0007", False)):  # with fresh seeds it is
        write_summary(better, {name: 0.5, "zero_shot": 0.51})
        assert behind_zero_shot(read_study(better)) == is_measured


def test_status_tells_how_often_test_sets_were_read_and_names_a_broken_ledger(study, capsys):
    study_dir = study(2, 2)

    def status():
        assert crash_host.call(["status", str(study_dir)]) == 0
        shown = capsys.readouterr()
        assert crash_host.call(["status", str(study_dir), "--json"]) == 0
        return "Test sets were read once." in shown.out, shown.err, json.loads(capsys.readouterr().out)["ledger"]

    was_read, _, found = status()
    assert (was_read, found) == (False, {"test_reads": 0, "problems": []})
    read_tests(study_dir, 1)
    was_read, _, found = status()
    assert (was_read, found) == (True, {"test_reads": 1, "problems": []})
    replace(study_dir, '"purpose": "test"', '"purpose": "winner fixed"')
    was_read, err, found = status()
    assert (was_read, found["test_reads"]) == (False, None)
    assert "must have the ledger that manifest.json describes" in err
    assert "must have the ledger that manifest.json describes" in found["problems"][0]
    assert steps(study_dir) == ["ls"]
