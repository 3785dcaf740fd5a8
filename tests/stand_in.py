"""A training without torch for the tests of search and launch; workers import it by name.

Objective and failures depend on nothing but values and trial number. ``base/modes.json`` beside the study says which
trial misbehaves: ``{"3": "raise"}``; ``seconds`` there is how long an epoch takes, with ``paced`` each waits besides
until the study has noted its intermediate value. While a file ``hold`` is beside it no training gets further than its
first epoch, nor does one of mode ``hold``.
"""

import json
import math
import os
import signal
import time

from carft_ray import files
from carft_ray.errors import DataError, DivergedError, InterruptedRunError
from carft_ray.recipe.schedule import has_intermediate_value
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.attempt_files import write_result
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import TrialSpec

SANDBOX_SET = {"source": "sandbox", "domain": "photo", "num_per_class": 4}


def make_recipe(trials=8, epochs=2, **search):
    space = {
        "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "kl_weight": {"low": 0.1, "high": 10, "log": True},
    }
    resources, evaluate, train = (search.pop(name, {}) for name in ("resources", "evaluate", "train"))
    return Recipe.model_validate(
        {
            "data": {"train": {**SANDBOX_SET, "split": "train"}, "id_val": {**SANDBOX_SET, "split": "val"}},
            "train": {"epochs": epochs, "checkpoint_every": None, **train},
            "search": {"trials": trials, "space": space, "baselines": {"plain": {"kl_weight": 0}}, **search},
            "resources": resources,
            "evaluate": evaluate,
        }
    )


def objective(train):
    return 1 / (1 + math.log10(train.learning_rate / 1e-3) ** 2) - 0.01 * math.log10(train.kl_weight + 1) ** 2


def scripts(prepared_dir):
    """Returns the nearest folder ``base`` beside the study or above: what the trainings are told to do."""
    found = (parent / "base" for parent in prepared_dir.parents)
    return next((base for base in found if base.is_dir()), prepared_dir)


def tell(folder, **modes):
    """Says what the trainings of the studies in a folder are to do; gives where it stands."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "modes.json").write_text(json.dumps(modes))
    return base


def prepare(recipe, folder, say=None, made_of=None):
    folder.mkdir(parents=True, exist_ok=True)
    if (scripts(folder) / "no_data").exists():
        raise DataError("there is no data")
    return {"objective": 0.25, "id_accuracy": 0.3, "ood_accuracy": 0.2, "num_images": {"id_val": 64}}


def train(recipe, out_dir, prepared_dir, context, attempt):
    modes_path = scripts(prepared_dir) / "modes.json"
    modes = json.loads(modes_path.read_text()) if modes_path.exists() else {}
    number = out_dir.name[1:5].lstrip("0") or "0"
    mode = modes.get(number) if out_dir.parent.name == "trials" else None
    if mode == "raise" or (mode == "raise_once" and attempt == 1):
        raise RuntimeError("the stand-in was told to raise")
    if mode == "no_memory_once" and attempt == 1:
        raise MemoryError
    if mode == "diverge":
        raise DivergedError("loss not finite at step 3")
    if mode == "no_data":
        raise DataError("a file of the training set is gone")
    if mode == "die" or (mode == "die_once" and attempt == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "hang" or (mode == "hang_once" and attempt == 1):
        time.sleep(1000)
    place, trained = out_dir / f"attempt-{attempt}", list(out_dir.glob("attempt-*/fine_tuned.safetensors"))
    saved = [files.read_json(path.parent, path.name) for path in out_dir.glob("attempt-*/step-*/state.json")]
    done = recipe.train.epochs if trained else max(saved, default=0)
    for epoch in range(done + 1, recipe.train.epochs + 1):
        end = time.monotonic() + modes.get("seconds", 0.02)
        while time.monotonic() < end and (modes.get("deaf") or not context.should_stop()):
            time.sleep(min(0.05, modes.get("seconds", 0.02)))
        while epoch > 1 and (mode == "hold" or (scripts(prepared_dir) / "hold").exists()):
            if context.should_stop():
                stop(modes)
            time.sleep(0.1)
        if context.rank == 0:
            row = {"epoch": epoch, "step": 10 * epoch, "num_steps": 10 * recipe.train.epochs, "loss": 1 / epoch}
            if has_intermediate_value(recipe.evaluate.every_epochs, recipe.search.pruner, epoch, recipe.train.epochs):
                part = 0.5 + 0.5 * epoch / recipe.train.epochs  # rises to the final one in the same order for all
                row["subset/objective"] = part * objective(recipe.train)
            context.report(row)
            save(out_dir, attempt, epoch)
        while modes.get("paced") and not context.should_stop() and not is_noted(out_dir, epoch):
            time.sleep(0.05)
        if context.should_stop() and epoch < recipe.train.epochs:
            stop(modes)
    told = {"pid": os.getpid()} if modes.get("tell_pid") else {}
    value = math.nan if mode == "nan" else objective(recipe.train)
    metrics = {"id_accuracy": 0.8, "ood_accuracy": 0.5, "ranks": reduced(context)} | told
    result = {"objective": value, "alpha": 0.5, "metrics": metrics, "elapsed_s": 0.1}
    if context.rank == 0 and math.isfinite(value):
        files.write_bytes(place / "fine_tuned.safetensors", b"weights")
        write_result(place, result)
    if mode == "slow_end":
        time.sleep(5)
    return result


def stop(modes):
    time.sleep(modes.get("slow_stop", 0))
    raise InterruptedRunError("stopped")


def is_noted(out_dir, number):
    """Tells whether the study has as many intermediate values of a trial."""
    return any(
        len(row.intermediate_values) >= number
        for row in snapshot(out_dir.parents[1]).trials
        if row.name == out_dir.name
    )


def save(out_dir, attempt, epoch):
    """Writes what stands for a checkpoint, under its name."""
    with files.new_folder(out_dir / f"attempt-{attempt}" / f"step-{10 * epoch:08d}") as temporary:
        files.write_json(temporary / "state.json", epoch)


def reduced(context):
    """Adds rank + 1 over all workers, through torch.distributed."""
    if context.world_size == 1:
        return 1.0
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(context.rank + 1))
    dist.all_reduce(total)
    return total.item()


def spec(attempt=1):
    """The first trial of a search, without a study."""
    return TrialSpec("trial", 0, "t0000-0000", {}, attempt)
