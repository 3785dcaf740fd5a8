"""The site of the documents: `make docs`. Sphinx with furo; nothing is loaded from a network, here or in the pages.

The source folder is the root of the repository, so that links between documents are the same here and in a viewer
of the repository. The README is the first page.
"""

import importlib
import re
from pathlib import Path

from sphinx.application import Sphinx

import carft_ray

ROOT = Path(__file__).resolve().parents[1]

project = "carft-ray"
author = "carft-ray contributors"
version = release = carft_ray.__version__
copyright = f"{author}, Apache-2.0"
language = "en"
highlight_language = "none"  # of blocks that name none
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "search_spaces/*.md", "cluster/*.md", "benchmarks/*.md", "examples/**/*.md"]
exclude_patterns = [".*", "build", "dist", "carft_ray", "tests", "studies", "runs", "exports", "**/__pycache__"]

myst_heading_anchors = 4  # as in a viewer of the repository
myst_enable_extensions = ["attrs_inline"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_display_short_literal_types = True
napoleon_numpy_docstring = False
add_module_names = False
suppress_warnings = ["toc.empty_glob"]

html_theme = "furo"
html_title = f"carft-ray {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # it would be fetched, which a page opened from a disk may not

# the pages by chapter, those that exist; a page of none is in "More"
CHAPTERS = {
    "Start": ("docs/install", "docs/tutorial", "docs/concepts"),
    "How-to": (
        *("docs/data", "docs/duplicates", "docs/cache", "docs/models", "docs/ranges", "docs/read_a_result", "docs/gpu"),
        *("docs/capacity", "docs/budget", "docs/objectives", "docs/samplers", "docs/clusters", "cluster/README"),
        *("docs/storage", "docs/resume"),
        *("docs/troubleshoot", "docs/privacy", "docs/own_trainer", "docs/exports", "docs/tracking"),
    ),
    "Reference": (
        *("docs/recipe", "docs/recipe_model", "docs/recipe_data", "docs/recipe_sources", "docs/recipe_train"),
        *("docs/recipe_search", "docs/recipe_sampler", "docs/recipe_run"),
        *("search_spaces/README", "docs/commands", "docs/python", "docs/api", "docs/study_files"),
        *("docs/benchmarks", "docs/corruptions", "docs/decoding", "examples/pacs/README"),
    ),
    "Why": (
        *("docs/method", "docs/results", "docs/expected", "docs/soups"),
        *("docs/honesty", "docs/pruning", "docs/scale", "docs/trust"),
        "SECURITY",
    ),
    "The project": ("CONTRIBUTING", "CODE_OF_CONDUCT", "CHANGELOG", "benchmarks/README"),
}


def _pages() -> dict[str, list[str]]:
    """Returns the pages that are there, by chapter."""
    there = {path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.glob("docs/*.md")}
    named = {page for pages in CHAPTERS.values() for page in pages}
    chapters = {title: [page for page in pages if (ROOT / f"{page}.md").is_file()] for title, pages in CHAPTERS.items()}
    return chapters | {"More": sorted(there - named)}


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    """Adds the navigation to the first page, and the public names to the reference."""
    if page == root_doc:
        for title, pages in _pages().items():
            if pages:
                lines = ["```{toctree}", ":hidden:", f":caption: {title}", "", *(f"/{one}" for one in pages), "```"]
                source[0] += "\n" + "\n".join(lines) + "\n"
    if page == "docs/api":
        for module in ("carft_ray", "carft_ray.training"):
            source[0] = source[0].replace(f"<!-- {module} -->", _directives(module))


def _directives(module: str) -> str:
    """Returns what documents each public name of a module."""
    home = importlib.import_module(module)
    lines = []
    for name in sorted(home.__all__, key=str.lower):
        value = getattr(home, name)
        if isinstance(value, str):
            continue
        kind = "autoclass" if isinstance(value, type) else "autofunction"
        lines += [f".. {kind}:: {module}.{name}", *(["   :members:"] if kind == "autoclass" else []), ""]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def _sign(
    app: Sphinx, what: str, name: str, value: object, options: object, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Writes ``...`` for a default that is a function."""
    short = (
        re.sub(r"<function [^>]*>?>", "...", signature.replace("~", ""))
        if signature and "<function" in signature
        else signature
    )
    return short, returned


def setup(app: Sphinx) -> None:
    """Registers what is above."""
    app.connect("autodoc-process-signature", _sign)
    app.connect("source-read", _read)
