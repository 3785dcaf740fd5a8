"""What a study's best is worth, from what is stored."""

from pathlib import Path
from typing import Annotated

from typer import Option

from carft_ray import files
from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, UsageError
from carft_ray.ui import console


@command("report studies/quickstart", common.TRUST, reads=True)
def report(
    study: common.StudyArgument,
    html: Annotated[bool, Option("--html", help="Write one HTML page: figures, tables, all trials.")] = False,
    card: Annotated[str | None, Option(metavar="text|latex", help="Print only the verdict, in five lines.")] = None,
    tables: Annotated[Path | None, Option(metavar="DIR", help="Write only the tables, as CSV, to this folder.")] = None,
    out: Annotated[
        Path | None, Option(metavar="FILE", help="File of --html (default: in the study) or of --card.")
    ] = None,
    json_: common.JsonOption = False,
) -> None:
    """Show what the best trial is worth: without selection bias, and against the baselines. Reads no test set."""
    from carft_ray.api import actions
    from carft_ray.files import is_address

    first, *others = [name for name, given in (("--html", html), ("--card", card), ("--tables", tables)) if given] or [
        ""
    ]
    if others:
        raise UsageError(Problem(others[0], f"cannot be used with {first}"))
    if json_ and card:
        raise UsageError(Problem("--json", "cannot be used with --card, which prints text"))
    if out and not (html or card):
        raise UsageError(Problem("--out", "needs --html or --card"))
    if html and out is None and is_address(study):
        raise UsageError(Problem("--html", "needs --out if the study is in a bucket"))
    found = actions.report(study)
    if card is not None:
        text = found.card(card, "--card")
        if out is None:
            console.show(text.rstrip("\n"))
        else:
            files.write_text(out, text)
            console.say(f"Card: {out}")
        return
    if tables is not None:
        paths = [str(path) for path in found.save_tables(tables)]
        if not console.print_json({"tables": paths}, json_):
            console.show("\n".join(paths))
        return
    if html:
        path = found.save(out)
        size = path.stat().st_size
        if not console.print_json({"page": str(path), "num_bytes": size, "document": found.document}, json_):
            console.show(f"Page: {path} ({console.size_text(size)}); open it in a browser.")
            common.suggest(study, "report")
        return
    if not console.print_json(found.numbers, json_):
        console.show("\n".join(found.numbers["lines"]))
        common.suggest(study, "report")
