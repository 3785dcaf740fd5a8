"""The page of `report --html` in a real browser: sliders and filters are moved, and what it shows is compared."""

import asyncio
import csv
import io
import json
import math
from pathlib import Path
from urllib.parse import unquote, urlparse

import browser
import crash_host
import forging
import pytest
import report_studies
from report_studies import KINDS, make, write_page

from carft_ray.results.page.data import page_document
from carft_ray.results.page.figures import figures
from carft_ray.results.reading.study_view import read_study
from carft_ray.study.opening import open_study

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(browser.program() is None, reason="no Chromium: install the package chromium to run it"),
]
WIDTHS = (390, 1024, 1600)
# a figure is drawn, or says why not; no text is no number; nothing is wider than the screen
STATE = """(() => {
    const figures = [...document.querySelectorAll("figure.plot")].map((figure) => ({
        id: figure.id, height: figure.getBoundingClientRect().height,
        drawn: Boolean(figure.querySelector(".main-svg")), empty: Boolean(figure.querySelector(".empty")),
        marks: figure.querySelectorAll(".point, .points path, .js-line, .contourlevel, .bars path, .fills").length}));
    return {figures, text: document.body.innerText, wide: document.documentElement.scrollWidth,
        ids: [...document.querySelectorAll("[id]")].map((element) => element.id)};
})()"""
MOVE = """(() => {{
    const slider = document.getElementById("{id}");
    slider.value = {value};
    slider.dispatchEvent(new Event("input", {{bubbles: true}}));
}})()"""
NAMES = 'document.getElementById("front").querySelector(".canvas").data.flatMap((trace) => trace.customdata ?? [])'
CLICK = "document.querySelector('{}').click()"


def run(tmp_path, steps):
    """Runs steps on a page of a new browser; no script may have failed and nothing may have asked the network."""

    async def all_of_it():
        async with browser.browser(tmp_path / "profile") as page:
            await steps(page)
            assert page.problems == []

    asyncio.run(all_of_it())


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


def test_pages_of_all_kinds_are_drawn_at_all_widths_in_both_colours(tmp_path):
    async def steps(page):
        for number, (kind, content) in enumerate(KINDS.items()):
            view = read_study(make(tmp_path / kind.replace(" ", "_"), **content))
            path = tmp_path / f"{kind}.html"
            document = write_page(view, path)
            for width in WIDTHS if kind == "thirty" else WIDTHS[number % 3 :][:1]:
                await page.open(path, width, dark=number % 2 == 0)
                state = await page.evaluate(STATE)
                assert [figure["id"] for figure in state["figures"]] == [
                    name for names in figures(document).values() for name in names
                ]
                check(state, width)
            await page.pdf(tmp_path / f"{kind}.pdf")
            assert (tmp_path / f"{kind}.pdf").stat().st_size > 10_000
            check(await page.evaluate(STATE), width)  # after the paper, as before

    run(tmp_path, steps)


def test_the_slider_moves_alpha_along_all_curves_and_shows_the_measured_numbers(tmp_path, thirty):
    path, document = thirty
    shown = 'Object.fromEntries([...document.querySelectorAll("#alpha-table td")].map((cell) => '
    shown += "[`${cell.dataset.name} ${cell.dataset.metric}`, cell.textContent]))"
    diamonds = 'document.querySelector("#front .canvas").data.find((trace) => trace.meta === "diamonds").x'

    async def steps(page):
        await page.open(path)
        before = await page.evaluate(diamonds)
        assert len(before) == len(document["curves"])
        for alpha in (0.2, 0.8):
            await page.evaluate(MOVE.format(id="alpha", value=alpha))
            cells = await page.evaluate(shown)
            assert len(cells) >= 3 * 5
            for curve in document["curves"]:
                point = next(one for one in curve["points"] if one["alpha"] == alpha)
                for metric in ("id_accuracy", "ood_accuracy", "objective"):
                    text = cells.get(f"{curve['name']} {metric}")
                    assert text is None or abs(float(text) - 100 * point[metric]) <= 0.0501
            after = await page.evaluate(diamonds)
            assert all(x != y for x, y in zip(before, after, strict=True))
            before = after
        await page.evaluate(MOVE.format(id="alpha", value=0.7))
        assert "between measured points" in await page.evaluate('document.getElementById("alpha-text").textContent')
        await page.evaluate(CLICK.format('[data-alpha="chosen"]'))
        best = document["status"]["best"]
        cells = await page.evaluate(shown)
        assert abs(float(cells[f"{best['name']} id_accuracy"]) - 100 * best["metrics"]["id_accuracy"]) <= 0.0501

    run(tmp_path, steps)


