"""Names and texts that are markup, code or control characters somewhere, through everything that shows a study."""

import asyncio
import csv
import io
import re

import browser
import pyarrow as pa
import pytest
import short_training
from logs import holding
from report_studies import fail, fill, keep_thumbnails, make_recipe, write_page
from rich.console import Console

import carft_ray
from carft_ray import cli
from carft_ray.data.duplicates.find_duplicates import SharedRow
from carft_ray.data.duplicates.shared_images import read_shared, write_shared
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.report import write_tables
from carft_ray.results.study_card import Line, latex_card, text_card
from carft_ray.study.opening import open_study
from carft_ray.study.provenance import record_of
from carft_ray.untrusted import csv_cell, html, is_name, latex, markdown, of_csv_cell, visible

STEERING = {"\x1b", "\x07", "\u202e", "\u2028"}
CLASS_NAMES = ["[red]", "\x1b]0;owned\x07\u202e", "=1+1", '</script><img src=x onerror="document.title=1">', "$\\frac$"]
LONG = "x" * 255
REASON = f"[/dev/shm] {CLASS_NAMES[1]} </script><script>document.title=1</script> $x$ =1+1 \u2028 {LONG}"
IMAGES = ("data.train", "=1+1.png", 1, "leaves", "data.id_val", "'=../../x\x1b.png", 2, "stays")
SHARED = SharedRow(*IMAGES, "same bytes", 0.0)


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory):
    recipe = make_recipe(8).model_dump(mode="json", exclude_unset=True)
    recipe["data"]["ood_test"] = {"strange": {"source": "folder", "path": f"/images/{''.join(CLASS_NAMES)}/{LONG}"}}
    folder = tmp_path_factory.mktemp("strange") / LONG[:100]
    with open_study(folder, Recipe.model_validate(recipe)) as study:
        fill(study, 6, lambda number: number == 3)
        fail(study, study.next(), reason=REASON)
    keep_thumbnails(folder, 8, 16)
    facts = {"code": {"version": REASON}, "versions": {}, "hardware": {"host": CLASS_NAMES}, "seeds": {}}
    provenance = {"class_names": CLASS_NAMES, "test_sets": {"ood_test.strange": {}}, **facts}
    with holding(folder) as log:
        log.write(record_of(provenance))
    write_shared(folder, [SHARED])
    return folder


def test_a_folder_whose_name_has_lines_forges_no_row_of_a_table(tmp_path, monkeypatch):
    for domain in ("photo", "sketch\nforged  forged  train\t5"):
        for label, name in enumerate(("dog", "cat\nforged: true")):
            for index in range(6):
                short_training.write_image(tmp_path / "images" / domain / name / f"{index}.png", label, index)
    stream = io.StringIO()
    for name in ("out", "err"):
        monkeypatch.setattr(f"carft_ray.ui.console.{name}", Console(file=stream, width=200))
    recipe = tmp_path / "recipe.yaml"
    cli.app(["init", "--from", str(tmp_path / "images"), "--to", str(recipe)], standalone_mode=False)
    rows = stream.getvalue().partition("Wrote ")[0].splitlines()
    assert len(rows) == 3, rows
    assert r"sketch\nforged  forged  train\t5" in rows[2]
    [shift] = load_recipe(recipe).data.ood_val.values()
    assert shift.domains == ("sketch\nforged  forged  train\t5",)


@pytest.mark.slow
def test_commands_print_nothing_that_steers_the_terminal(study_dir, monkeypatch):
    for command in ("ls", "status", "report", "report --card text"):
        stream = io.StringIO()
        for name in ("out", "err"):
            console = Console(file=stream, width=100, soft_wrap=name == "err")
            monkeypatch.setattr(f"carft_ray.ui.console.{name}", console)
        name, *options = command.split()
        cli.app([name, str(study_dir), *options], standalone_mode=False)
        assert len(stream.getvalue().splitlines()) > 5
        assert not STEERING & set(stream.getvalue())


@pytest.fixture(scope="module")
def page(study_dir):
    path = study_dir.parent / "page.html"
    return path, write_page(read_study(study_dir), path)


@pytest.mark.slow
def test_the_page_holds_every_text_and_no_script_of_a_name(page):
    text = page[0].read_text()
    own = re.findall("(?s)<script.*?</script>", text)
    rest = text.replace(own[2], "")  # of Plotly, which has control characters
    assert len(own) == 4
    assert not STEERING & set(rest)
    assert "<img src=x" not in rest
    assert "&lt;/script&gt;&lt;img src=x onerror=" in rest
    assert r"\x1b]0;owned\x07\u202e" in rest


FOREIGN = "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
# a figure's text, of the page and as Plotly has drawn it; what an attribute or a handler of a name has done
SEEN = """({text: document.body.innerText, title: document.title, wide: document.documentElement.scrollWidth,
    pictures: document.querySelectorAll('img[src="x"]').length})"""


