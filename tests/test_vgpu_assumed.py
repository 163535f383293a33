"""What only the card's data decide has stated bounds, and the user sets it; --until names the end of a play."""

from pathlib import Path

import pytest
from plays import findings

from tightfit.errors import ConfigError
from tightfit.vgpu.records import read_assumption

MASKED = """
import torch

x = torch.randn(1 << 20, device="cuda")
places = (x > 3).nonzero()
picked = torch.randn(1 << 20, 64, device="cuda")[places.flatten()]
if x.sum().item() > 1000:
    torch.ones(1 << 28, device="cuda")
"""
EMPTY = """
import torch

nothing = torch.empty(0, device="cuda")
assert len(nothing.unique(return_counts=True)[1]) == len(nothing.nonzero()) == len(nothing[nothing > 0]) == 0
assert len(torch.repeat_interleave(nothing.long())) == 0
torch.ones(1 << 20, device="cuda")
"""
NEEDED = """
import torch

x = torch.randn(1 << 20, 8, device="cuda")
mask = torch.zeros(1 << 20, 8, device="cuda")
mask[:, :2] = 1
cropped = torch.masked_select(x, mask.bool()).view(1 << 20, 2)
few = x[x[:, 0] > 3] + torch.ones(1 << 10, 8, device="cuda")
rows, given = torch.zeros(1 << 10, 8, device="cuda"), torch.ones(1 << 9, 8, device="cuda", requires_grad=True)
rows[x[: 1 << 10, 0] > 3] = given
rows.sum().backward()
"""
CLASSES = """
import torch

logits = torch.rand(4096, 10, device="cuda")
for found in (logits.argmax(1), logits.max(1)[1].flatten().int(), logits.topk(2)[1], logits.argmax(1, True).clone()):
    values, places, counts = found.unique(return_inverse=True, return_counts=True)
    assert len(values) == len(found.flatten().bincount()) == 10, "as metrics check that classes are few enough"
    assert places.shape == found.shape and counts.sum() == found.numel()
found += 1
assert len(found.unique()) == 4096
with torch.inference_mode():
    assert len((logits + 1).argmax(1).flatten().unique()) == 10
"""
EVALUATING = """
import torch

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
for step in range(10_000):
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step()
    if step % 500 == 499:
        with torch.no_grad():
            model(torch.ones(1 << 22, 8, device="cuda"))
torch.ones(1 << 27, device="cuda")
"""


def test_lengths_and_values_are_assumed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(MASKED)
    most = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert any("train.py:5: the length of a result depends on data; the largest, 1048576" in x for x in most["notes"])
    words = ["--gpu", "A100", "--assume", "(x > 3).nonzero()=1024", "--assume", "train.py:7=2000", "--assume", "y=1"]
    few = findings([*words, tmp_path / "train.py"])
    assert any("train.py:5: the length of a result depends on data; 1024 was assumed" in x for x in few["notes"])
    assert any("--assume y: no unknown value" in each for each in few["notes"])
    picked = (1 << 20) * 64 * 4
    assert most["peak"]["allocated_bytes"] == (1 << 22) + (8 << 20) + 2 * picked
    assert few["peak"]["allocated_bytes"] > 4 << 28, "the branch that 2000 leads to"


def test_a_length_is_the_only_one_that_a_later_line_works_with(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(NEEDED)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    for line, length in (7, 2 << 20), (8, 1 << 10), (10, 1 << 9):
        assert any(
            f"train.py:{line}: the length of a result depends on data; {length} was" in x for x in found["notes"]
        )
    assert found["peak"]["allocated_bytes"] < 4 * (32 << 20), "less than with the longest"


def test_predicted_classes_are_no_more_than_the_logits(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(CLASSES)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]


def test_without_data_no_length_depends_on_data(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(EMPTY)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert not any("length of a result" in note or "made up" in note for note in found["notes"])


@pytest.mark.parametrize(("until", "outcome"), [("steps", 0), ("eval", 1), ("end", 2)])
def test_until(until: str, outcome: int, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(EVALUATING)
    found = findings(["--gpu", "A100", "--until", until, tmp_path / "train.py"])
    peak = found["peak"]["allocated_bytes"]
    assert [peak < 1 << 26, 1 << 26 < peak < 4 << 27, peak >= 4 << 27].index(True) == outcome
    assert bool(found["not_played"]) is (until != "end")


@pytest.mark.parametrize("text", ["x", "=1", "x=many"])
def test_an_assumption_without_a_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give EXPR=VALUE with a number"):
        read_assumption(text)
