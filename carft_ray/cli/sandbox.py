"""The built-in images as files."""

from pathlib import Path
from typing import Annotated

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command, sandbox_app
from carft_ray.ui import console


@command("sandbox images --to sandbox_png", to=sandbox_app)
def sandbox_images(
    to: Annotated[Path, Option(help="Folder of the images; must be new or empty.")],
    json_: common.JsonOption = False,
) -> None:
    """Write the sandbox, the built-in synthetic images, as PNG files: domain/class/number.png."""
    from carft_ray.data.sandbox import export_images
    from carft_ray.ui.progress import counting

    with counting() as begin:
        export_images(to, begin("images"))
    if console.print_json({"folder": str(to)}, json_):
        return
    console.say(f"Wrote {to}: domain/class/number.png.")
    console.next_step(common.command_line("init", from_=to, train="photo_train", model="sandbox", to="recipe.yaml"))