def test_the_filters_drive_every_figure_and_the_table(tmp_path, thirty):
    path, document = thirty
    complete = [row for row in document["trials"] if row["outcome"] == "complete"]
    rows = '[...document.querySelectorAll("#trial-table tbody tr")].map((row) => row.cells[0].textContent)'
    said = 'document.getElementById("shown").textContent'

    async def steps(page):
        await page.open(path)
        assert await page.evaluate(said) == "30 of 30 trials"
        assert {*await page.evaluate(NAMES)} == {row["name"] for row in complete}
        await page.evaluate(CLICK.format('#outcomes input[value="diverged"]'))
        assert {*await page.evaluate(rows)} == {row["name"] for row in complete}
        await page.evaluate(MOVE.format(id="top", value=20))
        best = sorted(complete, key=lambda row: -row["objective"])[: -(-20 * len(complete) // 100)]
        names = {row["name"] for row in best}
        assert {*await page.evaluate(NAMES)} == names
        assert {*await page.evaluate(rows)} == names
        assert await page.evaluate(said) == f"{len(best)} of 30 trials"
        contour = await page.evaluate('document.querySelector("#contour .canvas").innerText')
        assert "Fewer than 20 trials" in contour
        history = 'document.querySelector("#history .canvas").data[0].x.length'
        assert await page.evaluate(history) == len(best)
        await page.evaluate(CLICK.format('#outcomes input[value="complete"]'))
        check(await page.evaluate(STATE), 1024)  # nothing passes, and every figure says so
        assert await page.evaluate(said) == "0 of 30 trials"
        await page.evaluate(CLICK.format('#filters button[type="reset"]'))
        await asyncio.sleep(0.5)
        assert await page.evaluate(said) == "30 of 30 trials"
        check(await page.evaluate(STATE), 1024)

    run(tmp_path, steps)


def test_the_table_sorts_and_its_links_lead_to_the_folders(tmp_path, thirty):
    path, document = thirty
    titles = '[...document.querySelectorAll("#trial-table thead th")].map((cell) => cell.textContent)'
    column = '[...document.querySelectorAll("#trial-table tbody tr")].map((row) => row.cells[{}].textContent)'

    async def steps(page):
        await page.open(path)
        at = (await page.evaluate(titles)).index("learning rate")
        for backwards in (True, False):
            await page.evaluate(f'document.querySelectorAll("#trial-table thead button")[{at}].click()')
            values = [float(text) for text in await page.evaluate(column.format(at)) if text]
            assert values == sorted(values, reverse=backwards)
        sort = f'document.querySelectorAll("#trial-table thead th")[{at}].getAttribute("aria-sort")'
        assert await page.evaluate(sort) == "ascending"
        links = await page.evaluate('[...document.querySelectorAll("#trial-table a")].map((a) => a.href)')
        assert len(links) == len(document["trials"])
        assert all(Path(unquote(urlparse(link).path)).is_dir() for link in links)

    run(tmp_path, steps)


def test_the_colours_change_and_stay_and_the_page_can_be_read_without_scripts(tmp_path, thirty):
    path, _ = thirty
    ground = "getComputedStyle(document.body).backgroundColor"

    async def steps(page):
        await page.open(path)
        light = await page.evaluate(ground)
        await page.evaluate(CLICK.format("#theme"))
        await page.evaluate(CLICK.format("#theme"))
        dark = await page.evaluate(ground)
        assert light != dark
        await page.open(path)
        assert await page.evaluate(ground) == dark
        await page.open(path, scripts=False)
        tree = await page.call("DOM.getDocument", depth=-1)
        picture = await page.call("DOM.querySelector", nodeId=tree["root"]["nodeId"], selector="noscript img")
        box = await page.call("DOM.getBoxModel", nodeId=picture["nodeId"])
        assert box["model"]["width"] > 500
        assert box["model"]["height"] > 300

    run(tmp_path, steps)


def test_a_page_of_a_running_search_keeps_its_filters_when_it_is_loaded_again(tmp_path):
    async def steps(page):
        with open_study(tmp_path / "study", report_studies.make_recipe(9)) as study:
            report_studies.fill(study, 6)
            report_studies.start(study)
            write_page(read_study(tmp_path / "study"), tmp_path / "page.html")
        await page.open(tmp_path / "page.html")
        await page.evaluate(MOVE.format(id="top", value=50))
        shown = await page.evaluate('document.getElementById("shown").textContent')
        await page.open(tmp_path / "page.html")
        assert await page.evaluate('document.getElementById("shown").textContent') == shown
        check(await page.evaluate(STATE), 1024)

    run(tmp_path, steps)


def test_trials_on_one_kind_of_device_are_filtered(tmp_path):
    study_dir = make(tmp_path / "study", num=6)
    for number, path in enumerate(sorted(study_dir.glob("trials/*/*/result.json"))):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "environment": {"device": "T4" if number < 2 else "H100"}}))
    forging.record(study_dir)
    write_page(read_study(study_dir), tmp_path / "page.html")
    said, names = 'document.getElementById("shown").textContent', '[...document.getElementById("device").options]'
    choose = 'const e = document.getElementById("device"); e.value = "T4"; e.dispatchEvent(new Event("change"));'

    async def steps(page):
        await page.open(tmp_path / "page.html")
        assert not await page.evaluate('document.getElementById("device-label").hidden')
        assert await page.evaluate('document.getElementById("method-label").hidden')
        assert await page.evaluate(f"{names}.map((one) => one.value)") == ["", "T4", "H100"]
        await page.evaluate(f"(() => {{ {choose} }})()")
        assert await page.evaluate(said) == "2 of 6 trials"
        assert len(await page.evaluate(NAMES)) == 2

    run(tmp_path, steps)


