"""`carft-ray report` on stored results: text, JSON, verdict card, page, tables; figures and pictures of images."""

import csv
import functools
import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import forging
import numpy as np
import pyarrow as pa
import pytest
import report_studies
import short_sealed
from logs import forget_line, set_recipe, write_line
from PIL import Image
from report_studies import GRID, KINDS, make_recipe, predictions_table, write_page

import carft_ray
from carft_ray.data.source import ImageSet
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import concat, correct_matrix, read_predictions, sets
from carft_ray.layout import PREDICTIONS, THUMBNAILS
from carft_ray.results.adviser import findings
from carft_ray.results.evidence import compare, comparison_lines, headline_lines, in_points
from carft_ray.results.figure import Curve, Dot, id_ood_figure, write
from carft_ray.results.page.data import page_document, set_tables
from carft_ray.results.page.page import FIGURES, HERE, figures, packed
from carft_ray.results.reading.status_and_ls import expected_data
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.report import OWN_CHOICES, study_report
from carft_ray.results.statistics.selection_bias import ranking_noise
from carft_ray.results.study_card import CHOSEN_HERE, Line, verdict
from carft_ray.study.opening import open_study
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import result_of
from carft_ray.training.thumbnails import SIDE, changed, read_thumbnails, write_thumbnails

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Gives the study of a kind, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("kinds")
    return functools.cache(lambda kind: report_studies.make(folder / kind.replace(" ", "_"), **KINDS[kind]))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def two(studies, here):
    return Path(shutil.copytree(studies("two"), here / "study"))


@pytest.fixture
def printed(run):
    """Gives what a command prints with ``--json``."""

    def call(*words):
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def test_counts_and_corrections_and_the_text_tells_what_each_number_corrects(studies, run):
    view = read_study(studies("thirty"))
    found = study_report(view)
    assert (found["counts"]["trials"]["complete"], found["counts"]["trials"]["diverged"]) == (26, 4)
    assert (found["counts"]["trainings"], found["counts"]["alphas"], found["counts"]["test_reads"]) == (31, 27 * 5, 0)
    spec, rows = objective_spec(view.recipe), [row for row in view.trials if row.outcome == "complete"]
    tables = [(read_predictions(row.place(view.study_dir) / PREDICTIONS), row.alpha) for row in rows]
    objectives = [row.objective for row in rows]
    correct = {name: correct_matrix(tables, name) for name in spec.sets}
    assert found["noise"] == pytest.approx(ranking_noise(spec, objectives, correct)[0])
    assert found["expected"] == expected_data(view)
    assert (found["best"]["name"], found["evidence"]["nearest"]) == (view.best.name, "fine_tuning")
    code, out, _ = run("report", view.study_dir)
    assert code == 0
    assert (
        "26 complete, 4 diverged.\n31 trainings and 135 evaluated alphas were compared on these validation images;"
        in out
    )
    assert f"Best: {view.best.name}, expected {100 * view.best.expected:.1f} [" in out
    assert found["evidence"]["headline"] in out


def test_trainings_on_different_kinds_of_gpus_are_told(two):
    for number, path in enumerate(sorted(two.glob("trials/*/*/result.json"))):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "environment": {"device": ("H100", "A100")[number]}}))
    forging.record(two)
    found = study_report(read_study(two))
    assert found["counts"]["devices"] == {"H100": 1, "A100": 1}
    assert found["lines"][1] == "They ran on different devices, which round differently: 1 on H100, 1 on A100."


def test_a_trainer_of_ones_own_may_have_chosen_and_every_text_says_that_nobody_counted(two, searched):
    train = make_recipe(2).train.model_copy(update={"function": "mine:fit"})
    set_recipe(two, make_recipe(2).model_copy(update={"train": train}))
    for document, is_own in ((page_document(read_study(two)), True), (searched, False)):
        assert (OWN_CHOICES in document["report"]["lines"]) == is_own
        assert ("on the labelled validation sets are not counted" in verdict(document)[-1].text) == is_own


