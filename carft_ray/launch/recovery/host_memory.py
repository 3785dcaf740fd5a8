"""A machine whose memory is full: told apart from other ends of a process, with what to do.

Ray's memory monitor ends tasks and actors before the kernel does, and says so (``ray.exceptions.OutOfMemoryError``,
whose text Ray Train and Tune pass on). The kernel's own kill leaves no word.
"""

import re

from carft_ray.learning.memory import TEXTS

# "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 1f2e) was
# 27.63GB used / 28.80GB limit (0.959)"; before Ray 2.56 without "used" and "limit"
MONITOR = re.compile(
    r"running low on memory.{0,40}Memory on the node \(IP: (?P<node>[^,)\s]+)[^)]*\).{0,200}?was "
    r"(?P<used>[\d.]+ ?[KMGT]?B)(?: used)? / (?P<limit>[\d.]+ ?[KMGT]?B)",
    re.DOTALL,
)
# what an attempt says that met it by itself: Python, NumPy, torch
OWN = re.compile("|".join([r"\bMemoryError\b", r"\bOutOfMemoryError\b", *map(re.escape, TEXTS)]))
FULL = "no memory was left on"
STEP = "fewer trials at a time (search.max_concurrent_trials) or a smaller evaluate.batch_size take less"


def host_memory(text: str) -> str:
    """Returns in one line that memory was full and what helps, from the text of an error; empty for another error."""
    if is_full_memory(text):
        return text
    if found := MONITOR.search(text):
        where = f"{FULL} node {found['node']} ({found['used']} of {found['limit']} used): Ray's memory monitor ended it"
    elif "running low on memory" in text:
        where = f"{FULL} its node: Ray's memory monitor ended it"
    elif OWN.search(text):
        line = next(line for line in reversed(text.strip().splitlines()) if OWN.search(line))
        where = f"{FULL} its machine: {line.strip()[:200]}"
    else:
        return ""
    return f"{where}; {STEP}"


def is_full_memory(reason: str) -> bool:
    """Tells whether a reason is one of ``host_memory``."""
    return reason.startswith(FULL)
