"""The benchmarks that ``source: benchmark`` knows by name: one record for each, a JSON file in ``benchmarks/``.

``tests/benchmark_sources.json`` has the public sources that were compared for each record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

IN_OUT = ("in", "out")  # DomainBed's own: 80 % and 20 % of every domain


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is known of one benchmark; a key that its record leaves out has the default.

    Attributes:
        title: Name for people.
        splits: Values of ``split``.
        needs_split: Whether it must be given; else all images are meant without.
        only_tests: Why it may have a test role only; empty for the others.
        folders: Where under the set's path its root may be, by preference: the archives' folders; '' is the path.
        lister: The function of ``data.benchmarks.layouts`` that lists the images.
        images: Folders of the root that hold the images, {split} for the split; '' is the root. Sets of domains have
            the folders of the domains instead.
        signs: What else must be in the root, as a pattern: lists of the split, or what tells it from another folder.
        step: What to do about a folder without all this; empty: the layout is in the documents.
        is_sparse: Whether a split may lack classes while its images are told apart between all of them.
        domains: Folders of the domains in DomainBed's order; empty for a set without ``domains``.
        counts: Number of images for each split or domain; empty where no two independent sources agree.
        within: Set over whose classes logits are made before they are cut to this set's classes.
        groups: For each class its indices in ``within``. None: by equal name.
        classes: Folders, or labels of the table, in the order of this set's labels. The second of two labels with one
            name has its number behind the name.
        words: What stands for a class in a prompt, in the same order. None: see ``data.benchmarks.reader``.
        templates: Prompt templates with ``{}``; empty: ``heads.templates`` cannot name the set.
    """

    title: str
    splits: tuple[str, ...] = ()
    needs_split: bool = False
    only_tests: str = ""
    folders: tuple[str, ...]
    lister: str
    images: tuple[str, ...] = ("",)
    signs: tuple[str, ...] = ()
    step: str = ""
    is_sparse: bool = False
    domains: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    within: str | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    classes: tuple[str, ...]
    words: tuple[str, ...] | None = None
    templates: tuple[str, ...] = ()


RECORDS = Path(__file__).with_suffix("")
_record = TypeAdapter(Benchmark)
BENCHMARKS = {path.stem: _record.validate_json(path.read_bytes()) for path in sorted(RECORDS.glob("*.json"))}
