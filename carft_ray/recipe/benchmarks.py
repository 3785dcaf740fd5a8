"""The benchmarks that ``source: benchmark`` knows by name: what a recipe may say of each.

The layout of their files is in ``data/benchmark_sets/layouts.toml``, facts about their classes in ``facts/`` there.
"""

from dataclasses import dataclass

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

    splits: tuple[str, ...] = ()
    needs_split: bool = False
    has_domains: bool = False
    has_templates: bool = True
    only_tests: str = ""


_TRAIN_TEST = Benchmark(("train", "test"), needs_split=True)
_THREE = Benchmark(("train", "val", "test"), needs_split=True)
_DOMAINS = Benchmark(IN_OUT, has_domains=True, has_templates=False)
_WILDS = ("train", "id_val", "val", "id_test", "test")

BENCHMARKS: dict[str, Benchmark] = {
    "imagenet": Benchmark(("train", "val"), needs_split=True),
    "imagenet-v2": Benchmark(),
    "imagenet-r": Benchmark(),
    "imagenet-a": Benchmark(),
    "imagenet-sketch": Benchmark(),
    "objectnet": Benchmark(only_tests="its licence forbids to tune the parameters of any model with it"),
    "pacs": _DOMAINS,
    "vlcs": _DOMAINS,
    "office-home": _DOMAINS,
    "terra-incognita": _DOMAINS,
    "domain-net": _DOMAINS,
    "fmow": Benchmark(_WILDS, needs_split=True),
    "iwildcam": Benchmark(_WILDS, needs_split=True),
    "camelyon17": Benchmark(("train", "id_val", "val", "test"), needs_split=True, has_templates=False),
    "cifar10": _TRAIN_TEST,
    "cifar100": _TRAIN_TEST,
    "flowers102": _THREE,
    "fgvc-aircraft": Benchmark(("train", "val", "trainval", "test"), needs_split=True),
    "stanford-cars": _TRAIN_TEST,
    "food101": _TRAIN_TEST,
    "dtd": _THREE,
    "sun397": Benchmark(("train", "test")),
    "oxford-pets": Benchmark(("trainval", "test"), needs_split=True),
    "caltech101": Benchmark(),
}
