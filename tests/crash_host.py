"""Runs many command lines in forks of one process that has imported everything once.

    python crash_host.py FOLDER [MODULE]    each line of standard input is a list of jobs in JSON; answered "done"

The program is that of a module with ``import_everything()`` and ``call(argv)``; by default the command line.

A job is a name and a list of command lines, run one after the other in a folder of that name, one fork each. What can
happen to a command line:

    "kill": [n, moment, kind]    SIGKILL at its n-th durable operation: an append, a flush to disk (fsync), a link
                                 or a rename; with a kind, of these alone: each "link" is an object of a store, each
                                 "request" writes or removes objects of a bucket
    "interrupt": [part, [n..]]   SIGINT, as Ctrl-C sends it, when it opens the n-th file with this part in its path
    "file_size": bytes           no file can grow larger, as on a full disk
    "writes": "late"             a checkpoint is written by its thread when the training waits for it, else at once
    "cache": name                of the folder for the user's cache, beside the study; "cache" by default
    "tries": n                   it is run up to so many times while it ends with exit code 5

Operations of the command line have one order: so does what a driver writes (``order_posts``). A job answers
``answers.json`` in its folder: for each command line ``code``, ``log`` and the temporary files that it left
(``remains``). Tests start it with ``started``.
"""

import builtins
import contextlib
import gc
import importlib
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import obstore

HERE = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(HERE.parent), str(HERE)])  # the package and the tests
LANES = 2
KILLS_OF = int(os.environ.get("KILLS_OF", "10"))  # of so many kills a run of the tests makes one, another every day


def share(jobs):
    """Returns the jobs that are done today; all with ``KILLS_OF=1``, as ``make crash-points`` has it."""
    return jobs[date.today().toordinal() % KILLS_OF :: KILLS_OF]


