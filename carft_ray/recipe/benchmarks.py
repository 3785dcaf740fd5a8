"""The benchmarks that ``source: benchmark`` knows by name: what a recipe may say of each (``benchmarks.toml``).

The layout of their files is in ``data/benchmarks/layouts.toml``, facts about their classes in ``facts/`` there.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IN_OUT = ("in", "out")  # DomainBed's own: 80 % and 20 % of every domain


@dataclass(frozen=True)
class Benchmark:
    """What a recipe may say of one benchmark.

    Attributes:
        splits: Values of ``split``.
        needs_split: Whether it must be given; else all images are meant without.
        has_domains: Whether ``domains`` may choose among its domains.
        has_templates: Whether ``prompts.templates`` may be its name.
        only_tests: Why it may have a test role only; empty for the others.
    """

    splits: Sequence[str] = ()
    needs_split: bool = False
    has_domains: bool = False
    has_templates: bool = True
    only_tests: str = ""


_FACTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
BENCHMARKS = {name: Benchmark(**facts) for name, facts in _FACTS.items()}
