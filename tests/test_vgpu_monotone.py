"""Laws of predicted memory over a grid of models: more of anything never needs less."""

import itertools
import json
import subprocess
import sys

import pytest

GRID = """
import itertools, json, os, sys
import tightfit
with tightfit.VirtualGPU("H200") as gpu:
    import torch
    from tightfit.models.model import GPT, GPTConfig
    from tightfit.models.optimizer import build_optimizer
    from tightfit.trainer.step import StepState, optimizer_step
    allocator = gpu.allocator
    found, first = {}, True
    for batch, layers, width, blocks in itertools.product(%(batches)s, %(layers)s, %(widths)s, (0, 1)):
        if first:  # libraries take their workspaces once
            x = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            (x @ x).sum().backward()
            del x
            first = False
        config = GPTConfig(block_size=128, vocab_size=2048, n_layer=layers, n_head=4, n_embd=width)
        before = allocator.requested_bytes
        model = GPT.on_device(config, torch.device("cuda"), loss="full", checkpointed_blocks=blocks * layers)
        optimizer = build_optimizer(model.parameters(), weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95))
        autocast = lambda: torch.autocast("cuda", dtype=torch.bfloat16)
        state = StepState(model, optimizer, torch.amp.GradScaler(enabled=False), autocast)
        ids = torch.zeros(batch, 128, dtype=torch.int64, device="cuda")
        allocator.reset_peak_stats()
        for _ in range(2):
            optimizer_step(state, [(ids, ids)], passes=1, tokens=ids.numel(), learning_rate=1e-3, grad_clip=1.0)
        found[f"{batch} {layers} {width} {blocks}"] = allocator.peak_requested_bytes - before
        del model, optimizer, state, ids
print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


def grid(batches: tuple[int, ...], layers: tuple[int, ...], widths: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    program = GRID % {"batches": batches, "layers": layers, "widths": widths}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    return {tuple(map(int, key.split())): value for key, value in rows.items()}


def assert_monotone(peaks: dict[tuple[int, ...], int]) -> None:
    axes = [sorted(set(values)) for values in zip(*peaks, strict=True)]
    compared = 0
    for key, peak in peaks.items():
        for axis, values in enumerate(axes[:3]):  # batch, layers, width
            larger = values[values.index(key[axis]) + 1 :][:1]
            for value in larger:
                other = (*key[:axis], value, *key[axis + 1 :])
                assert peaks[other] >= peak, (key, other)
                compared += 1
    assert compared
    for key in itertools.product(*axes[:3], (1,)):
        assert peaks[key] <= peaks[(*key[:3], 0)], f"checkpointing needs more: {key}"


@pytest.mark.slow
def test_a_small_grid() -> None:
    assert_monotone(grid((1, 4), (1, 3), (64,)))


@pytest.mark.slow
def test_two_hundred_configurations() -> None:
    peaks = grid((1, 2, 3, 4, 8), (1, 2, 3, 5, 8), (32, 64, 128, 256))
    assert len(peaks) == 200
    assert_monotone(peaks)
