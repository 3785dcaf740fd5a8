"""Whether a plan predicts how long a search takes: three small searches of the sandbox. ``python -m benchmarks.plan``

For each recipe the command ``carft-ray plan`` says what the search will take, and then ``carft-ray search`` runs it, by
the clock from the start of the command to its end. The check: the expected time is within 30 % of the measured one.
The recipes were chosen after the code was frozen; they differ from the quickstart, on which it was written, in batch,
epochs, sets and space. The decoded sets are in the cache by then: a plan puts them there.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "search_spaces" / "quickstart.yaml"
WITHIN = 0.3
TRIALS = "search.trials=4"
SEARCHES = {
    "small batches": [TRIALS, "search.baselines={}", "train.batch_size=32", "train.epochs=8"],
    "two OOD sets, large batches": [
        TRIALS,
        "search.baselines={car_ft: {kl_weight: 10, learning_rate: 5e-4}}",
        "data.ood_val={negative: {source: sandbox, domain: negative, split: val, num_per_class: 63}, "
        "painting: {source: sandbox, domain: painting, split: val, num_per_class: 40}}",
        "train.batch_size=128",
        "train.epochs=15",
        "evaluate.every_epochs=5",
    ],
    "epochs and crops searched": [
        TRIALS,
        "search.baselines={}",
        "search.space.epochs={low: 2, high: 10}",
        "search.space.crop_scale={low: 0.5, high: 1.0}",
    ],
}


def command(verb: str, settings: Sequence[str], *more: str) -> list[str]:
    """Returns the words of a command on the recipe with settings."""
    words = [sys.executable, "-m", "carft_ray.cli", verb, str(RECIPE), *more, "--json"]
    return words + [word for setting in settings for word in ("--set", setting)]


def run(words: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Runs a command; returns what it printed and its seconds.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    began = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    seconds = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout), seconds


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description="What a plan predicts.")
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES), help="which (all)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a Markdown table; returns 1 when a forecast is too far off."""
    arguments = _arguments(argv)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, synthetic images\n")
    print("| search | plan took, s | predicted, s | range, s | measured, s | predicted / measured | load | |")
    print("|---|---|---|---|---|---|---|---|")
    misses = 0
    for name in arguments.searches:
        found, plan_s = run(command("plan", SEARCHES[name]))
        with tempfile.TemporaryDirectory(prefix="carft-plan-") as folder:
            _, search_s = run(command("search", SEARCHES[name], "--study", str(Path(folder) / "study")))
        expected, low, high = found["search_s"]
        ratio = expected / search_s
        passes = abs(ratio - 1) <= WITHIN
        misses += not passes
        numbers = f"{plan_s:.0f} | {expected:.0f} | {low:.0f} to {high:.0f} | {search_s:.0f} | {ratio:.2f}"
        print(f"| {name} | {numbers} | {os.getloadavg()[1]:.1f} | {'PASS' if passes else 'FAIL'} |", flush=True)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
