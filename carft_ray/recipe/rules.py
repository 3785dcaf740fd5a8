"""Rules that read more than one key of a recipe, and advice on a valid one.

Advice names what keeps a recipe from being searched, and settings that have no effect. What a sampler cannot do was
read in Optuna 5.0, and a test holds each verdict; ``docs/samplers.md`` has all.
``study/proposals/optuna_samplers.py`` makes the samplers.
"""

import posixpath
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

from carft_ray.errors import Problem, nearest
from carft_ray.recipe.benchmarks import BENCHMARKS, IN_OUT
from carft_ray.recipe.schedule import can_cut, possible_values
from carft_ray.recipe.schema.data import BenchmarkSet, CorruptedSet, Corruption, SandboxSet, SetSpec, plain
from carft_ray.recipe.schema.fields import Config, core_type
from carft_ray.recipe.schema.model import CLASS_NAMES_RULE, TEMPLATES_RULE, ModelConfig, TemplateSet
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import (
    NOT_SEARCHABLE,
    SEARCHABLE,
    CategoricalParameter,
    IntParameter,
    NsgaSampler,
    Parameter,
    QmcSampler,
)
from carft_ray.recipe.schema.train import PENALTIES, SCHEDULED, TrainConfig, field_kind
from carft_ray.recipe.space import condition_problems, enqueue_problems, grid_size, num_values
from carft_ray.recipe.written import KeyPath, at, dotted, nearest_key, shown, train_problems, unlisted
from carft_ray.words import counted

ROLES = ("train", "id_val", "ood_val", "id_test", "ood_test")
TEMPLATE_SETS: tuple[str, ...] = (*get_args(TemplateSet), *(n for n, b in BENCHMARKS.items() if b.templates))
OF_PENALTIES = ("penalty_schedule", "teacher")  # without effect if nothing in ``SCHEDULED`` has a weight
LARGEST_POPULATION = 50  # Optuna's default
# what a sampler does with conditional parameters; all of them learn nothing from a pruned trial
UNLEARNED = {"gp": "not modelled", "nsga2": "not inherited"}
LEARNS_FROM_OTHERS = ("tpe", "gp")
FEW_EPOCHS = 10  # with fewer, intermediate values hardly predicted the final one (measured rank correlations .1 to .7)


def broken_rules(recipe: Recipe) -> list[Problem]:
    """Returns every broken rule between keys; an empty list for a recipe that may be used."""
    rules = (
        *(_sets, _classes, _prompts, _space, _alpha, _baselines, own_function_problems, _constraints),
        *(_pruner, _resources, condition_problems, enqueue_problems, sampler_problems),
    )
    return [*model_problems(recipe.model), *(problem for rule in rules for problem in rule(recipe))]


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """Finds weights that a kind of model must not be given, or needs."""
    path = ("model", "pretrained")
    if model.name == "sandbox" and model.pretrained is not None:
        rule = "must be left out for the sandbox, which has its own weights"
        step = "Remove it, or give the model that it belongs to as model.name."
        yield at(path, rule, shown(model.pretrained), next_step=step)
    if model.name != "sandbox" and ":" not in model.name and model.pretrained is None:
        rule = f"is required for {model.name}: the weights to start from"
        step = "Give a tag of open_clip such as openai, or the path of a weights file."
        yield at(path, rule, next_step=step)


def named_sets(recipe: Recipe) -> dict[KeyPath, SetSpec]:
    """Returns all sets of a recipe by key path, in the order of the roles."""
    data = recipe.data
    sets: dict[KeyPath, SetSpec | None] = {("data", "train"): data.train, ("data", "id_val"): data.id_val}
    sets |= {("data", "ood_val", name): spec for name, spec in data.ood_val.items()}
    sets |= {("data", "id_test"): data.id_test}
    sets |= {("data", "ood_test", name): spec for name, spec in data.ood_test.items()}
    return {path: spec for path, spec in sets.items() if spec is not None}


def benchmark_sets(recipe: Recipe) -> dict[KeyPath, BenchmarkSet]:
    """Returns the sets of a recipe that are benchmarks, those that are shown corrupted too, by key path."""
    sets = {
        (*path, "of") if isinstance(spec, CorruptedSet) else path: plain(spec)
        for path, spec in named_sets(recipe).items()
    }
    return {path: spec for path, spec in sets.items() if isinstance(spec, BenchmarkSet)}


