"""Copying a study between a bucket and a folder."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console
from carft_ray.words import counted

MB = 10**6
AddressArgument = Annotated[str, Argument(metavar="ADDRESS", help="s3://BUCKET/STUDY.", show_default=False)]


@command("pull s3://my-bucket/quickstart studies/quickstart", common.READING, reads=True)
def pull(
    address: AddressArgument,
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder of the copy; new or empty.", show_default=False)],
    json_: common.JsonOption = False,
) -> None:
    """Copy a study with its weights from a bucket to a folder. The copy's manifest names its source."""
    from carft_ray.study import mirror

    _copied(lambda tell: mirror.pull(address, folder, tell), "pulling", str(folder), json_)


@command("push studies/quickstart s3://my-bucket/quickstart", common.READING, reads=True)
def push(
    study: Annotated[Path, Argument(help="The study directory.", show_default=False)],
    address: AddressArgument,
    json_: common.JsonOption = False,
) -> None:
    """Copy a study to an empty address in a bucket. The copy's manifest names its source."""
    from carft_ray.results.reading.study_view import require_study
    from carft_ray.study import mirror

    _copied(lambda tell: mirror.push(require_study(study), address, tell), "pushing", address, json_)


def _copied(copy: Callable[[Any], dict[str, Any]], what: str, to: str, json_: bool) -> None:
    from carft_ray.ui.progress import counting

    with (
        common.interrupted_as(f"stopped {what}; an incomplete copy is not a study", "Run the command again."),
        counting() as begin,
    ):
        tell = begin(f"{what}, MB")
        answer = copy(lambda done, total: tell(done // MB, -(-total // MB)))
    if not console.print_json(answer, json_):
        size = console.size_text(answer["num_bytes"])
        console.say(f"Copied {counted(answer['commits'], 'commit')} and {counted(answer['files'], 'file')} ({size}).")
        console.next_step(f"carft-ray status {shlex.quote(to)}")
