"""What a study is about, and what may change when it goes on: a class for every key of a recipe, with the reason.

| class | between two searches of one study |
|---|---|
| identity | never changes |
| space | changes with ``--narrow`` or ``--widen``: the study gets another generation (``search.generations``) |
| running | changes freely |

``manifest.json`` holds the recipe of the study in ``recipe``; those that it had before, oldest first, in ``recipes``.
It is written after the journal, in one piece: what it says is what holds. ``resolved.yaml`` is the recipe of the last
search, with all that is running.
"""

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from carft_ray import files
from carft_ray.errors import Problem, RecipeError, StorageError
from carft_ray.recipe.loading import is_weights_path
from carft_ray.recipe.messages import shown
from carft_ray.recipe.region import DIRECTIONS, Direction, directions
from carft_ray.recipe.schema import CorruptedSet, Parameter, Recipe, StoredSet, plain
from carft_ray.recipe.text import KeyPath, dotted
from carft_ray.search import provenance
from carft_ray.search.folder import FORMAT_VERSION, MANIFEST, RESOLVED, check_free_or_claimed

Class = Literal["identity", "space", "running"]

_METHOD = "another method: its objectives do not compare"
_RANGE = "the sampler must know one space; old trials are taken along where they lie inside"
_CUT = "it decides which trainings end early, and they are compared with those before"
# keys as search_spaces/README.md writes them
CLASSES: dict[str, tuple[Class, str]] = {
    "format_version": ("identity", "the form of the folder"),
    "name": ("running", "for people; nothing is computed from it"),
    "model.name": ("identity", "the start of every training; a local folder may move, its weights are compared"),
    "model.pretrained": ("identity", "the start of every training; a file may move, its contents are compared"),
    "data.train": ("identity", "what is trained on"),
    "data.id_val": ("identity", "what the objective is measured on"),
    "data.ood_val": ("identity", "what the objective is measured on"),
    "data.id_test": ("identity", "fixed before anything is selected"),
    "data.ood_test": ("identity", "fixed before anything is selected"),
    "data.classes": ("identity", "the meaning of the labels"),
    "data.shared_images": ("running", "the list of shared images is made once; `keep` lets those found later stand"),
    "data.shared_limit": ("running", "the list of shared images is made once"),
    "data.cache_dir": ("running", "where decoded images lie"),
    "data.cache_gb": ("running", "how much of them is kept"),
    "data.pack": ("running", "how images are read; the pixels are the same"),
    "<set>.source": ("identity", "which images"),
    "<set>.domain": ("identity", "which images"),
    "<set>.split": ("identity", "which images"),
    "<set>.num_per_class": ("identity", "which images"),
    "<set>.path": ("running", "images may move, their contents are compared; those of tests only with data.train"),
    "<set>.root": ("running", "as the path"),
    "<set>.image": ("identity", "which images"),
    "<set>.label": ("identity", "the labels"),
    "<set>.id": ("identity", "the names of the images, from which parts, shots and views are drawn"),
    "<set>.where": ("identity", "which images"),
    "<set>.class_names": ("identity", "the meaning of the labels; a file may move, the names are compared"),
    "<set>.domains": ("identity", "which images"),
    "<set>.part": ("identity", "which images"),
    "<set>.shots": ("identity", "which images"),
    "<set>.shots_seed": ("identity", "which images"),
    "<set>.classes": ("identity", "between which classes images are told apart"),
    "<set>.on_bad_image": ("identity", "which images"),
    "<set>.exclude": ("identity", "which images; a file may move, the images that are left are compared"),
    "<set>.name": ("identity", "which images"),
    "<set>.trial_seed": ("identity", "which images"),
    "<set>.of": ("identity", "which images"),
    "<set>.corruptions": ("identity", "what the images look like"),
    "<set>.severity": ("identity", "what the images look like"),
    "<set>.seed": ("identity", "what the images look like"),
    "<set>.size": ("identity", "what the images look like"),
    "prompts.templates": ("identity", "both heads are made of them"),
    "prompts.class_names": ("identity", "both heads are made of them"),
    "train.learning_rate": ("identity", _METHOD),
    "train.kl_weight": ("identity", _METHOD),
    "train.alpha": ("identity", _METHOD),
    "train.epochs": ("identity", _METHOD),
    "train.batch_size": ("identity", _METHOD),
    "train.micro_batch": ("running", "changes memory and the order of sums, not the gradient"),
    "train.weight_decay": ("identity", _METHOD),
    "train.decay": ("identity", _METHOD),
    "train.warmup_steps": ("identity", _METHOD),
    "train.clip_norm": ("identity", _METHOD),
    "train.label_smoothing": ("identity", _METHOD),
    "train.crop_scale": ("identity", _METHOD),
    "train.class_head_form": ("identity", "changes the form of the stored weights"),
    "train.head_bias": ("identity", _METHOD),
    "train.head_lr_factor": ("identity", _METHOD),
    "train.layer_decay": ("identity", _METHOD),
    "train.freeze_layers": ("identity", _METHOD),
    "train.lora_rank": ("identity", _METHOD),
    "train.lora_alpha": ("identity", _METHOD),
    "train.ema_decay": ("identity", _METHOD),
    "train.recalibrate_batches": ("identity", _METHOD),
    "train.context_scale": ("identity", _METHOD),
    "train.precision": ("identity", "changes the rounding of every number"),
    "train.grad_checkpointing": ("running", "changes memory and speed, not the gradient"),
    "train.compile": ("identity", "changes the rounding of every number"),
    "train.seed": ("identity", "choosing a luckier seed is selection on noise"),
    "evaluate.every_epochs": ("identity", "when a training is looked at decides when a pruner may cut it"),
    "evaluate.subset": ("identity", "the looks at trainings are compared with each other"),
    "evaluate.batch_size": ("running", "changes memory alone"),
    "search.trials": ("running", "how far"),
    "search.space": ("space", _RANGE),
    "search.space.<parameter>.type": ("space", _RANGE),
    "search.space.<parameter>.low": ("space", _RANGE),
    "search.space.<parameter>.high": ("space", _RANGE),
    "search.space.<parameter>.log": ("space", _RANGE),
    "search.space.<parameter>.step": ("space", _RANGE),
    "search.space.<parameter>.choices": ("space", _RANGE),
    "search.space.<parameter>.when": ("space", _RANGE),
    "search.alpha.mode": ("identity", "part of the objective"),
    "search.alpha.grid": ("identity", "part of the objective"),
    "search.alpha.lowest": ("identity", "part of the objective"),
    "search.objective.kind": ("identity", "ranks the trials"),
    "search.objective.id_weight": ("identity", "ranks the trials"),
    "search.objective.id_margin": ("identity", "what a confirm claims is fixed before it is seen"),
    "search.objective.best": ("identity", "chooses the best trial"),
    "search.objective.tolerance": ("identity", "chooses the best trial"),
    "search.constraints.id_drop": ("identity", "part of the choice of alpha"),
    "search.constraints.ece": ("identity", "part of the choice of alpha"),
    "search.sampler.name": ("running", "a sampler reads the trials and proposes the next; it judges none"),
    "search.sampler.seed": ("identity", "choosing a luckier seed is selection on noise; qmc goes on with its own"),
    "search.sampler.startup_trials": ("running", "concerns proposals to come"),
    "search.sampler.options": ("running", "concerns proposals to come"),
    "search.pruner.name": ("identity", _CUT),
    "search.pruner.first": ("identity", _CUT),
    "search.pruner.factor": ("identity", _CUT),
    "search.pruner.startup_trials": ("identity", _CUT),
    "search.pruner.percentile": ("identity", _CUT),
    "search.points": ("running", "proposals to come"),
    "search.warm_start": ("running", "proposals to come; what was taken in stays"),
    "search.baselines": ("identity", "a trained baseline keeps its values; further ones may be added"),
    "search.concurrency": ("running", "where and how fast"),
    "search.keep_checkpoints": ("running", "what is kept"),
    "resources.executor": ("running", "where and how fast"),
    "resources.num_workers": ("running", "where and how fast"),
    "resources.cpus_per_worker": ("running", "where and how fast"),
    "resources.gpus_per_worker": ("running", "where and how fast"),
    "resources.threads": ("running", "where and how fast"),
    "resources.hang_timeout_s": ("running", "where and how fast"),
    "budget.wall_time": ("running", "how far"),
    "budget.gpu_hours": ("running", "how far"),
}
_SETS = (("data", "train"), ("data", "id_val"), ("data", "id_test"))
_NAMED_SETS = (("data", "ood_val"), ("data", "ood_test"))
GENERATION = "generation"  # keys of the manifest
RECIPES = "recipes"
_MOVED = ("<set>.path", "<set>.root")
_CATCH_UP = ("search.space", "search.baselines", "data", "model")  # what the manifest may know before resolved.yaml


