"""Watches on a spot node for the notice that the cloud takes it back, and drains the node: trainings leave in time.

    python -m carft_ray.launch.ray_cluster.spot --provider aws      # beside `ray start`, on every spot node
    python -m carft_ray.launch.ray_cluster.spot --now 25            # the notice is known: a hook of Kubernetes

AWS gives two minutes (IMDSv2, ``spot/instance-action``), GCP half a minute (``instance/preempted``). Upon a notice the
node is drained by ``ray drain-node`` with the reason PREEMPTION and a deadline below the notice. SIGTERM to
``ray start --block`` would do the same in new releases of Ray only, ends the node after 30 s whatever the notice, and
nodes that ``ray up`` starts have no such process.
"""

import argparse
import contextlib
import http.client
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

BASE_URL = "CARFT_RAY_METADATA_URL"  # environment: another address of the metadata service
DEFAULT_BASE_URL = "http://169.254.169.254"  # of both clouds
ANSWER_TIMEOUT_S = 2.0
DRAIN_TIMEOUT_S = 30.0
EVERY_S = 2.0  # AWS asks for 5 s or less, and GCP's notice is short
RETRY_S = 1.0  # of a drain that failed
AWS_NOTICE_S, GCP_NOTICE_S = 120.0, 30.0
MARGIN_S = 5.0  # the machine may be gone a little before its time

log = logging.getLogger("carft_ray.spot")


def aws_notice(base_url: str) -> float | None:
    """Returns the seconds that AWS leaves this machine; None while there is no notice.

    Raises:
        OSError: The metadata service does not answer as that of AWS.
        ValueError: It answers something else.
    """
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _answer(f"{base_url}/latest/api/token", lifetime, "PUT")
    try:
        headers = {"X-aws-ec2-metadata-token": token}
        notice = json.loads(_answer(f"{base_url}/latest/meta-data/spot/instance-action", headers))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    at = notice.get("time") if isinstance(notice, dict) else None
    if not isinstance(at, str):
        return AWS_NOTICE_S
    return min(AWS_NOTICE_S, (datetime.fromisoformat(at) - datetime.now(UTC)).total_seconds())


def gcp_notice(base_url: str) -> float | None:
    """Returns the seconds that GCP leaves this machine; None while there is no notice.

    Raises:
        OSError: The metadata service does not answer as that of GCP.
    """
    answer = _answer(f"{base_url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if answer.strip().upper() == "TRUE" else None


NOTICES: dict[str, Callable[[str], float | None]] = {"aws": aws_notice, "gcp": gcp_notice}


def _answer(url: str, headers: dict[str, str], method: str = "GET") -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of a proxy
    with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=ANSWER_TIMEOUT_S) as answer:
        content: bytes = answer.read(10_000)
    return content.decode(errors="replace")


def wait_for_notice(providers: Sequence[str], base_url: str, every_s: float = EVERY_S) -> float:
    """Waits for a notice, through whatever errors; each new kind of error is logged once.

    Args:
        providers: Clouds that are asked in turn.
        base_url: Of their metadata service.
        every_s: Seconds between questions.

    Returns:
        The seconds that the machine has left.
    """
    told: dict[str, str] = {}
    while True:
        for provider in providers:
            try:
                left_s = NOTICES[provider](base_url)
                fault = ""
            except (OSError, ValueError, http.client.HTTPException) as error:
                left_s, fault = None, f"{type(error).__name__}: {error}"
            if left_s is not None:
                return left_s
            if fault != told.get(provider, ""):
                log.warning("%s: %s", provider, fault or "answers again")
            told[provider] = fault
        time.sleep(every_s)


def own_node_id(address: str) -> str:
    """Returns Ray's name of the node on which this process runs; waits for the node to join.

    ``ray drain-node`` without a name starts a Ray of its own where it finds none (seen in 2.60), and Ray's listing of
    nodes needs the dashboard, which answers on the head alone. So this process joins for a moment as a driver.

    Args:
        address: Of the cluster, ``host:port`` or ``auto``.
    """
    import ray

    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            node_id: str = ray.get_runtime_context().get_node_id()
            return node_id
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            log.warning("no node of Ray here yet: %s", str(error).strip().partition("\n")[0])
            time.sleep(EVERY_S)
        finally:
            ray.shutdown()


def drain(node_id: str, address: str, left_s: float, why: str) -> bool:
    """Drains a node as one that is preempted, and tries again while the machine is there.

    Args:
        node_id: Ray's name of the node.
        address: Of the cluster.
        left_s: Seconds that the machine has left.
        why: For Ray's log.

    Returns:
        Whether Ray took it.
    """
    end = time.monotonic() + left_s
    while True:
        deadline_s = max(1, int(end - time.monotonic() - MARGIN_S))
        command = ["ray", "drain-node", "--address", address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", why]
        command += ["--deadline-remaining-seconds", str(deadline_s)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DRAIN_TIMEOUT_S)
            fault = (done.stderr.strip() or done.stdout.strip() or "no reason given") if done.returncode else ""
        except (OSError, subprocess.SubprocessError) as error:
            fault = str(error)
        if not fault:
            log.warning("%s: node %s is drained, with %d s to leave", why, node_id, deadline_s)
            return True
        log.error("cannot drain node %s: %s", node_id, fault.splitlines()[-1])
        if time.monotonic() + RETRY_S >= end:
            return False
        time.sleep(RETRY_S)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the watcher until a notice has come.

    Returns:
        0 when the node was drained, 5 when Ray did not take it before the end.
    """
    parser = argparse.ArgumentParser(prog="python -m carft_ray.launch.ray_cluster.spot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--provider", choices=[*NOTICES, "auto"], default="auto", help="the cloud; auto asks both")
    which.add_argument("--now", type=float, metavar="S", help="drain at once and wait; this many seconds are left")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS") or "auto", help="of the cluster, host:port")
    parser.add_argument("--node-id", help="Ray's name of this node; needed where several run on one machine")
    parser.add_argument("--every", type=float, default=EVERY_S, metavar="S", help="seconds between questions")
    given = parser.parse_args(words)
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s spot: %(message)s", level=logging.INFO)

    node_id = given.node_id or own_node_id(given.address)
    if given.now is not None:
        end = time.monotonic() + given.now
        drained = drain(node_id, given.address, given.now, "this node must leave")
        time.sleep(max(0.0, end - time.monotonic()))  # the hook holds the node up; it ends sooner when it is empty
        return 0 if drained else 5
    base_url = os.environ.get(BASE_URL, DEFAULT_BASE_URL).rstrip("/")
    providers = tuple(NOTICES) if given.provider == "auto" else (given.provider,)
    log.info("watching for a notice to node %s (%s)", node_id, ", ".join(providers))
    left_s = wait_for_notice(providers, base_url, given.every)
    log.warning("notice: %.0f s are left", left_s)
    return 0 if drain(node_id, given.address, left_s, "spot notice") else 5


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
