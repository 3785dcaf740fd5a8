"""What a model is: its input, tokens, layers, memory and known weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from carft_ray import console
from carft_ray.cli import common
from carft_ray.console import size_text
from carft_ray.errors import Problem, RecipeError, UsageError

NAME = "A model name of open_clip, local-dir:FOLDER, hf-hub:OWNER/NAME, sandbox, or a recipe (YAML)."
RECIPES = (".yaml", ".yml")
RESIZE = {"shortest": "shortest side, then centre crop", "longest": "longest side, then padding", "squash": "squash"}


@common.command("model ViT-B-16-quickgelu --pretrained openai", common.ONE_TRAINING)
def model(
    name: Annotated[str, Argument(help=NAME, metavar="NAME|RECIPE", show_default=False)],
    pretrained: Annotated[str | None, Option(metavar="TAG|FILE", help="Its weights: a tag or a file.")] = None,
    set_: common.SetOption = None,
    json_: common.JsonOption = False,
) -> None:
    """Show what a model is: input, tokens, s, layers by depth, memory, known weights. No weights are loaded."""
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
    if console.print_json(found, json_):
        return
    console.show(console.fact_table(_facts(found)))
    console.show()
    columns = ["layer", "modules of the image tower", "parameters"]
    rows = [[str(layer["layer"]), layer["name"], f"{layer['num_parameters']:,}"] for layer in found["layers"]]
    if is_recipe:
        columns.append("learning rate")
        for row, layer in zip(rows, found["layers"], strict=True):
            row.append(f"{layer['lr_factor']:.3g} x" if layer["lr_factor"] else "frozen")
    console.show(console.table(columns, rows))
    console.next_step(common.command_line("validate", name) if is_recipe else _next(part.name, found))


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a model is, as texts by their titles."""

    def listed(of: Mapping[str, Any], form: str = "") -> str:
        return ", ".join(f"{part} {value:{form}}" for part, value in of.items() if value)

    image, memory, own_name = found["input"], found["memory_bytes"], found["name"].replace("/", "-")
    mean, std = (", ".join(f"{value:.4g}" for value in image[key]) for key in ("mean", "std"))
    differs = " (that of CLIP: the known weights differ in it)" if found["preprocessing_differs"] else ""
    weights = f"{found['pretrained'] or 'its own'}, {found['weights']}"
    fixed = "; the statistics of BatchNorm stay fixed while training" if found["has_batch_norm"] else ""
    facts = {
        "model": found["name"],
        "weights": "none named" if found["weights"] == "untrained" else weights,
        "family": found["family"],
        "input": f"{image['size']} x {image['size']} pixels",
        "preprocessing": f"{RESIZE[image['resize_mode']]}, {image['interpolation']}; mean {mean}; std {std}{differs}",
        "tokens": f"{found['context_length']}, of a vocabulary of {found['vocabulary']:,}",
        "tokenizer": found["tokenizer"],
        "s": "comes with the weights" if found["logit_scale"] is None else f"{found['logit_scale']:.4g}",
        "activations": listed(found["activations"]),
        "parameters": listed(found["num_parameters"], ","),
        "widths": listed(found["widths"]),
        "blocks": str(found["num_blocks"]),
        "norms": ", ".join(f"{count} {kind}" for kind, count in found["norms"].items()) + fixed,
        "memory": f"weights {size_text(memory['weights'])}; training the image tower {size_text(memory['training'])} "
        "(weights, gradients, AdamW and the frozen tower in float32), plus activations",
    }
    if found["has_logit_bias"]:
        value = "" if found["logit_bias"] is None else f"{found['logit_bias']:.4g}; "
        facts["logit_bias"] = f"{value}left out: a constant shift of all logits changes no softmax"
    if found["tags"]:
        by_name: dict[str, list[str]] = {own_name: []}
        for tag in sorted(found["tags"], key=lambda tag: str(tag["name"])):
            by_name.setdefault(tag["name"], []).append(tag["tag"])
        facts["known weights"] = ", ".join(by_name.pop(own_name)) or "none"
        facts |= {f"as {other}": ", ".join(tags) for other, tags in by_name.items()}
    return facts


def _next(name: str, found: Mapping[str, Any]) -> str:
    """Returns the command that follows: the model with known weights, or a recipe with the model."""
    tags = [tag for tag in found["tags"] if tag["name"] == name.replace("/", "-")] or found["tags"]
    if found["weights"] == "untrained" and tags:
        return f"carft-ray model {tags[0]['name']} --pretrained {tags[0]['tag']}"
    weights = "" if found["pretrained"] in (None, "random") else f", pretrained: {found['pretrained']}"
    return common.command_line("validate", "RECIPE.yaml", set="model={" + f"name: {name}{weights}" + "}")
