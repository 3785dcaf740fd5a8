"""Fuzzing: inputs of strangers, damaged at random, through ``doctor``, a search of one trial, and ``report``.

    python tests/fuzz.py --cases 10000 --seed 0             all kinds, on two processes; prints a table
    python tests/fuzz.py --kind study --cases 1000          one kind
    python tests/fuzz.py --kind tar --case 1234 --seed 0    one case, with what it printed; its folder stays

What a case must end in stands in CONTRIBUTING.md; a training that fails by an exception of Python is a finding, too.
A study goes through the commands of ``mutated_studies``, whatever the one before has ended in.
All is imported once, and each case runs in a fork of its own. What costs time and hardly depends on the input is made
cheap: the figure is drawn for recipes and each tenth case, nothing is flushed to disk, and the cache begins with what
all cases share: images of ``id_val``, and heads of the model.
"""

import argparse
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "COLUMNS": "200"}

import crash_host  # noqa: E402
import mutated_studies  # noqa: E402
import mutations  # noqa: E402

KINDS = ("recipe", "study", *mutations.KINDS)
CPU_S, WALL_S = 40, 240  # of a case; a sound one takes half a second of a free core
MEMORY = 3 * 2**30  # bytes of addresses above those of the parent
FILE_SIZE = 2**28
CODES, ELSE = range(2, 9), "anything else"
COMMANDS = (
    ("doctor", "recipe.yaml"),
    (
        *("search", "recipe.yaml", "--study", "study", "--executor", "debug"),
        *("--set", "search.trials=1", "--set", "train.epochs=1", "--set", "search.baselines={}"),
        *("--set", "train.compile=false", "--set", "tracking.wandb=null"),  # these keys ask for programs
    ),
    ("report", "study"),
    ("report", "study", "--json"),
)
BEGUN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
BEGUN += ("socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class")
CHANGES = ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod")
FAILED = re.compile(r"failed in this way: (?P<name>\w*(?:Error|Exception|Interrupt|Warning|Exit|Iteration))\b")


def import_everything(base):
    """Writes the samples and the cache in a fork, and imports what a whole case has imported there."""
    crash_host.import_everything()
    code, said = crash_host.run(SimpleNamespace(call=try_a_sound_case), {"argv": (base,)}, base)
    if code:
        raise SystemExit(said)
    for name in (base / "modules.txt").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    from carft_ray import environment

    code = environment.code()  # asks git
    environment.code = lambda: code
    assert platform.uname().processor is not None  # asks a program, once
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) <= 2, "a fork of a process with threads may hang"  # and jemalloc's own


def try_a_sound_case(argv):
    """Writes the samples, and runs a sound case with a cache for all."""
    (base,) = argv
    mutations.write_samples(base)
    os.environ["MPLCONFIGDIR"] = str(base / "matplotlib")
    (base / "try").mkdir()
    os.chdir(base / "try")
    Path("recipe.yaml").write_text(json.dumps(mutations.recipe_value(base)))
    codes = [crash_host.call(words) for words in COMMANDS]
    mutated_studies.quicken()
    mutated_studies.write_samples(base)
    more = ("confirm", "study", "--seeds", "2", "--executor", "debug"), ("export", "study", "--to", "exported")
    codes += [crash_host.call(words) for words in (*more, ("compare", "study", "study"))]
    (base / "modules.txt").write_text("\n".join(sys.modules))
    return max(codes)


def watch(here, tell):
    """Tells of programs, connections, pickles, and changes outside of a folder, from now on in this process."""
    canary = str(here.parent / mutations.CANARY)
    inside = (f"{here}/", "/dev/null", "/proc/self/task/", f"/proc/{os.getpid()}/")

    def is_outside(path):
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        path = os.path.realpath(os.fsdecode(path))
        return path != str(here) and not path.startswith(inside)

    def hook(event, given):
        if event == "open":
            path, mode, flags = given
            if isinstance(path, str | bytes) and os.path.realpath(os.fsdecode(path)).startswith(canary):
                tell(f"opened {path!r}")
            changes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else flags & 3 != os.O_RDONLY
            if changes and is_outside(path):
                tell(f"opened for writing {path!r}")
        elif event in CHANGES:
            if outside := [path for path in given if is_outside(path)]:
                tell(f"{event} {outside}")
        elif event in BEGUN:
            tell(f"{event} {given!r}"[:300])

    sys.addaudithook(hook)


