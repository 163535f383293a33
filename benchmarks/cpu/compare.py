"""Training speed and peak memory on the CPU against nanoGPT's train.py: whole programs, in turn, same work.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/cpu/compare.py --nanogpt nanoGPT --sizes small medium 124m-4x256 124m-2x1024

Each program is started fresh, `--repeats` times in turn (A B A B ...). The time is the median of the step times that
it prints, without the first two; the memory is the operating system's peak for the process. Random tokens: the
work does not depend on what they say. Rows go to results/compare.csv.
"""

import argparse
import csv
import json
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# n_layer, n_head, n_embd, block_size, batch_size, vocabulary, steps
SIZES = {
    "small": (4, 4, 128, 64, 12, 65, 300),
    "medium": (6, 6, 384, 256, 16, 65, 14),
    "124m-4x256": (12, 12, 768, 256, 4, 50304, 7),
    "124m-2x1024": (12, 12, 768, 1024, 2, 50304, 6),
}


def make_dataset(folder: Path, vocab_size: int) -> None:
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, min(vocab_size, 50257), 200_000).astype(np.uint16)
    tokens.tofile(folder / "train.bin")
    tokens[:50_000].tofile(folder / "val.bin")
    characters = [chr(32 + i) for i in range(vocab_size)]
    meta = {"vocab_size": vocab_size, "itos": dict(enumerate(characters)), "stoi": {}}
    meta["stoi"] = {c: i for i, c in meta["itos"].items()}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def run_once(command: list[str], folder: Path) -> tuple[float, int]:
    """Median ms of a step after the first two, and peak resident bytes."""
    log = folder / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    text = log.read_text()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    times = [float(ms) for ms in re.findall(r"^iter \d+: .*?time ([\d.]+)ms", text, re.MULTILINE)]
    return statistics.median(times[2:]), usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compare.csv")
    given = parser.parse_args()
    rows = []
    for size in given.sizes:
        layers, heads, width, block, batch, vocab, steps = SIZES[size]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_dataset(folder / "data" / "random", vocab)
            keys = {
                "dataset": "random", "n_layer": layers, "n_head": heads, "n_embd": width, "block_size": block,
                "batch_size": batch, "gradient_accumulation_steps": 1, "max_iters": steps, "eval_iters": 1,
                "eval_interval": 100_000, "log_interval": 1, "device": "cpu", "compile": False, "warmup_iters": 2,
                "lr_decay_iters": 100_000,
            }  # fmt: skip
            options = [f"--{key}={value}" for key, value in keys.items()]
            programs = {
                "nanogpt": [sys.executable, str(given.nanogpt.resolve() / "train.py"), "--dtype=float32", *options],
                "tightfit": [sys.executable, "-m", "tightfit", "train", *options],
            }
            # nanoGPT reads configurator.py from the working folder
            (folder / "configurator.py").write_bytes((given.nanogpt / "configurator.py").read_bytes())
            for repeat in range(given.repeats):
                for program, command in programs.items():
                    ms, peak = run_once(command, folder)
                    rows.append({"size": size, "repeat": repeat, "program": program, "step_ms": ms, "peak_bytes": peak})
                    print(json.dumps(rows[-1]), flush=True)
        report(size, rows)
    write(given.out, rows)


def report(size: str, rows: list[dict[str, object]]) -> None:
    mine = [r for r in rows if r["size"] == size]
    by = {p: [r for r in mine if r["program"] == p] for p in ("nanogpt", "tightfit")}
    speed = [a["step_ms"] / b["step_ms"] for a, b in zip(by["nanogpt"], by["tightfit"], strict=True)]
    memory = [b["peak_bytes"] / a["peak_bytes"] for a, b in zip(by["nanogpt"], by["tightfit"], strict=True)]
    print(
        f"{size}: {statistics.median(speed):.2f}x the speed ({min(speed):.2f} to {max(speed):.2f}), "
        f"{statistics.median(memory):.2f}x the memory"
    )


def write(path: Path, rows: list[dict[str, object]]) -> None:
    import torch

    machine = {"torch": torch.__version__, "python": platform.python_version(), "cpu": _processor()}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", text)
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
