"""A search: what it will take, begin, resume, stop."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from carft_ray import console
from carft_ray.cli import common
from carft_ray.errors import InterruptedRunError, Problem, RecipeError, UsageError
from carft_ray.words import counted

NarrowOption = Annotated[bool, Option("--narrow", help="Let the search space of the study shrink.")]
WidenOption = Annotated[bool, Option("--widen", help="Let the search space of the study grow.")]
WallTimeOption = Annotated[
    str | None, Option(metavar="TIME", help="End after this time, such as 45m or 8h; resumable.")
]
WarmStartOption = Annotated[
    list[Path] | None, Option(metavar="DIR", help="Use the trials of another study; repeatable.")
]
AgainOption = Annotated[
    str | None,
    Option(metavar="REASON", help="Train more although the test sets were read; every report keeps the reason."),
]
TrustOption = Annotated[bool, Option("--trust", help="Let cmaes read pickles of a study from elsewhere.")]


def _search(
    recipe: Path,
    study: Path,
    overrides: list[str],
    *,
    executor: common.ExecutorOption = None,
    num_workers: common.WorkersOption = None,
    address: common.AddressOption = None,
    narrow: NarrowOption = False,
    widen: WidenOption = False,
    warm_start: WarmStartOption = None,
    wall_time: WallTimeOption = None,
    notify_command: common.NotifyCommandOption = None,
    notify_url: common.NotifyUrlOption = None,
    again: AgainOption = None,
    trust: TrustOption = False,
    json_: common.JsonOption = False,
) -> None:
    """What `search` and `resume` do once they know the recipe, and the options that they share.

    The paths of further studies for a warm start count from the working directory.
    """
    overrides += [] if wall_time is None else [f"budget.wall_time={wall_time}"]
    value = common.load(recipe, overrides, executor, num_workers)
    named = tuple(dict.fromkeys((*value.search.warm_start, *(str(path.resolve()) for path in warm_start or ()))))
    value = value.model_copy(update={"search": value.search.model_copy(update={"warm_start": named})})
    allow: list[Any] = ["narrow"] * narrow + ["widen"] * widen
    from carft_ray.recipe.checks.advice import check_searchable

    if problems := check_searchable(value):
        raise RecipeError(problems)
    from carft_ray.study.ledger import require_unread

    if not require_unread(study, value, again, allow) and again is not None:
        console.warn("--again has no effect: no test set was read, nothing is to train, or an earlier reason holds")
    from carft_ray.study.proposals.trust import unpickles

    if trust and not unpickles(value):
        console.warn(f"--trust has no effect: {value.search.sampler.name} unpickles nothing")
    from carft_ray.launch.notify import notifying
    from carft_ray.launch.runs.search import run_search, set_aside_error
    from carft_ray.progress import search_shown
    from carft_ray.results.reading.summary import study_summary

    with (
        notifying(notify_command, notify_url, value.name, study, console.warn) as with_notices,
        search_shown(not json_, study, value.train.epochs) as on_event,
    ):
        result = run_search(value, study, address, with_notices(on_event), trusted=trust, may=allow)
    summary = study_summary(value, result)
    if not console.print_json(summary, json_):
        if not result.num_new and not result.out_of_budget and not result.set_aside:
            console.say(f"Nothing to do: {counted(len(result.trials), 'trial')} finished.")
        console.out.print(console.trial_table(summary["rows"]))
        console.say("\n" + "\n".join(summary["lines"]))
        if summary["pruner"]:
            console.say("\n".join(summary["pruner"]["lines"]))
            if summary["pruner"]["warning"]:
                console.warn(summary["pruner"]["warning"])
        console.say(f"Results: {result.study_dir}; figure: {summary['figure']}")
        if result.out_of_budget:
            console.say("\n" + summary["budget"]["line"])
    if result.set_aside and (json_ or not result.out_of_budget):
        raise set_aside_error(result.set_aside, f"carft-ray resume {shlex.quote(str(study))}")
    if not json_:
        common.suggest(study, "search", f"tensorboard --logdir {shlex.quote(str(study))}")


@common.command("search search_spaces/quickstart.yaml --study studies/quickstart", common.SEARCH, shared=_search)
def search(
    recipe: common.RecipeArgument,
    study: Annotated[Path, Option(help="Study directory; an existing study is resumed.")],
    set_: common.SetOption = None,
    **shared: Any,
) -> None:
    """Search for the best hyperparameters. The same command again resumes the search."""
    _search(recipe, study, set_ or [], **shared)


@common.command("resume studies/quickstart --trials +4", common.SEARCH, shared=_search)
def resume(
    study: common.StudyArgument,
    trials: Annotated[str | None, Option(metavar="N|+N", help="Trials in all, or with a plus, how many more.")] = None,
    set_: common.SetOption = None,
    **shared: Any,
) -> None:
    """Resume a study where it was, or extend it. Its recipe is its own resolved.yaml.

    What may change: trials, budget, resources, sampler, and the search space with --narrow or --widen.
    """
    from carft_ray.results.reading import overview

    study_dir = overview.require_study(study)
    recipe = overview.resolved_recipe(study_dir)
    overrides = [*overview.behind(study_dir), *(set_ or ())]
    if trials is not None:
        overrides.append(f"search.trials={overview.total_trials(trials, overview.read_study(study_dir))}")
    _search(recipe, study, overrides, **shared)


@common.command("stop studies/quickstart", common.SEARCH)
def stop(
    study: Annotated[Path, Argument(help="Folder of a study, or of a training.", show_default=False)],
    no_wait: Annotated[bool, Option("--no-wait", help="Ask, and do not wait for the checkpoints.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Stop a running search or training as Ctrl-C does: it writes its checkpoints and can be resumed."""
    from carft_ray.launch.stop import ask_to_stop, wait_until_free
    from carft_ray.recipe.spaces.grid import num_trials
    from carft_ray.results.reading import overview

    study_dir = overview.require_claimed(study)
    found = ask_to_stop(study_dir)
    try:
        if found is not None and not no_wait:
            if not json_:
                console.say(f"Asked {found} to stop; waiting for its checkpoints. Ctrl-C ends the waiting only.")
            wait_until_free(study_dir)
    except KeyboardInterrupt:
        step = f"See: carft-ray status {shlex.quote(str(study))}"
        raise InterruptedRunError(Problem("", "no longer waiting; it still stops", next_step=step)) from None
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


