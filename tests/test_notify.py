"""Notices of a search: a real server gets them; whatever goes wrong with them is a warning."""

import contextlib
import http.server
import json
import socketserver
import threading
from datetime import datetime
from pathlib import Path

import pytest
from ray import cloudpickle

from carft_ray.errors import ClusterError, InterruptedRunError, UsageError
from carft_ray.launch import notify
from carft_ray.launch.events import Stopping, TrialFinished
from carft_ray.launch.notify import AT_MOST_EVERY_S, _Notices, notifying
from carft_ray.study.outcome import TrialRow

pytestmark = pytest.mark.slow


def ended(number, objective=0.5, outcome="complete", reason="", is_best=False):
    objective = objective if outcome == "complete" else None
    row = TrialRow("trial", number, f"t{number:04d}-abcd", {}, 1, outcome, reason, objective, 0.4, {}, datetime.now())
    return TrialFinished(row, is_best)


def drained(notices):
    found = []
    while not notices.waiting.empty():
        found.append(notices.waiting.get())
    return found


@pytest.fixture
def server():
    """A server on this machine, with the bodies that it was sent and the code that it answers."""
    got, answer = [], {"code": 200}

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(answer["code"])
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hook) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        running.got, running.answer = got, answer
        running.url = f"http://127.0.0.1:{running.server_port}/hook"
        yield running
        running.shutdown()
        thread.join()


def test_a_webhook_gets_the_notices_in_order(server):
    shown, warned = [], []
    with notifying(server.url, "pets", Path("studies/pets"), warned.append) as beside:
        on_event = beside(shown.append)
        on_event(ended(0, 0.613, is_best=True))
        on_event(ended(1, outcome="diverged", reason="loss not finite"))
        on_event(ended(2))
    assert warned == []
    assert len(shown) == 3
    assert {kind for kind, _ in server.got} == {"application/json"}
    best, failed, end = [content for _, content in server.got]
    assert best == {
        "event": "best",
        "text": "pets: new best t0000-abcd, objective 61.3 %",
        "study": "pets",
        "study_dir": str(Path("studies/pets").absolute()),
        "trial": "t0000-abcd",
        "objective": 0.613,
        "alpha": 0.4,
    }
    assert (failed["event"], failed["text"]) == ("failed_trial", "pets: t0001-abcd: diverged, loss not finite")
    assert end["text"] == "pets: finished; 3 trainings ended in this run; new best t0000-abcd, objective 61.3 %"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (InterruptedRunError("stopped; 3 of 8"), "stopped", "pets: stopped; 0 trainings ended in this run"),
        (KeyboardInterrupt(), "stopped", "pets: stopped; 0 trainings ended in this run"),
        (ClusterError("no Ray"), "failed", "pets: failed: no Ray; 0 trainings ended in this run"),
        (ZeroDivisionError("by 0"), "failed", "pets: failed: ZeroDivisionError: by 0; 0 trainings ended in this run"),
    ],
)
def test_the_end_says_how_it_came_and_the_error_goes_on(server, error, kind, text):
    with contextlib.suppress(type(error)), notifying(server.url, "pets", Path("pets"), pytest.fail):
        raise error
    [(_, content)] = server.got
    assert (content["event"], content["text"]) == (kind, text)


def test_an_end_by_the_budget_is_told_as_such():
    notices = _Notices("pets", Path("pets"))
    notices.take(Stopping(2, "the wall time is used up"))
    notices.end(None)
    [content] = drained(notices)
    assert content["event"] == "finished"
    assert content["text"].startswith("pets: ended early, the wall time is used up; 0 trainings")


def test_notices_about_trials_come_now_and_then():
    now = [100.0]
    notices = _Notices("pets", Path("pets"), clock=lambda: now[0])
    for number in range(5):
        notices.take(ended(number, outcome="error", reason="boom"))
        notices.take(ended(10 + number, 0.1 * number, is_best=True))
    now[0] += AT_MOST_EVERY_S
    notices.take(ended(5, outcome="error", reason="boom"))
    told = [content["text"] for content in drained(notices)]
    assert told == [
        "pets: t0000-abcd: error, boom",
        "pets: new best t0010-abcd, objective 0.0 %",
        "pets: t0005-abcd: error, boom",
    ]


def test_the_search_does_not_wait_for_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(notify, "TIMEOUT_S", 1.0)
    warned = []
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as silent:  # it accepts, no more
        url = f"http://127.0.0.1:{silent.server_address[1]}/"
        with notifying(url, "s", Path("s"), warned.append) as beside:
            beside(lambda event: None)(ended(0, is_best=True))
            assert warned == []  # nothing was waited for
    assert warned == ["--notify-url: timed out"]


def test_a_server_that_refuses_or_is_missing_is_a_warning(server):
    server.answer["code"] = 500
    warned = []
    for url in (server.url + "?token=secret", "http://127.0.0.1:9/"):
        with notifying(url, "s", Path("s"), warned.append) as beside:
            beside(lambda event: None)(ended(0, is_best=True))
    assert warned[0] == "--notify-url: the server answered 500 Internal Server Error"
    assert len(warned) == 2
    assert "refused" in warned[1]


@pytest.mark.parametrize("answer", [b"no http at all\r\n\r\n", b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n"])
def test_a_server_that_does_not_speak_http_is_a_warning_and_the_next_notice_is_sent(answer):
    got = []

    class Raw(socketserver.StreamRequestHandler):
        def handle(self):
            head = list(iter(self.rfile.readline, b"\r\n"))
            length = next(int(line.split()[1]) for line in head if line.lower().startswith(b"content-length"))
            got.append(json.loads(self.rfile.read(length))["event"])
            self.wfile.write(answer if len(got) == 1 else b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    warned = []
    with socketserver.TCPServer(("127.0.0.1", 0), Raw) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{running.server_address[1]}/secret"
        with notifying(url, "s", Path("s"), warned.append) as beside:
            beside(lambda event: None)(ended(0, is_best=True))
        running.shutdown()
        thread.join()
    assert len(got) == 2
    assert len(warned) == 1
    assert warned[0].startswith("--notify-url: the server's answer is no HTTP (")
    assert "secret" not in warned[0]


@pytest.mark.parametrize("url", ["ftp://x", "file:///etc/passwd"])
def test_an_address_that_cannot_be_used_is_refused_before_the_search_begins(url):
    with pytest.raises(UsageError) as refused, notifying(url, "s", Path("s"), pytest.fail):
        pytest.fail("it began")
    assert str(refused.value).startswith(f"--notify-url: must begin with http:// or https://, but got '{url}'")


def test_what_takes_the_events_can_be_written_to_tunes_file(server):
    with notifying(server.url, "s", Path("s"), pytest.fail) as beside:
        cloudpickle.dumps(beside(lambda event: None))
