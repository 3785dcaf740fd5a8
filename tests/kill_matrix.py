"""Kills everything that a search consists of, checks what is left, and prints a table: ``make kill-matrix``.

    python tests/kill_matrix.py [--kills 10] [--times 2] [--seed N]

Trainings are stand-ins (``stand_in.py``), Ray is real. Ends with an error at the first study that is not whole.
"""

import argparse
import os
import platform
import random
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

import killed_searches as searches

from carft_ray.search.study import baselines, trials

HEADER = ("killed", "executor", "times", "outcome", "lost trials", "begun again", "seconds each")


def main(kills, times, seed):
    print(f"seed {seed}; {platform.machine()}, {os.cpu_count()} CPUs", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="carft-kills-", ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        searches.write_modes(folder / "base", seconds=0.3)
        began = time.monotonic()
        struck = searches.kill_at_random(folder / "random", folder / "base", 4, kills, random.Random(seed))
        rows.append(row("driver and its Ray, any moment", "both", len(struck), [folder / "random"], began))
        print("\n".join(f"{executor}: after {at:.1f} s, {done} finished" for executor, at, done in struck), flush=True)
        with searches.cluster() as cluster:
            for what, executor in (
                ("process of a training", "inline"),
                ("worker 0", "ray-train"),
                ("trial that waits for its workers", "ray-train"),
                ("driver, its cluster lives", "inline"),
                ("driver, its cluster lives", "ray-train"),
            ):
                began, studies = time.monotonic(), []
                for number in range(times):
                    studies.append(folder / f"{what}-{executor}-{number}".replace(" ", "_"))
                    strike(what, executor, studies[-1], folder / "base", cluster)
                rows.append(row(what, executor, times, studies, began))
                print(rows[-1], flush=True)
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    print("\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in rows))


def strike(what, executor, study_dir, base_dir, cluster):
    """One search of a trial and a baseline, one kill, and what must hold afterwards."""
    process = searches.driver(study_dir, base_dir, 1, executor, *cluster)
    pid = searches.wait_until(lambda: searches.running_pid(study_dir), "a training runs")
    before = searches.results(study_dir)
    if what.startswith("driver"):
        process.kill()
        process.communicate()
        searches.wait_for_no_groups(*cluster)
        process = searches.driver(study_dir, base_dir, 1, executor, *cluster)
    elif what.startswith("trial"):
        os.kill(searches.waiting_trial(pid), signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)
    code, output = searches.finish(process)
    assert code == 0, output
    searches.check(study_dir, 1, before)
    searches.wait_for_no_groups(*cluster)


def row(what, executor, times, studies, began):
    """Returns the cells of a table's row, for studies that ``check`` has passed."""
    rows = [each for study in studies for each in trials(study) + baselines(study)]
    again = sum(each.attempt - 1 for each in rows)
    seconds = (time.monotonic() - began) / times
    return what, executor, times, "finished, as if undisturbed", 0, again, f"{seconds:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of one study with its Ray, at random moments")
    parser.add_argument("--times", type=int, default=2, help="of each other kill")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    sys.exit(main(**vars(parser.parse_args())))
