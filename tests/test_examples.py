"""What stands in examples/ runs as it stands there; the wheel, in an empty environment, needs nothing of a clone."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import short_training

import carft_ray

pytestmark = pytest.mark.whole

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def run(folder, *words):
    """Runs Python in a folder, with a home of its own."""
    own = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    own["RAY_ADDRESS"] = "local"  # `ray.init()` starts one, whatever else runs on this machine
    own |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "jupyter")}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_notebook_runs_from_top_to_bottom_and_shows_what_it_found(tmp_path):
    run(tmp_path, "-c", RUN, EXAMPLES / "quickstart.ipynb", tmp_path / "after.ipynb")
    cells = json.loads((tmp_path / "after.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = {"".join(cell["source"]).partition("\n")[0]: cell["outputs"] for cell in code}
    assert not [one for shown in outputs.values() for one in shown if one.get("name") == "stderr"]
    searched = outputs['study = carft_ray.search(recipe, "studies/notebook")']
    assert [one["output_type"] for one in searched] == ["display_data", "execute_result"]  # progress, and the study
    assert "3 of 3 trials finished" in "".join(searched[0]["data"]["text/html"])
    assert "fine_tuning" in "".join(searched[1]["data"]["text/html"])
    assert "image/svg+xml" in outputs["study.figure"][0]["data"]
    assert "iframe" in "".join(outputs["report = carft_ray.report(study.path)"][-1]["data"]["text/html"])
    assert (tmp_path / "exports" / "notebook" / "open_clip_config.json").is_file()


def test_images_of_an_own_source_are_searched(tmp_path):
    out = run(tmp_path, EXAMPLES / "own_data_source.py", "own")
    best = carft_ray.open_study(tmp_path / "own" / "study").best
    assert best.name in out
    assert best.metrics.keys() >= {"accuracy/id_val", "accuracy/dark"}


OTHER = """
import sys, ray, carft_ray
ray.init(num_cpus=1)
for address in (None, "127.0.0.1:1"):
    try:
        carft_ray.search(sys.argv[1], "other", address=address, progress=False)
    except carft_ray.errors.ClusterError as error:
        print(error)
print(ray.is_initialized())
"""


def test_a_process_that_has_a_ray_is_told_to_take_it(tmp_path):
    lines = run(tmp_path, "-c", OTHER, short_training.make(tmp_path)).splitlines()
    messages = [line for line in lines if line.startswith("address: must be 'auto': this process is connected to")]
    assert [line.partition(", but got ")[2] for line in messages] == ["none, which starts another Ray", "127.0.0.1:1"]
    assert lines[-1] == "True"
    assert not (tmp_path / "other" / "trials").exists()


def test_a_search_runs_inside_a_job_that_has_a_ray(tmp_path):
    recipe = short_training.make(tmp_path)
    out = run(tmp_path, EXAMPLES / "inside_a_ray_job.py", recipe, tmp_path / "study")
    best = carft_ray.open_study(tmp_path / "study").best
    lines = out.splitlines()
    assert lines[0] == "ready"
    assert lines[-1].startswith(f"best {best.objective:.3f} with {{'learning_rate': ")  # by a task after the search


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
SHORT = {"search.trials": 2, "train.epochs": 1, "search.baselines": "{}", "data.id_val.num_per_class": 20}
SHORT["data.ood_val"] = "{painting: {source: sandbox, domain: painting, split: val, num_per_class: 10}}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
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


def test_the_wheel_holds_the_package_and_its_recipes_and_nothing_else(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"carft_ray", f"{installed.wheel.name.split('-py3')[0]}.dist-info"}
    recipes = {path.name for path in (ROOT / "search_spaces").glob("*.yaml")}
    assert {Path(name).name for name in names if name.startswith("carft_ray/search_spaces/")} >= recipes
    data = {path.suffix for path in (ROOT / "carft_ray").rglob("*") if path.is_file()} - {".py", ".pyc"}
    assert data <= {Path(name).suffix for name in names} | {""}


def test_it_searches_from_an_empty_folder(installed):
    installed("init", "--preset", "quickstart", "--to", "recipe.yaml")
    settings = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    found = json.loads(installed("search", "recipe.yaml", "--study", "studies/first", *settings, "--json"))
    assert found["trials"]["complete"] == 2, found
    assert json.loads(installed("status", "studies/first", "--json"))["trials"]["complete"] == 2
    installed("export", "studies/first", "--to", "exports/first")
    installed("report", "studies/first", "--html")
    assert (installed.folder / "studies/first/report.html").stat().st_size > 1e6


def test_it_shows_the_path_and_completes(installed):
    assert "carft-ray init --preset quickstart" in installed()
    more = {"_CARFT_RAY_COMPLETE": "complete_bash", "COMP_WORDS": "carft-ray sea", "COMP_CWORD": "1"}
    assert installed(**more).split() == ["search"]
