"""Private names of Ray and Optuna: what each does, and the message where a release has it no more."""

import subprocess
import sys

import optuna
import pytest
import ray

from carft_ray.errors import UsageError
from carft_ray.launch.ray_cluster import ray_private
from carft_ray.study.proposals import optuna_private


def test_ray_reads_its_mode_of_authentication_and_its_token_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where a user may have a token
    for mode, token in (("token", "a" * 32), ("disabled", ""), ("token", "b" * 32)):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        ray_private.read_authentication_anew()
        loader = ray._raylet.AuthenticationTokenLoader.instance()
        assert ray._raylet.get_authentication_mode() == getattr(ray._raylet.AuthenticationMode, mode.upper())
        assert loader.get_raw_token(ignore_auth_mode=True) == token
    monkeypatch.undo()
    ray_private.read_authentication_anew()


@pytest.mark.slow
def test_the_column_types_of_ray_that_run_code_are_known_and_taken_away():
    program = (
        "import ray.data._internal.object_extensions.arrow, ray.tune, ray.train.torch\n"
        "from carft_ray.launch.ray_cluster.ray_private import forget_pickled_columns\n"
        "print(*forget_pickled_columns())\n"
        "print(*forget_pickled_columns())\n"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    kinds = ("pickled_object", "tensor", "tensor_v2", "variable_shaped_tensor")
    assert found.splitlines() == [" ".join(f"ray.data.arrow_{kind}" for kind in kinds), ""]


@pytest.mark.parametrize("name", ["get_draining_nodes", "available_resources_per_node"])
def test_a_release_that_does_not_tell_of_its_nodes_is_named(monkeypatch, name):
    state = ray._private.state
    monkeypatch.delattr(type(state.state) if name == "get_draining_nodes" else state, name)
    with pytest.raises(UsageError, match=rf"state\.{name}, which carft-ray uses"):
        (ray_private.draining_nodes if name == "get_draining_nodes" else ray_private.resources_of_nodes)()


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
    worker = ray._private.worker
    with ray_private.without_news_of_workers():
        assert worker._worker_logs_enabled is False
    assert worker._worker_logs_enabled is True
    monkeypatch.delattr(worker, "_worker_logs_enabled")
    told = rf"_worker_logs_enabled, which carft-ray uses, but got release {ray.__version__}"
    with pytest.raises(UsageError, match=told), ray_private.without_news_of_workers():
        pass
    with pytest.raises(UsageError, match=rf"_trial_id, which carft-ray uses, but got release {optuna.__version__}"):
        optuna_private.trial_id(object())
