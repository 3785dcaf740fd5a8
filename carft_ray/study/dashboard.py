"""optuna-dashboard on the log of a study, which it can read and never write.

It has buttons that rename, delete and write. Two things prevent this: requests other than GET and HEAD are refused
before it gets them, and its storage has a log that was not claimed, which takes no commit. The search that writes it is
not held up, and what it adds is seen.

Only requests that name this machine as their host are answered: a page of another site whose name resolves to 127.0.0.1
(DNS rebinding) would read the study otherwise.
"""

from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import JournalStorage

from carft_ray.errors import Problem, UsageError
from carft_ray.study.place import Place, log_at

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
REFUSED = b"This dashboard only shows the study. Change it with carft-ray.\n"
OTHER_HOST = b"This dashboard answers at 127.0.0.1 and localhost only.\n"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of single requests."""


def serve(place: Place, port: int, ready: Callable[[int], None]) -> None:
    """Serves the dashboard of a study to this machine until ``KeyboardInterrupt``.

    Args:
        place: Folder or address of the study.
        port: Where to listen on 127.0.0.1; 0: a free port.
        ready: Told the port once it listens.

    Raises:
        UsageError: optuna-dashboard is not installed.
        OSError: The port is taken.
    """
    with make_server(ADDRESS, port, _application(place), _Server, _Silent) as server:
        ready(server.server_port)
        server.serve_forever()


def _application(place: Place) -> Callable[..., Iterable[bytes]]:
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        step = "Install it: pip install 'carft-ray[dashboard]'"
        raise UsageError(Problem("dashboard", "needs the package optuna-dashboard", next_step=step)) from None
    log = log_at(place)
    shown = wsgi(JournalStorage(log))

    def application(asked: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        is_ours = asked.get("HTTP_HOST", "").partition(":")[0].lower() in HOSTS
        if not is_ours or asked["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
            return [REFUSED if is_ours else OTHER_HOST]
        log.follow()
        answer: Iterable[bytes] = shown(asked, start_response)
        return answer

    return application
