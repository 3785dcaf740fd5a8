"""Options that several commands have, and the lines that a command suggests next."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from carft_ray.errors import InterruptedRunError, Problem
from carft_ray.ui import console

if TYPE_CHECKING:
    from carft_ray.recipe.schema.recipe import Recipe
    from carft_ray.results.reading.study_view import Overview

ONE_TRAINING, SEARCH, READING, TRUST = "One training", "A search", "Reading a study", "Trusting the numbers"  # panels

# options that set a key of the recipe
KEYS = {"executor": "resources.executor", "num_workers": "resources.num_workers", "wall_time": "budget.wall_time"}
KEYS |= {"method": "method"}  # several keys at once (``recipe.methods``)
TRAIN = ("resume", "confirm")  # commands that a study suggests and that take --address

RecipeArgument = Annotated[Path, Argument(help="Recipe (YAML).", show_default=False)]
StudyArgument = Annotated[str, Argument(help="Folder or s3://BUCKET/STUDY.", show_default=False)]
TrainedArgument = Annotated[str, Argument(help="Training or study: folder or address.", show_default=False)]
SetOption = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Set a recipe key; repeatable.")]
MethodOption = Annotated[str | None, Option(metavar="NAME", help="Use a method (init --list).")]
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]
DebugOption = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
ExecutorOption = Annotated[str | None, Option(help="auto, inline, ray-train, or debug (without Ray).")]
WorkersOption = Annotated[int | None, Option(min=1, help="Processes per training; usually one per GPU.")]
AddressOption = Annotated[str | None, Option(help="Ray cluster; default: a local Ray.")]
DashboardOption = Annotated[
    str | None,
    Option("--address", metavar="URL", help="Dashboard of the cluster.", show_default="http://127.0.0.1:8265"),
]
NotifyUrlOption = Annotated[str | None, Option(metavar="URL", help="Webhook for results, failures, the end.")]
TrustOption = Annotated[bool, Option("--trust", help="Run the code of train.function.")]
TrustPathsOption = Annotated[bool, Option("--trust-paths", help="Read local files that another machine's study names.")]
AlphaOption = Annotated[
    float | None, Option(min=0, max=1, help="Share of the fine-tuned weights; default: as chosen in training.")
]
TrialOption = Annotated[str | None, Option(help="Trial (7, t0007) or name of a baseline; default: the best trial.")]
ExportedOption = Annotated[
    str | None, Option("--trial", help="Trial (7, t0007) or name of a baseline; default: the tested or best model.")
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of the commands that train: ``train``, ``confirm``, and with more of them a search."""

    executor: ExecutorOption = None
    num_workers: WorkersOption = None
    address: AddressOption = None
    trust: TrustOption = False
    trust_paths: TrustPathsOption = False
    json_: JsonOption = False


@contextlib.contextmanager
def interrupted_as(what: str, step: str) -> Iterator[None]:
    """Turns Ctrl-C within the block into an ``InterruptedRunError``: what has ended by it, and what to do now."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(Problem("", what, next_step=step)) from None


def overrides_of(given: Sequence[str] | None, options: dict[str, Any]) -> list[str]:
    """Returns overrides of a recipe: those given, and the options of ``KEYS``, which are taken out of ``options``."""
    found = {key: options.pop(name, None) for name, key in KEYS.items()}
    return [*(given or ()), *(f"{key}={value}" for key, value in found.items() if value is not None)]


def load(
    path: Path,
    overrides: list[str] | None,
    method: str | None = None,
    executor: str | None = None,
    num_workers: int | None = None,
) -> "Recipe":
    """Loads and checks a recipe (``checks.load_recipe``) with what a command sets over it."""
    from carft_ray.api.checks import load_recipe

    options = {"method": method, "executor": executor, "num_workers": num_workers}
    return load_recipe(path, overrides_of(overrides, options))


def suggest(
    study: str,
    after: str,
    *more: str,
    changed: bool = False,
    view: "Overview | None" = None,
    address: str | None = None,
) -> None:
    """Prints what to run next on a study as it stands now (``results.adviser``).

    Args:
        study: Its folder or address as the user has written it.
        after: Name of the command that ends here.
        more: Further command lines.
        changed: The command has changed the study.
        view: The study as the command has read it, if nothing can have changed since.
        address: Of the Ray cluster that has trained; suggested for the next trainings, too.
    """
    from carft_ray.results.adviser import BEHIND, MILDER, behind_zero_shot, next_steps
    from carft_ray.results.reading.study_view import read_study
    from carft_ray.store.copy import STATE
    from carft_ray.study.place import own_folder

    view = view or read_study(own_folder(study, need=None) if changed else study, STATE)
    if behind_zero_shot(view):
        console.say(f"{BEHIND}: {MILDER}")
    where = shlex.join(option_words(address=address))
    steps = [
        f"{step} {where}" if where and step.split()[1] in TRAIN else step for step in next_steps(view, study, after)
    ]
    console.next_step(*steps, *more)


def command_line(*words: object, **options: object) -> str:
    """Returns a command as a user would type it.

    Args:
        words: Name and arguments.
        options: Values by the name of the option; one that is None or False is left out, a list repeats the option,
            True is a flag.
    """
    return shlex.join(["carft-ray", *map(str, words), *option_words(**options)])


def option_words(**options: object) -> list[str]:
    """Returns the words of options, as ``command_line`` takes them."""
    words = []
    for name, value in options.items():
        flag = f"--{name.strip('_').replace('_', '-')}"
        for one in value if isinstance(value, list) else [] if value in (None, False) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return words


def begin_line(value: "Recipe", recipe: Path, study: Path | str | None = None, **options: object) -> str:
    """Returns the command that begins with a recipe: a search, or one training where it has nothing to search.

    Args:
        value: The recipe.
        recipe: Its file.
        study: The study directory, or its address; None: one of the recipe's name.
        options: As of ``command_line``.
    """
    from carft_ray.recipe.loading import trust_word
    from carft_ray.recipe.rules import check_searchable

    options["trust"] = bool(trust_word(value))
    if check_searchable(value):
        return command_line("train", recipe, **options, out=Path("runs") / value.name)
    return command_line("search", recipe, **options, study=study or Path("studies") / value.name)
