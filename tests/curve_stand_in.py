"""Trainings without torch that have an alpha curve of ID and OOD accuracy and a violation, of an open study."""

import math

import stand_in

from carft_ray import files
from carft_ray.evaluation.alpha_curve import limits
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store import attempt_files

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ZERO_SHOT = {"objective": 0.55, "id_accuracy": 0.6, "ood_accuracy": 0.5}


def make_recipe(trials=4, **search):
    """The recipe of a Pareto search; ``objective`` and the like over it."""
    content = stand_in.make_recipe(trials, resources=search.pop("resources", {})).model_dump(mode="json")
    content["data"]["ood_val"] = {"sketch": {**stand_in.SANDBOX_SET, "domain": "sketch", "split": "val"}}
    content["search"]["space"]["alpha"] = {"low": 0.1, "high": 1.0}
    content["search"] |= {"objective": {"kind": "pareto"}, "alpha": {"mode": "sample"}, "keep_checkpoints": 1, **search}
    if content["search"]["alpha"].get("mode") != "sample":
        del content["search"]["space"]["alpha"]
    return Recipe.model_validate(content)


def metrics_at(train, alpha):
    """ID rises with alpha, OOD rises and falls, both by what the training is."""
    good = 1 / (1 + math.log10(train.learning_rate / 1e-3) ** 2)
    id_accuracy = 0.6 + 0.25 * good * alpha
    ood_accuracy = 0.5 + 0.3 * good * alpha * (0.9 - alpha) + 0.01 * math.log10(1 + train.kl_weight) * alpha
    means = {"objective": (id_accuracy + ood_accuracy) / 2, "id_accuracy": id_accuracy, "ood_accuracy": ood_accuracy}
    return {**means, "accuracy/id_val": id_accuracy, "accuracy/sketch": ood_accuracy}


def result_of(recipe, references):
    """The content of a result: at the alpha drawn, else at the best of the grid."""
    alphas = sorted({*GRID, recipe.train.alpha or 1.0})
    bounds = limits(recipe.search.constraints, references)

    def at(alpha):
        found = metrics_at(recipe.train, alpha)
        missed = {f"violation/{limit.name}": limit.violation(found["id_accuracy"]) for limit in bounds}
        return {**found, **missed}

    best = max(alphas[1:], key=lambda alpha: at(alpha)["objective"])
    alpha = best if recipe.train.alpha is None else recipe.train.alpha
    curve = [{"alpha": each, **at(each)} for each in alphas]
    metrics = at(alpha)
    content = {"objective": metrics["objective"], "alpha": alpha, "metrics": metrics, "curve": curve, "elapsed_s": 0.1}
    content["train"] = recipe.train.model_dump(mode="json")
    return {"num_images": {"train": 64, "id_val": 64, "sketch": 64}, **content}


def write_result(study, spec):
    place, recipe = spec.place(study.study_dir), apply(study.recipe, spec.values)
    files.write_bytes(place / "fine_tuned.safetensors", b"weights")
    attempt_files.write_result(place, result_of(recipe, spec.references))


def run_all(study, num=None):
    """Runs what the study proposes, at most ``num`` attempts; returns the specs."""
    specs = []
    while (num is None or len(specs) < num) and (spec := study.next()) is not None:
        write_result(study, spec)
        assert study.settle(spec) is not None
        specs.append(spec)
    return specs
