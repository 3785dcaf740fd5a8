"""Texts of data on the terminal, in a notebook and as JSON: shown as they are, steering nothing."""

import io
import json

import pytest
from report_studies import fail, make_recipe
from rich.console import Console

from carft_ray import cli
from carft_ray.data.formats.folder import folder_set_problems
from carft_ray.errors import DataError, Problem
from carft_ray.launch import events
from carft_ray.recipe.schema.data import FolderSet
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.attempt_files import append_log
from carft_ray.study.opening import open_study
from carft_ray.ui import console, live, notebook, progress

STEERING = "no space on [/dev/shm] [red]:smile: \x1b]0;owned\x07\u202e\x9b2J"
SHOWN = r"no space on [/dev/shm] [red]:smile: \x1b]0;owned\x07\u202e\x9b2J"


@pytest.fixture
def printed(monkeypatch):
    """What a terminal of 500 columns is sent, both streams together."""
    stream = io.StringIO()
    for name in ("out", "err"):
        terminal = Console(file=stream, width=500, force_terminal=True, color_system=None)
        monkeypatch.setattr(f"carft_ray.ui.console.{name}", terminal)
    return stream


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory):
    """A study with one trial, whose reason and log are steering."""
    folder = tmp_path_factory.mktemp("shown") / "study"
    with open_study(folder, make_recipe(2)) as study:
        spec = study.next()
        fail(study, spec, reason=STEERING)
        append_log(spec.folder(folder), STEERING)
    return folder


@pytest.mark.parametrize("words", [["ls"], ["logs", "0"]], ids=lambda words: words[0])
def test_a_reason_of_a_trial_is_shown_as_it_is(study_dir, printed, words, capsys):
    cli.app([words[0], str(study_dir), *words[1:]], standalone_mode=False)
    assert all(word in printed.getvalue() for word in SHOWN.split(" "))  # a column of remarks is narrow
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(printed.getvalue())
    cli.app(["ls", str(study_dir), "--json"], standalone_mode=False)
    written = capsys.readouterr().out
    assert written.isascii()
    assert not {"\x1b", "\x07"} & set(written)
    assert json.loads(written)["trials"][0]["reason"] == STEERING


def test_messages_errors_and_tables_are_no_markup(printed):
    for show in (console.show, console.say, console.warn, console.next_step):
        show(STEERING)
    console.show_error(DataError([Problem(STEERING, "must hold"), Problem("x", "must hold", STEERING)]))
    console.show(console.table([STEERING, *console.numbers(STEERING)], [[STEERING, STEERING]]))
    console.show(console.table(["", ""], [[STEERING, STEERING]]))
    assert printed.getvalue().count(SHOWN) == 12
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(printed.getvalue())


def test_one_fault_of_many_sets_is_one_problem_and_the_sandbox_s_images_have_their_command(printed, tmp_path):
    sets = [FolderSet(source="folder", path=str(tmp_path / "sandbox_png"), domains=(name,)) for name in "abcde"]
    problems = [each for number, spec in enumerate(sets) for each in folder_set_problems(spec, f"data.{number}")]
    console.show_error(DataError([problems[0], Problem("search", "must hold"), *problems[1:]]))
    said = printed.getvalue()
    assert "2 problems" in said
    assert "data.0, data.1, data.2 and 2 more: the root" in said
    assert said.count("carft-ray sandbox images --to ") == 1


def test_the_live_table_and_a_notebook_show_texts_as_they_are(study_dir, printed):
    with progress.search_shown(True, study_dir, 2) as on_event:
        on_event(events.Note(STEERING))
    assert f"warning: {SHOWN}" in printed.getvalue()
    view = live.SearchView.of(read_study(study_dir))
    view.update(events.Preparing(STEERING))
    console.out.print(view)
    with progress.counting() as begin:
        begin(STEERING)(1, 2)
    assert SHOWN in notebook.as_text(view, STEERING)
    as_html = notebook.as_html(view, f"<b>{STEERING}")
    assert f"&lt;b&gt;{SHOWN}" in as_html
    for text in (printed.getvalue(), as_html):
        assert "\x1b]0" not in text
        assert not {"\x07", "\u202e", "\x9b"} & set(text)
