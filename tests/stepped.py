"""A real training that writes down each step when it has made it; workers import it by name.

``steps.txt`` in the folder of a training has a line for each: attempt, rank, step, time. ``base/modes.json`` says how
long a step takes at least (``seconds``).
"""

import json
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import stand_in

from carft_ray.launch.workers import worker
from carft_ray.training import loop

prepare = worker.prepare


class Step(NamedTuple):
    attempt: int
    rank: int
    step: int
    at: float


def steps(folder: Path) -> list[Step]:
    """Returns the steps that a training has made."""
    if not (folder / "steps.txt").exists():
        return []
    lines = [line.split() for line in (folder / "steps.txt").read_text().splitlines()]
    return [Step(*map(int, words[:3]), float(words[3])) for words in lines if len(words) == 4]


def train(recipe, out_dir, prepared_dir, context, attempt):
    modes = json.loads((stand_in.scripts(prepared_dir) / "modes.json").read_text())
    real = loop._Learner.update

    def update(learner, *args):
        found = real(learner, *args)
        time.sleep(modes.get("seconds", 0))
        with open(out_dir / "steps.txt", "a") as file:
            file.write(f"{attempt} {context.rank} {learner.step} {time.time()}\n")
        return found

    with mock.patch.object(loop._Learner, "update", update):
        return worker.train(recipe, out_dir, prepared_dir, context, attempt)
