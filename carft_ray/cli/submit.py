"""A search on a Ray cluster, begun from outside of it."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from carft_ray import console
from carft_ray.cli import common, search
from carft_ray.errors import InterruptedRunError, Problem, RecipeError, UsageError, require_choice
from carft_ray.untrusted import visible
from carft_ray.words import counted

if TYPE_CHECKING:
    from carft_ray.launch.jobs.jobs import Job
    from carft_ray.launch.jobs.server import Server
    from carft_ray.launch.jobs.upload import Upload
    from carft_ray.recipe.schema import Recipe


@common.command("submit recipe.yaml --study /shared/studies/first", common.SEARCH)
def submit(
    recipe: Annotated[Path | None, Argument(help="The recipe, a YAML file.", show_default=False)] = None,
    study: Annotated[Path | None, Option(help="Study directory, on a disk that all nodes share.")] = None,
    address: common.DashboardOption = None,
    resume: Annotated[Path | None, Option(metavar="STUDY", help="Resume a study by its own recipe.")] = None,
    trials: Annotated[str | None, Option(metavar="N|+N", help="With --resume: as of `resume`.")] = None,
    attach: Annotated[str | None, Option(metavar="JOB|STUDY", help="Follow a job that was submitted before.")] = None,
    package: Annotated[
        str,
        Option(
            help="Where carft-ray comes from: installed (on the cluster), wheel (of the source tree here), pip (the "
            "release on PyPI), or auto: installed if it is the same as here, else wheel."
        ),
    ] = "auto",
    send: Annotated[
        list[Path] | None,
        Option(metavar="PATH", help="Send a list that the recipe names and that lies outside its folder; repeatable."),
    ] = None,
    env: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="Give the job this variable with its value here, as HF_TOKEN; repeatable."),
    ] = None,
    no_wait: Annotated[bool, Option("--no-wait", help="Submit, and do not follow the log.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print all that would be sent, and send nothing.")] = False,
    set_: common.SetOption = None,
    executor: common.ExecutorOption = None,
    num_workers: common.WorkersOption = None,
    wall_time: search.WallTimeOption = None,
    narrow: search.NarrowOption = False,
    widen: search.WidenOption = False,
    warm_start: search.WarmStartOption = None,
    notify_url: common.NotifyUrlOption = None,
    again: search.AgainOption = None,
    trust: common.TrustOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Run a search on a Ray cluster, and follow its log. The same command again follows it, or resumes it.

    The recipe and the lists that it names are sent, never images or weights: those, and the study, are on disks that
    all nodes see under the same paths as here. Ctrl-C leaves the job running.
    """
    if [recipe is not None, resume is not None, attach is not None].count(True) != 1:
        raise UsageError(Problem("submit", "must be given one of: a recipe, --resume, --attach"))
    if attach is not None:
        _follow(_connected(address), attach, json_)
        return
    if (recipe is not None) != (study is not None):
        what = "--study" if study is None else "a recipe"
        raise UsageError(Problem("submit", f"must be given {what} too, or --resume STUDY"))
    if recipe is not None and trials is not None:
        step = "Use --set search.trials=N."
        raise UsageError(Problem("--trials", "must stand with --resume", next_step=step))
    from carft_ray.launch.jobs.package import CHOICES

    require_choice("--package", "must be one of these", package, CHOICES)
    overrides = common.overrides_of(set_, executor=executor, num_workers=num_workers)
    overrides += [] if wall_time is None else [f"budget.wall_time={wall_time}"]
    options: dict[str, Any] = {"warm_start": [str(path.absolute()) for path in warm_start or ()], "trials": trials}
    options |= {"notify_url": notify_url, "again": again}
    flags = [f"--{name}" for name, asked in {"narrow": narrow, "widen": widen, "trust": trust}.items() if asked]
    words = [*common.option_words(**options), *flags]
    from carft_ray.launch.jobs.upload import resume_upload, search_upload

    if resume is not None:
        if send:
            console.warn("--send has no effect with --resume, which sends no list")
        upload = resume_upload(resume, overrides, words)
    elif recipe is not None and study is not None:
        checked = _checked(recipe, overrides, trust)
        upload = search_upload(checked, study, words, recipe.absolute().parent, send or ())
        tracked = checked.tracking.wandb
        if tracked.project is not None and not tracked.offline and "WANDB_API_KEY" not in (env or ()):
            console.say("tracking.wandb needs a login on the cluster. Without one there, add --env WANDB_API_KEY.")
    _send(upload, env or (), address, package, no_wait, dry_run, json_)


def _checked(path: Path, overrides: Sequence[str], trust: bool) -> "Recipe":
    """Loads a recipe, and checks what needs neither images nor weights: they may be on the cluster alone."""
    from carft_ray.recipe.checks.advice import check_searchable, warnings
    from carft_ray.recipe.loading import load_recipe, own_functions

    recipe = load_recipe(path, overrides)
    if own_functions(recipe) and not trust:  # with it, the job imports them: they may be on the cluster alone
        from carft_ray.checks import require_trusted

        require_trusted(recipe, trust)
    if problems := check_searchable(recipe):
        raise RecipeError(problems)
    for text in warnings(recipe):
        console.warn(text)
    return recipe


