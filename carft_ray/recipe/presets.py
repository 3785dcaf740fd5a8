"""The recipes that ship with the package, by name; what each is for stands in its first line."""

from pathlib import Path

PACKAGED = Path(__file__).resolve().parents[1] / "search_spaces"
CHECKOUT = Path(__file__).resolve().parents[2] / "search_spaces"


def presets() -> dict[str, str]:
    """Returns the names of the recipes and what each is for, sorted by name."""
    return {path.stem: _first_line(path) for path in sorted(_folder().glob("*.yaml"))}


def preset_text(name: str) -> str:
    """Returns the text of a recipe.

    Raises:
        KeyError: There is none of this name.
    """
    if name not in presets():
        raise KeyError(name)
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _folder() -> Path:
    """Returns where the recipes lie: inside an installed package, beside it in a checkout."""
    return PACKAGED if PACKAGED.is_dir() else CHECKOUT


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").rstrip()
