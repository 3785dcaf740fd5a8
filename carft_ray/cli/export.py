"""Exporting a mixed model."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console


@command("export studies/quickstart --to exports/quickstart --format open_clip,onnx", common.ONE_TRAINING)
def export(
    folder: common.TrainedArgument,
    to: Annotated[Path, Option(help="Folder of the export; must be new or empty.")],
    format_: Annotated[
        list[str] | None,
        Option("--format", metavar="NAME", help="open_clip (default), huggingface, onnx; several: open_clip,onnx."),
    ] = None,
    alpha: common.AlphaOption = None,
    trial: common.TrialOption = None,
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Write the mixed model for open_clip, transformers or onnxruntime. The library then loads it, as a check."""
    from carft_ray.api import actions

    exported = actions.export(folder, to, formats=format_ or (), alpha=alpha, trial=trial, trust_paths=trust_paths)
    if console.print_json({**vars(exported), "folder": str(exported.folder)}, json_):
        return
    console.say(f"Exported to {to} at alpha {exported.alpha:g}. Each was opened again by its own library:")
    for name, difference in exported.formats.items():
        console.say(f"  {name}: the logits of {exported.num_checked} images differ by at most {difference:.1e}.")
    console.next_step(f"cat {shlex.quote(str(to / 'README.md'))}")
