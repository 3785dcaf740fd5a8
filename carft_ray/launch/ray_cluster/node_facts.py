"""What one node of a cluster finds on itself; sent there as code, so that it runs where carft-ray is missing or old.

Only the standard library is imported. Nothing that this module does may wait without end: a network disk that does not
answer holds a thread, and what it was asked for is named.
"""

import importlib.metadata
import os
import platform
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILES_WITHIN_S = 20.0
READ_S, READ_BYTES, READ_FILES = 1.0, 8 << 20, 256
BLOCK_BYTES = 1 << 20
GPU_WITHIN_S = 20.0


def now() -> float:
    """Returns the time of the node's clock, in seconds since 1970."""
    return time.time()


def node_facts(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a node has and sees, as plain data.

    Args:
        asked: ``libraries``: names of distributions; ``paths``: place -> path that must be there; ``cache_dir``: None
            for the user's on the node; ``reads``: folders or files to measure how fast they are read; ``study``:
            ``folder`` and ``marker`` (name of a file in it) and its ``text``, or None.

    Returns:
        ``python``; ``versions`` by library, None for one that is missing; ``carft_ray`` with ``version`` and ``source``
        or with ``fault``; ``host``; ``cores``; ``gpus``: ``name``, ``total_bytes``, ``free_bytes`` of each;
        ``memory_bytes`` and ``memory_free_bytes``; ``shared_memory_bytes``; ``temp``: ``path``, ``free_bytes``,
        ``total_bytes``; ``missing``: place -> ``path`` and ``fault``; ``study``: a fault, or empty; ``cache``: as
        ``temp``, with ``fault``; ``read``: ``num_files``, ``num_bytes``, ``seconds``, or None; ``hung``: the path that
        no disk has answered for, or empty.
    """
    total, free = _memory()
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in asked["libraries"]},
        "carft_ray": _carft_ray(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _gpus(),
        "memory_bytes": total,
        "memory_free_bytes": free,
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
    }
    seen: dict[str, Any] = {"temp": None, "missing": {}, "study": "", "cache": None, "read": None, "hung": "a folder"}
    thread = threading.Thread(target=_see_files, args=(asked, seen), daemon=True)
    thread.start()
    thread.join(FILES_WITHIN_S)
    return {**found, **seen.copy()}


def _see_files(asked: Mapping[str, Any], seen: dict[str, Any]) -> None:
    """Fills in what concerns files; ``hung`` names what is being asked for."""
    temp = tempfile.gettempdir()
    seen["temp"] = {"path": temp, **_space(temp)}
    missing = {}
    for place, path in asked["paths"].items():
        seen["hung"] = path
        if fault := _fault_of(path):
            missing[place] = {"path": path, "fault": fault}
    seen["missing"] = missing
    if study := asked["study"]:
        seen["hung"] = study["folder"]
        seen["study"] = _study_fault(study)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "carft-ray"
    seen["hung"] = cache = asked["cache_dir"] or str(home)
    seen["cache"] = _folder_to_write(cache)
    for path in asked["reads"]:
        seen["hung"] = path
        if os.path.exists(path) and seen["read"] is None:
            seen["read"] = read_speed(path)
    seen["hung"] = ""


def _fault_of(path: str) -> str:
    """Returns why a folder or a file cannot be read; empty when it can."""
    try:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                next(entries, None)
        else:
            with open(path, "rb") as file:
                file.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _study_fault(study: Mapping[str, str]) -> str:
    """Returns why a node cannot work in the folder of studies; empty when it sees the driver's file and may write."""
    folder = study["folder"]
    if not os.path.isdir(folder):
        return f"no such folder: {folder}"
    try:
        with open(os.path.join(folder, study["marker"])) as file:
            if file.read() != study["text"]:
                return f"another file than the driver's: {folder}"
    except FileNotFoundError:
        return f"another folder of the same name, without the file that the driver has just written: {folder}"
    except OSError as error:
        return f"{folder}: {error.strerror}"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    return ""


def _folder_to_write(path: str) -> dict[str, Any]:
    """Returns what can be said of a folder that may be made: ``path``, ``fault``, free and total bytes."""
    there = next(each for each in (Path(path), *Path(path).parents) if each.is_dir())
    fault = "" if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written"
    if there == Path(path) and not fault:
        try:  # a system may forbid what the rights of a folder allow
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            fault = f"{there}: {error.strerror}"
    return {"path": path, "fault": fault, **_space(str(there))}


def _space(path: str) -> dict[str, int]:
    usage = shutil.disk_usage(path)
    return {"free_bytes": usage.free, "total_bytes": usage.total}


def read_speed(path: str) -> dict[str, float] | None:
    """Returns how many files and bytes of a folder or a file are read in how many seconds; None where there are none.

    Pages that the node keeps in memory are given up first, so that the disk is measured.
    """
    num_files = num_bytes = 0
    began = time.perf_counter()
    for each in list(_some_files(path)):
        try:
            descriptor = os.open(each, os.O_RDONLY)
        except OSError:
            continue
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            num_files += 1
            while num_bytes < READ_BYTES and time.perf_counter() - began < READ_S:
                if not (block := os.read(descriptor, BLOCK_BYTES)):
                    break
                num_bytes += len(block)
        finally:
            os.close(descriptor)
        if num_bytes >= READ_BYTES or time.perf_counter() - began >= READ_S:
            break
    seconds = time.perf_counter() - began
    return {"num_files": num_files, "num_bytes": num_bytes, "seconds": seconds} if num_bytes else None


def _some_files(path: str) -> Iterator[str]:
    """Returns some files under a folder, from several of its folders, or the file itself."""
    if not os.path.isdir(path):
        yield path
        return
    found, until = 0, time.perf_counter() + READ_S
    folders = [path]
    while folders and found < READ_FILES and time.perf_counter() < until:
        folder = folders.pop(random.randrange(len(folders)))
        try:
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries):
                    if entry.is_dir():
                        folders.append(entry.path)
                    elif entry.is_file():
                        found += 1
                        yield entry.path
                    if number >= READ_FILES // 4 and folders:  # the others, too
                        break
        except OSError:
            continue


def _memory() -> tuple[int | None, int | None]:
    """Returns bytes of memory in all and available, within the limit of a container."""
    total = free = None
    try:
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        known = {row[0]: int(row[1]) * 1024 for row in rows}
        total, free = known["MemTotal:"], known["MemAvailable:"]
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(0, limit - used))
    except (OSError, ValueError, KeyError):  # no limit, or not Linux
        pass
    return total, free


def _gpus() -> list[dict[str, Any]]:
    """Returns name and memory of each GPU that NVIDIA's driver shows; empty without one."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_WITHIN_S)
    except (OSError, subprocess.SubprocessError):
        return []
    return gpus_of(done.stdout) if done.returncode == 0 else []


def gpus_of(text: str) -> list[dict[str, Any]]:
    """Returns the GPUs that a table of nvidia-smi names; its amounts are in MiB, and ``[N/A]`` where not known."""
    found = []
    for line in text.splitlines():
        name, *amounts = (part.strip() for part in line.rsplit(",", 2))
        total, free = (int(amount) * 2**20 if amount.isdecimal() else None for amount in amounts or ("", ""))
        found.append({"name": name, "total_bytes": total, "free_bytes": free})
    return found


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _carft_ray() -> dict[str, str]:
    try:
        from carft_ray import __version__, environment

        return {"version": __version__, "source": environment.source_digest(), "fault": ""}
    except Exception as error:  # whatever another version or a broken installation does
        return {"version": "", "source": "", "fault": f"{type(error).__name__}: {error}"}
