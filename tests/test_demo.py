"""The demonstration: what it chooses for a machine, and the whole of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo import FEWEST, LARGE, MIDDLE, MOST, SMALL, _chosen

ROOT = Path(__file__).parents[1]


def test_a_faster_machine_trains_no_smaller_model_for_no_shorter_time() -> None:
    chosen = [_chosen(steps) for steps in (1, 50, 149, 150, 600, 1924, 1926, 10**6)]
    assert [size for size, _ in chosen] == [SMALL, SMALL, SMALL, MIDDLE, MIDDLE, MIDDLE, LARGE, LARGE]
    assert all(FEWEST <= steps <= MOST and steps % 20 == 0 for _, steps in chosen)
    costs = [size.cost * steps for size, steps in chosen]
    assert costs == sorted(costs)


@pytest.mark.slow
def test_all_parts_in_their_order(tmp_path: Path) -> None:
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    words = [sys.executable, "benchmarks/demo.py"]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ["# 1.", "6.14 GiB were asked for", "# 2.", "PLAN: ", "# 3.", ": out of memory in ", "# 4.", "# That took"]
    places = [done.stdout.index(part) for part in parts]
    assert places == sorted(places)
    first, last = (
        float(re.search(words, done.stdout)[1]) for words in (r"iter 0: loss (\S+),", r"Loss of.*: (\S+) un")
    )
    assert last < first - 1
    assert not list(tmp_path.glob("tightfit-demo-*"))
