"""Two processes under torchrun train again and again; in each run one of them runs out of memory at random operators.

    torchrun --nproc_per_node=2 tests/failing_pair.py OUT_FOLDER DATA_FOLDER TRIALS [SHARD]

Each run must give the losses of one without errors. Whoever starts this ends it if it hangs.
"""

import contextlib
import json
import os
import random
import sys
from pathlib import Path

import torch
from failures import Failing, Same, at_random, trained

from tightfit.trainer import loop
from tightfit.trainer.distributed import process_group, world_of_environment

KEYS = {
    "batch_size": 7,
    "micro_batch": 2,
    "max_iters": 4,
    "eval_interval": 2,
    "save_interval": 3,
    "log_interval": 2,
    "dropout": 0.0,
}


def main() -> None:
    out, data, trials = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rank, failures = int(os.environ["RANK"]), 0
    loop.process_group = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]  # one for all runs
    keys = KEYS | {"shard": sys.argv[4] if len(sys.argv) > 4 else "none"}
    trained(out / "plain", data, recover=False, **keys)
    for number in range(trials):
        draw = random.Random(number)
        fails, shrinks = draw.choice([(0,), (1,), (0, 1)]), draw.random() < 0.5
        if keys["shard"] == "none":
            failing = at_random(2 * number + rank, 150, spared=3000, allocating_only=True)
        else:  # steps and evaluations take several times as many operators; each trial fails in some of the phases
            phases = draw.sample(("setup", "forward", "loss", "backward", "eval", "optimizer", "save"), 3)
            failing = at_random(2 * number + rank, 100, spared=8000, allocating_only=True, phases=phases)
        path = out / f"trial{number}"
        chosen = failing if rank in fails else Failing(lambda number, name, phase: False)
        got = trained(path, data, chosen, fallback=None if shrinks else Same(), **keys)
        failures += len(got.failed)
        if rank == 0:
            compare(out / "plain", path)
    counts: list[int] = [0, 0]
    torch.distributed.all_gather_object(counts, failures)
    if rank == 0:
        failures = sum(counts)
        print(f"{trials} trials, {failures} failures", flush=True)


def compare(plain: Path, path: Path) -> None:
    """The losses, by step and name, agree to rounding; no step is missing or twice."""
    expected, found = losses(plain), losses(path)
    assert [key for key, _ in found] == [key for key, _ in expected]
    for (key, one), (_, other) in zip(expected, found, strict=True):
        assert abs(one - other) <= 1e-5 * abs(one), (key, one, other)


def losses(path: Path) -> list[tuple[tuple[int, str], float]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "train_loss", "val_loss")
    return [((row["step"], name), row[name]) for row in rows for name in names if name in row]


if __name__ == "__main__":
    with process_group(world_of_environment(), "gloo", torch.device("cpu")):
        main()
