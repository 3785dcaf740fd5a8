"""The page of `report --html` in a real browser: sliders and filters are moved, and what it shows is compared."""

import asyncio
import csv
import io
import json
import math
import time

import browser
import pytest
import report_studies
from report_studies import KINDS, make, write_page

from carft_ray.results.page.page import figures
from carft_ray.results.reading.study_view import read_study

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(browser.program() is None, reason="no Chromium: install the package chromium to run it"),
]
WIDTHS = (390, 1024, 1600)
METRICS = ("id_accuracy", "ood_accuracy", "objective")
METHODS = {False: "plain fine-tuning", True: "CAR-FT"}  # by whether there is a KL weight
# a figure is drawn, or says why not; no text is no number; nothing is wider than the screen
STATE = """(() => {
    const figures = [...document.querySelectorAll("figure.plot")].map((figure) => ({
        id: figure.id, height: figure.getBoundingClientRect().height,
        drawn: Boolean(figure.querySelector(".main-svg")), empty: Boolean(figure.querySelector(".empty")),
        marks: figure.querySelectorAll(".point, .points path, .js-line, .contourlevel, .bars path, .fills").length}));
    return {figures, text: document.body.innerText, wide: document.documentElement.scrollWidth};
})()"""
SET = """(() => {{
    const control = document.getElementById("{id}");
    control.value = "{value}";
    for (const name of ["input", "change"]) control.dispatchEvent(new Event(name, {{bubbles: true}}));
}})()"""
NAMES = 'document.getElementById("front").querySelector(".canvas").data.flatMap((trace) => trace.customdata ?? [])'
CLICK = "document.querySelector('{}').click()"
SHOWN = 'document.getElementById("shown").textContent'
OPTIONS = '[...document.getElementById("{}").options].map((one) => one.value)'
ROWS = '[...document.querySelectorAll("#trial-table tbody tr")].map((row) => [...row.cells].map((c) => c.textContent))'


class Window:
    """The page of a browser, whose calls are waited for (``wait``)."""

    def __init__(self, runner, page):
        self.wait, self.page = runner.run, page

    def open(self, path, *given, **more):
        self.wait(self.page.open(path, *given, **more))

    def evaluate(self, expression):
        return self.wait(self.page.evaluate(expression))


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with asyncio.Runner() as runner:
        session = browser.browser(tmp_path_factory.mktemp("profile"))
        yield Window(runner, runner.run(session.__aenter__()))
        runner.run(session.__aexit__(None, None, None))


@pytest.fixture
def page(window):
    """Its page; no script may fail and nothing may ask the network. What it has kept is forgotten afterwards."""
    yield window
    window.evaluate("(() => { sessionStorage.clear(); localStorage.clear(); })()")
    assert window.page.problems == []


def check(state, width):
    assert state["wide"] <= width
    for word in ("NaN", "undefined", "null", "Infinity"):
        assert word not in state["text"]
    for figure in state["figures"]:
        assert figure["drawn"] or figure["empty"], figure
        assert figure["marks"] or figure["empty"], figure
        assert figure["height"] > 150, figure


@pytest.fixture(scope="module")
def thirty(tmp_path_factory):
    """The page of a study of thirty trials with failures, and its document."""
    folder = tmp_path_factory.mktemp("thirty")
    view = read_study(make(folder / "study", **KINDS["thirty"]))
    return folder / "page.html", json.loads(json.dumps(write_page(view, folder / "page.html")))


def test_pages_of_all_kinds_are_drawn_at_all_widths_in_both_colours(tmp_path, page):
    for number, (kind, content) in enumerate(KINDS.items()):
        view = read_study(make(tmp_path / kind.replace(" ", "_"), **content))
        document = write_page(view, tmp_path / "page.html")
        names = [name for several in figures(document).values() for name in several]
        for width in WIDTHS if kind == "thirty" else WIDTHS[number % 3 :][:1]:
            page.open(tmp_path / "page.html", width, dark=number % 2 == 0)
            state = page.evaluate(STATE)
            assert [figure["id"] for figure in state["figures"]] == names
            check(state, width)
    paper = page.wait(page.page.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True))
    assert len(paper["data"]) > 14_000  # in base64
    check(page.evaluate(STATE), width)  # after the paper, as before


