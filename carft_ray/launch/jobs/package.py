"""How carft-ray itself comes to the job: the cluster's own, the code of this source tree, or the release on PyPI.

A wheel is built of the source tree and its folders are sent as modules of the job. Ray would install the file itself
with all its dependencies, torch among them, on every node (read in Ray 2.60): here the nodes must have those, and are
asked first.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from carft_ray import __version__, environment
from carft_ray.errors import ClusterError, Problem, UsageError

Choice = Literal["auto", "installed", "wheel", "pip"]
CHOICES: tuple[str, ...] = get_args(Choice)
BUILD_TIMEOUT_S = 600.0
MARK = "carft-ray-found "  # before the answer of the question below
_QUESTION = f"""
import json, platform, sys
from importlib import metadata
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
try:
    from carft_ray import environment
    code = environment.code()
except ImportError:
    code = None
found = dict(python=platform.python_version(), code=code, libraries=dict((one, version(one)) for one in sys.argv[1:]))
print({MARK!r} + json.dumps(found))
"""
_IMAGE = "Install carft-ray on all nodes (cluster/README.md), or use --package pip where they reach PyPI."


@dataclass(frozen=True)
class Found:
    """What the Python of a cluster's jobs has.

    Attributes:
        python: Its version.
        code: As ``environment.code`` there; None without a carft-ray.
        libraries: Versions of what carft-ray needs; None for one that is missing.
    """

    python: str
    code: Mapping[str, Any] | None
    libraries: Mapping[str, str | None]


def question() -> str:
    """Returns the shell command of a job that says what its Python has."""
    return shlex.join(["python", "-c", _QUESTION, *(each.name for each in _requirements())])


def answer(log: str) -> Found:
    """Reads the answer in the log of that job.

    Raises:
        ClusterError: There is none.
    """
    lines = [line.removeprefix(MARK) for line in log.splitlines() if line.startswith(MARK)]
    if lines:
        return Found(**json.loads(lines[-1]))
    said = [line for line in log.splitlines() if line.strip() and not line.startswith("Running entrypoint")]
    rule = "must have a `python` that runs in its jobs"
    step = "Start Ray on the head from an environment that has carft-ray, so that its PATH has that Python."
    raise ClusterError(Problem("the cluster", rule, said[-1].strip() if said else "no answer", next_step=step))


def source_tree() -> Path | None:
    """Returns the source tree that this code lies in (a checkout, an editable installation), else None."""
    tree = environment.PACKAGE_DIR.parent
    try:
        project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return None
    return tree if project.get("name") == "carft-ray" else None


def described(choice: Choice) -> str:
    """Returns in words what ``choose`` will do, before the cluster is asked."""
    tree = source_tree()
    ours = f"a wheel of {tree}" if tree else "none: there is no source tree here"
    return {
        "auto": f"that of the cluster if it is the same ({_version_words()}), else {ours}",
        "installed": "that of the cluster",
        "wheel": ours,
        "pip": f"carft-ray=={__version__} from PyPI, installed on each node that runs a part of the job",
    }[choice]


def choose(choice: Choice, found: Found) -> Literal["installed", "wheel"]:
    """Decides between the code of the cluster and that of this source tree.

    Args:
        choice: What was asked for; not ``pip``, for which nothing must be there.
        found: What the cluster has.

    Raises:
        ClusterError: The cluster lacks what is needed.
        UsageError: There is no source tree here.
    """
    tree, theirs = source_tree(), found.code
    if choice == "installed" and theirs is None:
        raise ClusterError(Problem("--package", "the cluster must have carft-ray", "none", next_step=_IMAGE))
    same = theirs is not None and (
        theirs["source"] == environment.code()["source"] if tree else theirs["version"] == __version__
    )
    if choice == "installed" or (choice == "auto" and same):
        return "installed"
    if tree is None:
        has = "none" if theirs is None else theirs["version"]
        rule = f"the cluster must have carft-ray {__version__}, as there is no source tree here to send"
        step = _IMAGE if theirs is None else "Install one version here and there, or use --package installed."
        raise (UsageError if choice == "wheel" else ClusterError)(Problem("--package", rule, has, next_step=step))
    if problems := _lacking(found):
        raise ClusterError(problems)
    return "wheel"


def pip_requirement() -> str:
    """Returns the release of this version, for Ray's ``pip``."""
    return f"carft-ray=={__version__}"


def build(tree: Path, folder: Path) -> list[Path]:
    """Builds a wheel of a source tree and unpacks it.

    Args:
        tree: The source tree.
        folder: An empty folder for it.

    Returns:
        The folders of the wheel: the package, and what says its version and requirements.

    Raises:
        UsageError: It cannot be built.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--disable-pip-version-check"]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")  # else pip downloads it
    step = "That needs pip, and hatchling or access to PyPI. Or install carft-ray on the cluster (--package installed)."
    try:
        done = subprocess.run(
            [*command, "--wheel-dir", str(folder), str(tree)], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
        )
        cause = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1].strip()
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed, cause = True, f"no end within {BUILD_TIMEOUT_S:.0f} s"
    if failed:
        raise UsageError(Problem("--package wheel", f"must be built from {tree}", cause, next_step=step))
    (wheel,) = folder.glob("*.whl")
    unpacked = folder / "modules"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return sorted(unpacked.iterdir())


def _requirements() -> list[Requirement]:
    """Returns what the installed carft-ray needs without extras; nothing where it is not installed."""
    try:
        texts = metadata.requires("carft-ray")
    except metadata.PackageNotFoundError:
        texts = None
    return [each for each in map(Requirement, texts or ()) if each.marker is None]


def _lacking(found: Found) -> list[Problem]:
    """Returns one problem with all libraries that the cluster lacks, or has older than carft-ray needs."""
    missing = []
    for each in _requirements():
        version = found.libraries.get(each.name)
        try:
            release = Version(version or "").base_version
        except InvalidVersion:
            if version is None:
                missing.append(each.name)
            continue
        if any(not one.contains(release) for one in each.specifier if one.operator.startswith(">")):
            missing.append(f"{each.name}{each.specifier} (it has {version})")
    if not missing:
        return []
    rule = f"the Python {found.python} of the cluster's jobs lacks {', '.join(missing)}"
    return [Problem("--package", rule, next_step=_IMAGE)]


def _version_words() -> str:
    return f"{__version__}, source {environment.code()['source']}"
