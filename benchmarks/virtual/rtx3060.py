"""Predicted against measured reserved memory: every row that a real RTX 3060 was measured on, to CSV.

usage: python benchmarks/virtual/rtx3060.py [--out FILE]

Needs .venv/transformers-4.51, the version that ran on the card (`make .venv/transformers-4.51`). Where the figures come
from and what is left out: tests/test_vgpu_rtx3060.py.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from test_vgpu_rtx3060 import predicted, rows  # noqa: E402

FIELDS = ("model", "optimizer", "batch_size", "measured_bytes", "predicted_bytes", "error", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rtx3060.csv")
    path = parser.parse_args().out
    errors = []
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(FIELDS)
        for row, measured in rows():
            started = time.perf_counter()
            value = predicted(row)
            errors.append(value / measured - 1)
            table.writerow([*row, measured, value, f"{errors[-1]:.6f}", f"{time.perf_counter() - started:.2f}"])
            file.flush()
            print(*row, f"{errors[-1]:+.2%}", flush=True)
    sizes = sorted(map(abs, errors))
    print(f"{len(sizes)} rows: median {statistics.median(sizes):.3%}, worst {sizes[-1]:.2%}, next {sizes[-2]:.2%}")


if __name__ == "__main__":
    main()
