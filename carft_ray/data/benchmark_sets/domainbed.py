"""DomainBed's sets: ``root/domain/class/*``, and DomainBed's own split of every domain into 80 % and 20 %."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from carft_ray.data.benchmark_sets.facts import Facts
from carft_ray.data.benchmark_sets.layouts import Row, listing_of, tree_rows
from carft_ray.data.listing import Listing
from carft_ray.recipe.sets import BenchmarkSet

HOLDOUT = 0.2  # DomainBed's holdout_fraction


def domainbed(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists the domains of a set, or the ``in`` or ``out`` part of each."""
    rows: list[Row] = []
    classes: set[str] = set()
    for domain in chosen_domains(spec, facts):
        found = tree_rows(root, domain)
        classes |= {name for _, name in found}
        if spec.split is not None:
            held_out = holdout(len(found), spec.trial_seed, facts.domains.index(domain) if facts.domains else 0)
            found = [row for i, row in enumerate(found) if (i in held_out) == (spec.split == "out")]
        rows += found
    return replace(listing_of(root, rows), found=tuple(sorted(classes)))  # a fifth may lack some


def chosen_domains(spec: BenchmarkSet, facts: Facts) -> tuple[str, ...]:
    """Returns the domains that a set names; all where it names none."""
    return spec.domains or tuple(facts.domains or ())


def holdout(num_images: int, trial_seed: int, environment: int) -> set[int]:
    """Returns which images of a domain DomainBed holds out (its ``out`` split).

    facebookresearch/DomainBed, ``scripts/train.py`` and ``lib/misc.py`` (``split_dataset``, ``seed_hash``): the seed is
    the MD5 of the text of the pair, modulo 2**31; it shuffles the indices, and the first fifth is held out.

    Args:
        num_images: Images of the domain, in ``ImageFolder``'s order.
        trial_seed: DomainBed's ``--trial_seed``.
        environment: Position of the domain among the sorted domains.
    """
    text = str((trial_seed, environment))
    seed = int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 2**31
    order = list(range(num_images))
    np.random.RandomState(seed).shuffle(order)
    return set(order[: int(num_images * HOLDOUT)])
