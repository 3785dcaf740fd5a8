"""Ray itself: a local one for the time of the search, or a running cluster."""

import _thread
import contextlib
import ctypes
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import ray

from carft_ray import environment
from carft_ray.errors import ClusterError, InterruptedRunError, MachineError, Problem
from carft_ray.launch.cluster import ray_private
from carft_ray.launch.cluster.capacity import Node, held_by_others, node_of
from carft_ray.study.holding import Stop

# RAY_TRAIN_HEALTH_CHECK_INTERVAL_S: the controller checks its workers this often, a report waits for it
# RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S: nodes may have to boot first
# TUNE_MAX_PENDING_TRIALS_PG: how many wait is the driver's affair; with fewer, actors start one after the other
# MALLOC_ARENA_MAX: each arena of glibc may keep the memory of a training
# MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_: else glibc returns large tensors to the system in each step, and asks
# for them again
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a trial as outside
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it would restart the group inside of an attempt; see nodes.py
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's own path never calls the searcher
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "120",  # a trial that needs longer to clean up would spoil the next one
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
}
# of a Ray of our own: no metrics, and two servers of theirs that start all the same take free ports
WITHOUT_METRICS = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": "0", "DASHBOARD_METRIC_PORT": "0"}
OBJECT_STORE_BYTES = 128 * 2**20  # data travels through memory-mapped files, Ray moves only small messages
TIMED_OUT = "timed out during startup"  # in what Ray says when it has not started within 30 s
CONNECT_TIMEOUT_S = 10
# what only waits takes no CPU, which could starve its own workers; every head node has this resource
HEAD_ONLY = {"node:__internal_head__": 0.001}
CHECK_HEAD_EVERY_S = 2
HEAD_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after so long without a head Ray ends the process
HEAD_PATIENCE_SHARE = 0.7  # after which we end it
# loggers that write only: a token is used; there are no progress files (we turned them off)
SILENCED = ("ray._private.authentication", "ray.tune.analysis")
LONGEST_TEMP_DIR = 23  # Ray's sockets lie 80 characters below it, and their paths may have 104
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty SETTINGS


@contextlib.contextmanager
def running_ray(
    address: str | None,
    log_path: Path,
    stop: Stop | None = None,
    wait_s: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Node, ...]]:
    """Starts a Ray on this machine and shuts it down at the end, or attaches to a running one and leaves it running.

    A process that is connected to a Ray already, such as a job of a larger program, uses that one and stays connected.

    Args:
        address: ``host:port`` of a cluster or ``auto``; None: a Ray of our own on all cores. Of a process that is
            connected already: ``auto``, or the address of that Ray.
        log_path: File for the warnings of Ray's driver side; the terminal sees none of them.
        stop: By which it is known why Ray has ended, should it end.
        wait_s: How long the head of a cluster may take until it answers.
        say: Told what is waited for.

    Yields:
        The nodes.

    Raises:
        ClusterError: There is no Ray at the address, none can be started, or it has gone (of a cluster, a
            ``MachineError``).
    """
    is_connected = ray.is_initialized()
    if is_connected:
        _require_connected_to(address)
    # of a Ray of our own, only this process and its children know the token
    closed = {**WITHOUT_METRICS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ours = ENVIRONMENT | ({} if address else closed)
    before = {name: os.environ[name] for name in ours if name in os.environ}  # what the user has set holds
    os.environ.update({**ours, **before})
    folder = tempfile.gettempdir()
    folder = folder if len(folder) <= LONGEST_TEMP_DIR else "/tmp"
    temp_dir = None if address else tempfile.mkdtemp(prefix="carft-", dir=folder)
    try:
        with _quiet(log_path):
            if not is_connected:
                ray_private.read_authentication_anew()
            if temp_dir is not None:
                _start(f"{temp_dir}/r")  # Ray opens the folder that it is given to all
            elif not is_connected:
                _attach(address or "", wait_s, say)
            try:
                with _noticing_its_end(temp_dir, stop):
                    yield nodes_now()
            finally:
                if not is_connected:
                    ray.shutdown()
    finally:
        os.environ.update(before)
        for name in ours.keys() - before.keys():
            del os.environ[name]
        if temp_dir is not None:
            ray_private.read_authentication_anew()  # this process may attach to a cluster later, with the user's token
            shutil.rmtree(temp_dir, ignore_errors=True)


def _require_connected_to(address: str | None) -> None:
    """Refuses another Ray than the one that this process is connected to: it can have one at a time."""
    connected = ray.get_runtime_context().gcs_address
    if address not in ("auto", connected):
        rule = f"must be 'auto': this process is connected to the Ray at {connected}"
        step = "Use that one, or call ray.shutdown() first."
        raise ClusterError(Problem("address", rule, address or "none, which starts another Ray", next_step=step))


def _start(temp_dir: str) -> None:
    """Starts Ray without its dashboard: that only helps to clean up after trials stopped from outside, and none is."""
    usable = environment.usable_cores()
    for is_last in (False, False, True):  # on a busy machine Ray may not start within its 30 s, and does at a next try
        try:
            with ray_private.on_this_machine_only():
                ray.init(
                    address="local",
                    num_cpus=usable if usable != os.cpu_count() else None,  # None: Ray also knows a container's limit
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=temp_dir,
                )
            return
        except Exception as error:  # a bare Exception is what Ray raises after these 30 s
            ray.shutdown()
            if is_last or TIMED_OUT not in str(error):
                rule, step = "must start on this machine", "Is there space in the temporary folder and in /dev/shm?"
                step += " Can new processes start? Is the machine busy?"
                raise ClusterError(Problem("Ray", rule, _first_line(error), next_step=step)) from error


def _attach(address: str, wait_s: float, say: Callable[[str], None]) -> None:
    step = "Start one with 'ray start --head', or leave the address out to use this machine."
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not port.isdecimal():
            rule = "must be host:port or auto, from a machine of the cluster"
            step = "Ray Client (ray://) does not support Tune and Train; use 'carft-ray submit' from outside."
            raise ClusterError(Problem("address", rule, address, next_step=step))
        fault, end = _greet(host, int(port)), time.monotonic() + wait_s
        if fault and wait_s:
            say(f"waiting: no Ray answers at {address} yet")
        while fault and time.monotonic() < end:
            time.sleep(CHECK_HEAD_EVERY_S)
            fault = _greet(host, int(port))
        if fault:
            raise ClusterError(Problem("address", f"no Ray answers at {address}", fault, next_step=step))
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {name: os.environ[name] for name in ENVIRONMENT}},
        )
    except ray.exceptions.AuthenticationError as error:
        step = "Set RAY_AUTH_MODE=token here; the token of the cluster must be in ~/.ray/auth_token or RAY_AUTH_TOKEN."
        raise ClusterError(
            Problem("address", f"{address} refused the connection", _first_line(error), next_step=step)
        ) from error
    except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        rule = f"no Ray can be used at {address}"
        raise ClusterError(Problem("address", rule, _first_line(error), next_step=step)) from error