def test_test_reads_are_counted_and_a_ledger_that_lost_a_line_is_no_ground_for_a_report(two, run):
    for purpose in ("winner fixed", "test", "test"):
        write_line(two, make_recipe(2), purpose)
    assert "test sets were read 2 times" in run("report", two)[1]
    forget_line(two, 3)
    code, out, err = run("report", two)
    assert (code, out) == (8, "")
    assert "must have the ledger that manifest.json describes" in err


def test_what_is_damaged_or_missing_is_told(two, run):
    (two / "confirm").mkdir()
    (two / "confirm" / "summary.json").write_text("[]")
    assert run("report", two)[0] == 5
    shutil.rmtree(two / "confirm")
    (read_study(two).best.place(two) / PREDICTIONS).unlink()
    assert run("report", two)[0] == 5
    shutil.rmtree(two)
    with open_study(two, make_recipe(2)):
        pass
    assert run("report", two)[0] == 6


BETTER, SAME, WORSE = 0.75, 0.6, 0.45  # of the winner; the baseline has 0.6
TRADED = (0.5, 0.85)  # of the winner on ID and OOD
# what is done after the search with which level and how many seeds, and the marks: result, accuracy, seeds, test sets
CASES = {
    "confirmed, better": ({"confirm": (BETTER, 3)}, "warn warn pass warn"),
    "confirmed with two seeds": ({"confirm": (BETTER, 2)}, "warn warn warn warn"),
    "confirmed, better by OOD, ID lost": ({"confirm": (TRADED, 3)}, "warn warn pass warn"),
    "tested, better": ({"confirm": (SAME, 3), "test": (BETTER, 3)}, "pass pass pass pass"),
    "tested, the same": ({"confirm": (BETTER, 3), "test": (SAME, 3)}, "warn ? pass pass"),
    "tested, worse": ({"confirm": (BETTER, 3), "test": (WORSE, 3)}, "warn warn pass pass"),
    "tested without a confirm": ({"test": (BETTER, 1)}, "warn pass warn pass"),
    "tested with two seeds": ({"confirm": (SAME, 2), "test": (BETTER, 2)}, "warn pass warn pass"),
    "read twice": ({"confirm": (BETTER, 3), "test": (BETTER, 3), "reads": 2}, "pass pass pass warn"),
    "went on": ({"confirm": (BETTER, 3), "test": (BETTER, 3), "went on": 1}, "pass pass pass warn"),
}


def compared(kind, level, num_seeds, **more):
    """What a confirm or a read of test sets finds when the winner has a level and the baseline 0.6."""
    spec, rng = objective_spec(make_recipe()), np.random.default_rng(0)
    of_id, of_ood = level if isinstance(level, tuple) else (level, level)
    hard = (np.arange(160) + 0.5) / 160

    def right(**shares):
        return {name: hard + rng.normal(0, 0.02, (num_seeds, 160)) < share for name, share in shares.items()}

    winner, baseline = right(id_val=of_id, noisy=of_ood, blurry=of_ood), right(**dict.fromkeys(spec.sets, 0.6))
    roles = {"t0001": "winner", "fine_tuning": "baseline"}
    rows = [{"name": name, "role": role, "alpha": 0.5, "seeds": num_seeds} for name, role in roles.items()]
    subject = "values" if num_seeds > 1 else "model"
    correct = {"t0001": winner, "fine_tuning": baseline}
    return {**compare(kind, subject, spec, rows, correct, 0.005, range(num_seeds)), **more}


@pytest.fixture(scope="module")
def searched(studies):
    """The document of a study that has only a search."""
    return page_document(read_study(studies("two")))