@dataclass(frozen=True)
class Difference:
    """A key whose value differs between two recipes; ``MISSING`` where one has no such key."""

    path: KeyPath
    old: Any
    new: Any


@dataclass(frozen=True)
class Claim:
    """What claiming a folder has found.

    Attributes:
        is_new: Whether the folder was empty.
        recipe: The recipe of the search, with absolute paths.
        kept: The recipe that the manifest has; the same for an empty folder.
        space_changes: Whether the search has another space than the study.
        is_news: Whether the manifest must get the recipe of the search: the space, baselines that were added, moved
            files.
        generation: Number of the study's generation.
    """

    is_new: bool
    recipe: Recipe
    kept: Recipe
    space_changes: bool = False
    is_news: bool = False
    generation: int = 1


class _Missing:
    """Stands for a key that is not there."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


def class_of(path: KeyPath) -> Class:
    """Returns the class of a key path of a recipe, or of one below it."""
    return CLASSES[table_key(path)][0]


def table_key(path: KeyPath) -> str:
    """Returns the key of ``CLASSES`` for a key path: ``search.space.<parameter>.low`` for one of a parameter.

    Raises:
        KeyError: No key of a recipe is meant.
    """
    below = path[2:] if path[:2] in _SETS else path[3:] if path[:2] in _NAMED_SETS else ()
    if below:  # the set that a corrupted one is made of has the keys of a set
        return f"<set>.{below[1] if below[0] == 'of' and len(below) > 1 else below[0]}"
    if path[:2] == ("search", "space") and len(path) > 3:
        return f"search.space.<parameter>.{path[3]}"
    for end in range(len(path), 0, -1):
        if dotted(path[:end]) in CLASSES:
            return dotted(path[:end])
    raise KeyError(dotted(path))


def claim(study_dir: Path, recipe: Recipe, may: Collection[Direction] = ()) -> Claim:
    """Makes the folder the study of this recipe, or checks that it is. The lock must be held.

    Of a study nothing is written: ``record_recipe`` does that, once the journal is ready for it.

    Args:
        study_dir: An empty folder, or a study.
        recipe: The recipe of the search.
        may: How the space may change.

    Raises:
        RecipeError: It is the study of another recipe; names the keys that differ.
        UsageError: The folder holds something else.
        StorageError: The manifest cannot be read or written.
    """
    path = study_dir / MANIFEST
    if not files.exists(path):
        check_free_or_claimed(study_dir)
        created = datetime.now().astimezone().isoformat(timespec="seconds")
        content = {"format_version": FORMAT_VERSION, "created": created, "recipe": recipe.model_dump(mode="json")}
        files.write_json(path, {**content, provenance.PROVENANCE: provenance.known_at_once(recipe)})
        return Claim(True, recipe, recipe)
    manifest = read_manifest(study_dir)
    kept = Recipe.model_validate(manifest["recipe"])
    found = list(recipe_differences(kept, recipe))
    refused = [one for one in found if not _is_free(one) and class_of(one.path) == "identity"]
    refused += list(_moved_apart(kept, recipe))
    space = [one for one in found if class_of(one.path) == "space"]
    names = dict.fromkeys(str(one.path[2]) for one in space)
    how = {name: _how(name, kept, recipe) for name in names}
    unasked = [one for one in space if not _asked(how[str(one.path[2])], may)]
    if refused or unasked:
        problems = [_problem(one, study_dir) for one in (*refused, *unasked)]
        step = _other_folder(study_dir) if refused else _flags_step(study_dir, how, may)
        last = problems.pop()
        raise RecipeError([*problems, Problem(last.place, last.rule, last.value, next_step=step)])
    news = [one for one in found if class_of(one.path) != "running" or table_key(one.path) in _MOVED]
    return Claim(False, recipe, kept, bool(space), bool(news), int(manifest.get(GENERATION, 1)))


def record_recipe(study_dir: Path, claimed: Claim) -> None:
    """Makes the recipe of a claim that of the study; the one before stays in ``recipes``. The lock must be held.

    A space that has changed begins the next generation, which must be whole in the journal by now.

    Raises:
        StorageError: The manifest cannot be written.
    """
    manifest = files.read_json(study_dir / MANIFEST)
    generation = manifest.get(GENERATION, 1)
    until = datetime.now().astimezone().isoformat(timespec="seconds")
    before = {GENERATION: generation, "until": until, "recipe": manifest["recipe"]}
    changed = {
        GENERATION: generation + claimed.space_changes,
        "recipe": claimed.recipe.model_dump(mode="json"),
        RECIPES: [*manifest.get(RECIPES, []), before],
    }
    files.write_json(study_dir / MANIFEST, {**manifest, **changed})


def read_manifest(study_dir: Path) -> dict[str, Any]:
    """Returns the manifest of a claimed folder, whose ``recipe`` is valid.

    Raises:
        StorageError: It cannot be read, or is of another format.
    """
    path = study_dir / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(files.retried(path, path.read_text))
        version = manifest["format_version"]
        Recipe.model_validate(manifest["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(Problem(str(path), "must be the manifest of a study", str(error))) from error
    if version != FORMAT_VERSION:
        raise StorageError(Problem(str(path), f"must have format_version {FORMAT_VERSION}", str(version)))
    return manifest


def caught_up(study_dir: Path, resolved: Recipe) -> list[str]:
    """Returns what a kill has kept from ``resolved.yaml``, as texts ``key=value`` to set over it; mostly nothing.

    The manifest is written first. Where the resolved recipe has a part as it was before the last change of the
    study, the part of the manifest holds.

    Raises:
        StorageError: The manifest cannot be read.
    """
    if not files.exists(study_dir / MANIFEST):
        return []
    manifest = read_manifest(study_dir)
    if not manifest.get(RECIPES):
        return []
    before = Recipe.model_validate(manifest[RECIPES][-1]["recipe"]).model_dump(mode="json")
    now, last = Recipe.model_validate(manifest["recipe"]).model_dump(mode="json"), resolved.model_dump(mode="json")
    parts = [(key, *(_part(whole, key) for whole in (before, now, last))) for key in _CATCH_UP]
    return [f"{key}={json.dumps(new)}" for key, old, new, found in parts if found == old != new]


def recipe_differences(old: Recipe, new: Recipe) -> Iterator[Difference]:
    """Yields every key that differs; mappings that both have are looked into."""
    yield from _differences(old.model_dump(mode="json"), new.model_dump(mode="json"), ())


def _differences(old: Any, new: Any, path: KeyPath) -> Iterator[Difference]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new or isinstance(old, bool) != isinstance(new, bool):
            yield Difference(path, old, new)
        return
    for key in {**old, **new}:
        yield from _differences(old.get(key, MISSING), new.get(key, MISSING), (*path, key))


def _is_free(found: Difference) -> bool:
    """Tells whether a difference of identity is one in words only: a file that has moved, a baseline that is added."""
    if found.path[:2] == ("search", "baselines"):
        return len(found.path) == 3 and found.old is MISSING
    if found.path == ("model", "pretrained"):
        return all(isinstance(value, str) and is_weights_path(value) for value in (found.old, found.new))
    if found.path[-1] in ("class_names", "exclude") and found.path[0] == "data":
        return all(isinstance(value, str) for value in (found.old, found.new))
    if found.path == ("model", "name"):
        return all(str(value).startswith("local-dir:") for value in (found.old, found.new))
    return False


def _moved_apart(old: Recipe, new: Recipe) -> Iterator[Difference]:
    """Yields the paths of test sets that have not moved as ``data.train`` has: their contents are never looked at."""
    train = [plain(recipe.data.train) for recipe in (old, new)]
    sets: dict[KeyPath, Any] = {("data", "id_test"): (old.data.id_test, new.data.id_test)}
    names = old.data.ood_test.keys() & new.data.ood_test.keys()
    sets |= {("data", "ood_test", name): (old.data.ood_test[name], new.data.ood_test[name]) for name in sorted(names)}
    for path, pair in sets.items():
        before, now = (plain(spec) for spec in pair)
        if not (isinstance(before, StoredSet) and isinstance(now, StoredSet)):
            continue
        inner = ("of",) if isinstance(pair[0], CorruptedSet) else ()
        for key in before.path_keys:
            places = [getattr(spec, key, None) for spec in (before, now)]
            if places[0] == places[1] or any(isinstance(place, tuple) for place in places):
                continue
            together = [
                os.path.relpath(place, root.path) if place and isinstance(root, StoredSet) else place
                for place, root in zip(places, train, strict=True)
            ]
            if together[0] != together[1]:
                yield Difference((*path, *inner, key), *places)


def _how(name: str, old: Recipe, new: Recipe) -> frozenset[Direction]:
    before: Parameter | None = old.search.space.get(name)
    return directions(before, new.search.space.get(name), getattr(old.train, name))


def _asked(how: frozenset[Direction], may: Collection[Direction]) -> bool:
    return bool(how & set(may)) or set(may) == set(DIRECTIONS)


def _problem(found: Difference, study_dir: Path) -> Problem:
    there = "left out" if found.old is MISSING else shown(found.old)
    value = "none" if found.new is MISSING else shown(found.new)
    return Problem(dotted(found.path), f"must be {there} as in {study_dir}", value)


def _other_folder(study_dir: Path) -> str:
    return f"Go on with {study_dir / RESOLVED}, or give another folder."


def _flags_step(study_dir: Path, how: dict[str, frozenset[Direction]], may: Collection[Direction]) -> str:
    """Says with which options the space may change so."""
    needed = [[one] for one in DIRECTIONS if all(one in found for found in how.values())] or [[*DIRECTIONS]]
    flags = " ".join(f"--{one}" for one in needed[0])
    words = {"--narrow": "shrinks", "--widen": "grows"}.get(flags, "changes both ways")
    given = " ".join(f"--{one}" for one in DIRECTIONS if one in may)
    step = f"{given} is not enough: the space {words}." if given else f"The space {words}."
    step += f" To have it so, give {flags}, here or with: carft-ray search RECIPE --study {study_dir} {flags}."
    return f"{step}\n    Trials that lie inside go on counting for the sampler. Or: {_other_folder(study_dir)}"


def _part(value: dict[str, Any], key: str) -> Any:
    for piece in key.split("."):
        value = value[piece]
    return value
