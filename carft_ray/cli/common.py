"""The app, what all commands share, and the one place where an error ends as a message and an exit code."""

import contextlib
import errno
import functools
import inspect
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from carft_ray import __version__, environment
from carft_ray.errors import CarftError, InterruptedRunError, Problem, UsageError
from carft_ray.ui import console

if TYPE_CHECKING:
    from carft_ray.recipe.schema.recipe import Recipe

app = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Search hyperparameters of CAR-FT (context-aware robust fine-tuning of CLIP) with Ray and Optuna, for "
    "accuracy in-distribution and out-of-distribution together.\n\n"
    "Try it:  carft-ray init --preset quickstart --to recipe.yaml",
)
sandbox_app = typer.Typer(no_args_is_help=True, help="The built-in synthetic images.")
data_app = typer.Typer(no_args_is_help=True, help="The cache of images: what trainings share on this machine.")
cluster_app = typer.Typer(no_args_is_help=True, help="The jobs of a Ray cluster: searches that were submitted.")
app.add_typer(cluster_app, name="cluster", rich_help_panel="A search")
app.add_typer(data_app, name="data", rich_help_panel="Images")
app.add_typer(sandbox_app, name="sandbox", rich_help_panel="The sandbox")

ONE_TRAINING, SEARCH, READING, TRUST = "One training", "A search", "Reading a study", "Trusting the numbers"  # panels

# options that set a key of the recipe
KEYS = {"executor": "resources.executor", "num_workers": "resources.num_workers", "wall_time": "budget.wall_time"}

RecipeArgument = Annotated[Path, Argument(help="The recipe, a YAML file.", show_default=False)]
StudyArgument = Annotated[Path, Argument(help="The study directory.", show_default=False)]
TrainedArgument = Annotated[Path, Argument(help="Folder of a training or a study.", show_default=False)]
SetOption = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Set a recipe key; repeatable.")]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON document instead of text.")]
DebugOption = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
ExecutorOption = Annotated[str | None, Option(help="auto, inline, ray-train, or debug (without Ray).")]
WorkersOption = Annotated[int | None, Option(min=1, help="Workers of one training.")]
AddressOption = Annotated[str | None, Option(help="Address of a running Ray cluster; without it, a local Ray.")]
DashboardOption = Annotated[
    str | None,
    Option("--address", metavar="URL", help="Dashboard of the cluster.", show_default="http://127.0.0.1:8265"),
]
NotifyUrlOption = Annotated[str | None, Option(metavar="URL", help="Webhook for a new best, failed trials, the end.")]
TrustOption = Annotated[bool, Option("--trust", help="Run the code that train.function names.")]
AlphaOption = Annotated[float | None, Option(min=0, max=1, help="Mixing coefficient; without it the chosen one.")]
TrialOption = Annotated[str | None, Option(help="Number or name of a trial, or name of a baseline; default: the best.")]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of the commands that train: ``train``, ``confirm``, and with more of them a search."""

    executor: ExecutorOption = None
    num_workers: WorkersOption = None
    address: AddressOption = None
    trust: TrustOption = False
    json_: JsonOption = False


Command = Callable[..., None]


def command(
    example: str, panel: str | None = None, to: typer.Typer = app, shared: type | None = None, reads: bool = False
) -> Callable[[Command], Command]:
    """Returns a decorator that makes a function a command, with ``--debug``, which ``main`` reads.

    Args:
        example: For the help; begins with the name of the command.
        panel: Of the help.
        to: The app that the command belongs to; the example begins with its name, too.
        shared: A class whose keyword-only parameters are options of the command, too, which takes them as
            ``**shared``; those that it has itself are its own.
        reads: It neither trains nor opens a model: it runs whatever versions of torch and Ray are installed.
    """
    of_shared = inspect.signature(shared).parameters.values() if shared else ()

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def run(*, debug: bool, **given: Any) -> None:
            from carft_ray.api import checks

            with contextlib.nullcontext() if reads else checks.command():
                function(**given)

        signature, last = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
        parameters = [one for one in signature.parameters.values() if one.kind != inspect.Parameter.VAR_KEYWORD]
        own = set(signature.parameters)
        parameters += [one for one in of_shared if one.kind == last and one.name not in own]
        debug = inspect.Parameter("debug", last, default=False, annotation=DebugOption)
        run.__signature__ = signature.replace(parameters=[*parameters, debug])  # type: ignore[attr-defined]
        name = example.split()[to is not app]
        to.command(name, epilog=f"Example:  carft-ray {example}", rich_help_panel=panel)(run)
        return function

    return register


def _show_version(asked: bool) -> None:
    if asked:
        found = environment.versions()
        libraries = ", ".join(f"{name} {found[name]}" for name in ("torch", "open_clip_torch", "ray", "optuna"))
        typer.echo(f"carft-ray {__version__} (Python {found['python']}, {libraries})")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, Option("--version", help="Show the version and end.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Holds what may stand before any command; the text of the help is the app's own. Alone it shows the help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


class _Warnings(logging.Handler):
    """Shows the warnings that the library logs as those of the commands."""

    def emit(self, record: logging.LogRecord) -> None:
        console.warn(self.format(record))


def main() -> None:
    """Runs the command line; whatever goes wrong ends with one message and its exit code."""
    logger = logging.getLogger("carft_ray")
    logger.addHandler(handler := _Warnings(logging.WARNING))
    try:
        app()
    except Exception as error:  # the outermost boundary: nothing is swallowed, everything ends the process
        if "--debug" in sys.argv:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            rule = "must be a path that can be: names of at most 255 bytes"
            error = UsageError(Problem(f"{str(error.filename)[:60]}...", rule))
        elif not isinstance(error, CarftError):
            value = f"{type(error).__name__}: {error}".removesuffix(": ")
            step = "Please report it; with --debug the command shows where it happens."
            error = CarftError(Problem("", "internal error", value, next_step=step))
        console.show_error(error)
        sys.exit(error.exit_code)
    finally:
        logger.removeHandler(handler)


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
    path: Path, overrides: list[str] | None, executor: str | None = None, num_workers: int | None = None
) -> "Recipe":
    """Loads and checks a recipe (``checks.load_recipe``) with what a command sets over it."""
    from carft_ray.api.checks import load_recipe

    return load_recipe(path, overrides_of(overrides, {"executor": executor, "num_workers": num_workers}))


def suggest(study: Path, after: str, *more: str) -> None:
    """Prints what to run next on a study as it stands now (``results.next_steps``).

    Args:
        study: Its folder as the user has written it.
        after: Name of the command that ends here.
        more: Further command lines.
    """
    from carft_ray.results.next_steps import BEHIND, behind_zero_shot, next_steps
    from carft_ray.results.reading.overview import read_study

    view = read_study(study)
    if behind_zero_shot(view):
        console.say(BEHIND)
    console.next_step(*next_steps(view, study, after), *more)


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


def begin_line(value: "Recipe", recipe: Path, study: Path | None = None, **options: object) -> str:
    """Returns the command that begins with a recipe: a search, or one training where it has nothing to search.

    Args:
        value: The recipe.
        recipe: Its file.
        study: The study directory; None: one of the recipe's name.
        options: As of ``command_line``.
    """
    from carft_ray.recipe.checks.advice import check_searchable
    from carft_ray.recipe.loading import trust_word

    options["trust"] = bool(trust_word(value))
    if check_searchable(value):
        return command_line("train", recipe, **options, out=Path("runs") / value.name)
    return command_line("search", recipe, **options, study=study or Path("studies") / value.name)
