"""What the plan's model of speed says of published runs of GPT-2, of those that it was set on and of others.

The scripts are played on the virtual card; a step's time is the sum of its kernels' (src/tightfit/simulation/speed.py).
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
RTX_4070 = "GeForce RTX 4070"
WIDE = "--n_layer=18 --n_head=16 --n_embd=896"
PUBLISHED = [
    (A100, "--batch_size=16 --masks=1 --vocab_size=50257", 300.0, True),
    (A100, "--batch_size=16 --masks=1 --vocab_size=50257 --compile=1", 130.0, True),
    (A100, "--batch_size=16 --vocab_size=50257 --compile=1", 96.0, True),
    (A100, "--batch_size=16 --compile=1", 93.0, True),
    (RTX_4070, f"--batch_size=2 --accumulation=4 {WIDE}", 329.0, True),
    (RTX_4070, "--batch_size=4 --accumulation=8", 700.7, False),
    (RTX_4070, "--batch_size=8 --accumulation=64 --compile=1", 9340.0, False),
    ("RTX 4090", "--batch_size=12 --compile=1", 116.1, False),
]
"""Milliseconds of a step over sequences of 1024 tokens in bfloat16; whether a constant of the model was set on it.

- A100: A. Karpathy, "Let's reproduce GPT-2 (124M)" (video lecture, 2024), told again in tokens/s at
  https://tianlong312.github.io/blog/post-nanoGPT-training.
- RTX 4070, uncompiled: nanoGPT's logs in https://github.com/lzwjava/nanoGPT, out-gpt2-200m-smoke/smoke.log and
  out-fineweb-gpt3/train_smoke.log (and train.log: 11,103 ms for 128 passes, 86.7 each).
- RTX 4070, compiled: https://lzwjava.github.io/gpu-training-optimization-en, the same author's run of 8 x 64 at 15.4%
  MFU. The page names neither card nor compiler; the author's other pages and his config/train_fineweb.py do.
- RTX 4090: "29% MFU" of nanoGPT's configuration (https://github.com/karpathy/nanoGPT/issues/182, 2023, torch 2.0)
  by nanoGPT's formula: 12 x 1024 tokens x 854.8 MFLOP / (0.29 x 312 TFLOP/s).
"""


def modelled_ms(gpu: str, words: list[str]) -> float:
    """Milliseconds of a step by the model, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__, "--play", gpu, *words], capture_output=True, text=True, check=True
    ).stdout
    return float(answer.split()[-1])


def play(gpu: str, words: list[str]) -> None:
    """In the process that has the virtual card: print the last step's milliseconds."""
    from tightfit.gpus import resolve_gpu
    from tightfit.simulation.speed import Meter, Work, rates_of
    from tightfit.vgpu.records import Settings
    from tightfit.vgpu.script import run_script
    from tightfit.vgpu.session import VirtualSession

    rates, meter = rates_of(resolve_gpu(gpu)[0], compiled="--compile=1" in words), Meter()
    read: list[Work] = [meter.read()]
    usual = VirtualSession.__init__

    def start(session: VirtualSession, settings: Settings) -> None:
        usual(session, settings)
        session.device.observer = meter
        after_step = session._after_step

        def after() -> None:
            read.append(meter.read())
            after_step()

        session.phases._on_step = after

    VirtualSession.__init__ = start  # type: ignore[method-assign]
    run_script(str(LOOP), ["--eval_iters=1", *words], Settings(gpu=gpu, memory_bytes=80 << 30, steps=4))
    print(1000 * (read[-1] - read[-2]).seconds(rates), flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.csv")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["gpu", "script", "published_ms", "modelled_ms", "difference", "set_on_it"])
        for gpu, words, published, is_set in PUBLISHED:
            modelled = modelled_ms(gpu, words.split())
            row = [
                gpu,
                words,
                published,
                round(modelled, 1),
                f"{modelled / published - 1:+.1%}",
                "yes" if is_set else "no",
            ]
            writer.writerow(row)
            print(*row, sep="  ", flush=True)


if __name__ == "__main__":
    if "--play" in sys.argv:
        play(sys.argv[2], sys.argv[3:])
    main()
