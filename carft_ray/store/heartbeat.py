"""Who owns a study: a process, as it can be told from others; whether it is gone, or counts as gone for its silence."""

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

BEAT_AFTER_S = 30.0  # without a commit, the owner makes an empty one
SILENT_FOR_S = 90.0  # without a commit, the owner is taken for dead
# a reader compares its clock with that of the store, which differ, and believes in a silent owner for longer
READERS_SILENT_FOR_S = 300.0
LOOK_EVERY_S = 1.0  # while another owner may be dead
ALIVE = "alive"  # of a process of which no more can be seen
_MACHINE = ("host", "boot", "pid_namespace")  # within one machine (or container) a process can be found


def identity() -> dict[str, Any]:
    """Returns by what others know this process, as JSON can hold it."""
    return {
        "host": socket.gethostname(),
        "boot": _or_empty(Path("/proc/sys/kernel/random/boot_id").read_text),
        "pid_namespace": _or_empty(lambda: os.readlink("/proc/self/ns/pid")),
        "pid": os.getpid(),
        "process_started": process_started(os.getpid()),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def is_seen(owner: Mapping[str, Any]) -> bool:
    """Tells whether a process is one of this machine, so that it can be looked for here."""
    here = identity()
    pid = owner.get("pid")
    return all(owner.get(key) == here[key] for key in _MACHINE) and isinstance(pid, int) and 0 < pid < 2**31


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Tells whether a process, by its ``identity``, was one of this machine and has ended."""
    return is_seen(owner) and process_started(owner["pid"]) not in (owner.get("process_started"), ALIVE)


def is_this_process(owner: Mapping[str, Any]) -> bool:
    """Tells whether a process, by its ``identity``, is this one."""
    return is_seen(owner) and owner["pid"] == os.getpid() and not is_gone(owner)


def named(owner: Mapping[str, Any]) -> str:
    """Returns a process in words, for messages."""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"


def process_started(pid: int) -> str:
    """Returns when a process of this machine began, in the kernel's ticks; empty when there is none.

    One that has ended and for which nobody has asked yet (in a container often nobody ever does) is none.
    """
    stat = _or_empty(Path(f"/proc/{pid}/stat").read_text)
    if stat:
        fields = stat.rpartition(")")[2].split()  # from field 3 on; the name before it may hold anything
        return "" if fields[0] in "ZX" else fields[19]
    with contextlib.suppress(PermissionError):  # it is another user's
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
    return ALIVE


def _or_empty(read: Callable[[], str]) -> str:
    try:
        return read().strip()
    except OSError:
        return ""
