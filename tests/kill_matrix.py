"""Kills everything that a search consists of, checks what is left, and prints a table: ``make kill-matrix``.

Four searches are those of ``chaos.py``, in which trials diverge, raise, hang, die and want for memory by themselves.
Two studies are of real trainings: the ``confirm`` of one and the workers of the other are killed.

    python tests/kill_matrix.py [--kills 10] [--times 2] [--seed N] [--only PART]

The other trainings are stand-ins (``stand_in.py``), Ray is real. Ends with an error at the first study that is not
whole.
"""

import argparse
import os
import platform
import random
import secrets
import sys
import tempfile
import time
from pathlib import Path

import killed_searches as searches
import short_sealed
import short_training
import stand_in

from carft_ray.study.rows import baselines, confirmations, trials

NUM_CONFIRM_KILLS, NUM_WORKER_KILLS = 5, 6
AT_A_TIME = {"inline": 32, "ray-train": 8}  # trainings on four nodes; a group of Ray Train has four processes
CALM = "numbers of one left in peace"
HEADER = ("killed", "executor", "times", "outcome", "lost trials", "begun again", "seconds each")


def at_random(folder, kills, seed, times):
    rng = random.Random(seed)
    first = rng.randrange(10)
    began = time.monotonic()
    struck = searches.kill_at_random(folder / "random", 12, range(first, first + kills), rng)
    yield row("driver and its Ray, any moment", "both", len(struck), [folder / "random"], began)
    for executor, event, delay_s, done in struck:
        print(f"{executor}: {delay_s:.1f} s after {event}, {done} finished", flush=True)


def all_fates(folder, kills, seed, times):
    for executor, num_kills in (("inline", 0), ("inline", 5), ("ray-train", 0), ("ray-train", 5)):
        began, study_dir = time.monotonic(), folder / f"chaos-{executor}-{num_kills}"
        counts = searches.chaotic(study_dir, 40, seed, executor, num_kills)
        told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        again = sum(each.attempt - 1 for each in trials(study_dir))
        what = f"40 trials of all fates, driver killed {num_kills} times"
        yield what, executor, 1, told, 0, again, f"{time.monotonic() - began:.0f}"


def confirm(folder, kills, seed, times):
    began, study_dir = time.monotonic(), short_sealed.make(folder / "confirm", short_training)
    searches.kill_confirm(study_dir, folder, NUM_CONFIRM_KILLS, random.Random(seed))
    again = sum(each.attempt - 1 for each in confirmations(folder / "killed"))
    what = f"confirm of real trainings, killed {NUM_CONFIRM_KILLS} times"
    yield what, "inline", 1, CALM, 0, again, f"{time.monotonic() - began:.0f}"


def workers(folder, kills, seed, times):
    began, study_dir = time.monotonic(), folder / "workers" / "study"
    searches.kill_workers(folder / "workers", NUM_WORKER_KILLS, random.Random(seed))
    what = f"worker 0 and 1 of a real training in turn, {NUM_WORKER_KILLS} times"
    yield row(what, "ray-train", 1, [study_dir], began, CALM)


def nodes(folder, kills, seed, times):
    for executor, at_a_time in AT_A_TIME.items():
        began, study_dir = time.monotonic(), folder / f"nodes-{executor}"
        stand_in.tell(folder, seconds=0.1)
        searches.lose_nodes(executor, study_dir, at_a_time, at_a_time * 5 // 4)
        what = f"two of four nodes with {at_a_time // 2} of {at_a_time} trainings, twice"
        yield row(what, executor, 1, [study_dir], began)
        began, study_dir = time.monotonic(), folder / f"aside-{executor}"
        searches.set_one_aside(executor, study_dir)
        yield row("one trial at each start: set aside, then resumed", executor, 1, [study_dir], began)


def processes(folder, kills, seed, times):
    with searches.cluster() as cluster:
        for what, executor, name in (
            ("training", "inline", "process of a training"),
            ("training", "ray-train", "worker 0"),
            ("trial", "ray-train", "trial that waits for its workers"),
            ("driver", "inline", "driver, its cluster lives"),
            ("driver", "ray-train", "driver, its cluster lives"),
        ):
            began, studies = time.monotonic(), []
            for number in range(times):
                studies.append(folder / f"{what}-{executor}-{number}")
                searches.kill_one(what, executor, studies[-1], cluster)
            yield row(name, executor, times, studies, began)


PARTS = {each.__name__: each for each in (at_random, all_fates, confirm, workers, nodes, processes)}


def main(kills, times, seed, only):
    print(f"seed {seed}; {platform.machine()}, {os.cpu_count()} CPUs", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="carft-kills-", ignore_cleanup_errors=True) as folder:
        for name in only or PARTS:
            stand_in.tell(Path(folder), seconds=0.5)
            for cells in PARTS[name](Path(folder), kills, seed, times):
                rows.append(cells)
                print(cells, flush=True)
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    print("\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in rows))


def row(what, executor, times, studies, began, outcome="finished, as if undisturbed"):
    """Returns the cells of a table's row, for studies that have passed their checks."""
    rows = [each for study in studies for each in trials(study) + baselines(study)]
    again = sum(each.attempt - 1 for each in rows)
    seconds = (time.monotonic() - began) / times
    return what, executor, times, outcome, 0, again, f"{seconds:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of one study with its Ray, at random moments")
    parser.add_argument("--times", type=int, default=2, help="of each other kill")
    parser.add_argument("--only", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    sys.exit(main(**vars(parser.parse_args())))
