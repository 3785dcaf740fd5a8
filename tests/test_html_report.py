"""`carft-ray report --html`: the document, the page, the card, for studies of every kind."""

import csv
import json
import operator
import re
from html.parser import HTMLParser
from pathlib import Path

import crash_host
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import report_studies
from logs import set_recipe
from report_studies import KINDS, of_kinds, write_page

import carft_ray
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.results.page.data import page_document
from carft_ray.results.page.figures import FIGURES, figures
from carft_ray.results.page.page import HERE, packed
from carft_ray.results.reading.study_view import read_study
from carft_ray.study.opening import open_study
from carft_ray.training.thumbnails import changed

MAX_BYTES = 6_000_000


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A study of each kind, made when it is asked for."""
    return of_kinds(tmp_path_factory.mktemp("kinds"))


def printed(capsys, *words):
    """What a command prints with ``--json``."""
    capsys.readouterr()
    assert crash_host.call([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class Tags(HTMLParser):
    """Start tags of a page, and the text of each script of data."""

    def __init__(self, text):
        super().__init__()
        self.found, self.data, self._in_data = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._in_data = tag == "script" and ("id", "data") in attributes

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, text):
        self.data += text if self._in_data else ""


def check_page(path, document):
    """A page holds all that it needs, is not too large, and has the figures that the document has numbers for."""
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    tags = Tags(text)
    for tag, attributes in tags.found:
        for name in ("src", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not re.match(r"(https?:)?//", attributes.get("href") or "")
        assert tag not in ("link", "iframe", "base", "object")
    assert "@import" not in (HERE / "page.css").read_text()
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    known = {name for several in FIGURES.values() for name in several}
    assert [one for one in ids if one in known] == [name for names in figures(document).values() for name in names]
    data = json.loads(tags.data)
    assert "NaN" not in tags.data
    assert text.count("Plotly.react=") <= 1
    assert len(data["trials"]["rows"]) == len(document["trials"])
    return text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_study_of_each_kind_has_a_whole_page(studies, tmp_path, kind):
    view = read_study(studies(kind))
    document = write_page(view, tmp_path / "page.html")
    text = check_page(tmp_path / "page.html", document)
    there = {name for names in figures(document).values() for name in names}
    assert ("front" in there) == (kind not in ("no OOD set",) and bool(document["has_ood"]))
    assert ("contour" in there) == (kind == "thirty")  # no surface below twenty trials
    assert ("importance" in there) == (kind == "thirty")
    assert ("alphas" in there) == (kind == "no OOD set")
    visible = re.sub(r"(?s)<(script|style)\b.*?</\1>", "", text)
    assert not re.search(r"\b(NaN|nan|None|Undefined|undefined|inf)\b", visible)
    assert visible.count("<noscript><figure") == ("front" in there)
    assert "<b>" not in visible  # a reason of a failure is text


@pytest.mark.slow
def test_the_document_has_the_numbers_of_the_commands(studies, capsys):
    study_dir = studies("thirty")
    document = json.loads(json.dumps(page_document(read_study(study_dir))))
    assert document["report"] == printed(capsys, "report", study_dir)
    status = printed(capsys, "status", study_dir)
    assert document["status"] == status
    rows = printed(capsys, "ls", study_dir, "--sort", "number")
    assert (document["trials"], document["baselines"]) == (rows["trials"], rows["baselines"])


@pytest.mark.slow
def test_the_page_holds_the_numbers_of_the_document(studies):
    document = page_document(read_study(studies("thirty")))
    trials = packed(document)["trials"]
    names = [*trials["kept"], *trials["values"], *trials["metrics"]]
    for row, original in zip(trials["rows"], document["trials"], strict=True):
        found = dict(zip(names, row, strict=True))
        assert found["objective"] == original["objective"]
        assert found["alpha"] == original["alpha"]
        for name in trials["metrics"]:
            assert found[name] == original["metrics"].get(name, found[name])
        assert {name: found[name] for name in original["values"] if name in found} == {
            name: value for name, value in original["values"].items() if name != "alpha"
        }


@pytest.mark.slow
def test_a_running_search_has_a_page(tmp_path):
    with open_study(tmp_path / "study", report_studies.make_recipe(6)) as study:
        report_studies.fill(study, 3)
        report_studies.start(study)
        document = write_page(read_study(tmp_path / "study"), tmp_path / "page.html")
        text = check_page(tmp_path / "page.html", document)
        assert document["running"]
        assert document["status"]["trials"]["running"] == 1
        assert "the search is running" in text


@pytest.mark.slow
def test_the_command_writes_into_the_study_or_where_it_is_told(studies, tmp_path, capsys):
    study_dir = studies("two")
    assert crash_host.call(["report", str(study_dir), "--html"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (study_dir / "report.html").is_file()
    out = tmp_path / "elsewhere" / "page.html"
    found = printed(capsys, "report", study_dir, "--html", "--out", out)
    assert found["num_bytes"] == out.stat().st_size
    links = [attributes["href"] for tag, attributes in Tags(out.read_text()).found if tag == "a"]
    folders = [Path(out.parent, link) for link in links if link.endswith("/")]
    assert len(folders) == 2
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--card", "text", "--html"], "--card must stand without --html"),
        (["--out", "x"], "--out needs --html or --card"),
        (["--card", "png"], "text, latex"),
        (["--tables", "x", "--html"], "--tables must stand without --html"),
        (["--tables", "x", "--out", "y"], "--out needs --html or --card"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(studies, capsys, words, part):
    capsys.readouterr()
    assert crash_host.call(["report", str(studies("two")), *words]) == 2
    assert part in capsys.readouterr().err.replace(":", "")


def test_the_tables_are_files_of_csv_and_parquet_with_the_numbers_of_the_page(studies, tmp_path, capsys):
    study_dir = studies("thirty")
    view, document = read_study(study_dir), page_document(read_study(study_dir))
    found = printed(capsys, "report", study_dir, "--tables", tmp_path / "tables")
    names = ("trials", "baselines", "curves", "sets")
    assert found["tables"] == [
        str(tmp_path / "tables" / f"{name}{end}") for name in names for end in (".csv", ".parquet")
    ]
    tables = {name: pq.read_table(tmp_path / "tables" / f"{name}.parquet") for name in names}
    for name, table in tables.items():
        with (tmp_path / "tables" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [table.column_names] * table.num_rows
        for column in table.column_names:
            kept = [row[column] for row in rows if row[column]]
            values = [value for value in table[column].to_pylist() if value not in (None, "")]
            assert len(kept) == len(values)
            if pa.types.is_floating(table[column].type):
                assert [float(text) for text in kept] == values
    assert tables["trials"].equals(carft_ray.open_study(study_dir).trials())
    assert tables["baselines"].equals(carft_ray.open_study(study_dir).baselines)
    points = [{"name": row.name, **point} for row in view.rows for point in view.result(row).get("curve", ())]
    key = operator.itemgetter("name", "alpha")
    curves = [{name: row[name] for name in points[0]} for row in tables["curves"].to_pylist()]
    assert sorted(curves, key=key) == sorted(points, key=key)
    chosen = {row["name"]: row["alpha"] for row in tables["curves"].to_pylist() if row["chosen"]}
    assert chosen == {row.name: row.alpha for row in view.rows if row.outcome == "complete" and row.name != "zero_shot"}
    shown = {(row["name"], row["set"]): row["mean"] for row in tables["sets"].to_pylist()}
    [table] = document["tables"]
    for row in (*table["rows"], *table["differences"]):
        for name, cell in zip(table["sets"], row["cells"], strict=True):
            assert shown[row["name"], name] == cell["mean"]


def test_a_study_without_a_result_has_tables_without_rows(studies, tmp_path):
    paths = carft_ray.report(studies("all failed")).save_tables(tmp_path)
    rows = {path.stem: pq.read_table(path).num_rows for path in paths if path.suffix == ".parquet"}
    assert rows == {"trials": 5, "baselines": 2, "curves": 6, "sets": 0}


def test_the_page_shows_the_pictures_of_the_best_trial_with_the_answers_of_its_predictions(tmp_path):
    study_dir = report_studies.make(tmp_path / "study", num=4)
    assert page_document(read_study(study_dir))["changed_images"] == []
    report_studies.keep_thumbnails(study_dir)
    view = read_study(study_dir)
    document = write_page(view, tmp_path / "page.html")
    table = read_predictions(view.best.place(study_dir) / "predictions" / "validation.parquet")
    alphas = sorted({0.0, view.best.alpha, 1.0})
    everywhere = {name: changed(table, name, alphas) for name in ("id_val", "noisy", "blurry")}
    num_images = sum(len(ids) for found in everywhere.values() for ids in found.values())
    assert sum(group["num_images"] for group in document["changed_images"]) == num_images
    shown = [one for group in document["changed_images"] for one in group["images"]]
    assert len(shown) == min(48, num_images)
    assert len({one["set"] for one in shown}) == 3
    for one in shown:
        assert [answer["alpha"] for answer in one["answers"]] == alphas
        assert len({answer["right"] for answer in one["answers"]}) == 2
        for answer in one["answers"]:
            assert answer["right"] == (answer["answer"] == one["label"])
    check_page(tmp_path / "page.html", document)
    pictures = [at["src"] for tag, at in Tags((tmp_path / "page.html").read_text()).found if tag == "img"]
    assert sorted(pictures[-len(shown) :]) == sorted(one["picture"] for one in shown)
    recipe = view.recipe.model_copy(update={"evaluate": view.recipe.evaluate.model_copy(update={"thumbnails": 0})})
    set_recipe(study_dir, recipe)
    assert page_document(read_study(study_dir))["changed_images"] == []
