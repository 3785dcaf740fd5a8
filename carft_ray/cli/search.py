"""A search: begun, resumed."""

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


@dataclass(frozen=True, kw_only=True)
class SearchOptions(common.RunOptions):
    """The options that `search`, `resume` and `submit` share."""

    change_space: Annotated[bool, Option("--change-space", help="Continue the study with a changed search space.")] = (
        False
    )
    warm_start: Annotated[
        list[str] | None, Option(metavar="STUDY", help="Start from the trials of this study; repeatable.")
    ] = None
    wall_time: Annotated[
        str | None, Option(metavar="TIME", help="Stop after 45m, 8h, ...; the same command resumes.")
    ] = None
    notify_url: common.NotifyUrlOption = None
    again: Annotated[
        str | None,
        Option(metavar="REASON", help="Why to train after the test sets were read; every report shows it."),
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
    if json_ or not found.out_of_budget:
        found.check()
    if not json_:
        logs = found.path if is_address(study) else study
        common.suggest(study, "search", f"tensorboard --logdir {shlex.quote(str(logs))}", changed=True)


@command("search recipe.yaml --study studies/first", common.SEARCH, shared=SearchOptions)
def search(
    recipe: common.RecipeArgument,
    study: Annotated[str, Option(help="Study directory, or s3://BUCKET/STUDY; an existing one is resumed.")],
    set_: common.SetOption = None,
    **shared: Any,
) -> None:
    """Search for the best hyperparameters. Run the same command again to resume."""
    from carft_ray.api import actions

    _search(functools.partial(actions.search, recipe, study), study, set_, **shared)


@command("resume studies/quickstart --trials +4", common.SEARCH, shared=SearchOptions)
def resume(
    study: common.StudyArgument,
    trials: Annotated[str | None, Option(metavar="N|+N", help="Trials in all, or +N for N more.")] = None,
    set_: common.SetOption = None,
    **shared: Any,
) -> None:
    """Resume or extend a study, with the recipe of its last search.

    You can change trials, budget, resources and sampler, and the search space
    with --change-space.
    """
    from carft_ray.api import actions

    _search(functools.partial(actions.resume, study, trials), study, set_, **shared)
