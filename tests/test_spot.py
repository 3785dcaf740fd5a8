"""cluster/spot.sh against a stand-in of the metadata services, with a stand-in of the command `ray`."""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import cluster

SCRIPT = Path(__file__).resolve().parents[1] / "cluster" / "spot.sh"
NODE = "ab" * 28
TOKEN = "a token of a minute"
pytestmark = pytest.mark.skipif(not shutil.which("wget"), reason="the script needs wget, as the image has it")

AWS, GCP = "/latest/meta-data/spot/instance-action", "/computeMetadata/v1/instance/preempted"


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers as AWS or GCP do, or not, as the server's attributes say."""

    def do_PUT(self):
        wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.say(200 if self.server.cloud == "aws" and wanted else 404, TOKEN)

    def do_GET(self):
        server = self.server
        server.asked += 1
        path, header, value, code, text = {
            "aws": (AWS, "X-aws-ec2-metadata-token", TOKEN, 200 if server.notice else 404, server.notice),
            "gcp": (GCP, "Metadata-Flavor", "Google", 200, "TRUE" if server.notice else "FALSE"),
        }[server.cloud]
        if server.broken_answers:
            server.broken_answers -= 1
            self.say(500, "not now") if server.broken_answers > 1 else self.wfile.write(b"no HTTP\r\n\r\n")
        elif self.path != path:
            self.say(404, "")
        else:
            self.say(*((code, text) if self.headers[header] == value else (403, "")))

    def say(self, code, text):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def metadata(cloud):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.cloud, server.notice, server.asked, server.broken_answers = cloud, "", 0, 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            yield server
        finally:
            server.shutdown()


def aws_words(seconds):
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})


@pytest.fixture
def ray_words(tmp_path, monkeypatch):
    """Puts a stand-in of `ray` first into the path; returns what it was called with, a list for each call."""
    script = tmp_path / "bin" / "ray"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >> {tmp_path}/words; echo >> {tmp_path}/words\n'
        f"[ -e {tmp_path}/refuse ] && rm {tmp_path}/refuse && echo no head >&2 && exit 1; exit 0\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: [line.split("\0")[:-1] for line in (tmp_path / "words").read_text().splitlines()]


@contextlib.contextmanager
def started(*words, **more):
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", **more}
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen([SCRIPT, *words], env=environment, stdout=pipe, stderr=both, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def call(*words, **more):
    with started(*words, **more) as process:
        return finish(process)


def deadline(words):
    return int(words[words.index("--deadline-remaining-seconds") + 1])


@pytest.mark.slow
@pytest.mark.parametrize(("cloud", "notice_s"), [("aws", 110), ("gcp", 30)])
def test_a_notice_drains_the_node_as_preempted_with_a_deadline_below_the_notice(cloud, notice_s, ray_words):
    with (
        metadata(cloud) as server,
        started("10.0.0.1:6379", NODE, CARFT_RAY_METADATA_URL=server.url) as process,
    ):
        server.broken_answers = 4  # it keeps watching
        cluster.wait_until(lambda: server.asked >= 6, "it goes on asking", 60)
        assert process.poll() is None
        server.notice = aws_words(notice_s) if cloud == "aws" else "yes"
        code, output = finish(process)
    assert code == 0, output
    [words] = ray_words()
    assert words[:5] == ["drain-node", "--address", "10.0.0.1:6379", "--node-id", NODE]
    assert words[5:7] == ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert notice_s / 2 < deadline(words) <= notice_s - 5
    assert 1 <= output.count(" 500 ") <= 2, "told once, not at every question"
    assert f"node {NODE} is drained" in output


@pytest.mark.slow
def test_an_aws_notice_without_a_time_counts_as_two_minutes(ray_words):
    with metadata("aws") as server:
        server.notice = json.dumps({"action": "hibernate"})
        code, output = call("auto", NODE, CARFT_RAY_METADATA_URL=server.url)
    assert code == 0, output
    assert 60 < deadline(ray_words()[0]) <= 115


@pytest.mark.slow
def test_a_drain_that_fails_is_tried_again_until_the_machine_is_gone(tmp_path, ray_words):
    (tmp_path / "refuse").touch()
    code, output = call("--now", "8", "auto", NODE)
    assert (code, "cannot drain" in output) == (0, True)
    first, second = ray_words()
    assert first[0] == second[0] == "drain-node"
    assert 1 <= deadline(second) <= deadline(first) <= 3
    (tmp_path / "bin" / "ray").write_text("#!/bin/sh\nexit 1\n")
    assert call("--now", "2", "auto", NODE)[0] == 5


@pytest.mark.slow
def test_a_hook_drains_at_once_and_holds_the_node_up(ray_words):
    began = time.monotonic()
    assert call("--now", "7", "auto", NODE)[0] == 0
    assert time.monotonic() - began >= 6
    [words] = ray_words()
    assert 1 <= deadline(words) <= 2


@pytest.mark.parametrize("words", [["--now"], ["--now", "soon"], ["--provider", "aws"]])
def test_wrong_words_are_refused(words):
    code, output = call(*words)
    assert (code, "usage: spot.sh" in output) == (2, True)


@pytest.mark.nodes
def test_a_real_node_finds_its_name_and_is_drained():
    """By the command alone, as the hook of a pod calls it; a node without work that is drained ends by itself."""
    with cluster.head() as head:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        node_id = head.node_id
        code, output = call("--now", "20", head.address, **{**head.environment, "PATH": path})
        assert code == 0, output
        assert f"node {node_id} is drained" in output
