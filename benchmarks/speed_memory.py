"""Memory of a worker that makes one training after the other, inline and as a kept Ray Train worker.

Searches of a timm tower with random weights at 112 pixels on JPEG files of 500 x 375, one training at a time, each in a
process of its own. Memory is the anonymous memory of the largest process below the command, read several times a
second: its peak in a training. A row is that peak in the 4th or the 16th training against the first. Linux only.
Synthetic images with the spectrum of photos.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import open_clip
import safetensors.torch
import torch

from benchmarks.photos import HEIGHT, WIDTH, write_tree
from benchmarks.rows import ROOT, Row, descendants
from carft_ray import files
from carft_ray.layout import METRICS, RESULT

SIDE, NUM_TRIALS, NUM_TRAIN, NUM_FEW, NUM_DISTINCT = 112, 16, 1_000, 64, 64
SHOWN = (4, 16)
TARGET = 1.15
LOOK_EVERY_S = 0.2
MODEL_CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {
        "timm_model_name": "efficientnet_lite0",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": SIDE,
    },
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
RECIPE = """\
format_version: 1
name: memory
model: {name: "local-dir:model"}
data:
  train: {source: folder, path: images, domains: [train]}
  id_val: {source: folder, path: images, domains: [id]}
  ood_val:
    ood: {source: folder, path: images, domains: [ood]}
  shared_images: keep  # the same pictures are in all sets
prompts: {templates: openai}
train: {learning_rate: 1e-4, kl_weight: 1, epochs: 1, batch_size: 64}
search:
  max_concurrent_trials: 1
  space:
    learning_rate: {low: 1e-5, high: 1e-3, log: true}
"""


@dataclass(frozen=True)
class Measured:
    """One search.

    Attributes:
        peaks_mb: Of each training, in order.
        images_per_s: Median over the trainings.
        user_s, system_s: Processor time of the largest process.
    """

    peaks_mb: list[float]
    images_per_s: float
    user_s: float
    system_s: float


def write_task(folder: Path, num_train: int) -> Path:
    """Writes model, images and recipe; returns the path of the recipe."""
    torch.manual_seed(0)
    state = open_clip.CLIP(**MODEL_CONFIG).state_dict()
    (folder / "model").mkdir()
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    files.write_json(
        folder / "model" / "open_clip_config.json", {"model_cfg": MODEL_CONFIG, "preprocess_cfg": preprocess}
    )
    safetensors.torch.save_file(state, folder / "model" / "open_clip_model.safetensors")
    for domain, number in (("train", num_train), ("id", NUM_FEW), ("ood", NUM_FEW)):
        write_tree(folder / "images" / domain, number, WIDTH, HEIGHT, NUM_DISTINCT)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return recipe


def measure(executor: str, num_trials: int, num_train: int) -> Measured:
    """Runs a search in a process of its own.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="carft-memory-") as name:
        folder = Path(name)
        study, printed = folder / "study", folder / "printed.txt"
        command = [sys.executable, "-m", "carft_ray.cli", "search", str(write_task(folder, num_train))]
        command += ["--study", str(study), "--set", f"search.trials={num_trials}", "--set", "search.baselines={}"]
        command += ["--set", f"resources.executor={executor}", "--set", "resources.cpus_per_worker=1"]
        peaks, times = [0.0] * num_trials, (0.0, 0.0)
        with printed.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
            while process.poll() is None:
                begun, ended = (len(list(study.glob(f"trials/*/*/{file}"))) for file in ("", RESULT))
                found = max(map(_memory, descendants(process.pid)), default=(0.0, 0.0, 0.0))
                if ended < min(begun, num_trials):
                    peaks[ended] = max(peaks[ended], found[0])
                    times = max(times, found[1:])
                time.sleep(LOOK_EVERY_S)
        if process.returncode:
            raise RuntimeError(printed.read_text())
        lines = [line for path in study.glob(f"trials/*/{METRICS}") for line in path.read_text().splitlines()]
    return Measured(peaks, statistics.median(json.loads(line)["images_per_s"] for line in lines), *times)


def _memory(pid: int) -> tuple[float, float, float]:
    """Returns the anonymous memory of a process in MB, and its seconds of user and system time; zeros once it ended."""
    try:
        status, stat = (Path(f"/proc/{pid}/{file}").read_text() for file in ("status", "stat"))
    except OSError:
        return 0.0, 0.0, 0.0
    anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    ticks = stat.rpartition(")")[2].split()[11:13]
    return float((anonymous or ["0"])[0]) / 1000, int(ticks[0]) / 100, int(ticks[1]) / 100


def memory_rows(full: bool, scale: bool = False) -> list[Row]:
    """Measures both executors; ``full``: with 1,000 training images."""
    rows = []
    for executor in ("inline", "ray-train"):
        found = measure(executor, NUM_TRIALS, NUM_TRAIN if full else NUM_FEW)
        first = found.peaks_mb[0]
        for number in SHOWN:
            peak = found.peaks_mb[number - 1]
            shown = f"{first:,.0f} and {peak:,.0f} MB"
            if number == NUM_TRIALS:
                shown += (
                    f"; {found.images_per_s:.0f} images/s, {found.user_s:.0f} s user, {found.system_s:.0f} s system"
                )
            rows.append(
                Row(f"memory in training {number} / in the first, {executor}", peak / first, TARGET, detail=shown)
            )
    return rows
