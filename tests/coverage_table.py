"""What share of each package the tests run: lines and branches, from the JSON of coverage.

Usage: python tests/coverage_table.py build/coverage.json
"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def table(report: dict) -> list[tuple[str, int, int, int, int]]:
    """(package, lines, of them run, branches, of them taken), by name, the whole last."""
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for path, file in report["files"].items():
        parts = Path(path).parts[1:]
        summary = file["summary"]
        counts = [summary[key] for key in ("num_statements", "covered_lines", "num_branches", "covered_branches")]
        for name in (parts[0] if len(parts) > 1 else "top level", "carft_ray"):
            rows[name] = [a + b for a, b in zip(rows[name], counts, strict=True)]
    return [(name, *rows[name]) for name in sorted(rows, key=lambda name: (name == "carft_ray", name))]


if __name__ == "__main__":
    print(f"{'':12}{'lines':>8}{'run, %':>8}{'branches':>10}{'taken, %':>10}")
    for name, lines, run, branches, taken in table(json.loads(Path(sys.argv[1]).read_text())):
        share_run, share_taken = 100 * run / max(lines, 1), 100 * taken / max(branches, 1)
        print(f"{name:12}{lines:8}{share_run:8.1f}{branches:10}{share_taken:10.1f}")
