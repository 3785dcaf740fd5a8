"""Sets that show the same images, such as a set and the same set under corruptions: their images are one sample.

A model that is right on an image is likely right on its corrupted version. So the accuracies of two such sets are no
independent measurements: what their images add to a variance is that of one value per image, over all of these sets.

Shape letters: r seeds, n images of one set, N images of several sets together.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from carft_ray.data.listing import sample_id
from carft_ray.data.role_checks import name_space
from carft_ray.data.source import IdArray
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schema.data import plain
from carft_ray.recipe.schema.recipe import Recipe

FloatArray = npt.NDArray[np.float64]
ImagesBySet = Mapping[str, IdArray]
Part = tuple[tuple[str, ...], float, FloatArray]  # sets, weight, values [r, n]


def with_images(spec: ObjectiveSpec, recipe: Recipe, ids: ImagesBySet) -> ObjectiveSpec:
    """Returns the objective with the images of its sets, if two of them may show the same ones; else as it is.

    Sample ids are hashes of names, which depend on no folder: images are the same if their ids are equal and their
    names are those of one place (``role_checks.name_space``).

    Args:
        spec: The objective over sets of the recipe.
        recipe: The recipe.
        ids: Sample ids per set, uint64 [n], in the order of the arrays that the objective is used with; of all its
            sets, or of those that it is used with.
    """
    places = {str(path[-1]): name_space(plain(each)) for path, each in named_sets(recipe).items()}
    names = [name for name in spec.sets if name in ids]
    if len({places[name] for name in names}) == len(names):
        return spec
    return replace(spec, images={name: ids[name] ^ np.uint64(sample_id(repr(places[name]))) for name in names})


def parts(arrays: Mapping[str, FloatArray], weights: Mapping[str, float], images: ImagesBySet | None) -> list[Part]:
    """Returns what sum_j w_j mean_k x_jqk varies with: parts without a common image, each with its weight.

    A set that shares no image is a part as it is. Sets that share images become one part of weight 1 over the N images
    that are in any of them, with the value N sum_j (w_j / n_j) (x_jqk - x_jq.) over the sets j that have image k. If
    all of them have all images, its variances are those of sum_j w_j x_jqk.

    Args:
        arrays: Per set j an array [r, n_j].
        weights: w_j.
        images: Per set an id of each image; equal ids are one image. None: no two sets share one.
    """
    return [_joined(group, arrays, weights, images) for group in groups(arrays, images)]


def groups(names: Mapping[str, object], images: ImagesBySet | None) -> list[tuple[str, ...]]:
    """Returns the sets that share images with each other, also by way of a third; most are alone."""
    found: list[tuple[str, ...]] = []
    for name in names:
        near = [g for g in found if images is not None and any(np.isin(images[name], images[o]).any() for o in g)]
        found = [*(group for group in found if group not in near), (*itertools.chain(*near), name)]
    return found


def joined_width(widths: Mapping[str, float], arrays: Mapping[str, FloatArray], images: ImagesBySet | None) -> float:
    """Returns the half-width of a sum of accuracies from those of the accuracies d_j, as MOVER joins them.

    sqrt(sum_jl rho_jl d_j d_l) with rho_jl the correlation of the accuracies (Zou 2007, Psychological Methods 12, 399):
    0 without common images, else by the common images. It counts as the largest possible one where a set has the same
    answer on all images, which shows none.

    Args:
        widths: d_j per set.
        arrays: Per set an array [1, n_j].
        images: As for ``parts``.
    """
    found = []
    for group in groups(arrays, images):
        total = math.fsum(widths[name] ** 2 for name in group)
        for one, other in itertools.combinations(group, 2):
            total += 2 * widths[one] * widths[other] * _correlation(one, other, arrays, images or {})
        found.append(widths[group[0]] if len(group) == 1 else math.sqrt(max(0.0, total)))
    return math.hypot(*found)


def _joined(
    group: tuple[str, ...], arrays: Mapping[str, FloatArray], weights: Mapping[str, float], images: ImagesBySet | None
) -> Part:
    if images is None or len(group) == 1:
        return group, weights[group[0]], arrays[group[0]]
    ids = np.unique(np.concatenate([images[name] for name in group]))
    joint = np.zeros((len(arrays[group[0]]), len(ids)))
    for name in group:
        own: FloatArray = np.asarray(arrays[name], np.float64)
        share = weights[name] * len(ids) / own.shape[1]
        joint[:, np.searchsorted(ids, images[name])] += share * (own - own.mean(axis=1, keepdims=True))
    return group, 1.0, joint


def _correlation(one: str, other: str, arrays: Mapping[str, FloatArray], images: ImagesBySet) -> float:
    _, mine, theirs = np.intersect1d(images[one], images[other], assume_unique=True, return_indices=True)
    x, y = (np.asarray(arrays[name], np.float64)[0] - arrays[name].mean() for name in (one, other))
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x[mine] @ y[theirs]) / size if size else len(mine) / math.sqrt(len(x) * len(y))
