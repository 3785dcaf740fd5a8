"""The commands, a module for each panel of the help, with ``doctor`` and ``submit`` apart; ``program`` is the frame.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

# in the order of the help
from carft_ray.cli import recipes, training, doctor, search, submit, reading, results, data  # noqa: F401  # isort: skip
from carft_ray.cli.program import app, main

__all__ = ["app", "main"]