def _sets(recipe: Recipe) -> Iterator[Problem]:
    for path in named_sets(recipe):
        if len(path) > 2 and path[-1] in ROLES:
            yield at(path, "a set must not have the name of a role")
        elif path[1] == "ood_test" and path[-1] in recipe.data.ood_val:
            yield at(path, "must differ from the names in data.ood_val")
    for path, images in benchmark_sets(recipe).items():
        yield from _benchmark(path, images)
    short_side, path = recipe.data.resize_short_side, ("data", "resize_short_side")
    if short_side is not None and recipe.data.pack == "never":
        rule = "must be left out with pack: never: the smaller images are kept in the cache"
        yield at(path, rule, str(short_side))


def _benchmark(path: KeyPath, spec: BenchmarkSet) -> Iterator[Problem]:
    key: KeyPath = (*path, "split")
    known = BENCHMARKS.get(spec.name)
    if known is None:
        rule = f"must be the name of a benchmark: {', '.join(BENCHMARKS)}"
        yield at((*path, "name"), rule, shown(spec.name), nearest=nearest(spec.name, BENCHMARKS))
        return
    if spec.split is None and known.needs_split:
        yield at(key, f"is required for {spec.name}", allowed=known.splits)
    elif spec.split is not None and not known.splits:
        yield at(key, f"must be left out: {spec.name} has no splits", shown(spec.split))
    elif spec.split is not None and spec.split not in known.splits:
        yield unlisted(key, f"must be a split of {spec.name}", spec.split, known.splits)
    if spec.domains is not None and not known.domains:
        rule = f"must be left out: {spec.name} has no domains"
        yield at((*path, "domains"), rule, shown(list(spec.domains)))
    if known.only_tests and path[1] not in ("id_test", "ood_test"):
        rule = f"{spec.name} must have a test role: {known.only_tests}"
        yield at((*path, "name"), rule, next_step="Move it to data.ood_test.")


def _classes(recipe: Recipe) -> Iterator[Problem]:
    classes, words, path = recipe.data.classes, recipe.prompts.class_names, ("prompts", "class_names")
    if isinstance(words, str):
        if words not in BENCHMARKS:
            yield unlisted(path, CLASS_NAMES_RULE, words, BENCHMARKS)
    elif classes is not None and words is not None and len(classes) != len(words):
        rule = f"must contain one text per class of data.classes ({len(classes)})"
        yield at(path, rule, str(len(words)))


def _prompts(recipe: Recipe) -> Iterator[Problem]:
    templates, path = recipe.prompts.templates, ("prompts", "templates")
    if isinstance(templates, str):
        if templates not in TEMPLATE_SETS:
            step = f"Write one template as a list: [{shown(templates)}]." if "{" in templates else ""
            yield replace(unlisted(path, TEMPLATES_RULE, templates, TEMPLATE_SETS), next_step=step)
        return
    if not templates:
        yield at(path, "must not be empty", "[]")
    for index, template in enumerate(templates):
        rest = template.replace("{}", "", 1)
        if rest == template or "{" in rest or "}" in rest:
            yield at((*path, index), "must contain {} once, for the class, and no other brace", shown(template))
        elif template in templates[:index]:
            yield at((*path, index), "must not repeat an earlier template", shown(template))


def _ends(parameter: Parameter) -> dict[KeyPath, Any]:
    """Returns the values that bound a parameter, by their keys."""
    if isinstance(parameter, CategoricalParameter):
        return {("choices", index): choice for index, choice in enumerate(parameter.choices)}
    return {("low",): parameter.low, ("high",): parameter.high}


def _space(recipe: Recipe) -> Iterator[Problem]:
    for name, parameter in recipe.search.space.items():
        path = ("search", "space", name)
        if name in NOT_SEARCHABLE:
            yield at(path, "must not be searched", next_step=NOT_SEARCHABLE[name])
        elif name not in SEARCHABLE:
            near = nearest_key(name.removeprefix("train."), SEARCHABLE)
            yield at(path, "must be a field of train", shown(name), SEARCHABLE, near)
        else:
            yield from _parameter(path, name, parameter)


