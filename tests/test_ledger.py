"""The ledger shows every kind of tampering by name, survives a kill at every durable operation, and stops a search."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import crash_host
import pytest
import stand_in
from carft_ray.study.lock import repair_journal, study_lock
from sequential_search import attempt

from carft_ray.errors import HoldOutError, RecipeError, StorageError, UsageError
from carft_ray.study.ledger import check_ledger, mend, read_ledger, reads_of, record, require_unread
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import baselines, trials

RECIPE = stand_in.make_recipe(2)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A study whose search has ended: two trials, a baseline, zero-shot."""
    folder = tmp_path_factory.mktemp("studies")
    with open_study(folder / "study", RECIPE) as study:
        recover_running(study)
        study.add_zero_shot(stand_in.prepare(RECIPE, study.study_dir / "prepared"))
        while (spec := study.next()) is not None:
            attempt(study, spec, study.study_dir / "prepared")
            study.settle(spec)
    return folder / "study"


def write(study_dir, purpose="test", **words):
    with study_lock(study_dir):
        repair_journal(study_dir)
        return record(study_dir, RECIPE, purpose, **words)


@pytest.fixture(scope="module")
def original(searched, tmp_path_factory):
    """The study with three lines in its ledger."""
    study_dir = tmp_path_factory.mktemp("read") / "study"
    shutil.copytree(searched, study_dir)
    write(study_dir, "winner fixed", details={"winner": "t0001"})
    write(study_dir, sets=("id_test", "sketch"))
    write(study_dir, sets=("id_test",), reason="ein Grund: größer")
    return study_dir


@pytest.fixture
def fresh(searched, tmp_path):
    return Path(shutil.copytree(searched, tmp_path / "fresh"))


@pytest.fixture
def study_dir(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "study"))


def lines_of(study_dir):
    return (study_dir / "ledger.jsonl").read_text().splitlines()


def put(study_dir, lines):
    (study_dir / "ledger.jsonl").write_text("".join(line + "\n" for line in lines))


def told(study_dir):
    return "\n".join(str(problem) for problem in check_ledger(study_dir))


# what is written


@pytest.mark.slow
def test_each_line_holds_number_purpose_sets_reason_and_the_hash_of_the_line_before(study_dir):
    texts = lines_of(study_dir)
    rows = [json.loads(text) for text in texts]
    assert [row["number"] for row in rows] == [1, 2, 3]
    assert [row["purpose"] for row in rows] == ["winner fixed", "test", "test"]
    assert rows[1]["sets"] == ["id_test", "sketch"]
    assert rows[2]["reason"] == "ein Grund: größer"
    assert rows[0]["details"] == {"winner": "t0001"}
    assert all(row["user"] and row["time"] and row["version"] and len(row["recipe_hash"]) == 64 for row in rows)
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert [row["previous"] for row in rows] == ["", *hashes[:2]]
    noted = json.loads((study_dir / "manifest.json").read_text())["ledger"]
    assert noted == {"count": 3, "head": hashes[2]}


@pytest.mark.slow
def test_a_ledger_is_read_back_and_a_study_without_one_is_fine(study_dir, fresh):
    assert [entry.number for entry in read_ledger(study_dir)] == [1, 2, 3]
    assert [entry.number for entry in reads_of(read_ledger(study_dir))] == [2, 3]
    assert check_ledger(study_dir) == check_ledger(fresh) == []
    assert read_ledger(fresh) == []


def test_a_line_changes_no_trial_and_the_study_still_opens(study_dir, searched):
    assert trials(study_dir) == trials(searched)
    assert baselines(study_dir) == baselines(searched)
    with open_study(study_dir, RECIPE) as study:
        recover_running(study)
        assert study.done()


@pytest.mark.slow
def test_a_line_may_be_written_while_a_search_has_the_study_open(fresh):
    with open_study(fresh, larger(3)) as study:
        recover_running(study)
        record(study.study_dir, RECIPE, "winner fixed", details={"winner": "t0000"})
        spec = study.next()
        attempt(study, spec, study.study_dir / "prepared")
        study.settle(spec)
    assert [entry.purpose for entry in read_ledger(fresh)] == ["winner fixed"]
    assert len(trials(fresh)) == 3


# tampering

