"""The commands, a module for each.

``schema`` is in ``init``, ``resume`` in ``search``. ``data`` and ``sandbox`` are groups of commands.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

# in the order of the help
from carft_ray.cli import init, validate, train, evaluate, export, doctor, search, stop, plan, submit  # noqa: F401  # isort: skip
from carft_ray.cli import status, ls, logs, dashboard, confirm, test, report, rescore  # noqa: F401  # isort: skip
from carft_ray.cli import reproduce, compare, pull, data, sandbox  # noqa: F401  # isort: skip
from carft_ray.cli.program import app, main

__all__ = ["app", "main"]
