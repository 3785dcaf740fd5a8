"""The documents: links lead somewhere, what they say to type works, and the site of them is whole and of one piece."""

import ast
import json
import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import crash_host
import pytest
from PIL import Image
from suggestions import check_suggestions, parsed
from test_init import write_tree

import carft_ray
from carft_ray import errors, layout, training
from carft_ray.cli import app
from carft_ray.data import decode_images
from carft_ray.data.sandbox import CLASSES, render
from carft_ray.launch import nodes, search_gives_up
from carft_ray.launch.cluster import jobs
from carft_ray.launch.workers import file_transfer, mailbox, node_files
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.presets import BACKBONES
from carft_ray.store import heartbeat, log
from carft_ray.study import uploads
from carft_ray.study.retries import LOST_ATTEMPTS
from carft_ray.training import loop, thumbnails

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*.md", "docs/*.md", "search_spaces/*.md", "cluster/*.md", "benchmarks/*.md", "examples/**/*.md")
DOCUMENTS = tuple(path.relative_to(ROOT).as_posix() for place in PLACES for path in sorted(ROOT.glob(place)))
INTERVAL = r"-?[\d.]+ \[[^]]+\]"  # a number with the ends of its interval


def anchors(path):
    """The addresses of the headings of a document, as viewers of repositories make them."""
    return anchors_of(path.read_text())


def anchors_of(text):
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    titles = [re.sub(r"\]\([^)]*\)", "", title) for title in re.findall(r"(?m)^#+ (.*)$", text)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings_and_each_page_is_named_by_another():
    texts = {name: (ROOT / name).read_text() for name in DOCUMENTS}
    for name, whole in texts.items():
        path = ROOT / name
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?ms)^```.*?^```", "", whole)):
            if re.match(r"[a-z]+:", link):
                continue
            place, _, anchor = link.partition("#")
            target = (path.parent / place).resolve() if place else path
            assert target.is_file(), (name, link)
            assert target.is_relative_to(ROOT), (name, link)
            assert not anchor or anchor in anchors(target), (name, link)
        if name not in ("README.md", "docs/index.md"):
            assert any(path.name in text for other, text in texts.items() if other != name), name


def test_every_public_name_is_in_a_document_and_a_table_has_the_functions_that_are_commands():
    text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS if "/" not in name or name.startswith("docs/"))
    methods = [name for name in vars(carft_ray.Study) if not name.startswith("_") and name != "path"]
    names = [*carft_ray.__all__, *training.__all__, *methods]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    rows = re.findall(r"(?m)^\| (`\w+\(.*?) \|", (ROOT / "docs/python.md").read_text())
    listed = {name for row in rows for name in re.findall(r"`(\w+)\(", row)}
    assert listed & commands == commands & {*carft_ray.__all__}


HELD = (  # by tests
    *("docs/storage.md", "docs/resume.md", "docs/clusters.md", "docs/trust.md", "docs/privacy.md"),
    "SECURITY.md",
)
NO_PROMISE = "<!-- no promise -->"  # of what is advice, a measurement or a definition


def statements(text):
    """Yields paragraphs, list items and table rows, without code, generated tables and lines that end in a colon."""
    text = re.sub(r"(?ms)^```.*?^```|^<!-- keys.*?^<!-- end -->", "", text)
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.startswith("|"):
            yield from block.splitlines()[2:]
        elif block.startswith("- "):
            yield from re.split(r"\n(?=- )", block)
        elif block and not block.startswith(("#", "    ")) and not re.fullmatch(r".*:", block):
            yield block


@pytest.mark.parametrize("document", HELD)
def test_each_statement_of_what_survives_who_is_trusted_and_where_it_runs_names_its_tests(document):
    for statement in statements((ROOT / document).read_text()):
        named = re.findall(r"<!-- (\w+\.py)::(\w+) -->", statement)
        assert bool(named) != (NO_PROMISE in statement), statement
        assert statement.count("<!--") == (len(named) or 1), statement
        for file, name in named:
            assert re.search(rf"(?m)^def {name}\(", (ROOT / "tests" / file).read_text()), name