@pytest.mark.parametrize("case", CASES)
def test_the_card_agrees_with_confirm_and_test(searched, case):
    done, marks = CASES[case]
    document = dict(searched)
    if "confirm" in done:
        document["confirm"] = compared("confirm", *done["confirm"])
    if "test" in done:
        document["test"] = compared("test", *done["test"], read=done.get("reads", 1))
        document["status"] = {**searched["status"], "ledger": {"test_reads": done.get("reads", 1)}}
        document["ledger"] = [{"purpose": "search went on"}] * done.get("went on", 0)
    source = "test" if "test" in done else "confirm"
    summary, num_seeds = document[source], done[source][1]
    result, accuracy, seeds, test_sets, _ = lines = verdict(document)
    assert [line.label for line in lines] == ["Result", "Accuracy", "Seeds", "Test sets", "Cost"]
    assert result.text.startswith(summary["headline"])  # the very sentence
    for line, mark in zip(lines, marks.split(), strict=False):
        assert mark in ("?", line.mark), line
    kept = summary["baselines"][0]["keeps_id"]
    assert accuracy.passed == (kept and source == "test")  # the images of a confirm have chosen
    assert ("keeps the ID accuracy" in accuracy.text) == kept
    assert comparison_lines(summary)[-1] in result.text  # what the interval covers, too
    for what, is_missing in (("seeds not covered", num_seeds == 1), (CHOSEN_HERE, source == "confirm")):
        assert (what in result.text) == is_missing
    for name in ("id_accuracy", "ood_accuracy"):
        found = summary["rows"][0][name]
        assert f"{in_points(found['mean'], found['ends'])} %" in accuracy.text
    assert ("one training each" if num_seeds == 1 else f"{num_seeds} fresh seeds") in seeds.text
    assert (done.get("reads", 1) == 2) == ("read 2 times" in test_sets.text)
    assert ("went on" in done) == ("continued" in test_sets.text)


@pytest.mark.parametrize("kind", ["thirty", "no OOD set", "Pareto"])
def test_before_a_confirm_the_card_warns_and_has_the_words_of_the_report(studies, kind):
    document = page_document(read_study(studies(kind)))
    lines, (headline,) = verdict(document), headline_lines(document["report"]["evidence"])
    assert lines[0].text == f"{headline} {CHOSEN_HERE}"
    assert headline in document["report"]["lines"]
    assert [line.passed for line in lines] == [False] * 5  # the images that chose show nothing
    assert "over images; one training: seeds not covered" in lines[0].text
    assert ("there is no OOD set" in lines[1].text) == (kind == "no OOD set")


def test_the_card_says_where_there_is_no_result_no_baseline_and_what_was_tuned(studies, searched):
    failed = page_document(read_study(studies("all failed")))
    assert verdict(failed)[0] == Line("Result", False, "no trial has finished: 5 diverged")
    alone = {
        **searched,
        "report": {**searched["report"], "evidence": {**searched["report"]["evidence"], "baselines": []}},
    }
    assert verdict(alone)[0].text.startswith("no baseline to compare with")
    assert "tuned with 2 trainings of CAR-FT; baseline fine_tuning not tuned" in verdict(searched)[4].text
    status = {**searched["status"], "baselines": [], "times": {"training_s": 9000}}
    for number in (16, 4):  # the best of as many trainings as the winner, or of fewer
        confirm = compared("confirm", BETTER, 3)
        for row, trainings in zip(confirm["rows"], (16, number), strict=True):
            row["chosen_from"] = trainings
        found = {**searched, "status": status, "methods": {"car_ft": 12, "feature_kd": 4}, "confirm": confirm}
        line = verdict({**found, "rivals": ["fine_tuning"]})[4]
        assert line.text.startswith("tuned with 12 trainings of car_ft and 4 trainings of feature_kd")
        assert f"fine_tuning tuned in a search of its own, the best of {number}; " in line.text
        assert line.passed == (number == 16)
        assert line.text.endswith("2.5 hours without a GPU")
    later = {**searched, "status": {**status, "best": {"name": "t0007"}}, "confirm": compared("confirm", BETTER, 3)}
    assert "The best trial of the search, t0007, is not in this comparison." in verdict(later)[0].text


