"""Ray clusters of real nodes on this machine: ``ray start`` in sessions of their own, with a token, on free ports.

    with head() as first, node(first, num_cpus=2) as second:
        subprocess.run([...], env=first.environment)
        second.kill()  # its power fails; process.terminate() is a notice to leave, drain(30) one with a deadline

Each node has a HOME and a folder for temporary files of its own. What a block has started ends with it, by its session;
no other Ray of the machine is touched. Every wait is bounded.
"""

import contextlib
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from crash_host import PYTHONPATH

RAY = str(Path(sys.executable).with_name("ray"))
HOST = "127.0.0.1"
TIMEOUT_S = 900  # of a busy machine
START_TIMEOUT_S, END_TIMEOUT_S = 300, 60
STARTS = 3  # Ray gives a node 30 s, which a busy machine may not have
OBJECT_STORE_BYTES = 80_000_000
PORTS = ("node-manager", "object-manager", "metrics-export", "runtime-env-agent")  # of every node
AGENT_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")
# a cluster notices the loss of a node after a second
SOON_LOST = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "2",
}
# and later, where that would be taken for a loss on a busy machine
LATER_LOST = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "10"}


@dataclass
class Node:
    """One ``ray start --block``.

    Attributes:
        address: ``host:port`` of the head.
        dashboard: URL of the head's dashboard, and of its Jobs API; empty where it has none.
        environment: For commands that attach: a token, and the HOME of the head.
        folder: Files of this node; ``home`` is its HOME, ``start.log`` what ``ray start`` has printed.
        ports: Options of ``ray start`` and their ports.
        process: Leads a session, to which all of the node belongs.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen = field(repr=False)

    @property
    def reached(self) -> tuple[str, dict[str, str]]:
        """The address of the head, and the token for it."""
        return self.address, {name: self.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}

    @property
    def node_id(self) -> str:
        """Ray's name of the node."""
        for pid in of_session(self.process.pid):
            with contextlib.suppress(OSError):
                if found := re.search(rb"--node[-_]id=(\w+)", Path(f"/proc/{pid}/cmdline").read_bytes()):
                    return found[1].decode()
        raise AssertionError("no raylet runs")

    def kill(self) -> None:
        """Ends all processes of the node at once, as a power failure does."""
        wait_until(lambda: not _kill_session(self.process.pid), "the node's processes end", END_TIMEOUT_S)
        self.process.wait(END_TIMEOUT_S)

    def drain(self, deadline_s: float) -> None:
        """Tells the cluster that the node will be taken away after so many seconds; it goes on until it is killed."""
        command = [RAY, "drain-node", f"--address={self.address}", f"--node-id={self.node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=preempted"]
        command += [f"--deadline-remaining-seconds={int(deadline_s)}"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr


def ports_of_head() -> dict[str, int]:
    """Returns free ports for a head, by the options of ``ray start``."""
    return _free_ports((*HEAD_PORTS, *AGENT_PORTS, *(f"{name}-port" for name in PORTS)))


@contextlib.contextmanager
def head(num_cpus: float = 0, *options: str, like: Node | None = None, dashboard: bool = True, **more: str):
    """Starts a head, which has no CPUs by default; yields its ``Node``.

    Args:
        num_cpus: CPUs.
        options: Further options of ``ray start``.
        like: A head that is gone: the new one takes its ports and its token.
        dashboard: Whether it has a dashboard, without which there is no Jobs API.
        more: Variables of its environment.
    """
    ports = like.ports if like else ports_of_head()
    token = like.environment["RAY_AUTH_TOKEN"] if like else secrets.token_hex(32)
    address, url = f"{HOST}:{ports['port']}", f"http://{HOST}:{ports['dashboard-port']}" if dashboard else ""
    options = ("--head", f"--include-dashboard={str(dashboard).lower()}", f"--dashboard-host={HOST}", *options)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with _started(address, url, ports, num_cpus, options, {**auth, **SOON_LOST, **more}) as started:
        yield started


@contextlib.contextmanager
def node(to: Node, num_cpus: float = 1, *options: str, hidden: tuple[Path, ...] = (), **more: str):
    """Starts a node that joins a head, for which the folders ``hidden`` are empty; yields its ``Node``."""
    ports = _free_ports((*AGENT_PORTS, *(f"{name}-port" for name in PORTS)))
    options = (f"--address={to.address}", *options)
    before = hiding(*hidden) if hidden else []
    with _started(to.address, to.dashboard, ports, num_cpus, options, {**to.reached[1], **more}, before) as started:
        started.environment = to.environment
        yield started


def hiding(*folders: Path, size: str = "50%") -> list[str]:
    """Returns words before a command that see empty folders in these places, as on a machine without that disk.

    Each holds so much, by default half as much as there is memory. They are mounts that nobody else sees; a system that
    forbids those skips the test.
    """
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system forbids mounts of one's own")
    mounts = " && ".join(f"mount -t tmpfs -o size={size} none {shlex.quote(str(folder))}" for folder in folders)
    return [*unshare, "sh", "-c", f'{mounts} && exec "$@"', "sh"]


def alive(to: Node) -> list[str]:
    """Returns Ray's names of the nodes that a cluster takes for living ones."""
    return asked("[one['NodeID'] for one in ray.nodes() if one['Alive']]", to.address, to.environment)


@contextlib.contextmanager
def _started(address, url, ports, num_cpus, options, variables, before=()):
    with tempfile.TemporaryDirectory(prefix="cr", dir="/tmp", ignore_cleanup_errors=True) as name:  # sockets: short
        folder = Path(name)
        (folder / "home").mkdir()
        variables = {"HOME": f"{folder}/home", "RAY_USAGE_STATS_ENABLED": "0", **variables}
        surroundings = {key: value for key, value in environment(**variables).items() if key != "RAY_ADDRESS"}
        command = [*before, RAY, "start", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus:g}", *options]
        command += [f"--{option}={port}" for option, port in ports.items()]
        command += [f"--node-ip-address={HOST}", f"--temp-dir={folder}/r"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        for left in reversed(range(STARTS)):
            log_path = folder / "start.log"
            with open(log_path, "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=surroundings, start_new_session=True)
            started = Node(address, url, surroundings, folder, ports, process)
            try:
                runs = lambda: "Ray runtime started" in log_path.read_text() or process.poll() is not None  # noqa: B023, E731
                wait_until(runs, "a node starts", START_TIMEOUT_S)
                assert process.poll() is None or left, log_path.read_text()
                if process.poll() is None:
                    yield started
                    return
            finally:
                started.kill()


def _free_ports(options: tuple[str, ...]) -> dict[str, int]:
    """Returns a port that nobody listens at for each option, below those that the system gives to connections."""
    found: list[int] = []
    while len(found) < len(options):
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as unused:
            unused.bind((HOST, port))
            found += [port] * (port not in found)
    return dict(zip(options, found, strict=True))


def _kill_session(session: int) -> list[int]:
    """Kills the processes of a session; returns those that there were."""
    pids = of_session(session)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def environment(**more):
    return {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **more}


def of_session(session):
    """Returns the living processes of a session, in whatever group they are."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_until(condition, what, timeout_s=TIMEOUT_S):
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.2)
    return value


def asked(expression, address, auth):
    """Returns the value of an expression with ``ray``, as JSON has it, by asking a cluster in another process."""
    code = (
        "import json, logging, sys, ray\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)\n"
        f"print('VALUE', json.dumps({expression}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, env=environment(**auth), timeout=120
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("VALUE ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[-1].partition(" ")[2])
