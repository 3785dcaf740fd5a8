"""A search on a Ray cluster, begun from outside of it."""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.cli.search import SearchOptions
from carft_ray.errors import Problem, RecipeError, UsageError
from carft_ray.ui import console
from carft_ray.untrusted import visible

if TYPE_CHECKING:
    from carft_ray.launch.cluster.job_upload import Upload
    from carft_ray.launch.cluster.jobs import Server
    from carft_ray.recipe.schema.recipe import Recipe


BUCKET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL")


@command("submit recipe.yaml --study /shared/studies/first", common.SEARCH, shared=SearchOptions)
def submit(
    recipe: Annotated[Path | None, Argument(help="Recipe (YAML).", show_default=False)] = None,
    study: Annotated[str | None, Option(help="Folder on the head, or s3://BUCKET/STUDY.")] = None,
    address: common.DashboardOption = None,
    resume: Annotated[str | None, Option(metavar="STUDY", help="Resume a study with its own recipe.")] = None,
    trials: Annotated[str | None, Option(metavar="N|+N", help="With --resume: as in `resume`.")] = None,
    attach: Annotated[str | None, Option(metavar="JOB|STUDY", help="Follow a submitted job.")] = None,
    installed: Annotated[bool, Option("--installed", help="Run the cluster's carft-ray instead of this one.")] = False,
    send: Annotated[
        list[Path] | None, Option(metavar="PATH", help="Send a list from outside the recipe's folder; repeatable.")
    ] = None,
    env: Annotated[
        list[str] | None, Option(metavar="NAME", help="Pass this variable to the job, such as HF_TOKEN; repeatable.")
    ] = None,
    no_wait: Annotated[bool, Option("--no-wait", help="Do not follow the log.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print what would be sent; send nothing.")] = False,
    method: common.MethodOption = None,
    set_: common.SetOption = None,
    json_: common.JsonOption = False,
    **shared: Any,
) -> None:
    """Run a search on a Ray cluster and follow its log. The same command follows or resumes it.

    Sends the recipe, the lists that it names and carft-ray's code. All nodes must
    see images and weights under the same paths as here. Ctrl-C leaves the job running.
    """
    if [recipe, resume, attach].count(None) != 2:
        raise UsageError(Problem("submit", "needs exactly one of: a recipe, --resume, --attach"))
    from carft_ray.launch.cluster import job_upload, jobs
    from carft_ray.study.place import absolute, in_bucket

    if attach is not None:
        flags = {"installed": installed, "no_wait": no_wait, "dry_run": dry_run}
        values = {"study": study, "trials": trials, "send": send, "env": env, "method": method, "set": set_}
        if given := common.option_words(**values, **flags, **shared):
            rule = "can only be used with a recipe or --resume: --attach follows a job that was submitted before"
            raise UsageError(Problem(given[0], rule))
        _follow(jobs.connect(address), attach, json_)
        return
    if (recipe is None) != (study is None):
        what = "--study" if study is None else "a recipe"
        raise UsageError(Problem("submit", f"needs {what} as well, or --resume STUDY instead"))
    if recipe is not None and trials is not None:
        raise UsageError(Problem("--trials", "can only be used with --resume", next_step="Use --set search.trials=N."))
    if recipe is None and method is not None:
        raise UsageError(Problem("--method", "can only be used with a recipe"))
    shared["method"] = method
    overrides = common.overrides_of(set_, shared)
    shared["warm_start"] = [absolute(place) for place in shared["warm_start"] or ()]
    words = common.option_words(trials=trials, **shared)
    if resume is not None:
        if send:
            console.warn("--send has no effect with --resume, which sends no list")
        sent = job_upload.resume_upload(resume, [*common.option_words(set=overrides), *words])
    elif recipe is not None and study is not None:
        home = recipe.absolute().parent
        checked = _checked(
            recipe, overrides, shared, lambda path: job_upload.require_sendable([path], home, send or ())
        )
        sent = job_upload.search_upload(checked, study, words, home, send or ())
        tracked = checked.tracking.wandb
        if tracked.project is not None and not tracked.offline and "WANDB_API_KEY" not in (env or ()):
            console.say(
                "tracking.wandb needs a login on the cluster. If the cluster has none, add --env WANDB_API_KEY."
            )
    variables = jobs.environment_of(env or ())
    absent = [name for name in BUCKET_KEYS if name in os.environ and name not in variables]
    if absent and in_bucket(sent.study):
        say = "The job takes the keys of the bucket from its cluster. If the cluster has none, add"
        console.say(f"{say} {shlex.join(common.option_words(env=absent))}.")
    if dry_run:
        _show(sent, sorted(variables), address, installed, json_)
        return
    cluster = jobs.connect(address)
    name = _send(cluster, sent, variables, installed)
    if not no_wait:
        _follow(cluster, name, json_)
    elif not console.print_json({"address": cluster.address, **jobs.described(jobs.find_job(cluster, name))}, json_):
        of_ray = [("logs", name), ("stop", name), ("list",)]
        console.next_step(_attach(cluster, name), *(jobs.ray_job(cluster, *words) for words in of_ray))