def test_trials_of_one_method_are_filtered_and_shown_with_the_numbers_of_json(tmp_path, capsys):
    study_dir = make(tmp_path / "study", **KINDS["several methods"])
    assert crash_host.call(["report", str(study_dir), "--html", "--out", str(tmp_path / "page.html"), "--json"]) == 0
    capsys.readouterr()
    document = page_document(read_study(study_dir))
    assert crash_host.call(["ls", str(study_dir), "--sort", "number", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["trials"]
    methods = {row["name"]: "CAR-FT" if row["values"]["kl_weight"] else "plain fine-tuning" for row in printed}
    assert document["method_of"] == methods
    assert len({*methods.values()}) == 2
    said, names = 'document.getElementById("shown").textContent', '[...document.getElementById("method").options]'
    choose = '(() => {{ const e = document.getElementById("method"); e.value = "{}"; '
    choose += 'e.dispatchEvent(new Event("change")); }})()'
    trials = 'document.querySelector("#{} .canvas").data.filter((trace) => trace.customdata)'
    points = f"{trials.format('front')}.flatMap((trace) => trace.customdata.map((name, i) => [name, trace.x[i]]))"
    history = 'document.querySelector("#history .canvas").data[0]'
    rows = (
        '[...document.querySelectorAll("#trial-table tbody tr")].map((row) => [...row.cells].map((c) => c.innerText))'
    )

    async def steps(page):
        await page.open(tmp_path / "page.html")
        assert await page.evaluate(f"{names}.map((one) => one.value)") == ["", *dict.fromkeys(methods.values())]
        for method in ("plain fine-tuning", "CAR-FT"):
            await page.evaluate(choose.format(method))
            wanted = {row["name"]: row for row in printed if methods[row["name"]] == method}
            assert await page.evaluate(said) == f"{len(wanted)} of {len(printed)} trials"
            found = dict(await page.evaluate(points))
            assert found.keys() == wanted.keys()
            for name, x in found.items():
                assert 1 / (1 + math.exp(-x)) == pytest.approx(wanted[name]["metrics"]["id_accuracy"], abs=1e-9)
            numbers, heights = await page.evaluate(f"{history}.x"), await page.evaluate(f"{history}.y")
            assert numbers == [row["number"] for row in wanted.values()]
            assert heights == pytest.approx([100 * row["objective"] for row in wanted.values()])
            cells = {name: rest for name, *rest in await page.evaluate(rows)}
            assert cells.keys() == wanted.keys()
            for name, row in wanted.items():
                shown = [f"{100 * row['metrics'][key]:.1f}" for key in ("id_accuracy", "ood_accuracy", "objective")]
                assert [text for text in cells[name] if text in shown][:3] == shown
            check(await page.evaluate(STATE), 1024)

    run(tmp_path, steps)


def test_a_page_of_two_thousand_trials_is_small_and_whole(tmp_path):
    with open_study(tmp_path / "study", report_studies.make_recipe(2000)) as study:
        report_studies.fill(study, 60, lambda number: number % 3 > 0)
    study_dir, path = report_studies.multiply(tmp_path / "study", 2000), tmp_path / "page.html"
    document = write_page(read_study(study_dir), path)
    assert path.stat().st_size < 6_000_000
    complete = {row["name"] for row in document["trials"] if row["outcome"] == "complete"}
    marks = 'document.querySelector("#parallel .canvas").data.reduce((sum, one) => sum + one.x.length, 0)'

    async def steps(page):
        await page.open(path, 1024)
        state = await page.evaluate(STATE)
        assert [figure["id"] for figure in state["figures"]] == [
            name for names in figures(document).values() for name in names
        ]
        check(state, 1024)
        assert {*await page.evaluate(NAMES)} == complete
        said = 'document.getElementById("shown").textContent'
        assert await page.evaluate(said) == "2,000 of 2,000 trials"
        assert "trials are drawn, as many of each colour" in state["text"]
        assert await page.evaluate(marks) < 200 * 8 + 1
        await page.evaluate(MOVE.format(id="top", value=5))
        assert await page.evaluate(said) == f"{-(-len(complete) * 5 // 100)} of 2,000 trials"
        check(await page.evaluate(STATE), 1024)

    run(tmp_path, steps)


def test_tables_are_copied_as_they_stand(tmp_path, thirty):
    path, document = thirty
    catch = (
        'Object.defineProperty(navigator, "clipboard", {value: {writeText: async (text) => { window.copied = text; }}})'
    )
    copy = """(async () => { document.querySelector('[data-copy="%s"][data-table="%s"]').click();
        await new Promise((done) => setTimeout(done, 50)); return window.copied; })()"""

    async def steps(page):
        await page.open(path)
        await page.evaluate(catch)
        text = await page.evaluate(copy % ("csv", "trial-table"))
        rows = list(csv.DictReader(io.StringIO(text)))
        assert {row["trial"] for row in rows} == {row["name"] for row in document["trials"]}
        of_sets = await page.evaluate(copy % ("markdown", "sets-1"))
        head, kinds, *lines = of_sets.splitlines()
        [table] = document["tables"]
        assert head.count("|") == kinds.count("|") == len(table["sets"]) + 3
        assert len(lines) == len(table["rows"]) + len(table["differences"])
        first = [cell.strip() for cell in lines[0].split("|")][3:-1]
        assert first == [f"{100 * cell['mean']:.1f}" for cell in table["rows"][0]["cells"]]
        latex = await page.evaluate(copy % ("latex", "sets-1"))
        assert latex.startswith(r"\begin{tabular}{lr" + "r" * len(table["sets"]) + "}")
        assert latex.count(r"\\") == len(lines) + 1

    run(tmp_path, steps)


def test_the_pictures_of_changed_answers_are_shown_at_all_widths(tmp_path):
    study_dir = make(tmp_path / "study", num=4)
    report_studies.keep_thumbnails(study_dir)
    document = write_page(read_study(study_dir), tmp_path / "page.html")
    number = sum(len(group["images"]) for group in document["changed_images"])
    drawn = '[...document.querySelectorAll(".images img")].filter((one) => one.naturalWidth && one.width <= 96).length'

    async def steps(page):
        for width in WIDTHS:
            await page.open(tmp_path / "page.html", width)
            await page.evaluate('document.getElementById("changed-images").open = true')
            assert await page.evaluate(drawn) == number > 0
            check(await page.evaluate(STATE), width)

    run(tmp_path, steps)
