"""Conditions that come out alike in every step: what is behind them is neither waited for nor listed."""

from pathlib import Path
from typing import Any

from plays import findings

SETUP = """
import argparse, enum, math, os, time
import torch
from torch import nn

class Kind(enum.Enum):
    SMALL, LARGE = "small", "large"

parser = argparse.ArgumentParser()
parser.add_argument("--mode", default="Train")
args = parser.parse_args()
kind = Kind.SMALL

def unwrapped(model):
    return model.module if hasattr(model, "module") else model

def rank():
    if not torch.distributed.is_available():
        return 0
    if not torch.distributed.is_initialized():
        return 0
    return torch.distributed.get_rank()

is_three = lambda number: number == 3
model = nn.Linear(64, 64).cuda()
model.width = 64
optimizer = torch.optim.SGD(model.parameters())
begun = time.time()
"""
STEADY = """
for epoch in range(3):
    for step in range(1000):
        x = torch.ones(8, 64, device="cuda")
        out = model(x)
        loss = out.sum()
        if out.shape[1] == 6 or out.shape != x.shape:
            out = out.repeat(1 << 20)
        if out.dtype == torch.float16 or out.device != x.device:
            out = out.repeat(1 << 20)
        if isinstance(out, (tuple, list)) or isinstance(model, nn.DataParallel) or hasattr(model, "module"):
            out = out[0].repeat(1 << 20)
        if getattr(model, "module", None) is not None or unwrapped(model).width == 6:
            out = out.repeat(1 << 20)
        if torch.isnan(loss).any() or not math.isfinite(loss.item()):
            loss = torch.nan_to_num(loss).repeat(1 << 26)
        if rank() != 0 or not torch.cuda.is_available() or os.path.exists("/no/such/file"):
            loss = loss.repeat(1 << 26)
        if kind == Kind.LARGE or args.mode.lower() == "debug" or is_three(4):
            loss = loss.repeat(1 << 26)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        if step == 999 and epoch == 2:
            torch.empty(500 << 20, dtype=torch.uint8, device="cuda")
"""
OF_VALUES = """
for step in range(200_000):
    loss = model(torch.ones(8, 64, device="cuda")).sum()
    if loss > 1e6:
        loss = loss.repeat(1 << 26)
    if time.time() - begun > 36000:
        torch.empty(1 << 26, device="cuda")
    loss.backward()
    optimizer.step(), optimizer.zero_grad()
"""


def played(code: str, folder: Path) -> Any:
    (folder / "train.py").write_text(code)
    return findings(["--gpu", "RTX 3060 12GB", "--timeout", "30", folder / "train.py"])


def test_conditions_on_kinds_shapes_and_the_machine_are_known(tmp_path: Path) -> None:
    found = played(SETUP + STEADY, tmp_path)
    assert found["outcome"] == "fits"
    assert not found["not_played"]
    assert 500 << 20 <= found["peak"]["allocated_bytes"] < 520 << 20
    assert found["steps"] < 200


def test_conditions_on_values_are_not_waited_for(tmp_path: Path) -> None:
    found = played(SETUP + OF_VALUES, tmp_path)
    code = (SETUP + OF_VALUES).splitlines()
    lines = {code[place["line"] - 1].split("(")[0].strip() for place in found["not_played"]}
    assert lines == {"loss = loss.repeat", "torch.empty"}
    assert found["steps"] < 200
