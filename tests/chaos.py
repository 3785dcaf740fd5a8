"""A search in which everything goes wrong that can, and the counts that must come out all the same.

    python chaos.py STUDY_DIR TRIALS SEED [RESOURCES as JSON]       a driver; ends with the exit code of its error

What a trial meets depends on the seed and its number alone (``fate``), whether it diverges on its learning rate, so
the expected outcome of each is known without the code under test. Misfortunes that pass happen once: a file in the
trial's folder remembers them, since another one (memory, a killed driver) may have taken the first attempt.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import stand_in

from carft_ray import files
from carft_ray.errors import CarftError, DivergedError, InterruptedRunError, OutOfMemoryError, Problem
from carft_ray.launch.events import Note
from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner
from carft_ray.store.result import write_result
from carft_ray.study.rows import trials

PRUNER = {"name": "median", "startup_trials": 6}  # of the searches below
BOUNDARY = 3e-3  # learning rates above it diverge
FITS = 8  # largest micro-batch for which there is memory, of a batch of 32
EPOCHS = 4
POOR = 0.1  # of its objective is left to every fourth trial, so that the pruner has something to cut whatever the seed
ALWAYS = {"gpus_per_worker": 0, "hang_timeout_s": 4}
RESOURCES = {
    "inline": {"executor": "inline", **ALWAYS},
    "ray-train": {"executor": "ray-train", "num_workers": 2, "cpus_per_worker": 0.5, **ALWAYS},
}


def make_recipe(num_trials, seed, resources):
    recipe = stand_in.make_recipe(num_trials, EPOCHS, resources=resources, pruner=PRUNER, sampler={"seed": seed})
    train = recipe.train.model_copy(update={"batch_size": 32, "seed": seed})
    return recipe.model_copy(update={"train": train})


def fate(seed, number, num_trials):
    """Returns what happens to a trial: "raise", "raise_once", "hang_once", "die_once" or nothing."""
    if number == random.Random(f"hang {seed}").randrange(num_trials):
        return "hang_once"
    drawn = random.Random(f"{seed} {number}").random()
    return "raise" if drawn < 0.05 else "raise_once" if drawn < 0.1 else "die_once" if drawn < 0.2 else ""


def is_poor(number):
    return number % 4 == 3


def expected(seed, row, num_trials):
    """Returns the outcomes that a trial may end with."""
    if fate(seed, row.number, num_trials) == "raise":
        return {"error"}
    return {"pruned", "diverged" if row.values["learning_rate"] > BOUNDARY else "complete"}


def check(study_dir, num_trials, seed):
    """Raises when a finished search has other outcomes than its seed says; returns how many of each there are."""
    rows = trials(study_dir)
    assert [row.number for row in rows] == list(range(num_trials))
    wrong = {row.name: row for row in rows if row.outcome not in expected(seed, row, num_trials)}
    assert wrong == {}, f"seed {seed}"
    for row in rows:
        lines = known(study_dir / "trials" / row.name)
        if row.outcome == "complete":
            assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1)), row.name
    cut = [row.number for row in rows if row.outcome == "pruned"]
    assert any(is_poor(number) for number in cut), f"seed {seed}: cut {cut}"
    assert list(json.loads((study_dir / "fits.json").read_text()).values()) == [FITS]
    assert list(study_dir.rglob("*.tmp")) == []
    assert not (study_dir / "_tune").exists()
    return Counter(row.outcome for row in rows)


def train(recipe, out_dir, prepared_dir, context, attempt):
    micro_batch = recipe.train.micro_batch or 32 // context.world_size
    if micro_batch > FITS:
        raise OutOfMemoryError(
            Problem("training", f"{micro_batch} images at a time must fit", "no memory"), micro_batch
        )
    is_trial = out_dir.parent.name == "trials"
    number = int(out_dir.name[1:5]) if is_trial else 0
    mode = fate(recipe.train.seed, number, recipe.search.trials) if is_trial else ""
    if mode == "raise":
        raise RuntimeError("it will never work")
    if is_trial and recipe.train.learning_rate > BOUNDARY:
        raise DivergedError("loss not finite at step 3")
    objective = stand_in.objective(recipe.train) * (POOR if is_poor(number) else 1)
    step_size = 10
    for epoch in range(stand_in.saved_epoch(out_dir) + 1, EPOCHS + 1):
        time.sleep(0.6 if is_poor(number) else 0.02)  # time enough to be cut
        if epoch == 2 and context.rank == 0:
            misfortune(mode, out_dir)
        if context.rank == 0:
            row = {"epoch": epoch, "step": epoch * step_size, "num_steps": EPOCHS * step_size, "loss": 1 / epoch}
            context.report({**row, "subset/objective": objective * epoch / EPOCHS})
            stand_in.save(out_dir, attempt, epoch)
            while is_poor(number) and not context.should_stop() and len(known(out_dir)) < epoch:
                time.sleep(0.1)
        if context.should_stop() and epoch < EPOCHS:
            raise InterruptedRunError("stopped")
    numbers = {"id_accuracy": 0.8, "ood_accuracy": 0.5}
    result = {"objective": objective, "alpha": 0.5, "metrics": numbers}
    if context.rank == 0:
        place = out_dir / f"attempt-{attempt}"
        files.write_bytes(place / "fine_tuned.safetensors", b"weights")
        write_result(place, {**result, "elapsed_s": 0.1})
    return result


def known(out_dir):
    """The rows that the driver has."""
    return files.read_json_lines(out_dir / "metrics.jsonl")


def misfortune(mode, out_dir):
    """Does to a training, once, what is its fate."""
    mark = out_dir / "misfortune"
    if not mode or mark.exists():
        return
    mark.write_text(mode)
    if mode == "raise_once":
        raise RuntimeError("it will work the next time")
    if mode == "die_once":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def main(study_dir, num_trials, seed, resources):
    def show(event):
        spec = getattr(event, "spec", None) or getattr(event, "row", None)
        print(type(event).__name__, event.text if isinstance(event, Note) else getattr(spec, "name", ""), flush=True)

    recipe = make_recipe(int(num_trials), int(seed), json.loads(resources))
    try:
        run_search(recipe, Path(study_dir), None, show, Runner(stand_in.prepare, train))
    except CarftError as error:
        print(error, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    import chaos  # so that workers find the training by the name of its module

    sys.exit(chaos.main(*sys.argv[1:]))
