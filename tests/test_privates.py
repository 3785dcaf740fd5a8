"""Versions outside the ranges of pyproject.toml, told at start; private names of Ray and Optuna, and their lack."""

import subprocess
import sys
from pathlib import Path

import crash_host
import oldest
import optuna
import pytest
import ray
from packaging.requirements import Requirement

from carft_ray import environment
from carft_ray.errors import UsageError
from carft_ray.launch.cluster import ray_private
from carft_ray.study.proposals import optuna_private

REQUIRED = ("alpha[one,two]<3,>=2.5", "beta>=1.2", "gamma>=4; extra == 'more'", "absent>=1")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts installed distributions before the real ones; carft-ray requires ``REQUIRED``."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(required=(), **versions):
        for name, version in versions.items():
            about = tmp_path / f"{name}-{version}.dist-info"
            about.mkdir()
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            (about / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in required), ""]))

    install(REQUIRED, carft_ray="0.1.0")
    return install


def texts(extra=""):
    return [[str(problem) for problem in problems] for problems in environment.outside_ranges(extra)]


@pytest.mark.parametrize("version", ["2.9.1", "2.5.0a0+git1f2e", "2.5+cpu", "2.6.dev3"])
def test_a_library_within_its_range_or_missing_is_not_told_nor_a_build_that_leads_to_it(installed, version):
    installed(alpha=version, beta="1.2", gamma="3")
    assert texts() == [[], []]


def test_libraries_outside_their_range_are_told_with_version_range_and_command(installed):
    installed(alpha="3.1", beta="1.1", gamma="3")
    newer = "alpha 3.1: carft-ray was run with >=2.5,<3 only; run: pip install 'alpha[one,two]>=2.5,<3'"
    assert texts() == [["beta 1.1: carft-ray needs >=1.2; run: pip install 'beta>=1.2'"], [newer]]
    assert texts("more") == [["gamma 3: carft-ray needs >=4; run: pip install 'gamma>=4'"], []]  # of an extra
    assert texts("less") == [[], []]


def test_a_command_refuses_an_older_library_with_exit_code_2_and_goes_on_with_a_newer_one(installed, capsys):
    installed(alpha="3.1")
    recipe = Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml"
    assert crash_host.call(["validate", recipe]) == 0
    assert capsys.readouterr().err.startswith("warning: alpha 3.1: carft-ray was run with >=2.5,<3 only; run: pip")
    installed(beta="1.1")
    assert crash_host.call(["validate", recipe]) == 2
    assert capsys.readouterr() == ("", "error: beta 1.1: carft-ray needs >=1.2; run: pip install 'beta>=1.2'\n")
    for words in (["search", "--help"], ["-h"], ["ls", "nowhere"]):  # help and the readers of studies take any version
        crash_host.call(words)
        assert "carft-ray needs" not in "".join(capsys.readouterr())


def test_the_constraints_of_the_oldest_releases_are_the_lower_bounds():
    """Each is within its own range; the program needs nothing installed."""
    done = subprocess.run([sys.executable, "-I", "-S", oldest.__file__], capture_output=True, text=True, check=True)
    lines, ranges = done.stdout.split(), list(map(Requirement, oldest.requirements()))
    assert len(lines) == len(ranges) >= 20
    for line, wanted in zip(lines, ranges, strict=True):
        name, version = line.split("==")
        assert name == wanted.name
        assert wanted.specifier.contains(version)
        assert [one.version for one in wanted.specifier if one.operator == ">="] == [version]


@pytest.mark.slow
def test_the_column_types_of_ray_that_run_code_are_known_and_taken_away():
    program = (
        "import ray.data._internal.object_extensions.arrow, ray.tune, ray.train.torch\n"
        "from carft_ray.launch.cluster.ray_private import forget_pickled_columns\n"
        "print(*forget_pickled_columns())\n"
        "print(*forget_pickled_columns())\n"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    kinds = ("pickled_object", "tensor", "tensor_v2", "variable_shaped_tensor")
    assert found.splitlines() == [" ".join(f"ray.data.arrow_{kind}" for kind in kinds), ""]


@pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning")  # of Ray's own data sets
def test_a_lean_trainer_starts_no_actors_for_data_sets_and_leaks(monkeypatch):
    from ray.train.torch import TorchTrainer

    def names(trainer):
        return {type(each).__name__ for each in trainer._create_default_callbacks()}

    plain = names(TorchTrainer(print))
    left_out = plain - names(ray_private.lean(TorchTrainer(print)))
    assert left_out in ({"DatasetsCallback", "PlacementGroupCleanerCallback"}, {"DatasetsSetupCallback"})
    assert "BackendSetupCallback" in plain - left_out
    monkeypatch.delattr(TorchTrainer.__mro__[1], "_initialize_and_run_controller")
    with pytest.raises(UsageError, match=r"TorchTrainer\._initialize_and_run_controller, which carft-ray uses"):
        ray_private.lean(TorchTrainer(print))


def test_a_release_without_a_name_is_told_with_release_and_name(monkeypatch):
    worker, state = ray._private.worker, ray._private.state
    with ray_private.without_news_of_workers():
        assert worker._worker_logs_enabled is False
    assert worker._worker_logs_enabled is True
    for owner, name, use in (
        (worker, "_worker_logs_enabled", lambda: ray_private.without_news_of_workers().__enter__()),
        (type(state.state), "get_draining_nodes", ray_private.draining_nodes),
        (state, "available_resources_per_node", ray_private.resources_of_nodes),
    ):
        monkeypatch.delattr(owner, name)
        with pytest.raises(UsageError, match=rf"{name}, which carft-ray uses, but got release {ray.__version__}"):
            use()
    with pytest.raises(UsageError, match=rf"_trial_id, which carft-ray uses, but got release {optuna.__version__}"):
        optuna_private.trial_id(object())
