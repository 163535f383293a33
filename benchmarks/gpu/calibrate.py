"""Measured memory next to the predicted, for every case of grid.py: one row a run.

    PYTHONPATH=src python -m benchmarks.gpu.calibrate --out results-of-my-card --minutes 7
    PYTHONPATH=src python -m benchmarks.gpu.calibrate --out results-of-my-card --predict-again

Each case runs in a fresh process on the card, and `tightfit.dryrun` runs the same script for that card meanwhile, on
the processor. Rows are added to calibrate.csv as they come; a case that is in it is not run again. `--predict-again`
needs no GPU: it keeps what was measured and predicts it with the present tightfit. `--dry` puts a virtual H200 in the
card's place, which shows that all of this runs and nothing else: such rows have no errors.
"""

import argparse
import csv
import difflib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.grid import Case, grid
from tightfit.errors import ConfigError, DeviceError, TightfitError

WORKLOAD = processes.HERE / "workload.py"
KINDS = ("requested", "allocated", "reserved", "device_used")
OOM_FIGURES = ("tried_bytes", "free_bytes", "process_bytes", "allocated_bytes", "unallocated_bytes")
MEASURED = (
    "outcome", *(f"{kind}_bytes" for kind in KINDS), "retries", "context_start_bytes", "context_bytes", "phase",
    *(f"oom_{name}" for name in OOM_FIGURES), "message",
)  # fmt: skip
FACTS = (
    "allowed_bytes", "others_bytes", "used_source", "total_bytes", "gpu", "capability", "torch", "cuda", "driver",
    "python", "date",
)  # fmt: skip
FIELDS = (
    "id", "arguments", "dry",
    *(f"measured_{name}" for name in MEASURED), *(f"predicted_{name}" for name in MEASURED),
    *(f"{kind}_error" for kind in KINDS), "predicted_need_bytes", "predicted_not_modelled",
    "step_ms", "measured_seconds", "predicted_seconds",
    *FACTS, "revision",
)  # fmt: skip
DRY_CARD = "H200"
_LONGEST_REMARK = 500
Row = dict[str, Any]


def main() -> None:
    options = _parser().parse_args()
    path = options.out / "calibrate.csv"
    options.out.mkdir(parents=True, exist_ok=True)
    if options.predict_again:
        predict_again(path, jobs=options.jobs)
        return
    cases = chosen(grid(), options.only)
    if options.list:
        print(*(f"{case.id}: {' '.join(case.arguments)}" for case in cases), sep="\n")
        return
    calibrate(cases, path, dry=options.dry, minutes=options.minutes, jobs=options.jobs, again=options.again)


def chosen(cases: Iterable[Case], ids: Sequence[str]) -> list[Case]:
    """Those with these ids, or all, as far as their libraries are installed; ConfigError for an unknown id."""
    every = list(cases)
    if unknown := set(ids) - {case.id for case in every}:
        near = difflib.get_close_matches(min(unknown), [case.id for case in every], n=1, cutoff=0)[0]
        raise ConfigError(f"no case has the id {min(unknown)}; the nearest is {near}")
    found = [case for case in every if not ids or case.id in ids]
    if not processes.has_liger() and any(case.loss == "liger" for case in found):
        print("liger-kernel is not installed: its cases are left out", flush=True)
        found = [case for case in found if case.loss != "liger"]
    return found


def calibrate(
    cases: Iterable[Case],
    path: Path,
    *,
    dry: bool = False,
    minutes: float = 7.0,
    jobs: int = 2,
    again: Sequence[str] = (),
) -> int:
    """Run what is not in the CSV yet, in order, and return how many rows came to it. No case starts after `minutes`.

    DeviceError if the first case does not get as far as the card.
    """
    ends = time.monotonic() + 60 * minutes
    done = {row["id"] for row in read(path) if dry or not row["dry"]} - set(again)
    pending = [case for case in cases if case.id not in done]
    card: Row = {}
    waiting: list[tuple[Row, Future[Row]]] = []
    written = 0
    with ThreadPoolExecutor(jobs) as pool:
        for case in pending:
            if time.monotonic() >= ends:
                print(f"{minutes:g} minutes are over; {len(pending) - len(waiting)} cases are left", flush=True)
                break
            row = measure(case, dry=dry)
            if not row["gpu"] and not card:
                raise DeviceError(f"{case.id} did not reach a card: {row['measured_message']}")
            card = card or {name: row[name] for name in ("gpu", "capability", "total_bytes", "torch")}
            row |= card  # a case that was killed has not told them
            append(path, row)  # a run that is killed now has lost the prediction alone
            waiting.append((row, pool.submit(predict, case.arguments, card)))
            while written < len(waiting) and waiting[written][1].done():
                _say(append(path, _finished(*waiting[written])))
                written += 1
        for each in waiting[written:]:
            _say(append(path, _finished(*each)))
    return len(waiting)


