"""The program: its command groups, how a function becomes a command, and how an error ends: a message, an exit code."""

import contextlib
import errno
import functools
import gc
import inspect
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from carft_ray import __version__, environment, files
from carft_ray.cli.common import DebugOption
from carft_ray.errors import CarftError, Problem, UsageError
from carft_ray.ui import console

app = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Search hyperparameters of CAR-FT (context-aware robust fine-tuning of CLIP) with Ray and Optuna, for "
    "high accuracy both in-distribution and out-of-distribution.\n\n"
    "Try it:  carft-ray init --preset quickstart --to recipe.yaml",
)
sandbox_app = typer.Typer(no_args_is_help=True, help="The built-in synthetic images.")
data_app = typer.Typer(no_args_is_help=True, help="The cache of images that trainings on this machine share.")
app.add_typer(data_app, name="data", rich_help_panel="Images")
app.add_typer(sandbox_app, name="sandbox", rich_help_panel="The sandbox")

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

            with (
                contextlib.nullcontext() if reads else checks.command(),
                console.only_json(bool(given.get("json_"))),
            ):
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
        bool, Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
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
    environment.is_program = True
    gc.set_threshold(100_000, 20, 100)  # a study of 10,000 trials is read in 1.6 in place of 2.0 s
    logger = logging.getLogger("carft_ray")
    logger.addHandler(handler := _Warnings(logging.WARNING))
    try:
        app()
    except Exception as error:  # the outermost boundary: nothing is swallowed, everything ends the process
        if "--debug" in sys.argv:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            rule = "is too long: each name in a path has at most 255 bytes"
            error = UsageError(Problem(f"{str(error.filename)[:60]}...", rule))
        elif isinstance(error, PermissionError) and error.filename:
            error = files.storage_error(Path(str(error.filename)), error, "must be accessible to this user")
        elif not isinstance(error, CarftError):
            value = f"{type(error).__name__}: {error}".removesuffix(": ")
            step = "Please report it. With --debug, the command shows where it happens."
            error = CarftError(Problem("", "internal error", value, next_step=step))
        console.show_error(error)
        sys.exit(error.exit_code)
    finally:
        logger.removeHandler(handler)
