"""The built-in images and tiny CLIP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from typer import Option

from carft_ray import console
from carft_ray.cli import common


@common.command("sandbox build --to /tmp/tiny-clip", to=common.sandbox_app)
def sandbox_build(
    to: Annotated[Path, Option(help="Folder of the model; must be new or empty.")],
    steps: Annotated[int | None, Option(min=10, help="Pre-training steps; fewer make a weaker model.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """Pre-train the tiny CLIP again from nothing (about ten minutes on an idle core)."""
    from carft_ray.learning.models.pretrain import NUM_STEPS, pretrain

    num_steps = steps or NUM_STEPS

    def progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
        what = "step" if metrics else "picture"
        if not json_ and (done == total or done % (50 if metrics else 5000) == 0):
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            console.say(f"{what} {done}/{total}  {numbers}")

    pretrain(to, num_steps, progress=progress)
    if not console.print_json({"folder": str(to), "steps": num_steps}, json_):
        model = f"model.name=local-dir:{to.absolute()}"
        recipe = "carft-ray init --preset quickstart --to recipe.yaml"
        console.next_step(recipe, f"carft-ray train recipe.yaml --set {model} --out runs/own")


@common.command("sandbox images --to sandbox_png", to=common.sandbox_app)
def sandbox_images(
    to: Annotated[Path, Option(help="Folder of the images; must be new or empty.")],
    json_: common.JsonOption = False,
) -> None:
    """Write the sandbox as PNG files, domain/class/number.png, for people and for other tools."""
    from carft_ray.data.synthetic.sandbox import export_images
    from carft_ray.progress import counting

    with counting() as begin:
        export_images(to, begin("images"))
    if console.print_json({"folder": str(to)}, json_):
        return
    console.say(f"Wrote {to}: domain/class/number.png.")
    console.next_step(common.command_line("init", from_=to, train="photo_train", model="sandbox", to="recipe.yaml"))
