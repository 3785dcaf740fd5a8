"""The Ray that a command starts for itself: who can reach it, and what of it stays in the process."""

import contextlib
import inspect
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import stand_in
from killed_searches import wait_until

import cluster
from carft_ray.errors import ClusterError
from carft_ray.launch.cluster import cluster as cluster_module
from carft_ray.launch.cluster.cluster import running_ray

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Ray takes 127.0.0.1 for the address of this machine in its network, where our own Ray does not listen
CLIENT = (
    "import ray, sys; ray._private.services.resolve_ip_for_localhost = str; "
    "ray.init(address=sys.argv[1], log_to_driver=False); print(len(ray.nodes()))"
)


@pytest.fixture(autouse=True)
def _no_token(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def known():
    return {name: os.environ.get(name) for name in VARIABLES}


def client(address, **variables):
    surroundings = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    surroundings |= {"RAY_AUTH_TOKEN_PATH": "", **variables}
    command = [sys.executable, "-c", CLIENT, address]
    return subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def listening():
    """What listens in the processes of a Ray that this process has started: addresses, by name of the process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [(process.name(), one.laddr) for one in process.net_connections() if one.status == "LISTEN"]
    return found


@pytest.mark.whole
def test_our_own_ray_is_closed_to_others_and_leaves_no_token_in_the_process(tmp_path, monkeypatch):
    """Where the first two starts took too long for Ray, as on a busy machine."""
    before, calls, start = known(), [], ray.init

    def init(**options):
        calls.append(options)
        if len(calls) <= 2:
            raise Exception("The current node timed out during startup. This could happen because ...")
        return start(**options)

    monkeypatch.setattr(ray, "init", init)
    with running_ray(None, tmp_path / "ray.log") as nodes:
        assert (len(nodes), len(calls)) == (1, 3)
        assert not calls[-1]["include_dashboard"]
        socket = Path(ray.nodes()[0]["ObjectStoreSocketName"])
        address = ray.get_runtime_context().gcs_address
        assert len(os.fsencode(socket)) <= 107
        outer = next(folder for folder in socket.parents if folder.name.startswith("carft-"))
        assert stat.S_IMODE(outer.stat().st_mode) == 0o700
        there = ray.get(ray.remote(num_cpus=0)(lambda: dict(os.environ)).remote())
        assert (there["RAY_AUTH_MODE"], there["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")
        assert there["MALLOC_ARENA_MAX"] == os.environ["MALLOC_ARENA_MAX"]
        for token, comes_in in ((None, False), ("0" * 64, False), (os.environ["RAY_AUTH_TOKEN"], True)):
            found = client(address, **({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}))
            assert (found.returncode == 0) == comes_in
            assert comes_in or "token" in found.stdout
        wait_until(lambda: any("DashboardAg" in name for name, _ in listening()), "its agent listens")
        found = listening()
        assert len(found) >= 5
        assert [each for each in found if each[1].ip.removeprefix("::ffff:") != "127.0.0.1"] == []
        assert {each[1].port for each in found}.isdisjoint({52365, 44217, 44227})  # those that `ray start` takes
    assert known() == before
    assert not outer.exists()
    assert not (tmp_path / ".ray" / "auth_token").exists()


@pytest.mark.whole
def test_a_process_that_had_a_ray_of_its_own_attaches_to_a_cluster_with_the_token_of_the_user(tmp_path, monkeypatch):
    with cluster.head(1, dashboard=False) as there:
        token_file = tmp_path / ".ray" / "auth_token"
        token_file.parent.mkdir()
        token_file.write_text(there.environment["RAY_AUTH_TOKEN"])
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        for address in (None, there.address):
            with running_ray(address, tmp_path / "ray.log"):
                assert ray.get(ray.remote(num_cpus=0)(lambda: 7).remote()) == 7
                port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
                assert (port == there.address.rpartition(":")[2]) == (address is not None)


@pytest.mark.whole
def test_what_the_user_has_set_of_authentication_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    before = known()
    with running_ray(None, tmp_path / "ray.log"):
        seen = ray.get(ray.remote(num_cpus=0)(lambda: dict(os.environ)).remote())
        assert seen["RAY_AUTH_MODE"] == "disabled"
    assert known() == before


# a program that calls a search, and gets a signal as its whole process group does
HOST = """
import os, signal, sys
from pathlib import Path
import stand_in
from carft_ray.errors import InterruptedRunError
from carft_ray.launch.events import TrialEpoch
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.workers.runtime import Runner

told = []

def on_event(event):
    if isinstance(event, TrialEpoch) and not told:
        told.append(event)
        os.killpg(0, signal.SIGTERM)

recipe = stand_in.make_recipe(2, baselines={}, resources={"gpus_per_worker": 0})
try:
    run_search(Plan(recipe, Path(sys.argv[1]), None, on_event, Runner(stand_in.prepare, stand_in.train)))
except InterruptedRunError as error:
    print(error)
print("the program continues")
"""


@pytest.mark.whole
def test_a_stop_of_its_process_group_ends_a_search_with_checkpoints_and_not_the_program_that_called_it(tmp_path):
    stand_in.tell(tmp_path, **{"0": "hold", "1": "hold"})
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, "-c", HOST, str(tmp_path / "study")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)
    assert done.stdout.splitlines()[-1:] == ["the program continues"], done.stderr
    assert "stopped; 0 of 2 trials finished" in done.stdout
    logs = "".join(path.read_text() for path in tmp_path.glob("study/trials/*/log.txt"))
    assert "attempt 1: stopped: SIGTERM; resume continues from step 10 (epoch 1 done)" in logs


@pytest.mark.parametrize("is_stuck", [False, True])
def test_the_end_of_ray_interrupts_the_thread_that_uses_it_and_ends_no_program_that_is_not_ours(
    tmp_path, monkeypatch, is_stuck
):
    ended, raised = [], []
    monkeypatch.setattr(cluster_module, "CHECK_HEAD_EVERY_S", 0.02)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:9"))

    def use():
        try:
            with cluster_module._noticing_its_end("/nowhere", None):
                if is_stuck:
                    time.sleep(1)  # as in a call of Ray's: nothing can be raised there
                while True:
                    time.sleep(0.01)
        except ClusterError as error:
            raised.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()  # a Ctrl-C would end the test
    assert [text.splitlines()[0] for text in raised] == ["Ray: its head at 127.0.0.1:9 is gone"]
    assert ended == []


def test_a_ray_that_cannot_start_is_one_message_at_once(tmp_path, monkeypatch):
    def init(**options):
        raise OSError("no space")

    monkeypatch.setattr(ray, "init", init)
    message = "must start on this machine, but got no space"
    with pytest.raises(ClusterError, match=message), running_ray(None, tmp_path / "ray.log"):
        pass


def test_this_is_what_ray_says_when_it_has_not_started_in_its_time():
    from ray._private import node

    assert cluster_module.TIMED_OUT in inspect.getsource(node)


@pytest.mark.parametrize("own", [None, "4"])
def test_processes_of_ray_have_one_arena_for_memory_unless_the_user_has_said_how_many(tmp_path, monkeypatch, own):
    """With glibc's many, a worker keeps the memory of a training per arena."""
    if own is None:
        monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    else:
        monkeypatch.setenv("MALLOC_ARENA_MAX", own)
    found = []

    def init(**options):
        found.append(os.environ["MALLOC_ARENA_MAX"])
        raise OSError("seen enough")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError), running_ray(None, tmp_path / "ray.log"):
        pass
    assert found == [own or "1"]
    assert os.environ.get("MALLOC_ARENA_MAX") == own
