"""What a study was made of, compared with what a command has loaded: images, classes, prompts, model, views.

The log keeps it (``study.provenance``). Whatever loads something of a study compares first, and writes nothing if it
differs: numbers of other weights, classes or images would look like numbers of the study.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carft_ray.data.corruptions import CorruptedSource
from carft_ray.data.listing import StoredSource
from carft_ray.data.source import Source, image_digest, set_digest
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.written import shown

NUM_NAMED = 3  # classes or images in a message
_UNKNOWN: tuple[Any, ...] = (None, [])  # a part that a study has not noted
_CONFIG = "Restore the configuration beside the weights"
# place, what it is, its keys in the provenance, next step
_PARTS = (
    ("data.classes", "the classes", ("classes",), "Restore their names and order"),
    ("prompts.class_names", "the names of the classes in prompts", ("class_names",), "Restore them"),
    ("prompts.templates", "the templates", ("templates",), "Restore them, such as by the release of the study"),
    ("model", "the weights", ("model", "weights_hash"), "Restore the weights"),
    ("model", "the architecture", ("model", "config_hash"), _CONFIG),
    ("model", "the size of images", ("augmentation", "image_size"), _CONFIG),
    ("model", "the resizing of images", ("augmentation", "evaluation"), _CONFIG),
    ("model", "the mean of pixels", ("augmentation", "mean"), _CONFIG),
    ("model", "the deviation of pixels", ("augmentation", "std"), _CONFIG),
    ("train.compile", "the meaning of auto", ("preparation", "compile"), "Restore the study's folder prepared"),
    (
        "code",
        "the training views",
        ("augmentation", "view_version"),
        "Run the code of the study (its commit is recorded there)",
    ),
)
_log = logging.getLogger(__name__)


def images_of(source: Source) -> Source:
    """Returns a set; of a corrupted one, the set of its images without corruption."""
    return source.images if isinstance(source, CorruptedSource) else source


def contents(source: Source, digests: Sequence[bytes]) -> dict[str, Any]:
    """Returns ``digest`` and ``num_images`` of a set, and ``num_skipped`` if images were left out as undecodable.

    Args:
        source: The set.
        digests: Of its images, in order: hashes of the files, those without corruption for a corrupted set; of a set
            that is drawn, hashes of the pixels as they are shown.
    """
    images = images_of(source)
    if isinstance(source, CorruptedSource) and isinstance(images, StoredSource):
        digests = [image_digest(source.shown_content(digest)) for digest in digests]
    found: dict[str, Any] = {"digest": set_digest(source, list(digests)), "num_images": len(source)}
    if skipped := getattr(images, "skipped", ()):
        found["num_skipped"] = len(skipped)
    return found


def require_same(
    kept: Mapping[str, Any], found: Mapping[str, Any], changed_images: Callable[[str], Sequence[str]] = lambda name: ()
) -> None:
    """Compares a study with what was loaded. The log of this process names the parts that the study has not noted.

    Args:
        kept: A provenance of the study; empty for a new one, with which nothing is compared.
        found: The same keys, or some of them, of what was loaded.
        changed_images: Returns names of the images of a set that differ, if they are known.

    Raises:
        DataError: Something differs; names it, with the hashes of both sides.
    """
    if problems := differences_of(kept, found, changed_images):
        raise DataError(problems)
    unknown = [what for _, what, keys, _ in _PARTS if _at(kept, keys) in _UNKNOWN and _at(found, keys)]
    unknown += [_place(name) for name in found.get("data", {}) if name not in kept.get("data", {})]
    if kept and unknown:
        _log.warning("The study has not noted %s: not compared", ", ".join(unknown))


def differences_of(
    kept: Mapping[str, Any], found: Mapping[str, Any], changed_images: Callable[[str], Sequence[str]] = lambda name: ()
) -> list[Problem]:
    """Returns a problem for each set and each part that differs; the arguments are those of ``require_same``."""
    problems: list[Problem] = []
    for place, what, keys, step in _PARTS:
        was, now = (_at(each, keys) for each in (kept, found))
        if was in _UNKNOWN or now is None or was == now:
            continue
        if what == _PARTS[1][1] and problems and problems[-1].place == _PARTS[0][0]:
            continue  # they follow from the classes
        rule, value = f"{what} must be as in the study, {_short(was)}", _short(now)
        if isinstance(was, list) and isinstance(now, list):
            value += f"; {_some(_changed_words(was, now))}"
        problems.append(Problem(place, rule, value, next_step=f"{step}, or start again in another folder."))
    for name, was in kept.get("data", {}).items():
        now = found.get("data", {}).get(name)
        if now is None or now == was:
            continue
        rule = f"the contents of this set must be those of the study, digest {was['digest'][:12]}"
        value = f"digest {now['digest'][:12]} now"
        if now["num_images"] != was["num_images"]:
            value += f", {now['num_images']} images instead of {was['num_images']}"
        if some := changed_images(name):
            value += f"; {_some(some)}"
        step = "Restore the images, or start again in another folder: results on two data sets cannot be mixed."
        problems.append(Problem(_place(name), rule, value, next_step=step))
    return problems


def _place(name: str) -> str:
    return f"data.{name}" if name in ("train", "id_val") else f"data.ood_val.{name}"


def _at(found: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _short(value: Any) -> str:
    """Returns a value for a message; a list by its hash."""
    if not isinstance(value, list):
        return shown(value)
    return f"hash {image_digest(json.dumps(value).encode()).hex()[:12]}"


def _changed_words(was: Sequence[Any], now: Sequence[Any]) -> list[str]:
    """Returns which words of a list are gone, which are new, or else which stand at another position."""
    before, after = set(was), set(now)
    changed = [f"{shown(word)} is missing" for word in was if word not in after]
    changed += [f"{shown(word)} is new" for word in now if word not in before]
    pairs = enumerate(zip(was, now, strict=False), start=1)
    return changed or [f"number {n} is {shown(new)} instead of {shown(old)}" for n, (old, new) in pairs if old != new]


def _some(changed: Sequence[str]) -> str:
    more = len(changed) - NUM_NAMED
    return ", ".join(changed[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