def test_the_command_prints_the_card_or_writes_it_into_a_file(two, run):
    lines = run("report", two, "--card", "text")[1].splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["[warn]", "Result"], ["[warn]", "Accuracy"]]
    assert run("report", two, "--card", "latex", "--out", "card.tex")[0] == 0
    text = Path("card.tex").read_text()
    assert text.startswith(r"\begin{tabular}")
    assert text.count(r"\\") == len(lines) == 6


def check_page(path, document):
    """A page holds all that it needs, is not too large, and has the figures that the document has numbers for."""
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 6_000_000
    tags, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(text)
    for tag, attributes in tags:
        for name in ("src", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not re.match(r"(https?:)?//", attributes.get("href") or "")
        assert tag not in ("link", "iframe", "base", "object")
    assert "@import" not in (HERE / "page.css").read_text()
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    known = {name for several in FIGURES.values() for name in several}
    assert [one for one in ids if one in known] == [name for names in figures(document).values() for name in names]
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_of_each_kind_has_a_whole_page(studies, tmp_path, kind):
    document = write_page(read_study(studies(kind)), tmp_path / "page.html")
    text = check_page(tmp_path / "page.html", document)
    there = {name for names in figures(document).values() for name in names}
    assert ("front" in there) == (kind != "no OOD set" and bool(document["has_ood"]))
    assert ("contour" in there) == ("importance" in there) == (kind == "thirty")  # not below twenty trials
    assert ("alphas" in there) == (kind == "no OOD set")
    data = re.search(r'(?s)<script[^>]* id="data"[^>]*>(.*?)</script>', text)[1]
    assert "NaN" not in data
    assert len(json.loads(data)["trials"]["rows"]) == len(document["trials"])
    visible = re.sub(r"(?s)<(script|style)\b.*?</\1>", "", text)
    assert not re.search(r"\b(NaN|nan|None|Undefined|undefined|inf)\b", visible)
    assert visible.count("<noscript><figure") == ("front" in there)
    assert "<b>" not in visible  # a reason of a failure is text


def test_a_running_search_has_a_page(tmp_path):
    with open_study(tmp_path / "study", make_recipe(6)) as study:
        report_studies.fill(study, 3)
        while study.lost(study.next(), "killed") != "set aside":
            pass
        report_studies.start(study)
        document = write_page(read_study(tmp_path / "study"), tmp_path / "page.html")
    counts = document["status"]["trials"]
    assert (document["running"], counts["running"], counts["set_aside"]) == (True, 1, 1)
    assert "the search is running" in check_page(tmp_path / "page.html", document)


def test_the_page_has_the_numbers_of_the_commands(studies, printed):
    study_dir = studies("thirty")
    document = json.loads(json.dumps(page_document(read_study(study_dir))))
    assert document["report"] == printed("report", study_dir)
    assert document["status"] == printed("status", study_dir)
    rows = printed("ls", study_dir, "--sort", "number")
    assert (document["trials"], document["baselines"]) == (rows["trials"], rows["baselines"])
    trials = packed(document)["trials"]
    names = [*trials["kept"], *trials["values"], *trials["metrics"]]
    for row, original in zip(trials["rows"], document["trials"], strict=True):
        found = dict(zip(names, row, strict=True))
        metrics = {name: original["metrics"].get(name, found[name]) for name in trials["metrics"]}
        kept = {name: original[name] for name in ("objective", "alpha")}
        assert found.items() >= {**original["values"], **metrics, **kept}.items()


def test_the_page_says_what_may_be_wrong(studies, searched):
    view = read_study(studies("two"))
    report = {**searched["report"], "expected": {"trainings": 5, "spread": 0.01, "noise": 0.02}}
    above = [replace(row, objective=1.0, at_chance=True) for row in view.baselines if row.name == "zero_shot"]
    found = findings(replace(view, baselines=above), report)
    checks = {row["check"] for row in found}
    assert {"below zero-shot", "noise larger than differences", "zero-shot not above chance"} <= checks


def test_the_command_writes_the_page_into_the_study_or_where_it_is_told(two, run, printed):
    assert "report.html" in run("report", two, "--html")[1]
    assert (two / "report.html").is_file()
    out = Path("elsewhere", "page.html")
    assert printed("report", two, "--html", "--out", out)["num_bytes"] == out.stat().st_size
    folders = [Path(out.parent, link) for link in re.findall(r'href="(\.\.[^"]*/)"', out.read_text())]
    assert [folder.is_dir() for folder in folders] == [True] * 2


def test_options_that_do_not_belong_together_are_refused(two, run):
    for words, told in (
        ("--card text --html", "--card cannot be used with --html"),
        ("--card text --json", "--json cannot be used with --card"),
        ("--card png", "text, latex"),
        ("--tables x --html", "--tables cannot be used with --html"),
        ("--tables x --out y", "--out needs --html or --card"),
    ):
        code, _, err = run("report", two, *words.split())
        assert code == 2
        assert told in err.replace(":", "")


def test_the_page_shows_the_pictures_of_the_best_trial_with_the_answers_of_its_predictions(two, tmp_path):
    report_studies.keep_thumbnails(two)
    view = read_study(two)
    document = write_page(view, tmp_path / "page.html")
    table = read_predictions(view.best.place(two) / PREDICTIONS)
    alphas = sorted({0.0, view.best.alpha, 1.0})
    num = sum(len(ids) for name in objective_spec(view.recipe).sets for ids in changed(table, name, alphas).values())
    assert sum(group["num_images"] for group in document["changed_images"]) == num
    shown = [one for group in document["changed_images"] for one in group["images"]]
    text = check_page(tmp_path / "page.html", document)
    assert len(shown) == min(48, num)
    for one in shown:
        assert one["picture"] in text
        assert [answer["alpha"] for answer in one["answers"]] == alphas
        rights = [answer["right"] for answer in one["answers"]]
        assert {*rights} == {True, False}
        assert rights == [answer["answer"] == one["label"] for answer in one["answers"]]
    evaluate = view.recipe.evaluate.model_copy(update={"thumbnails": 0})
    set_recipe(two, view.recipe.model_copy(update={"evaluate": evaluate}))
    assert page_document(read_study(two))["changed_images"] == []


def test_cells_of_a_table_are_found_by_the_name_of_their_set():
    def interval(mean):
        return {"mean": mean, "ends": [mean, mean]}

    facts = {"alpha": 1.0, "ood_accuracy": None, "objective": interval(0.5)}
    winner = {"name": "t0", "role": "winner", **facts, "sets": {"id_val": interval(0.1), "dark": interval(0.2)}}
    other = {"name": "plain", "role": "baseline", **facts, "sets": {"dark": interval(0.4), "id_val": interval(0.3)}}
    found = {"label": "x", "winner": "t0", "rows": [winner, other], "baselines": []}
    [table] = set_tables({"test": None, "confirm": found, "report": None})
    assert table["sets"] == ["id_val", "dark", "objective"]
    assert [cell["mean"] for cell in table["rows"][1]["cells"]] == [0.3, 0.4, 0.5]


def test_the_tables_are_files_of_csv_with_the_numbers_of_the_page(studies, here, printed):
    study_dir = studies("thirty")
    view, document = read_study(study_dir), page_document(read_study(study_dir))
    paths = printed("report", study_dir, "--tables", "tables")["tables"]
    tables = carft_ray.report(study_dir).tables
    assert paths == [str(Path("tables", f"{name}.csv")) for name in ("trials", "baselines", "curves", "sets")]
    assert [*tables] == [Path(path).stem for path in paths]
    for name, table in tables.items():
        with (here / "tables" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [table.column_names] * table.num_rows
        for column in table.column_names:
            kept = [row[column] for row in rows if row[column]]
            values = [value for value in table[column].to_pylist() if value not in (None, "")]
            assert len(kept) == len(values)
            assert not pa.types.is_floating(table[column].type) or [*map(float, kept)] == values
    assert tables["trials"].equals(carft_ray.open_study(study_dir).trials())
    assert tables["baselines"].equals(carft_ray.open_study(study_dir).baselines)
    points = [{"name": row.name, **point} for row in view.rows for point in view.result(row).get("curve", ())]
    curves = tables["curves"].to_pylist()
    assert all({name: row[name] for name in points[0]} in points for row in curves if row["name"] != "zero_shot")
    chosen = {row["name"]: row["alpha"] for row in curves if row["chosen"]}
    assert chosen == {row.name: row.alpha for row in view.rows if row.outcome == "complete" and row.name != "zero_shot"}
    shown = {(row["name"], row["set"]): row["mean"] for row in tables["sets"].to_pylist()}
    [table] = document["tables"]
    for row in (*table["rows"], *table["differences"]):
        assert [shown[row["name"], name] for name in table["sets"]] == [cell["mean"] for cell in row["cells"]]
    failed = carft_ray.report(studies("all failed"))
    rows = {path.stem: path.read_text().count("\n") - 1 for path in failed.save_tables(here)}
    assert rows == {name: table.num_rows for name, table in failed.tables.items()}
    assert rows == {"trials": 5, "baselines": 2, "curves": 6, "sets": 0}


BASELINES = {"zero-shot": (0.725, 0.575), "plain fine-tuning": (0.781, 0.491), "paper's setting": (0.774, 0.542)}
CURVED = {alpha: (0.725 + 0.05 * alpha, 0.575 + 0.05 * alpha - 0.06 * alpha**2) for alpha in GRID}
CURVE = Curve(CURVED, 0.4, (0.745, 0.585), (0.009, None))
FLAT = Curve(dict.fromkeys(GRID, (0.7, 0.6)), 0.1, (0.7, 0.6), (0, 0))
DOTS = [Dot((0.75 + 0.01 * k, 0.55 + 0.03 * (k % 3)), 10 ** (k / 3 - 1)) for k in range(9)]
WITHOUT_KL = [Dot((0.7, 0.6), None), Dot((0.8, 0.5), 0.0, meets=False)]
EXTREMES = [Dot((0, 0), 1e-3), Dot((1, 1), 1e3), Dot((np.nan, 0.5), 1)]


@pytest.mark.parametrize(
    ("points", "baselines", "best", "kind"),
    [
        pytest.param(DOTS, BASELINES, CURVE, "harmonic", id="search"),
        pytest.param([Dot((0.7, 0.6), 1.0)] * 5, {"zero-shot": (0.7, 0.6)}, FLAT, "worst_domain", id="identical"),
        pytest.param(WITHOUT_KL, BASELINES, None, "weighted_mean", id="no kl_weight"),
        pytest.param(EXTREMES, {}, None, "weighted_mean", id="extremes"),
        pytest.param([], {}, None, "weighted_mean", id="nothing"),
    ],
)
def test_id_ood_figure_stands_any_points(tmp_path, points, baselines, best, kind):
    png, svg = tmp_path / "out" / "f.png", tmp_path / "out" / "f.svg"
    write(id_ood_figure(points, baselines, best, "Search", kind=kind), png, svg)
    with Image.open(png) as image:
        assert image.size == (1600, 1200)
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all()
    assert pixels.std() > 3  # not blank
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert {*png.parent.iterdir()} == {png, svg}


def test_the_same_study_gives_the_same_bytes_and_titles_say_synthetic_only_when_told(tmp_path):
    import matplotlib

    found = []
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        for number, synthetic in enumerate((False, False, True)):
            png, svg = tmp_path / f"{number}.png", tmp_path / f"{number}.svg"
            write(id_ood_figure(DOTS, BASELINES, CURVE, "Search", synthetic=synthetic), png, svg)
            assert ("Search (synthetic images)" in svg.read_text()) == synthetic
            found.append((png.read_bytes(), svg.read_bytes()))
    assert found[0] == found[1]
    for text in ("best trial, alpha 0.4", "plain fine-tuning", "OOD accuracy", "0.5 ID + 0.5 OOD"):
        assert text in svg.read_text()


ALPHAS = (0.0, 0.4, 1.0)


def table_of(set_name, patterns, alphas=ALPHAS):
    """Predictions with these patterns: image i is right at the alphas at which pattern i has a 1."""
    ids, labels, tables = np.arange(len(patterns), dtype=np.uint64), np.arange(len(patterns)) % 3, []
    for place, alpha in enumerate(alphas):
        right = np.array([pattern[place] == "1" for pattern in patterns])
        logits = np.zeros((len(patterns), 3), np.float32)
        logits[np.arange(len(patterns)), np.where(right, labels, (labels + 1) % 3)] = 1
        tables.append(predictions_table(set_name, alpha, ids, labels, logits))
    return concat(tables)


def images_of(set_name, count, height=200, width=300):
    """Images of one grey level each, their number."""
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3))
    return ImageSet(set_name, pixels, np.arange(count) % 3, np.arange(count, dtype=np.uint64))


