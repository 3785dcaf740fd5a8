"""Texts of strangers go through ``untrusted`` and ``console``: what leads around them is used where it says here."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "carft_ray"
# what is used -> modules that may, each for its reason
MAY = {
    "print": {},
    "sys.stdout": {
        "ui/console.py": "is the gate; JSON has no control characters",
        "cli/submit.py": "the log of a job, through `visible`",
        "cli/validate.py": "a recipe as YAML, to be read back as it is",
        "launch/ray_cluster/spot.py": "our own words about a node",
    },
    "sys.stderr": {
        "cli/submit.py": "as above",
        "launch/ray_cluster/cluster.py": "our own words, in a thread while the process ends",
        "launch/jobs/package.py": "our own words at the beginning of a job",
    },
    "typer.echo": {"cli/program.py": "our own words", "cli/init.py": "a recipe as YAML, to be read back as it is"},
    "traceback.print_exc": {"cli/program.py": "--debug asks for it"},
    "Console": {
        "ui/console.py": "is the gate",
        "ui/notebook.py": "as the gate, for HTML",
        "ui/live.py": "a type",
        "ui/progress.py": "a type",
    },
    "Text": {
        "ui/console.py": "is the gate",
        "ui/live.py": "numbers, and `visible`",
        "ui/notebook.py": "`visible`",
    },
    ".print": {"ui/console.py": "is the gate", "ui/notebook.py": "as the gate", "ui/progress.py": "`console.plain`"},
    "from_markup": {},
    "from_ansi": {},
    "Markup": {"results/page/page.py": "what is Markup is not changed"},
    "markup=True": {},
    "html.escape": {"ui/notebook.py": "a whole page of ours in an attribute"},
    "saxutils": {},
    "csv.writer": {"data/copies/shared_images.py": "`csv_cell`"},
    "csv.DictWriter": {},
    "write_csv": {"results/report_tables.py": "`csv_cell`"},
    "to_csv": {},
}
SAFE = {"style", "scripts.first", "scripts.plotly", "scripts.page", "data"}  # our own, and JSON through `embedded`


LAST = {name.rpartition(".")[2] for name in MAY}


def used(tree):
    """Yields the names of ``MAY`` that code calls, imports or passes on, and others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        if isinstance(node, ast.Attribute) and node.attr in LAST:
            yield f".{node.attr}"
            yield node.attr if node.attr != "print" else ""
            yield f"{getattr(node.value, 'id', '')}.{node.attr}"
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").rpartition(".")[2]
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.keyword) and node.arg == "markup" and ast.unparse(node.value) != "False":
            yield "markup=True"


def test_texts_go_through_the_gates():
    found = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for name in {*used(ast.parse(path.read_text()))} & {*MAY}:
            found[name].add(path.relative_to(PACKAGE).as_posix())
    assert {name: found[name] for name in MAY} == {name: {*modules} for name, modules in MAY.items()}
    for module, reason in ((module, reason) for modules in MAY.values() for module, reason in modules.items()):
        if called := re.search(r"`(\w+)`", reason):
            assert f"{called[1]}(" in (text := (PACKAGE / module).read_text()) or f"({called[1]}," in text, module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.jinja")), ids=lambda path: path.name)
def test_templates_escape_all_but_what_is_ours(path):
    assert {*re.findall(r"\{\{ ([\w.]+)\|safe \}\}", path.read_text())} == SAFE
    assert len(re.findall(r"\bsafe\b|autoescape", path.read_text())) == len(SAFE)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.js")), ids=lambda path: path.name)
def test_scripts_make_no_code_of_texts(path):
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|import\("
    assert re.findall(ways, path.read_text()) == []
