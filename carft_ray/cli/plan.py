"""What a search will take."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.doctor import step_words
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
    from carft_ray.launch.forecast import beyond_budget, forecast, measure_by_training, price
    from carft_ray.recipe.checks.advice import check_searchable
    from carft_ray.recipe.loading import own_functions
    from carft_ray.study.mirror import fetched, in_bucket

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
    measured = measure_by_training(value, address, next_to, console.sayer(not json_))
    found = forecast(value, *measured)
    if price_per_gpu_hour is not None and not found["gpus_per_worker"]:
        step = "Give --price-per-hour, of the whole machine."
        raise UsageError(Problem("--price-per-gpu-hour", "needs trainings that use a GPU", next_step=step))
    found["price"] = price(found, price_per_gpu_hour, price_per_hour)
    found["budget"] = beyond_budget(value, found)
    if console.print_json(found, json_):
        return
    baselines = f" and {counted(found['num_baselines'], 'baseline')}" if found["num_baselines"] else ""
    what = f"{value.name}: {counted(found['num_trials'], 'trial')}{baselines}"
    console.show(f"{what}, {found['concurrency']} at a time ({found['limited_by']})")
    console.show(console.table(["", *console.numbers("expected", no_wrap=True), "range"], _lines(found)))
    console.say(f"Estimated from short trainings, which took {found['measured']['took_s']:.0f} s in all.")
    if found["step"]:
        console.say(step_words(found["step"]))
    if found["budget"]:
        console.say(found["budget"])
    if value.search.pruner.name != "none":
        console.say("The pruner will shorten the search; this estimate does not count on it.")
    given = {"set": set_, "executor": executor, "num_workers": num_workers, "address": address}
    console.next_step(common.begin_line(value, recipe, study, **given))


def _lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the rows of the table of a forecast: what, expected, range."""

    def line(what: str, text: Callable[[float], str], three: Sequence[float]) -> tuple[str, str, str]:
        return what, text(three[0]), f"{text(three[1])} to {text(three[2])}"

    lines = [("preparation", console.duration(found["prepare_s"]), "")]
    lines += [line("one trial", console.duration, found["trial_s"])]
    lines += [line("whole search", console.duration, found["search_s"])]
    lines += [line("confirm", console.duration, found["confirm_s"])]
    unit = "GPU" if found["gpus_per_worker"] else "CPU"
    lines += [line(f"{unit} hours", "{:.3g}".format, found[f"{unit.lower()}_hours"])]
    if found["price"] is not None:
        lines += [line("price", "{:.2f}".format, found["price"])]
    sizes = {what: console.size_text(size) for what, size in found["disk_bytes"].items()}
    extra = sizes.pop("while it runs", None)
    total = sum(size for what, size in found["disk_bytes"].items() if what in sizes)
    lines += [("disk", console.size_text(total), ", ".join(f"{what} {size}" for what, size in sizes.items()))]
    if extra is not None:
        lines += [("disk while it runs", f"+ {extra}", "checkpoints")]
    return lines
