"""How busy one GPU is: ``python -m benchmarks.gpu [--model ViT-B-16 | ViT-B-32 | ViT-L-14]``, under 8 minutes

The product's training loop with random weights, 1,000 classes and 80 contexts, on generated JPEG files of 500 x 375
pixels and about 108 kB (as large as ImageNet's in the mean) that lie in memory:

    input   views that threads decode, cut, resize and copy to the device; nothing computes
    step    the loop with views that are there: no decoding
    both    the loop as a training runs it

each of the latter with targets that are stored and that the frozen tower computes in each step, and with and without
``train.compile``. Share of the peak: operations of the towers by formula (``num_operations``), without what is computed
again or padded, per second, of what the maker says of the card for dense bf16. Share of time busy: of ten steps, the
time in which at least one kernel ran, by torch's profiler, whose own work in these steps counts as idle. The KL at step
0 compares the model that trains with the targets, which the same weights have made.

Without a GPU everything is tiny: it shows that the benchmark runs, and no number means anything. ``--memory`` measures
nothing: it estimates what a step takes (``benchmarks/memory.py``), and needs no GPU.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import open_clip
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # it is not in the list of what torch exports
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from benchmarks import memory
from benchmarks.photos import HEAVY, Pictures, pictures
from benchmarks.rows import Row, as_data, machine, machine_line
from carft_ray.data.views import view_batch
from carft_ray.environment import usable_cores
from carft_ray.errors import CarftError
from carft_ray.model.clip import Clip, load_clip, wrap_model
from carft_ray.model.tower import has_compiler
from carft_ray.recipe.schema.model import ModelConfig
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training import loop
from carft_ray.training.out_of_memory import is_out_of_memory
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import BLOCK, Targets, write_block

NUM_CLASSES, NUM_CONTEXTS, CONTEXT_SCALE = 1000, 80, 100.0
MOST_CPUS = 20
IMAGES_TARGET, BUSY_TARGET, KL_TARGET = 2500.0, 0.9, 2e-4  # ViT-B/16 on an H100
WARM, LEAST, MOST = 2, 3, 10  # windows of LOG_EVERY steps that are not counted; counted at least; at most in all
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}

# dense bf16, in 10^12 operations per second: half of what the makers' sheets say with sparsity; the first that matches
PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("A30", 165.0),
    ("L40S", 362.0),
)


class Tower(NamedTuple):
    """Sizes of an image tower, and of its batches: of a step, and of a forward pass."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    embed_dim: int
    batch_size: int = 512
    micro_batch: int = 512


TOWERS = {
    "ViT-B-16": Tower(224, 16, 768, 12, 512),
    "ViT-B-32": Tower(224, 32, 768, 12, 512),
    "ViT-L-14": Tower(224, 14, 1024, 24, 768, 256, 128),
    "tiny": Tower(32, 8, 32, 2, 16, 4, 4),
}


class Setup(NamedTuple):
    """What is measured.

    Attributes:
        model: Of ``TOWERS``.
        threads: That make views.
        seconds: Of each measurement, warming up not counted.
        trace: Where the profiler's trace of the whole loop goes.
    """

    model: str = "ViT-B-16"
    threads: int = min(usable_cores(), MOST_CPUS)
    seconds: float = 6.0
    trace: Path | None = None


@dataclass
class Measured:
    """One measurement.

    Attributes:
        what: 'input', 'step' or 'both'.
        targets: 'stored', 'online', or '' for the input.
        compiled: Whether the tower was.
        micro_batch: Images of a forward pass.
        images_per_s: Of the windows that count.
        peak_share: Of the card's bf16 operations; None: not known, or the input.
        busy: Share of time in which a kernel ran; None: not measured.
        memory_gb: Largest that torch held on the device.
        error: Why there is no number.
    """

    what: str
    targets: str = ""
    compiled: bool = False
    micro_batch: int = 0
    images_per_s: float = 0.0
    peak_share: float | None = None
    busy: float | None = None
    memory_gb: float | None = None
    error: str = ""


@dataclass(frozen=True, eq=False)
class Bench:
    """What all measurements share."""

    setup: Setup
    tower: Tower
    clip: Clip
    source: Pictures
    device: torch.device
    folder: Path

    def train(self, compiled: bool, micro_batch: int, **others: Any) -> TrainConfig:
        """Returns the training: an epoch of the source."""
        values = {"epochs": 1, "kl_weight": 1.0, "context_scale": CONTEXT_SCALE, "batch_size": self.tower.batch_size}
        return TrainConfig.model_validate({**values, "micro_batch": micro_batch, "compile": compiled, **others})

    def fine_tune(self, train: TrainConfig, source: Pictures, context: RunContext, store: Path | None) -> None:
        """Trains with random heads until the context says stop."""
        draw, width = torch.Generator().manual_seed(0), self.tower.embed_dim
        class_head_CD, context_head_TD = (
            normalize(torch.randn(number, width, generator=draw), dim=-1) for number in (NUM_CLASSES, NUM_CONTEXTS)
        )
        with contextlib.suppress(loop.StoppedRun):
            loop.fine_tune(
                self.clip,
                class_head_CD,
                context_head_TD,
                source,  # type: ignore[arg-type]  # it has all of a source that training asks for
                train,
                context,
                device=self.device,
                target_store=store,
                num_threads=self.setup.threads,
            )


