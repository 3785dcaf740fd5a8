"""Rules that read more than one key of a recipe, and settings that have no effect."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from carft_ray.errors import nearest
from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.fields import core_type, key_of
from carft_ray.recipe.fine_tuning import TemplateSet, TrainConfig, field_kind
from carft_ray.recipe.messages import Finding, findings, nearest_key, shown
from carft_ray.recipe.parameters import CategoricalParameter, IntParameter, Parameter
from carft_ray.recipe.sampler_rules import sampler_findings
from carft_ray.recipe.schedule import HALVING, can_cut
from carft_ray.recipe.schema import BenchmarkSet, CorruptedSet, Recipe, SetSpec, plain
from carft_ray.recipe.spaces.conditions import condition_findings
from carft_ray.recipe.spaces.enqueue import point_findings
from carft_ray.recipe.text import KeyPath

# field of train -> why no search space may have it
NOT_SEARCHABLE = {name: why for name, field in TrainConfig.model_fields.items() if (why := key_of(field).not_searched)}
SEARCHABLE = tuple(key for key in TrainConfig.model_fields if key not in NOT_SEARCHABLE)
ROLES = ("train", "id_val", "ood_val", "id_test", "ood_test")
TEMPLATE_SETS: tuple[str, ...] = (*get_args(TemplateSet), *(n for n, b in BENCHMARKS.items() if b.has_templates))
WEIGHTS_ENDINGS = (".pt", ".pth", ".bin", ".safetensors")


def broken_rules(recipe: Recipe) -> list[Finding]:
    """Returns every broken rule between keys; an empty list for a recipe that may be used."""
    rules = (
        *(_model, _sets, _classes, _prompts, batch_findings, _space, _alpha, _baselines, _constraints, _search),
        *(_pruner, _resources, condition_findings, point_findings, sampler_findings),
    )
    return [finding for rule in rules for finding in rule(recipe)]


def _model(recipe: Recipe) -> Iterator[Finding]:
    name, path = recipe.model.name, ("model", "pretrained")
    if name == "sandbox" and recipe.model.pretrained is not None:
        step = "Remove it, or give the model that it belongs to as model.name."
        yield Finding(
            path,
            "must be left out for the sandbox, which brings its own weights",
            shown(recipe.model.pretrained),
            next_step=step,
            reads=(("model", "name"),),
        )
    if name != "sandbox" and ":" not in name and recipe.model.pretrained is None:
        step = "Give a tag of open_clip such as openai, or the path of a weights file."
        yield Finding(
            path,
            f"is required for {name}: without weights the model knows nothing",
            next_step=step,
            reads=(("model", "name"),),
        )


def named_sets(recipe: Recipe) -> dict[KeyPath, SetSpec]:
    """Returns all sets of a recipe by key path, in the order of the roles."""
    data = recipe.data
    sets: dict[KeyPath, SetSpec | None] = {("data", "train"): data.train, ("data", "id_val"): data.id_val}
    sets |= {("data", "ood_val", name): spec for name, spec in data.ood_val.items()}
    sets |= {("data", "id_test"): data.id_test}
    sets |= {("data", "ood_test", name): spec for name, spec in data.ood_test.items()}
    return {path: spec for path, spec in sets.items() if spec is not None}


def _sets(recipe: Recipe) -> Iterator[Finding]:
    for role in ("ood_val", "ood_test"):
        for name in getattr(recipe.data, role):
            if name in ROLES:
                yield Finding(("data", role, name), "a set must not have the name of a role")
            elif role == "ood_test" and name in recipe.data.ood_val:
                yield Finding(
                    ("data", role, name),
                    "must differ from the names in data.ood_val",
                    reads=(("data", "ood_val", name),),
                )
    for path, spec in named_sets(recipe).items():
        if isinstance(images := plain(spec), BenchmarkSet):
            yield from _benchmark((*path, "of") if isinstance(spec, CorruptedSet) else path, images)


def _benchmark(path: KeyPath, spec: BenchmarkSet) -> Iterator[Finding]:
    known = BENCHMARKS.get(spec.name)
    if known is None:
        rule = f"must be the name of a benchmark: {', '.join(BENCHMARKS)}"
        yield Finding((*path, "name"), rule, shown(spec.name), nearest=nearest(spec.name, BENCHMARKS))
        return
    reads: tuple[KeyPath, ...] = ((*path, "name"),)
    key: KeyPath = (*path, "split")
    if spec.split is None and known.needs_split:
        yield Finding(key, f"is required for {spec.name}", allowed=known.splits, reads=reads)
    elif spec.split is not None and not known.splits:
        yield Finding(key, f"must be left out: {spec.name} has no splits", shown(spec.split), reads=reads)
    elif spec.split is not None and spec.split not in known.splits:
        rule, near = f"must be a split of {spec.name}", nearest(spec.split, known.splits)
        yield Finding(key, rule, shown(spec.split), known.splits, near, reads=reads)
    if spec.domains is not None and not known.has_domains:
        rule = f"must be left out: {spec.name} has no domains"
        yield Finding((*path, "domains"), rule, shown(list(spec.domains)), reads=reads)
    if known.only_tests and path[1] not in ("id_test", "ood_test"):
        rule = f"{spec.name} must have a test role: {known.only_tests}"
        yield Finding((*path, "name"), rule, next_step="Move it to data.ood_test.")


def _classes(recipe: Recipe) -> Iterator[Finding]:
    classes, words = recipe.data.classes, recipe.prompts.class_names
    if isinstance(words, str):
        if words not in BENCHMARKS:
            rule, near = "must be the name of a benchmark or a list of texts", nearest(words, BENCHMARKS)
            yield Finding(("prompts", "class_names"), rule, shown(words), tuple(BENCHMARKS), near)
        return
    if classes is not None and words is not None and len(classes) != len(words):
        yield Finding(
            ("prompts", "class_names"),
            f"must hold one text per class of data.classes ({len(classes)})",
            f"{len(words)}",
            reads=(("data", "classes"),),
        )


def _prompts(recipe: Recipe) -> Iterator[Finding]:
    templates, path = recipe.prompts.templates, ("prompts", "templates")
    if isinstance(templates, str):
        if templates not in TEMPLATE_SETS:
            step = f"Write one template as a list: [{shown(templates)}]." if "{" in templates else ""
            yield Finding(
                path,
                "must be the name of a set of templates, file:PATH, or a list of texts with {}",
                shown(templates),
                TEMPLATE_SETS,
                nearest(templates, TEMPLATE_SETS),
                step,
            )
        return
    if not templates:
        yield Finding(path, "must not be empty", "[]")
    for index, template in enumerate(templates):
        rest = template.replace("{}", "", 1)
        if rest == template or "{" in rest or "}" in rest:
            yield Finding((*path, index), "must hold {} once, for the class, and no other brace", shown(template))
        elif template in templates[:index]:
            yield Finding((*path, index), "must not repeat an earlier template", shown(template))


def batch_findings(recipe: Recipe) -> Iterator[Finding]:
    """Finds a micro-batch that is larger than the smallest batch."""
    micro, whole = recipe.train.micro_batch, ("train", "batch_size")
    parameter = recipe.search.space.get("batch_size")
    searched = _ends(parameter).values() if parameter else ()
    sizes = [recipe.train.batch_size, *(size for size in searched if type(size) is int)]
    if micro is not None and micro > min(sizes):
        reads: tuple[KeyPath, ...] = (whole, ("search", "space", "batch_size"))
        yield Finding(
            ("train", "micro_batch"), f"must be at most the batch size, {min(sizes)}", str(micro), reads=reads
        )


def _ends(parameter: Parameter) -> dict[KeyPath, Any]:
    """Returns the values that bound a parameter, by their keys."""
    if isinstance(parameter, CategoricalParameter):
        return {("choices", index): choice for index, choice in enumerate(parameter.choices)}
    return {("low",): parameter.low, ("high",): parameter.high}


def train_findings(values: Mapping[str, Any], prefix: KeyPath) -> list[Finding]:
    """Checks values of fields of ``train``; paths of the findings are ``prefix`` and the field."""
    try:
        TrainConfig.model_validate(dict(values))
    except ValidationError as error:
        return findings(error, TrainConfig, prefix)
    return []


def _space(recipe: Recipe) -> Iterator[Finding]:
    for name, parameter in recipe.search.space.items():
        path = ("search", "space", name)
        if name == "seed" or name.endswith(("_seed", ".seed", "seeds")):
            yield Finding(path, "a seed must not be searched", next_step=NOT_SEARCHABLE["seed"])
        elif name in NOT_SEARCHABLE:
            yield Finding(path, "must not be searched", next_step=NOT_SEARCHABLE[name])
        elif name not in SEARCHABLE:
            meant = nearest_key(name.removeprefix("train."), SEARCHABLE)
            yield Finding(
                path, "must be a field of train", shown(name), SEARCHABLE, meant if meant in SEARCHABLE else None
            )
        else:
            yield from _parameter(path, name, parameter)


def _parameter(path: KeyPath, name: str, parameter: Parameter) -> Iterator[Finding]:
    kind = field_kind(name)
    if kind in (bool, str) and not isinstance(parameter, CategoricalParameter):
        words = ("true", "false") if kind is bool else get_args(core_type(TrainConfig.model_fields[name].annotation))
        yield Finding(
            path,
            f"{name} is no number and needs choices",
            parameter.type,
            next_step=f"Write {name}: {{choices: [{', '.join(words)}]}}.",
        )
    elif kind is int and not isinstance(parameter, CategoricalParameter | IntParameter):
        yield Finding(
            path,
            f"{name} takes whole numbers only",
            f"type {parameter.type}",
            next_step="Write type: int, or leave the type out.",
        )
    else:
        for key, value in _ends(parameter).items():
            for found in train_findings({name: value}, ()):
                yield Finding((*path, *key), f"train.{name} {found.rule}", found.value, found.allowed, found.nearest)


def _alpha(recipe: Recipe) -> Iterator[Finding]:
    search = recipe.search
    path, mode, lowest = ("search", "space", "alpha"), ("search", "alpha", "mode"), search.alpha.lowest
    parameter = search.space.get("alpha")
    if search.objective.kind == "pareto":
        kind = ("search", "objective", "kind")
        if not recipe.data.ood_val:
            step = "Add a set to data.ood_val, or choose another kind."
            yield Finding(kind, "pareto needs an OOD validation set", next_step=step, reads=(("data", "ood_val"),))
        if search.alpha.mode == "profile":
            wanted = "" if parameter else f" and search.space.alpha: {{low: {lowest}, high: 1}}"
            step = f"Write search.alpha.mode: sample{wanted}."
            yield Finding(
                kind,
                "pareto needs alpha as a parameter of the space",
                next_step=step,
                reads=(mode, path),
            )
            return
    if parameter is None:
        if search.alpha.mode == "sample":
            step = f"Add alpha: {{low: {lowest}, high: 1}} to search.space, or remove the mode."
            yield Finding(mode, "sample needs alpha in search.space", next_step=step, reads=(path,))
        return
    if search.alpha.mode == "profile":
        step = (
            "Set search.alpha.mode: sample, or remove alpha: in profile mode every trial tries the whole alpha "
            "curve at no further training."
        )
        yield Finding(path, "must stand in the space in mode sample only", next_step=step, reads=(mode,))
    for key, value in _ends(parameter).items():
        if value is None or (isinstance(value, float | int) and value < lowest):
            yield Finding(
                (*path, *key),
                f"must be at least search.alpha.lowest, {lowest}",
                shown(value),
                next_step="alpha near 0 is the zero-shot model, which is a baseline and no trial.",
                reads=(("search", "alpha", "lowest"),),
            )


def _baselines(recipe: Recipe) -> Iterator[Finding]:
    for name, values in recipe.search.baselines.items():
        path = ("search", "baselines", name)
        if name == "zero_shot":
            yield Finding(path, "must have another name: zero_shot is always shown, without training")
        found = train_findings(values, path)
        yield from found
        merged = {**recipe.train.model_dump(), **values}
        micro, whole = merged["micro_batch"], merged["batch_size"]
        if not found and micro is not None and micro > whole:
            key = "micro_batch" if "micro_batch" in values else "batch_size"
            yield Finding(
                (*path, key),
                f"micro_batch must be at most batch_size, {whole}",
                f"micro_batch {micro}",
                reads=(("train", "micro_batch"), ("train", "batch_size")),
            )


def _constraints(recipe: Recipe) -> Iterator[Finding]:
    baselines, sets = ("search", "baselines"), ("data", "ood_val")
    known = {
        "id_drop": (
            ("zero_shot", *recipe.search.baselines),
            "must be zero_shot or a name of search.baselines",
            baselines,
        ),
        "ece": (("id_val", *recipe.data.ood_val), "must be id_val or a name of data.ood_val", sets),
    }
    for kind, (allowed, rule, read) in known.items():
        for name in getattr(recipe.search.constraints, kind):
            if name not in allowed:
                path, near = ("search", "constraints", kind, name), nearest(name, allowed)
                yield Finding(path, rule, shown(name), allowed, near, reads=((*read, name), read))


def _search(recipe: Recipe) -> Iterator[Finding]:
    startup, trials = recipe.search.sampler.startup_trials, recipe.search.trials
    if startup is not None and startup > trials:
        yield Finding(
            ("search", "sampler", "startup_trials"),
            f"must be at most search.trials, {trials}",
            str(startup),
            reads=(("search", "trials"),),
        )


def _pruner(recipe: Recipe) -> Iterator[Finding]:
    """A pruner that could cut nothing, however the trials are drawn."""
    pruner, every = recipe.search.pruner, recipe.evaluate.every_epochs
    if pruner.name == "none" or can_cut(recipe):
        return
    epochs: tuple[KeyPath, ...] = (("train", "epochs"), ("search", "space", "epochs"))
    if every == 0 and pruner.name != HALVING:
        yield Finding(
            ("evaluate", "every_epochs"),
            f"must be at least 1 with the pruner {pruner.name}, which needs intermediate values",
            "0",
            next_step="successive_halving evaluates at the end of each rung automatically.",
            reads=(("search", "pruner", "name"),),
        )
        return
    yield Finding(
        ("search", "pruner", "name"),
        "needs an intermediate value between search.pruner.first and the last epoch of a training",
        pruner.name,
        next_step="Train more epochs, evaluate more often (evaluate.every_epochs), or lower search.pruner.first.",
        reads=(("search", "pruner"), ("evaluate", "every_epochs"), *epochs),
    )


def _resources(recipe: Recipe) -> Iterator[Finding]:
    resources = recipe.resources
    if resources.executor in ("inline", "debug") and resources.num_workers > 1:
        yield Finding(
            ("resources", "num_workers"),
            f"must be 1 with executor: {resources.executor}",
            str(resources.num_workers),
            next_step="Write executor: ray-train, or leave the executor out.",
            reads=(("resources", "executor"),),
        )
    gpus, path = resources.gpus_per_worker or 0.0, ("resources", "gpus_per_worker")
    if gpus > 1 and gpus != int(gpus):
        step = f"Write {gpus:.0f}, or a share of one GPU, such as 0.5."
        yield Finding(path, "must be whole above 1: Ray shares no more than one GPU", shown(gpus), next_step=step)
    elif 0 < gpus < 1 and resources.num_workers > 1:
        step = "Write gpus_per_worker: 1, or num_workers: 1 for several trials on one GPU."
        rule = f"must be whole with {resources.num_workers} workers: NCCL wants a GPU for each of them"
        yield Finding(path, rule, shown(gpus), next_step=step, reads=(("resources", "num_workers"),))
