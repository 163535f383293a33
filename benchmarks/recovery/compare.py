"""One allocation refused in the middle of a run: what four ways to survive it leave of the training.

    pip install -e '.[dev]' && python -m benchmarks.recovery.compare

Every run is a fresh process. All train the same GPT on the same 320 sequences, each once, as 20 steps of 8 x 2 = 16
sequences. One error, that of an allocation that PyTorch's CPU allocator really refuses, comes at the same place:

- backward: in the middle of the second backward pass of step 7;
- optimizer: in the update of step 7, before the middle one of the operators that write parameters;
- evaluation: in the second batch of the evaluation after step 10;
- search: for Lightning's finder, which works before the training, in its second trial.

What happened is observed, not asked of the tools (but for their step counter): the sequences by their tokens as the
model is called, the updates by digests of the parameters before and after. An update counts if the final parameters
follow from it. Rows go to results/compare.csv, the table into README.md.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.recovery.tools import TOOLS, make_dataset
from benchmarks.recovery.watch import Watch, digest

HERE = Path(__file__).parent
TIMEOUT_S = 240


def run_here(tool: str, failure: str, folder: Path) -> None:
    """One run in this process; what was seen goes to seen.json and final.pt."""
    watch = Watch(failure)
    watch.install()
    ended = ""
    try:
        TOOLS[tool].drive(watch, folder)
    except BaseException as error:  # a tool that leaves by SystemExit has not survived either
        ended = f"{type(error).__name__}: {error}"
        raise
    finally:
        if watch.model is not None:
            torch.save(watch.model.state_dict(), folder / "final.pt")
        saved = [path.name for path in sorted((folder / "out").rglob("*")) if path.suffix in (".ckpt", ".pt", ".bin")]
        seen = {
            "ended": ended,
            "refused": watch.error,
            "failed_after": watch.failed_after,
            "counters": watch.counters,
            "updates": [asdict(update) for update in watch.updates],
            "final": digest(*watch.parameters),
            "checkpoints": saved,
        }
        (folder / "seen.json").write_text(json.dumps(seen))


def run_apart(tool: str, failure: str, folder: Path) -> dict[str, Any]:
    """The same in a fresh process."""
    make_dataset(folder / "data" / "random")
    command = [sys.executable, "-m", "benchmarks.recovery.compare", "--one", tool, failure, str(folder)]
    with open(folder / "log.txt", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            command, cwd=HERE.parents[1], env=environment, stdout=log, stderr=log, timeout=TIMEOUT_S, check=False
        )
    if not (folder / "seen.json").exists():
        sys.exit(f"{tool}, {failure}: no record was left\n{(folder / 'log.txt').read_text()[-3000:]}")
    seen = json.loads((folder / "seen.json").read_text())
    if not failure.startswith("none") and seen["failed_after"] is None:
        sys.exit(f"{tool}, {failure}: the error never came\n{(folder / 'log.txt').read_text()[-3000:]}")
    return seen


def kept(updates: list[dict[str, Any]], final: str) -> list[dict[str, Any]]:
    """The updates that the final parameters follow from."""
    found, now = [], final
    for update in reversed(updates):
        if update["after"] == now:
            found.append(update)
            now = update["before"]
    return found[::-1]


def row_of(tool: str, failure: str, seen: dict[str, Any], usual: dict[str, Any], folders: list[Path]) -> dict[str, Any]:
    """What one run left, against the undisturbed run of the same tool."""
    numbers: dict[str, int] = {}
    for update in usual["updates"]:
        if update["stage"] == "train":
            for each in update["sequences"]:
                numbers.setdefault(each, len(numbers))
    chain = kept(seen["updates"], seen["final"])
    in_chain = {id(update) for update in chain}
    times = Counter(each for update in chain for each in update["sequences"])
    trained = [update for update in seen["updates"] if update["stage"] == "train"]
    before = [len(u["sequences"]) for u in usual["updates"] if u["stage"] == "train"]
    after = [len(u["sequences"]) for u in seen["updates"][seen["failed_after"] or 0 :] if u["stage"] == "train"]
    survived = not seen["ended"]
    if survived:
        lost = sum(update["whole"] and id(update) not in in_chain for update in trained)
    else:  # what was trained is lost with the process, but for what it had saved
        lost = "see checkpoints" if seen["checkpoints"] else sum(update["whole"] for update in trained)
    counters = seen["counters"]
    return {
        "failure": failure,
        "tool": tool,
        "survived": survived,
        "ended_by": seen["ended"].splitlines()[0] if seen["ended"] else "",
        "counter_restarted": any(b < a for a, b in pairwise(counters)),
        "steps_done": sum(update["whole"] for update in trained),
        "steps_lost": lost,
        "half_updates_kept": sum(not update["whole"] for update in chain) if survived else "",
        "sequences": len(numbers),
        "trained_twice": sum(n > 1 for n in times.values()) if survived else "",
        "never_trained": len(numbers.keys() - times.keys()) if survived else "",
        "effective_batch_before": statistics.mode(before),
        "effective_batch_after": statistics.mode(after) if after and survived else "",
        "max_abs_difference": _difference(*folders) if survived else "",
        "ids_twice": _ranges([numbers[each] for each, n in times.items() if n > 1]) if survived else "",
        "ids_never": _ranges([numbers[each] for each in numbers.keys() - times.keys()]) if survived else "",
        "checkpoints": " ".join(seen["checkpoints"]),
        "refused": seen["refused"],
    }


def _difference(one: Path, other: Path) -> float:
    first, second = (torch.load(folder / "final.pt") for folder in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def _ranges(numbers: list[int]) -> str:
    """In the order in which the undisturbed run trains them.

    >>> _ranges([3, 1, 2, 7])
    '1-3 7'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return " ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        "error in", "tool", "survived", "step counter", "steps lost", "half updates kept", "sequences twice",
        "sequences never", "effective batch", "difference of the final parameters",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in (row for row in rows if not row["failure"].startswith("none")):
        if row["survived"]:
            what = [
                "yes",
                "restarted" if row["counter_restarted"] else "went on",
                row["steps_lost"],
                row["half_updates_kept"],
                f"{row['trained_twice']} of {row['sequences']}",
                f"{row['never_trained']} of {row['sequences']}",
                f"{row['effective_batch_before']} -> {row['effective_batch_after']}",
                "none, bit for bit" if row["max_abs_difference"] == 0 else f"{row['max_abs_difference']:.1e}",
            ]
        else:
            what = ["no", "", row["steps_lost"], "", "", "", "", ""]
        lines.append(f"| {' | '.join(map(str, [row['failure'], TOOLS[row['tool']].name, *what]))} |")
    names = ["torch", *dict.fromkeys(tool.package for tool in TOOLS.values())]
    noise = max(row["max_abs_difference"] for row in rows if row["failure"] == "none, again")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return "\n".join(
        [*lines, "", f"Two undisturbed runs of the same tool differ by at most {noise:g}. {versions}; {_processor()}."]
    )


