"""The log of one trial."""

import shlex
from typing import Annotated

from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, UsageError
from carft_ray.layout import LOG
from carft_ray.ui import console


@command("logs studies/quickstart 7 --follow", common.READING, reads=True)
def logs(
    study: common.StudyArgument,
    trial: Annotated[str, Argument(help="Trial (7, t0007) or name of a baseline.", show_default=False)],
    follow: Annotated[bool, Option("--follow", "-f", help="Print new lines until its training ends.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Print the log of one trial: the start of each attempt, and the traceback of each failure."""
    from carft_ray.results.reading import logs, study_view
    from carft_ray.store.copy import STATE
    from carft_ray.study.place import bring
    from carft_ray.study.rows import ZERO_SHOT

    if follow and json_:
        raise UsageError(Problem("--json", "cannot be used with --follow"))
    view = study_view.read_study(study, STATE)
    row = logs.find_training(view, trial)
    bring(view.study_dir, [f"{row.training}/{LOG}"])
    lines = logs.read_log(view.study_dir, row.training)
    if console.print_json(lines or [], json_):
        return
    if follow and view.holder is not None and row.outcome == "running":
        try:
            for line in logs.follow_log(study, row.training):
                console.show(line)
        except KeyboardInterrupt:
            console.say("The search continues.")
    elif lines is None:
        why = "the zero-shot model is not trained" if row.name == ZERO_SHOT else f"it is {view.state(row)}"
        console.say(f"{row.name} has no log: {why}.")
    else:
        for line in lines:
            console.show(line)
    console.next_step(f"carft-ray status {shlex.quote(study)}")
