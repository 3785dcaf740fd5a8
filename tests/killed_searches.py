"""Searches with a real Ray that are killed, for tests and for ``make kill-matrix``: drivers, clusters, invariants."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from subprocess import PIPE

import stand_in
from logs import commits, has_begun, operations

from carft_ray.study.holding import is_study
from carft_ray.study.place import pull
from carft_ray.study.running import begun, running_since
from carft_ray.study.snapshot import snapshot
from cluster import TIMEOUT_S, asked, environment, head, node, of_session, wait_until

HERE = Path(__file__).parent
RESOURCES = {
    "inline": {"executor": "inline"},
    "ray-train": {"executor": "ray-train", "num_workers": 2, "cpus_per_worker": 0.5},
}
EPOCHS = 4  # of search_driver.py
# eight trainings at a time on two cores, and no more on others
EIGHT = {"search": {"max_concurrent_trials": 8}, "num_workers": 1, "cpus_per_worker": 0.25}
# the same with real ones, whose values are the same in whatever order they end
REAL_SEARCH = {"train": {"batch_size": 8}, "sampler": {"name": "random", "seed": 1}, **EIGHT["search"]}
REAL = {**EIGHT, "search": REAL_SEARCH, "training": "carft_ray.launch.workers.worker"}
TITLES = {
    "trial": (b"ray::ImplicitFunc.train", b"ray::ResourceTrainable.train"),
    "mailbox": b"ray::Mailbox",
    "files": b"ray::FileServer",
}
CUT = {"pruner": {"name": "successive_halving", "first": 0.25}}
VALUES = {"learning_rate": 1e-3, "kl_weight": 1.0}
# real trainings of 8 epochs of 8 steps by two workers: a trial, and a baseline with its values
STRUCK = {
    "epochs": 8,
    "train": {"batch_size": 8},
    "evaluate": {"every_epochs": 1},
    "enqueue": [VALUES],
    "baselines": {"calm": VALUES},
}
# calls of each place of struck.py until the end of an epoch of them, at least; "curve" comes once, after the last epoch
CALLS = {"backward": 8, "all_reduce": 1, "broadcast": 3, "evaluation": 4, "checkpoint": 2}
CURVE = 5
COURSE = ("Preparing", "Started", "TrialEpoch", "TrialFinished")  # of a search, by its driver's events
NUM_MOMENTS = len(COURSE) + 1  # to kill a search: before any event, and after each; odd, as there are two executors
_drivers = []


def driver(
    study_dir, num_trials, executor="inline", address=None, auth=None, search=(), training="stand_in", **resources
):
    """Starts a search."""
    resources = {**RESOURCES.get(executor, {"executor": executor}), **resources}
    command = [sys.executable, str(HERE / "search_driver.py"), str(study_dir), str(num_trials)]
    command += [json.dumps(resources), address or "", json.dumps(dict(search)), training]
    return started(command, **(auth or {}))


def started(command, **variables):
    """Starts a program in a process group of its own."""
    how = {"stdout": PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    _drivers.append(subprocess.Popen(command, env=environment(**variables), **how))
    return _drivers[-1]


def chaotic(study_dir, num_trials, seed, executor, num_kills, **resources):
    """Searches with trials that diverge, raise, hang and die by themselves, and kills driver and Ray so often.

    Returns:
        Number of trials by outcome, which is that of the fate of each.
    """
    rng = random.Random(seed)
    fates = ["diverge", "raise", "raise_once", "hang_once", "die_once", *[""] * (num_trials - 5)]
    rng.shuffle(fates)
    modes = {str(number): fate for number, fate in enumerate(fates) if fate}
    stand_in.tell(study_dir.parent, seconds=0.2, **modes)
    more = {"search": CUT, "hang_timeout_s": 4, **resources}
    for number in range(num_kills):
        kill_after(driver(study_dir, num_trials, executor, **more), number, rng)
    finished(driver(study_dir, num_trials, executor, **more), TIMEOUT_S + 60 * num_trials)
    rows, expected = whole_trials(study_dir, num_trials), {"diverge": {"diverged"}, "raise": {"error"}}
    for row, fate in zip(rows, fates, strict=True):
        assert row.outcome in expected.get(fate, {"complete", "pruned"}), (row, fate)
    return Counter(row.outcome for row in rows)


def kill_drivers():
    """Kills what drivers a test that has failed leaves behind."""
    while _drivers:
        if (process := _drivers.pop()).poll() is None:
            kill_group(process)


def finish(process, timeout_s=TIMEOUT_S):
    """Waits for a driver; returns its exit code and its output."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise
    return process.returncode, output