def measure(case: Case, *, dry: bool) -> Row:
    """What a case takes on the card, or in its place on the virtual one."""
    if dry:
        ran = processes.run_on_virtual(WORKLOAD, case.arguments, {"gpu": DRY_CARD})
    else:
        ran = processes.run_on_card(WORKLOAD, case.arguments)
    figures = _figures(ran)
    row = {"id": case.id, "arguments": " ".join(case.arguments), "dry": "yes" if dry else ""}
    row |= {f"measured_{name}": value for name, value in _columns(figures).items()}
    row |= {name: figures.get(name, "") for name in FACTS}
    steps = sorted(figures.get("step_ms", [])[1:])
    return {
        **row,
        "step_ms": steps[len(steps) // 2] if steps and not dry else "",
        "measured_seconds": ran.seconds,
        "revision": _revision(),
    }


def predict(arguments: Sequence[str], card: Row) -> Row:
    """What `tightfit.dryrun` says of the same script on the same card, with and without a limit that it acts.

    `card` has the name, the total bytes and the compute capability.
    """
    capability = [int(part) for part in card["capability"].split(".")]
    request = {"gpu": card["gpu"], "memory_bytes": int(card["total_bytes"]), "capability": capability}
    ran = processes.run_on_virtual(WORKLOAD, arguments, request)
    row: Row = {f"predicted_{name}": value for name, value in _columns(_figures(ran)).items()}
    row["predicted_seconds"] = ran.seconds
    row["predicted_not_modelled"] = "; ".join((ran.findings or {}).get("not_modelled", []))[:_LONGEST_REMARK]
    if "--act-as" in arguments:
        whole = processes.run_on_virtual(WORKLOAD, without_limit(arguments), request).figures or {}
        row["predicted_need_bytes"] = whole.get("reserved_bytes", "")
    return row


def predict_again(path: Path, *, jobs: int) -> None:
    """Replace the predictions of all rows; ConfigError unless this is the torch that was measured."""
    import torch

    rows = read(path)
    other = {row["torch"] for row in rows if row["torch"].partition("+")[0] != torch.__version__.partition("+")[0]}
    if other:
        raise ConfigError(
            f"{path} was measured with torch {other.pop()}, and this is {torch.__version__}; predict with that version"
        )
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(predict, row["arguments"].split(), row) for row in rows]
        renewed = [
            _finished({**row, "revision": _revision()}, future) for row, future in zip(rows, futures, strict=True)
        ]
    write(path, renewed)


def errors(row: Row) -> Row:
    """Predicted over measured, less 1, where both fit and the measured side is a real card."""
    if row["dry"] or not row["measured_outcome"] == row["predicted_outcome"] == "fits":
        return {f"{kind}_error": "" for kind in KINDS}
    return {
        f"{kind}_error": f"{int(row[f'predicted_{kind}_bytes']) / int(row[f'measured_{kind}_bytes']) - 1:.6f}"
        for kind in KINDS
    }


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none if it does not exist."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """All rows anew, written beside and renamed."""
    beside = path.with_suffix(".part")
    with open(beside, "w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows({name: row.get(name, "") for name in FIELDS} for row in rows)
    beside.replace(path)


def append(path: Path, row: Row) -> Row:
    """One more row, in place of one with its id."""
    write(path, [*(each for each in read(path) if each["id"] != row["id"]), row])
    return row


def _say(row: Row) -> None:
    said = [f"{row['id']}: {row['measured_outcome']}, predicted {row['predicted_outcome']}"]
    if row["reserved_error"]:
        said.append(f"reserved {int(row['measured_reserved_bytes']):,}, {float(row['reserved_error']):+.2%}")
    print(", ".join(said), flush=True)


def _finished(row: Row, prediction: "Future[Row]") -> Row:
    row = {**row, **prediction.result()}
    return row | errors(row)


def _figures(ran: processes.Ran) -> Row:
    """What the workload wrote; of one that failed, the last line that it printed is the message."""
    figures = ran.figures or {"outcome": "error"}
    return {**figures, "message": ran.last_line} if figures["outcome"] == "error" else figures


def _columns(figures: Row) -> Row:
    failure = figures.get("failure", {})
    found = {name: figures.get(name, "") for name in MEASURED if not name.startswith("oom_")}
    return found | {f"oom_{name}": failure.get(name, "") for name in OOM_FIGURES}


def without_limit(arguments: Sequence[str]) -> list[str]:
    """The same words without a limit to act under."""
    words = list(arguments)
    for name in ("--act-as", "--others"):
        if name in words:
            at = words.index(name)
            del words[at : at + 2]
    return words


def _revision() -> str:
    from benchmarks.gpu.card import revision  # imports torch

    return revision()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for calibrate.csv")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case is started after so long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="predictions at a time")
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="these cases alone")
    parser.add_argument("--again", nargs="+", default=[], metavar="ID", help="run these also if they are in the file")
    parser.add_argument("--dry", action="store_true", help="a virtual H200 in the card's place")
    parser.add_argument("--predict-again", action="store_true", help="keep what was measured, predict it anew")
    parser.add_argument("--list", action="store_true", help="show the cases and end")
    return parser


if __name__ == "__main__":
    try:
        main()
    except TightfitError as error:
        sys.exit(str(error))
