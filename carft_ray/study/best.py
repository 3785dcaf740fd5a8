"""``best.yaml``: the best trial of a study as a recipe that `train` runs, with its alpha fixed.

The study writes it (``Study``), whenever the best trial is another one: after a trial is told, and at opening, where a
kill may have come in between.
"""

from pathlib import Path

from carft_ray import files
from carft_ray.layout import BEST
from carft_ray.recipe.constraints import violation_words
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.space import apply
from carft_ray.study.outcome import TrialRow


def write_best(study_dir: Path, recipe: Recipe, best: TrialRow) -> None:
    """Writes the best trial as a recipe; where the file says the same already, nothing is written.

    Args:
        study_dir: The study directory.
        recipe: Of the study, with absolute paths.
        best: The trial, with its standing in a Pareto search.

    Raises:
        StorageError: It cannot be read or written.
    """
    head = f"# The best trial of this study, {best.name}. Run it: carft-ray train {BEST} --out FOLDER\n"
    head += "".join(f"# {line}\n" for line in constraint_lines(best))
    if not recipe.data.ood_val:
        head += "# Selected on ID only: the recipe has no ood_val.\n"
    path = study_dir / BEST
    content = (head + dump_recipe(apply(recipe, {**best.values, "alpha": best.alpha}))).encode()
    if not files.exists(path) or files.retried(path, path.read_bytes) != content:
        files.write_bytes(path, content)


def constraint_lines(best: TrialRow | None) -> list[str]:
    """Returns a line that says plainly when not even the best trial meets the constraints."""
    missed = violation_words(best.metrics) if best is not None else ""
    if best is None or not missed:
        return []
    return [f"No trial meets all constraints; {best.name} misses them least: it {missed}."]
