"""What a search will take."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, RecipeError, UsageError
from carft_ray.ui import console
from carft_ray.words import counted


@command("plan recipe.yaml", common.SEARCH)
def plan(
    recipe: common.RecipeArgument,
    study: Annotated[
        str | None, Option(help="Directory of the future study; the short trainings run next to it.")
    ] = None,
    set_: common.SetOption = None,
    executor: common.ExecutorOption = None,
    num_workers: common.WorkersOption = None,
    address: common.AddressOption = None,
    price_per_gpu_hour: Annotated[
        float | None, Option(min=0, help="Price of one GPU, for the cost of the search.")
    ] = None,
    price_per_hour: Annotated[float | None, Option(min=0, help="Price of the whole machine or cluster.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """Estimate a search from short trainings: trials at the same time, duration, GPU hours, disk space, cost.

    Runs as many short trainings at a time as the search will; this takes a
    minute in the sandbox. Keeps only the decoded images, in the cache.
    """
    from carft_ray.launch.forecast import beyond_budget, forecast, measure
    from carft_ray.recipe.loading import own_functions
    from carft_ray.recipe.rules import check_searchable
    from carft_ray.study.place import fetched, in_bucket

    if price_per_gpu_hour is not None and price_per_hour is not None:
        raise UsageError(Problem("--price-per-hour", "cannot be used with --price-per-gpu-hour: give one price"))
    value = common.load(recipe, set_, executor, num_workers)
    if problems := check_searchable(value):
        raise RecipeError(problems)
    if own := own_functions(value):
        step = "Start the search; its live view shows the remaining time."
        problem = Problem(next(iter(own)), "must be null: plan measures only the built-in loop", next_step=step)
        raise UsageError(problem)
    next_to = Path(tempfile.gettempdir())
    if study is not None and not in_bucket(study):
        next_to = fetched(study).absolute().parent
    found = forecast(value, *measure(value, address, next_to, console.sayer(not json_)))
    if price_per_gpu_hour is not None and not found["gpu_hours"]:
        step = "Give --price-per-hour, of the whole machine."
        raise UsageError(Problem("--price-per-gpu-hour", "needs trainings that use a GPU", next_step=step))
    hours, price = found["gpu_hours"], price_per_gpu_hour
    if price_per_gpu_hour is None:
        hours, price = found["search_s"] / 3600, price_per_hour
    found["price"] = None if price is None else round(hours * price, 4)
    found["budget"] = beyond_budget(value, found)
    if console.print_json(found, json_):
        return
    baselines = f" and {counted(found['num_baselines'], 'baseline')}" if found["num_baselines"] else ""
    what = f"{value.name}: {counted(found['num_trials'], 'trial')}{baselines}"
    console.show(f"{what}, {found['concurrency']} at a time ({found['limited_by']})")
    console.show(console.table(["", *console.numbers("expected", no_wrap=True), ""], _lines(found)))
    console.say(f"Estimated from short trainings. Left out: {', '.join(found['left_out'])}.")
    if found["budget"]:
        console.say(found["budget"])
    given = {"set": set_, "executor": executor, "num_workers": num_workers, "address": address}
    console.next_step(common.begin_line(value, recipe, study, **given))


def _lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the rows of the table of a forecast: what, expected, which parts."""
    names = {"trial_s": "one trial", "search_s": "whole search", "confirm_s": "confirm"}
    lines = [(name, console.duration(found[key]), "") for key, name in names.items()]
    unit = "GPU" if found["gpu_hours"] else "CPU"
    lines += [(f"{unit} hours", f"{found[f'{unit.lower()}_hours']:.3g}", "")]
    if found["price"] is not None:
        lines += [("price", f"{found['price']:.2f}", "")]
    sizes = dict(found["disk_bytes"])
    extra = sizes.pop("while it runs")
    parts = ", ".join(f"{what} {console.size_text(size)}" for what, size in sizes.items())
    lines += [("disk", console.size_text(sum(sizes.values())), parts)]
    return [*lines, ("disk while it runs", f"+ {console.size_text(extra)}", "checkpoints")]
