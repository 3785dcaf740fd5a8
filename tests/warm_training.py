"""Imported by the process that ``attempts.py`` forks: all that a real training loads and makes once is there then."""

import tempfile
from pathlib import Path

import attempts

from carft_ray.evaluation import training
from carft_ray.learning.context import RunContext


def _train():
    recipe = attempts.sandbox_recipe(batch_size=64, epochs=1)
    with tempfile.TemporaryDirectory(prefix="carft-") as folder:
        folder = Path(folder)
        training.prepare(recipe, folder / "prepared")
        training.run_training(recipe, folder / "training", folder / "prepared", RunContext())


_train()
