"""The repository: one version, the text for a package index, workflows, forms, containers, the stored notebook."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import check_jsonschema
import pytest
import yaml
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.specifiers import SpecifierSet

import carft_ray

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.github-issue-forms": [each for each in (ROOT / ".github").glob("*/*.yml") if "label:" in each.read_text()],
    "vendor.github-issue-config": [ROOT / ".github/ISSUE_TEMPLATE/config.yml"],
    "vendor.readthedocs": [ROOT / ".readthedocs.yaml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_workflows_and_forms_follow_their_schemas(schema):
    kind, _, name = schema.partition(".")
    known = Path(check_jsonschema.__file__).with_name("builtin_schemas") / kind
    # the oldest release that resolves with the other lower bounds (`make test-oldest`) lacks some
    if not any(file.stem in (name, name.replace("-", "_")) for file in known.iterdir()):
        pytest.skip(f"this release of check-jsonschema has no {schema}")
    assert SCHEMAS[schema]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *SCHEMAS[schema]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_names_majors_of_actions_and_runs_targets_of_the_makefile(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert more == ({"publish": {"id-token": "write"}} if path.stem == "release" else {})
    for used in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"\./\.github/workflows/\w+\.yml|[\w-]+/[\w-]+@(v\d+|release/v\d+)", used), used
        assert not used.startswith("./") or (ROOT / used).is_file()
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in workflow["jobs"].values()]
    called = set(re.findall(r"run: make ([\w-]+)", text)) | {
        target for each in matrices for target in each.get("target", ())
    }
    assert called <= set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))


def test_hosted_checks_run_what_a_change_must_pass_on_each_python_that_the_package_allows():
    jobs = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())["jobs"]
    run = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    nightly = (ROOT / ".github/workflows/nightly.yml").read_text()
    assert {*re.findall(r"(?m)^make .*$", (ROOT / ".ci/run").read_text())} - run == {"make test-whole"}
    assert "test-all" in nightly
    pythons = jobs["tests"]["strategy"]["matrix"]["python"]
    assert all(python in SpecifierSet(PROJECT["requires-python"]) for python in pythons)
    named = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.", text)}
    assert named <= {*pythons}
    assert PROJECT["requires-python"] == f">={pythons[0]}"


def built(monkeypatch, repository):
    """The metadata of a build, with the address of a repository or without."""
    monkeypatch.setenv("CARFT_RAY_REPOSITORY", repository)
    return ProjectMetadata(str(ROOT), PluginManager()).core


def test_the_version_stands_in_one_place(monkeypatch):
    assert "version" in PROJECT["dynamic"]
    metadata = ProjectMetadata(str(ROOT), PluginManager())
    assert metadata.version == carft_ray.__version__ == importlib.metadata.version("carft-ray")
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
    written = [path for path in (*ROOT.glob("[!.]*.*"), *ROOT.glob("docs/*.py")) if path.is_file()]
    assert not [path for path in written if re.search(r'(?<!cff-)version\W+"?\d+\.\d+\.\d+', path.read_text())]


def test_the_readme_of_a_release_has_the_addresses_of_its_files(monkeypatch):
    address = "https://example.org/someone/carft-ray"
    core, text = built(monkeypatch, f"{address}/"), (ROOT / "README.md").read_text()
    assert core.readme_content_type == "text/markdown"
    assert core.urls["Repository"] == address
    relative = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)
    assert relative
    tag = f"v{carft_ray.__version__}"
    links = re.findall(rf"\]\({address}/(?:blob|raw)/{tag}/([^)\s]+)\)", core.readme)
    assert links == relative
    assert re.findall(rf"!\[[^\]]*\]\({address}/raw/", core.readme)
    assert core.readme.replace(f"{address}/blob/{tag}/", "").replace(f"{address}/raw/{tag}/", "") == text


def test_a_build_without_an_address_keeps_the_readme(monkeypatch):
    core = built(monkeypatch, "")
    assert core.readme == (ROOT / "README.md").read_text()
    assert core.urls == {}


def test_commit_hooks_are_the_tools_of_make_lint():
    (own,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert own["repo"] == "local"  # of .venv, so of the releases that pyproject.toml allows
    (lint,) = re.findall(r"(?m)^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text())
    tools = [re.match(r"(?:python )?\S+", step)[0] for step in re.findall(r"\$\(BIN\)/(.*)", lint)]
    entries = [hook["entry"] for hook in own["hooks"]]
    assert len(entries) == len(tools)
    assert all(entry.startswith(f".venv/bin/{tool}") for entry, tool in zip(entries, tools, strict=True))


def test_the_map_of_the_code_names_files_and_folders_that_exist():
    package = ROOT / "carft_ray"
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = {path.name for path in package.rglob("*")}
    (table,) = re.findall(r"(?ms)^\| folder \|.*?\n\n", text)
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert {name.strip("/") for name in re.findall(r"(?m)^\| `(\w+/)`", table)} == folders
    for name in re.findall(r"`([\w./]+)`", re.sub(r"(?ms)^    .*?$", "", text)):
        if name.endswith((".py", ".js", "/")) and not any((place / name).exists() for place in (ROOT, package)):
            assert name.strip("/") in files, name  # in the folder of the name before it


def test_the_container_copies_files_that_are_sent_and_the_devcontainer_takes_a_stage_of_it():
    text = (ROOT / "Dockerfile").read_text()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for words in re.findall(r"(?m)^COPY (.*) \S+$", text) for word in words.split()}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    given = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    folder = ROOT / ".devcontainer"
    assert (folder / given["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert f" AS {given['build']['target']}\n" in text
    assert given["remoteUser"] in re.findall(r"(?m)^USER (\w+)$", text)
    assert given["postCreateCommand"] == "make lint"


def test_the_notebook_stores_the_outputs_of_all_its_cells_and_no_place_of_a_machine():
    path = ROOT / "examples/quickstart.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    shown = [cell["outputs"] for cell in cells if cell["outputs"]]
    assert len(shown) >= len(cells) - 2  # an import and the recipe show nothing
    kinds = {kind for outputs in shown for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/svg+xml", "text/plain"} <= kinds
    assert not [output for outputs in shown for output in outputs if output["output_type"] == "error"]
    assert not re.search(r"PosixPath\('/|/tmp/", path.read_text())
    assert path.stat().st_size < 300_000
    assert "iframe" not in path.read_text()