TAMPERINGS = {
    "the first line removed": (lambda lines: lines[1:], "differs from line 1 on"),
    "a middle line removed": (lambda lines: [lines[0], lines[2]], "differs from line 2 on"),
    "the last line removed": (lambda lines: lines[:2], "differs from line 3 on"),
    "two lines removed": (lambda lines: lines[:1], "differs from line 2 on"),
    "all lines removed": (lambda lines: [], "differs from line 1 on, but got 0 lines"),
    "another order": (lambda lines: [lines[0], lines[2], lines[1]], "differs from line 2 on"),
    "a line twice": (lambda lines: [*lines, lines[1]], "differs from line 4 on, but got 4 lines"),
    "a line appended": (
        lambda lines: [*lines, lines[2].replace('"number": 3', '"number": 4')],
        "differs from line 4 on",
    ),
    "a line that is no JSON": (lambda lines: [*lines, "hello"], "differs from line 4 on"),
    "the last line edited": (
        lambda lines: [*lines[:2], lines[2].replace("ein Gr", "kein Gr").replace("id_test", "id_val")],
        "differs from line 3 on",
    ),
    "a middle line edited": (
        lambda lines: [lines[0], lines[1].replace("sketch", "photo"), lines[2]],
        "differs from line 2 on",
    ),
    "the first line edited": (lambda lines: [lines[0].replace("t0001", "t0000"), *lines[1:]], "differs from line 1 on"),
    "a number edited": (
        lambda lines: [lines[0], lines[1].replace('"number": 2', '"number": 7'), lines[2]],
        "differs from line 2 on",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_and_named(study_dir, name):
    tamper, message = TAMPERINGS[name]
    before = lines_of(study_dir)
    after = tamper(before)
    assert after != before
    put(study_dir, after)
    assert message in told(study_dir)
    assert str(study_dir / "ledger.jsonl") in told(study_dir)
    with pytest.raises(HoldOutError) as caught:
        write(study_dir)
    assert caught.value.exit_code == 8
    assert message in str(caught.value)
    assert lines_of(study_dir) == after  # nothing is mended that was not left by a kill


def test_a_removed_file_is_found(study_dir):
    (study_dir / "ledger.jsonl").unlink()
    assert "differs from line 1 on, but got 0 lines" in told(study_dir)


def test_a_cut_last_line_is_found(study_dir):
    path = study_dir / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert "its last line must be whole" in told(study_dir)
    assert "differs from line 3 on" in told(study_dir)


def test_a_line_removed_from_the_file_and_the_manifest_comes_back_from_the_journal(study_dir):
    lines = lines_of(study_dir)
    put(study_dir, lines[:2])
    note(study_dir, 2, lines[1])
    assert [entry.number for entry in read_ledger(study_dir)] == [1, 2, 3]
    mend(study_dir)
    assert lines_of(study_dir) == lines


def note(study_dir, count, last):
    """Writes into the manifest what it would say of so many lines."""
    manifest = json.loads((study_dir / "manifest.json").read_text())
    manifest["ledger"] = {"count": count, "head": hashlib.sha256(last.encode()).hexdigest()}
    (study_dir / "manifest.json").write_text(json.dumps(manifest))


def test_a_journal_that_has_forgotten_a_line_is_found(study_dir):
    """Its last record is removed, and the line from the file."""
    put(study_dir, lines_of(study_dir)[:2])
    journal = study_dir / "study.journal"
    journal.write_bytes(journal.read_bytes().rsplit(b"\n", 2)[0] + b"\n")
    assert "manifest.json: must say of ledger.jsonl what study.journal says: 2 lines" in told(study_dir)
    assert "but got 3 lines" in told(study_dir)


def test_a_manifest_that_was_edited_is_found(study_dir):
    note(study_dir, 2, "another line")
    assert "manifest.json: must say of ledger.jsonl" in told(study_dir)
    note(study_dir, 1, lines_of(study_dir)[0])
    assert "but got 1 line" in told(study_dir)


def test_a_first_line_without_a_study_that_knows_of_it_is_found(fresh, study_dir):
    put(fresh, lines_of(study_dir)[:1])
    assert "differs from line 1 on" in told(fresh)


def test_a_damaged_note_in_the_manifest_is_a_storage_error(study_dir):
    path = study_dir / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ledger": [3]}))
    with pytest.raises(StorageError, match="must have count and head"):
        check_ledger(study_dir)


# kills


@pytest.fixture(scope="module")
def killed(searched, tmp_path_factory):
    """Studies of which the second line was killed within or after every durable operation, and the undisturbed one."""
    folder = tmp_path_factory.mktemp("kills")
    template = folder / "template"
    shutil.copytree(searched, template)
    write(template)
    line = ["study", "the second", str(template)]
    with crash_host.started(folder, "ledger_writes") as run:
        kinds_path = folder / "kinds.json"
        [answer] = run([{"name": "whole", "commands": [{"argv": line, "count_to": str(kinds_path)}]}])["whole"][1]
        assert answer["code"] == 0, answer["log"]
        kinds = json.loads(kinds_path.read_text())
        jobs = [
            {"name": f"{number:02d}-{kind}-{moment}", "commands": [{"argv": line, "kill": (number, moment)}]}
            for number, kind in enumerate(kinds, start=1)
            for moment in (("torn", "after") if kind == "append" else ("before", "after"))
        ]
        found = run(jobs)
    assert {name for name, (_, [answer]) in found.items() if answer["code"] != -signal.SIGKILL} == set()
    return {name: place / "study" for name, (place, _) in found.items()}


@pytest.mark.slow
def test_a_kill_at_any_operation_leaves_no_problem_and_one_line_or_two(killed):
    assert {name: told(study) for name, study in killed.items() if told(study)} == {}
    counts = [len(read_ledger(study)) for study in killed.values()]
    assert counts == sorted(counts)
    assert set(counts) == {1, 2}


@pytest.mark.slow
def test_after_a_kill_the_next_line_mends_all_three_places(killed, tmp_path):
    for name, killed_study in killed.items():
        study_dir = Path(shutil.copytree(killed_study, tmp_path / name))
        before = read_ledger(study_dir)
        write(study_dir, reason="the next")
        assert told(study_dir) == "", name
        entries = read_ledger(study_dir)
        assert entries[:-1] == before, name
        assert entries[-1].reason == "the next"
        assert [json.loads(line)["number"] for line in lines_of(study_dir)] == list(range(1, len(entries) + 1))
        noted = json.loads((study_dir / "manifest.json").read_text())["ledger"]
        assert noted["count"] == len(entries), name
        assert noted["head"] == hashlib.sha256(lines_of(study_dir)[-1].encode()).hexdigest(), name


# a search after a read


def larger(trials):
    return stand_in.make_recipe(trials)


def test_without_a_read_a_search_needs_no_reason(fresh, tmp_path):
    assert require_unread(tmp_path / "new", RECIPE, None) is False
    assert require_unread(fresh, larger(9), None) is False
    write(fresh, "winner fixed")
    assert require_unread(fresh, larger(9), "because") is False
    assert len(read_ledger(fresh)) == 1


def test_after_a_read_more_trials_need_a_reason_that_is_written_down(study_dir):
    assert require_unread(study_dir, RECIPE, None) is False  # nothing to train
    with pytest.raises(HoldOutError, match=r"its test sets were read: .* by .*\(line 3 of ledger.jsonl\)") as caught:
        require_unread(study_dir, larger(4), None)
    assert "--again REASON" in str(caught.value)
    assert len(read_ledger(study_dir)) == 3
    assert require_unread(study_dir, larger(4), "a wider range") is True
    last = read_ledger(study_dir)[-1]
    assert (last.purpose, last.reason, last.details) == (
        "search went on",
        "a wider range",
        {"trials": 4, "trials_before": 2},
    )
    assert require_unread(study_dir, larger(4), None) is False  # the same search, resumed
    with pytest.raises(HoldOutError):
        require_unread(study_dir, larger(5), None)
    write(study_dir, reason="once more")
    with pytest.raises(HoldOutError):
        require_unread(study_dir, larger(4), None)


@pytest.mark.parametrize("reason", ["", "  "])
def test_a_reason_must_say_something(study_dir, reason):
    with pytest.raises(UsageError, match="--again: must give a reason"):
        require_unread(study_dir, larger(4), reason)


def test_the_recipe_of_another_study_is_not_written_down(study_dir):
    other = stand_in.make_recipe(9, epochs=7)
    with pytest.raises(RecipeError, match=r"train\.epochs"):
        require_unread(study_dir, other, "because")
    assert len(read_ledger(study_dir)) == 3


def test_a_search_on_a_damaged_ledger_is_refused(study_dir):
    put(study_dir, lines_of(study_dir)[:2])
    with pytest.raises(HoldOutError, match="differs from line 3 on"):
        require_unread(study_dir, larger(4), "because")