def finished(process, timeout_s=TIMEOUT_S):
    """Waits for a driver that must end well; returns its output."""
    code, output = finish(process, timeout_s)
    assert code == 0, output
    return output


def kill_group(process):
    """Kills a driver and the Ray that it started, whose workers end with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def results(study_dir):
    """Contents of all ``result.json``, by name of the training."""
    return {path.parents[1].name: path.read_bytes() for path in study_dir.glob("*/*/*/result.json")}


def check(study_dir, num_trials, before=None):
    """Raises when a finished study is not what it would be had nothing disturbed it; ``before``: earlier results."""
    rows = whole_trials(study_dir, num_trials)
    assert len({row.name for row in rows}) == num_trials
    assert {row.outcome for row in rows + snapshot(study_dir).baselines} == {"complete"}, rows
    assert sorted(row.name for row in snapshot(study_dir).baselines) == ["plain", "zero_shot"]
    now = results(study_dir)
    assert now.keys() == {row.name for row in rows} | {"plain"}
    for row in rows:
        content = json.loads(now[row.name])
        points = [*content.get("curve", ()), content]
        assert row.objective in [point["objective"] for point in points if point.get("alpha") == row.alpha]
        lines = (study_dir / "trials" / row.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, EPOCHS + 1)), row.name
    changed = [name for name, content in (before or {}).items() if now[name] != content]
    assert changed == []
    best = snapshot(study_dir).best
    assert (best.place(study_dir) / "fine_tuned.safetensors").exists()
    assert not (study_dir / "_tune").exists()
    assert commits(study_dir)[-1]["records"] == [{"kind": "released"}]


def undisturbed(study_dir, num_trials, **search):
    """Searches with real trainings, one after the other in the process of the search; returns the study."""
    finished(driver(study_dir, num_trials, "debug", search={**REAL_SEARCH, **search}, training=REAL["training"]))
    return study_dir


def check_numbers(study_dir, calm):
    """Raises when a study has other trainings than an undisturbed one, or a bit of one of them is another."""
    studies = (study_dir, calm)
    found, wanted = ({row.name: (study, row) for row in searched(study)} for study in studies)
    assert found.keys() == wanted.keys()
    for name, pair in found.items():
        check_same(pair, wanted[name])


def searched(study_dir):
    """Returns the trials of a study, repeats of baselines among them."""
    now = snapshot(study_dir)
    return [*now.trials, *now.repeats]


def check_same(*pairs):
    """Raises when two trainings, each a study and its row, differ in numbers, weights or predictions."""
    (one, row), (other, another) = pairs
    (result, lines), (wanted, expected) = numbers_of(one, row), numbers_of(other, another)
    differing = {key: (result.get(key), wanted.get(key)) for key in {*result, *wanted}}
    differing = {key: values for key, values in differing.items() if values[0] != values[1]}
    assert differing == {}, f"{row.name}: {differing}"
    assert lines == expected, f"{row.name}: {lines} instead of {expected}"
    for name in ("fine_tuned.safetensors", "predictions/validation.parquet"):
        first, second = (each.place(study) / name for study, each in pairs)
        if first.exists() and second.exists():  # the search has removed those of trials that are not the best
            assert first.read_bytes() == second.read_bytes(), first


def whole_trials(study_dir, num_trials):
    """Returns the trials of a study that has ended; raises when one is missing, was told twice or is half written."""
    rows = snapshot(study_dir).trials
    assert [row.number for row in rows] == list(range(num_trials)), rows
    check_told_once(study_dir)
    assert list(study_dir.rglob("*.tmp")) == []
    return rows


def check_told_once(study_dir):
    """Raises when the log ends a trial twice."""
    lines = operations(study_dir)
    ended = Counter(line["trial_id"] for line in lines if line["op_code"] == 6 and line["state"] in (1, 2, 3))
    assert set(ended.values()) == {1}, ended


def write_strikes(base_dir, num_kills, rng, num_trials=1):
    """Plans the deaths of workers, as ``struck.py`` has it, rank 0 and 1 in turn, in all places in turn.

    The last ones come in the alpha curve, every second one after a checkpoint of its attempt.
    """
    num_curves, plans = max(1, num_kills // (len(CALLS) + 1)), [[] for _ in range(num_trials)]
    places = (rng.sample(sorted(CALLS), len(CALLS)) * num_kills)[: num_kills - num_curves] + ["curve"] * num_curves
    first = 0 if "checkpoint" in places else rng.randrange(2)  # rank 0 writes it
    for number, place in enumerate(places):
        earlier = number % 2 * CALLS.get(place, 0)
        strike = {
            "rank": 0 if place == "checkpoint" else (first + number) % 2,
            "place": place,
            "calls": earlier + rng.randint(1, CALLS.get(place, CURVE)),
        }
        delay_s = rng.choice((0, rng.uniform(0, 0.03)))
        if (place, strike["calls"]) == ("curve", CURVE):
            delay_s = 0  # the training may end before
        plans[number % num_trials].append({**strike, "delay_s": delay_s})
    for trial, plan in enumerate(plans):
        (base_dir / "strikes" / f"t{trial:04d}").mkdir(parents=True)
        for number, strike in enumerate(plan, start=1):
            (base_dir / "strikes" / f"t{trial:04d}" / f"{number:02d}.json").write_text(json.dumps(strike))
    return plans


def kill_workers(folder, num_kills, rng, num_trials=1, **resources):
    """Trains trials for real with two workers each, of which so many die, and the same in peace beside them.

    All have the same values, so that each must end bit for bit as the baseline that is left in peace.
    """
    plans, study_dir = write_strikes(folder / "base", num_kills, rng, num_trials), folder / "study"
    print(*plans, sep="\n", flush=True)
    space = {name: {"type": "categorical", "choices": [value]} for name, value in VALUES.items()}
    search = {**STRUCK, **EIGHT["search"], "space": space, "enqueue": []}
    process = driver(study_dir, num_trials, "ray-train", search=search, training="struck", **resources)
    finished(process, TIMEOUT_S + 60 * num_kills)
    rows = whole_trials(study_dir, num_trials)
    calm = next(row for row in snapshot(study_dir).baselines if row.name == "calm")
    left = sorted((folder / "base" / "strikes").rglob("*.json"))
    assert left == [], f"planned, but not met: {left}"
    assert {row.outcome for row in (*rows, calm)} == {"complete"}, rows
    for row, plan in zip(rows, plans, strict=True):
        assert row.attempt > len(plan)
        check_same((study_dir, row), (study_dir, calm))
        log = (row.folder(study_dir) / "log.txt").read_text()
        dead = re.findall(r"lost: rank (\d)", log)
        assert list(map(int, dead)) == [strike["rank"] for strike in plan], log
        for attempt in log.split(": starts on ")[1:]:  # what follows from a death stands below it
            assert "Traceback" not in attempt.partition(": lost: ")[0], attempt


def numbers_of(study_dir, row):
    """Returns the content of ``result.json`` and ``metrics.jsonl`` of a training, less how long things took."""
    rows = [json.loads(line) for line in (row.folder(study_dir) / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((row.place(study_dir) / "result.json").read_text())
    return {**result, "elapsed_s": None}, [{**row, "images_per_s": None} for row in rows]


def titled(what, session):
    """Returns the processes of a search's own Ray that are, as Ray names them, one of ``TITLES``."""
    found = []
    for pid in of_session(session):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(TITLES[what]):
                found.append(pid)
    return found


