"""Loops that end when a value of the card says so end in a play, too."""

from pathlib import Path

from plays import findings

SEVERAL = """
import torch

v = torch.rand(64, 64, device="cuda")
counts = []

def noted(iterations):
    counts.append(iterations)

i = 0
while (v - v.t()).abs().max() > 1e-6:
    v = v @ v.t()
    i += 1
noted(i)
i, err = 0, 1.0
while err > 1e-6:
    w = v @ v.t()
    err = (w - v).norm().item()
    v = w
    i += 1
noted(i)
i = 0
while v.mean().item() < 100:
    v = v @ v.t()
    i += 1
noted(i)
i = 0
while True:
    v = v @ v.t()
    i += 1
    if v.sum() < 0.1:
        break
noted(i)
i = 0
while v.mean() > 0.1 and i < 50:
    v = v @ v.t()
    i += 1
noted(i)
i, known = 0, torch.zeros((), device="cuda")
while known < 40:
    known = known + 1
    i += 1
noted(i)
assert all(9 < count < 13 for count in counts[:4]) and counts[4:] == [50, 40], counts
"""
ADAPTIVE = """
import torch

end = torch.ones((), device="cuda")
weight = torch.rand(1 << 20, device="cuda", requires_grad=True)

def step(time, state):
    error = (state * weight).norm()
    if error <= 1:
        return_time = time + (error * 0.1).detach()
    else:
        return_time = time
    return return_time, state * weight

def solve():
    time, state = torch.zeros((), device="cuda"), weight
    while end > time:
        time, state = step(time, state)
    assert time >= end
    return state

solve().sum().backward()
print(solve())
"""


def test_loops_that_made_up_values_keep_going_are_left(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SEVERAL)
    found = findings(["--gpu", "A100", "--timeout", "20", tmp_path / "train.py"])
    assert (found["outcome"], found["not_played"]) == ("fits", []), found["stopped_because"]
    left = [note for note in found["notes"] if "a value that was made up decides when this loop ends" in note]
    assert [int(note.rpartition("train.py:")[2].partition(":")[0]) for note in left] == [11, 16, 23, 28]


def test_a_solver_with_adaptive_steps_comes_to_its_end(tmp_path: Path) -> None:
    """Each of its steps is refused as long as a made-up error is too large."""
    (tmp_path / "train.py").write_text(ADAPTIVE)
    found = findings(["--gpu", "A100", "--timeout", "20", tmp_path / "train.py"])
    assert (found["outcome"], found["not_played"]) == ("fits", []), found["stopped_because"]
    assert 8 * (4 << 20) < found["peak"]["allocated_bytes"] < 60 * (4 << 20)