WORDS = {1: "once a second", 2: "two", 3: "three", 5: "five", 10: "ten", 60: "a minute", 7 * 24 * 3600: "a week"}
NUMBERS = [  # which the tests above make small
    (
        "storage",
        f"copies of {log.PACKED} commits in one object, for quick reading; written every {log.PACK_EVERY} commits",
    ),
    ("storage", f"It uploads all other files every {WORDS[uploads.UPLOAD_EVERY_S]} seconds, and at the end."),
    ("storage", f"until its last heartbeat is {WORDS[heartbeat.READERS_SILENT_FOR_S / 60]} minutes old"),
    ("storage", f"the search tries a commit for {log.UNCLEAR_FOR_S:.0f} s"),
    ("resume", f"takes the study over after {heartbeat.SILENT_FOR_S:.0f} s without one"),
    ("resume", f"{WORDS[LOST_ATTEMPTS]} attempts at a trial in a row fail without advancing"),
    ("resume", f"A driver that is silent for {WORDS[mailbox.PATIENCE_S]}"),
    ("resume", f"The search asks Ray {WORDS[nodes.ASK_EVERY_S]}."),
    ("resume", f"metrics window (every {WORDS[loop.LOG_EVERY]} steps, and at the end of an epoch)"),
    ("resume", f"a node on which {WORDS[nodes.FAILURES]} attempts in a row were lost, and does not use it for "),
    ("resume", f"does not use it for {WORDS[nodes.LEFT_OUT_S / 60]} minutes;"),
    (
        "resume",
        f"in {WORDS[search_gives_up.WAVES_TO_GIVE_UP]} waves ({WORDS[search_gives_up.FAILURES_TO_GIVE_UP]} at least)",
    ),
    ("clusters", f"does not answer for up to {WORDS[jobs.HEAD_MAY_BE_AWAY_S]}."),
    ("clusters", f"kills a job {jobs.STOP_WAIT_S} s after a stop"),
    ("clusters", f"in pieces of {file_transfer.PIECE_BYTES // 2**20} MiB"),
    ("clusters", f"files of a killed process after {WORDS[node_files.KEPT_FOR_S]}."),
    ("privacy", f"at most {thumbnails.SIDE} pixels wide or high"),
    ("trust", f"images above {decode_images.LARGE // 10**6} million pixels one at a time"),
]


@pytest.mark.parametrize(("document", "words"), NUMBERS)
def test_the_numbers_of_these_statements_are_those_of_the_code(document, words):
    assert words in " ".join((ROOT / f"docs/{document}.md").read_text().split())


