"""Where and with what something is computed: code, versions of libraries, machine. Nothing heavy is imported."""

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from carft_ray import __version__
from carft_ray.errors import Problem, UsageError

is_program = False  # whether this process is the command line, which may end it; a host program is not ours to end
PACKAGE_DIR = Path(__file__).resolve().parent
GIT_TIMEOUT_S = 5.0
LIBRARIES = (
    *("torch", "torchvision", "open_clip_torch", "ray", "optuna"),
    *("numpy", "scipy", "pyarrow", "pillow", "safetensors", "pydantic"),
)


@functools.cache
def code() -> dict[str, Any]:
    """Returns what code this process runs, as it was at the first call; the caller does not change it.

    ``version`` of carft-ray; ``commit`` and ``dirty`` (changes that are not committed) of the git checkout that it
    lies in, None without one; ``source``, a hash of the package's own files, which differs for any two codes.
    """
    commit, dirty = git_state(PACKAGE_DIR)
    return {"version": __version__, "commit": commit, "dirty": dirty, "source": source_digest()}


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Returns the commit of the checkout that tracks a folder, and whether files of the folder differ from it.

    (None, None) where git is missing or slow, or the folder is not tracked (an installation inside a checkout).
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", ".")
    return (None, None) if commit is None or changes is None else (commit.strip(), bool(changes.strip()))


def _git(folder: Path, *words: str) -> str | None:
    """Returns what git prints, or None when it does not answer well."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # reading must not write the index
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, env=environment)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def source_digest(folder: Path = PACKAGE_DIR) -> str:
    """Returns a hash of all Python files under a folder, their names and contents, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the libraries on which numbers depend; None for one that is missing."""
    return {"python": platform.python_version(), **versions_of(LIBRARIES)}


def versions_of(libraries: Sequence[str]) -> dict[str, str | None]:
    """Returns the versions of libraries; None for one that is missing."""
    return {name: _version(name) for name in libraries}


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def outside_ranges(extra: str = "") -> tuple[list[Problem], list[Problem]]:
    """Returns which installed libraries are older than carft-ray needs, and which are newer than it was run with.

    The ranges are those of the installed carft-ray, so those of its pyproject.toml. A library that is not installed is
    passed over, and so is everything where carft-ray itself is not installed. A build of one's own counts as the
    release that it leads to (2.9.0a0+git as 2.9.0).

    Args:
        extra: Check the requirements of this extra, not at those of every installation.
    """
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    texts = metadata.requires("carft-ray") if _version("carft-ray") else None
    older: list[Problem] = []
    newer: list[Problem] = []
    for each in map(Requirement, texts or ()):
        wanted = each.marker.evaluate({"extra": extra}) if each.marker else not extra
        version = _version(each.name) if wanted else None
        try:
            release = Version(version or "").base_version
        except InvalidVersion:
            continue
        broken = [one for one in each.specifier if not one.contains(release)]
        if broken:
            ranges = ",".join(sorted(map(str, each.specifier), reverse=True))  # the lower bound first
            extras = f"[{','.join(sorted(each.extras))}]" if each.extras else ""
            command = f"pip install '{each.name}{extras}{ranges}'"
            is_newer = all(one.operator.startswith("<") for one in broken)
            rule = f"carft-ray was run with {ranges} only" if is_newer else f"carft-ray needs {ranges}"
            (newer if is_newer else older).append(Problem(f"{each.name} {version}", f"{rule}; run: {command}"))
    return older, newer


def private_name(library: str, name: str, find: Callable[[], Any]) -> Any:
    """Returns a private name of a library, which a release may no longer have.

    Args:
        library: Name of its distribution.
        name: The name, for the message.
        find: Returns what has the name.

    Raises:
        UsageError: This release has no such name.
    """
    try:
        return find()
    except (AttributeError, ImportError) as error:
        step = f"Install a release of {library} that pyproject.toml allows."
        rule = f"must have {name}, which carft-ray uses"
        raise UsageError(Problem(library, rule, f"release {metadata.version(library)}", next_step=step)) from error


def hardware() -> dict[str, Any]:
    """Returns ``platform``, ``cpu`` (the model) and ``cores`` of this machine."""
    return {"platform": platform.platform(), "cpu": cpu_model(), "cores": os.cpu_count()}


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Returns the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
