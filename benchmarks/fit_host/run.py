"""GPT-2 124M, 64 x 1024 tokens a step, on the processor, in processes that the kernel limits to 4, 6, 8 and 12 GiB.

Writes a row for each: what the plan predicted, what the kernel counted at most, and how nanoGPT's own train.py fared
with the same configuration (`--nanogpt FOLDER`). One optimizer step takes one to three minutes on two cores.
"""

import argparse
import csv
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
GIB, MIB = 2**30, 2**20
FIELDS = [
    "limit_gib", "program", "outcome", "micro_batch", "predicted_mib", "measured_mib", "difference", "step_s", "torch",
]  # fmt: skip
RUN = [
    "--dataset=ids", "--batch_size=64", "--gradient_accumulation_steps=1", "--block_size=1024", "--device=cpu",
    "--eval_iters=1", "--max_iters=1000", "--compile=False", "--log_interval=1",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", type=float, nargs="+", default=[4, 6, 8, 12], help="GiB")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT to run beside")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "limits.csv")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, options.out.open("w", newline="") as file:
        data = Path(folder, "data", "ids")
        data.mkdir(parents=True)
        ids = np.random.default_rng(0).integers(0, 50_257, 500_000, dtype=np.uint16)
        for split in ("train", "val"):
            ids.tofile(data / f"{split}.bin")
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for limit in options.limits:
            writer.writerow(_tightfit(Path(folder), limit))
            if options.nanogpt:
                writer.writerow(_nanogpt(Path(folder), limit, options.nanogpt))
            file.flush()


def _tightfit(folder: Path, limit: float) -> dict[str, object]:
    planned = json.loads(
        subprocess.run(
            [sys.executable, "-m", "tightfit", "plan", *RUN, "--vocab_size=50304", f"--memory={limit}GiB", "--json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        ).stdout
    )
    words = [sys.executable, "-m", "tightfit", "train", *RUN, "--vocab_size=50304", f"--data_dir={folder / 'data'}"]
    words += [f"--out_dir={folder / f'out-{limit}'}", "--supervise=False", f"--memory={limit}GiB"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=_limited(limit))
    assert run.stdout is not None
    output, peak, step_s = "", 0.0, 0.0
    for line in run.stdout:
        output += line
        print(f"{limit} GiB: {line}", end="", flush=True)
        if found := re.match(r"iter 0: .*time ([\d.]+)ms.*\(peak ([\d.]+) (GiB|MiB)\)", line):
            step_s, peak = float(found[1]) / 1000, float(found[2]) * (1024 if found[3] == "GiB" else 1)
            run.send_signal(signal.SIGKILL)  # the step is done, and its peak is known
    run.wait()
    predicted = (planned["best"]["peak_bytes"] + planned["budget"]["context_bytes"]) / MIB
    recovered = "out of memory" in output
    return {
        "limit_gib": limit,
        "program": "tightfit",
        "outcome": ("recovered" if recovered else "trained") if peak else "failed",
        "micro_batch": planned["best"]["keys"]["micro_batch"],
        "predicted_mib": round(predicted),
        "measured_mib": round(peak),
        "difference": f"{predicted / peak - 1:+.2%}" if peak else "",
        "step_s": step_s,
        "torch": torch.__version__,
    }


def _nanogpt(folder: Path, limit: float, nanogpt: Path) -> dict[str, object]:
    link = folder / "nanogpt"
    if not link.exists():
        subprocess.run(["cp", "-r", str(nanogpt), str(link)], check=True)
        subprocess.run(["cp", "-r", str(folder / "data" / "ids"), str(link / "data" / "ids")], check=True)
    words = [sys.executable, "train.py", *RUN, "--dtype=float32"]
    run = subprocess.run(words, capture_output=True, text=True, cwd=link, preexec_fn=_limited(limit))
    errors = [line for line in run.stderr.splitlines() if "Error" in line]
    print(f"{limit} GiB: nanoGPT ended with {run.returncode}: {errors[-1] if errors else ''}", flush=True)
    return {
        "limit_gib": limit,
        "program": "nanoGPT",
        "outcome": "failed" if run.returncode else "trained",
        "torch": torch.__version__,
    }


def _limited(limit: float) -> "object":
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (round(limit * GIB), round(limit * GIB)))

    return limited


if __name__ == "__main__":
    main()