def test_images_are_sorted_by_where_they_are_right():
    for alphas, patterns, expected in (
        (ALPHAS, ["000", "111", "010", "011", "010", "100"], {"010": [2, 4], "011": [3], "100": [5]}),
        ((0.0, 1.0), ["01", "10", "11"], {"01": [0], "10": [1]}),
    ):
        found = changed(table_of("id_val", patterns, alphas), "id_val", list(alphas))
        assert {pattern: ids.tolist() for pattern, ids in found.items()} == expected


def test_sets_and_patterns_take_turns_and_each_picture_is_that_of_its_image(tmp_path):
    many = ["011"] * 50 + ["100"] * 2
    table = concat([table_of("id_val", many), table_of("sketch", ["111", "010"])])
    path = tmp_path / "predictions" / "thumbnails.parquet"
    opened = [images_of("id_val", len(many)), images_of("sketch", 2, 32, 32)]
    write_thumbnails(path, table, 0.4, opened, 7)
    rows = read_thumbnails(path).to_pylist()
    first, second = [("id_val", 0), ("id_val", 50), ("sketch", 1)], [("id_val", 1), ("id_val", 51)]
    assert [(row["set"], row["sample_id"]) for row in rows] == [*first, *second, ("id_val", 2), ("id_val", 3)]
    for row in rows:
        with Image.open(io.BytesIO(row["jpeg"])) as picture:
            assert picture.size == ((SIDE, SIDE * 2 // 3) if row["set"] == "id_val" else (32, 32))  # never enlarged
            assert np.abs(np.asarray(picture).astype(int) - row["sample_id"]).max() <= 2  # JPEG rounds


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no more"])
def test_pictures_that_are_missing_or_damaged_are_none(tmp_path, content):
    write_thumbnails(tmp_path / "t.parquet", table_of("id_val", ["010"]), 0.4, [images_of("id_val", 1)], 0)
    assert not list(tmp_path.iterdir())  # with zero nothing is written
    if content is not None:
        (tmp_path / "t.parquet").write_bytes(content)
    assert read_thumbnails(tmp_path / "t.parquet").num_rows == 0


def test_trainings_keep_pictures_of_what_has_changed(tmp_path_factory):
    study_dir = short_sealed.shared(tmp_path_factory) / "study"
    for row in snapshot(study_dir).trials:
        place = row.place(study_dir)
        kept, table = read_thumbnails(place / THUMBNAILS), read_predictions(place / PREDICTIONS)
        alphas = sorted({0.0, result_of(study_dir, row)["alpha"], 1.0})
        found = {
            (name, one) for name in sets(table) for ids in changed(table, name, alphas).values() for one in ids.tolist()
        }
        assert {(each["set"], each["sample_id"]) for each in kept.to_pylist()} == found
