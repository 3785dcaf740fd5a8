"""The site of the documents: built without a warning, whole, and nothing in it asks a network."""

import re
import subprocess
import sys

import pytest
from documents import DOCUMENTS, ROOT

import carft_ray
from carft_ray import training

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in line]
    words = line.split("-m sphinx ")[1].replace("build/site", str(folder / "site")).replace("build/", f"{folder}/")
    command = [sys.executable, "-m", "sphinx", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "site"


def test_every_document_is_a_page_that_the_navigation_names(site):
    first = (site / "README.html").read_text()
    for name in DOCUMENTS:
        page = name.removesuffix(".md") + ".html"
        assert (site / page).is_file()
        assert name == "README.md" or f'href="{page}"' in first, page
    assert "url=README.html" in (site / "index.html").read_text()


def test_every_public_name_is_in_the_reference(site):
    text = (site / "docs/api.html").read_text()
    names = [f"carft_ray.{name}" for name in carft_ray.__all__ if name != "__version__"]
    names += [f"carft_ray.training.{name}" for name in training.__all__]
    assert [name for name in names if f'id="{name}"' not in text] == []
    assert "&lt;function" not in text


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not re.search(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(?:https?:)?//', page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", style.read_text()), style
