"""The commands, a module for each or for a few that belong together.

=============  ==============================================
module         commands
=============  ==============================================
``init``       ``init``, ``schema``
``train``      ``validate``, ``train``, ``evaluate``, ``export``
``doctor``     ``doctor``
``search``     ``search``, ``resume``, ``stop``, ``plan``
``submit``     ``submit``
``cluster``    ``cluster jobs``, ``cluster logs``, ``cluster stop``
``status``     ``status``, ``ls``, ``logs``, ``dashboard``
``confirm``    ``confirm``
``test``       ``test``
``report``     ``report``, ``rescore``
``compare``    ``compare``, ``reproduce``
``data``       ``data ls``, ``data add``, ``data clean``
``sandbox``    ``sandbox images``
=============  ==============================================

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

# in the order of the help
from carft_ray.cli import init, train, doctor, search, submit, cluster, status, confirm, test, report  # noqa: F401  # isort: skip
from carft_ray.cli import compare, data, sandbox  # noqa: F401  # isort: skip
from carft_ray.cli.common import app, main

__all__ = ["app", "main"]
