"""What the best of a search is worth, read on the test sets. ``python -m benchmarks.winner``

The whole sequence that a user would run, by the command line, on the sandbox (synthetic images):

    search    search_spaces/quickstart.yaml: 16 trials of CAR-FT
    search    the same with ``kl_weight`` 0: 16 trials of plain fine-tuning, an equal budget
    confirm   the winner, the winner of plain fine-tuning, and the baselines, each with five fresh seeds
    test      all of them on id_test and ood_test, once, at the alphas that validation chose

It prints a table in Markdown. Everything is written to ``--out`` (git ignores it); a run that was killed continues with
the same command, and a finished one is only printed again.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carft_ray import files

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "search_spaces" / "quickstart.yaml"
OUT = ROOT / "benchmarks" / "results" / "winner"
NUM_SEEDS = 5
PLAIN = (
    "name=plain",
    "train.kl_weight=0",
    "search.space={learning_rate: {low: 1e-4, high: 5e-3, log: true}}",
    "search.baselines={}",
)
SUMMARY = Path("test") / "summary.json"


def carft_ray(*words: str) -> None:
    """Runs a command; its progress goes to the terminal.

    Raises:
        subprocess.CalledProcessError: It failed, with its exit code.
    """
    print(f"$ carft-ray {' '.join(words)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "carft_ray.cli", *words], check=True, cwd=ROOT, stdout=sys.stderr)


def run(out: Path, num_seeds: int, settings: Sequence[str]) -> None:
    """Runs what is missing and prints the table.

    Args:
        out: Folder of the two studies.
        num_seeds: Fresh seeds of each configuration.
        settings: Over the recipe, ``key=value``.
    """
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / ".gitignore", "*\n")
    study, plain = out / "car_ft", out / "plain"
    if not (study / SUMMARY).exists():
        changed = [word for setting in settings for word in ("--set", setting)]
        carft_ray("search", str(RECIPE), "--study", str(study), *changed)
        carft_ray("search", str(RECIPE), "--study", str(plain), *changed, *plain_settings())
        carft_ray("confirm", str(study), "--top", "1", "--seeds", str(num_seeds), "--against", str(plain))
        carft_ray("test", str(study))
    summary = files.read_json(study / SUMMARY)
    print("\n".join(markdown(summary)))
    print(f"\n{summary['headline']}")


def plain_settings() -> list[str]:
    """Returns the options that make the recipe one of plain fine-tuning."""
    return [word for setting in PLAIN for word in ("--set", setting)]


def markdown(summary: Mapping[str, Any]) -> list[str]:
    """Returns the rows of ``test/summary.json`` as a Markdown table, accuracies in percent with 95 % intervals."""
    columns = {"id_accuracy": "ID test", "ood_accuracy": "OOD test, mean", "objective": "objective"}
    lines = ["| | alpha | " + " | ".join(columns.values()) + " |", "|---" * (2 + len(columns)) + "|"]
    for row in summary["rows"]:
        cells = [_estimate(row[name]) for name in columns]
        lines.append(f"| {row['name'].replace('_', ' ')} | {row['alpha']:.2f} | " + " | ".join(cells) + " |")
    return lines


def _estimate(found: Mapping[str, Any]) -> str:
    low, high = found["ends"]
    return f"{100 * found['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.winner", description="What the best is worth.")
    parser.add_argument("--out", type=Path, default=OUT, help="where the studies are kept (%(default)s)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="fresh seeds of each (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the recipe")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or that of the command that failed."""
    arguments = _arguments(argv)
    try:
        run(arguments.out.resolve(), arguments.seeds, arguments.set)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