def _send(
    upload: "Upload",
    env: Sequence[str],
    address: str | None,
    package: Any,
    no_wait: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    """Submits a search, or says what would be submitted."""
    from carft_ray.launch.jobs import jobs

    variables = jobs.environment_of(env)
    if dry_run:
        _show(upload, dict.fromkeys(variables, "(its value here)"), address, package, json_)
        return
    server = _connected(address)
    job, is_new = jobs.running_job(server, upload.study), False
    if job is None:
        absent = [path for path in upload.paths if not path.exists()]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            console.say(f"Not here, so it must be on the cluster: {absent[0]}{more}.")
        with tempfile.TemporaryDirectory(prefix="carft-submit-") as folder:
            environment = _environment(server, upload, variables, package, Path(folder))
            job, is_new = jobs.submit(server, upload.study, upload.entrypoint, environment)
    if is_new:
        console.say(f"Submitted {job.id} to {server.address}.")
    else:
        console.warn(f"{job.id} already runs on {upload.study}: nothing was submitted")
    if no_wait:
        if not console.print_json(_answer(server, job), json_):
            console.next_step(*_commands(server, job))
        return
    _follow(server, job.id, json_)


@contextlib.contextmanager
def _detaching(server: "Server", job: "Job") -> Iterator[None]:
    """Within the block, Ctrl-C ends the command and not the job."""
    try:
        yield
    except KeyboardInterrupt:
        step = f"Attach with: {_commands(server, job)[0]}"
        raise InterruptedRunError(Problem("", f"detached; the job {job.id} goes on", next_step=step)) from None


def _follow(server: "Server", name: str, json_: bool) -> None:
    """Shows the log of a job, and ends as the job does."""
    from carft_ray.launch.jobs import jobs

    job = jobs.find_job(server, name)
    stream = sys.stderr if json_ else sys.stdout

    def write(text: str) -> None:
        stream.write(visible(text.replace("\r", "\n")))  # bars write over their line
        stream.flush()

    if not job.ended:
        console.say("Its log follows; Ctrl-C leaves the job running.")
    with _detaching(server, job):
        job = jobs.follow(server, job.id, write)
    console.print_json(_answer(server, job), json_)
    code = jobs.exit_code(job)
    if code is None:
        resume = common.command_line("submit", resume=job.study, address=server.address) if job.study else ""
        raise jobs.ended_error(job, resume)
    if code:
        console.say(f"The job {job.id} has ended with exit code {code}.")
        raise typer.Exit(code)
    console.say(f"The job {job.id} has ended well.")


def _environment(
    server: "Server", upload: "Upload", variables: Mapping[str, str], package: Any, folder: Path
) -> dict[str, Any]:
    """Returns the runtime environment of a job, and puts what is sent into a folder."""
    from carft_ray.launch.jobs import jobs
    from carft_ray.launch.jobs.package import build, choose, pip_requirement, source_tree

    working_dir, modules = None, []
    if upload.recipe:
        working_dir = folder / "recipe"
        working_dir.mkdir()
        upload.write(working_dir)
    if package == "pip":
        return jobs.runtime_env(working_dir, pip=pip_requirement(), variables=variables)
    tree = source_tree()
    if choose(package, jobs.ask_package(server, upload.study)) == "wheel" and tree is not None:
        console.say(f"Building a wheel of {tree}.")
        wheel_dir = folder / "wheel"
        wheel_dir.mkdir()
        modules = build(tree, wheel_dir)
    return jobs.runtime_env(working_dir, modules, variables=variables)


def _show(upload: "Upload", variables: Mapping[str, str], address: str | None, package: Any, json_: bool) -> None:
    """Prints all that would be sent, of variables their names."""
    from carft_ray.launch.jobs import jobs
    from carft_ray.launch.jobs.package import described, pip_requirement
    from carft_ray.launch.jobs.server import dashboard_address, find_token

    sizes = upload.sizes()
    places = {name: str(path) for name, path in upload.sources.items()}
    environment = jobs.runtime_env(None, pip=pip_requirement() if package == "pip" else "", variables=variables)
    answer: dict[str, Any] = {
        "address": dashboard_address(address),
        "token_from": find_token()[1] or None,
        "job": jobs.job_id(upload.study),
        "study": str(upload.study),
        "entrypoint": upload.entrypoint,
        "runtime_env": environment,
        "package": described(package),
        "files": [{"name": name, "num_bytes": size, "path": places.get(name)} for name, size in sizes.items()],
        "recipe": upload.recipe or None,
        "paths": [{"path": str(path), "is_here": path.exists()} for path in upload.paths],
    }
    if console.print_json(answer, json_):
        return
    facts = {
        "address": answer["address"],
        "token": f"from {answer['token_from']}" if answer["token_from"] else "none found",
        "job": f"{answer['job']}, or that with the next number",
        "study": answer["study"],
        "environment": ", ".join(f"{name}={value}" for name, value in environment["env_vars"].items()),
        "package": answer["package"],
    }
    for title, lines in (
        ("files", [f"{name}, {counted(size, 'byte')}" for name, size in sizes.items()]),
        ("not sent", [f"{path}{'' if path.exists() else ' (not here)'}" for path in upload.paths]),
    ):
        if lines:
            facts[title] = "\n".join(lines)
    console.show(console.fact_table(facts))
    if upload.paths:
        console.say("What is not sent must be on the cluster under these paths, which are absolute as seen from here.")
    console.show(f"\nThe command of the job:\n\n{upload.entrypoint}")
    if upload.recipe:
        console.show(f"\nrecipe.yaml:\n\n{upload.recipe}")
    console.say("Nothing was sent.")


def _connected(address: str | None) -> "Server":
    from carft_ray.launch.jobs.server import connect

    return connect(address)


def _answer(server: "Server", job: "Job") -> dict[str, Any]:
    """Returns what `--json` says of a job."""
    from dataclasses import asdict

    return {"address": server.address, **asdict(job)}


def _commands(server: "Server", job: "Job") -> tuple[str, ...]:
    """Returns the commands that follow and stop a job."""
    follow = common.command_line("submit", attach=job.id, address=server.address)
    return follow, common.command_line("cluster", "stop", job.id, address=server.address)
