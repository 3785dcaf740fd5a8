"""What can be wrong with a recipe, its images, its model and the nodes of a cluster, before a GPU is taken."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import ClusterError, DataError, Problem, UsageError
from carft_ray.ui import console
from carft_ray.words import counted


@command("doctor recipe.yaml", common.ONE_TRAINING)
def doctor(
    recipe: common.RecipeArgument,
    method: common.MethodOption = None,
    set_: common.SetOption = None,
    images: Annotated[int | None, Option(min=1, help="Images per set for zero-shot accuracy; default: 200.")] = None,
    quick: Annotated[bool, Option("--quick", help="Check only lists, model and prompts.")] = False,
    pairs: Annotated[
        Path | None, Option(metavar="FILE", help="Write the image pairs that two roles share: .csv or .html.")
    ] = None,
    memory_gb: Annotated[
        float | None, Option(min=1, help="GPU memory, to suggest a micro-batch; default: this machine's.")
    ] = None,
    address: Annotated[str | None, Option(help="Check each node of this Ray cluster: HOST:PORT or auto.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """Check data, prompts, model and machine before training. No model sees a test set.

    Reads every image once, but none with --quick. Exit code 4: a search would fail
    or its results would be invalid. Exit code 5, with --address: trials would fail
    on the named nodes.
    """
    if address is not None and address.startswith(("http://", "https://")):
        rule = "must be HOST:PORT or auto: nodes can be checked only from a machine of the cluster"
        step = f"Run it there:  ray job submit --address {address} -- carft-ray doctor RECIPE --address auto"
        raise ClusterError(Problem("--address", rule, address, next_step=step))
    from carft_ray.api.checks import read_recipe
    from carft_ray.data.duplicates.shared_images import check_pairs_path, write_pairs
    from carft_ray.launch.cluster.doctor import NUM_IMAGES, as_plain_data, examine
    from carft_ray.ui.progress import counting

    if pairs is not None:
        check_pairs_path(pairs)
    if quick and (given := common.option_words(pairs=pairs, images=images)):
        raise UsageError(Problem(given[0], "needs the images, which --quick does not open"))
    value = read_recipe(recipe, common.overrides_of(set_, {"method": method}))
    say = console.sayer(not json_)
    reports, on_nodes = [], []
    with contextlib.ExitStack() as stack:
        if address is not None:
            from carft_ray.launch.cluster import cluster, node_doctor
            from carft_ray.layout import RAY_LOG

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="carft-ray-"))
            stack.enter_context(cluster.running_ray(address, Path(folder) / RAY_LOG))
        with counting() as progress:
            found = examine(value, images or NUM_IMAGES, quick, say, progress, memory_gb)
        if address is not None:
            reports = node_doctor.ask_nodes(value, say)
            on_nodes = [*node_doctor.judge(reports, found), *node_doctor.check_collective(reports, value, say)]
    if json_:
        _print_json(as_plain_data(found), reports, on_nodes)
    else:
        _show(found, reports, on_nodes)
    if pairs is not None and found.pairs is None:
        console.warn(f"{pairs} was not written: images are compared only if the data has no other error.")
    elif pairs is not None and found.pairs is not None:
        write_pairs(pairs, *found.pairs)
        console.say(f"{pairs}: {counted(len(found.pairs[0]), 'pair')} of images in two roles")
    broken = [one.problem for one in on_nodes if one.level == "error"]
    if found.errors or broken:
        error = DataError if found.errors else ClusterError
        if json_:
            raise typer.Exit(error.exit_code)
        raise error([*found.errors, *broken])
    if not json_:
        from carft_ray.recipe.loading import own_functions

        begin = common.begin_line(value, recipe, method=method, set=set_, address=address)
        plan = common.command_line("plan", recipe, method=method, set=set_, address=address)
        has_plan = begin.startswith("carft-ray search") and not own_functions(value)
        console.next_step(*([plan] if has_plan else []), begin)


def _print_json(data: dict[str, Any], reports: Sequence[Any], on_nodes: Sequence[Any]) -> None:
    """Prints a diagnosis; with a cluster, what its nodes have found and what is wrong there, too."""
    if on_nodes or reports:
        from carft_ray.launch.cluster.doctor import finding_data

        data["findings"] += map(finding_data, on_nodes)
        data["healthy"] = data["healthy"] and all(one.level != "error" for one in on_nodes)
        data["nodes"] = [asdict(report) for report in reports]
    console.print_json(data)


def _show(found: Any, reports: Sequence[Any], on_nodes: Sequence[Any]) -> None:
    """Prints what was found, and a verdict where there is no error; errors end the command."""
    if found.sets:
        console.show(console.checkup_table(found.sets, found.zero_shot))
    for line in _model_lines(found.model, found.machine):
        console.say(line)
    if reports:
        console.show(console.node_table(reports))
    findings = [*found.findings, *on_nodes]
    for finding in findings:
        if finding.level == "note":
            console.say(f"note: {finding.problem}")
        elif finding.level == "warning":
            console.warn(str(finding.problem))
    errors, warnings, notes = (sum(one.level == level for one in findings) for level in ("error", "warning", "note"))
    if not errors:
        console.say(f"No error, {counted(warnings, 'warning')}, {counted(notes, 'note')}.")


def step_words(found: dict[str, Any]) -> str:
    """Returns what ``micro_batch_to_begin_with`` has found, in a sentence."""
    step = f"a step takes {found['step_gb']:.2g} of {found['gpu_gb']:.0f} GB (estimated)"
    if found["micro_batch"]:
        return f"micro-batch to begin with: {found['micro_batch']}; {step}"
    return f"not even one image fits on the GPU: {step}; docs/gpu.md lists ways to use less"


def _model_lines(model: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    if model:
        contexts = counted(model["num_contexts"], "context")
        if "effective_contexts" in model:
            largest = model["largest_context"]
            contexts += f", in effect {model['effective_contexts']:.1f}"
            contexts += f" (most: {100 * largest['share']:.0f} % on {largest['template']!r})"
        yield (
            f"model {model['name']}: {model['image_size']} pixels, s = {model['logit_scale']:.1f}, "
            f"{model['num_classes']} classes, {contexts}; {model['trained_weights'] / 1e6:.1f} million weights train, "
            f"{model['training_memory_gb']:.2g} GB with the frozen tower, gradients and AdamW, plus the images"
        )
    if "micro_batch" in model:
        yield step_words(model)
    if not machine:
        return
    yield (
        f"machine: {machine['device']}, {counted(machine['gpus'], 'GPU')}, {counted(machine['cores'], 'core')}, "
        f"{machine['memory_gb']:.0f} GB memory, {machine['cache_free_gb']:.0f} GB free for {machine['cache_dir']}"
    )
