"""Which carft-ray a job runs: that of this machine, whose folder is sent, or that of the cluster.

A job begins with this module, which ends it where it runs another code than was sent or a library is missing:

    python -m carft_ray.launch.cluster.job_package [SOURCE]
"""

import re
import sys
from importlib import metadata
from pathlib import Path

from carft_ray import environment
from carft_ray.errors import ClusterError, Problem


def folders() -> list[Path]:
    """Returns what is sent: the folder of this package, and that which says its version and its libraries."""
    try:
        about = [Path(str(one.locate())).parent for one in metadata.files("carft-ray") or () if one.name == "METADATA"]
    except metadata.PackageNotFoundError:
        about = []
    return [environment.PACKAGE_DIR, *about]


def problems(source: str | None) -> list[Problem]:
    """Returns why a job cannot run here.

    Args:
        source: The code that was sent (``environment.code``); None: any will do.
    """
    texts = metadata.requires("carft-ray") if environment.versions_of(["carft-ray"])["carft-ray"] else None
    needed = [match[0] for text in texts or () if ";" not in text and (match := re.match(r"[\w.-]+", text))]
    missing = [name for name, version in environment.versions_of(needed).items() if version is None]
    found, result = environment.code()["source"], []
    if source not in (None, found):
        rule, value = f"the job must run the code that was sent, {source}", f"{found} of {environment.PACKAGE_DIR}"
        step = "Does PYTHONPATH on the nodes name another carft-ray? Or use that one: --installed."
        result.append(Problem("submit", rule, value, next_step=step))
    if missing:
        rule = f"the Python of the cluster's jobs, {sys.executable}, lacks {', '.join(missing)}"
        result.append(Problem("submit", rule, next_step="Install it on all nodes: cluster/README.md."))
    return result


def main() -> None:
    """Ends with one message and the exit code of a cluster that cannot run the job."""
    if found := problems(next(iter(sys.argv[1:]), None)):
        sys.stderr.writelines(f"error: {problem}\n" for problem in found)
        sys.exit(ClusterError.exit_code)


if __name__ == "__main__":
    main()
