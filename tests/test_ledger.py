"""The ledger of the test sets: what it says, tampering and kills, and when it stops a search."""

import json
import shutil
from pathlib import Path

import pytest
import stand_in
from logs import commits, goes_on, holding, rewrite, write_line
from study_steps import run_all, searching

from carft_ray.errors import HoldOutError, RecipeError, StorageError, UsageError
from carft_ray.recipe.schema.recipe import with_keys
from carft_ray.store.log import log_of
from carft_ray.study.ledger import check_ledger, reads_of, record
from carft_ray.study.snapshot import snapshot

RECIPE = stand_in.make_recipe(2)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A study whose search has ended: two trials, a baseline, zero-shot."""
    study_dir = tmp_path_factory.mktemp("studies") / "study"
    with searching(study_dir, RECIPE) as study:
        study.add_zero_shot({"objective": 0.25})
        run_all(study)
    return study_dir


@pytest.fixture(scope="module")
def original(searched, tmp_path_factory):
    """The study with three lines in its ledger."""
    study_dir = tmp_path_factory.mktemp("read") / "study"
    shutil.copytree(searched, study_dir)
    write_line(study_dir, RECIPE, "winner fixed", details={"winner": "t0001"})
    write_line(study_dir, RECIPE, sets=("id_test", "sketch"))
    write_line(study_dir, RECIPE, sets=("id_test",), reason="ein Grund: größer")
    return study_dir


@pytest.fixture
def fresh(searched, tmp_path):
    return Path(shutil.copytree(searched, tmp_path / "fresh"))


@pytest.fixture
def study_dir(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "study"))


def places_of(found):
    """Returns where among commits those with a line of the ledger are."""
    return [place for place, commit in enumerate(found) if is_line(commit)]


def is_line(commit):
    return any(record["kind"] == "ledger" for record in commit["records"])


def lines_of(study_dir):
    return [
        record["line"] for commit in commits(study_dir) for record in commit["records"] if record["kind"] == "ledger"
    ]


def noted(study_dir):
    return json.loads((study_dir / "manifest.json").read_text()).get("ledger")


def told(study_dir):
    return "\n".join(str(problem) for problem in check_ledger(study_dir, log_of(study_dir)))


# what is written


def test_lines_are_read_back_and_the_manifest_notes_the_commit_of_the_last(study_dir, fresh, searched):
    rows = lines_of(study_dir)
    assert [row["number"] for row in rows] == [entry.number for entry in snapshot(study_dir).ledger] == [1, 2, 3]
    assert [row["purpose"] for row in rows] == ["winner fixed", "test", "test"]
    assert (rows[0]["details"], rows[1]["sets"]) == ({"winner": "t0001"}, ["id_test", "sketch"])
    assert rows[2]["reason"] == "ein Grund: größer"
    assert all(row["user"] and row["time"] and row["version"] and len(row["recipe_hash"]) == 64 for row in rows)
    assert [entry.number for entry in reads_of(snapshot(study_dir).ledger)] == [2, 3]
    found = commits(study_dir)
    place = places_of(found)[-1]
    assert noted(study_dir) == {"count": 3, "commit": place + 1, "hash": found[place + 1]["previous"]}
    assert (
        check_ledger(study_dir, log_of(study_dir)) == check_ledger(fresh, log_of(fresh)) == snapshot(fresh).ledger == []
    )
    assert (snapshot(study_dir).trials, snapshot(study_dir).baselines) == (
        snapshot(searched).trials,
        snapshot(searched).baselines,
    )


# tampering


def edited(number, old, new):
    """Returns what edits the n-th line of the ledger."""

    def edit(found):
        place = places_of(found)[number]
        text = json.dumps(found[place])
        assert old in text
        return [*found[:place], json.loads(text.replace(old, new)), *found[place + 1 :]]

    return edit


def ordered(*numbers):
    """Returns what puts lines of these numbers, from 0, after all other commits."""

    def order(found):
        return [each for each in found if not is_line(each)] + [found[places_of(found)[number]] for number in numbers]

    return order


TAMPERINGS = {
    "the first line removed": ordered(1, 2),
    "a middle line removed": ordered(0, 2),
    "the last line removed": ordered(0, 1),
    "all lines removed": ordered(),
    "another order": ordered(0, 2, 1),
    "a line twice": ordered(0, 1, 2, 1),
    "the last line edited": edited(2, "ein Grund", "kein Grund"),
    "the first line edited": edited(0, "t0001", "t0000"),
    "a number edited": edited(1, '"number": 2', '"number": 7'),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_and_named_even_where_all_hashes_were_made_again(study_dir, name):
    rewrite(study_dir, TAMPERINGS[name](commits(study_dir)))
    before = (study_dir / "manifest.json").read_bytes(), lines_of(study_dir)
    message = 'log: must have the ledger that manifest.json describes, {"count": 3, "commit": '
    assert message in told(study_dir)
    assert "it is unknown how often the test sets were read" in told(study_dir)
    with pytest.raises(HoldOutError) as caught:
        write_line(study_dir, RECIPE)
    assert caught.value.exit_code == 8
    assert message in str(caught.value)
    assert ((study_dir / "manifest.json").read_bytes(), lines_of(study_dir)) == before


def note(study_dir, value):
    """Writes into the manifest what it would say of the ledger."""
    manifest = json.loads((study_dir / "manifest.json").read_text())
    (study_dir / "manifest.json").write_text(json.dumps({**manifest, "ledger": value}))


def test_a_log_that_was_cut_off_and_a_manifest_that_was_edited_or_damaged_are_found(study_dir, fresh):
    whole, before = noted(study_dir), (study_dir / "manifest.json").read_bytes()
    for changed in ({"hash": "0" * 64}, {"count": 2}, {"count": 4}, {"commit": whole["commit"] + 1}):
        note(study_dir, {**whole, **changed})
        assert "must have the ledger that manifest.json describes" in told(study_dir)
    for damaged in ([3], "", 0, {}):
        note(study_dir, damaged)
        assert "must have the ledger that manifest.json describes" in told(study_dir)
    (study_dir / "manifest.json").write_text("[]")
    with pytest.raises(StorageError, match=r"manifest.json: the content: input should be a valid dictionary"):
        check_ledger(study_dir, log_of(study_dir))
    (study_dir / "manifest.json").write_bytes(before)
    assert told(study_dir) == ""
    for path in sorted((study_dir / "log").iterdir())[places_of(commits(study_dir))[-1] :]:
        path.unlink()
    assert "must have the ledger that manifest.json describes" in told(study_dir)
    note(fresh, whole)  # of lines in a study without one
    with pytest.raises(HoldOutError, match=r"must have the ledger that manifest.json describes"):
        goes_on(fresh, stand_in.make_recipe(4), "because")


# a search after a read


def test_kills_before_each_note_in_the_manifest_leave_a_sound_ledger(fresh, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    for number in range(1, 4):
        with monkeypatch.context() as patch, holding(fresh) as log:
            commit = log.commit

            def last_write(*records, commit=commit, patch=patch):
                patch.setattr("carft_ray.files.write_json", killed)
                return commit(*records)

            patch.setattr(log, "commit", last_write)
            with pytest.raises(KeyboardInterrupt):
                record(fresh, log, RECIPE, "test")
        assert len(snapshot(fresh).ledger) == number


def test_only_after_a_read_more_trials_need_a_reason_which_is_written_down(study_dir, fresh, tmp_path):
    assert goes_on(tmp_path / "new", RECIPE, None) is False
    write_line(fresh, RECIPE, "winner fixed")
    assert goes_on(fresh, stand_in.make_recipe(9), "because") is False
    assert [entry.purpose for entry in snapshot(fresh).ledger] == ["winner fixed"]
    assert goes_on(study_dir, RECIPE, None) is False  # nothing to train
    with pytest.raises(HoldOutError, match=r"its test sets were read: .* by .*\(line 3 of the ledger\)") as caught:
        goes_on(study_dir, stand_in.make_recipe(4), None)
    assert "--again REASON" in str(caught.value)
    assert len(snapshot(study_dir).ledger) == 3
    assert goes_on(study_dir, stand_in.make_recipe(4), "a wider range") is True
    last = snapshot(study_dir).ledger[-1]
    assert (last.purpose, last.reason, last.details) == (
        "search went on",
        "a wider range",
        {"trials": 4, "trials_before": 2, "baselines": ["plain"]},
    )
    assert goes_on(study_dir, stand_in.make_recipe(4), None) is False  # the same search, resumed
    with pytest.raises(HoldOutError):
        goes_on(study_dir, stand_in.make_recipe(5), None)
    write_line(study_dir, RECIPE, reason="once more")
    with pytest.raises(HoldOutError):
        goes_on(study_dir, stand_in.make_recipe(4), None)


def test_a_baseline_that_is_new_after_a_read_needs_a_reason_of_its_own(study_dir):
    more = with_keys(RECIPE, search={"baselines": {**RECIPE.search.baselines, "strong": {"kl_weight": 0.0}}})
    with pytest.raises(HoldOutError, match=r"its test sets were read"):
        goes_on(study_dir, more, None)
    wide = stand_in.make_recipe(4)
    assert goes_on(study_dir, wide, "a wider range") is True
    with pytest.raises(HoldOutError):  # that was of more trials
        goes_on(study_dir, more, None)
    assert goes_on(study_dir, more, "a reviewer asked for it") is True
    assert snapshot(study_dir).ledger[-1].details["baselines"] == ["plain", "strong"]
    assert goes_on(study_dir, more, None) is False


def test_a_reason_must_say_something_and_the_recipe_be_that_of_the_study(study_dir):
    for reason in ("", "  "):
        with pytest.raises(UsageError, match="--again: needs a reason"):
            goes_on(study_dir, stand_in.make_recipe(4), reason)
    with pytest.raises(RecipeError, match=r"train\.epochs"):
        goes_on(study_dir, stand_in.make_recipe(9, epochs=7), "because")
    assert len(snapshot(study_dir).ledger) == 3
