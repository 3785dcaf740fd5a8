"""A recipe to begin with: for a folder of images, or a copy of one that ships with the package."""

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from carft_ray.cli.common import DebugOption, JsonOption, app
from carft_ray.errors import Problem, UsageError, nearest

PANEL = "One training"  # of the help
MODEL, PRETRAINED = "ViT-B-16-quickgelu", "openai"
DomainsOption = list[str] | None


@app.command(
    epilog="Example:  carft-ray init --from my_images --to my_recipe.yaml --train photo",
    rich_help_panel=PANEL,
)
def init(
    from_: Annotated[Path | None, typer.Option("--from", help="Folder of images to write a recipe for.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Name of a recipe that ships with carft-ray.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="File to write; without it the recipe is printed.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    model: Annotated[
        str, typer.Option("--model", help="Model of open_clip, local-dir:FOLDER, or sandbox (toy images only).")
    ] = MODEL,
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="Its weights: a tag or a file; openai for the default model.")
    ] = None,
    train: Annotated[str | None, typer.Option("--train", help="Domain that trains; the largest.")] = None,
    ood_val: Annotated[
        DomainsOption, typer.Option("--ood-val", help="Domain that chooses; may be repeated. Half of the others.")
    ] = None,
    ood_test: Annotated[
        DomainsOption, typer.Option("--ood-test", help="Domain that tests; may be repeated. The rest.")
    ] = None,
    hold_out: Annotated[
        str | None, typer.Option("--hold-out", help="Domain of the test, for a preset that leaves one domain out.")
    ] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a recipe: --from a folder of images (it looks at domains, splits and classes), or a --preset."""
    from carft_ray import console
    from carft_ray.recipe.presets import preset_text, presets

    of_folder: dict[str, object] = {"--train": train, "--ood-val": ood_val, "--ood-test": ood_test}
    of_folder |= {"--model": model if model != MODEL else None, "--pretrained": pretrained}
    _check_options(from_, preset, list_, hold_out, of_folder)
    if list_:
        if json_:
            console.print_json(presets())
        else:
            console.out.print(console.table(("preset", "for"), list(presets().items())))
            console.next_step("carft-ray init --preset NAME --to my_recipe.yaml")
        return
    if to is not None and to.exists():
        raise UsageError(Problem("--to", "must be a new file", str(to), next_step="Give another name, or remove it."))
    found = None
    if preset is not None:
        if preset not in presets():
            near = nearest(preset, presets())
            raise UsageError(Problem("--preset", "must be a preset", repr(preset), tuple(presets()), near))
        text = preset_text(preset, hold_out)
    else:
        from carft_ray.data.draft import choose_roles, draft, set_name, survey

        root = from_ or Path()
        found = survey(root)
        roles = choose_roles(found, train, ood_val, ood_test)
        weights = PRETRAINED if pretrained is None and model == MODEL else pretrained
        _check_model(model, weights, to)
        text = draft(
            set_name(root.resolve().name), _written(root, to), found, roles, model, weights, os.cpu_count() or 1
        )
    if to is None:
        typer.echo(text, nl=False)
        return
    from carft_ray.files import write_text
    from carft_ray.recipe.loading import load_recipe

    write_text(to.absolute(), text)
    written = load_recipe(to)
    if json_:
        roots = [] if found is None else [{**vars(one), "num_images": one.num_images} for one in found]
        console.print_json({"recipe": str(to), "preset": preset, "found": roots})
        return
    if found is not None:
        rows = [(one.folder, one.domain, one.split, str(len(one.counts)), f"{one.num_images:,}") for one in found]
        console.out.print(console.table(("folder", "domain", "split", "classes", "images"), rows))
    console.say(f"Wrote {to}. The roles in `data` are a proposal: read them before you go on.")
    console.next_step(
        f"carft-ray doctor {shlex.quote(str(to))}",
        f"carft-ray plan {shlex.quote(str(to))}",
        f"carft-ray search {shlex.quote(str(to))} --study studies/{written.name}",
    )


def _check_options(
    from_: Path | None, preset: str | None, list_: bool, hold_out: str | None, of_folder: dict[str, object]
) -> None:
    """Raises a ``UsageError`` for options that do not go together."""
    if sum((from_ is not None, preset is not None, list_)) != 1:
        value = "none of them" if not (from_ or preset or list_) else "several"
        raise UsageError(Problem("init", "one of --from FOLDER, --preset NAME and --list must be given", value))
    problems = []
    if hold_out is not None and preset is None:
        problems.append(Problem("--hold-out", "belongs to --preset"))
    if from_ is None:
        problems += [Problem(option, "belongs to --from") for option, given in of_folder.items() if given]
    if problems:
        raise UsageError(problems)


def _check_model(model: str, pretrained: str | None, to: Path | None) -> None:
    """Raises a ``UsageError`` for a model or weights that no recipe may name; nothing is loaded."""
    from carft_ray.learning.models.catalog import check_model
    from carft_ray.recipe.fine_tuning import ModelConfig
    from carft_ray.recipe.loading import absolute_model

    base_dir = Path.cwd() if to is None else to.absolute().parent
    options = {"model.name": "--model", "model.pretrained": "--pretrained"}
    problems = check_model(absolute_model(ModelConfig(name=model, pretrained=pretrained), base_dir))
    if problems:
        raise UsageError([replace(one, place=options.get(one.place, one.place)) for one in problems])


def _written(root: Path, to: Path | None) -> str:
    """Returns a path as the recipe writes it: relative where the folder lies beside or below the recipe."""
    base = (to.absolute().parent if to is not None else Path.cwd()).resolve()
    whole = root.resolve()
    return whole.relative_to(base).as_posix() if whole.is_relative_to(base) else str(whole)
