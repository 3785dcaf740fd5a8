"""A search: what it will take, begin, resume, stop."""

import functools
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.errors import Problem, RecipeError, UsageError
from carft_ray.ui import console
from carft_ray.words import counted

if TYPE_CHECKING:
    from carft_ray.api.answers import Searched


@dataclass(frozen=True, kw_only=True)
class SearchOptions(common.RunOptions):
    """The options that `search`, `resume` and `submit` share."""

    change_space: Annotated[bool, Option("--change-space", help="Let the search space of the study change.")] = False
    warm_start: Annotated[list[Path] | None, Option(metavar="DIR", help="Use a study's trials; repeatable.")] = None
    wall_time: Annotated[str | None, Option(metavar="TIME", help="End after 45m, 8h, ...; resumable.")] = None
    notify_url: common.NotifyUrlOption = None
    again: Annotated[
        str | None, Option(metavar="REASON", help="Train after a read of the test sets; every report keeps the reason.")
    ] = None


def _search(begin: Callable[..., "Searched"], study: Path, set_: list[str] | None, json_: bool, **options: Any) -> None:
    """What `search` and `resume` share.

    Args:
        begin: ``actions.search`` or ``actions.resume``, with what is their own.
        study: The study directory.
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
    if json_ or not found.out_of_budget:
        found.check()
    if not json_:
        common.suggest(study, "search", f"tensorboard --logdir {shlex.quote(str(study))}")


@common.command("search recipe.yaml --study studies/first", common.SEARCH, shared=SearchOptions)
def search(
    recipe: common.RecipeArgument,
    study: Annotated[Path, Option(help="Study directory; an existing study is resumed.")],
    set_: common.SetOption = None,
    **shared: Any,
) -> None:
    """Search for the best hyperparameters. The same command again resumes the search."""
    from carft_ray.api import actions

    _search(functools.partial(actions.search, recipe, study), study, set_, **shared)


@common.command("resume studies/quickstart --trials +4", common.SEARCH, shared=SearchOptions)
def resume(
    study: common.StudyArgument,
    trials: Annotated[str | None, Option(metavar="N|+N", help="Trials in all, or with a plus, how many more.")] = None,
    set_: common.SetOption = None,
    **shared: Any,
) -> None:
    """Resume a study where it was, or extend it. Its recipe is its own resolved.yaml.

    What may change: trials, budget, resources, sampler, and the search space with --change-space.
    """
    from carft_ray.api import actions

    _search(functools.partial(actions.resume, study, trials), study, set_, **shared)


@common.command("stop studies/quickstart", common.SEARCH, reads=True)
def stop(
    study: Annotated[Path, Argument(help="Folder of a study, or of a training.", show_default=False)],
    no_wait: Annotated[bool, Option("--no-wait", help="Ask, and do not wait for the checkpoints.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Stop a running search or training as Ctrl-C does: it writes its checkpoints and can be resumed."""
    from carft_ray.launch.stop import ask_to_stop, wait_until_free
    from carft_ray.recipe.space.grid import num_trials
    from carft_ray.results.reading import overview

    study_dir = overview.require_claimed(study)
    found = ask_to_stop(study_dir)
    see = common.command_line("status", study)
    with common.interrupted_as("no longer waiting; it still stops", f"See: {see}"):
        if found is not None and not no_wait:
            if not json_:
                console.say(f"Asked {found} to stop; waiting for its checkpoints. Ctrl-C ends the waiting only.")
            wait_until_free(study_dir)
    what, so_far = "training", ""
    answer: dict[str, Any] = {"study": str(study_dir), "asked": found, "ended": found is None or not no_wait}
    if overview.is_study(study_dir):  # else it is the folder of `train`
        view = overview.read_study(study_dir)
        answer |= {"finished": view.num_finished, "wanted": num_trials(view.recipe)}
        what, so_far = "search", f"; {view.num_finished} of {counted(answer['wanted'], 'trial')} finished"
    if console.print_json(answer, json_):
        return
    if found is None:
        console.say(f"Nothing to stop: no {what} runs on {study}{so_far}.")
    else:
        console.say(f"The {what} has ended{so_far}." if answer["ended"] else f"Asked {found} to stop{so_far}.")
    if so_far:
        common.suggest(study, "stop")


