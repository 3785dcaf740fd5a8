"""What a search will take, before it begins."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from carft_ray.cli.common import (
    AddressOption,
    DebugOption,
    ExecutorOption,
    JsonOption,
    RecipeArgument,
    SetOption,
    WorkersOption,
    app,
    begin_line,
    load,
    quoted,
)
from carft_ray.errors import Problem, RecipeError, UsageError
from carft_ray.words import counted

PANEL = "A search"  # of the help


@app.command(epilog="Example:  carft-ray plan search_spaces/quickstart.yaml", rich_help_panel=PANEL)
def plan(
    recipe: RecipeArgument,
    study: Annotated[
        Path | None,
        typer.Option("--study", help="Study directory; the times of its trainings count, where it has some."),
    ] = None,
    set_: SetOption = None,
    executor: ExecutorOption = None,
    num_workers: WorkersOption = None,
    address: AddressOption = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option("--price-per-gpu-hour", min=0, help="Of one GPU; adds what the search costs.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", min=0, help="Of the whole machine or cluster, instead.")
    ] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what a search will take: trials at a time, time, GPU hours, disk, money. A minute in the sandbox.

    Trains a little, as many trainings at a time as the search will. Nothing is left behind but decoded images.
    """
    from carft_ray import console
    from carft_ray.launch.forecast import beyond_budget, forecast, measure_by_study, price
    from carft_ray.launch.probe import measure_by_probe
    from carft_ray.recipe.advice import check_searchable
    from carft_ray.results.reading.overview import is_study

    if price_per_gpu_hour is not None and price_per_hour is not None:
        raise UsageError(Problem("--price-per-hour", "must stand without --price-per-gpu-hour: give one price"))
    value = load(recipe, set_, executor, num_workers)
    if problems := check_searchable(value):
        raise RecipeError(problems)
    say = (lambda text: None) if json_ else console.say
    measured = measure_by_study(value, study, address) if study is not None and is_study(study) else None
    if measured is None:
        beside = study.absolute().parent if study is not None else None
        measured = measure_by_probe(value, address, beside, say)
    found = forecast(value, *measured)
    if price_per_gpu_hour is not None and not found["gpus_per_worker"]:
        step = "Give --price-per-hour, of the whole machine."
        raise UsageError(Problem("--price-per-gpu-hour", "needs trainings that use a GPU", next_step=step))
    found["price"] = price(found, price_per_gpu_hour, price_per_hour)
    found["budget"] = beyond_budget(value, found)
    if json_:
        console.print_json(found)
        return
    console.out.print(_heading(value.name, found), markup=False)
    console.out.print(console.table(["", *console.numbers("expected", no_wrap=True), "range"], _lines(found)))
    for line in filter(None, (_source(found), found["budget"], _pruned(value))):
        console.say(line)
    command = begin_line(value, quoted(recipe, set_, executor, num_workers), study)
    console.next_step(command + (f" --address {shlex.quote(address)}" if address is not None else ""))


def _heading(name: str, found: dict[str, Any]) -> str:
    beside = f" and {counted(found['num_baselines'], 'baseline')}" if found["num_baselines"] else ""
    what = f"{counted(found['num_trials'], 'trial')}{beside}"
    return f"{name}: {what}, {found['concurrency']} at a time ({found['limited_by']})"


def _lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    from carft_ray.console import duration, size_text

    def hours(three: Sequence[float]) -> tuple[str, str]:
        return f"{three[0]:.3g}", f"{three[1]:.3g} to {three[2]:.3g}"

    def times(three: Sequence[float]) -> tuple[str, str]:
        return duration(three[0]), f"{duration(three[1])} to {duration(three[2])}"

    lines = [("preparation", duration(found["prepare_s"]), "")]
    lines += [("one trial", *times(found["trial_s"])), ("whole search", *times(found["search_s"]))]
    on_gpu = "gpu_hours" if found["gpus_per_worker"] else "cpu_hours"
    lines.append((on_gpu.replace("_", " ").upper().replace("HOURS", "hours"), *hours(found[on_gpu])))
    if found["price"] is not None:
        lines.append(("price", f"{found['price'][0]:.2f}", f"{found['price'][1]:.2f} to {found['price'][2]:.2f}"))
    kept = {what: size for what, size in found["disk_bytes"].items() if what != "while it runs"}
    lines.append(
        ("disk", size_text(sum(kept.values())), ", ".join(f"{what} {size_text(n)}" for what, n in kept.items()))
    )
    if "while it runs" in found["disk_bytes"]:
        lines.append(("disk while it runs", f"+ {size_text(found['disk_bytes']['while it runs'])}", "checkpoints"))
    return lines


def _source(found: dict[str, Any]) -> str:
    if found["measured"]["by"] == "study":
        return "From the trainings that the study has finished, as they ran there."
    return f"From real trainings on a share of the sets, {found['measured']['took_s']:.0f} s in all."


def _pruned(recipe: Any) -> str:
    return (
        "" if recipe.search.pruner.name == "none" else "The pruner will make it shorter; nothing is taken off for it."
    )
