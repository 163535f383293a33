"""The main job, shown: a plan for a card that is not here, and a run that survives its memory being taken away.

`make demo` runs it. The run trains for real under a memory limit of the kernel's; at its 100th step the limit is
lowered for a second, so that the system refuses it memory in the middle of whatever it does then.
"""

import argparse
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIGHTFIT = [sys.executable, "-m", "tightfit"]
MIB = 2**20
PLAN = ["plan", "configs/train_openwebtext.py", "--gpu", "RTX 3060 12GB", "--memory", "11.69GiB", "--used", "2GiB"]
TRAIN = ["train", "configs/train_stdlib.py", "--device=cpu", "--supervise=False"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit_mib", type=int, default=1100, help="what the run may use, in MiB")
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    os.chdir(ROOT)
    _show(PLAN)
    subprocess.run([*TIGHTFIT, *PLAN], check=True)
    limit = options.limit_mib * MIB
    train = [*TRAIN, f"--memory={options.limit_mib}MiB", f"--max_iters={options.steps}"]
    print(f"\n# The kernel lets the next command have {options.limit_mib} MiB.")
    _show(train)
    run = subprocess.Popen(
        [*TIGHTFIT, *train],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert run.stdout is not None
    for line in run.stdout:
        print(line, end="", flush=True)
        if line.startswith("iter 100:"):
            print("# Now the kernel takes most of it away, for a second.", flush=True)
            threading.Thread(target=_squeeze, args=(run.pid, limit), daemon=True).start()
    return run.wait()


def _squeeze(process: int, limit: int) -> None:
    """Lower its limit to what it holds between steps and two thirds of what a step takes, and raise it again."""
    least = min(_held_bytes(process) for _ in range(200))
    try:
        resource.prlimit(process, resource.RLIMIT_DATA, (least + 72 * MIB, limit))
        time.sleep(1.0)
        resource.prlimit(process, resource.RLIMIT_DATA, (limit, limit))
    except ProcessLookupError:
        pass  # it has ended already


def _held_bytes(process: int) -> int:
    time.sleep(0.002)
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def _show(words: list[str]) -> None:
    print("$ tightfit " + " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)


if __name__ == "__main__":
    sys.exit(main())
