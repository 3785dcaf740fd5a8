"""A search: begin, go on, stop."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from carft_ray.cli.common import (
    AddressOption,
    DebugOption,
    ExecutorOption,
    JsonOption,
    NarrowOption,
    NotifyCommandOption,
    NotifyUrlOption,
    RecipeArgument,
    SetOption,
    StudyArgument,
    WallTimeOption,
    WidenOption,
    WorkersOption,
    app,
    budget_overrides,
    load,
    suggest,
)
from carft_ray.errors import InterruptedRunError, Problem, RecipeError
from carft_ray.words import counted

PANEL = "A search"  # of the help
TrustOption = Annotated[
    bool,
    typer.Option("--trust", help="Open a study from elsewhere although its sampler, cmaes, reads pickles of it."),
]
AgainOption = Annotated[
    str | None,
    typer.Option(
        "--again", metavar="REASON", help="Train more although the test sets were read; every report keeps the reason."
    ),
]

WarmStartOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--warm-start", metavar="DIR", help="Tell the sampler of another study's trials too; may be repeated."
    ),
]


@app.command(
    epilog="Example:  carft-ray search search_spaces/quickstart.yaml --study studies/quickstart", rich_help_panel=PANEL
)
def search(
    recipe: RecipeArgument,
    study: Annotated[Path, typer.Option("--study", help="Study directory; an existing study goes on.")],
    set_: SetOption = None,
    executor: ExecutorOption = None,
    num_workers: WorkersOption = None,
    address: AddressOption = None,
    narrow: NarrowOption = False,
    widen: WidenOption = False,
    warm_start: WarmStartOption = None,
    wall_time: WallTimeOption = None,
    notify_command: NotifyCommandOption = None,
    notify_url: NotifyUrlOption = None,
    again: AgainOption = None,
    trust: TrustOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search for the best hyperparameters; run again, it goes on where it was."""
    overrides = [*(set_ or ()), *budget_overrides(wall_time)]
    value = _warm(load(recipe, overrides, executor, num_workers), warm_start)
    notify = (notify_command, notify_url)
    _search(value, study, address, again, trust, json_, _may(narrow, widen), notify)


