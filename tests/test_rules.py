"""The rules of the house as tests: layers, doorways, light imports, commands that the documents show."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "carft_ray"
# a layer may import those that stand after it
LAYERS = ("cli", "results", "launch", "search", "evaluation", "learning", "data", "recipe", "base")
SIDE_BY_SIDE = ("search", "evaluation")  # neither imports the other
TOP_FILES = {"cli": "cli", "console": "cli", "progress": "cli", "errors": "base", "files": "base", "__init__": "base"}
DOORWAYS = {
    "open_clip": ("learning",),
    "optuna": ("search",),
    "ray": ("launch",),
    "typer": ("cli",),
    "rich": ("cli",),
    "matplotlib": ("results",),
    "ruamel": ("recipe",),
    "pydantic": ("recipe",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else TOP_FILES[path.stem]


def imports_of(path):
    """All modules that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "carft_ray":
                yield from (f"carft_ray.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    layer = layer_of(path)
    for module in imports_of(path):
        pieces = module.split(".")
        if pieces[0] != "carft_ray" or len(pieces) == 1 or not pieces[1][0].islower():
            continue
        target = TOP_FILES.get(pieces[1], pieces[1])
        assert LAYERS.index(target) >= LAYERS.index(layer), f"{path} ({layer}) imports {module}"
        assert {layer, target} != set(SIDE_BY_SIDE), f"{path} ({layer}) imports {module}"


@pytest.mark.parametrize("library", DOORWAYS)
def test_each_outside_library_has_one_doorway(library):
    users = {layer_of(path) for path in FILES for module in imports_of(path) if module.split(".")[0] == library}
    assert users <= set(DOORWAYS[library])
    assert users, f"nothing uses {library}"


def test_no_module_unpickles_or_names_a_path_of_one_machine():
    for path in FILES:
        assert "pickle" not in set(imports_of(path)), path
        assert not re.search(r"[\"'](/home|/root|/work|/tmp)/", path.read_text()), path


@pytest.mark.parametrize(
    "module",
    [
        "carft_ray",
        "carft_ray.cli",
        "carft_ray.recipe.loading",
        "carft_ray.data.sets",
        "carft_ray.learning.catalog",
    ],
)
def test_light_modules_load_neither_torch_nor_ray_nor_optuna(module):
    code = f"import sys, {module}; print([n for n in ('torch', 'ray', 'optuna', 'open_clip') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def documented_commands():
    for name in ("README.md", "CONTRIBUTING.md", "search_spaces/README.md", "cluster/README.md"):
        for line in (ROOT / name).read_text().splitlines():
            match = re.match(r"^\s*(?:\$ )?(carft-ray .*)$", line)
            if match:
                yield name, match[1]


def test_documents_show_commands():
    assert len(list(documented_commands())) >= 8


@pytest.mark.parametrize(("document", "line"), list(documented_commands()))
def test_documented_commands_parse(document, line):
    import typer.main

    from carft_ray.cli import app

    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    assert context.params, line


def test_help_of_every_command_shows_an_example():
    import typer.main

    from carft_ray.cli import app

    def leaves(command):
        for child in command.commands.values():
            yield from leaves(child) if hasattr(child, "commands") else [child]

    for command in leaves(typer.main.get_command(app)):
        assert "Example:" in (command.epilog or ""), command.name
