"""The command line with all that ``confirm`` loads, as a program of ``crash_host``."""

import crash_host
from crash_host import call

__all__ = ["call", "import_everything"]


def import_everything():
    import carft_ray.launch.runs.confirm
    import carft_ray.results.confirm.summary  # noqa: F401

    crash_host.import_everything()
