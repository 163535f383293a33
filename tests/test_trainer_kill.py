"""Runs killed with SIGKILL at random moments end as runs that were not: a few here, two hundred with `-m slow`."""

from pathlib import Path

import pytest
from kill_trials import trials


@pytest.mark.slow
def test_a_few_kills_change_nothing(tmp_path: Path) -> None:
    counts = trials(2, tmp_path, seed=4, max_iters=60, lr_decay_iters=60)
    assert counts["kills"] == 2
    assert counts["chains equal to the unbroken run"] == counts["chains"] >= 1
    assert counts["resumed"] >= 1
    assert counts["went back to an earlier checkpoint"] == 0  # a kill, unlike a bad disk, damages nothing


@pytest.mark.slow
def test_two_hundred_kills_change_nothing(tmp_path: Path) -> None:
    counts = trials(200, tmp_path, seed=0)
    assert counts["kills"] == 200
    assert counts["chains equal to the unbroken run"] == counts["chains"]
    assert counts["went back to an earlier checkpoint"] == 0
    assert counts["killed while a file was being written"] >= 10
