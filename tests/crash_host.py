"""Runs many trainings of the command line in forks of one process that has imported everything once.

    python crash_host.py FOLDER JOBS      JOBS: a JSON file, see ``Job``

Each job is a list of command lines, one fork each, in the folder of the job. A command line can be told to end at a
durable operation: an append, a flush to disk (fsync) or a rename, counted from 1. The counting wrappers live here, the
program knows nothing of them. Output of the forks goes to ``log-<k>.txt`` beside what they write.
"""

import builtins
import io
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

LANES = 2


class Counter:
    """Counts durable operations and ends this process at one of them.

    Args:
        number: The operation; 0: none.
        moment: "before" it, "after" it, or "torn": an append of which half was written.
    """

    def __init__(self, number=0, moment="after"):
        self.number, self.moment, self.kinds = number, moment, []

    def operation(self, kind, do, tear=None):
        self.kinds.append(kind)
        here = len(self.kinds) == self.number
        if here and self.moment == "torn":
            tear()
        if here and self.moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = do()
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def install(self):
        counter, plain_open = self, open

        class AppendFile(io.FileIO):
            def write(self, data):
                data = bytes(data)
                write = super().write
                return counter.operation("append", lambda: write(data), lambda: write(data[: len(data) // 2]))

        def counting_open(file, mode="r", *args, **kwargs):
            if "a" not in mode:
                return plain_open(file, mode, *args, **kwargs)
            assert "b" in mode, "durable appends are made of bytes"
            raw = AppendFile(file, mode.replace("b", ""))
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

        builtins.open = counting_open
        for name in ("fsync", "rename", "replace"):
            plain = getattr(os, name)

            def wrapped(*args, plain=plain, name=name, **kwargs):
                return counter.operation(name, lambda: plain(*args, **kwargs))

            setattr(os, name, wrapped)


def interrupt_at_read(part, number):
    """Sends this process SIGINT, as Ctrl-C does, when it opens a file with ``part`` in its path for the n-th time."""
    plain_open, seen = builtins.open, []

    def counting_open(file, *args, **kwargs):
        if part in str(file):
            seen.append(file)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGINT)
        return plain_open(file, *args, **kwargs)

    builtins.open = counting_open


def run(command, folder, log):
    """Runs one command line in a fork; returns its exit code, negative for a signal."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 70
    try:
        with builtins.open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        counter = Counter(*command.get("kill", ()))
        counter.install()
        if "interrupt" in command:
            interrupt_at_read(*command["interrupt"])
        if "file_size" in command:
            resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_size"],) * 2)
        code = call(command["argv"])
        if "count_to" in command:
            Path(command["count_to"]).write_text(json.dumps(counter.kinds))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def call(argv):
    """Calls the command line as the console script does; returns its exit code."""
    from carft_ray import cli

    sys.argv = ["carft-ray", *argv]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def work(jobs, folder):
    """Does some jobs; each answers ``codes.json`` in its folder."""
    for job in jobs:
        place = folder / job["name"]
        place.mkdir()
        codes = []
        for number, command in enumerate(job["commands"]):
            codes.append(run(command, place, place / f"log-{number}.txt"))
            if codes[-1] == 2 and "--resume" in command["argv"]:  # the kill came before there was a training
                begin = {**command, "argv": [word for word in command["argv"] if word != "--resume"]}
                codes[-1] = run(begin, place, place / f"log-{number}.txt")
        (place / "codes.json").write_text(json.dumps(codes))


def main():
    import pandas  # noqa: F401 (pyarrow imports it when it first meets NumPy)
    import torch

    import carft_ray.console
    import carft_ray.data.sandbox
    import carft_ray.evaluation.run
    import carft_ray.launch.single
    import carft_ray.progress  # noqa: F401

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    jobs = json.loads(Path(sys.argv[2]).read_text())
    threads = [Path(f"/proc/self/task/{number}/comm").read_text().strip() for number in os.listdir("/proc/self/task")]
    known = ["jemalloc_bg_thd"]  # the allocator of pyarrow, which takes care of forks itself
    assert len([name for name in threads if name not in known]) == 1, "a fork of a process with threads may hang"
    lanes = []
    for lane in range(LANES):
        lanes.append(os.fork())
        if not lanes[-1]:
            work(jobs[lane::LANES], folder)
            os._exit(0)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(lane, 0)[1]) != 0 for lane in lanes))


if __name__ == "__main__":
    main()
