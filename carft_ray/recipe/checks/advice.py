"""Advice on a valid recipe: what keeps it from being searched, and settings that have no effect."""

import posixpath
from collections.abc import Iterator
from typing import Any, get_args

from carft_ray.errors import Problem
from carft_ray.recipe.benchmarks import IN_OUT
from carft_ray.recipe.checks.rules import benchmark_sets, named_sets
from carft_ray.recipe.checks.sampler_rules import sampler_advice
from carft_ray.recipe.messages import shown
from carft_ray.recipe.schedule import possible_values
from carft_ray.recipe.schema.fields import Config
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.sets import BenchmarkSet, CorruptedSet, Corruption, SandboxSet, SetSpec, plain
from carft_ray.recipe.text import dotted
from carft_ray.words import counted

FEW_EPOCHS = 10  # with fewer, intermediate values hardly predicted the final one (measured rank correlations .1 to .7)


def check_searchable(recipe: Recipe) -> list[Problem]:
    """Returns what keeps a valid recipe from being searched; ``train`` accepts it."""
    problems = []
    if not recipe.search.space:
        step = "Add a parameter, for example learning_rate: {low: 1e-6, high: 1e-4, log: true}."
        problems.append(Problem("search.space", "must contain at least one parameter to search", next_step=step))
    if recipe.train.alpha is not None:
        step = "Remove train.alpha (--set train.alpha=null)."
        rule = "must not be fixed in a search, which finds alpha itself"
        problems.append(Problem("train.alpha", rule, shown(recipe.train.alpha), next_step=step))
    return problems


def warnings(recipe: Recipe) -> list[str]:
    """Names the settings that have no effect or another one than they seem to have, a sentence each."""
    return [f"{key} {what}" for key, what in _idle(recipe)] + list(_domains(recipe))


def _idle(recipe: Recipe) -> Iterator[tuple[str, str]]:
    train, search, space = recipe.train, recipe.search, recipe.search.space
    kind, best, templates = search.objective.kind, search.objective.best, recipe.prompts.templates

    def always(name: str, value: Any) -> bool:
        """Returns whether a field of ``train`` has this value in all trials."""
        return name not in space and bool(getattr(train, name) == value)

    if isinstance(plain(recipe.data.train), SandboxSet):
        for name in ("pack", "resize_short_side"):
            if _is_changed(recipe.data, name):
                yield f"data.{name}", "has no effect: the images of data.train are drawn and kept decoded"
    if recipe.budget.gpu_hours is not None and recipe.resources.gpus_per_worker == 0:
        yield "budget.gpu_hours", "has no effect: resources.gpus_per_worker is 0"
    if (gpus := recipe.resources.gpus_per_worker or 0) > 1 and train.function is None:
        more = f"takes {gpus:g} GPUs for each worker, which computes on one"
        yield "resources.gpus_per_worker", f"{more}; write 1, and num_workers: {gpus:g} to train on all of them"
    if train.alpha == 0:
        yield "train.alpha", "is 0: the result is the zero-shot model, whatever is trained"
    for name, of, value in (("context_scale", "kl_weight", 0), ("lora_alpha", "lora_rank", None)):
        if always(of, value) and getattr(train, name) is not None:
            yield f"train.{name}", f"has no effect: {of} is {shown(value)}"
        if always(of, value) and name in space:
            yield f"search.space.{name}", f"has no effect: {of} is {shown(value)}"
    if isinstance(templates, tuple) and len(templates) == 1 and not always("kl_weight", 0):
        yield "train.kl_weight", "has no effect: with one template the KL term is always 0"
    if train.decay != "all" and always("weight_decay", 0):
        yield "train.decay", "has no effect: weight_decay is 0"
    if train.head_bias and always("head_lr_factor", 0):
        yield "train.head_bias", "has no effect: head_lr_factor is 0, so it stays 0"
    if always("ema_decay", 0):
        yield "train.ema_decay", "has no effect: an average with decay 0 is the last step; null does the same"
    if train.precision == "fp64":
        yield "train.precision", "fp64 is for checks of the numbers: several times slower, no better"
    if _is_changed(search.objective, "id_weight") and kind not in ("weighted_mean", "pareto"):
        yield "search.objective.id_weight", f"has no effect: the objective is {kind}"
    if kind != "pareto" and best != "knee":
        yield "search.objective.best", f"has no effect: the objective is {kind}"
    if _is_changed(search.objective, "tolerance") and (kind, best) != ("pareto", "lexicographic"):
        yield "search.objective.tolerance", "has no effect: it belongs to kind pareto with best: lexicographic"
    if not recipe.data.ood_val:
        yield "search.objective", "is only ID accuracy: data.ood_val has no set"
    for path, spec in benchmark_sets(recipe).items():
        if spec.trial_seed and spec.split not in IN_OUT:
            yield dotted((*path, "trial_seed")), "has no effect: it belongs to DomainBed's splits in and out"
    yield from sampler_advice(recipe)
    if search.pruner.name != "none" and (fewest := min(possible_values(recipe, "epochs"))) < FEW_EPOCHS:
        few = f"{counted(fewest, 'epoch')}, fewer than {FEW_EPOCHS}"
        why = f"a training has {few}, and its intermediate values hardly predict its result"
        yield "search.pruner", f"is weakly informative: {why}"
    if recipe.model.name != "sandbox" and templates == "sandbox":
        yield "prompts.templates", f"sandbox describes the sandbox's own pictures; for {recipe.model.name} try openai"


def _is_changed(part: Config, key: str) -> bool:
    return bool(getattr(part, key) != type(part).model_fields[key].default)


def _domains(recipe: Recipe) -> Iterator[str]:
    """Shifts that are none, or that selection has already seen."""
    sets = named_sets(recipe)
    train = _domain_names(recipe.data.train)
    seen = {domain: path for path, spec in sets.items() if path[1] == "ood_val" for domain in _domain_names(spec)}
    for path, spec in sets.items():
        domains = _domain_names(spec)
        if path[1] in ("ood_val", "ood_test") and train & domains:
            yield f"{dotted(path)} is not a shift: data.train has the same domain"
        elif path[1] == "ood_test" and domains & seen.keys():
            first = dotted(seen[min(domains & seen.keys())])
            yield f"{dotted(path)} has other images of a shift that {first} already uses for selection"
        elif path[1] == "ood_val" and isinstance(spec, BenchmarkSet) and spec.name == "imagenet-v2":
            yield f"{dotted(path)} is ImageNet-V2, which ranks models as ID does: it is not an OOD validation set"


def _domain_names(spec: SetSpec) -> set[tuple[str, str]]:
    if isinstance(spec, CorruptedSet):
        return {("corrupted", name) for name in spec.corruptions or get_args(Corruption)}
    if isinstance(spec, SandboxSet):
        return {("sandbox", spec.domain)}
    return {(posixpath.normpath(spec.path), domain) for domain in getattr(spec, "domains", None) or ()}