def _greet(host: str, port: int) -> str:
    """Returns what is wrong with a port that should be Ray's; Ray itself would try for two minutes.

    Ray speaks gRPC: a server of HTTP/2 answers a greeting with a frame of type SETTINGS (4).
    """
    try:
        with socket.create_connection((host, port), CONNECT_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return ""
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        return str(error)
    return "" if answer[3:4] == b"\x04" else "a server of another kind"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet(log_path: Path) -> Iterator[None]:
    """Sends the messages of Ray's loggers to a file, and keeps its news of dead workers off the standard output."""
    logger = logging.getLogger("ray")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    log_path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(log_path, delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    file.addFilter(lambda record: not record.name.startswith(SILENCED))
    logger.handlers, logger.propagate = [file], False
    logger.setLevel(logging.WARNING)
    try:
        with ray_private.without_news_of_workers():
            yield
    finally:
        file.close()
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextlib.contextmanager
def _noticing_its_end(temp_dir: str | None, stop: Stop | None) -> Iterator[None]:
    """Ends the block with a ``ClusterError`` when nobody listens at the head's address any more.

    A signal to all processes of a job ends a Ray of our own too, and then Ray's calls neither return nor notice Ctrl-C,
    until Ray kills the process a minute later. The command line ends sooner and with a message, where raising has no
    effect; a host program is not ended here. The head of a cluster may come back: there the error comes shortly before
    Ray's own patience (``HEAD_PATIENCE``) ends, and is a ``MachineError``.
    """
    caller = threading.current_thread()
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    step = "Everything finished is kept; run the same command again to resume."
    kind, patience_s = ClusterError, float(CHECK_HEAD_EVERY_S)
    if temp_dir is None:
        step = f"Start a new one. {step}"
        kind, patience_s = MachineError, HEAD_PATIENCE_SHARE * float(os.environ.get(HEAD_PATIENCE, "60"))
    error = kind(Problem("Ray", f"its head at {host}:{port} is gone", next_step=step))
    left, gone = threading.Event(), threading.Event()

    def check() -> None:
        missed: list[float] = []  # when nobody answered, since somebody did
        while not left.wait(CHECK_HEAD_EVERY_S):
            try:
                socket.create_connection((host, int(port)), CHECK_HEAD_EVERY_S).close()
                missed.clear()
                continue
            except OSError:
                missed.append(time.monotonic())
            missed_s = missed[-1] - missed[0]
            if missed_s >= patience_s:
                is_first = not gone.is_set()
                gone.set()
                if caller is threading.main_thread():
                    _thread.interrupt_main()  # once more each time: a first Ctrl-C is only taken as a wish
                elif is_first:
                    number, interrupt = ctypes.c_ulong(caller.ident or 0), ctypes.py_object(KeyboardInterrupt)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, interrupt)
            if environment.is_program and missed_s >= patience_s + 3 * CHECK_HEAD_EVERY_S:
                stopped = temp_dir is not None and stop is not None and stop.asked()
                sys.stderr.write(f"stopped, and Ray with it\n    {step}\n" if stopped else f"{error}\n")
                sys.stderr.flush()
                if temp_dir is not None:
                    shutil.rmtree(temp_dir, ignore_errors=True)
                os._exit(InterruptedRunError.exit_code if stopped else error.exit_code)

    watcher = threading.Thread(target=check, name="head-watcher", daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if gone.is_set():
            raise error from None
        raise
    finally:
        left.set()
        watcher.join()


def nodes_alive() -> list[dict[str, Any]]:
    """Returns what Ray knows of each node that is alive: ``NodeID``, ``NodeManagerAddress``, ``Resources``."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def nodes_now(without: Collection[str] = ()) -> tuple[Node, ...]:
    """Returns the nodes that are alive, without those of these names (Ray's), and what other jobs hold of them."""
    free, there = ray_private.resources_of_nodes()
    nodes = {node["NodeID"]: node["Resources"] for node in nodes_alive() if node["NodeID"] not in without}
    job_id = ray.get_runtime_context().get_job_id()
    return tuple(
        node_of(resources, held_by_others(free[name], there[name], job_id) if name in free and name in there else {})
        for name, resources in nodes.items()
    )