def _checked(
    path: Path, overrides: Sequence[str], options: dict[str, Any], reads: Callable[[Path], object]
) -> "Recipe":
    """Loads a recipe, and checks what needs neither images nor weights: they may be on the cluster alone."""
    from carft_ray.api.checks import read_recipe
    from carft_ray.recipe.rules import check_searchable, warnings
    from carft_ray.training.own_function import require_trusted

    recipe = read_recipe(path, overrides, options["trust_paths"], reads)
    if not options["trust"]:  # with it, the job imports what the recipe names: it may be on the cluster alone
        require_trusted(recipe, False)
    if problems := check_searchable(recipe):
        raise RecipeError(problems)
    for text in warnings(recipe):
        console.warn(text)
    return recipe


def _send(server: "Server", upload: "Upload", variables: dict[str, str], installed: bool) -> str:
    """Submits a search, unless its study has a job that runs; returns the id of the job."""
    from carft_ray.launch.cluster import job_package, jobs
    from carft_ray.study.place import in_bucket

    if (job := jobs.running_job(server, upload.study)) is not None:
        console.warn(f"{job.submission_id} already runs on {upload.study}: nothing was submitted")
        return str(job.submission_id)
    absent = [path for path in upload.paths if not path.exists()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        console.say(f"Not on this machine, so it must be on the cluster: {absent[0]}{more}.")
    with tempfile.TemporaryDirectory(prefix="carft-submit-") as folder:
        upload.write(Path(folder))
        modules = [] if installed else job_package.folders()
        environment = jobs.runtime_env(Path(folder) if upload.files else None, modules, variables)
        name = jobs.submit(server, upload.study, upload.entrypoint(installed), environment, console.say)
    place = "" if in_bucket(upload.study) else ", in a folder of the head"
    console.say(f"Submitted {name} to {server.address}. Its study{place}: {upload.study}")
    return name


def _follow(server: "Server", name: str, json_: bool) -> None:
    """Shows the log of a job, and ends as the job does."""
    from carft_ray.launch.cluster import jobs

    job = jobs.find_job(server, name)
    name = str(job.submission_id)
    stream = sys.stderr if json_ else sys.stdout

    def write(text: str) -> None:
        stream.write(visible(text.replace("\r", "\n")))  # bars write over their line
        stream.flush()

    if not job.status.is_terminal():
        console.say(
            f"Its log follows; Ctrl-C leaves the job running. Stop it with: {jobs.ray_job(server, 'stop', name)}"
        )
    with common.interrupted_as(f"detached; the job {name} continues", f"Attach with: {_attach(server, name)}"):
        job = jobs.follow(server, name, write)
    answer = jobs.described(job)
    console.print_json({"address": server.address, **answer}, json_)
    study, code = answer["study"], answer["exit_code"]
    if code is None:
        resume = common.command_line("submit", resume=study, address=server.address) if study else ""
        raise jobs.ended_error(job, resume)
    console.say(f"The job {name} has ended with exit code {code}.")
    if code:
        raise typer.Exit(code)


def _show(upload: "Upload", variables: Sequence[str], address: str | None, installed: bool, json_: bool) -> None:
    """Prints all that would be sent, of variables their names."""
    from carft_ray.launch.cluster import job_package, jobs
    from carft_ray.recipe.written import dump_yaml

    modules = [] if installed else job_package.folders()
    answer: dict[str, Any] = {
        "address": jobs.dashboard_address(address),
        "token_from": jobs.find_token()[1] or None,
        "job": jobs.job_id(upload.study),
        "study": upload.study,
        "entrypoint": upload.entrypoint(installed),
        "runtime_env": jobs.runtime_env(None, modules, dict.fromkeys(variables, "(its value here)")),
        "files": {name: len(text.encode()) for name, text in upload.files.items()},
        "recipe": upload.files.get("recipe.yaml"),
        "not_sent": [{"path": str(path), "is_here": path.exists()} for path in upload.paths],
    }
    if console.print_json(answer, json_):
        return
    recipe = answer.pop("recipe")
    console.show(dump_yaml(answer))
    if recipe:
        console.show(f"recipe.yaml:\n\n{recipe}")
    if upload.paths:
        console.say("Files that are not sent must be on the cluster under these absolute paths.")
    console.say("Nothing was sent.")


def _attach(server: "Server", name: str) -> str:
    """Returns the command that follows a job."""
    return common.command_line("submit", attach=name, address=server.address)
