"""The names that the packages give out: those that are listed here, each with a docstring and in the documents."""

import importlib
import re
from pathlib import Path

import pytest

import carft_ray

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
ACTIONS = {"confirm", "evaluate", "export", "load_recipe", "report", "resume", "search", "train"}
API = {"Study", "__version__", "open_study", *ACTIONS}
LEARNING = {"RunContext", "context_distribution", "context_kl", "fine_tune", "load_clip", "mix_weights"}
PUBLIC = {"carft_ray": API, "carft_ray.cli": {"app", "main"}, "carft_ray.training": LEARNING}
PACKAGES = sorted(".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("carft_ray/**/__init__.py"))


def test_a_package_gives_out_the_names_that_are_listed_each_with_a_docstring():
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = getattr(module, "__all__", [])
        assert len(names) == len({*names})
        assert {*names} == PUBLIC.get(package, set()), package
        for name in names:
            assert isinstance(getattr(module, name), str) or getattr(module, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'test'"):  # which the command line has alone
        carft_ray.test  # noqa: B018


def test_each_name_of_the_api_stands_in_a_document_and_so_do_the_methods_of_a_study():
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    methods = [name for name in vars(carft_ray.Study) if not name.startswith("_") and name != "path"]
    for name in [*API, *LEARNING, *methods]:
        assert re.search(rf"\b{name}\b", text), name
