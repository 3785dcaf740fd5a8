"""Kills what a search consists of, again and again, checks what is left, and prints a table: ``make kill-matrix``.

    python tests/kill_matrix.py [driver|trial|rank|node|mailbox|bucket ...] [--seed N]

Each search has eight trainings at a time over a real Ray. Those said to be real are compared, bit for bit, with ones
that nothing disturbs; the others are stand-ins (``stand_in.py``), some of which diverge, raise, hang and die by
themselves (``killed_searches.chaotic``). Ends with an error at the first study that is not whole.
"""

import argparse
import os
import platform
import random
import secrets
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import killed_searches as searches
import pytest
import short_sealed
import short_training
import stand_in
from bucket_server import bucket_server
from logs import has_begun

from carft_ray.study.snapshot import snapshot
from cluster import LATER_LOST, head

LOADED = {"num_workers": 1, "cpus_per_worker": 0.25, "hang_timeout_s": 10}  # with eight, steps of all fates take longer
HEADER = ("what", "killed", "executor", "times", "trainings", "lost", "twice", "begun again", "seconds")


def any_moment(folder, times, rng):
    first = rng.randrange(10)
    kills = searches.kill_at_random(folder / "study", 24, range(first, first + times), rng, **searches.REAL)
    for executor, event, delay_s, done in kills:
        print(f"{executor}: {delay_s:.1f} s after {event}, {done} finished", flush=True)
    searches.check_numbers(folder / "study", searches.undisturbed(folder / "calm", 28))


def again(what, executor, num_trials, more, folder, times, rng):
    stand_in.tell(folder, seconds=1)
    searches.kill_again(what, executor, folder / "study", num_trials, times, rng, **more)
    if more == searches.REAL:
        searches.check_numbers(folder / "study", searches.undisturbed(folder / "calm", num_trials))


def on_a_cluster(what, executor, folder, times, rng):
    with head(2, dashboard=False, **LATER_LOST) as first:
        for number in range(times):
            searches.kill_one(what, executor, folder / f"study-{number}", first.reached, 8, **searches.EIGHT)


def of_a_confirm(folder, times, rng):
    study_dir = short_sealed.make(folder, short_training, "resources.cpus_per_worker=0.25", trials=3)
    searches.kill_confirm(study_dir, folder, times, rng, top=3)


def all_fates(executor, num_trials, num_kills, folder, times, rng):
    counts = searches.chaotic(folder / "study", num_trials, rng.randrange(10**6), executor, num_kills, **LOADED)
    print(", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())), flush=True)


def aside(executor, folder, times, rng):
    searches.set_one_aside(executor, folder / "study", 8, **searches.EIGHT)


def in_collectives(folder, times, rng):
    searches.kill_workers(folder, times, rng, num_trials=8, cpus_per_worker=0.125)


def lost_nodes(executor, folder, times, rng):
    stand_in.tell(folder, seconds=0.1)
    searches.lose_nodes(executor, folder / "study", 8, 12)


def in_cuts(executor, folder, times, rng):
    stand_in.tell(folder, seconds=2, slow_stop=1)
    searches.kill_in_cuts(executor, folder / "study", 16, times)


def in_a_bucket(folder, times, rng):
    with pytest.MonkeyPatch.context() as patched, bucket_server(patched) as server:
        patched.setenv("XDG_CACHE_HOME", str(folder / "home"))
        searches.kill_on_a_bucket(server, folder, 16, times, rng)
    searches.check_numbers(folder / "pulled", searches.undisturbed(folder / "calm", 16))


KILLS = {  # what is killed -> how, executor, times, and what does it
    "driver": (
        ("with its Ray, at any moment; real", "both", 10, any_moment),
        ("its cluster lives", "inline", 1, partial(on_a_cluster, "driver", "inline")),
        ("its cluster lives", "ray-train", 1, partial(on_a_cluster, "driver", "ray-train")),
        ("a confirm; real", "inline", 5, of_a_confirm),
        ("trainings of all fates", "inline", 5, partial(all_fates, "inline", 40, 5)),
        ("trainings of all fates", "ray-train", 2, partial(all_fates, "ray-train", 16, 2)),
    ),
    "trial": (
        ("process of a trial; real", "inline", 8, partial(again, "trial", "inline", 16, searches.REAL)),
        ("trial with its group", "ray-train", 4, partial(again, "trial", "ray-train", 16, searches.EIGHT)),
        ("its cluster lives", "inline", 1, partial(on_a_cluster, "training", "inline")),
        ("its cluster lives", "ray-train", 1, partial(on_a_cluster, "trial", "ray-train")),
        ("one trial at each start: set aside, then resumed", "inline", 3, partial(aside, "inline")),
        ("one trial at each start: set aside, then resumed", "ray-train", 3, partial(aside, "ray-train")),
        ("trainings of all fates, themselves", "inline", 0, partial(all_fates, "inline", 40, 0)),
        ("trainings of all fates, themselves", "ray-train", 0, partial(all_fates, "ray-train", 16, 0)),
    ),
    "rank": (
        ("one of two, in every collective; real", "ray-train, gloo", 8, in_collectives),
        ("worker 0, its cluster lives", "ray-train", 1, partial(on_a_cluster, "training", "ray-train")),
    ),
    "node": (
        ("two of four with 4 of 8 trainings, twice", "inline", 4, partial(lost_nodes, "inline")),
        ("two of four with 4 of 8 trainings, twice", "ray-train", 4, partial(lost_nodes, "ray-train")),
    ),
    "mailbox": (
        ("from its start on; real", "inline", 8, partial(again, "mailbox", "inline", 16, searches.REAL)),
        ("from its start on", "ray-train", 6, partial(again, "mailbox", "ray-train", 16, searches.EIGHT)),
        ("a trial is being cut", "inline", 4, partial(in_cuts, "inline")),
        ("a trial is being cut", "ray-train", 4, partial(in_cuts, "ray-train")),
    ),
    "bucket": (("driver with its Ray, at any moment; each from another HOME; real", "both", 10, in_a_bucket),),
}


def main(what, seed):
    print(f"seed {seed}; {platform.machine()}, {os.cpu_count()} CPUs", flush=True)
    rows, rng = [], random.Random(seed)
    for name in what:
        for how, executor, times, kill in KILLS[name]:
            with tempfile.TemporaryDirectory(prefix="carft-kills-", ignore_cleanup_errors=True) as folder:
                began = time.monotonic()
                stand_in.tell(Path(folder), seconds=0.5)
                kill(Path(folder), times, rng)
                studies = [path for path in Path(folder).iterdir() if has_begun(path) and path.name != "calm"]
                found = [row for study in studies for row in snapshot(study).rows]
                trained = [row for row in found if row.name != "zero_shot"]
                again = sum(row.attempt - 1 for row in trained)
                seconds = f"{time.monotonic() - began:.0f}"
                rows.append((name, how, executor, times, len(trained), 0, 0, again, seconds))  # else it had raised
                print(rows[-1], flush=True)
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    print("\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*KILLS], default=[*KILLS])
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    sys.exit(main(**vars(parser.parse_args())))