@pytest.mark.whole
@pytest.mark.skipif(browser.program() is None, reason="no Chromium: install the package chromium to run it")
@pytest.mark.parametrize("width", [390, 1024])
def test_a_browser_shows_the_names_and_runs_none(page, tmp_path, width):
    async def look():
        async with browser.browser(tmp_path / "profile") as one:
            await one.open(page[0], width)
            seen = await one.evaluate(SEEN)
            assert one.problems == []
            await one.evaluate(FOREIGN)
            await one.evaluate("new Promise((end) => setTimeout(end, 50))")
            await one.call("DOM.getDocument")
            assert ["Content Security" in problem for problem in one.problems] == [True]
            assert await one.evaluate("document.title") == seen["title"]
            return seen

    seen = asyncio.run(look())
    assert (seen["title"], seen["pictures"]) == ("kinds: report", 0)
    assert seen["wide"] <= width
    for name in CLASS_NAMES[:1] + CLASS_NAMES[2:]:
        assert name in seen["text"]


def test_a_card_is_valid_in_every_form_whatever_it_says():
    lines = [Line("Result", True, f"{name} {LONG}") for name in CLASS_NAMES]
    lines += [Line("Seeds", False, r"\input{/etc/passwd} ~^|<> #&%")]
    text, latex = text_card(lines, CLASS_NAMES[3]), latex_card(lines, CLASS_NAMES[3])
    assert not STEERING & {*text, *latex}
    assert "[red]" in text
    escaped = r"\\(textbackslash|textasciitilde|textasciicircum|textbar|textless|textgreater){}|\\[#$%&_{}]"
    plain = re.sub(escaped, "", latex)
    assert {*re.findall(r"\\[a-z]*", plain)} == {r"\begin", r"\end", r"\linewidth", r"\multicolumn", "\\"}
    assert not set("$#^_~") & set(plain)


def test_the_tables_of_shared_images_are_no_formulas_and_read_back_as_written(tmp_path):
    write_shared(tmp_path, [SHARED])
    with (tmp_path / "shared_images.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["image"], row["other_image"]) == ("'=1+1.png", "''=../../x\x1b.png")
    assert read_shared(tmp_path) == [SHARED]


@pytest.mark.slow
def test_the_tables_of_a_report_hold_no_formula(study_dir, tmp_path):
    tables = {"own": pa.table({"=a": ["=1+1", "-x", None, "fine"], "number": [-1.0, 2.0, None, 3.0]})}
    write_tables(tables, tmp_path)
    rows = list(csv.reader(io.StringIO((tmp_path / "own.csv").read_text())))
    assert rows == [["'=a", "number"], ["'=1+1", "-1"], ["'-x", "2"], ["", ""], ["fine", "3"]]
    carft_ray.report(study_dir).save_tables(tmp_path / "report")
    for path in (tmp_path / "report").glob("*.csv"):
        cells = [cell for row in csv.reader(io.StringIO(path.read_text())) for cell in row]
        assert not [cell for cell in cells if re.match(r"[=+@\t\r]|-(?![\d.])", cell)]


# ---- the gates for names and texts


def test_what_may_leave_a_folder_is_no_name():
    assert all(map(is_name, ("t0001-ab", "a", "A.b_c-9", "x" * 200)))
    others = ("", ".", "..", ".a", "-a", "a/b", "../a", "/a", "a\n", "a\0", "ü", "a b", "x" * 201)
    assert not any(map(is_name, others))


# how a text is shown, the text, and what is written
SHOWN = [
    (visible, "a\tb\nüñ 日本 [red] e\u0301", "a\tb\nüñ 日本 [red] e\u0301"),
    (visible, "\x1b]0;x\x07", r"\x1b]0;x\x07"),
    (visible, "a\u202eb\u2066c\u200fd\r\x9b\ud800\u2028", r"a\u202eb\u2066c\u200fd\r\x9b\ud800\u2028"),
    (latex, r"50 % of {a}_b\input{x}", r"50 \% of \{a\}\_b\textbackslash{}input\{x\}"),
    (latex, "~^$&#", r"\textasciitilde{}\textasciicircum{}\$\&\#"),
    (latex, "[red]\n\n<a|b>", r"{}[red] \textless{}a\textbar{}b\textgreater{}"),
    (markdown, "a\n# <b> [x](y) `c` $x$", r"a # \<b\> \[x\](y) \`c\` \$x\$"),
    (markdown, "_a_ id_val __b", r"\_a\_ id_val \_\_b"),
    (html, "</script>\x1b\" '&", r"&lt;/script&gt;\x1b&quot; &#x27;&amp;"),
    *((csv_cell, text, f"'{text}") for text in ("=1+1", "+1", "-1", "@a", "'=1", "''-")),
    *((csv_cell, text, text) for text in ("a=1", "'tis", "'", "")),
]


@pytest.mark.parametrize(("show", "text", "written"), SHOWN)
def test_a_text_is_shown_as_it_is_and_steers_nothing_and_a_cell_is_read_back(show, text, written):
    assert show(text) == written
    assert show is not csv_cell or of_csv_cell(written) == text
