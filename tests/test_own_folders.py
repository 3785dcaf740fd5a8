"""What lies on the driver's machine alone: a node that cannot see it trains all the same."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import killed_searches as searches
import pytest
import stand_in

from carft_ray.study.rows import baselines, trials

pytestmark = [pytest.mark.slow, pytest.mark.nodes]


@contextlib.contextmanager
def node_without(hidden, folder, address, auth):
    """Adds a node to a cluster for the time of the block that sees an empty folder in place of another one."""
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=4", f"--address={address}"]
    ray += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--object-store-memory=134217728"]
    inside = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(ray)}"
    command = ["unshare", "--mount", "sh", "-c", inside]
    process = subprocess.Popen(
        command, env=searches.environment(**auth), start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def hidden(tmp_path):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this account may not unshare what it has mounted")
    folder = tmp_path / "hidden"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_a_node_that_does_not_see_the_drivers_temporary_folder_trains(executor, hidden, tmp_path, monkeypatch):
    stand_in.tell(tmp_path, seconds=0.1)
    short = Path("/tmp") / f"carft-{os.getpid()}-{executor}"  # Ray's sockets need a short path
    with searches.cluster(num_cpus=0) as (address, auth), node_without(hidden, short, address, auth):
        try:
            monkeypatch.setenv("TMPDIR", str(hidden))
            resources = {"cpus_per_worker": 0.5, "wait_for_nodes": 120}
            search = {"max_concurrent_trials": 2}
            process = searches.driver(tmp_path / "study", 3, executor, address, auth, search=search, **resources)
            code, output = searches.finish(process)
        finally:
            searches.kill_drivers()
            shutil.rmtree(short, ignore_errors=True)
    assert code == 0, output
    assert {row.outcome for row in trials(tmp_path / "study") + baselines(tmp_path / "study")} == {"complete"}
    assert list(hidden.iterdir()) == []  # nothing is left behind
