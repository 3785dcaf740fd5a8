"""Stopping a search or a training."""

from typing import Annotated

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console
from carft_ray.words import counted


@command("stop studies/quickstart", common.SEARCH, reads=True)
def stop(
    study: common.TrainedArgument,
    no_wait: Annotated[bool, Option("--no-wait", help="Do not wait until the trainings have stopped.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Stop a running search or training, as Ctrl-C does. It writes checkpoints first, so that it can be resumed."""
    from carft_ray.launch.stop import ask_to_stop, wait_until_free
    from carft_ray.recipe.space import num_trials
    from carft_ray.results.reading import study_view
    from carft_ray.store.copy import STATE
    from carft_ray.study.place import absolute, named

    study_view.require_study(study, "must be a study or the folder of a training", STATE)
    place = absolute(study)
    see = common.command_line("status", study)
    with common.interrupted_as("no longer waiting; the trainings still stop", f"See: {see}"):
        found = ask_to_stop(place, console.sayer(not json_))
        if found is not None and not no_wait:
            if not json_:
                console.say(f"Asked {found} to stop; waiting for its checkpoints. Ctrl-C ends only the waiting.")
            wait_until_free(place, found, console.sayer(not json_), see)
    view, ended = study_view.read_study(place, STATE), found is None or not no_wait
    finished, wanted = view.num_finished, num_trials(view.recipe)
    answer = {"study": named(view.study_dir), "asked": found, "ended": ended, "finished": finished, "wanted": wanted}
    if console.print_json(answer, json_):
        return
    so_far = f"{finished} of {counted(wanted, 'trial')} finished"
    if found is None:
        console.say(f"Nothing to stop: no {view.what} is running on {study}; {so_far}.")
    else:
        console.say(f"The {view.what} has ended; {so_far}." if ended else f"Asked {found} to stop; {so_far}.")
    common.suggest(study, "stop", view=view)