@contextlib.contextmanager
def started(folder, *module, before=()):
    """Starts this program and gives a function that runs jobs and returns for each name its folder and its answers.

    The module may lie in the folder; ``before`` are words before the command.
    """
    environment = {**os.environ, "PYTHONPATH": f"{PYTHONPATH}:{folder}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*before, sys.executable, __file__, str(folder), *module]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def run(jobs):
            process.stdin.write(json.dumps(jobs) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            places = {job["name"]: folder / job["name"] for job in jobs}
            return {name: (place, json.loads((place / "answers.json").read_text())) for name, place in places.items()}

        yield run
        process.stdin.close()


class Counter:
    """Counts durable operations and ends this process at one of them.

    Args:
        number: The operation; 0: none.
        moment: "before" it, "after" it, or "torn": an append of which half was written.
        only: Kind of the operations that count; empty: all.
    """

    def __init__(self, number=0, moment="after", only=""):
        self.number, self.moment, self.only, self.kinds = number, moment, only, []

    def operation(self, kind, do, tear=None):
        if self.only not in ("", kind):
            return do()
        self.kinds.append(kind)
        here = len(self.kinds) == self.number
        if here and self.moment == "torn":
            tear()
        if here and self.moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return do()  # a link to what is there already raises
        finally:
            if here:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self):
        counter, plain_open = self, open

        class AppendFile(io.FileIO):
            def write(self, data):
                data = bytes(data)
                write = super().write
                return counter.operation("append", lambda: write(data), lambda: write(data[: len(data) // 2]))

        def counting_open(file, mode="r", *args, **kwargs):
            if "a" not in mode or "tfevents" in str(file):  # curves are no state
                return plain_open(file, mode, *args, **kwargs)
            assert "b" in mode, "durable appends are made of bytes"
            raw = AppendFile(file, mode.replace("b", ""))
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

        builtins.open = counting_open
        for name in ("fsync", "link", "rename", "replace"):
            plain = getattr(os, name)

            def wrapped(*args, plain=plain, name=name, **kwargs):
                if name == "fsync":  # counted, but not done: a kill loses nothing that is written, and disks are slow
                    return counter.operation(name, lambda: None)
                return counter.operation(name, lambda: plain(*args, **kwargs))

            setattr(os, name, wrapped)
        for name in ("put", "delete"):
            setattr(obstore, name, counter.wrap("request", getattr(obstore, name)))

    def wrap(self, kind, plain):
        return lambda *given, **more: self.operation(kind, lambda: plain(*given, **more))


def interrupt_at_open(part, numbers):
    """Sends this process SIGINT when it opens a file with ``part`` in its path for the n-th time, for each n."""
    seen = []

    def counting(plain_open):
        def counting_open(file, *args, **kwargs):
            if part in str(file):
                seen.append(file)
                if len(seen) in numbers:
                    os.kill(os.getpid(), signal.SIGINT)
            return plain_open(file, *args, **kwargs)

        return counting_open

    builtins.open, os.open = counting(builtins.open), counting(os.open)


def order_writes(late):
    """Has the threads that write checkpoints do so while the training waits: at once, or as late as they may."""
    plain = ThreadPoolExecutor.submit

    def submit(pool, *given, **named):
        if pool._thread_name_prefix != "checkpoint":
            return plain(pool, *given, **named)
        if late:  # it begins when its result is asked for
            return SimpleNamespace(done=lambda: False, result=lambda: plain(pool, *given, **named).result())
        future = plain(pool, *given, **named)
        wait([future])
        return future

    ThreadPoolExecutor.submit = submit


def run(program, command, folder):
    """Runs one command line in a fork; returns its exit code, negative for a signal, and what it printed."""
    readable, writable = os.pipe()
    process = os.fork()
    if process:
        os.close(writable)
        with open(readable, errors="replace") as file:
            log = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), log
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(writable, 1)
        os.dup2(writable, 2)
        os.close(readable)
        os.close(writable)
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / command.get("cache", "cache"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        counter = Counter(*command.get("kill", ()))
        counter.install()
        order_writes(command.get("writes") == "late")
        if "interrupt" in command:
            interrupt_at_open(*command["interrupt"])
        if "file_size" in command:
            resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_size"],) * 2)
        code = program.call(command["argv"])
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

    before, sys.argv = sys.argv, ["carft-ray", *map(str, argv)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def printed(capsys, *words):
    """Returns what a command line prints with --json."""
    capsys.readouterr()
    assert call([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def work(program, jobs, folder):
    """Does some jobs."""
    for job in jobs:
        place = folder / job["name"]
        place.mkdir(exist_ok=True)
        answers = []
        for command in job["commands"]:
            code, log = run(program, command, place)
            if code == 2 and "--resume" in command["argv"]:  # the kill came before there was a training
                begin = {**command, "argv": [word for word in command["argv"] if word != "--resume"]}
                code, log = run(program, begin, place)
            for _ in range(1, command.get("tries", 1)):
                code, log = run(program, command, place) if code == 5 else (code, log)
            remains = [str(path.relative_to(place)) for path in place.rglob("*.tmp")]
            answers.append({"code": code, "log": log, "remains": remains})
        (place / "answers.json").write_text(json.dumps(answers))


def order_posts():
    """Has the driver learn of each record at the next check for a stop, and write nothing by the clock."""
    from carft_ray.launch import driver
    from carft_ray.launch.workers import mailbox, worker

    plain, records = worker.Poster.record, mailbox.Exchange.records

    def record(poster, *given):
        plain(poster, *given)
        poster.post()

    worker.Poster.record = record
    mailbox.Exchange.records = lambda exchange, *given: exchange.now() or records(exchange, *given)
    driver.POLL_EVERY_S, driver.POLL_SHARE, driver.LIVE_EVERY_S = 0.0, 1.0, math.inf


def import_everything():
    """Loads what a training loads, and keeps the collector of garbage from touching all of it in every short fork."""
    order_posts()
    import optuna.samplers._tpe.sampler  # noqa: F401
    import packaging.requirements  # noqa: F401
    import pandas  # noqa: F401
    import PIL.Image
    import pyarrow.dataset  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    import carft_ray.cli
    import carft_ray.launch.command
    import carft_ray.recipe.rules
    import carft_ray.training.run
    import carft_ray.ui.progress  # noqa: F401

    PIL.Image.preinit()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.disable()


def main():
    program = importlib.import_module(sys.argv[2] if len(sys.argv) > 2 else __name__)
    program.import_everything()
    folder = Path(sys.argv[1])
    threads = [Path(f"/proc/self/task/{number}/comm").read_text().strip() for number in os.listdir("/proc/self/task")]
    known = ["jemalloc_bg_thd"]  # the allocator of pyarrow, which takes care of forks itself
    assert len([name for name in threads if name not in known]) == 1, "a fork of a process with threads may hang"
    for line in sys.stdin:
        jobs, lanes = json.loads(line), []
        for lane in range(min(LANES, len(jobs))):
            lanes.append(os.fork())
            if not lanes[-1]:
                work(program, jobs[lane::LANES], folder)
                os._exit(0)
        codes = [os.waitstatus_to_exitcode(os.waitpid(lane, 0)[1]) for lane in lanes]
        print("done" if not any(codes) else f"lanes ended with {codes}", flush=True)


if __name__ == "__main__":
    main()
