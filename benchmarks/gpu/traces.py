"""Records the allocator's trace of about 20 cases, replays it, and holds the recorder's requests against it.

    PYTHONPATH=src python -m benchmarks.gpu.traces --out results-of-my-card --minutes 7

traces.zip holds the traces (see tracefile.py), traces.csv a row for each: whether the same requests make the same
segments in tightfit's allocator, and whether the virtual GPU saw the same requests for the same script.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes, tracefile
from benchmarks.gpu.calibrate import DRY_CARD, FACTS, WORKLOAD, chosen, read
from benchmarks.gpu.grid import Case
from benchmarks.gpu.replay import Replayed, compare_requests, replay
from tightfit.errors import ConfigError, DeviceError, TightfitError

FIELDS = (
    "id", "dry", "entries", "allocations", "segments_equal", "segment_events", "segment_difference", "places_equal",
    "places_same", "measured_reserved_bytes", "replayed_reserved_bytes", "requests_equal", "requests_same",
    "requests_difference", "requests_only", "gpu", "torch", "cuda", "driver", "date",
)  # fmt: skip


def cases() -> list[Case]:
    """Two steps are enough: the second meets the cache that the first has left."""
    base = Case(steps=2)
    changes: tuple[dict[str, Any], ...] = (
        {}, {"compile": True, "micro_batch": 16}, {"loss": "full", "micro_batch": 8}, {"do": ("eval", "train", "save")},
        {"do": ("hf-trainer",), "micro_batch": 8}, {"checkpointing": 12, "micro_batch": 16},
        {"loss": "full", "micro_batch": 4, "act_as": "11.69GiB", "others": "2GiB", "do": ("eval", "train", "save")},
        {"loss": "full", "micro_batch": 64, "compile": True, "do": ("eval",), "act_as": "11.69GiB", "others": "2GiB"},
        {"dtype": "float32"}, {"dtype": "float16", "loss": "full"}, {"do": ("resume", "train")},
        {"optimizer": "foreach"}, {"optimizer": "loop"}, {"dropout": 0.1}, {"accumulation": 4},
        {"loss": "full", "compile": True, "micro_batch": 8}, {"loss": "chunked", "micro_batch": 1},
        {"size": "gpt2-medium", "micro_batch": 4}, {"size": "6x384", "micro_batch": 64, "block": 256},
        {"size": "gpt2-large", "micro_batch": 2, "checkpointing": 36},
        {"micro_batch": 8, "dropout": 0.1, "compile": True},
    )  # fmt: skip
    return [replace(base, **change) for change in changes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for traces.zip and traces.csv")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case is started after so long")
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="these cases alone")
    parser.add_argument("--dry", action="store_true", help="a virtual H200 in the card's place")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record(chosen(cases(), options.only), options.out, dry=options.dry, minutes=options.minutes)


def record(selected: Iterable[Case], out: Path, *, dry: bool = False, minutes: float = 7.0) -> None:
    """Record what is not in traces.zip yet; ConfigError if that has dry traces and these are not, or the reverse."""
    ends = time.monotonic() + 60 * minutes
    place = out / "traces.zip"
    done = tracefile.names(place)
    if done and tracefile.read(place, done[0])[0]["dry"] != dry:
        raise ConfigError(f"{place} is of {'a real card' if dry else 'a dry run'}; give another folder")
    for case in selected:
        if case.id in done:
            continue
        if time.monotonic() >= ends:
            print(f"{minutes:g} minutes are over", flush=True)
            break
        figures, trace = _recorded(case, None if not dry else {"gpu": DRY_CARD})
        facts = {name: figures[name] for name in (*FACTS, "context_bytes", "reserved_bytes", "outcome")}
        facts |= {"id": case.id, "arguments": case.arguments, "dry": dry}
        tracefile.add(place, case.id, facts, trace)
        request = {"gpu": facts["gpu"], "memory_bytes": facts["total_bytes"], "context_bytes": facts["context_bytes"]}
        _, seen = _recorded(case, request)
        _append(out / "traces.csv", row_of(facts, trace, seen))


def _recorded(case: Case, request: dict[str, Any] | None) -> tuple[dict[str, Any], tracefile.Trace]:
    """Figures and trace of a case on the card, or for a request on the virtual one."""
    with tempfile.TemporaryDirectory(prefix="tightfit-gpu-") as folder:
        place = Path(folder, "trace.json")
        words = [*case.arguments, "--trace", str(place)]
        if request is None:
            ran = processes.run_on_card(WORKLOAD, words)
        else:
            ran = processes.run_on_virtual(WORKLOAD, words, request)
        if ran.figures is None or ran.figures["outcome"] == "error" or not place.exists():
            raise DeviceError(f"{case.id} left no trace: {ran.last_line}")
        return ran.figures, json.loads(place.read_text())


def replayed(facts: dict[str, Any], trace: tracefile.Trace) -> Replayed:
    """A trace through the allocator simulation, with the memory that its card had."""
    return replay(
        trace,
        total_bytes=facts["total_bytes"],
        allowed_bytes=facts["allowed_bytes"],
        context_bytes=facts["context_bytes"],
    )


def row_of(facts: dict[str, Any], trace: tracefile.Trace, seen: tracefile.Trace) -> dict[str, Any]:
    """The row of a trace; a dry one is not held against the recorder, from which it comes."""
    again = replayed(facts, trace)
    row = {name: facts[name] for name in ("id", "gpu", "torch", "cuda", "driver", "date")}
    row |= {
        "dry": "yes" if facts["dry"] else "",
        "entries": len(trace["kind"]),
        "allocations": trace["kind"].count(tracefile.KINDS.index("alloc")),
        "segments_equal": "yes" if again.segments.equal else "no",
        "segment_events": again.segments.expected,
        "segment_difference": again.segments.difference,
        "places_equal": "yes" if again.places.equal else "no",
        "places_same": again.places.same,
        "measured_reserved_bytes": facts["reserved_bytes"],
        "replayed_reserved_bytes": again.peak_reserved_bytes,
    }
    if not facts["dry"]:
        compared, only = compare_requests(trace, seen)
        row |= {
            "requests_equal": "yes" if compared.equal else "no",
            "requests_same": compared.same,
            "requests_difference": compared.difference,
            "requests_only": only,
        }
    return row


def _append(path: Path, row: dict[str, Any]) -> None:
    rows = [*read(path), row]
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(rows)
    said = row.get("requests_equal", "not asked")
    print(f"{row['id']}: segments equal: {row['segments_equal']}, requests equal: {said}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except TightfitError as error:
        sys.exit(str(error))
