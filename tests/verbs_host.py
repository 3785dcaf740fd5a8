"""The command line with trainings of milliseconds that leave predictions, as a program of ``crash_host``.

Words before the command say what happens to it:

    full N KIND    the disk is full from the N-th write below the working folder on; KIND "once": for that one alone

A training leaves what ``report_studies`` makes of its values and seed. When it has ended, it notes its name in a file
``trained`` of the working folder. Every look of the driver is made at once, and into a bucket nothing goes on the side.
"""

import builtins
import errno
import io
import os

import crash_host
import numpy as np
import report_studies

from carft_ray import files
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import write_predictions
from carft_ray.launch import driver
from carft_ray.launch.workers import worker
from carft_ray.launch.workers.runtime import Runner
from carft_ray.layout import PREDICTIONS, WEIGHTS, ZERO_SHOT_TABLE
from carft_ray.store.attempt_files import write_result
from carft_ray.study import uploads

RECIPE = """\
format_version: 1
name: fast
data:
  train: {source: sandbox, domain: photo, num_per_class: 4, split: train}
  id_val: {source: sandbox, domain: photo, num_per_class: 4, split: val}
  ood_val:
    noisy: {source: sandbox, domain: noisy_photo, num_per_class: 4, split: val}
    blurry: {source: sandbox, domain: blurry_photo, num_per_class: 4, split: val}
train: {epochs: 2, batch_size: 16}
search:
  trials: 3
  space:
    learning_rate: {low: 1e-5, high: 1e-2, log: true}
    kl_weight: {low: 0.1, high: 10, log: true}
  sampler: {name: random}
  keep_checkpoints: 1
  baselines: {plain: {kl_weight: 0}}
resources: {executor: debug}
"""
ALPHAS = (0.0, 0.4, 0.8, 1.0)


def import_everything():
    crash_host.import_everything()
    use_fast_trainings()


def use_fast_trainings():
    """Has every command of this process train in milliseconds, for good."""
    worker.RUNNER = RUNNER
    driver.POLL_EVERY_S, driver.POLL_SHARE = 0.0, 1.0
    uploads.UPLOAD_EVERY_S = 1000.0


def prepare(recipe, folder, say=None, made_of=None):
    what = objective_spec(recipe)
    table = report_studies.predictions(recipe.train, (0.0,), what.sets, np.random.default_rng(0))
    write_predictions(folder / ZERO_SHOT_TABLE, table)
    return {**report_studies.metrics_of(table, what, 0.0), "num_images": {"id_val": 160}}


def train(recipe, out_dir, prepared_dir, context, attempt):
    place, what = out_dir / f"attempt-{attempt}", objective_spec(recipe)
    for epoch in (1, 2):
        context.report({"epoch": epoch, "step": 10 * epoch, "num_steps": 20, "loss": 1 / epoch})
    rng = np.random.default_rng([recipe.train.seed, int(1e9 * recipe.train.learning_rate)])
    table = report_studies.predictions(recipe.train, ALPHAS, what.sets, rng)
    write_predictions(place / PREDICTIONS, table)
    curve = [{"alpha": alpha, **report_studies.metrics_of(table, what, alpha)} for alpha in ALPHAS]
    best = max(curve[1:], key=lambda point: point["objective"])
    metrics = {key: value for key, value in best.items() if key != "alpha"}
    content = {"objective": best["objective"], "alpha": best["alpha"], "metrics": metrics, "curve": curve}
    content |= {"num_images": {"train": 64, **{name: report_studies.IMAGES[name] for name in what.sets}}}
    content |= {"elapsed_s": 0.1}
    files.write_bytes(place / WEIGHTS, b"weights")
    write_result(place, content)
    note("trained", out_dir.name)
    return content


RUNNER = Runner(prepare, train)


def note(path, line):
    """Appends a line past everything that counts or refuses writes."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def fill_disk(number, kind=""):
    """Has the disk below the working folder be full from the n-th write on, or for that one alone."""
    below, seen = f"{os.getcwd()}/", []

    def refused(path):
        if not str(path).startswith(below):
            return
        seen.append(path)
        if len(seen) == number or (len(seen) > number and not kind):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    plain_open = builtins.open

    def checked_open(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+") and isinstance(file, str | os.PathLike):
            refused(os.path.abspath(file))
        return plain_open(file, mode, *args, **kwargs)

    builtins.open = io.open = checked_open
    for name, which in (("link", 1), ("rename", 1), ("replace", 1), ("mkdir", 0)):
        plain = getattr(os, name)

        def checked(*args, plain=plain, which=which, **kwargs):
            refused(os.path.abspath(args[which]))
            return plain(*args, **kwargs)

        setattr(os, name, checked)
    plain_fsync = os.fsync

    def checked_fsync(handle):
        refused(os.readlink(f"/proc/self/fd/{handle}"))
        return plain_fsync(handle)

    os.fsync = checked_fsync
    return seen


def call(argv):
    seen = None
    if argv[0] == "full":
        seen = fill_disk(int(argv[1]), argv[2])
        argv = argv[3:]
    code = crash_host.call(argv)
    if seen is not None:
        note("writes", len(seen))
    return code
