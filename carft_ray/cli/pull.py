"""Copying a study from a bucket to a folder."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console
from carft_ray.words import counted

MB = 10**6


@command("pull s3://my-bucket/quickstart studies/quickstart", common.READING, reads=True)
def pull(
    address: Annotated[str, Argument(metavar="ADDRESS", help="s3://BUCKET/STUDY.", show_default=False)],
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder of the copy; new or empty.", show_default=False)],
    json_: common.JsonOption = False,
) -> None:
    """Copy a study with its weights from a bucket to a folder. The copy's manifest names its source."""
    from carft_ray.study import place
    from carft_ray.ui.progress import counting

    with (
        common.interrupted_as("stopped pulling; an incomplete copy is not a study", "Run the command again."),
        counting() as begin,
    ):
        tell = begin("pulling, MB")
        answer = place.pull(address, folder, lambda done, total: tell(done // MB, -(-total // MB)))
    if not console.print_json(answer, json_):
        size = console.size_text(answer["num_bytes"])
        console.say(f"Copied {counted(answer['commits'], 'commit')} and {counted(answer['files'], 'file')} ({size}).")
        console.next_step(f"carft-ray status {shlex.quote(str(folder))}")
