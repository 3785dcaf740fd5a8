"""Waits until nodes that were started one by one have joined their cluster, for scripts that then start a search.

python -m carft_ray.launch.ray_cluster.joined 4 --address HOST:6379
"""

import argparse
import logging
import socket
import sys
import time
from collections.abc import Sequence

EVERY_S = 1.0
CONNECT_TIMEOUT_S = 5.0


def num_joined(address: str) -> int:
    """Returns how many nodes of a cluster are alive; 0 while its head does not answer."""
    import ray

    from carft_ray.launch.ray_cluster.cluster import nodes_alive

    try:
        if not ray.is_initialized():
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()  # Ray would try for minutes
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return len(nodes_alive())
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError):
        ray.shutdown()
        return 0


def main(words: Sequence[str] | None = None) -> int:
    """Waits; returns 0 when the nodes are there, 5 when they are not in time."""
    parser = argparse.ArgumentParser(prog="python -m carft_ray.launch.ray_cluster.joined", description=__doc__)
    parser.add_argument("number", type=int, help="nodes, the head included")
    parser.add_argument("--address", required=True, help="of the cluster, host:port")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds to wait")
    given = parser.parse_args(words)
    end = time.monotonic() + given.timeout
    while (number := num_joined(given.address)) < given.number:
        if time.monotonic() > end:
            sys.stderr.write(f"{number} of {given.number} nodes have joined within {given.timeout:g} s\n")
            return 5
        time.sleep(EVERY_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
