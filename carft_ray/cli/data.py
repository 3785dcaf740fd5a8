"""The cache of images, and the images of the sandbox."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command, data_app, sandbox_app
from carft_ray.errors import Problem, UsageError
from carft_ray.ui import console
from carft_ray.words import counted

CacheOption = Annotated[
    Path | None, Option(help="Folder of the cache (data.cache_dir); default: the user's cache folder.")
]


@command("data ls", to=data_app, reads=True)
def data_ls(cache: CacheOption = None, json_: common.JsonOption = False) -> None:
    """List the image sets and class heads in the cache: size, when built and last used. Writes nothing."""
    from carft_ray.data.cache import list_entries, notes

    folder = _folder(cache)
    entries, others = list_entries(folder), notes(folder)
    total, of_notes = sum(entry.num_bytes for entry in entries), sum(others.values())
    found = {"cache": str(folder), "entries": [dataclasses.asdict(entry) for entry in entries], "num_bytes": total}
    if console.print_json({**found, "notes": {"num_files": len(others), "num_bytes": of_notes}}, json_):
        return
    if entries:
        console.show(console.cache_table(entries))
    more = f", and {console.size_text(of_notes)} of notes about images" if others else ""
    console.say(f"{folder}: {counted(len(entries), 'entry')}, {console.size_text(total)}{more}.")
    if entries:
        console.next_step(common.command_line("data", "clean", older_than="30d", cache=cache))
    else:
        console.next_step("carft-ray data add recipe.yaml")


@command("data add recipe.yaml", to=data_app)
def data_add(
    recipe: common.RecipeArgument,
    method: common.MethodOption = None,
    set_: common.SetOption = None,
    json_: common.JsonOption = False,
) -> None:
    """Build the cache for the trainings of a recipe: training and validation sets, never test sets."""
    from carft_ray.data.cache import cache_dir, list_entries
    from carft_ray.data.cached_sets import DecodedSource, PackedSource
    from carft_ray.data.duplicates.shared_images import find_shared, shared_lines, without_shared
    from carft_ray.training.shared_inputs import load_shared_inputs
    from carft_ray.ui.progress import counting

    value = common.load(recipe, set_, method)
    folder = cache_dir(value)
    shared = find_shared(value, folder, console.say)
    for line in shared_lines(shared):
        console.say(line)
    built: dict[str, Callable[[int, int], None]] = {}  # set -> its bar
    with counting() as begin:

        def on_image(name: str, done: int, total: int) -> None:
            if not done:
                return  # another process builds it
            if name not in built:
                built[name] = begin(name)
            built[name](done, total)

        inputs = load_shared_inputs(without_shared(value, shared), on_image)
    kinds = dict.fromkeys(inputs.num_images, "decoded")
    kept_as: dict[type, str] = {DecodedSource: "decoded", PackedSource: "packed"}
    kinds["train"] = kept_as.get(type(inputs.train), "files")
    sets: list[dict[str, Any]] = [
        {"name": name, "num_images": number, "kind": kinds[name], "built": name in built}
        for name, number in inputs.num_images.items()
    ]
    total = sum(entry.num_bytes for entry in list_entries(folder))
    if console.print_json({"cache": str(folder), "sets": sets, "num_bytes": total}, json_):
        return
    for each in sets:
        state = f"{each['kind']}, {'built' if each['built'] else 'already there'}"
        state = "read from their files (data.pack)" if each["kind"] == "files" else state
        console.say(f"{each['name']}: {counted(each['num_images'], 'image')}, {state}")
    console.say(f"{folder} holds {console.size_text(total)} now.")
    console.next_step(
        common.begin_line(value, recipe, method=method, set=set_),
        common.command_line("data", "ls", cache=None if value.data.cache_dir is None else folder),
    )


@command("data clean --older-than 30d", to=data_app, reads=True)
def data_clean(
    all_: Annotated[bool, Option("--all", help="Remove everything, also hashes and thumbnails of images.")] = False,
    older_than: Annotated[str | None, Option(metavar="TIME", help="Remove entries not used for 12h, 30d, ...")] = None,
    to_gb: Annotated[
        float | None, Option(min=0, metavar="GB", help="Keep the most recently used entries, up to this size.")
    ] = None,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    cache: CacheOption = None,
    json_: common.JsonOption = False,
) -> None:
    """Remove image sets and class heads from the cache, except those in use. Later commands rebuild them if needed."""
    from carft_ray.data.cache import GB, list_entries, notes, remove, remove_dead, remove_note, surplus

    options = {"--all": all_ or None, "--older-than": older_than or None, "--to-gb": to_gb}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        rule = "needs exactly one of --all, --older-than and --to-gb"
        raise UsageError(Problem("data clean", rule, " and ".join(given) or "none of them"))
    folder = _folder(cache)
    before = None if older_than is None else time.time() - _seconds(older_than)
    entries = list_entries(folder)
    if to_gb is not None:
        going = surplus(entries, to_gb * GB)
    else:
        going = [each for each in entries if not each.in_use and (all_ or each.last_used < (before or 0))]
    others = notes(folder) if all_ else {}
    if (going or others) and not yes:
        _ask(going, others, json_)
    removed = [each for each in going if remove(folder, each.key)]
    for name in others:
        remove_note(folder, name)
    num_dead, kept = remove_dead(folder), list_entries(folder)
    answer: dict[str, Any] = {
        "cache": str(folder),
        "removed": [each.key for each in removed],
        "num_bytes_freed": sum(each.num_bytes for each in removed),
        "num_dead_builds": num_dead,
        "num_kept": len(kept),
        "num_bytes_kept": sum(each.num_bytes for each in kept),
        "num_in_use": sum(each.in_use for each in kept),
    }
    if console.print_json(answer, json_):
        return
    dead = " Leftovers of killed builds were removed as well." if num_dead else ""
    what = f"{counted(len(removed), 'entry')}, {console.size_text(answer['num_bytes_freed'])}"
    console.say(f"Removed {what}, from {folder}.{dead}")
    if answer["num_in_use"]:
        console.say(f"{counted(answer['num_in_use'], 'entry')} in use{': not removed' if all_ else ''}.")
    console.next_step(common.command_line("data", "ls", cache=cache))


def _folder(cache: Path | None) -> Path:
    """Returns the folder of the cache; one that is given must be there."""
    from carft_ray.data.cache import user_cache_dir

    if cache is not None and not cache.is_dir():
        value = "a file" if cache.exists() else "no such folder"
        raise UsageError(Problem("--cache", f"{cache} must be the folder of a cache", value))
    return user_cache_dir() if cache is None else cache.absolute()


def _seconds(text: str) -> float:
    from carft_ray.recipe.schema.fields import seconds_of

    try:
        return float(seconds_of(text))
    except ValueError as error:
        raise UsageError(Problem("--older-than", "must be a time such as 12h or 30d", repr(text))) from error


def _ask(going: Sequence[Any], others: Mapping[str, int], json_: bool) -> None:
    """Shows what would go and asks; ends the command where the answer is no."""
    if json_ or not sys.stdin.isatty():
        raise UsageError("No terminal to confirm on; pass --yes.")
    console.say(console.cache_table(going))
    more = f" and {counted(len(others), 'file')} of notes" if others else ""
    if not typer.confirm(f"Remove {counted(len(going), 'entry')}{more}?", err=True):
        console.say("Nothing was removed.")
        raise typer.Exit


@command("sandbox images --to sandbox_png", to=sandbox_app)
def sandbox_images(
    to: Annotated[Path, Option(help="Folder of the images; must be new or empty.")],
    json_: common.JsonOption = False,
) -> None:
    """Write the sandbox, the built-in synthetic images, as PNG files."""
    from carft_ray.data.sandbox import export_images
    from carft_ray.ui.progress import counting

    with counting() as begin:
        export_images(to, begin("images"))
    if console.print_json({"folder": str(to)}, json_):
        return
    console.say(f"Wrote {to}: domain/class/number.png.")
    console.next_step(common.command_line("init", from_=to, train="photo_train", model="sandbox", to="recipe.yaml"))