@common.command("plan recipe.yaml", common.SEARCH)
def plan(
    recipe: common.RecipeArgument,
    study: Annotated[Path | None, Option(help="Where the study would be; the short trainings run beside it.")] = None,
    set_: common.SetOption = None,
    executor: common.ExecutorOption = None,
    num_workers: common.WorkersOption = None,
    address: common.AddressOption = None,
    price_per_gpu_hour: Annotated[float | None, Option(min=0, help="Of one GPU, for the cost of the search.")] = None,
    price_per_hour: Annotated[float | None, Option(min=0, help="Of the whole machine or cluster.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """Measure what a search will take: trials at a time, time, GPU hours, disk, money.

    It trains a little, as many trainings at a time as the search will; a minute in the sandbox. Only decoded images
    stay.
    """
    from carft_ray.launch.forecast import beyond_budget, forecast, measure_by_training, price
    from carft_ray.recipe.checks.advice import check_searchable
    from carft_ray.recipe.loading import own_functions

    if price_per_gpu_hour is not None and price_per_hour is not None:
        raise UsageError(Problem("--price-per-hour", "must stand without --price-per-gpu-hour: give one price"))
    value = common.load(recipe, set_, executor, num_workers)
    if problems := check_searchable(value):
        raise RecipeError(problems)
    if own := own_functions(value):
        step = "Begin the search; its live view tells the time that is left."
        problem = Problem(next(iter(own)), "must be null: plan measures the built-in loop", next_step=step)
        raise UsageError(problem)
    next_to = Path(tempfile.gettempdir()) if study is None else study.absolute().parent
    measured = measure_by_training(value, address, next_to, console.sayer(not json_))
    found = forecast(value, *measured)
    if price_per_gpu_hour is not None and not found["gpus_per_worker"]:
        step = "Give --price-per-hour, of the whole machine."
        raise UsageError(Problem("--price-per-gpu-hour", "needs trainings that use a GPU", next_step=step))
    found["price"] = price(found, price_per_gpu_hour, price_per_hour)
    found["budget"] = beyond_budget(value, found)
    if console.print_json(found, json_):
        return
    baselines = f" and {counted(found['num_baselines'], 'baseline')}" if found["num_baselines"] else ""
    what = f"{value.name}: {counted(found['num_trials'], 'trial')}{baselines}"
    console.show(f"{what}, {found['concurrency']} at a time ({found['limited_by']})")
    console.show(console.table(["", *console.numbers("expected", no_wrap=True), "range"], _lines(found)))
    console.say(f"From short trainings, {found['measured']['took_s']:.0f} s in all.")
    if found["budget"]:
        console.say(found["budget"])
    if value.search.pruner.name != "none":
        console.say("The pruner will make it shorter; nothing is taken off for it.")
    given = {"set": set_, "executor": executor, "num_workers": num_workers, "address": address}
    console.next_step(common.begin_line(value, recipe, study, **given))


def _lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the rows of the table of a forecast: what, expected, range."""

    def line(what: str, text: Callable[[float], str], three: Sequence[float]) -> tuple[str, str, str]:
        return what, text(three[0]), f"{text(three[1])} to {text(three[2])}"

    lines = [("preparation", console.duration(found["prepare_s"]), "")]
    lines += [line("one trial", console.duration, found["trial_s"])]
    lines += [line("whole search", console.duration, found["search_s"])]
    lines += [line("confirm", console.duration, found["confirm_s"])]
    unit = "GPU" if found["gpus_per_worker"] else "CPU"
    lines += [line(f"{unit} hours", "{:.3g}".format, found[f"{unit.lower()}_hours"])]
    if found["price"] is not None:
        lines += [line("price", "{:.2f}".format, found["price"])]
    sizes = {what: console.size_text(size) for what, size in found["disk_bytes"].items()}
    extra = sizes.pop("while it runs", None)
    total = sum(size for what, size in found["disk_bytes"].items() if what in sizes)
    lines += [("disk", console.size_text(total), ", ".join(f"{what} {size}" for what, size in sizes.items()))]
    if extra is not None:
        lines += [("disk while it runs", f"+ {extra}", "checkpoints")]
    return lines
