"""What stands in examples/ runs as it stands there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import short_training

import carft_ray

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


@pytest.mark.whole
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


@pytest.mark.whole
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


@pytest.mark.whole
def test_a_process_that_has_a_ray_is_told_to_take_it(tmp_path):
    lines = run(tmp_path, "-c", OTHER, short_training.make(tmp_path)).splitlines()
    messages = [line for line in lines if line.startswith("address: must be 'auto': this process is connected to")]
    assert [line.partition(", but got ")[2] for line in messages] == ["none, which starts another Ray", "127.0.0.1:1"]
    assert lines[-1] == "True"
    assert not (tmp_path / "other" / "trials").exists()


@pytest.mark.whole
def test_a_search_runs_inside_a_job_that_has_a_ray(tmp_path):
    recipe = short_training.make(tmp_path)
    out = run(tmp_path, EXAMPLES / "inside_a_ray_job.py", recipe, tmp_path / "study")
    best = carft_ray.open_study(tmp_path / "study").best
    lines = out.splitlines()
    assert lines[0] == "ready"
    assert lines[-1].startswith(f"best {best.objective:.3f} with {{'learning_rate': ")  # by a task after the search
