"""Names of models, without loading torch: what ``validate`` needs to know about open_clip."""

import ast
import functools
import importlib.util
from pathlib import Path

from carft_ray.errors import Problem, nearest
from carft_ray.recipe.loading import is_weights_path, resolve_path
from carft_ray.recipe.schema import ModelPart

SANDBOX = "sandbox"
RANDOM = "random"  # value of `pretrained` that asks for untrained weights
LOCAL_DIR = "local-dir:"
WEIGHTS_ENDINGS = (".safetensors", ".bin", ".pth")  # that open_clip looks for in a folder


@functools.cache
def model_names() -> tuple[str, ...]:
    """Returns all names that open_clip can build, sorted, and 'sandbox'."""
    folder = _open_clip()
    configs = folder.glob("model_configs/*.json") if folder is not None else ()
    return (SANDBOX, *sorted(path.stem for path in configs))


def pretrained_tags(name: str) -> tuple[str, ...] | None:
    """Returns the tags of weights that open_clip offers for a model, or None when its list cannot be read."""
    known = _all_tags()
    return known.get(name, ()) if known else None


@functools.cache
def _all_tags() -> dict[str, tuple[str, ...]]:
    """Reads open_clip's list of weights from its source, since to import it is to import torch.

    A test compares it with what open_clip itself says. A list of another form is no list: ``load_clip`` checks again.
    """
    folder = _open_clip()
    path = folder / "pretrained.py" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    calls: dict[str, ast.expr] = {}
    models: dict[str, ast.expr] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        variable, value = node.targets[0].id, node.value
        calls[variable] = value
        if variable == "_PRETRAINED" and isinstance(value, ast.Dict):
            names = [key.value for key in value.keys if isinstance(key, ast.Constant)]
            models = dict(zip(map(str, names), value.values, strict=False))
    tags: dict[str, tuple[str, ...]] = {}
    quick: dict[str, tuple[str, ...]] = {}  # weights trained with QuickGELU are offered under NAME-quickgelu too
    for name, found in models.items():
        value = calls.get(found.id, found) if isinstance(found, ast.Name) else found
        if not isinstance(value, ast.Call) or any(keyword.arg is None for keyword in value.keywords):
            return {}
        tags[name] = tuple(str(keyword.arg) for keyword in value.keywords)
        if with_quick := tuple(str(keyword.arg) for keyword in value.keywords if _is_quick(keyword.value)):
            quick[f"{name}-quickgelu"] = with_quick
    return {**tags, **quick}


def _is_quick(value: ast.expr) -> bool:
    keywords = value.keywords if isinstance(value, ast.Call) else []
    given = [k.value.value for k in keywords if k.arg == "quick_gelu" and isinstance(k.value, ast.Constant)]
    return bool(given and given[0])


def _open_clip() -> Path | None:
    """Returns the folder of the installed open_clip; to find it does not import it."""
    spec = importlib.util.find_spec("open_clip")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def check_model(model: ModelPart, base_dir: Path) -> list[Problem]:
    """Returns what is wrong with ``model`` as far as names and local files tell; nothing is loaded.

    Args:
        model: The recipe's model.
        base_dir: Folder from which relative paths count.
    """
    if model.name.startswith(LOCAL_DIR):
        folder = base_dir / model.name.removeprefix(LOCAL_DIR)
        config = folder / "open_clip_config.json"
        if not config.is_file():
            return [Problem("model.name", "local-dir: needs a folder with open_clip_config.json", str(folder))]
        if not any(path.suffix in WEIGHTS_ENDINGS for path in folder.iterdir()):
            rule = "local-dir: needs a folder with weights"
            return [Problem("model.name", rule, f"none in {folder} that end in {', '.join(WEIGHTS_ENDINGS)}")]
        return []
    if model.name == SANDBOX:
        if model.pretrained is not None:
            return [Problem("model.pretrained", "the sandbox has its own weights; leave the key out", model.pretrained)]
        return []
    name = model.name.replace("/", "-")
    if name not in model_names():
        rule = "must be 'sandbox', 'local-dir:FOLDER' or a model name of open_clip"
        return [Problem("model.name", rule, repr(model.name), nearest=nearest(name, model_names()))]
    if model.pretrained is None:
        rule = "must name the weights: a tag of open_clip, a weights file, or 'random' for untrained weights"
        return [Problem("model.pretrained", rule, "nothing")]
    tags = pretrained_tags(name)
    if model.pretrained == RANDOM or (tags is not None and model.pretrained in tags):
        return []
    path = resolve_path(model.pretrained, base_dir)
    if path.is_file():
        return []
    if is_weights_path(model.pretrained):
        siblings = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        rule = "must be a weights file that is there"
        return [Problem("model.pretrained", rule, str(path), nearest=nearest(str(path), siblings))]
    if tags is None:
        return []
    rule = f"must be a tag of {model.name}, a weights file, or '{RANDOM}'"
    return [Problem("model.pretrained", rule, repr(model.pretrained), tags, nearest(model.pretrained, tags))]
