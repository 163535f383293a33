"""What the plan's model of speed says of published runs of GPT-2 124M: on an A100, which it was set on, and on others.

The scripts are played on the virtual card; a step's time is the sum of its kernels' (src/tightfit/plan/speed.py).
"""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOP = ROOT / "tests" / "scripts" / "nanogpt_like.py"
A100 = "NVIDIA A100-SXM4-40GB"
PUBLISHED = [
    (A100, "--masks=1 --vocab_size=50257", 300.0),
    (A100, "--masks=1 --vocab_size=50257 --compile=1", 130.0),
    (A100, "--vocab_size=50257 --compile=1", 96.0),
    (A100, "--compile=1", 93.0),
    ("RTX 4090", "--compile=1 --batch_size=12", 116.1),
]
"""Milliseconds of a step. On the A100 16 x 1024 tokens by A. Karpathy, "Let's reproduce GPT-2 (124M)" (video lecture,
2024), told again in tokens/s at https://tianlong312.github.io/blog/post-nanoGPT-training. On the RTX 4090 a pass of
nanoGPT's own configuration, from "29% MFU" (https://github.com/karpathy/nanoGPT/issues/182) by nanoGPT's formula:
12 x 1024 tokens x 854.8 MFLOP / (0.29 x 312 TFLOP/s)."""


def modelled_ms(gpu: str, words: list[str]) -> float:
    """Milliseconds of a step by the model, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__, "--play", gpu, *words], capture_output=True, text=True, check=True
    ).stdout
    return float(answer.split()[-1])


def play(gpu: str, words: list[str]) -> None:
    """In the process that has the virtual card: print the last step's milliseconds."""
    from tightfit.gpus import resolve_gpu
    from tightfit.plan.speed import Meter, Work, rates_of
    from tightfit.vgpu.script import run_script
    from tightfit.vgpu.session import Request, VirtualSession

    meter = Meter(rates_of(resolve_gpu(gpu)[0], compiled="--compile=1" in words))
    read: list[Work] = [meter.read()]
    usual = VirtualSession.__init__

    def start(session: VirtualSession, request: Request) -> None:
        usual(session, request)
        session.device.observer = meter
        after_step = session._after_step

        def after() -> None:
            read.append(meter.read())
            after_step()

        session.phases._on_step = after

    VirtualSession.__init__ = start  # type: ignore[method-assign]
    run_script(
        str(LOOP), ["--batch_size=16", "--eval_iters=1", *words], Request(gpu=gpu, memory_bytes=80 << 30, steps=4)
    )
    print(1000 * (read[-1] - read[-2]).seconds, flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.csv")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["gpu", "script", "published_ms", "modelled_ms", "difference"])
        for gpu, words, published in PUBLISHED:
            modelled = modelled_ms(gpu, words.split())
            row = [gpu, words, published, round(modelled, 1), f"{modelled / published - 1:+.1%}"]
            writer.writerow(row)
            print(*row, sep="  ", flush=True)


if __name__ == "__main__":
    if "--play" in sys.argv:
        play(sys.argv[2], sys.argv[3:])
    main()
