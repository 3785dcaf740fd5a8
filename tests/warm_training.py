"""Imported by the process that ``attempts.py`` forks: all that a real training loads and makes once is there then."""

import tempfile
from pathlib import Path

import attempts

from carft_ray.training import run
from carft_ray.training.run_context import RunContext


def _train():
    recipe = attempts.sandbox_recipe(batch_size=64, epochs=1)
    with tempfile.TemporaryDirectory(prefix="carft-") as folder:
        folder = Path(folder)
        run.prepare(recipe, folder / "prepared")
        run.run_training(recipe, folder / "training", folder / "prepared", RunContext())


_train()
