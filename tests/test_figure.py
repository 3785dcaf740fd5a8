"""The figures: they exist whole, say what they must, and stand degenerate input."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from carft_ray.errors import StorageError
from carft_ray.results.figure import Curve, Dot, id_ood_figure, write

pytestmark = pytest.mark.slow

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BASELINES = {"zero-shot": (0.725, 0.575), "plain fine-tuning": (0.781, 0.491), "paper's setting": (0.774, 0.542)}
ALPHAS = np.array(GRID)
CURVE = Curve(GRID, 0.725 + 0.05 * ALPHAS, 0.575 + 0.05 * ALPHAS - 0.06 * ALPHAS**2, 0.4, 0.745, 0.585, 0.009, None)
SAME = Curve(GRID, [0.7] * 6, [0.6] * 6, 0.1, 0.7, 0.6, 0, 0)
DOTS = [Dot(0.75 + 0.01 * k, 0.55 + 0.03 * (k % 3), 10 ** (k / 3 - 1)) for k in range(9)]


def check(png, svg, size):
    with Image.open(png) as image:
        assert image.size == size
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all()
    assert pixels.std() > 3  # not blank
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(path.name for path in png.parent.iterdir()) == sorted([png.name, svg.name])


@pytest.mark.parametrize(
    ("points", "baselines", "best", "kind"),
    [
        pytest.param(DOTS, BASELINES, CURVE, "harmonic", id="search"),
        pytest.param([Dot(0.7, 0.6, 1.0)] * 5, {"zero-shot": (0.7, 0.6)}, SAME, "worst_domain", id="identical"),
        pytest.param(
            [Dot(0.7, 0.6, None), Dot(0.8, 0.5, 0.0, meets=False)], BASELINES, None, "weighted_mean", id="no kl_weight"
        ),
        pytest.param([Dot(0, 0, 1e-3), Dot(1, 1, 1e3), Dot(np.nan, 0.5, 1)], {}, None, "weighted_mean", id="extremes"),
        pytest.param([], {}, None, "weighted_mean", id="nothing"),
    ],
)
def test_id_ood_figure_stands_any_points(tmp_path, points, baselines, best, kind):
    png, svg = tmp_path / "out" / "f.png", tmp_path / "out" / "f.svg"
    write(id_ood_figure(points, baselines, best, "Search", kind=kind), png, svg)
    check(png, svg, (1600, 1200))


def test_the_same_study_gives_the_same_bytes_and_titles_say_synthetic_only_when_told(tmp_path):
    import matplotlib

    found = []
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        for number, synthetic in enumerate((False, False, True)):
            png, svg = tmp_path / f"{number}.png", tmp_path / f"{number}.svg"
            write(id_ood_figure(DOTS, BASELINES, CURVE, "Search", synthetic=synthetic), png, svg)
            assert ("Search (synthetic images)" in svg.read_text()) == synthetic
            found.append((png.read_bytes(), svg.read_bytes()))
    assert found[0] == found[1]
    for text in ("best trial, alpha 0.4", "plain fine-tuning", "OOD accuracy", "0.5 ID + 0.5 OOD"):
        assert text in svg.read_text()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    taken = tmp_path / "f.png"
    taken.mkdir()
    with pytest.raises(StorageError, match=rf"{taken}: must be writable"):
        write(id_ood_figure([], {}, None, "Search"), taken, tmp_path / "f.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]


def test_importing_the_module_does_not_load_matplotlib():
    code = "import sys, carft_ray.results.figure; assert not {'matplotlib', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
