"""Doing a training again, and two trainings side by side."""

import contextlib
import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from carft_ray.cli.common import DebugOption, JsonOption, app

PANEL = "Trusting the numbers"  # of the help
TARGET = "DIR (the best trial of a study, or a folder of `train`) or DIR:TRIAL."


@app.command(epilog="Example:  carft-ray reproduce studies/quickstart t0003", rich_help_panel=PANEL)
def reproduce(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A study, or the folder of a training.", show_default=False)
    ],
    trial: Annotated[
        str | None,
        typer.Argument(
            help="Number or name of a trial (7, t0007), name of a baseline, or confirm/NAME; without it the best.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Keep the new training in this folder; must be new or empty.")
    ] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Do a training again from the manifest and say whether all its numbers are the same."""
    from carft_ray import console
    from carft_ray.progress import training_shown
    from carft_ray.results.reading.finished import open_finished

    finished = open_finished(folder, trial)
    from carft_ray.results.reproduce import reproduce, shown_changes

    say = (lambda text: None) if json_ else console.say
    with contextlib.ExitStack() as stack:
        out_dir = out
        if out_dir is None:
            out_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carft-ray-"))) / "again"
        say(f"reproducing {finished.title}")
        progress, report = stack.enter_context(training_shown(not json_))
        found = reproduce(finished, out_dir, say, progress, report)
    if json_:
        console.print_json({**found.data(), "folder": None if out is None else str(out)})
    if not found.same:
        raise found.error()
    if json_:
        return
    console.out.print(found.sentence, markup=False, soft_wrap=True)
    if found.changes:
        console.say("And that although the manifest says otherwise than it is now:")
        console.say("\n".join(f"  {line}" for line in shown_changes(found.changes)))
    quoted, name = shlex.quote(str(folder)), shlex.quote(f"{folder}:{finished.name}" if finished.name else str(folder))
    if out is not None:
        console.next_step(f"carft-ray compare {name} {shlex.quote(str(out))}")
    elif finished.name:
        console.next_step(f"carft-ray compare {name} {shlex.quote(f'{folder}:zero_shot')}", f"carft-ray ls {quoted}")
    else:
        console.next_step(f"carft-ray evaluate {quoted}")


@app.command(epilog="Example:  carft-ray compare studies/quickstart:t0003 studies/quickstart:7", rich_help_panel=PANEL)
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=TARGET, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help=TARGET, show_default=False)],
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain how two trainings differ: recipes, data, code, versions, and numbers with paired intervals."""
    from carft_ray import console
    from carft_ray.results.diff import compare

    found = compare(a, b)
    if json_:
        console.print_json(found)
        return
    for key, title, none in (
        ("recipe", "Recipes differ in", "The recipes are the same."),
        ("origin", "Data, code and machines differ in", "Data, code, versions and machines are the same."),
    ):
        if found[key]:
            console.out.print(console.differing_table(title, found[key]))
        else:
            console.out.print(none)
        console.out.print()
    console.out.print(console.comparison_table(found))
    console.say("\n" + (f"Difference A - B in points, paired, 95 % {found['words']}." if found["words"] else ""))
    for what, reason in found["reasons"].items():
        console.say(f"{what} cannot be compared: {reason}.")
    console.say("On validation sets, which choose trials and so flatter the best.")
    console.next_step(f"carft-ray reproduce {shlex.quote(found['a']['folder'])} {found['a']['trial']}".rstrip())
