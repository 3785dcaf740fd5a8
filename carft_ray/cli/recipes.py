"""Writing a recipe, its schema, and checking a recipe."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, UsageError, require_choice
from carft_ray.ui import console
from carft_ray.words import counted

if TYPE_CHECKING:
    from carft_ray.recipe.schema.recipe import Recipe

MODEL, PRETRAINED = "ViT-B-16-quickgelu", "openai"
DomainsOption = list[str] | None


@command("init --from my_images --to my_recipe.yaml --train photo", common.ONE_TRAINING, reads=True)
def init(
    from_: Annotated[Path | None, Option("--from", help="Folder of images.")] = None,
    preset: Annotated[str | None, Option(help="Recipe that ships with carft-ray.")] = None,
    to: Annotated[Path | None, Option(help="File to write; default: print the recipe.")] = None,
    list_: Annotated[bool, Option("--list", help="List the presets and the methods.")] = False,
    model: Annotated[str, Option(help="Model of open_clip, local-dir:FOLDER, or sandbox (toy images).")] = MODEL,
    pretrained: Annotated[str | None, Option(help="Its weights: tag or file; the default model uses openai.")] = None,
    train: Annotated[str | None, Option(help="Training domain; default: the largest.")] = None,
    ood_val: Annotated[
        DomainsOption, Option(help="OOD validation domain (repeatable; default: half of the rest).")
    ] = None,
    ood_test: Annotated[DomainsOption, Option(help="OOD test domain (repeatable; default: the rest).")] = None,
    hold_out: Annotated[str | None, Option(help="Test domain, for a preset that trains on all others.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """Write a recipe for your images (--from), or copy one that ships with carft-ray (--preset)."""
    from carft_ray.recipe.methods import methods
    from carft_ray.recipe.presets import SCHEMA, SCHEMA_LINE, preset_text, presets, schema_text

    if sum((from_ is not None, preset is not None, list_)) != 1:
        value = "none of them" if not (from_ or preset or list_) else "several"
        raise UsageError(Problem("init", "one of --from FOLDER, --preset NAME and --list must be given", value))
    of_folder = {"--train": train, "--ood-val": ood_val, "--ood-test": ood_test}
    of_folder |= {"--model": model if model != MODEL else None, "--pretrained": pretrained}
    problems = (
        [] if hold_out is None or preset is not None else [Problem("--hold-out", "can only be used with --preset")]
    )
    if list_ and to is not None:
        problems.append(Problem("--to", "can only be used with --from or --preset"))
    if from_ is None:
        problems += [Problem(option, "can only be used with --from") for option, given in of_folder.items() if given]
    if problems:
        raise UsageError(problems)
    if list_:
        known = {name: method.words for name, method in methods().items()}
        if not console.print_json({"presets": presets(), "methods": known}, json_):
            console.show(console.table(("preset", "for"), list(presets().items())))
            console.show(console.table(("method", "what it does"), list(known.items())))
            to_file = "carft-ray init --preset NAME --to my_recipe.yaml"
            console.next_step(to_file, "carft-ray search my_recipe.yaml --method NAME --study studies/NAME")
        return
    if to is not None and to.exists():
        raise UsageError(
            Problem("--to", "must be a new file", str(to), next_step="Give another name, or remove the file.")
        )
    roots: Sequence[Any] = ()
    notes: Sequence[str] = ()
    if preset is not None:
        require_choice("--preset", "must be a preset", preset, presets())
        text = preset_text(preset, hold_out)
    else:
        text, roots, notes = _draft(from_ or Path(), to, (train, ood_val, ood_test), model, pretrained)
        text = SCHEMA_LINE + text
    from carft_ray.files import write_text
    from carft_ray.recipe.loading import parse_recipe

    written = parse_recipe(text, to or Path("recipe.yaml"))  # before anything is written
    refused = [] if from_ is None and to is None else _refused(written)
    if preset is not None and refused:
        words = "the copy needs other paths; relative paths start at its folder"
        notes = [f"{words}; {counted(len(refused), 'set')} cannot be read, the first one: {refused[0]}"]
    else:
        notes = [*notes, *(f"doctor will refuse this recipe: {problem}" for problem in refused)]
    for note in notes:
        console.warn(note)
    found = [{**vars(one), "num_images": one.num_images} for one in roots]
    about = {"recipe": None if to is None else str(to), "preset": preset, "found": found, "notes": notes}
    if to is None:
        if not console.print_json({**about, "text": text}, json_):
            typer.echo(text, nl=False)
        return
    write_text(to.absolute(), text)
    write_text(to.absolute().with_name(SCHEMA), schema_text())
    if console.print_json(about, json_):
        return
    if from_ is not None:
        rows = [(one.folder, one.domain, one.split, str(len(one.classes)), f"{one.num_images:,}") for one in roots]
        console.show(console.table(("folder", "domain", "split", "classes", "images"), rows))
    console.say(f"Wrote {to}. The roles in `data` are a proposal: check them before you train.")
    begin = common.command_line("search", to, study=f"studies/{written.name if hold_out is None else to.stem}")
    console.next_step(common.command_line("doctor", to), common.command_line("plan", to), begin)


@command("schema", common.ONE_TRAINING, reads=True)
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from carft_ray.recipe.presets import schema_text

    typer.echo(schema_text(), nl=False)


def _draft(
    root: Path, to: Path | None, domains: tuple[str | None, DomainsOption, DomainsOption], model: str, tag: str | None
) -> tuple[str, Sequence[Any], Sequence[str]]:
    """Returns the text of a recipe for a folder of images, what was found there, and notes; no model is loaded.

    Args:
        root: The folder.
        to: File of the recipe. Its paths are relative to it where images lie in the same folder or below; None: to the
            working directory.
        domains: Those of train, ood_val and ood_test that the user has named.
        model: Its model.
        tag: Weights of the model.

    Raises:
        UsageError: No recipe may name this model or these weights, or there are no such domains.
        DataError: The folder cannot be read, or holds no images in an order that is known.
    """
    from carft_ray.data.draft import choose_roles, draft, set_name, survey
    from carft_ray.model.catalog import check_model
    from carft_ray.recipe.loading import resolve_path, with_paths
    from carft_ray.recipe.schema.model import ModelConfig

    roots = survey(root)
    roles = choose_roles(roots, *domains)
    weights = PRETRAINED if tag is None and model == MODEL else tag
    base = Path.cwd() if to is None else to.absolute().parent
    named = with_paths(ModelConfig(name=model, pretrained=weights), partial(resolve_path, base))
    if problems := check_model(named):
        options = {"model.name": "--model", "model.pretrained": "--pretrained"}
        raise UsageError([replace(one, place=options.get(one.place, one.place)) for one in problems])
    whole, base = root.resolve(), base.resolve()
    path = whole.relative_to(base).as_posix() if whole.is_relative_to(base) else str(whole)
    return draft(set_name(whole.name), root, path, roots, roles, model, weights), roots, roles.notes


def _refused(recipe: "Recipe") -> list[Problem]:
    """Returns what `doctor` will find wrong with the sets of a recipe, as far as no image must be opened."""
    from carft_ray.data.role_checks import check_roles, check_sets
    from carft_ray.data.sets import listing_once

    with listing_once():
        return [*check_roles(recipe), *check_sets(recipe, lists_tests=True)]


@command("validate recipe.yaml --set train.epochs=3 --show", common.ONE_TRAINING)
def validate(
    recipe: common.RecipeArgument,
    method: common.MethodOption = None,
    set_: common.SetOption = None,
    show: Annotated[bool, Option("--show", help="Print the complete resolved recipe.")] = False,
    deep: Annotated[bool, Option("--deep", help="Read all images, to find those in two roles.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Check a recipe and its folders. Without --deep, it opens no image and no model."""
    from carft_ray.recipe.loading import dump_recipe, recipe_hash

    value = common.load(recipe, set_, method)
    if deep:
        from carft_ray.data.cache import cache_dir
        from carft_ray.data.duplicates.shared_images import find_shared, shared_lines

        for line in shared_lines(find_shared(value, cache_dir(value), console.say)):
            console.say(line)
    if json_:
        console.print_json({"valid": True, "recipe_hash": recipe_hash(value), "recipe": value.model_dump(mode="json")})
    elif show:
        sys.stdout.write(dump_recipe(value))
    else:
        console.say(f"{recipe} is valid.")
        console.next_step(common.begin_line(value, recipe, method=method, set=set_))