def told():
    """All texts of the package, where a value is put into one as ``...``."""
    for path in (ROOT / "carft_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_each_error_and_exit_code_has_its_rows_with_messages_of_the_package_and_commands_that_parse():
    text = (ROOT / "docs/troubleshoot.md").read_text()
    classes = {name: kind for name, kind in vars(errors).items() if str(name).endswith("Error")}
    rows = re.findall(r"(?m)^\| (\d+) \| `(\w+)` \|.*\]\(#([\w-]+)\)", text)
    assert {name: int(code) for code, name, _ in rows} == {name: kind.exit_code for name, kind in classes.items()}
    sections = {anchor: part for part in text.split("\n## ") for anchor in anchors_of(f"## {part}")}
    texts = {*told()}
    for _, name, anchor in rows:
        assert f"(`{name}`)" in sections[anchor]
        assert "| message |" in sections[anchor]
    for cell in re.findall(r"(?m)^\| (`.*?) \|", text):
        for message in re.findall(r"`([^`]+)`", cell):
            parts = message.split("...")
            assert any(all(part in text for part in parts) for text in texts), message
    commands = re.findall(r"`(carft-ray [a-z][^`]*)`", text.replace("`carft-ray needs `", ""))
    assert len(commands) >= 40
    for command in commands:
        parsed(shlex.split(command)[1:])


def test_each_file_of_a_study_has_a_row():
    text = (ROOT / "docs/study_files.md").read_text()
    names = [each for name, each in vars(layout).items() if name.isupper() and isinstance(each, str)]
    assert [name for name in [*names, *layout.FOLDERS.values()] if name not in text] == []


def code_lines():
    """Yields the lines of all code blocks, fenced or indented, with continued lines joined and prompts removed."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        fenced = re.findall(r"(?ms)^```[a-z]*\n(.*?)^```", text)
        rest = re.sub(r"(?ms)^```.*?^```", "", text)
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        lines += [line for line in rest.replace("\\\n", " ").splitlines() if line.startswith("    ")]
        yield from ((name, line.strip().removeprefix("$ ").removeprefix(".venv/bin/")) for line in lines)


def documented(program):
    return [(name, line) for name, line in code_lines() if line.split(" ")[0] == program]


def test_documented_commands_parse_and_their_recipes_take_the_settings():
    for document, line in documented("carft-ray"):
        given = parsed(shlex.split(line, comments=True)[1:]).params
        recipe = ROOT / (given.get("recipe") or "none")
        if recipe.is_file():
            load_recipe(recipe, given["set_"] or [])
        for word in line.split():
            assert not word.startswith("search_spaces/") or (ROOT / word).is_file(), (document, line)


def test_documented_targets_are_in_the_makefile():
    targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
    for document, line in documented("make"):
        words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
        assert set(words) <= set(targets), f"{document}: {line}"


def test_the_readme_has_the_commands_of_a_search_and_of_the_tests_in_one_block_and_ci_runs_the_tests_by_its_command():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 130
    commands = re.findall(r"(?m)^\$ (.*)$", re.findall(r"(?ms)^```console\n(.*?)^```", readme)[0])
    assert commands == ["make quickstart", "make test"]
    assert commands[1] in (ROOT / ".ci/run").read_text().splitlines()


def test_the_numbers_with_intervals_in_readme_and_results_are_those_of_comparisons_that_are_kept():
    """The rows of the README's table as a whole, numbers in prose one by one, whatever their sign is called."""
    kept = [json.loads(path.read_text())["tables"] for path in (ROOT / "benchmarks/tables").glob("*.json")]
    tests = [re.findall(INTERVAL, line) for tables in kept for line in tables.get("test", ())]
    lines = [line.replace("+", "") for tables in kept for table in tables.values() for line in table]
    singles = {number for line in lines for number in re.findall(INTERVAL, line)}
    readme, results = ((ROOT / name).read_text().replace("+", "") for name in ("README.md", "docs/results.md"))
    table = re.search(r"(?ms)^\| results on test sets.*?\n\n", readme)[0]
    rows = [re.findall(INTERVAL, line) for line in table.splitlines()[2:]]
    assert rows
    assert [row for row in rows if not any(row == numbers[: len(row)] for numbers in tests)] == []
    assert [number for number in re.findall(INTERVAL, readme + results) if number not in singles] == []


def test_ci_runs_each_test_once_but_those_of_clusters():
    makefile = (ROOT / "Makefile").read_text()
    rules = dict(re.findall(r"(?m)^([\w-]+):.*\n\t@.*-m '([^']+)'$", makefile))
    targets = re.findall(r"(?m)^make ([\w-]+)$", (ROOT / ".ci/run").read_text())
    run = [rules[target] for target in targets if target in rules]
    for whole, cluster in product((True, False), repeat=2):
        times = sum(eval(marks, {"whole": whole, "nodes": cluster}) for marks in run)
        assert times == (not cluster), (run, whole, cluster)


def test_the_recipe_of_the_readme_is_one(tmp_path):
    write_tree(tmp_path / "my_images", ["photo", "painting", "sketch"], images=1)
    (written,) = re.findall(r"(?ms)^```yaml\n(.*?)^```", (ROOT / "README.md").read_text())
    assert len(written.splitlines()) == 12
    (tmp_path / "mine.yaml").write_text(written)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert {*recipe.search.space} == {"learning_rate", "kl_weight"}
    assert recipe.data.id_test is not None


def test_the_ranges_of_the_documentation_are_those_of_init_and_of_the_recipes():
    lines = [line for line in (ROOT / "docs/ranges.md").read_text().splitlines() if re.match(r"\| (`|anything)", line)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    written = {row[0].strip("`"): row[1:5] for row in rows if len(row) == 6}
    of_init = {
        name or "anything else": [" to ".join(of.learning_rate), of.start, " to ".join(of.kl_weight), of.kl_start]
        for name, of in BACKBONES.items()
    }
    assert written == of_init
    found = set()
    for names, model, rates, weights, epochs, batch, trials in (row for row in rows if len(row) == 7):
        each, numbers = re.findall(r"`([\w-]+)`", names), trials.split(", ")
        for name, number in zip(each, numbers if len(numbers) > 1 else numbers * len(each), strict=True):
            recipe = load_recipe(ROOT / f"search_spaces/{name}.yaml")
            for key, ends in (("learning_rate", rates), ("kl_weight", weights)):
                parameter = recipe.search.space[key]
                assert [parameter.low, parameter.high] == [float(end) for end in ends.split(" to ")], name
            sizes = recipe.train.epochs, recipe.train.batch_size, recipe.search.trials
            assert sizes == (int(epochs), int(batch), int(number)), name
            assert recipe.model.name.removesuffix("-quickgelu") == model
            found.add(name)
    assert found == {path.stem for path in (ROOT / "search_spaces").glob("*.yaml")}


@pytest.mark.whole
@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md"])
def test_the_commands_of_a_document_run(tmp_path, monkeypatch, capsys, document):
    """In their order, on a small folder of images that is drawn instead; what ``init`` writes is made short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(line):
        code = crash_host.call(shlex.split(line)[1:])
        told = capsys.readouterr()
        assert code == 0, f"{line}\n{told.out}\n{told.err}"
        check_suggestions(told.err)

    for domain, name, index in product(("photo", "painting", "negative", "sketch"), CLASSES, range(10)):
        path = tmp_path / "my_images" / domain / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(domain, "train", name, index)[0]).save(path)
    write_tree(tmp_path / "PACS", ["photo", "art_painting", "cartoon", "sketch"], images=3)
    for name, written in documented("carft-ray"):
        line = written.partition("  #")[0]
        if name != document or re.search("studies/(quickstart|on_ray)|sandbox images", line):
            continue  # other tests run these, or they make the folder of images
        is_init = line.startswith("carft-ray init") and "recipe.yaml" in line
        if is_init and "--model" not in line:
            run(line)
            assert "ViT-B-16" in (tmp_path / "recipe.yaml").read_text()  # what a reader gets; its weights are not here
            (tmp_path / "recipe.yaml").unlink()
            line += " --model sandbox"
        run(line.replace("trials=8", "trials=2").replace("epochs=4", "epochs=1"))
        if is_init:
            text = (tmp_path / "recipe.yaml").read_text().replace("resources:\n", "resources:\n  executor: debug\n")
            for key, value in (("trials", 2), ("epochs", 1), ("batch_size", 32)):  # seconds instead of minutes
                text = re.sub(rf"{key}: \d+", f"{key}: {value}", text)
            (tmp_path / "recipe.yaml").write_text(text)
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / document).read_text()):
        exec(block.replace('"search.trials": 8', '"search.trials": 2'), {})
        assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "studies/mine/figure.png").is_file()
    exported = {path.name for path in (tmp_path / "exports/mine").iterdir()}
    assert {"open_clip_config.json", "class_head.safetensors", "README.md", "recipe.yaml"} <= exported


@pytest.mark.whole
def test_the_site_has_every_document_and_public_name_and_loads_nothing_from_elsewhere(tmp_path):
    """As ``make docs`` builds it, without a warning."""
    site = tmp_path / "site"
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in line]
    words = line.split("-m sphinx ")[1].replace("build/site", str(site)).replace("build/", f"{tmp_path}/")
    done = subprocess.run([sys.executable, "-m", "sphinx", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    first = (site / "README.html").read_text()
    for name in DOCUMENTS:
        page = name.removesuffix(".md") + ".html"
        assert (site / page).is_file()
        assert name == "README.md" or f'href="{page}"' in first, page
    assert "url=README.html" in (site / "index.html").read_text()
    text = (site / "docs/api.html").read_text()
    names = [f"carft_ray.{name}" for name in carft_ray.__all__ if name != "__version__"]
    names += [f"carft_ray.training.{name}" for name in training.__all__]
    assert [name for name in names if f'id="{name}"' not in text] == []
    assert "&lt;function" not in text
    for page in site.rglob("*.html"):
        assert not re.search(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(?:https?:)?//', page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", style.read_text()), style
