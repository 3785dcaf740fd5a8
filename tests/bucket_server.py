"""A server of buckets in this process, moto's, whose answers a test may lose, delay or refuse.

    with bucket_server(monkeypatch) as server:
        store = Bucket(server.address("study"))
        server.strike = lambda method, path: LOST if method == "PUT" else None

No request leaves the machine. Other processes get ``server.environment``.
"""

import contextlib
import io
import logging
import os
import secrets
import socket
import threading
import time

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

from carft_ray.layout import MANIFEST, RAY_LOG
from carft_ray.store import bucket
from carft_ray.store.bucket import Bucket
from carft_ray.study import place

SECRET = "wJalr-a-secret-of-the-tests"
LOST = "lost"  # it is done, and the connection ends without an answer
LATE, LATE_S = "late", 0.3  # the connection ends without an answer, and it is done so many seconds later
CUT = "cut"  # the connection ends, and it is not done
SILENT = "silent"  # it is accepted and never answered
DONE_503 = "done, then 503"
HALF = "half"  # it is done, and the connection ends in the middle of the answer
SLOW = "slow"  # it is done, and answered ``LATE_S`` later


def refused(status, code):
    """A fault: this status with this code, and it is not done."""
    return status, code


class Server:
    """Attributes: ``strike(method, path)`` returns a fault or None; ``requests``, as (method, path)."""

    def __init__(self):
        self.strike, self.requests = (lambda method, path: None), []
        self.bucket = f"studies-{secrets.token_hex(6)}"
        self._app = DomainDispatcherApplication(create_backend_app)
        self._over = threading.Event()
        self._doing = threading.Lock()  # moto lists and removes in turn, not at once
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "an-id-of-the-tests",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def address(self, name):
        return f"s3://{self.bucket}/{name}"

    def objects(self):
        """Name and content of all objects of the bucket."""
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[self.bucket].keys
        with self._doing:
            return {name: keys[name].value for name in keys}

    def put(self, name, data):
        """Writes an object past all faults, with any name."""
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(self.bucket, name, data)

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        fault = self.strike(method, path)
        if isinstance(fault, tuple):
            return self._refuse(environ, start_response, *fault)
        if fault is None:
            return self._done(environ, start_response)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        connection = environ["werkzeug.socket"]
        if fault == SILENT:
            self._over.wait()
            return []

        if fault == HALF:
            return self._halved(environ, start_response, connection)
        if fault == SLOW:
            time.sleep(LATE_S)
            return self._done(environ, start_response)

        def do():
            self._done(environ, lambda *given: None)

        if fault == LATE:
            threading.Timer(LATE_S, do).start()
        elif fault != CUT:
            do()
        if fault == DONE_503:
            return self._refuse(environ, start_response, 503, "SlowDown")
        connection.shutdown(socket.SHUT_RDWR)
        return []

    def _done(self, environ, start_response):
        with self._doing:
            return list(self._app(environ, start_response))

    def _halved(self, environ, start_response, connection):
        head = []
        body = b"".join(self._done(environ, lambda *given: head.extend(given)))
        status, headers, *_ = head
        sized = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*sized, ("Content-Length", str(len(body)))])
        yield body[: len(body) // 2]
        connection.shutdown(socket.SHUT_RDWR)

    def _refuse(self, environ, start_response, status, code):
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        text = f"<Error><Code>{code}</Code><AWSAccessKeyId>an-id-of-the-tests</AWSAccessKeyId></Error>".encode()
        start_response(f"{status} no", [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
        return [text]


def copied(folder, address):
    """Copies a study to a bucket as docs/storage.md says: its manifest comes last."""
    store = Bucket(address)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    for path in sorted(paths, key=lambda path: path == folder / MANIFEST):
        store.upload(path.relative_to(folder).as_posix(), path)


def contents(folder):
    """What two copies of a study have in common, by name."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in (MANIFEST, RAY_LOG, "stop")}


@contextlib.contextmanager
def impatient(monkeypatch, cache):
    """Gives a server to a process that tries again once, has this cache, and looks at the bucket each time."""
    monkeypatch.setattr(bucket, "MAX_RETRIES", 1)
    monkeypatch.setattr(place, "FRESH_FOR_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with bucket_server(monkeypatch) as server:
        yield server


@contextlib.contextmanager
def without_retries(monkeypatch):
    """Gives a server to a process that tries no request again."""
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)
    with bucket_server(monkeypatch) as server:
        yield server


@contextlib.contextmanager
def bucket_server(monkeypatch=None):
    """Gives a server with one empty bucket, to which the environment of this process leads meanwhile."""
    server = Server()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server._thread.start()
    try:
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=server.environment["AWS_ENDPOINT_URL"], **keys)
        client.create_bucket(Bucket=server.bucket)
        client.close()
        server.requests.clear()
        yield server
    finally:
        server._over.set()
        server._server.shutdown()
        server._thread.join()
        server._server.server_close()