def test_the_slider_moves_alpha_along_all_curves_and_shows_the_measured_numbers(page, thirty):
    path, document = thirty
    shown = 'Object.fromEntries([...document.querySelectorAll("#alpha-table td")].map((cell) => '
    shown += "[`${cell.dataset.name} ${cell.dataset.metric}`, cell.textContent]))"
    diamonds = 'document.querySelector("#front .canvas").data.find((trace) => trace.meta === "diamonds").x'
    page.open(path)
    before = page.evaluate(diamonds)
    assert len(before) == len(document["curves"])
    page.evaluate(SET.format(id="alpha", value=0.2))
    points = {curve["name"]: curve["points"] for curve in document["curves"]}
    cells = [(*key.split(), text) for key, text in page.evaluate(shown).items() if key.split()[-1] in METRICS]
    assert len(cells) >= 3 * 5
    for name, metric, text in cells:
        [point] = [one for one in points[name] if one["alpha"] == 0.2]
        assert float(text) == pytest.approx(100 * point[metric], abs=0.0501)
    assert all(x != y for x, y in zip(before, page.evaluate(diamonds), strict=True))
    page.evaluate(SET.format(id="alpha", value=0.7))
    assert "between measured points" in page.evaluate('document.getElementById("alpha-text").textContent')
    page.evaluate(CLICK.format('[data-alpha="chosen"]'))
    best = document["status"]["best"]
    text = page.evaluate(shown)[f"{best['name']} id_accuracy"]
    assert float(text) == pytest.approx(100 * best["metrics"]["id_accuracy"], abs=0.0501)


