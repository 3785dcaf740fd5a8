"""The watcher of spot notices against a stand-in of the metadata services, with a stand-in of the command `ray`."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import cluster
from carft_ray.launch.ray_cluster import spot

ROOT = Path(__file__).resolve().parents[1]
NODE = "ab" * 28
TOKEN = "a token of a minute"
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
            self.say(500, "not now") if server.broken_answers > 3 else self.wfile.write(b"no HTTP\r\n\r\n")
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
    monkeypatch.setattr(spot, "RETRY_S", 0.01)
    return lambda: [line.split("\0")[:-1] for line in (tmp_path / "words").read_text().splitlines()]


def deadline(words):
    return int(words[words.index("--deadline-remaining-seconds") + 1])


@pytest.mark.parametrize(("cloud", "provider", "notice_s"), [("aws", "auto", 110), ("gcp", "gcp", 30)])
def test_a_notice_drains_the_node_as_preempted_with_a_deadline_below_the_notice(cloud, provider, notice_s, ray_words):
    with metadata(cloud) as server:
        command = [sys.executable, "-m", "carft_ray.launch.ray_cluster.spot", "--provider", provider]
        command += ["--node-id", NODE, "--address", "10.0.0.1:6379", "--every", "0.05"]
        environment = {**os.environ, spot.BASE_URL: server.url, "http_proxy": "http://127.0.0.1:1"}
        environment["PYTHONPATH"] = str(ROOT)
        server.broken_answers = 8  # it keeps watching
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            cluster.wait_until(lambda: server.asked >= 13, "it goes on asking", 60)
            assert process.poll() is None
            server.notice = aws_words(notice_s) if cloud == "aws" else "yes"
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    [words] = ray_words()
    assert words[:5] == ["drain-node", "--address", "10.0.0.1:6379", "--node-id", NODE]
    assert words[5:7] == ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert notice_s / 2 < deadline(words) <= notice_s - spot.MARGIN_S
    clouds = 2 if (cloud, provider) == ("aws", "auto") else 1  # of those that got so far
    assert output.count("HTTP Error 500") == clouds  # told once, not at every question
    assert f"node {NODE} is drained" in output


def test_an_aws_notice_without_a_time_counts_as_two_minutes(ray_words):
    with metadata("aws") as server:
        assert spot.aws_notice(server.url) is None
        server.notice = json.dumps({"action": "hibernate"})
        assert spot.aws_notice(server.url) == spot.AWS_NOTICE_S
        server.notice = aws_words(3600)
        assert spot.aws_notice(server.url) == spot.AWS_NOTICE_S
        server.notice = "not JSON"
        with pytest.raises(ValueError, match="Expecting value"):
            spot.aws_notice(server.url)
        with pytest.raises(OSError, match="404"):
            spot.gcp_notice(server.url)


def test_a_drain_that_fails_is_tried_again_until_the_machine_is_gone(tmp_path, ray_words):
    (tmp_path / "refuse").touch()
    assert spot.drain(NODE, "auto", 60, "test")
    first, second = ray_words()
    assert first[0] == second[0] == "drain-node"
    assert deadline(second) <= deadline(first) <= 55
    (tmp_path / "bin" / "ray").write_text("#!/bin/sh\nexit 1\n")
    assert not spot.drain(NODE, "auto", 0.2, "test")


def test_a_hook_drains_at_once_and_holds_the_node_up(monkeypatch, ray_words):
    slept = []
    monkeypatch.setattr(spot.time, "sleep", slept.append)
    assert spot.main(["--now", "25", "--node-id", NODE]) == 0
    [words] = ray_words()
    assert deadline(words) <= 20
    assert 0 < slept[-1] <= 25


@pytest.mark.nodes
def test_a_real_node_finds_its_name_and_is_drained():
    """By the command alone, as the hook of a pod calls it; a node without work that is drained ends by itself."""
    with cluster.head() as head:
        environment = {**head.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [sys.executable, "-m", "carft_ray.launch.ray_cluster.spot", "--now", "20", "--address", head.address]
        node_id = head.node_id
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"node {node_id} is drained" in done.stdout