def _parameter(path: KeyPath, name: str, parameter: Parameter) -> Iterator[Problem]:
    kind = field_kind(name)
    if kind in (bool, str) and not isinstance(parameter, CategoricalParameter):
        words = ("true", "false") if kind is bool else get_args(core_type(TrainConfig.model_fields[name].annotation))
        step = f"Write {name}: {{choices: [{', '.join(words)}]}}."
        yield at(path, f"{name} is not a number and needs choices", parameter.type, next_step=step)
    elif kind is int and not isinstance(parameter, CategoricalParameter | IntParameter):
        step = "Write type: int, or leave the type out."
        yield at(path, f"{name} takes whole numbers only", f"type {parameter.type}", next_step=step)
    else:
        for key, value in _ends(parameter).items():
            for found in train_problems({name: value}, ()):
                rule = f"train.{name} {found.rule}"
                yield at((*path, *key), rule, found.value, found.allowed, found.nearest, found.next_step)


def _alpha(recipe: Recipe) -> Iterator[Problem]:
    search = recipe.search
    path, mode, kind = ("search", "space", "alpha"), ("search", "alpha", "mode"), ("search", "objective", "kind")
    parameter, lowest = search.space.get("alpha"), search.alpha.lowest
    add, profile = f"search.space.alpha: {{low: {lowest}, high: 1}}", search.alpha.mode == "profile"
    if search.objective.kind == "pareto" and not recipe.data.ood_val:
        step = "Add a set to data.ood_val, or choose another kind."
        yield at(kind, "pareto needs an OOD validation set", next_step=step)
    if not search.space:  # it searches nothing
        return
    if search.objective.kind == "pareto" and profile:
        step = f"Write search.alpha.mode: sample{'' if parameter else f' and {add}'}."
        yield at(kind, "pareto needs alpha as a parameter of the space", next_step=step)
        return
    if profile == (parameter is not None):
        step = f"With sample, add {add}; with profile, remove it: every trial tries the whole curve."
        rule = "must be sample if alpha is in search.space, else profile"
        yield at(mode, rule, search.alpha.mode, next_step=step)
    if parameter and search.alpha.rule != "best":
        rule, step = "must be best if alpha is in search.space", "Each trial has one alpha, which the search has drawn."
        yield at(("search", "alpha", "rule"), rule, search.alpha.rule, next_step=step)
    for key, value in (_ends(parameter) if parameter else {}).items():
        if value is None or (isinstance(value, float | int) and value < lowest):
            rule = f"must be at least search.alpha.lowest, {lowest}"
            step = "alpha near 0 is the zero-shot model, which is a baseline, not a trial."
            yield at((*path, *key), rule, shown(value), next_step=step)


def _baselines(recipe: Recipe) -> Iterator[Problem]:
    for name, values in recipe.search.baselines.items():
        path = ("search", "baselines", name)
        if name == "zero_shot":
            yield at(path, "must have another name: zero_shot is always shown, without training")
        yield from train_problems(values, path)


def own_function_problems(recipe: Recipe) -> Iterator[Problem]:
    """Finds a linear probe before the user's own fine-tuning."""
    train, search, name = recipe.train, recipe.search, "probe_epochs"
    given: dict[KeyPath, dict[str, Any]] = {("search", "space"): {name: name in search.space}, ("train",): {}}
    given |= {("search", "baselines", baseline): values for baseline, values in search.baselines.items()}
    for path, values in given.items():
        if values.get("function", train.function) is not None and values.get(name, train.probe_epochs):
            step = "Your own function may train the class head first."
            yield at((*path, name), "must be left out with function: only the built-in loop has it", next_step=step)
            return  # the same again in every baseline


def _constraints(recipe: Recipe) -> Iterator[Problem]:
    allowed = ("zero_shot", *recipe.search.baselines)
    for name in recipe.search.constraints.id_drop:
        if name not in allowed:
            path = ("search", "constraints", "id_drop", name)
            yield unlisted(path, "must be zero_shot or a name of search.baselines", name, allowed)


def _pruner(recipe: Recipe) -> Iterator[Problem]:
    """A pruner that could cut nothing, however the trials are drawn."""
    pruner = recipe.search.pruner
    if pruner.name != "none" and not can_cut(recipe):
        rule = "needs an intermediate value between search.pruner.first and the last epoch of a training"
        step = "Train more epochs, evaluate more often (evaluate.every_epochs), or lower search.pruner.first."
        yield at(("search", "pruner", "name"), rule, pruner.name, next_step=step)


