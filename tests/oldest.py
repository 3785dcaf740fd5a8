"""The oldest releases that pyproject.toml allows, as a constraints file for pip: `make test-oldest` installs these.

Needs nothing but Python, since nothing is installed yet.
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,.-]+\])?>=(?P<oldest>[\w.]+)")


def requirements() -> list[str]:
    """Returns the requirements of the project and of its extras."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]


def oldest() -> list[str]:
    """Returns ``name==version`` for each requirement, with its lower bound."""
    found = []
    for text in requirements():
        if not (match := REQUIREMENT.match(text)):
            raise SystemExit(f"pyproject.toml: {text} must begin with a lower bound: NAME>=VERSION")
        found.append(f"{match['name']}=={match['oldest']}")
    return found


if __name__ == "__main__":
    print("\n".join(oldest()))
