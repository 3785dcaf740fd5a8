"""The wheel, installed into an empty environment, works from an empty folder: nothing of a clone is needed."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.whole

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
SHORT = {"search.trials": 2, "train.epochs": 1, "search.baselines": "{}", "data.id_val.num_per_class": 20}
SHORT["data.ood_val"] = "{painting: {source: sandbox, domain: painting, split: val, num_per_class: 10}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Builds the wheel, and runs its command in an empty folder.

    Its environment holds the wheel alone; what it depends on is seen in the environment of the tests by a ``.pth``.
    """
    folder = tmp_path_factory.mktemp("installed")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*PIP, *build], check=True)
    (wheel,) = folder.glob("carft_ray-*.whl")
    venv.create(folder / "env", symlinks=True)
    own = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder / "env")}))
    (own / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    install = ["--python", str(folder / "env/bin/python"), "install", "--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*PIP, *install, "-q", str(wheel)], check=True)
    (folder / "empty").mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("RAY_")}
    environment = {**kept, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "100"}

    def call(*words, **more):
        command = [str(folder / "env/bin/carft-ray"), *words]
        options = {"cwd": folder / "empty", "env": {**environment, **more}, "capture_output": True, "text": True}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call.folder, call.wheel = folder / "empty", wheel
    return call


def test_the_wheel_holds_the_package_and_its_recipes_and_nothing_else(run):
    names = zipfile.ZipFile(run.wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"carft_ray", f"{run.wheel.name.split('-py3')[0]}.dist-info"}
    recipes = {path.name for path in (ROOT / "search_spaces").glob("*.yaml")}
    assert {Path(name).name for name in names if name.startswith("carft_ray/search_spaces/")} >= recipes
    data = {path.suffix for path in (ROOT / "carft_ray").rglob("*") if path.is_file()} - {".py", ".pyc"}
    assert data <= {Path(name).suffix for name in names} | {""}


def test_it_searches_from_an_empty_folder(run):
    run("init", "--preset", "quickstart", "--to", "recipe.yaml")
    settings = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    found = json.loads(run("search", "recipe.yaml", "--study", "studies/first", *settings, "--json"))
    assert found["trials"]["complete"] == 2, found
    assert json.loads(run("status", "studies/first", "--json"))["trials"]["complete"] == 2
    run("export", "studies/first", "--to", "exports/first")
    run("report", "studies/first", "--html")
    assert (run.folder / "studies/first/report.html").stat().st_size > 1e6


def test_it_shows_the_path_and_completes(run):
    assert "carft-ray init --preset quickstart" in run()
    more = {"_CARFT_RAY_COMPLETE": "complete_bash", "COMP_WORDS": "carft-ray sea", "COMP_CWORD": "1"}
    assert run(**more).split() == ["search"]
