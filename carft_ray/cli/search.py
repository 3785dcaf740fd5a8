"""Searches: starting, resuming and stopping one, and what it will take."""

import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.files import is_address
from carft_ray.ui import console
from carft_ray.words import counted

if TYPE_CHECKING:
    from carft_ray.api.answers import Searched
import tempfile
from pathlib import Path

from carft_ray.errors import Problem, RecipeError, UsageError


@dataclass(frozen=True, kw_only=True)
class SearchOptions(common.RunOptions):
    """The options that `search`, `resume` and `submit` share."""

    change_space: Annotated[bool, Option("--change-space", help="Continue with a changed search space.")] = False
    warm_start: Annotated[list[str] | None, Option(metavar="STUDY", help="Start from its trials; repeatable.")] = None
    wall_time: Annotated[
        str | None, Option(metavar="TIME", help="Stop after 45m, 8h, ...; the same command resumes.")
    ] = None
    notify_url: common.NotifyUrlOption = None
    again: Annotated[
        str | None,
        Option(metavar="REASON", help="Why you train after reading test sets; reports show it."),
    ] = None


def _search(begin: Callable[..., "Searched"], study: str, set_: list[str] | None, json_: bool, **options: Any) -> None:
    """What `search` and `resume` share.

    Args:
        begin: ``actions.search`` or ``actions.resume``, with what is their own.
        study: The study directory, or its address.
        set_: Of ``--set``.
        json_: Of ``--json``.
        options: The other ``SearchOptions``.
    """
    options["overrides"] = common.overrides_of(set_, options)
    options["warm_start"] = options["warm_start"] or ()
    found = begin(**options, progress=not json_, strict=False)
    summary = found.numbers
    if not console.print_json(summary, json_):
        if not summary["new_trials"] and not found.out_of_budget and not found.set_aside:
            console.say(f"Nothing to do: {counted(sum(summary['trials'].values()), 'trial')} finished.")
        console.show(found.table)
        console.say("\n" + "\n".join(summary["lines"]))
        if summary["pruner"]:
            console.say("\n".join(summary["pruner"]["lines"]))
            if summary["pruner"]["warning"]:
                console.warn(summary["pruner"]["warning"])
        console.say(f"Results: {found.path}; figure: {summary['figure']}")
        if found.out_of_budget:
            console.say("\n" + summary["budget"]["line"])
    if not found.out_of_budget:
        found.check()
    if not json_:
        logs = found.path if is_address(study) else study
        tensorboard = f"tensorboard --logdir {shlex.quote(str(logs))}"
        common.suggest(study, "search", tensorboard, changed=True, address=options["address"])


@command("search recipe.yaml --study studies/first", common.SEARCH, shared=SearchOptions)
def search(
    recipe: common.RecipeArgument,
    study: Annotated[str, Option(help="Folder or s3://BUCKET/STUDY; an existing study is resumed.")],
    method: common.MethodOption = None,
    set_: common.SetOption = None,
    **shared: Any,
) -> None:
    """Search for the best hyperparameters. The same command resumes."""
    from carft_ray.api import actions

    _search(functools.partial(actions.search, recipe, study), study, set_, method=method, **shared)


@command("resume studies/quickstart --trials +4", common.SEARCH, shared=SearchOptions)
def resume(
    study: common.StudyArgument,
    trials: Annotated[
        str | None, Option(metavar="N|+N", help="Trials in all; +N: N more, once all have ended.")
    ] = None,
    set_: common.SetOption = None,
    **shared: Any,
) -> None:
    """Resume or extend a study, with the recipe of its last search.

    You can change trials, budget, resources, sampler and, with --change-space,
    the search space.
    """
    from carft_ray.api import actions

    _search(functools.partial(actions.resume, study, trials), study, set_, **shared)


