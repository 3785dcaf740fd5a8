"""The live table of a search, as a terminal of a known size shows it."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import stand_in
from rich.console import Console

from carft_ray.launch.events import (
    BaselineFinished,
    ConcurrencyChanged,
    Decided,
    Note,
    Preparing,
    Started,
    Stopping,
    TrialEpoch,
    TrialFinished,
    TrialStarted,
)
from carft_ray.results.reading.study_view import Overview
from carft_ray.study.outcome import TrialRow, TrialSpec
from carft_ray.ui import console, live, progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def terminal(width=110, height=30):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, soft_wrap=True, highlight=False)


def shown(view, width=110, height=30):
    """The lines on the screen, without colours."""
    console = Console(file=io.StringIO(), width=width, height=height, soft_wrap=True, color_system=None)
    console.print(view)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def values(number):
    return {"learning_rate": 1e-4 * (number + 1), "kl_weight": 0.5}


def spec(number, attempt=1, kind="trial"):
    name = f"t{number:04d}-abcd" if kind == "trial" else f"base{number}"
    return TrialSpec(kind, number, name, values(number), attempt)


def row(number, objective=None, outcome="complete", kind="trial", reason=""):
    metrics = {} if objective is None else {"id_accuracy": objective + 0.1, "ood_accuracy": objective - 0.1}
    name = spec(number, kind=kind).name
    return TrialRow(kind, number, name, values(number), 1, outcome, reason, objective, 0.5, metrics, None, 61.0)


def running(view, numbers, epoch=0):
    for number in numbers:
        view.update(TrialStarted(spec(number)))
        if epoch:
            metrics = {"epoch": epoch, "subset/id_accuracy": 0.61, "subset/ood_accuracy": 0.5, "subset/objective": 0.55}
            view.update(TrialEpoch(spec(number), metrics))


def test_a_search_from_its_first_to_its_last_event():
    clock = Clock()
    view = live.SearchView(4, clock=clock)
    assert shown(view) == ["starting Ray · 0:00 elapsed"]
    view.update(Preparing())
    assert shown(view)[-1].startswith("preparing: model, sets")
    view.update(BaselineFinished(row(0, 0.3, kind="baseline")))
    view.update(Started(8, 0, 2, "2 CPUs"))
    assert shown(view)[-1] == "0 of 8 trials finished · 2 at a time (2 CPUs) · 0:00 elapsed"
    running(view, [0])
    clock.now = 30
    running(view, [1], epoch=2)
    clock.now = 60
    view.update(TrialFinished(row(0, 0.4), is_best=True))
    header, baseline, best, runs, note, bar, last = shown(view)
    assert header.replace(",", "").replace(" %", "").split() == [*values(0), "epoch", "ID", "OOD", "objective", "time"]
    assert baseline.split() == ["base0", "0.0001", "0.5", "40.0", "20.0", "30.0", "1:01"]
    assert best.split() == ["★", "t0000-abcd", "0.0001", "0.5", "50.0", "30.0", "40.0", "1:01"]
    assert runs.split() == ["t0001-abcd", "0.0002", "0.5", "2/4", "61.0", "50.0", "55.0", "0:30"]
    assert note.strip() == "of running trials: on a subset, at the best of a few alphas"
    assert bar == "━" * 5 + "─" * 35 + " 12 %"
    # the running one needs 30 s more, six others 60 s each, two at a time
    assert last == "1 of 8 trials finished · 2 at a time (2 CPUs) · 1:00 elapsed · about 3:15 left"
    view.update(TrialFinished(row(1, 0.6), is_best=True))
    assert [line.split()[:2] for line in shown(view)[2:4]] == [["★", "t0001-abcd"], ["t0000-abcd", "0.0001"]]
    view.update(Stopping(2))
    last = shown(view)[-1]
    assert last.startswith("stopping; saving checkpoints of 2 trainings · 2 of 8 trials finished")
    assert "left" not in last


def test_a_search_that_runs_fewer_at_a_time_from_now_on_says_so_and_takes_longer():
    clock = Clock()
    view = live.SearchView(4, clock=clock)
    view.update(ConcurrencyChanged(1, "memory was full"))  # before it says how many: nothing to change
    view.update(Started(5, 0, 2, "2 CPUs, 1 a trial"))
    running(view, [0])
    clock.now = 60
    view.update(TrialFinished(row(0, 0.4), is_best=True))
    assert shown(view)[-1].endswith("2 at a time (2 CPUs, 1 a trial) · 1:00 elapsed · about 2:00 left")
    assert view.update(ConcurrencyChanged(1, "memory was full")) is None
    assert shown(view)[-1].endswith("1 at a time (memory was full) · 1:00 elapsed · about 4:00 left")


def test_fine_tuned_weights_at_chance_are_told_beside_what_was_measured():
    rows = [row(0, 0.5), replace(row(1, 0.57), at_chance=True)]
    view = Overview(Path(), stand_in.make_recipe(2), rows, [])
    table = console.trial_table([view.data(each) for each in rows])
    [objectives] = [[*map(str, column.cells)] for column in table.columns if str(column.header) == "objective, %"]
    assert objectives == ["50.0", "57.0"]
    assert ["alpha 1.00 at chance" in cell for cell in table.columns[-1].cells] == [False, True]
    assert [*live._line(rows[1], " ")[0].values()][-4:-1] == ["67.0", "47.0", "57.0"]
    assert (
        "ID 67.0, OOD 47.0, objective 57.0 % at alpha 0.50; alpha 1.00 at chance"
        in TrialFinished(rows[1], is_best=False).line()
    )


def test_what_must_not_be_overlooked_gets_a_line_above():
    view = live.SearchView(4)
    view.update(Started(8, 0, 2, "2 CPUs"))
    assert view.update(Note("moved a torn line")) == "warning: moved a torn line"
    assert view.update(Decided("targets: stored")) == "targets: stored"
    assert view.update(TrialFinished(row(0, 0.5), is_best=True)) is None
    told = view.update(TrialFinished(row(1, outcome="diverged", reason="loss not finite at step 3"), is_best=False))
    assert told == "t0001-abcd learning_rate=0.0002 kl_weight=0.5: diverged, loss not finite at step 3"
    assert "2 of 8 trials finished, 1 of them failed" in shown(view)[-1]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (110, 12), (60, 8), (200, 60)])
def test_two_hundred_trials_fit_on_the_terminal_with_all_that_matters(width, height):
    finished = [row(number, 0.001 * number) for number in range(180)]
    view = live.SearchView(4, [row(0, 0.1, kind="baseline"), *finished])
    view.update(Started(200, 180, 16, "search.max_concurrent_trials"))
    running(view, range(180, 196), epoch=1)
    lines = shown(view, width, height)
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert "180 of 200 trials finished" in text
    assert "★ t0179-abcd" in text
    assert "t0180-abcd" in text
    if height >= 12:
        assert text.endswith("elapsed")
    hidden = 16 - text.count("1/4")
    assert (f"and {hidden} more, running" in text) == (hidden > 0)


def test_another_attempt_takes_the_row_of_the_first():
    view = live.SearchView(4)
    running(view, [3], epoch=2)
    view.update(TrialStarted(spec(3, attempt=2)))
    [line] = [line for line in shown(view) if "t0003" in line]
    assert "0/4" in line


def test_a_terminal_without_stars_gets_an_asterisk(monkeypatch):
    view = live.SearchView(4, [row(0, 0.4)])
    monkeypatch.setattr(Console, "encoding", "ascii")
    assert shown(view)[1].startswith("* t0000")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ZeroDivisionError])
def test_the_table_goes_and_the_cursor_comes_back_however_the_search_ends(tmp_path, error):
    console = terminal()

    def search():
        with progress.search_shown(True, tmp_path, 4, console) as on_event:
            on_event(Started(8, 0, 2, "2 CPUs"))
            on_event(TrialStarted(spec(0)))
            on_event(Note("a journal was mended"))
            if error:
                raise error

    if error:
        with pytest.raises(error):
            search()
    else:
        search()
    written = console.file.getvalue()
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1
    assert "warning: a journal was mended" in written
    assert "0 of 8 trials finished" in written
    assert written.rindex("\x1b[2K") > written.rindex("elapsed")  # the last thing is that its lines are erased


def test_without_a_terminal_there_are_lines(tmp_path, capsys):
    with progress.search_shown(True, tmp_path, 4) as on_event:
        on_event(TrialFinished(row(7, 0.3), is_best=False))  # recovered: it had finished before
        on_event(Started(8, 1, 2, "2 CPUs"))
        on_event(ConcurrencyChanged(3, "3 CPUs"))
        on_event(TrialFinished(row(0, 0.4), is_best=True))
    first, second, changed, third = capsys.readouterr().err.splitlines()
    assert first.startswith("[0:00] t0007-abcd learning_rate=")
    assert second == "[0:00] 7 trials to go, 2 at a time (2 CPUs)"
    assert changed == "[0:00] from now on 3 at a time (3 CPUs)"
    assert third.startswith("[0:00] 2/8 t0000-abcd")
    assert third.endswith("<- best so far")
