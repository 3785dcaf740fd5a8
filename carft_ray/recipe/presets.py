"""The recipes that ship with the package, by name; what each is for stands in its first line."""

import re
from pathlib import Path

from carft_ray.errors import Problem, UsageError, nearest
from carft_ray.recipe import text

PACKAGED = Path(__file__).resolve().parents[1] / "search_spaces"
CHECKOUT = Path(__file__).resolve().parents[2] / "search_spaces"


def presets() -> dict[str, str]:
    """Returns the names of the recipes and what each is for, sorted by name."""
    return {path.stem: _first_line(path) for path in sorted(_folder().glob("*.yaml"))}


def preset_text(name: str, hold_out: str | None = None) -> str:
    """Returns the text of a recipe.

    Args:
        name: One of ``presets``.
        hold_out: Domain that is left out of the training and tested, for a recipe that leaves one domain out; it
            changes places with the one that the recipe holds out.

    Raises:
        UsageError: The recipe leaves no domain out, or has no such domain.
    """
    written = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    if hold_out is None:
        return written
    data = text.parse(written, name).value["data"]
    trained = data["train"].get("domains", ())
    tested = [domain for one in data.get("ood_test", {}).values() for domain in one.get("domains", ())]
    if len(tested) != 1 or len(trained) < 2:
        raise UsageError(Problem("--hold-out", f"the preset {name} leaves no domain out", repr(hold_out)))
    if hold_out not in (*trained, *tested):
        allowed = tuple(sorted((*trained, *tested)))
        rule = f"must be a domain of {name}"
        raise UsageError(Problem("--hold-out", rule, repr(hold_out), allowed, nearest(hold_out, allowed)))
    pair = {hold_out: tested[0], tested[0]: hold_out}
    pair |= {_set_name(one): _set_name(other) for one, other in pair.items() if _set_name(one) != one}
    words = "|".join(re.escape(word) for word in sorted(pair, key=len, reverse=True))
    return re.sub(rf"(?<![\w-])({words})(?![\w-])", lambda found: pair[found[1]], written)


def _set_name(domain: str) -> str:
    """Returns the name that these recipes give to the set of a domain."""
    return domain.lower().replace(" ", "_")


def _folder() -> Path:
    """Returns where the recipes lie: inside an installed package, beside it in a checkout."""
    return PACKAGED if PACKAGED.is_dir() else CHECKOUT


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").rstrip()