def call(argv):
    """Runs a case in this process, a fork of ``crash_host``; prints a line of JSON for each thing to know."""
    kind, number, seed, base = argv
    here, printed = Path.cwd(), os.dup(1)

    def tell(what, value):
        os.write(printed, json.dumps([what, value]).encode() + b"\n")

    os.dup2(os.open(here.parent / "output", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    (here / "tmp").mkdir()
    shutil.copytree(base / "cache", here / "cache")
    os.environ |= {"XDG_CACHE_HOME": str(here / "cache"), "TMPDIR": str(here / "tmp"), "HOME": str(here)}
    os.environ["MPLCONFIGDIR"] = str(base / "matplotlib")
    tempfile.tempdir = None
    sys.dont_write_bytecode = True  # of a module that no case has imported before
    tell("phase", "making the case")
    mutations.write_case(kind, number, seed, here, base)
    commands = COMMANDS
    if kind == "study":
        mutated_studies.quicken()
        commands = mutated_studies.commands(here)
    if kind != "recipe" and number % 10:
        from carft_ray.results import figure

        figure._draw = lambda study: None
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.alarm(WALL_S)
    watch(here, lambda text: tell("did", text))
    for words in commands:
        tell("phase", " ".join(words))
        begin = os.lseek(1, 0, os.SEEK_CUR)
        code = crash_host.call(words)
        sys.stdout.flush()
        sys.stderr.flush()
        tell("code", code)
        with open(here.parent / "output", errors="replace") as file:
            file.seek(begin)
            said = file.read()
        if wrong := judged(code, said, words):
            tell("wrong", f"{' '.join(words)}: {wrong}")
        if code and kind != "study":
            break
    return 0


def judged(code, said, words):
    """Returns what is wrong with the end of a command; empty where it is a result, or one message with its code."""
    for sign in ("Traceback (most recent call last)", "internal error", "Internal error", "Fatal Python error"):
        if sign in said:
            return next(line for line in said.splitlines() if sign in line) + " " + said.strip().splitlines()[-1]
    if failed := FAILED.search(said):
        return f"a training failed: {said[failed.start() :].splitlines()[0]}"
    if code and code not in CODES:
        return f"exit code {code}"
    if code and len(re.findall(r"^error: ", said, re.MULTILINE)) != 1:
        return f"exit code {code} without one message"
    if not code and "--json" in words:
        json.loads(said[re.search(r"^[\[{]", said, re.MULTILINE).start() :])
    return ""


def work(case, seed, folder, is_kept):
    """Runs a case in a fork; returns its kind, ``result``, its exit code or ``ELSE``, and its seconds of processor.

    What is wrong is told; its folder stays.
    """
    (kind, number), lane = case, folder / f"lane-{os.getpid()}"
    here, canary = lane / "case", lane / mutations.CANARY
    here.mkdir(parents=True)
    canary.mkdir()
    (canary / "x").write_text("precious")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, told = crash_host.run(sys.modules[__name__], {"argv": (kind, number, seed, folder / "samples")}, here)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = [json.loads(line) for line in told.splitlines()]
    phase = next((value for what, value in reversed(facts) if what == "phase"), "start")
    wrong = [str(value) for what, value in facts if what in ("wrong", "did")]
    if status in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        wrong.append(f"hangs: {CPU_S} s of processor, or {WALL_S} s")
    elif status:
        ended = (lane / "output").read_text(errors="replace").strip().splitlines()
        wrong.append(f"died of {signal.Signals(-status).name if status < 0 else ended[-1]}")
    there = {path.name: path.read_text() for path in canary.iterdir()}
    if there != {"x": "precious"} or {path.name for path in lane.iterdir()} - {"output"} != {"case", mutations.CANARY}:
        wrong.append(f"left something outside of its folder: {sorted(there)}, {sorted(os.listdir(lane))}")
    codes = [value for what, value in facts if what == "code"]
    outcome = ELSE if wrong else str(max(codes) or "result")
    if wrong:
        print(f"--kind {kind} --case {number} --seed {seed}: {phase}: {'; '.join(wrong)}"[:2000], flush=True)
    if wrong or is_kept:
        lane.rename(folder / "found" / f"{kind}-{number}")
    else:
        shutil.rmtree(lane)
    return kind, outcome, used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime


def run(cases, seed, folder, num_lanes=2):
    """Runs cases on some processes; returns the rows of ``work``."""
    (folder / "samples").mkdir(parents=True)
    (folder / "found").mkdir()
    import_everything(folder / "samples")
    with multiprocessing.get_context("fork").Pool(num_lanes) as pool:
        return pool.map(partial(work, seed=seed, folder=folder, is_kept=len(cases) == 1), cases, chunksize=1)


def table(rows):
    heads = ["result", *map(str, CODES), ELSE]
    lines = [f"{'kind':<8} {'cases':>6} {' '.join(f'{head:>6}' for head in heads)}  processor, s"]
    for kind in (*dict.fromkeys(row[0] for row in rows), "all"):
        mine = [row[1:] for row in rows if kind in (row[0], "all")]
        counts = Counter(outcome for outcome, _ in mine)
        numbers = " ".join(f"{counts[head]:>{max(6, len(head))}}" for head in heads)
        lines.append(f"{kind:<8} {len(mine):>6} {numbers}  {sum(took for _, took in mine):>12.0f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000, help="in all, equally many of each kind")
    parser.add_argument("--kind", choices=KINDS, help="one kind alone")
    parser.add_argument("--case", type=int, help="with --kind: one case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="processes that run cases side by side")
    given = parser.parse_args()
    kinds = (given.kind,) if given.kind else KINDS
    numbers = range(-(-given.cases // len(kinds))) if given.case is None else (given.case,)
    cases = [(kind, number) for number in numbers for kind in kinds]
    folder = Path(tempfile.mkdtemp(prefix="carft-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    rows = run(cases, given.seed, folder, given.lanes)
    print(table(rows))
    if given.case is not None:
        print((folder / "found" / f"{given.kind}-{given.case}" / "output").read_text(errors="replace"))
    wrong = any(outcome == ELSE for _, outcome, _ in rows)
    if wrong or given.case is not None:
        print(f"folders of cases: {folder / 'found'}")
    else:
        shutil.rmtree(folder)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
