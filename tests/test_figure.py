"""The pictures: they exist whole, say what they must, and stand degenerate input."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks.effect_figure import Estimate, effect_figure
from carft_ray.errors import StorageError
from carft_ray.results.figure import Curve, Dot, id_ood_figure, write

pytestmark = pytest.mark.slow

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BASELINES = {"zero-shot": (0.725, 0.575), "plain fine-tuning": (0.781, 0.491), "paper's setting": (0.774, 0.542)}


def dots(num=12):
    rng = np.random.default_rng(0)
    return [Dot(0.75 + rng.normal(0, 0.02), 0.55 + rng.normal(0, 0.03), 10 ** rng.uniform(-1, 2)) for _ in range(num)]


def curve():
    alphas = np.array(GRID)
    return Curve(GRID, 0.725 + 0.05 * alphas, 0.575 + 0.05 * alphas - 0.06 * alphas**2, 0.4, 0.745, 0.5854, 0.009, None)


def check(png, svg, size):
    with Image.open(png) as image:
        assert image.size == size
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all()
    assert pixels.std() > 3  # not blank
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(path.name for path in png.parent.iterdir()) == sorted([png.name, svg.name])


@pytest.mark.parametrize(
    ("points", "baselines", "best"),
    [
        (dots(), BASELINES, curve()),
        ([Dot(0.7, 0.6, 1.0)], {}, None),
        ([Dot(0.7, 0.6, 1.0)] * 5, {"zero-shot": (0.7, 0.6)}, Curve(GRID, [0.7] * 6, [0.6] * 6, 0.1, 0.7, 0.6, 0, 0)),
        ([Dot(0.7, 0.6, None), Dot(0.8, 0.5, 0.0)], BASELINES, None),
        ([Dot(0.0, 0.0, 1e-3), Dot(1.0, 1.0, 1e3), Dot(float("nan"), 0.5, 1.0)], {}, None),
        ([], {}, None),
    ],
    ids=["search", "one trial", "identical", "without kl_weight", "extremes", "nothing"],
)
def test_id_ood_figure_stands_any_points(tmp_path, points, baselines, best):
    png, svg = tmp_path / "out" / "f.png", tmp_path / "out" / "f.svg"
    write(id_ood_figure(points, baselines, best, "Search", synthetic=True), png, svg)
    check(png, svg, (1600, 1200))


@pytest.mark.parametrize("kind", ["harmonic", "worst_domain"])
def test_id_ood_figure_draws_every_kind_of_objective(tmp_path, kind):
    png, svg = tmp_path / "f.png", tmp_path / "f.svg"
    write(id_ood_figure(dots(), BASELINES, curve(), "Search", kind=kind), png, svg)
    check(png, svg, (1600, 1200))


def test_the_same_study_gives_the_same_bytes(tmp_path):
    files = []
    for name in ("a", "b"):
        png, svg = tmp_path / f"{name}.png", tmp_path / f"{name}.svg"
        write(id_ood_figure(dots(), BASELINES, curve(), "Search"), png, svg)
        files.append((png.read_bytes(), svg.read_bytes()))
    assert files[0] == files[1]


@pytest.mark.parametrize("methods", [["zero-shot", "plain fine-tuning", "CAR-FT"], [f"m{i}" for i in range(6)], []])
def test_effect_figure(tmp_path, methods):
    columns = ["ID", "OOD mean", "sketch", "striped_photo"]
    effects = {
        method: {column: Estimate(0.7 - 0.02 * i, 0.69 - 0.02 * i, 0.72 - 0.02 * i) for column in columns}
        for i, method in enumerate(methods)
    }
    png, svg = tmp_path / "e.png", tmp_path / "e.svg"
    effect_figure(effects, png, svg, "Effect", words="95 % over seeds and images, 5 seeds", synthetic=True)
    check(png, svg, (1600, 960))


def test_titles_say_synthetic_only_when_told(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        for synthetic in (True, False):
            svg = tmp_path / "f.svg"
            write(id_ood_figure(dots(), BASELINES, curve(), "Search", synthetic=synthetic), svg)
            assert ("Search (synthetic images)" in svg.read_text()) == synthetic
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
