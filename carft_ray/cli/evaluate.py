"""Measuring a trained model again."""

from typing import Annotated

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console


@command("evaluate runs/first --alpha 0.5", common.ONE_TRAINING)
def evaluate(
    folder: common.TrainedArgument,
    alpha: common.AlphaOption = None,
    trial: common.TrialOption = None,
    head: Annotated[str, Option(help="Class head: fine_tuned, or zero_shot (from the prompts).")] = "fine_tuned",
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Measure a trained model on id_val and ood_val again, at any alpha."""
    from carft_ray.api import actions
    from carft_ray.results.adviser import export_folder

    found = actions.evaluate(folder, alpha=alpha, trial=trial, head=head, trust_paths=trust_paths)
    if console.print_json(found.numbers, json_):
        return
    console.show(found.tables[0])
    console.show()
    console.show(found.tables[1])
    line = common.command_line("export", folder, trial=trial, trust_paths=trust_paths)
    console.next_step(f"{line} --to {export_folder(found.recipe_name)} --alpha {found.numbers['alpha']!r}")
