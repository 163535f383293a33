"""The demonstration: what it chooses for a machine, and the whole of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo import FEWEST, LARGE, MIDDLE, MOST, SMALL, _chosen

ROOT = Path(__file__).parents[1]


def test_model_and_steps_fit_the_time() -> None:
    given = (1, 50, 149, 150, 600, 1924, 1926, 10**6)
    chosen = [_chosen(steps) for steps in given]
    assert [size for size, _ in chosen] == [SMALL, SMALL, SMALL, MIDDLE, MIDDLE, MIDDLE, LARGE, LARGE]
    for steps_of_middle, (size, steps) in zip(given, chosen, strict=True):
        assert FEWEST <= steps <= MOST
        assert steps * size.cost <= max(steps_of_middle, FEWEST * size.cost)


@pytest.mark.slow
def test_all_parts_in_their_order(tmp_path: Path) -> None:
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    words = [sys.executable, "benchmarks/demo.py"]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ["# 1.", "6.14 GiB were asked for", "# 2.", "PLAN: ", "# 3.", ": out of memory in ", "# 4.", "# That took"]
    places = [done.stdout.index(part) for part in parts]
    assert places == sorted(places)
    losses = re.search(r"Loss of step \d+: (\S+) undisturbed, (\S+) here; of step 0: (\S+)\.\n", done.stdout)
    assert losses, done.stdout
    undisturbed, here, first = map(float, losses.groups())
    assert here == pytest.approx(undisturbed, abs=1e-3)
    assert here < first - 1
    assert not list(tmp_path.glob("tightfit-demo-*"))
