"""Loss curves next to nanoGPT's: same initial weights, same batches, same optimizer; how far they drift apart.

    python benchmarks/cpu/agreement.py --nanogpt nanoGPT --text tinyshakespeare.txt

In float32 only the order of additions differs. In bfloat16 the same is measured for torch's plain autocast over
nanoGPT's model, so that our rounding stands next to the usual one. Rows go to results/agreement.csv.
"""

import argparse
import contextlib
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import build_optimizer

HERE = Path(__file__).parent
BLOCK, BATCH, VOCAB = 256, 8, 256


def batches(text: Path, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        starts = torch.randint(len(data) - BLOCK - 1, (BATCH,), generator=generator)
        rows = torch.stack([data[s : s + BLOCK + 1] for s in starts.tolist()])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    sys.path.insert(0, str(given.nanogpt))
    import model as nanogpt

    args = {"block_size": BLOCK, "vocab_size": VOCAB, "n_layer": 6, "n_head": 6, "n_embd": 384, "bias": False}
    curves: dict[str, list[float]] = {}
    for name, theirs, low in (
        ("nanogpt float32", True, False),
        ("tightfit float32", False, False),
        ("nanogpt autocast", True, True),
        ("tightfit bfloat16", False, True),
    ):
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            reference = nanogpt.GPT(nanogpt.GPTConfig(**args, dropout=0.0))
            if theirs:
                optimizer = reference.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        if not theirs:
            ours = GPT(GPTConfig(**args))
            ours.load_state_dict(reference.state_dict())
            optimizer = build_optimizer(ours.parameters(), weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95))
        called = reference if theirs else ours
        losses = []
        for x, y in batches(given.text, given.steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = called(x, y)[1] if theirs else called(x, y, scale=1 / y.numel())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(called.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        curves[name] = losses
        truth = curves["nanogpt float32"]
        drift = max(abs(a - b) / a for a, b in zip(truth, losses, strict=True))
        print(f"{name:18s} last loss {losses[-1]:.5f}, largest relative distance to nanoGPT's float32 {drift:.1e}")
    with open(HERE / "results" / "agreement.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        writer.writerows([step, *row] for step, row in enumerate(zip(*curves.values(), strict=True)))


if __name__ == "__main__":
    main()