@command("stop studies/quickstart", common.SEARCH, reads=True)
def stop(
    study: common.TrainedArgument,
    no_wait: Annotated[bool, Option("--no-wait", help="Do not wait for the trainings to stop.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Stop a search or training, as Ctrl-C does. It first writes checkpoints to resume from."""
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


@command("plan recipe.yaml", common.SEARCH)
def plan(
    recipe: common.RecipeArgument,
    study: Annotated[str | None, Option(help="Folder of the future study; the short trainings run next to it.")] = None,
    method: common.MethodOption = None,
    set_: common.SetOption = None,
    executor: common.ExecutorOption = None,
    num_workers: common.WorkersOption = None,
    address: common.AddressOption = None,
    price_per_gpu_hour: Annotated[float | None, Option(min=0, help="Price of one GPU.")] = None,
    price_per_hour: Annotated[float | None, Option(min=0, help="Price of the whole machine or cluster.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """Estimate a search from short trainings: trials at a time, duration, GPU hours, disk space, cost.

    Runs as many at a time as the search will; a minute in the sandbox. Keeps
    only the decoded images, in the cache.
    """
    from carft_ray.launch.forecast import beyond_budget, forecast, measure
    from carft_ray.recipe.loading import own_functions
    from carft_ray.recipe.rules import check_searchable
    from carft_ray.study.place import fetched, in_bucket

    if price_per_gpu_hour is not None and price_per_hour is not None:
        raise UsageError(Problem("--price-per-hour", "cannot be used with --price-per-gpu-hour: give one price"))
    value = common.load(recipe, set_, method, executor, num_workers)
    if problems := check_searchable(value):
        raise RecipeError(problems)
    if own := own_functions(value):
        step = "Start the search; its live view shows the remaining time."
        problem = Problem(next(iter(own)), "must be null: plan measures only the built-in loop", next_step=step)
        raise UsageError(problem)
    next_to = Path(tempfile.gettempdir())
    if study is not None and not in_bucket(study):
        next_to = fetched(study).absolute().parent
    found = forecast(value, *measure(value, address, next_to, console.sayer(not json_)))
    if price_per_gpu_hour is not None and not found["gpu_hours"]:
        console.warn(
            "--price-per-gpu-hour has no effect: no training uses a GPU. Give --price-per-hour, of the machine."
        )
        price_per_gpu_hour = None
    hours, price = found["gpu_hours"], price_per_gpu_hour
    if price_per_gpu_hour is None:
        hours, price = found["search_s"] / 3600, price_per_hour
    found["price"] = None if price is None else round(hours * price, 4)
    found["budget"] = beyond_budget(value, found)
    if console.print_json(found, json_):
        return
    baselines = f" and {counted(found['num_baselines'], 'baseline')}" if found["num_baselines"] else ""
    what = f"{value.name}: {counted(found['num_trials'], 'trial')}{baselines}"
    console.show(f"{what}, {found['concurrency']} at a time ({found['limited_by']})")
    console.show(console.table(["", *console.numbers("expected", no_wrap=True), ""], _lines(found)))
    console.say(f"Estimated from short trainings. Left out: {', '.join(found['left_out'])}.")
    if found["budget"]:
        console.say(found["budget"])
    given = {"method": method, "set": set_, "executor": executor, "num_workers": num_workers, "address": address}
    console.next_step(common.begin_line(value, recipe, study, **given))


def _lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the rows of the table of a forecast: what, expected, which parts."""
    names = {"trial_s": "one trial", "search_s": "whole search", "confirm_s": "confirm"}
    lines = [(name, console.duration(found[key]), "") for key, name in names.items()]
    unit = "GPU" if found["gpu_hours"] else "CPU"
    lines += [(f"{unit} hours", f"{found[f'{unit.lower()}_hours']:.3g}", "")]
    if found["price"] is not None:
        lines += [("price", f"{found['price']:.2f}", "")]
    sizes = dict(found["disk_bytes"])
    extra = sizes.pop("while it runs")
    parts = ", ".join(f"{what} {console.size_text(size)}" for what, size in sizes.items())
    lines += [("disk", console.size_text(sum(sizes.values())), parts)]
    return [*lines, ("disk while it runs", f"+ {console.size_text(extra)}", "checkpoints")]