@app.command(epilog="Example:  carft-ray resume studies/quickstart --trials +4", rich_help_panel=PANEL)
def resume(
    study: StudyArgument,
    trials: Annotated[
        str | None, typer.Option("--trials", metavar="N|+N", help="Trials in all, or with a plus how many more.")
    ] = None,
    set_: SetOption = None,
    executor: ExecutorOption = None,
    num_workers: WorkersOption = None,
    address: AddressOption = None,
    narrow: NarrowOption = False,
    widen: WidenOption = False,
    warm_start: WarmStartOption = None,
    wall_time: WallTimeOption = None,
    notify_command: NotifyCommandOption = None,
    notify_url: NotifyUrlOption = None,
    again: AgainOption = None,
    trust: TrustOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Go on with a study where it was, or extend it; its recipe is its own resolved.yaml.

    What may change: trials, budget, resources, sampler, and the search space with --narrow or --widen.
    """
    from carft_ray.results.reading import overview

    study_dir = overview.require_study(study)
    recipe = overview.resolved_recipe(study_dir)
    overrides = [*overview.behind(study_dir), *(set_ or ()), *budget_overrides(wall_time)]
    if trials is not None:
        overrides.append(f"search.trials={overview.total_trials(trials, overview.read_study(study_dir))}")
    value = _warm(load(recipe, overrides, executor, num_workers), warm_start)
    notify = (notify_command, notify_url)
    _search(value, study, address, again, trust, json_, _may(narrow, widen), notify)


def _may(narrow: bool, widen: bool) -> list[Any]:
    return ["narrow"] * narrow + ["widen"] * widen


def _warm(value: Any, sources: list[Path] | None) -> Any:
    """Returns a recipe with further studies for a warm start, whose paths count from the working directory."""
    named = tuple(dict.fromkeys((*value.search.warm_start, *(str(source.resolve()) for source in sources or ()))))
    return value.model_copy(update={"search": value.search.model_copy(update={"warm_start": named})})


def _search(
    value: Any,
    study: Path,
    address: str | None,
    again: str | None,
    trust: bool,
    json_: bool,
    may: list[Any],
    notify: tuple[str | None, str | None],
) -> None:
    """What `search` and `resume` do once they have a recipe."""
    from carft_ray import console
    from carft_ray.recipe.advice import check_searchable

    if problems := check_searchable(value):
        raise RecipeError(problems)
    from carft_ray.study.ledger import require_unread

    if not require_unread(study, value, again, may) and again is not None:
        console.warn("--again has no effect: no test set was read, nothing is to train, or an earlier reason holds")
    from carft_ray.study.trust import unpickles

    if trust and not unpickles(value):
        console.warn(f"--trust has no effect: {value.search.sampler.name} unpickles nothing")
    from carft_ray.launch.notify import notifying
    from carft_ray.launch.runs.search import run_search
    from carft_ray.progress import search_shown
    from carft_ray.results.reading.summary import study_summary

    with (
        notifying(*notify, value.name, study, console.warn) as beside,
        search_shown(not json_, study, value.train.epochs) as on_event,
    ):
        result = run_search(value, study, address, beside(on_event), trusted=trust, may=may)
    summary = study_summary(value, result)
    if json_:
        console.print_json(summary)
        _raise_set_aside(result, study)
        return
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
    else:
        _raise_set_aside(result, study)
    suggest(study, "search", f"tensorboard --logdir {shlex.quote(str(study))}")


def _raise_set_aside(result: Any, study: Path) -> None:
    from carft_ray.launch.runs.search import set_aside_error

    if result.set_aside:
        raise set_aside_error(result.set_aside, f"carft-ray resume {shlex.quote(str(study))}")


@app.command(epilog="Example:  carft-ray stop studies/quickstart", rich_help_panel=PANEL)
def stop(
    study: Annotated[Path, typer.Argument(help="Folder of a study, or of a training.", show_default=False)],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask, and do not wait for the checkpoints.")] = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a running search to write its checkpoints and end, as its own Ctrl-C does; then it can be resumed."""
    from carft_ray import console
    from carft_ray.launch.stop import ask_to_stop, wait_until_free
    from carft_ray.recipe.spaces.grid import num_trials
    from carft_ray.results.reading import overview

    folder = shlex.quote(str(study))
    study_dir = overview.require_claimed(study)
    found = ask_to_stop(study_dir)
    answer = {"study": str(study_dir), "asked": found, "ended": found is None}
    try:
        if found is not None and not no_wait:
            if not json_:
                console.say(f"Asked {found} to stop; waiting for its checkpoints. Ctrl-C ends the waiting only.")
            wait_until_free(study_dir)
            answer["ended"] = True
    except KeyboardInterrupt:
        step = f"See: carft-ray status {folder}"
        raise InterruptedRunError(Problem("", "no longer waiting; it stops by itself", next_step=step)) from None
    if not overview.is_study(study_dir):  # a training of `train`
        if json_:
            console.print_json(answer)
        elif found is None:
            console.say(f"Nothing to stop: nothing runs on {study}.")
        else:
            console.say("The training has ended." if answer["ended"] else "Asked to stop.")
        return
    view = overview.read_study(study_dir)
    finished, wanted = view.num_finished, num_trials(view.recipe)
    if json_:
        console.print_json({**answer, "finished": finished, "wanted": wanted})
        return
    so_far = f"{finished} of {counted(wanted, 'trial')} finished"
    if found is None:
        console.say(f"Nothing to stop: no search runs on {study}; {so_far}.")
    else:
        console.say(f"The search has ended; {so_far}." if answer["ended"] else f"Asked {found} to stop; {so_far}.")
    suggest(study, "stop")
