"""Names of models, without loading torch: what ``validate`` needs to know about open_clip."""

import functools
import importlib.util
from pathlib import Path

from carft_ray.errors import Problem, nearest
from carft_ray.recipe.schema import ModelPart

SANDBOX = "sandbox"
RANDOM = "random"  # value of `pretrained` that asks for untrained weights
LOCAL_DIR = "local-dir:"


@functools.cache
def model_names() -> tuple[str, ...]:
    """Returns all names that open_clip can build, sorted, and 'sandbox'."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return (SANDBOX,)
    configs = Path(spec.origin).parent / "model_configs"
    return (SANDBOX, *sorted(path.stem for path in configs.glob("*.json")))


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
    return []
