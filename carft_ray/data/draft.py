"""A recipe for a folder of images that somebody has, written with comments, to be read and changed.

The roles are a proposal: the largest domain (or the one that is asked for) trains, a part of it is ``id_val`` and one
is ``id_test`` unless the tree has splits; the other domains are shared out between ``ood_val`` and ``ood_test``.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from carft_ray.data.benchmark_sets.reader import benchmark_words
from carft_ray.data.survey import ClassRoot
from carft_ray.errors import Problem, UsageError, nearest
from carft_ray.recipe.presets import ranges_for

SHARE = 0.1  # of the training images, for id_val and for id_test each, where the tree has no such split
OOD_SPLITS = ("test", "val", "train", "")  # which images of a domain show the shift: the first that is there
SEVERITY = 3
IDS = "imagenet"  # the benchmark whose classes are known by their WordNet ids
WEATHER = ("fog", "frost", "gaussian_noise", "defocus_blur", "jpeg_compression")


@dataclass(frozen=True)
class Roles:
    """Which domains serve as what; '' is the one domain of a tree without domains."""

    train: str
    ood_val: tuple[str, ...]
    ood_test: tuple[str, ...]


def choose_roles(
    found: Sequence[ClassRoot], train: str | None, ood_val: Sequence[str] | None, ood_test: Sequence[str] | None
) -> Roles:
    """Returns the roles of the domains: as asked for, the rest as proposed.

    Args:
        found: What the tree holds.
        train: Domain that trains; None: the one with the most images.
        ood_val: Domains of the selection; None: half of those that are left, at least one.
        ood_test: Domains of the test; None: the rest.

    Raises:
        UsageError: A domain is not there or has two roles.
    """
    sizes: dict[str, int] = {}
    for one in found:
        sizes[one.domain] = sizes.get(one.domain, 0) + one.num_images
    asked = [("--train", train), *(("--ood-val", name) for name in ood_val or ())]
    asked += [("--ood-test", name) for name in ood_test or ()]
    problems, seen = [], dict[str, str]()
    for option, name in asked:
        if name is None:
            continue
        if name not in sizes:
            rule = "must be a domain of the folder"
            problems.append(Problem(option, rule, repr(name), tuple(sorted(sizes)), nearest(name, sizes)))
        elif name in seen:
            problems.append(Problem(option, f"a domain has one role, and {seen[name]} has this one", repr(name)))
        seen[name] = option
    if problems:
        raise UsageError(problems)
    free = [name for name in sorted(sizes) if name not in seen]
    if train is None:
        train = max(free or sorted(sizes), key=lambda name: sizes[name])
        free = [name for name in free if name != train]
    if ood_val is None and ood_test is None:
        half = (len(free) + 1) // 2
        return Roles(train, tuple(free[:half]), tuple(free[half:]))
    if ood_val is None:
        return Roles(train, tuple(free), tuple(ood_test or ()))
    return Roles(train, tuple(ood_val), tuple(free) if ood_test is None else tuple(ood_test))


def draft(
    name: str, path: str, found: Sequence[ClassRoot], roles: Roles, model: str, pretrained: str | None, num_cores: int
) -> str:
    """Returns the text of a recipe.

    Args:
        name: Of the study.
        path: Root of the tree as the recipe writes it.
        found: What the tree holds.
        roles: Which domains serve as what.
        model: Name of the model.
        pretrained: Its weights.
        num_cores: Cores of this machine.
    """
    ranges = ranges_for(model)
    classes = sorted({c for one in found if one.domain == roles.train for c in one.counts})
    train = _size(found, roles.train)
    batch = max(2, min(ranges.batch_size, 2 ** max(1, (train // 8).bit_length() - 1)))
    low, high = ranges.learning_rate
    about_rate = "" if ranges.sure else "   # a wide guess: no public table for this model"
    weights = "" if pretrained is None else f", pretrained: {_text(pretrained)}"
    templates = "sandbox" if model == "sandbox" else "openai"
    lines = [
        f"# A recipe for {_text(path)}: {len(classes)} classes. Choose the roles in `data`, then:",
        "#",
        "#     carft-ray doctor FILE                      looks at images, prompts and model",
        "#     carft-ray plan FILE                        how long it will take",
        "#     carft-ray search FILE --study studies/NAME",
        "#",
        "# Every key is explained in search_spaces/README.md; a key that is left out keeps its default.",
        "",
        "format_version: 1",
        f"name: {_text(name)}",
        "",
        f"model: {{name: {_text(model)}{weights}}}",
        "",
        *_data(path, found, roles, classes),
        "",
        "prompts:",
        f"  templates: {templates}",
        "  # The words for the classes, in label order. They stand in the sentences, so they must be words.",
        *_words(classes),
        "",
        "train:",
        f"  learning_rate: {ranges.start}",
        f"  kl_weight: {ranges.kl_start}",
        "  epochs: 10",
        f"  batch_size: {batch}             # the training set has about {train:,} images",
        "",
        "search:",
        "  trials: 16",
        "  space:",
        f"    learning_rate: {{low: {low}, high: {high}, log: true}}{about_rate}",
        f"    kl_weight: {{low: {ranges.kl_weight[0]}, high: {ranges.kl_weight[1]}, log: true}}",
        "  # Trained first and shown beside the trials. The zero-shot model is always shown.",
        "  baselines:",
        f"    fine_tuning: {{kl_weight: 0, learning_rate: {ranges.start}}}",
        f"    paper: {{kl_weight: {ranges.kl_start}, learning_rate: {ranges.start}}}",
        "",
        "resources:",
        "  num_workers: 1             # of one training; more are run by Ray Train, each with a GPU of its own",
        f"  threads: {max(1, num_cores // 2)}                 # of a worker on the CPU; trials run beside each other",
        "",
    ]
    return "\n".join(lines)


def _data(path: str, found: Sequence[ClassRoot], roles: Roles, classes: Sequence[str]) -> list[str]:
    missing = _splits(found, roles.train)[1]
    lines = ["# Sets by role. train trains; id_val and ood_val choose; id_test and ood_test are read by `test` alone."]
    lines.append("data:")
    for role, split in (("train", "train"), ("id_val", "val"), ("id_test", "test")):
        lines.append(f"  {role}: {{{_id_set(path, found, roles.train, split)}}}")
        if role == "train" and missing:
            lines.append(
                "  # id_val and id_test are other images of the same domain, told apart by a hash of their names"
            )
    halves = bool(roles.ood_val) and not roles.ood_test
    lines.append(
        "  # Shifts. Those of ood_val choose, so what ood_test shows must be other shifts, not only other images."
    )
    if not roles.ood_val:
        of = _id_set(path, found, roles.train, "val")
        lines += [
            "  # The tree has one domain. Corrupted images of id_val stand in for a shift: better than none, and no",
            "  # substitute for images of the places where the model will be used.",
            "  ood_val:",
            "    corrupted:",
            "      source: corrupted",
            f"      of: {{{of}}}",
            f"      corruptions: [{', '.join(WEATHER)}]",
            f"      severity: {SEVERITY}",
        ]
    for role, domains in (("ood_val", roles.ood_val), ("ood_test", roles.ood_val if halves else roles.ood_test)):
        if not domains:
            continue
        lines.append(f"  {role}:")
        if halves and role == "ood_test":
            lines.append("    # the same shift, other images: what it shows is too good for a new shift")
        for domain in domains:
            some = _some(found, domain, classes)
            half = {"ood_val": ", part: [0, 0.5]", "ood_test": ", part: [0.5, 1]"}[role] if halves else ""
            own = set_name(domain) + ("_test" if halves and role == "ood_test" else "")
            lines.append(f"    {_text(own)}: {{{_ood_set(path, found, domain)}{half}{some}}}")
    return lines


def _id_set(path: str, found: Sequence[ClassRoot], domain: str, split: str) -> str:
    """Returns the set of a split of a domain: its folder, or a part of the folder that trains."""
    by_split, missing = _splits(found, domain)
    if split in by_split and (split != "train" or not missing):
        return _folder(path, by_split[split])
    low = missing.index(split) if split in missing else len(missing)
    high = 1.0 if split == "train" else SHARE * (low + 1)
    return f"{_folder(path, by_split['train'])}, part: [{SHARE * low:g}, {high:g}]"


def _splits(found: Sequence[ClassRoot], domain: str) -> tuple[dict[str, ClassRoot], list[str]]:
    """Returns the folders of a domain by split, one of which is ``train``, and which of val and test are missing."""
    by_split = {one.split: one for one in found if one.domain == domain}
    if "train" not in by_split:
        largest = max(by_split.values(), key=lambda one: one.num_images)
        by_split["train"] = by_split.pop("" if "" in by_split else largest.split)
    return by_split, [split for split in ("val", "test") if split not in by_split]


def _ood_set(path: str, found: Sequence[ClassRoot], domain: str) -> str:
    by_split = {one.split: one for one in found if one.domain == domain}
    return _folder(path, next(by_split[split] for split in OOD_SPLITS if split in by_split))


def _folder(path: str, one: ClassRoot) -> str:
    if one.folder == ".":
        return f"source: folder, path: {_text(path)}"
    above, _, last = one.folder.rpartition("/")
    return f"source: folder, path: {_text(f'{path}/{above}' if above else path)}, domains: [{_text(last)}]"


def _some(found: Sequence[ClassRoot], domain: str, classes: Sequence[str]) -> str:
    there = {name for one in found if one.domain == domain for name in one.counts}
    return ", classes: some" if there < set(classes) else ""


def _size(found: Sequence[ClassRoot], domain: str) -> int:
    by_split, missing = _splits(found, domain)
    return round((1 - SHARE * len(missing)) * by_split["train"].num_images)


def _words(classes: Sequence[str]) -> list[str]:
    """Returns ``class_names``: ImageNet's for its ids, else readable folder names; a comment where these are none."""
    if set(classes) <= benchmark_words(IDS).keys():
        return [f"  class_names: {IDS}             # its words for the ids that the folders are named by"]
    words = [readable(name) for name in classes]
    listed = "[" + ", ".join(_text(word) for word in words) + "]"
    if all(re.search(r"[^\W\d_]{2}", word) and not re.fullmatch(r"n\d{8}", word) for word in words):
        return [f"  class_names: {listed}"]
    return ["  # THESE FOLDER NAMES ARE NO WORDS: replace them and remove the '#'.", f"  # class_names: {listed}"]


def readable(name: str) -> str:
    """Returns the name of a class folder as words: ``animals-nature``, ``animals_nature`` and ``animalsNature`` as two,
    ``012.Black_footed_Albatross`` without its number; ``t-shirt`` and what is no word stay as they are."""
    word = re.sub(r"^\d+[ ._-]+(?=.*[^\W\d_]{2})", "", name)
    word = re.sub(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})", " ", word.replace("_", " "))
    word = re.sub(r"(?<=[a-z]{2})([A-Z])(?=[a-z])", lambda found: f" {found[1].lower()}", word)
    return " ".join(word.split()) or name


def set_name(domain: str) -> str:
    """Returns a name for a set or a study that is like that of a folder."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", domain).strip("_-")
    return name if name and name[0].isalnum() else f"set_{name}"


def _text(value: str) -> str:
    """Returns a text as YAML writes it in a flow: plain where that is safe, else as JSON does."""
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "nan", ".nan", ".inf", "~")
