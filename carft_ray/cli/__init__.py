"""The commands, a file for each group. Everything heavy is imported inside them, so that `--help` answers at once."""

from carft_ray.cli import training, search, sealed, reading, sandbox  # noqa: F401  # isort: skip  # in the order of the help
from carft_ray.cli.common import app, main

__all__ = ["app", "main"]
