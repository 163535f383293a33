"""What one GPU can do at best: matrix products by dtype and a copy on the device, as JSON.

Run by speed.py. The best of `--repeats` timings of several calls each, random data: zeros let a card clock higher.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import card

PRODUCTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192, help="rows and columns of the matrices")
    parser.add_argument("--copy-bytes", type=int, default=4 * 2**30)
    parser.add_argument("--calls", type=int, default=10, help="calls in one timing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", required=True, help="file for the figures")
    options = parser.parse_args()
    card.require()
    found: dict[str, float] = {}
    for name, dtype in PRODUCTS.items():
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(options.side, options.side, device="cuda", dtype=dtype) for _ in range(2))
        seconds = _best(lambda a=a, b=b: a @ b, options.calls, options.repeats)
        found[f"{name}_tflops"] = 2 * options.side**3 / seconds / 1e12
    source = torch.randint(0, 255, (options.copy_bytes,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), options.calls, options.repeats)
    found["copy_gbps"] = 2 * options.copy_bytes / seconds / 1e9  # bytes read and written
    Path(options.json).write_text(json.dumps({**card.facts(), "ceilings": found}))


def _best(work: Callable[[], object], calls: int, repeats: int) -> float:
    """Seconds of one call in the fastest timing, after two calls that do not count."""
    work(), work()
    fastest = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        fastest = min(fastest, (time.perf_counter() - started) / calls)
    return fastest


if __name__ == "__main__":
    main()
