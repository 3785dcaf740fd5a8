"""The oldest releases that pyproject.toml allows, as a constraints file for pip: `make test-oldest` installs these.

Needs nothing but Python; carft-ray is not imported, since it is not installed yet.
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,.-]+\])?>=(?P<oldest>[\w.]+)")


def oldest() -> list[str]:
    """Returns ``name==version`` for each requirement of the project and of its extras."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [(text, REQUIREMENT.match(text.replace(" ", ""))) for each in lists for text in each]
    if without := [text for text, match in found if match is None]:
        raise SystemExit(f"pyproject.toml: a requirement without a lower bound: {', '.join(without)}")
    return [f"{match['name']}=={match['oldest']}" for _, match in found if match]


if __name__ == "__main__":
    print("\n".join(oldest()))
