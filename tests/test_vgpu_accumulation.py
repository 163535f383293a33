"""Equal passes of gradient accumulation are left out, and the step is the one that all of them would make."""

from pathlib import Path

import pytest
from plays import findings

START = """
import sys
import torch
from torch.utils.data import DataLoader

n = int(sys.argv[1])
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256)).cuda()
optimizer = torch.optim.Adam(model.parameters())
seen = []

def step():
    optimizer.step()
    optimizer.zero_grad()

def backward(batch):
    loss = model(batch.cuda()).sum() / n
    loss.backward()
    return loss.detach()
"""
INNER = """
for _ in range(2):
    total, count = 0.0, 0
    for micro in range(n):
        if n < 0:
            model.is_last = micro == n - 1  # no attribute of that name
        if micro == n - 1:
            last = torch.ones(1 << 22, device="cuda")
        total += backward(torch.ones(64, 256))
        count += 1
        seen.append(micro)
    assert (micro, count) == (n - 1, n)
    optimizer.step()
    optimizer.zero_grad()
    del last
"""
FLAT = """
for i, batch in enumerate(DataLoader(torch.zeros(n * 2 * 64 + 1, 256), 64)):
    backward(batch)
    seen.append(i)
    if (i + 1) % n == 0:
        torch.ones(1 << 22, device="cuda")
        optimizer.step()
        optimizer.zero_grad()
"""
FUNCTION = """
def training_step(batch):
    loss = model(batch.cuda()).sum() / n
    loss.backward()
    return loss

def train():
    number = -1
    for _ in range(2):
        for batch in [torch.ones(64, 256)] * n:
            number += 1
            is_last = (number + 1) % n == 0
            loss = training_step(batch)
            if loss.device == batch.device:
                raise ValueError
            seen.append(number)
            if is_last:
                torch.ones(1 << 22, device="cuda")
                optimizer.step()
                optimizer.zero_grad()
    assert number == 2 * n - 1

train()
"""
STATE = """
state = {"passes": 0}
while state["passes"] < 2 * n:
    state["passes"] += 1
    is_accumulating = state["passes"] % n != 0
    backward(torch.ones(64, 256))
    seen.append(state["passes"])
    if not is_accumulating:
        torch.ones(1 << 22, device="cuda")
        optimizer.step()
        optimizer.zero_grad()
"""
HELD = """
losses = []
for _ in range(2):
    for micro in range(n):
        losses.append(backward(torch.ones(64, 256)))
        seen.append(micro)
    optimizer.step()
    optimizer.zero_grad()
assert len(losses) == 2 * n
"""
LIST = """
batches = [torch.ones(64 if i < n - 2 else 640, 256) for i in range(n)]
for _ in range(2):
    for batch in batches:
        backward(batch)
        seen.append(len(batch))
    step()
assert seen.count(640) == 4
"""
HIDDEN = """
class Steps:
    passes = stepped = 0
    is_ready = False

    def run(self):
        backward(torch.ones(64, 256))
        self.passes += 1
        self.is_ready = self.passes % n == 0
        if self.is_ready:
            step()
            self.stepped += 1

steps = Steps()
for i in range(2 * n):
    steps.run()
    seen.append(i)
    if i == 2 * n - 1:
        torch.ones(1 << 22, device="cuda")
assert steps.stepped == 2, steps.stepped
"""
ACCELERATE = """
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps=n)
loader = DataLoader(torch.zeros(n * 2 * 64, 256), 64)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
stepped = 0
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).sum())
        optimizer.step()
        optimizer.zero_grad()
    seen.append(len(batch))
    if accelerator.sync_gradients:
        torch.ones(1 << 22, device="cuda")
        stepped += 1
        if stepped == 2:
            break
"""
PASSED = {"inner": INNER, "flat": FLAT, "function": FUNCTION, "state": STATE}
PLAYED = {"held": HELD, "list": LIST, "hidden": HIDDEN}


def _peak(code: str, passes: int, tmp_path: Path, check: str = "") -> dict[str, int]:
    (tmp_path / "train.py").write_text(START + code + check)
    found = findings(["--gpu", "A100", tmp_path / "train.py", passes])
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    left_out = any("passes of an optimizer step" in note for note in found["notes"])
    assert left_out is bool(check)
    return found["peak"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PASSED)
def test_equal_passes_are_left_out(name: str, tmp_path: Path) -> None:
    code = PASSED[name]
    check = "\nassert len(seen) < 16, seen"
    assert _peak(code, 500, tmp_path, check) == _peak(code, 4, tmp_path)


@pytest.mark.parametrize("name", PLAYED)
def test_passes_that_differ_or_step_unseen_are_played(name: str, tmp_path: Path) -> None:
    _peak(PLAYED[name], 20, tmp_path)


def test_accelerate_is_asked_for_the_last_pass(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    check = "\nassert len(seen) < 16 and stepped == 2, (seen, stepped)"
    assert _peak(ACCELERATE, 500, tmp_path, check) == _peak(ACCELERATE, 4, tmp_path)
