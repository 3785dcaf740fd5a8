"""The verdict card of `carft-ray report`: its lines agree with what `report`, `confirm` and `test` have found."""

import shutil

import crash_host
import pytest
from report_studies import confirm_study, of_kinds, read_test_sets

from carft_ray.results.page.data import page_document
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.statistics.paired import comparison_lines
from carft_ray.results.verdict_card import Line, latex_card, text_card, verdict

BETTER, SAME, WORSE = 0.75, 0.6, 0.45  # of the winner; the baseline has 0.6
TRADED = (0.5, 0.85)  # of the winner on ID and OOD
THREE, TWO, SEARCH = (1, 2, 3), (1, 2), (0,)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Studies with only a search, by kind."""
    return of_kinds(tmp_path_factory.mktemp("studies"))


# what is done after the search, whose headline the card must have, and its marks: result, accuracy, seeds, test sets
CASES = {
    "confirmed, better": ({"confirm": (BETTER, THREE)}, "confirm", "warn warn pass warn"),
    "confirmed, the same": ({"confirm": (SAME, THREE)}, "confirm", "warn warn pass warn"),
    "confirmed, worse": ({"confirm": (WORSE, THREE)}, "confirm", "warn warn pass warn"),
    "confirmed with two seeds": ({"confirm": (BETTER, TWO)}, "confirm", "warn warn warn warn"),
    "tested, better": ({"confirm": (BETTER, THREE), "test": (BETTER, THREE)}, "test", "pass pass pass pass"),
    "tested, the same": ({"confirm": (BETTER, THREE), "test": (SAME, THREE)}, "test", "warn ? pass pass"),
    "tested, worse": ({"confirm": (BETTER, THREE), "test": (WORSE, THREE)}, "test", "warn warn pass pass"),
    "test better than the confirm": (
        {"confirm": (SAME, THREE), "test": (BETTER, THREE)},
        "test",
        "pass pass pass pass",
    ),
    "tested with two seeds": ({"confirm": (BETTER, TWO), "test": (BETTER, TWO)}, "test", "? ? warn pass"),
    "search went on after a second read": (
        {"confirm": (BETTER, THREE), "test": (SAME, THREE), "reads": 2, "went_on": True},
        "test",
        "warn ? pass warn",
    ),
    "read twice": ({"confirm": (BETTER, THREE), "test": (BETTER, THREE), "reads": 2}, "test", "pass pass pass warn"),
    "confirmed, better by OOD, ID lost": ({"confirm": (TRADED, THREE)}, "confirm", "warn warn pass warn"),
    "tested without a confirm": ({"test": (BETTER, SEARCH)}, "test", "pass pass warn pass"),
    "search went on": (
        {"confirm": (BETTER, THREE), "test": (BETTER, THREE), "went_on": True},
        "test",
        "pass pass pass warn",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_card_agrees_with_confirm_and_test(made, tmp_path, case):
    done, source, marks = CASES[case]
    study_dir = shutil.copytree(made("two"), tmp_path / "study").resolve()
    view = read_study(study_dir)
    winner, found = view.best.name, {}
    if "confirm" in done:
        level, seeds = done["confirm"]
        found["confirm"] = confirm_study(study_dir, view.recipe, winner, level, seeds)
    if "test" in done:
        level, seeds = done["test"]
        reads, went_on, confirmed = done.get("reads", 1), done.get("went_on", False), "confirm" in done
        found["test"] = read_test_sets(study_dir, view.recipe, winner, level, seeds, reads, went_on, confirmed)
    document = page_document(read_study(study_dir))
    lines, told = verdict(document), document["report"]["lines"]
    assert [line.label for line in lines] == ["Result", "Accuracy", "Seeds", "Test sets", "Cost"]
    summary = found[source]
    assert lines[0].text.startswith(summary["headline"])  # the very sentence
    assert [line for each in found.values() for line in comparison_lines(each) if line in told] == [
        line for each in found.values() for line in comparison_lines(each)
    ]
    assert told[-1].startswith(summary["headline"])  # and so it is printed
    for line, mark in zip(lines, marks.split(), strict=False):
        assert mark in ("?", line.mark), line
    difference, row = summary["baselines"][0], summary["rows"][0]
    low, kept = difference["objective"]["ends"][0], difference["keeps_id"]
    shown = [(row[name]["mean"], *row[name]["ends"]) for name in ("id_accuracy", "ood_accuracy")]
    assert (low > 0) == ("improves on" in summary["headline"])
    assert lines[0].passed == (low > 0 and source == "test")  # the images of a confirm have chosen
    assert lines[1].passed == (kept and source == "test")
    assert ("keeps the ID accuracy" in lines[1].text) == kept
    for what, is_missing in (("seeds", seeds == SEARCH), ("the choice by these images", source == "confirm")):
        assert (what in lines[0].text.partition("not covered: ")[2]) == is_missing
    for mean, *ends in shown:
        assert f"{100 * mean:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}] %" in lines[1].text
    assert ("one training each" if seeds == SEARCH else f"{len(seeds)} fresh seeds") in lines[2].text
    assert (done.get("reads", 1) == 2) == ("read 2 times" in lines[3].text)
    assert ("went on" in case) == ("continued" in lines[3].text)
    assert "fine tuning not tuned" in lines[4].text  # it had one training and no search
    assert "tuned with 2 trainings of CAR-FT" in lines[4].text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thirty", "no OOD set", "constraints", "Pareto"])
def test_before_a_confirm_the_card_warns_and_has_the_words_of_the_report(made, kind):
    document = page_document(read_study(made(kind)))
    lines = verdict(document)
    headline = document["report"]["headline"]
    assert lines[0].text.startswith(f"{document['status']['best']['name']}: {headline['sentence']}")
    assert [line.passed for line in lines] == [False] * 5  # the images that chose show nothing
    assert lines[0].text.endswith("95 %, over images; not covered: seeds, the choice by these images")
    assert "improves" not in str(document["report"]["lines"])
    assert ("there is no OOD set" in lines[1].text) == (kind == "no OOD set")


@pytest.mark.slow
def test_the_card_of_a_study_without_a_baseline_or_without_a_result_says_so(made):
    document = page_document(read_study(made("all failed")))
    assert verdict(document)[0] == Line("Result", False, "no trial has finished: 5 diverged")
    document = {**page_document(read_study(made("two")))}
    document["report"] = {**document["report"], "headline": None}
    assert verdict(document)[0].text.startswith("no baseline to compare with")


@pytest.mark.slow
def test_tuned_is_said_of_what_had_a_search_of_its_own(made):
    document = {**page_document(read_study(made("two"))), "methods": {"car_ft": 16, "feature_kd": 16}}
    status = {**document["status"], "baselines": []}
    line = verdict({**document, "status": status})[4]
    assert line.text.startswith("tuned with 16 trainings of car ft and 16 trainings of feature kd")
    assert line.passed
    assert not verdict({**document, "status": status, "methods": {"car_ft": 16, "feature_kd": 4}})[4].passed
    assert "ft_study t0001 tuned in a search of its own" in verdict({**document, "rivals": ["ft_study t0001"]})[4].text


@pytest.mark.slow
def test_the_forms_of_the_card_hold_all_of_it(made, capsys):
    lines = [Line("Result", True, "t0001_a: improves & more, 95 % <of> $5"), Line("Seeds", False, "one training")]
    text, latex = text_card(lines, "name_1"), latex_card(lines, "name_1")
    assert "[pass] Result  t0001_a: improves & more" in text
    assert "[warn] Seeds   one training" in text
    assert r"t0001\_a: improves \& more, 95 \% \textless{}of\textgreater{} \$5" in latex
    assert latex.count(r"\\") == 3
    capsys.readouterr()
    assert crash_host.call(["report", str(made("two")), "--card", "text"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.slow
def test_a_card_goes_into_a_file(made, tmp_path, capsys):
    assert crash_host.call(["report", str(made("two")), "--card", "latex", "--out", str(tmp_path / "card.tex")]) == 0
    assert (tmp_path / "card.tex").read_text().startswith(r"\begin{tabular}")
