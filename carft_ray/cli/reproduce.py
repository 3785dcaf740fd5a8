"""A training that is done again."""

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console

TRIAL = "Number or name of a trial (7, t0007), name of a baseline, or confirm/NAME; default: the best."


@command("reproduce studies/quickstart t0003", common.TRUST)
def reproduce(
    folder: common.TrainedArgument,
    trial: Annotated[str | None, Argument(help=TRIAL, show_default=False)] = None,
    out: Annotated[
        Path | None, Option(help="New or empty folder for the new training; default: it is removed.")
    ] = None,
    trust: common.TrustOption = False,
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Repeat a training as recorded in its study, and check whether all its numbers are the same."""
    from carft_ray.results.reading.finished import open_finished
    from carft_ray.study.trust import require_written
    from carft_ray.ui.progress import training_shown

    finished = open_finished(folder, trial)
    if not trust_paths:
        require_written(finished.folder, finished.base, "reproduce {}")
    if not finished.is_zero_shot:
        from carft_ray.api.checks import require_trusted

        require_trusted(finished.recipe, trust, baselines=False)
    from carft_ray.results.reproduce import change_lines, difference_error, reproduce, sentence

    say = console.sayer(not json_)
    with contextlib.ExitStack() as stack:
        out_dir = out
        if out_dir is None:
            out_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carft-ray-"))) / "again"
        say(f"reproducing {finished.title}")
        found = reproduce(finished, out_dir, say, stack.enter_context(training_shown(not json_)))
    console.print_json({**found, "folder": None if out is None else str(out)}, json_)
    if not found["same"]:
        raise difference_error(found)
    if json_:
        return
    console.show(sentence(found))
    if lines := change_lines(found):
        console.say("They are the same although the code or the machine has changed:")
        console.say("\n".join(f"  {line}" for line in lines))
    compare = common.command_line("compare", f"{folder}:{finished.name}", out or f"{folder}:zero_shot")
    console.next_step(compare, *([common.command_line("ls", folder)] if out is None else []))
