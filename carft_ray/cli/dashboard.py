"""A study in the browser, by optuna-dashboard."""

import shlex
from typing import Annotated

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, UsageError
from carft_ray.ui import console


@command("dashboard studies/quickstart --port 8080", common.READING, reads=True)
def dashboard(
    study: common.StudyArgument,
    port: Annotated[int, Option(min=0, max=65535, help="Port on this machine; 0: a free one.")] = 8080,
) -> None:
    """Show a study in the browser with optuna-dashboard. It follows a running search and writes nothing.

    Only this machine can see it. Ctrl-C ends it.
    """
    from carft_ray.api.checks import require_versions
    from carft_ray.results.reading import study_view
    from carft_ray.store.copy import STATE
    from carft_ray.study.dashboard import serve

    require_versions("dashboard")
    study_view.require_study(study, need=STATE)
    ready: list[int] = []  # the port, once pages are served

    def on_ready(number: int) -> None:
        ready.append(number)
        console.show(f"http://127.0.0.1:{number}/")
        console.say("optuna-dashboard, read-only: it refuses changes. Ctrl-C ends it.")

    try:
        serve(study, port, on_ready)
    except KeyboardInterrupt:
        console.next_step(f"carft-ray status {shlex.quote(study)}")
    except OSError as error:
        if ready:
            raise
        step = "Give another one, or --port 0 for a free one."
        raise UsageError(Problem("--port", "must be free on this machine", str(port), next_step=step)) from error