class Watch:
    """Times the windows between two reports of the loop; then each profiler sees one more window."""

    def __init__(self, seconds: float, profilers: Sequence[Any] = ()) -> None:
        self.seconds, self.profilers, self.started, self.num_profiles = seconds, list(profilers), 0, 0
        self.marks: list[tuple[int, float]] = []
        self.done = False

    def progress(self, row: dict[str, float]) -> None:
        """Takes a report; the loop has waited for the device before it."""
        if self.started:
            self.profilers[self.started - 1].stop()
            self.num_profiles = self.started
        else:
            self.marks.append((int(row["step"]), time.perf_counter()))
            counted = self.marks[WARM - 1 :]
            if len(counted) <= LEAST or counted[-1][1] - counted[0][1] < self.seconds:
                return
        if self.started < len(self.profilers):
            self.profilers[self.started].start()
            self.started += 1
        else:
            self.done = True

    def context(self) -> RunContext:
        """Returns what the loop is given."""
        return RunContext(progress=self.progress, should_stop=lambda: self.done)

    def steps_per_s(self) -> float:
        """Returns the steps per second of the windows that count."""
        (first, began), (last, ended) = self.marks[WARM - 1], self.marks[-1]
        return (last - first) / (ended - began)


def num_operations(tower: Tower) -> float:
    """Returns the floating-point operations of a forward pass of one image; a multiplication and an addition are two.

    n tokens of width d, L layers, patches of p pixels, embedding D (of the layers' products alone; training takes three
    times as many):

        L * (24 n d^2 + 4 n^2 d)  +  2 (n - 1) 3 p^2 d  +  2 d D
    """
    num_patches, d = (tower.image_size // tower.patch_size) ** 2, tower.width
    n = num_patches + 1
    layers = tower.layers * (24 * n * d**2 + 4 * n**2 * d)
    return float(layers + 2 * num_patches * 3 * tower.patch_size**2 * d + 2 * d * tower.embed_dim)


def peak_of(device_name: str) -> float | None:
    """Returns the operations per second that a card's maker states for dense bf16; None: not known here."""
    words = device_name.split()
    for name, peak in PEAKS:
        if all(any(word == part or word.startswith(f"{part}-") for word in words) for part in name.split()):
            return 1e12 * peak
    return None


def busy_share(profiler: Any) -> float | None:
    """Returns the share of the time between the first and the last kernel in which one ran; None: there was none."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    )
    if not spans:
        return None
    total, (start, end) = 0.0, spans[0]
    for begins, ends in spans[1:]:
        if begins > end:
            total, start = total + end - start, begins
        end = max(end, ends)
    return float((total + end - start) / (end - spans[0][0]))


def open_bench(setup: Setup, folder: Path) -> Bench:
    """Builds the model with random weights, the pictures, and the store of targets."""
    tower = TOWERS[setup.model]
    if setup.model == "tiny":
        torch.manual_seed(0)
        model = open_clip.CLIP(**TINY)
        open_clip.set_model_preprocess_cfg(model, {**vars(open_clip.transform.PreprocessCfg()), "size": 32})
        clip = wrap_model(model, lambda texts: torch.zeros(len(texts), 16, dtype=torch.long), TINY)
    else:
        clip = load_clip(ModelConfig(name=f"{setup.model}-quickgelu", pretrained="random"))
    num_images = tower.batch_size * loop.LOG_EVERY * (MOST + 2)
    source = pictures(num_images, 4 if setup.model == "tiny" else 256, HEAVY)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(setup, tower, clip, source, device, folder)
    bench.source.labels[:] %= NUM_CLASSES
    logits = np.random.default_rng(0).normal(size=(BLOCK, NUM_CONTEXTS))
    rows = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float16)
    for number in range(math.ceil(num_images / BLOCK)):
        write_block(folder, 0, number, rows[: num_images - number * BLOCK])
    return bench


def measure_input(bench: Bench) -> Measured:
    """Measures views alone."""
    device, train = bench.device, bench.train(False, bench.tower.micro_batch, kl_weight=0.0)
    targets = Targets(bench.clip, torch.zeros(1, 1), bench.source, train, device)  # type: ignore[arg-type]  # it has all of a source that is asked for here
    count, began = 0, 0.0
    with contextlib.closing(loop._views(targets, train, RunContext(), 0, bench.setup.threads)) as batches:  # type: ignore[type-var]  # a generator, declared as what it yields
        for number, batch in enumerate(batches):
            if number < WARM:
                began = time.perf_counter()
                continue
            count += len(batch.indices)
            if time.perf_counter() - began > bench.setup.seconds:
                break
        if device.type == "cuda":
            torch.cuda.synchronize()
    return Measured("input", images_per_s=count / (time.perf_counter() - began))


def measure_loop(bench: Bench, what: str, targets: str, compiled: bool, micro_batch: int) -> Measured:
    """Measures the loop, and profiles it where it is whole and its targets are stored."""
    is_gpu, trace = bench.device.type == "cuda", bench.setup.trace
    profilers: list[Any] = []
    if what == "both" and targets == "stored":
        kinds = [[ProfilerActivity.CUDA]] if is_gpu else []
        kinds += [_activities(is_gpu)] if trace else []
        profilers = [profile(activities=kind) for kind in kinds]
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(bench.setup.seconds, profilers)
    with _views_are_there(bench) if what == "step" else contextlib.nullcontext():
        train = bench.train(compiled, micro_batch)
        bench.fine_tune(train, bench.source, watch.context(), bench.folder if targets == "stored" else None)
    images_per_s = watch.steps_per_s() * bench.tower.batch_size
    found = Measured(what, targets, compiled, micro_batch, images_per_s)
    if is_gpu:
        passes = 3 if targets == "stored" else 4  # forward, twice as much backward; the frozen tower
        peak = peak_of(torch.cuda.get_device_name())
        found.peak_share = None if peak is None else images_per_s * passes * num_operations(bench.tower) / peak
        found.memory_gb = torch.cuda.max_memory_allocated() / 1e9
        found.busy = busy_share(profilers[0]) if watch.num_profiles else None
    if trace and profilers and watch.num_profiles == len(profilers):
        profilers[-1].export_chrome_trace(str(trace))
    return found


def _activities(is_gpu: bool) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]


@contextlib.contextmanager
def _views_are_there(bench: Bench) -> Iterator[None]:
    """Has the loop take the same few views for all images, without decoding."""
    source, number = bench.source, np.arange(max(BLOCK, bench.tower.batch_size))
    made = view_batch(source, number, source.sample_ids[number], 0, 0, 0.9, bench.clip.image_size)  # type: ignore[arg-type]  # it has all of a source that is asked for here
    with patch.object(Targets, "_views_of", lambda self, indices, visit, make: made[: len(indices)]):
        yield


def first_kl(bench: Bench, precision: str, compiled: bool) -> float:
    """Returns the mean KL of the first batch before any update, against targets of the frozen tower."""
    number, found = min(bench.tower.batch_size, BLOCK), list[float]()
    few = pictures(number, 4, HEAVY)
    train = bench.train(compiled, number, batch_size=number, precision=precision)
    bench.fine_tune(train, few, RunContext(progress=lambda row: found.append(row["kl"])), None)
    return found[0]


class Report(NamedTuple):
    """All numbers."""

    setup: Setup
    on_gpu: bool
    cells: list[Measured]
    kl: dict[str, float]  # by precision


def measure(setup: Setup, say: Callable[[str], None] = lambda text: None) -> Report:
    """Measures everything; ``say`` gets a line of each."""
    on_gpu = torch.cuda.is_available()
    setup = setup if on_gpu else setup._replace(model="tiny", seconds=0.0)
    torch.set_num_threads(setup.threads if on_gpu else 1)  # on a GPU as a training does
    cells, micro_batch = list[Measured](), TOWERS[setup.model].micro_batch

    def add(cell: Measured) -> None:
        cells.append(cell)
        say(line(cell))

    with tempfile.TemporaryDirectory(prefix="carft-gpu-") as folder:
        bench = open_bench(setup, Path(folder))
        add(measure_input(bench))
        can_compile = has_compiler(torch.device("cuda" if on_gpu else "cpu"))
        for compiled in (False, True) if can_compile else (False,):
            for targets in ("stored", "online"):
                for what in ("step", "both"):
                    cell, micro_batch = _fitting(bench, what, targets, compiled, micro_batch)
                    add(cell)
        precisions = {"fp32": ("fp32", False)}
        if on_gpu:
            precisions["bf16, compiled" if can_compile else "bf16"] = ("bf16", can_compile)
        kl = dict[str, float]()
        for name, how in precisions.items():
            with contextlib.suppress(CarftError):  # the compiler, as is told above
                kl[name] = first_kl(bench, *how)
    return Report(setup, on_gpu, cells, kl)


def _fitting(bench: Bench, what: str, targets: str, compiled: bool, micro_batch: int) -> tuple[Measured, int]:
    """Measures with half as large forward passes as long as they do not fit; returns with which it did."""
    while True:
        try:
            return measure_loop(bench, what, targets, compiled, micro_batch), micro_batch
        except CarftError as error:  # the compiler
            return Measured(what, targets, compiled, micro_batch, error=str(error).splitlines()[0]), micro_batch
        except RuntimeError as error:
            if not is_out_of_memory(error) or micro_batch == 1:
                raise
        micro_batch //= 2


def line(cell: Measured) -> str:
    """Returns a measurement as a row of the Markdown table of ``HEAD``."""
    if cell.error:
        return f"| {cell.what} | {cell.targets} | {'yes' if cell.compiled else 'no'} | {cell.error} | | | | |"
    shares = [f"{100 * share:.0f} %" if share is not None else "" for share in (cell.peak_share, cell.busy)]
    memory = "" if cell.memory_gb is None else f"{cell.memory_gb:.1f}"
    micro_batch, compiled = (cell.micro_batch or "", "yes" if cell.compiled else "no") if cell.targets else ("", "")
    numbers = f"{cell.images_per_s:,.0f} | {shares[0]} | {shares[1]} | {memory} | {micro_batch}"
    return f"| {cell.what} | {cell.targets} | {compiled} | {numbers} |"


HEAD = (
    "| | targets | compiled | images/s | of the bf16 peak | GPU busy | memory, GB | micro-batch |\n"
    "|---|---|---|---|---|---|---|---|"
)


def rows(report: Report) -> list[Row]:
    """Returns the rows with targets; none without a GPU, and none of speed for another model than ViT-B/16."""
    if not report.on_gpu:
        return []
    name = torch.cuda.get_device_name()
    best = [cell for cell in report.cells if cell.what == "both" and cell.targets == "stored" and not cell.error]
    if not best:
        raise RuntimeError("the whole loop was not measured")
    cell = best[-1]  # compiled, where that is possible
    compiled = "compiled" if cell.compiled else "not compiled"
    how = f"{report.setup.model} on {name}, {compiled}, {report.setup.threads} CPUs"
    speed, busy = (IMAGES_TARGET, BUSY_TARGET) if report.setup.model == "ViT-B-16" else (None, None)
    found = [Row(f"images/s end to end, {how} (target: H100)", cell.images_per_s, speed, False, digits=0)]
    if cell.busy is not None:
        found.append(Row(f"share of time that the GPU is busy, {how}", cell.busy, busy, False))
    for precision, kl in report.kl.items():
        found.append(Row(f"KL at step 0, {precision}", kl, KL_TARGET if precision == "fp32" else None, digits=7))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all targets were reached, 1 not all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="How busy one GPU is.")
    parser.add_argument(
        "--model", choices=[name for name in TOWERS if name != "tiny"], default="ViT-B-16", help="(%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=Setup().threads, help="that make views (%(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (%(default)s)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="writes a trace of ten steps, for ui.perfetto.dev")
    parser.add_argument("--json", action="store_true", help="all numbers as JSON; the lines go to standard error")
    parser.add_argument(
        "--memory",
        nargs="*",
        metavar="MODEL",
        help="estimates the memory of a step instead (all: also into docs/gpu.md)",
    )
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error("--threads: at least 1")
    if arguments.memory is not None:
        memory.table(arguments.memory)
        return 0
    out = sys.stderr if arguments.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    where = machine()
    say(f"{machine_line(where)}; generated pictures, random weights")
    if not torch.cuda.is_available():
        say("No GPU here: a tiny model on a few pictures shows that the benchmark runs. No number means anything.")
    elif peak_of(torch.cuda.get_device_name()) is None:
        say(f"The bf16 peak of {torch.cuda.get_device_name()} is not known here: shares of it are left out.")
    say(HEAD)
    setup = Setup(arguments.model, arguments.threads, arguments.seconds, arguments.trace)
    report = measure(setup, say)
    if not any(cell.compiled for cell in report.cells):
        say("Not compiled: torch cannot compile here.")
    found = rows(report)
    for row in found:
        say(str(row))
    for precision, kl in {} if report.on_gpu else report.kl.items():
        say(f"      KL at step 0, {precision}: {kl:.7f}")
    if arguments.json:
        cells = [asdict(cell) for cell in report.cells]
        print(
            json.dumps(
                {
                    "machine": where,
                    "model": report.setup.model,
                    "cells": cells,
                    "rows": list(map(as_data, found)),
                    "kl": report.kl,
                },
                indent=1,
            )
        )
    return 0 if all(row.is_met for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
