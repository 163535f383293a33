"""The main job, shown: a plan for a card that is not here, and a run that survives its memory being taken away.

`make demo` runs it. Two steps of one sequence each show what the model takes at least. The run then trains for real
under a memory limit of the kernel's a little above; at its 100th step the limit is lowered until the system has refused
it memory, in the middle of whatever it does then.
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
LEAST = [
    "train", "configs/train_stdlib.py", "--device=cpu", "--fit=off", "--micro_batch=1", "--eval_micro_batch=1",
    "--max_iters=2", "--eval_iters=1", "--sample_at_end=0", "--out_dir=out-least",
]  # fmt: skip
TRAIN = ["train", "configs/train_stdlib.py", "--device=cpu", "--supervise=False"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--room_mib", type=int, default=180, help="what the run may use beyond the least, in MiB")
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    os.chdir(ROOT)
    _show(PLAN)
    subprocess.run([*TIGHTFIT, *PLAN], check=True)

    print()
    _show(LEAST)
    least = subprocess.Popen([*TIGHTFIT, *LEAST], stdout=subprocess.DEVNULL)
    held = 0
    while least.poll() is None:
        held = max(held, _held_bytes(least.pid))
    if least.returncode:
        return least.returncode
    limit = held + options.room_mib * MIB
    print(f"# That took {held // MIB} MiB in all. The kernel lets the next command have {limit // MIB} MiB.\n")

    train = [*TRAIN, f"--memory={limit // MIB}MiB", f"--max_iters={options.steps}"]
    _show(train)
    run = subprocess.Popen(
        [*TIGHTFIT, *train],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert run.stdout is not None
    refused = threading.Event()
    for line in run.stdout:
        print(line, end="", flush=True)
        if "out of memory in" in line:
            refused.set()
        if line.startswith("iter 100:"):
            print("# Now the kernel takes half of what a step needs away, for a moment.", flush=True)
            threading.Thread(target=_squeeze, args=(run.pid, limit, refused), daemon=True).start()
    if run.wait() == 0 and not refused.is_set():
        print("# The run was never refused memory, so it had nothing to survive. Try a smaller --room_mib.")
        return 1
    return run.returncode


def _squeeze(process: int, limit: int, refused: threading.Event) -> None:
    """Lower its limit to halfway between the least and the most that it holds in a step, until it has noticed."""
    held = [_held_bytes(process) for _ in range(1000)]
    try:
        resource.prlimit(process, resource.RLIMIT_DATA, ((min(held) + max(held)) // 2, limit))
        refused.wait(30)
        resource.prlimit(process, resource.RLIMIT_DATA, (limit, limit))
    except ProcessLookupError:
        pass  # it has ended already


def _held_bytes(process: int) -> int:
    time.sleep(0.002)
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    held = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    return next(held, 0)  # nothing of a process that has ended


def _show(words: list[str]) -> None:
    print("$ tightfit " + " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)


if __name__ == "__main__":
    sys.exit(main())
