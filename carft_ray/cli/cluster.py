"""The jobs of a Ray cluster: list them, print their logs, stop them."""

from datetime import datetime
from typing import Annotated, Any

from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.cli.program import cluster_app, command
from carft_ray.errors import StorageError, UsageError
from carft_ray.ui import console
from carft_ray.words import counted

JobArgument = Annotated[
    str, Argument(metavar="JOB|STUDY", help="Id of a job, or the study that it runs.", show_default=False)
]


@command("cluster jobs", to=cluster_app, reads=True)
def cluster_jobs(address: common.DashboardOption = None, json_: common.JsonOption = False) -> None:
    """List the jobs of a cluster and their studies, newest first."""
    from carft_ray.launch.jobs.jobs import described, jobs
    from carft_ray.launch.jobs.server import connect

    server = connect(address)
    found = [described(job) for job in jobs(server)]
    if console.print_json({"address": server.address, "jobs": found}, json_):
        return
    lines = []
    for job in found:
        code = "" if job["exit_code"] is None else str(job["exit_code"])
        begun = "" if job["begun"] is None else datetime.fromtimestamp(job["begun"]).strftime("%Y-%m-%d %H:%M")
        took = console.duration(job["ended_at"] - job["begun"]) if job["begun"] and job["ended_at"] else ""
        lines.append([job["id"], job["status"].lower(), code, begun, took, job["study"]])
    if not lines:
        console.say(f"No job was submitted to {server.address}.")
        return
    columns = console.numbers("exit code", "begun", "took", no_wrap=True)
    console.show(console.table(["job", "status", *columns, "study"], lines))


@command("cluster logs studies/first", to=cluster_app, reads=True)
def cluster_logs(job: JobArgument, address: common.DashboardOption = None, json_: common.JsonOption = False) -> None:
    """Print the log of a job so far. To follow it, use `submit --attach`."""
    from carft_ray.launch.jobs.jobs import described, find_job, log_of
    from carft_ray.launch.jobs.server import connect

    server = connect(address)
    found = described(find_job(server, job))
    log = log_of(server, found["id"])
    if not console.print_json({"address": server.address, **found, "log": log}, json_):
        console.show(log.rstrip("\n").replace("\r", "\n"))


@command("cluster stop studies/first", to=cluster_app, reads=True)
def cluster_stop(
    job: JobArgument,
    address: common.DashboardOption = None,
    no_wait: Annotated[bool, Option("--no-wait", help="Do not wait until the trainings have stopped.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Stop a job. Its trainings write checkpoints first, so that `submit` can resume the study."""
    from carft_ray.launch.jobs import jobs
    from carft_ray.launch.jobs.server import connect

    server = connect(address)
    found = jobs.find_job(server, job)
    name, asked = str(found.submission_id), not found.status.is_terminal()
    if asked:
        if not no_wait and not json_:
            console.say(f"Asking {name} to stop and waiting for its checkpoints. Ctrl-C ends only the waiting.")
        see = common.command_line("cluster", "jobs", address=server.address)
        with common.interrupted_as("no longer waiting; the job still stops", f"See: {see}"):
            found = jobs.stop(server, name, console.sayer(not json_), see, wait=not no_wait)
    answer, ended = jobs.described(found), found.status.is_terminal()
    left = _left(answer["study"])
    if console.print_json({"address": server.address, **answer, "asked": asked, **left}, json_):
        return
    so_far = f"; {left['finished']} of {counted(left['wanted'], 'trial')} finished" if left else ""
    if not asked:
        console.say(f"Nothing to stop: {name} has ended ({answer['status'].lower()}){so_far}.")
    else:
        console.say(f"{name} has ended{so_far}." if ended else f"Asked {name} to stop{so_far}.")
    if answer["study"] and not (left and left["finished"] >= left["wanted"]):
        console.next_step(common.command_line("submit", resume=answer["study"], address=server.address))


def _left(study: str) -> dict[str, Any]:
    """Returns how far a study is; nothing where it is not seen from here."""
    from carft_ray.recipe.space.grid import num_trials
    from carft_ray.results.reading import study_view
    from carft_ray.study.mirror import NUMBERS

    if not study:
        return {}
    try:
        view = study_view.read_study(study, NUMBERS)
    except (UsageError, StorageError):
        return {}
    return {"finished": view.num_finished, "wanted": num_trials(view.recipe)}
