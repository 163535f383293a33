"""Bytes that operators take inside their bodies: measured, next to what the table of hidden bytes says.

    PYTHONPATH=src python -m benchmarks.gpu.hidden --out results-of-my-card

One row for each operator, shape and dtype of probes.py, in hidden.csv. The table's side is the same script under
`tightfit.dryrun`.
"""

import argparse
import csv
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.calibrate import DRY_CARD
from tightfit.errors import DeviceError, TightfitError

PROBES = processes.HERE / "probes.py"
FIELDS = (
    "operator", "variant", "shape", "dtype", "dry", "measured_extra_bytes", "table_extra_bytes", "difference_bytes",
    "measured_outputs_bytes", "table_outputs_bytes", "measured_allocations", "table_allocations", "measured_error",
    "table_error", "gpu", "torch", "cuda", "driver", "date",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for hidden.csv")
    parser.add_argument("--operators", nargs="+", default=[], help="these alone")
    parser.add_argument("--dry", action="store_true", help="a virtual H200 in the card's place")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = probe(options.operators, dry=options.dry)
    with open(options.out / "hidden.csv", "w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(rows)
    missed = [row for row in rows if row["difference_bytes"] not in ("", 0)]
    failed = [row for row in rows if row["measured_error"] or row["table_error"]]
    print(f"{len(rows)} probes, {len(missed)} differ from the table, {len(failed)} could not run")
    for row in sorted(missed, key=lambda row: -abs(row["difference_bytes"]))[:20]:
        print(
            f"{row['operator']} {row['variant']} {row['shape']} {row['dtype']}: "
            f"{row['measured_extra_bytes']:,} measured, {row['table_extra_bytes']:,} in the table"
        )


def probe(operators: list[str], *, dry: bool = False) -> list[dict[str, Any]]:
    """Rows of all probes, or of these operators'; a dry one has no difference."""
    words = ["--operators", *operators] if operators else []
    on_card = (
        processes.run_on_virtual(PROBES, words, {"gpu": DRY_CARD}) if dry else processes.run_on_card(PROBES, words)
    )
    if on_card.figures is None:
        raise DeviceError(f"the probes failed: {on_card.last_line}")
    facts = on_card.figures
    capability = [int(part) for part in facts["capability"].split(".")]
    request = {"gpu": facts["gpu"], "memory_bytes": facts["total_bytes"], "capability": capability}
    on_table = processes.run_on_virtual(PROBES, words, request)
    if on_table.figures is None:
        raise DeviceError(f"the probes failed on the virtual card: {on_table.last_line}")
    pairs = zip(facts["probes"], on_table.figures["probes"], strict=True)
    common = {name: facts[name] for name in ("gpu", "torch", "cuda", "driver")}
    common |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "dry": "yes" if dry else ""}
    return [{**row_of(measured, table, dry=dry), **common} for measured, table in pairs]


def row_of(measured: dict[str, Any], table: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    row = {name: measured[name] for name in ("operator", "variant", "shape", "dtype")}
    for side, found in (("measured", measured), ("table", table)):
        for name in ("extra_bytes", "outputs_bytes", "allocations", "error"):
            row[f"{side}_{name}"] = found.get(name, "")
    both = not dry and not measured["error"] and not table["error"]
    row["difference_bytes"] = table["extra_bytes"] - measured["extra_bytes"] if both else ""
    return row


if __name__ == "__main__":
    try:
        main()
    except TightfitError as error:
        sys.exit(str(error))
