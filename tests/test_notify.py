"""Notices of a search: a real server gets them; whatever goes wrong with them is a warning."""

import json
import socketserver
import threading
from datetime import datetime
from pathlib import Path

import pytest

from carft_ray.errors import ClusterError, InterruptedRunError, UsageError
from carft_ray.launch import notify
from carft_ray.launch.events import Stopping, TrialFinished
from carft_ray.launch.notify import AT_MOST_EVERY_S, _Notices, notifying
from carft_ray.study.outcome import TrialRow

pytestmark = pytest.mark.slow
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def ended(number, objective=0.5, outcome="complete", reason="", is_best=False):
    objective = objective if outcome == "complete" else None
    row = TrialRow("trial", number, f"t{number:04d}-abcd", {}, 1, outcome, reason, objective, 0.4, {}, datetime.now())
    return TrialFinished(row, is_best)


class Hook(socketserver.StreamRequestHandler):
    def handle(self):
        head = dict(line.decode().lower().split(":", 1) for line in list(iter(self.rfile.readline, b"\r\n"))[1:])
        assert head["content-type"].strip() == "application/json"
        self.server.got.append(json.loads(self.rfile.read(int(head["content-length"]))))
        self.wfile.write(self.server.answers.pop(0) if self.server.answers else OK)


@pytest.fixture
def server():
    """A server on this machine, with what it was sent and its answers."""
    with socketserver.TCPServer(("127.0.0.1", 0), Hook) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        running.got, running.answers = [], []
        running.url = f"http://127.0.0.1:{running.server_address[1]}/hook?token=secret"
        yield running
        running.shutdown()


def test_a_webhook_gets_the_notices_in_order(server):
    shown, warned = [], []
    with notifying(server.url, "pets", Path("studies/pets"), warned.append) as beside:
        on_event = beside(shown.append)
        on_event(ended(0, 0.613, is_best=True))
        on_event(ended(1, outcome="diverged", reason="loss not finite"))
        on_event(ended(2))
    assert (warned, len(shown)) == ([], 3)
    best, failed, end = server.got
    about = {"study": "pets", "study_dir": str(Path("studies/pets").absolute())}
    about |= {"trial": "t0000-abcd", "objective": 0.613, "alpha": 0.4}
    assert best == {"event": "best", "text": "pets: new best t0000-abcd, objective 61.3 %", **about}
    assert (failed["event"], failed["text"]) == ("failed_trial", "pets: t0001-abcd: diverged, loss not finite")
    assert end["text"] == "pets: finished; 3 trainings ended in this run; new best t0000-abcd, objective 61.3 %"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InterruptedRunError("stopped; 3 of 8"), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (ClusterError("no Ray"), "failed: no Ray"),
        (ZeroDivisionError("by 0"), "failed: ZeroDivisionError: by 0"),
    ],
)
def test_the_end_says_how_it_came_and_the_error_goes_on(server, error, told):
    with pytest.raises(type(error)), notifying(server.url, "pets", Path("pets"), pytest.fail):
        raise error
    [content] = server.got
    assert content["event"] == told.partition(":")[0]
    assert content["text"] == f"pets: {told}; 0 trainings ended in this run"


def test_notices_about_trials_come_now_and_then_and_an_end_by_the_budget_is_told_as_such():
    now = [100.0]
    notices = _Notices("pets", Path("pets"), clock=lambda: now[0])
    for number in range(5):
        notices.take(ended(number, outcome="error", reason="boom"))
        notices.take(ended(10 + number, 0.1 * number, is_best=True))
    now[0] += AT_MOST_EVERY_S
    notices.take(ended(5, outcome="error", reason="boom"))
    notices.take(Stopping(2, "the wall time is used up"))
    notices.end(None)
    failed, best, later, end = (notices.waiting.get()["text"] for _ in range(notices.waiting.qsize()))
    assert (failed, later) == ("pets: t0000-abcd: error, boom", "pets: t0005-abcd: error, boom")
    assert best == "pets: new best t0010-abcd, objective 0.0 %"
    assert end.startswith("pets: ended early, the wall time is used up; 11 trainings")


def test_an_answer_that_is_none_is_a_warning_and_the_next_notice_is_sent(server):
    for answer, warning in (
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", "the server answered 500 Internal Server"),
        (b"no http at all\r\n\r\n", "the server's answer is no HTTP ("),
        (b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n", "the server's answer is no HTTP ("),
    ):
        server.got, server.answers, warned = [], [answer], []
        with notifying(server.url, "s", Path("s"), warned.append) as beside:
            beside(lambda event: None)(ended(0, is_best=True))
        assert len(server.got) == 2
        [told] = warned
        assert told.startswith(f"--notify-url: {warning}")
        assert "secret" not in told


def test_the_search_waits_for_no_server_that_is_missing_or_does_not_answer(monkeypatch):
    monkeypatch.setattr(notify, "TIMEOUT_S", 1.0)
    warned = []
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as silent:  # it accepts, no more
        for port in (silent.server_address[1], 9):
            with notifying(f"http://127.0.0.1:{port}/", "s", Path("s"), warned.append) as beside:
                before = len(warned)
                beside(lambda event: None)(ended(0, is_best=True))
                assert len(warned) == before  # nothing was waited for
    assert warned[0] == "--notify-url: timed out"
    assert "refused" in warned[1]


@pytest.mark.parametrize("url", ["ftp://x", "file:///etc/passwd"])
def test_an_address_that_cannot_be_used_is_refused_before_the_search_begins(url):
    refused = pytest.raises(UsageError, match=f"--notify-url: must begin with http:// or https://, but got '{url}'")
    with refused, notifying(url, "s", Path("s"), pytest.fail):
        pytest.fail("it began")
