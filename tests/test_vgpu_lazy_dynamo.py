"""Dynamo stays out of a dry run that compiles nothing, and is all there in one that does."""

import subprocess
import sys
from pathlib import Path

import pytest

EAGER = """
import sys, torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(4):
    model(torch.ones(8, 64).cuda()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    print("loaded" if "torch._dynamo.eval_frame" in sys.modules else "out")
"""
ASKS = """
import torch
model = torch.nn.Linear(64, 64).cuda()
model(torch.ones(8, 64).cuda()).sum().backward()
import torch._dynamo
from torch._dynamo.source import ConstantSource, LocalSource
import torch._dynamo.eval_frame
torch._dynamo.reset()
calls = []
def backend(graph, inputs):
    calls.append(graph)
    return graph.forward
function = torch._dynamo.optimize(backend)(lambda x: x * 2)
assert torch.equal(function(torch.ones(2)), torch.full((2,), 2.0))
@torch._dynamo.disable
def plain(x):
    return x
plain(torch.ones(1))
print(len(calls), torch._dynamo.__spec__.name, ConstantSource("x").name if hasattr(ConstantSource("x"), "name") else "")
"""
PART = """
import torch
import torch._dynamo.convert_frame as part
print("the same" if part is torch._dynamo.eval_frame.convert_frame else "a second copy")
"""


def _dry_run(folder: Path, script: str) -> str:
    (folder / "script.py").write_text(script)
    run = subprocess.run(
        [sys.executable, "-m", "tightfit", "dryrun", "--gpu", "A100", str(folder / "script.py")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return "\n".join(line for line in run.stderr.splitlines() if not line.startswith("tightfit: "))  # progress


@pytest.mark.slow
def test_dynamo_is_not_loaded_without_need(tmp_path: Path) -> None:
    said = _dry_run(tmp_path, EAGER)
    assert "out" in said
    assert "loaded" not in said


@pytest.mark.slow
def test_dynamo_is_there_for_a_script_that_asks(tmp_path: Path) -> None:
    assert "1 torch._dynamo" in _dry_run(tmp_path, ASKS)


@pytest.mark.slow
def test_a_part_that_loads_dynamo_is_there_once(tmp_path: Path) -> None:
    assert "the same" in _dry_run(tmp_path, PART)


@pytest.mark.slow
def test_training_that_compiles_nothing_loads_neither_dynamo_nor_sympy(tmp_path: Path, data_dir: Path) -> None:
    words = "train --dataset=tiny --n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --max_iters=2"
    options = ["--device=cpu", "--fit=off", "--supervise=off", f"--data_dir={data_dir}", f"--out_dir={tmp_path}"]
    script = (
        "import sys\nfrom tightfit.cli.main import main\nassert main(sys.argv[1:]) == 0\n"
        "print([name for name in ('torch._dynamo.eval_frame', 'sympy', 'triton') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *words.split(), *options], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]", run.stdout


@pytest.mark.slow
def test_a_process_group_needs_no_dynamo() -> None:
    program = """
import sys
from torch import distributed
import tightfit.trainer.loop
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
assert "torch._dynamo.eval_frame" not in sys.modules
import torch._dynamo.trace_rules as rules
assert rules.clear_lru_cache.__module__ == "torch._dynamo.trace_rules"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
