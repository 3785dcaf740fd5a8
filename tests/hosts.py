"""Command lines in processes of their own, each as on another machine, which may fall asleep at one of their writes.

    first = Host(folder, "one", words, environment, asleep=("before", "put best.yaml", 1))
    first.sleeps()
    assert Host(folder, "two", words, environment).ended() == 0
    first.wakes()
    assert first.ended() == 5

Their waits are a hundredth of the real ones, and trainings take milliseconds (``verbs_host.py``).
"""

import os
import re
import signal
import sys

import attempts
import crash_host
import killed_searches
import obstore
import verbs_host
from test_holding import move, state_of


class Host:
    """A command line as on another machine, with a folder of its own for cache and working directory.

    Args:
        folder: Of all machines.
        name: Of this one.
        words: The command line.
        environment: Variables, such as those of a bucket.
        asleep: When it gets SIGSTOP: "before" or "after", a pattern, and n: the n-th write ("put NAME" or "delete NAME"
            of a bucket, "link PATH" or "replace PATH" in a folder) that fits; None: never.
    """

    def __init__(self, folder, name, words, environment, asleep=None):
        self.place = folder / name
        self.place.mkdir(exist_ok=True)
        self.path = self.place / "output.txt"
        self.process = attempts.forked(_live, self.place, self.path, name, list(map(str, words)), environment, asleep)

    @property
    def output(self):
        return self.path.read_text() if self.path.exists() else ""

    def sleeps(self):
        """Waits until it is asleep; False: it has ended without."""
        pid = self.process.pid
        killed_searches.wait_until(lambda: not self.process.is_alive() or state_of(pid) == "T", "it sleeps")
        return self.process.is_alive()

    def wakes(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def ended(self):
        self.process.join(killed_searches.TIMEOUT_S)
        return self.process.exitcode


def _live(place, path, name, words, environment, asleep):
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(place)
    os.environ.update(environment, XDG_CACHE_HOME=str(place / "cache"))
    move(name)
    crash_host.order_posts()
    verbs_host.use_fast_trainings()
    if asleep is not None:
        fall_asleep(*asleep)
    sys.exit(crash_host.call(words))


def fall_asleep(moment, pattern, number):
    """Sends this process SIGSTOP around the n-th write of a kind and name: to a bucket, or a name that a file gets."""
    seen = []

    def wrap(kind, plain):
        def wrapped(first, second, *args, **kwargs):
            words = f"{kind} {second if isinstance(second, str | os.PathLike) else ' '.join(second)}"
            seen.extend([words] if re.search(pattern, words) else [])
            is_now = len(seen) == number and seen[-1] == words
            if is_now:
                seen.append(moment)  # no other one
            if is_now and moment == "before":
                os.kill(os.getpid(), signal.SIGSTOP)
            try:
                return plain(first, second, *args, **kwargs)
            finally:
                if is_now and moment == "after":
                    os.kill(os.getpid(), signal.SIGSTOP)

        return wrapped

    for module, kind in ((obstore, "put"), (obstore, "delete"), (os, "link"), (os, "replace")):
        setattr(module, kind, wrap(kind, getattr(module, kind)))
