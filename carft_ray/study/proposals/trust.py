"""Whose study it is. Optuna's CMA-ES keeps a pickle in the journal, which runs any code when it is opened.

A study in which this user's cmaes has begun holds a random token, and a file in the user's own cache folder has the
token as its name.
"""

import re
import secrets
from pathlib import Path

import optuna

from carft_ray import files
from carft_ray.data.caching.index import user_cache_dir
from carft_ray.errors import Problem, UsageError
from carft_ray.layout import TOKEN
from carft_ray.recipe.schema import Recipe

PICKLE = "optimizer"  # part of the names of the attributes in which Optuna's CMA-ES keeps its pickles


def unpickles(recipe: Recipe) -> bool:
    """Tells whether the sampler of a recipe opens pickles of the study."""
    return recipe.search.sampler.name == "cmaes"


def check_trusted(study_dir: Path, recipe: Recipe, study: optuna.Study, trusted: bool) -> None:
    """Lets a search open the pickles of its study, or not. The lock must be held.

    Args:
        study_dir: The study directory.
        recipe: The recipe of the search.
        study: The Optuna study that the sampler reads. One without a pickle becomes this user's.
        trusted: The user trusts whoever made it; from then on it counts as the user's own.

    Raises:
        UsageError: The study is from elsewhere and is not trusted.
        StorageError: Study or cache folder cannot be written.
    """
    if not unpickles(recipe):
        return
    token = _token(study_dir)
    if token and (_known_tokens() / token).is_file():
        return
    pickles = any(PICKLE in key for trial in study.get_trials(deepcopy=False) for key in trial.system_attrs)
    if pickles and not trusted:
        rule = "was not made by you on this machine: cmaes would open a pickle in its journal, which can run any code"
        step = "If you trust everyone who has written to it, add --trust."
        raise UsageError(Problem(str(study_dir), rule, next_step=step))
    token = secrets.token_hex(16)
    with files.writing(_known_tokens()):
        _known_tokens().mkdir(parents=True, exist_ok=True)
    files.write_text(_known_tokens() / token, f"{study_dir}\n")
    files.write_text(study_dir / TOKEN, f"{token}\n")


def _token(study_dir: Path) -> str:
    """Returns the token of a study; empty when it has none, or a text that is no token and might lead elsewhere."""
    path = study_dir / TOKEN
    text = path.read_text(errors="replace").strip() if path.is_file() else ""
    return text if re.fullmatch(r"[0-9a-f]{32}", text) else ""


def _known_tokens() -> Path:
    return user_cache_dir() / "studies"
