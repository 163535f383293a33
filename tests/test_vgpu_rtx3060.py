"""The virtual RTX 3060 against what a real one used: transformers' GPT-2 in a plain training loop.

Measured by the authors of xMem (arXiv 2510.21048, repository Stone-ResearchLife/xMem): torch 2.6, transformers 4.51.3,
the device's used memory by NVML less what it was once the context existed. That is PyTorch's reserved memory and what
the driver loads later, 18 MiB on this card. Batches below 20 had rows of random length and are left out.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tightfit.units import MIB

HERE = Path(__file__).parent
LIBRARY = HERE.parent / ".venv" / "transformers-4.51"
LOADED_LATER = 18 * MIB
NAMES = {"distilbert/distilgpt2": "distilgpt2", "cerebras/Cerebras-GPT-111M": "cerebras"}
Row = tuple[str, str, int]

ONE_MORE_LOGITS = ("distilgpt2", "AdamW", 40)
"""The real run reserved one segment more of the size of its logits (982 MiB) than is predicted, and one of 20 MiB less:
two logits that fit a freed segment of 982 MiB here did not there. Batches 37 and 43 do not show it."""


def rows() -> Iterator[tuple[Row, int]]:
    """(model, optimizer, batch) and the bytes reserved on the card, each configuration once."""
    seen = set()
    with open(HERE / "rtx3060_measured.csv", newline="") as file:
        for row in csv.DictReader(file):
            key = (NAMES[row["model"]], row["optimizer"], int(row["batch_size"]))
            if key[2] >= 20 and row["real_oom"] == "False" and key not in seen:
                seen.add(key)
                yield key, int(row["ground_bytes"]) - LOADED_LATER


def predicted(row: Row) -> int:
    words = ["dryrun", "--json", "--gpu", "RTX 3060 12GB", "--memory", "12622168064", "--context", "0"]
    command = [sys.executable, "-m", "tightfit", *words, str(HERE / "scripts" / "transformers_loop.py"), *map(str, row)]
    environ = {**os.environ, "PYTHONPATH": str(LIBRARY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["peak"]["reserved_bytes"])


def errors(chosen: list[tuple[Row, int]]) -> dict[Row, float]:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(predicted, [row for row, _ in chosen]))
    return {row: value / real - 1 for (row, real), value in zip(chosen, found, strict=True)}


needs_library = pytest.mark.skipif(not LIBRARY.is_dir(), reason=f"{LIBRARY} is missing: make test installs it")


@needs_library
def test_a_row() -> None:
    row, measured = next(rows())
    assert predicted(row) == pytest.approx(measured, rel=0.005)


@needs_library
@pytest.mark.slow
def test_all_rows() -> None:
    found = errors(list(rows()))
    assert len(found) == 25
    assert statistics.median(map(abs, found.values())) < 0.002
    assert {row for row, error in found.items() if abs(error) > 0.005} == {ONE_MORE_LOGITS}
