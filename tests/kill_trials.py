"""Kills training runs at random moments, resumes them, and compares each with one that was never interrupted.

    python tests/kill_trials.py --trials 200

A chain is one run, started, killed with SIGKILL and started again until it ends by itself; then its weights,
moments and metrics must be those of the unbroken run, bit for bit. Moments are spread over the life of a process:
one in ten over its start, where torch is imported, the others over its training. A process saves after every step,
which then takes half of its time (measured: 1.9 of 4.1 s), or after every third (0.7 of 3.7 s).
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from runs import arguments, assert_same_end, command, environment, make_dataset, process

KEYS = {
    "max_iters": 160,
    "lr_decay_iters": 160,
    "eval_interval": 20,
    "dropout": 0.1,
    "batch_size": 3,
    "micro_batch": 2,
    "gradient_accumulation_steps": 2,
}
SAVE_INTERVALS = (1, 1, 3)
"""Drawn from at each start: no result depends on it."""
STARTS_ONE_IN = 10
CHECKPOINTS = ("ckpt.pt", "last.pt", "ckpt.prev.pt", "last.prev.pt")


def kill_at_random(words: list[str], log: Path, draw: random.Random, *, start_s: float, training_s: float) -> str:
    """Start the run and kill it; "start" or "training" for the part of its life it was in, "" if it ended first."""
    in_start = draw.randrange(STARTS_ONE_IN) == 0
    with open(log, "wb") as file:
        running = subprocess.Popen(command(words), env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        if not in_start:
            wait_for(log, "parameters:", running)
        time.sleep(draw.uniform(0, start_s if in_start else training_s))
        if running.poll() is not None:
            if running.returncode:
                raise SystemExit(f"the run failed by itself with exit code {running.returncode}: {log.read_text()}")
            return ""
        running.send_signal(signal.SIGKILL)
    finally:
        running.kill()
        running.wait()
    return "training" if "parameters:" in log.read_text() else "start"


def wait_for(log: Path, text: str, running: subprocess.Popen[bytes]) -> None:
    """Until the run has printed `text` or has ended."""
    while running.poll() is None and text not in log.read_text():
        time.sleep(0.002)


def written(out_dir: Path) -> set[tuple[str, int]]:
    """Files that were begun and neither finished nor removed."""
    return {(path.name, path.stat().st_mtime_ns) for path in out_dir.glob(".*.writing")}


def trials(count: int, folder: Path, *, seed: int, say: Any = print, **keys: Any) -> Counter[str]:
    """Kill runs `count` times in all; AssertionError or SystemExit if one is not as the unbroken run."""
    draw, counts = random.Random(seed), Counter[str]()
    keys = KEYS | keys
    make_dataset(folder / "data" / "tiny")
    start_s, training_s = _unbroken(folder, keys)
    say(f"unbroken run: {start_s:.1f} s to start, {training_s:.1f} s to train")
    while counts["kills"] < count:
        counts["chains"] += 1
        out_dir = folder / f"chain{counts['chains']}"
        while True:
            saved = any((out_dir / name).exists() for name in CHECKPOINTS)
            own = {"init_from": "resume" if saved else "scratch", "save_interval": draw.choice(SAVE_INTERVALS)}
            words = arguments(out_dir, folder / "data", **keys | own)
            log, begun = folder / "log.txt", written(out_dir)
            if counts["kills"] < count:
                killed_in = kill_at_random(words, log, draw, start_s=start_s, training_s=training_s / 2)
            else:
                done, killed_in = process(words), ""
                log.write_text(done.out)
                if done.code:
                    raise SystemExit(f"the run failed by itself: {done.err}")
            counts["resumed"] += saved
            counts["went back to an earlier checkpoint"] += "is cut or damaged" in log.read_text()
            if not killed_in:
                break
            counts["kills"] += 1
            counts[f"killed in {killed_in}"] += 1
            counts["killed while a file was being written"] += bool(written(out_dir) - begun)
            if counts["kills"] % 20 == 0:
                say(f"{counts['kills']} kills, {counts['chains']} chains")
        assert_same_end(folder / "unbroken", out_dir)
        counts["chains equal to the unbroken run"] += 1
    return counts


def _unbroken(folder: Path, keys: dict[str, Any]) -> tuple[float, float]:
    """Make the unbroken run; seconds to its first training and from there to its end."""
    log = folder / "log.txt"
    started = time.perf_counter()
    words = arguments(folder / "unbroken", folder / "data", **keys)
    with open(log, "wb") as file:
        running = subprocess.Popen(command(words), env=environment(), stdout=file)
    wait_for(log, "parameters:", running)
    training = time.perf_counter()
    if running.wait():
        raise SystemExit(f"the unbroken run failed with exit code {running.returncode}")
    return training - started, time.perf_counter() - training


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill training runs at random moments and compare their ends.")
    parser.add_argument("--trials", type=int, default=200, help="kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        counts = trials(given.trials, Path(folder), seed=given.seed, say=lambda line: print(line, flush=True))
    for what, count in counts.items():
        print(f"{count:5} {what}")
    print(f"all equal, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