def ended(process):
    """Raises when a driver has ended, with what it printed."""
    assert process.poll() is None, process.communicate()[0]


@contextlib.contextmanager
def occupied(num_cpus, address, auth):
    """Holds CPUs of a cluster from another process within the block."""
    code = (
        "import logging, sys, ray\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)\n"
        "held = ray.util.placement_group([{'CPU': float(sys.argv[2])}])\n"
        "ray.get(held.ready())\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, address, str(num_cpus)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment(**auth)) as process:
        assert any(line == "held\n" for line in process.stdout)
        yield
        process.stdin.close()


def wait_for_no_groups(address, auth, timeout_s=60):
    """Waits until no placement group holds resources or waits for them; returns the seconds that it took."""
    table = "[[g['state'], str(g['bundles'])] for g in ray.util.placement_group_table().values()]"
    began = time.monotonic()
    while groups := [each for each in asked(table, address, auth) if each[0] != "REMOVED"]:
        assert time.monotonic() - began < timeout_s, f"placement groups left after {timeout_s} s: {groups}"
        time.sleep(1)
    return time.monotonic() - began


def running_processes(study_dir):
    """Returns the trainings that run, each with the process of its first rank."""
    if not has_begun(study_dir):
        return []
    study = snapshot(study_dir)
    log, rows = study.log, study.rows
    known, since = begun(log), running_since(log, rows)
    running = [row for row in rows if (row.kind, row.name) in since]
    return [(row.training, known[row.training, row.attempt][1]["process"]) for row in running]


def running_pids(study_dir, epoch=1, needs=""):
    """Returns the living processes of trainings that have got so far, and have files of such a pattern."""
    found = []
    for place, pid in running_processes(study_dir):
        with contextlib.suppress(OSError):
            metrics = (study_dir / place / "metrics.jsonl").read_text().splitlines()
            is_there = not needs or any((study_dir / place).glob(needs))
            if is_there and len(metrics) >= epoch and Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def waiting_trial(worker_pid):
    """Returns the process of the trial that waits for a Ray Train worker: one with the same parent, Ray's raylet."""
    parent = parent_of(worker_pid)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::ResourceTrainable") and parent_of(path.parent.name) == parent:
                return int(path.parent.name)
    raise AssertionError("no trial waits")


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_again(what, executor, study_dir, num_trials, times, rng, **more):
    """Searches while one process of ``TITLES`` after the other dies; checks what follows.

    Each dies a random while after a further part of the first half of the trainings has ended.
    """
    process = driver(study_dir, num_trials, executor, **more)
    for number in range(times):
        part = number * num_trials // (2 * times)
        wait_until(lambda: ended(process) or len(results(study_dir)) >= part, f"{part} have ended")  # noqa: B023  # asked in this round alone
        time.sleep(rng.uniform(0, 2) if number else 0)
        victims = wait_until(lambda: ended(process) or titled(what, process.pid), f"there is a {what}")
        os.kill(rng.choice(victims), signal.SIGKILL)
    finished(process)
    check(study_dir, num_trials)


def kill_in_cuts(executor, study_dir, num_trials, times):
    """Searches while the mailbox dies, so often, when a cut was decided and its training still runs; checks it."""
    process, seen = driver(study_dir, num_trials, executor, **{**EIGHT, "search": {**CUT, **EIGHT["search"]}}), set()
    for _ in range(times):
        seen.update(wait_until(lambda: ended(process) or decided_cuts(study_dir) - seen, "a training is cut"))
        for pid in titled("mailbox", process.pid):
            os.kill(pid, signal.SIGKILL)
    finished(process)
    rows = whole_trials(study_dir, num_trials)
    assert {row.outcome for row in rows} <= {"complete", "pruned"}, rows  # a result wins over a cut, maybe over each


def decided_cuts(study_dir):
    """Returns the numbers in Optuna's log of the trainings whose cut was decided."""
    if not is_study(study_dir):
        return set()
    return {line["trial_id"] for line in operations(study_dir) if line["op_code"] == 8 and "cut" in line["user_attr"]}


def kill_one(what, executor, study_dir, cluster, num_trials=1, **more):
    """Searches on a Ray that stays alive, kills one process, checks what follows, and returns what was printed.

    ``what``: "training" (an inline one, worker 0 of a group), "trial" (which waits for its group), or "driver".
    """
    hold = study_dir.parent / "base" / "hold"  # within a training, not in the pause after one
    hold.parent.mkdir(exist_ok=True)
    hold.touch()
    process = driver(study_dir, num_trials, executor, *cluster, **more)
    pid = wait_until(lambda: running_pids(study_dir) or ended(process), "a training runs")[0]
    before = results(study_dir)
    if what == "driver":
        process.kill()
        process.communicate()
        hold.unlink()
        wait_for_no_groups(*cluster)
        process = driver(study_dir, num_trials, executor, *cluster, **more)
    else:
        os.kill(waiting_trial(pid) if what == "trial" else pid, signal.SIGKILL)
        hold.unlink()
    output = finished(process)
    check(study_dir, num_trials, before)
    wait_for_no_groups(*cluster)
    return output


def set_one_aside(executor, study_dir, num_trials=4, **more):
    """Searches with a trial that dies at each start; the same command again, without the fault, ends it."""
    stand_in.tell(study_dir.parent, seconds=0.05, **{"1": "die"})
    code, output = finish(driver(study_dir, num_trials, executor, **more))
    assert code == 5, output
    rows = snapshot(study_dir).trials
    assert [row.number for row in rows if row.outcome != "complete"] == [1], output
    assert [row.number for row in rows if row.set_aside] == [1]
    assert f"{rows[1].name}: is set aside: {rows[1].reason}" in output
    assert "made no progress" in rows[1].reason
    before = results(study_dir)
    stand_in.tell(study_dir.parent, seconds=0.05)
    finished(driver(study_dir, num_trials, executor, **more))
    check(study_dir, num_trials, before)


def lose_nodes(executor, study_dir, at_a_time, num_trials):
    """Searches on four nodes, half of which are killed twice; checks what follows.

    The trainings wait for one another in their second epoch. Two new nodes join after the first loss, none after the
    second.
    """
    (study_dir.parent / "base" / "hold").touch()
    with head() as first, contextlib.ExitStack() as at_end:
        at_end.callback(kill_drivers)
        nodes = [at_end.enter_context(node(first, at_a_time // 4)) for _ in range(4)]
        resources = {"num_workers": 1, "cpus_per_worker": 1}
        process = driver(study_dir, num_trials, executor, *first.reached, **resources)
        all_run = lambda: len(running_pids(study_dir)) == at_a_time or ended(process)  # noqa: E731
        half_run = lambda: len(running_pids(study_dir)) == at_a_time // 2 or ended(process)  # noqa: E731
        for lost, new in ((nodes[:2], 2), (nodes[2:], 0)):
            wait_until(all_run, f"{at_a_time} trainings run")
            for each in lost:
                each.kill()
            wait_until(half_run, f"{at_a_time // 2} trainings are lost")
            for _ in range(new):
                at_end.enter_context(node(first, at_a_time // 4))
        (study_dir.parent / "base" / "hold").unlink()
        output = finished(process, TIMEOUT_S + 10 * num_trials)
        check(study_dir, num_trials)
        again = sum(row.attempt - 1 for row in snapshot(study_dir).rows)
        assert again == at_a_time, output
        wait_for_no_groups(*first.reached)


def confirm(study_dir, top=1):
    """Starts a confirm, with two seeds of the best trials and of the baseline."""
    words = ["confirm", str(study_dir), "--top", str(top), "--seeds", "2", "--no-ablation"]
    command = [sys.executable, "-m", "carft_ray.cli", *words]
    return started(command)


def confirmed(study_dir):
    """Numbers of every training of a confirm that has finished, less the time it took."""
    paths = study_dir.glob("confirm/*/*/result.json")
    without = {"elapsed_s": None, "environment": None}
    return {path.parents[1].name: {**json.loads(path.read_text()), **without} for path in paths}


def kill_confirm(finished_study, folder, num_kills, rng, top=1):
    """Confirms a copy of a study in peace, and another one killed at random moments; they must end alike."""
    calm, killed = (Path(shutil.copytree(finished_study, folder / name)) for name in ("calm", "killed"))
    began = time.monotonic()
    finished(confirm(calm, top))
    whole_s, before = time.monotonic() - began, {}
    for number in range(num_kills):
        process = confirm(killed, top)
        if number % 2 and len(before) < 2 * (top + 1):  # while one trains; the last ones may end between two looks
            wait_until(lambda: running_pids(killed) or process.poll() is not None, "a training runs")  # noqa: B023
        else:
            time.sleep(whole_s * rng.uniform(number, number + 1) / num_kills)
        kill_group(process)
        now = confirmed(killed)
        assert {name for name in before if now[name] != before[name]} == set()
        before = now
    finished(confirm(killed, top))
    assert confirmed(killed) == confirmed(calm)
    assert len(confirmed(killed)) == 2 * (top + 1)
    summaries = [json.loads((study / "confirm" / "summary.json").read_text()) for study in (calm, killed)]
    assert summaries[0] == summaries[1]
    assert {row.outcome for row in snapshot(killed).confirmations} == {"complete"}
    assert len(snapshot(killed).confirmations) == 2 * (top + 1)
    assert [entry.purpose for entry in snapshot(killed).ledger] == ["winner fixed"]
    assert list(killed.rglob("*.tmp")) == []


def moment(number):
    """Returns the executor of a kill of ``kill_at_random``, and the event that it follows."""
    return tuple(RESOURCES)[number % len(RESOURCES)], ("start", *COURSE)[number % NUM_MOMENTS]


def kill_after(process, number, rng):
    """Kills a driver with its Ray a random while after the event of a number (``moment``); returns the while, in s."""
    done_events, said = COURSE[: number % NUM_MOMENTS], [""]
    for event in done_events:
        while not said[-1].startswith(event):
            said.append(process.stdout.readline())
            assert said[-1], f"the search has ended before {event}: {finish(process)[0]}\n{''.join(said)}"
    delay_s = rng.uniform(0.1, 1 if done_events else 6)
    time.sleep(delay_s)
    kill_group(process)
    return delay_s


def kill_on_a_bucket(server, folder, num_trials, times, rng):
    """Kills a search on a study in a bucket, with its Ray, and resumes it from another HOME each time; pulls it."""
    address, before = server.address("study"), {}
    for number in range(times + 1):
        auth = {**server.environment, "XDG_CACHE_HOME": str(folder / f"home-{number}")}
        process = driver(address, num_trials, moment(number)[0], auth=auth, **REAL)
        if number < times:
            kill_after(process, number, rng)
            now = {name: data for name, data in server.objects().items() if name.endswith("/result.json")}
            assert {name for name, data in before.items() if now[name] != data} == set()
            before = now
    finished(process)
    pull(address, folder / "pulled")
    check(folder / "pulled", num_trials)


def kill_at_random(study_dir, num_trials, numbers, rng, **more):
    """Kills one study again and again with its Ray, extends it by 4, finishes and checks it.

    The numbers go through the course of a search, inline and with Ray Train in turn: any ten in a row have every
    moment with either executor. Returns executor, event, seconds from then and trainings finished, of each kill.
    """
    kills, before = [], {}
    for number in numbers:
        executor, last = moment(number)
        delay_s = kill_after(driver(study_dir, num_trials, executor, **more), number, rng)
        if has_begun(study_dir):
            snapshot(study_dir)
        now = results(study_dir)
        assert {name for name, content in before.items() if now[name] != content} == set()
        before = now
        kills.append((executor, last, delay_s, len(now)))
    finished(driver(study_dir, num_trials + 4, **more))
    check(study_dir, num_trials + 4, before)
    return kills