def _resources(recipe: Recipe) -> Iterator[Problem]:
    executor, workers = recipe.resources.executor, recipe.resources.num_workers
    gpus = recipe.resources.gpus_per_worker or 0.0
    num_workers, path = ("resources", "num_workers"), ("resources", "gpus_per_worker")
    if executor in ("inline", "debug") and workers > 1:
        step = "Write executor: ray-train, or leave the executor out."
        yield at(num_workers, f"must be 1 with executor: {executor}", str(workers), next_step=step)
    if recipe.resources.accelerator is not None and recipe.resources.gpus_per_worker == 0:
        kind = ("resources", "accelerator")
        yield at(kind, "must be left out with gpus_per_worker: 0", recipe.resources.accelerator)
    if gpus != int(gpus) and (gpus > 1 or workers > 1):
        step = "Write 1, or with num_workers: 1 a share of one GPU, such as 0.5."
        rule = "must be a whole number above 1, and with several workers"
        yield at(path, rule, shown(gpus), next_step=step)


def population_size(recipe: Recipe) -> int:
    """Returns the trials of a generation of nsga2."""
    sampler = recipe.search.sampler
    chosen = sampler.population_size if isinstance(sampler, NsgaSampler) else None
    return chosen or min(LARGEST_POPULATION, max(4, recipe.search.trials // 4))


def startup_trials(recipe: Recipe) -> int:
    """Returns the random trials before tpe and gp."""
    return getattr(recipe.search.sampler, "startup_trials", None) or max(4, recipe.search.trials // 4)


def sampler_problems(recipe: Recipe) -> Iterator[Problem]:
    """Finds too many random trials, and parameters without a step for the grid."""
    sampler, trials = recipe.search.sampler, recipe.search.trials
    startup = getattr(sampler, "startup_trials", None)
    if startup is not None and startup > trials:
        yield at(("search", "sampler", "startup_trials"), f"must be at most search.trials, {trials}", str(startup))
    for name, parameter in recipe.search.space.items():
        if sampler.name == "grid" and num_values(parameter) is None:
            step = f"Give {name} a step, or choices: [...], or another sampler than grid."
            yield at(("search", "space", name), "must have a step for the grid", next_step=step)


def sampler_advice(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields advice on a valid sampler: the key, and what about it."""
    search, sampler = recipe.search, recipe.search.sampler
    if sampler.name in UNLEARNED and search.pruner.name != "none":
        yield "search.sampler.name", f"{sampler.name} with a pruner: it learns nothing from a pruned trial"
    if sampler.name in UNLEARNED and any(parameter.when for parameter in search.space.values()):
        why = f"conditional parameters are drawn at random, {UNLEARNED[sampler.name]}"
        yield "search.sampler.name", f"{sampler.name} with conditional parameters: {why}"
    if search.warm_start and sampler.name not in LEARNS_FROM_OTHERS:
        yield (
            "search.warm_start",
            f"has no effect with {sampler.name}: of the samplers, tpe and gp learn from it",
        )
    if isinstance(sampler, QmcSampler) and not sampler.scramble and sampler.seed:
        yield "search.sampler.seed", "has no effect: the sequence is not scrambled"
    if sampler.name == "nsga2" and search.trials <= population_size(recipe):
        what = f"nsga2 draws its first generation of {population_size(recipe)} at random, of only"
        yield "search.sampler.name", f"{what} {counted(search.trials, 'trial')}"
    size = grid_size(search.space) if sampler.name == "grid" else None
    if search.space and size is not None and size < search.trials:
        there = counted(size, "point")
        yield "search.trials", f"is {search.trials}, but the grid has {there}: the search ends after {size}"


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
    if recipe.data.ood_test and recipe.data.id_test is None:
        yield "data.ood_test", "has no effect: `carft-ray test` needs data.id_test, too"
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
    if all(always(name, 0) for name in SCHEDULED):
        for key in [f"train.{name}" for name in OF_PENALTIES if _is_changed(train, name)]:
            yield key, f"has no effect: {', '.join(SCHEDULED)} are 0"
    if (plain_values := search.baselines.get("fine_tuning")) is not None and train.function is None:
        for name in PENALTIES:
            if plain_values.get(name, getattr(train, name)):
                yield "search.baselines.fine_tuning", f"is not plain fine-tuning: add {name}: 0"
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
    if kind == "pareto" and search.stop_gain is not None:
        yield "search.stop_gain", "has no effect: with objective pareto no expected objective is computed"
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
