"""What a model is: its input, tokens, layers, memory and known weights."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from carft_ray.cli.common import DebugOption, JsonOption, SetOption, app
from carft_ray.errors import Problem, RecipeError, UsageError

PANEL = "One training"  # of the help
RECIPES = (".yaml", ".yml")


@app.command(epilog="Example:  carft-ray model ViT-B-16-quickgelu --pretrained openai", rich_help_panel=PANEL)
def model(
    name: Annotated[
        str,
        typer.Argument(
            help="A model name of open_clip, local-dir:FOLDER, hf-hub:OWNER/NAME, sandbox, or a recipe (YAML).",
            metavar="NAME|RECIPE",
            show_default=False,
        ),
    ],
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", metavar="TAG|FILE", help="Its weights: a tag of open_clip or a file.")
    ] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a model is: input, tokens, s, layers by depth, memory, known weights. No weights are loaded."""
    from carft_ray import console
    from carft_ray.learning.models.catalog import RANDOM, SANDBOX, check_model, model_warnings
    from carft_ray.recipe.fine_tuning import ModelConfig
    from carft_ray.recipe.loading import LOCAL_DIR, load_recipe

    is_recipe = name.endswith(RECIPES)
    if is_recipe and pretrained is not None:
        raise UsageError(Problem("--pretrained", "must stand without a recipe, which names its weights"))
    if set_ and not is_recipe:
        raise UsageError(Problem("--set", "needs a recipe in place of the name of a model"))
    if is_recipe:
        recipe = load_recipe(Path(name), set_ or ())
        part, train = recipe.model, recipe.train
    else:
        has_own = name == SANDBOX or ":" in name
        if not has_own and Path(name).is_dir():
            name, has_own = f"{LOCAL_DIR}{name}", True
        weights = pretrained if pretrained is not None or has_own else RANDOM
        part, train = ModelConfig(name=name, pretrained=weights), None
    if problems := check_model(part):  # before torch is loaded
        raise RecipeError(problems)
    for text in model_warnings(part):
        console.warn(text)
    from carft_ray.learning.models.describe import describe

    found = describe(part, train)
    if json_:
        console.print_json(found)
        return
    console.out.print(console.fact_table(_facts(found)))
    console.out.print()
    columns = ["layer", "modules of the image tower", "parameters"]
    rows = [[str(layer["layer"]), layer["name"], f"{layer['num_parameters']:,}"] for layer in found["layers"]]
    if is_recipe:
        columns.append("learning rate")
        factors = [layer["lr_factor"] for layer in found["layers"]]
        rows = [[*row, f"{factor:.3g} x" if factor else "frozen"] for row, factor in zip(rows, factors, strict=True)]
    console.out.print(console.table(columns, rows))
    console.next_step(*_next(name, part.name, found, is_recipe))


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    from carft_ray.console import size_text

    image, widths = found["input"], found["widths"]
    shown = {key: ", ".join(f"{value:.4g}" for value in image[key]) for key in ("mean", "std")}
    resize = {
        "shortest": "shortest side, then centre crop",
        "longest": "longest side, then padding",
        "squash": "squash",
    }
    preprocessing = (
        f"{resize[image['resize_mode']]}, {image['interpolation']}; mean {shown['mean']}; std {shown['std']}"
    )
    if found["preprocessing_differs"]:
        preprocessing += " (that of CLIP: the known weights differ in it)"
    parameters = ", ".join(f"{part} {count:,}" for part, count in found["num_parameters"].items())
    memory, norms = found["memory_bytes"], ", ".join(f"{count} {kind}" for kind, count in found["norms"].items())
    facts = {
        "model": found["name"],
        "weights": _weights(found),
        "family": found["family"],
        "input": f"{image['size']} x {image['size']} pixels",
        "preprocessing": preprocessing,
        "tokens": f"{found['context_length']}, of a vocabulary of {found['vocabulary']:,}",
        "tokenizer": found["tokenizer"],
        "s": "comes with the weights" if found["logit_scale"] is None else f"{found['logit_scale']:.4g}",
        "activations": ", ".join(f"{part} {activation}" for part, activation in found["activations"].items()),
        "parameters": parameters,
        "widths": ", ".join(f"{part} {width}" for part, width in widths.items() if width),
        "blocks": str(found["num_blocks"]),
        "norms": norms + ("; the statistics of BatchNorm stay fixed while training" if found["has_batch_norm"] else ""),
        "memory": f"weights {size_text(memory['weights'])}; training the image tower {size_text(memory['training'])} "
        "(weights, gradients, AdamW and the frozen tower in float32), besides activations",
    }
    if found["has_logit_bias"]:
        value = "" if found["logit_bias"] is None else f"{found['logit_bias']:.4g}; "
        facts["logit_bias"] = f"{value}left out: a constant shift of all logits changes no softmax"
    if found["tags"]:
        own = [tag["tag"] for tag in found["tags"] if tag["name"] == found["name"].replace("/", "-")]
        others = {tag["name"] for tag in found["tags"]} - {found["name"].replace("/", "-")}
        facts["known weights"] = ", ".join(own) or "none"
        for other in sorted(others):
            facts[f"as {other}"] = ", ".join(tag["tag"] for tag in found["tags"] if tag["name"] == other)
    return facts


def _weights(found: Mapping[str, Any]) -> str:
    if found["weights"] == "untrained":
        return "none named"
    return f"{found['pretrained'] or 'its own'}, {found['weights']}"


def _next(given: str, name: str, found: Mapping[str, Any], is_recipe: bool) -> list[str]:
    if is_recipe:
        return [f"carft-ray validate {shlex.quote(given)}"]
    tags = [tag for tag in found["tags"] if tag["name"] == name.replace("/", "-")] or found["tags"]
    if found["weights"] == "untrained" and tags:
        return [f"carft-ray model {tags[0]['name']} --pretrained {tags[0]['tag']}"]
    weights = "" if found["pretrained"] in (None, "random") else f", pretrained: {found['pretrained']}"
    setting = shlex.quote("model={" + f"name: {name}{weights}" + "}")
    return [f"carft-ray validate RECIPE.yaml --set {setting}"]