def test_the_filters_drive_every_figure_and_the_table_and_stay_when_the_page_is_loaded_again(page, thirty):
    path, document = thirty
    complete = [row for row in document["trials"] if row["outcome"] == "complete"]
    complete = [row["name"] for row in sorted(complete, key=lambda row: -row["expected"])]
    best = complete[: -(-20 * len(complete) // 100)]
    page.open(path)
    assert page.evaluate(SHOWN) == "30 of 30 trials"
    assert {*page.evaluate(NAMES)} == {*complete}
    page.evaluate(CLICK.format('#outcomes input[value="diverged"]'))
    assert {row[0] for row in page.evaluate(ROWS)} == {*complete}
    page.evaluate(SET.format(id="top", value=20))
    assert {*page.evaluate(NAMES)} == {row[0] for row in page.evaluate(ROWS)} == {*best}
    assert "Fewer than 20 trials" in page.evaluate('document.querySelector("#contour .canvas").innerText')
    assert page.evaluate('document.querySelector("#history .canvas").data[0].x.length') == len(best)
    page.evaluate(CLICK.format('#outcomes input[value="complete"]'))
    check(page.evaluate(STATE), 1024)  # nothing passes, and every figure says so
    assert page.evaluate(SHOWN) == "0 of 30 trials"
    page.evaluate(CLICK.format('#filters button[type="reset"]'))
    time.sleep(0.5)
    assert page.evaluate(SHOWN) == "30 of 30 trials"
    page.evaluate(SET.format(id="top", value=20))
    page.open(path)
    assert page.evaluate(SHOWN) == f"{len(best)} of 30 trials"
    check(page.evaluate(STATE), 1024)


def test_the_page_can_be_read_without_scripts_and_its_colours_change_and_stay(page, thirty):
    path, _ = thirty
    page.open(path, scripts=False)
    tree = page.wait(page.page.call("DOM.getDocument", depth=-1))
    node = {"nodeId": tree["root"]["nodeId"], "selector": "noscript img"}
    picture = page.wait(page.page.call("DOM.querySelector", **node))
    box = page.wait(page.page.call("DOM.getBoxModel", nodeId=picture["nodeId"]))["model"]
    assert (box["width"], box["height"]) > (500, 300)
    ground = "getComputedStyle(document.body).backgroundColor"
    page.open(path)
    light = page.evaluate(ground)
    page.evaluate(CLICK.format("#theme"))
    page.evaluate(CLICK.format("#theme"))
    dark = page.evaluate(ground)
    page.open(path)
    assert page.evaluate(ground) == dark != light


def test_trials_of_one_method_are_filtered_and_shown_with_their_numbers(tmp_path, page):
    view = read_study(make(tmp_path / "study", **KINDS["several methods"]))
    document = write_page(view, tmp_path / "page.html")
    methods = {row["name"]: METHODS[bool(row["values"]["kl_weight"])] for row in document["trials"]}
    assert document["method_of"] == methods
    points = 'document.querySelector("#front .canvas").data.filter((trace) => trace.customdata)'
    points += ".flatMap((trace) => trace.customdata.map((name, i) => [name, trace.x[i]]))"
    page.open(tmp_path / "page.html")
    assert {*page.evaluate(OPTIONS.format("method"))} == {"", *METHODS.values()}
    for method in METHODS.values():
        page.evaluate(SET.format(id="method", value=method))
        wanted = {row["name"]: row for row in document["trials"] if methods[row["name"]] == method}
        assert page.evaluate(SHOWN) == f"{len(wanted)} of {len(methods)} trials"
        found = {name: 1 / (1 + math.exp(-x)) for name, x in page.evaluate(points)}
        assert found == pytest.approx({name: row["metrics"]["id_accuracy"] for name, row in wanted.items()}, abs=1e-9)
        objectives = page.evaluate('document.querySelector("#history .canvas").data[0].y')
        assert objectives == pytest.approx([100 * row["objective"] for row in wanted.values()])
        assert {row[0] for row in page.evaluate(ROWS)} == wanted.keys()


def test_a_page_of_very_many_trials_is_small_and_whole(tmp_path, page, thirty):
    view = read_study(make(tmp_path / "study", num=320, recipe=report_studies.make_recipe(320)))
    path = tmp_path / "page.html"
    write_page(view, path)
    assert path.stat().st_size - thirty[0].stat().st_size < 290 * 800  # bytes a trial
    page.open(path, 1024)
    state = page.evaluate(STATE)
    check(state, 1024)
    assert len({*page.evaluate(NAMES)}) == 320
    assert page.evaluate(SHOWN) == "320 of 320 trials"
    assert "trials are drawn, as many of each colour" in state["text"]
    marks = 'document.querySelector("#parallel .canvas").data.reduce((sum, one) => sum + one.x.length, 0)'
    assert page.evaluate(marks) < 200 * 8 + 1


def test_the_table_sorts_and_tables_are_copied_as_they_stand(page, thirty):
    path, document = thirty
    copy = """(async () => { let text;
        Object.defineProperty(navigator, "clipboard",
            {configurable: true, value: {writeText: async (given) => { text = given; }}});
        document.querySelector('[data-copy="%s"][data-table="%s"]').click();
        await new Promise((done) => setTimeout(done, 50)); return text; })()"""
    page.open(path)
    titles = page.evaluate('[...document.querySelectorAll("#trial-table thead th")].map((cell) => cell.textContent)')
    at = titles.index("learning rate")
    for backwards in (True, False):
        page.evaluate(f'document.querySelectorAll("#trial-table thead button")[{at}].click()')
        values = [float(row[at]) for row in page.evaluate(ROWS) if row[at]]
        assert values == sorted(values, reverse=backwards)
    rows = list(csv.DictReader(io.StringIO(page.evaluate(copy % ("csv", "trial-table")))))
    assert {row["trial"] for row in rows} == {row["name"] for row in document["trials"]}
    head, kinds, *lines = page.evaluate(copy % ("markdown", "sets-1")).splitlines()
    [table] = document["tables"]
    assert head.count("|") == kinds.count("|") == len(table["sets"]) + 3
    assert len(lines) == len(table["rows"]) + len(table["differences"])
    first = [cell.strip() for cell in lines[0].split("|")][3:-1]
    cells = [
        [f"{100 * value:.1f}" for value in (cell["mean"], cell["low"], cell["high"])]
        for cell in table["rows"][0]["cells"]
    ]
    assert first == [rf"{mean} \[{low}, {high}\]" for mean, low, high in cells]
    assert page.evaluate(copy % ("latex", "sets-1")).count(r"\\") == len(lines) + 1
