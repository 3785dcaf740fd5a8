"""The commands, a file for each group. Everything heavy is imported inside them, so that `--help` answers at once."""

# in the order of the help
from carft_ray.cli import init, training, model, doctor, search, planning, reading, watching  # noqa: F401  # isort: skip
from carft_ray.cli import confirming, test_sets, reporting, reproducing, rescoring  # noqa: F401  # isort: skip
from carft_ray.cli import images, sandbox  # noqa: F401  # isort: skip
from carft_ray.cli.common import app, main

__all__ = ["app", "main"]
