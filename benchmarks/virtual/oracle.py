"""Memory of a training step on the host: predicted, and measured by PyTorch's profiler, to CSV.

usage: python benchmarks/virtual/oracle.py [--out FILE]

The configurations are those of tests/test_vgpu_oracle.py. The compiled ones take a minute each, most of it C++.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from test_vgpu_oracle import CONFIGURATIONS, both  # noqa: E402

FIELDS = ("configuration", "predicted_bytes", "measured_bytes", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "oracle.csv")
    with open(parser.parse_args().out, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(FIELDS)
        for each in CONFIGURATIONS:
            predicted, measured = both(each)
            table.writerow([each.name, predicted, measured, torch.__version__])
            file.flush()
            print(f"{each.name}: {predicted - measured:+,} bytes of {measured:,}", flush=True)


if __name__ == "__main__":
    main()
