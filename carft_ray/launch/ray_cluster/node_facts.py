"""What one node of a cluster finds on itself; sent there as code, so that it runs where carft-ray is missing or old.

Only the standard library is imported, and torch for the collective.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

GPU_WITHIN_S = 20.0


def node_facts(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a node has and sees, as plain data.

    Args:
        asked: ``libraries``: names of distributions; ``paths``: place -> path that must be there; ``cache_dir``: None
            for the user's on the node.

    Returns:
        ``versions``: of ``python`` and the libraries, None for one that is missing; ``carft_ray``: ``version`` and
        ``source``, or ``fault``; ``gpus``: ``name``, ``total_bytes``, ``free_bytes`` of each; ``missing``: place ->
        ``path`` and ``fault``; ``cache``: ``path``, ``fault`` and ``free_bytes``.
    """
    faults = {place: {"path": path, "fault": _fault_of(path)} for place, path in asked["paths"].items()}
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "carft-ray"
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in asked["libraries"]},
        "carft_ray": _carft_ray(),
        "gpus": _gpus(),
        "missing": {place: one for place, one in faults.items() if one["fault"]},
        "cache": _folder_to_write(Path(asked["cache_dir"] or home)),
    }


def collective(backend: str, address: str, port: int, rank: int, world_size: int, within_s: float) -> str:
    """Counts the nodes by a sum over all of them, as the workers of a training sum their gradients.

    Args:
        backend: ``nccl``, on the first GPU of the node, or ``gloo``.
        address: Of the machine where the ranks find each other.
        port: Its port.
        rank: Of this node.
        world_size: Nodes.
        within_s: Seconds for each step.

    Returns:
        Why it failed; empty where it did not.
    """
    try:
        import torch
        from torch import distributed

        limit = timedelta(seconds=within_s)
        store = distributed.TCPStore(address, port, timeout=limit)  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        try:
            one = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            distributed.all_reduce(one)
            return "" if int(one) == world_size else f"counted {int(one)} of {world_size} nodes"
        finally:
            distributed.destroy_process_group()
    except Exception as error:  # whatever torch, NCCL or gloo raise
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _fault_of(path: str) -> str:
    """Returns why a folder or a file cannot be read; empty when it can."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()
        else:
            open(path, "rb").close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _folder_to_write(path: Path) -> dict[str, Any]:
    """Returns what can be said of a folder that is there or will be made: ``path``, ``fault``, ``free_bytes``."""
    there, fault = next(each for each in (path, *path.parents) if each.is_dir()), ""
    try:  # a system may forbid what the rights of a folder allow
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        fault = f"{there}: {error.strerror}"
    return {"path": str(path), "fault": fault, "free_bytes": shutil.disk_usage(there).free}


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
