"""What ``init`` writes recipes from: the recipes that ship with the package, and ranges of the search for other models.

``learning_rate`` for ViT-B: 140 public runs of plain fine-tuning of ViT-B/16 on ImageNet have their best OOD accuracy
at or below 1e-6 and their best ID accuracy at 1e-5; at 3e-5 both fall. For the other real models no such table is
public: their ranges are those of ViT-B moved by what larger and smaller models usually need, and are wide.
``kl_weight`` grows with the square of the model's logit scale, so its range belongs to a scale of about 100.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from carft_ray.errors import Problem, UsageError, require_choice
from carft_ray.recipe.written import parse_yaml

PACKAGED = Path(__file__).resolve().parents[1] / "search_spaces"
CHECKOUT = Path(__file__).resolve().parents[2] / "search_spaces"
SCHEMA = "carft-ray.schema.json"  # beside the recipes, for editors
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA}\n"


@dataclass(frozen=True)
class Ranges:
    """What a recipe for a model says.

    Attributes:
        learning_rate: Low and high end, searched on a log scale.
        start: Learning rate of the baselines.
        kl_weight: Low and high end, searched on a log scale.
        kl_start: KL weight of the baseline ``car_ft``.
        batch_size: Global batch of the base recipe.
        sure: The range of the learning rate comes from public runs of this very kind of model.
    """

    learning_rate: tuple[str, str]
    start: str
    kl_weight: tuple[str, str]
    kl_start: str
    batch_size: int
    sure: bool


_REAL = ("0.01", "100")
BACKBONES = {
    "sandbox": Ranges(("1e-4", "5e-3"), "5e-4", ("0.1", "100"), "10", 64, True),
    "ViT-B-16": Ranges(("3e-7", "3e-5"), "1e-5", _REAL, "1", 512, True),
    "ViT-B-32": Ranges(("3e-7", "3e-5"), "1e-5", _REAL, "1", 512, True),
    "ViT-L": Ranges(("1e-7", "3e-5"), "1e-5", _REAL, "1", 512, False),
    "RN": Ranges(("1e-6", "3e-4"), "3e-5", _REAL, "1", 512, False),
    "": Ranges(("1e-7", "1e-4"), "1e-5", _REAL, "1", 512, False),
}


def ranges_for(model: str) -> Ranges:
    """Returns the ranges for a model name; the longest beginning that fits decides."""
    return BACKBONES[max((name for name in BACKBONES if model.startswith(name)), key=len)]


def presets() -> dict[str, str]:
    """Returns the names of the recipes and what each is for (its first line), sorted by name."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_folder().glob("*.yaml"))}
    return {name: text.removeprefix(SCHEMA_LINE).splitlines()[0].lstrip("# ").rstrip() for name, text in texts.items()}


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
    data = parse_yaml(written, name).value["data"]
    trained = data["train"].get("domains", ())
    tested = [domain for one in data.get("ood_test", {}).values() for domain in one.get("domains", ())]
    if len(tested) != 1 or len(trained) < 2:
        raise UsageError(Problem("--hold-out", f"the preset {name} leaves no domain out", repr(hold_out)))
    require_choice("--hold-out", f"must be a domain of {name}", hold_out, sorted((*trained, *tested)))
    pair = {hold_out: tested[0], tested[0]: hold_out}
    pair |= {_set_name(one): _set_name(other) for one, other in pair.items() if _set_name(one) != one}
    words = "|".join(re.escape(word) for word in sorted(pair, key=len, reverse=True))
    return re.sub(rf"(?<![\w-])({words})(?![\w-])", lambda found: pair[found[1]], written)


def _set_name(domain: str) -> str:
    """Returns the name that these recipes give to the set of a domain."""
    return domain.lower().replace(" ", "_")


def schema_text() -> str:
    """Returns the JSON schema of a recipe."""
    return (_folder() / SCHEMA).read_text(encoding="utf-8")


def _folder() -> Path:
    """Returns where the recipes are: inside an installed package, next to it in a checkout."""
    return PACKAGED if PACKAGED.is_dir() else CHECKOUT