def write(rows: list[dict[str, Any]]) -> None:
    about = {f"{name}_version": version(name) for name in ("torch", *{t.package: 0 for t in TOOLS.values()})}
    about |= {"python": platform.python_version(), "cpu": _processor()}
    with open(HERE / "results" / "compare.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    start, end = "<!-- table, written by compare.py -->\n", "<!-- end -->"
    text = (HERE / "README.md").read_text()
    top, bottom = text.split(start)[0], text.split(end)[1]
    (HERE / "README.md").write_text(f"{top}{start}{table(rows)}\n{end}{bottom}")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="others' rows are not written")
    parser.add_argument("--keep", type=Path, help="an empty folder for what each run leaves")
    parser.add_argument("--one", nargs=3, metavar=("TOOL", "FAILURE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_here(given.one[0], given.one[1], Path(given.one[2]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        base = (given.keep or Path(temporary)).resolve()
        for tool in given.tools:
            usual = run_apart(tool, "none", base / tool / "none")
            if usual["ended"]:
                sys.exit(f"{tool} fails undisturbed: {usual['ended']}")
            for failure in ("none", "none, again", *TOOLS[tool].failures):
                folder = base / tool / failure
                seen = usual if failure == "none" else run_apart(tool, failure, folder)
                rows.append(row_of(tool, failure, seen, usual, [base / tool / "none", folder]))
                print(json.dumps(rows[-1]), flush=True)
    order = ["none", "none, again", "backward", "optimizer", "evaluation", "search"]
    rows.sort(key=lambda row: order.index(row["failure"]))
    print(table(rows))
    if set(given.tools) == set(TOOLS):
        write(rows)


if __name__ == "__main__":
    main()
