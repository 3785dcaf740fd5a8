"""The site of the documents: built without a warning, whole, and nothing in it asks a network."""

import asyncio
import re
import subprocess
import sys

import browser
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


@pytest.mark.skipif(browser.program() is None, reason="needs a Chromium")
def test_pages_fit_a_phone_and_the_search_finds(site, tmp_path):
    asyncio.run(_look(site, tmp_path))


async def _look(site, folder):
    async with browser.browser(folder) as page:

        async def show(path, width):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            await page.call("Emulation.setDeviceMetricsOverride", **size)
            await page.call("Page.navigate", url=path)
            while not await page.evaluate(f"document.readyState === 'complete' && location.href === {path!r}"):
                await asyncio.sleep(0.1)

        for width in (390, 1280):
            for name in DOCUMENTS:
                await show((site / name).with_suffix(".html").as_uri(), width)
                assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
        await show((site / "search.html").as_uri() + "?q=alpha", 1280)
        while not await page.evaluate("document.querySelectorAll('#search-results li').length > 5"):
            await asyncio.sleep(0.1)
        assert page.problems == []