@common.command("plan search_spaces/quickstart.yaml", common.SEARCH)
def plan(
    recipe: common.RecipeArgument,
    study: Annotated[Path | None, Option(help="Study directory; its trainings give the times.")] = None,
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
    from carft_ray.launch.forecast import beyond_budget, forecast, limited_by_input, measure_by_study, price
    from carft_ray.launch.probe import measure_by_probe
    from carft_ray.recipe.checks.advice import check_searchable
    from carft_ray.results.reading.overview import is_study

    if price_per_gpu_hour is not None and price_per_hour is not None:
        raise UsageError(Problem("--price-per-hour", "must stand without --price-per-gpu-hour: give one price"))
    value = common.load(recipe, set_, executor, num_workers)
    if problems := check_searchable(value):
        raise RecipeError(problems)
    measured = measure_by_study(value, study, address) if study is not None and is_study(study) else None
    if measured is None:
        next_to = study.absolute().parent if study is not None else None
        measured = measure_by_probe(value, address, next_to, console.sayer(not json_))
    found = forecast(value, *measured)
    if price_per_gpu_hour is not None and not found["gpus_per_worker"]:
        step = "Give --price-per-hour, of the whole machine."
        raise UsageError(Problem("--price-per-gpu-hour", "needs trainings that use a GPU", next_step=step))
    found["price"] = price(found, price_per_gpu_hour, price_per_hour)
    found["budget"], found["input"] = beyond_budget(value, found), limited_by_input(value, found)
    if console.print_json(found, json_):
        return
    baselines = f" and {counted(found['num_baselines'], 'baseline')}" if found["num_baselines"] else ""
    what = f"{value.name}: {counted(found['num_trials'], 'trial')}{baselines}"
    console.out.print(f"{what}, {found['concurrency']} at a time ({found['limited_by']})", markup=False)
    console.out.print(console.table(["", *console.numbers("expected", no_wrap=True), "range"], _lines(found)))
    if found["measured"]["by"] == "study":
        console.say("From the trainings that the study has finished, as they ran there.")
    else:
        console.say(f"From real trainings on a share of the sets, {found['measured']['took_s']:.0f} s in all.")
    for warning in filter(None, (found["budget"], found["input"])):
        console.say(warning)
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
