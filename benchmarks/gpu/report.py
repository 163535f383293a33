"""Predicted against measured, from the CSVs of a folder: a Markdown report and a picture.

    PYTHONPATH=src python -m benchmarks.gpu.report benchmarks/gpu/results/h200

Writes report.md and report.svg into the folder. Rows of dry runs are left out and counted: a prediction is never held
against itself.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.calibrate import KINDS, read
from tightfit.errors import ConfigError, TightfitError
from tightfit.units import GIB, format_bytes

MEDIAN_TARGET, WORST_TARGET = 0.005, 0.02
"""Of the error of reserved memory, from the requirement of this benchmark."""
NEAR_LIMIT = 0.01
"""Share of the limit within which a verdict may be wrong."""
_NAMED = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Errors:
    """Sizes of the errors of one figure over all rows that fit, measured and predicted."""

    count: int
    median: float
    worst: float
    """With its sign."""
    worst_id: str


@dataclass(frozen=True)
class Verdicts:
    """Whether runs ended out of memory as predicted, on cards that act as smaller ones."""

    right: int
    wrong: tuple[str, ...]
    """Their ids."""
    near: int
    """Those within NEAR_LIMIT of the limit, which count neither way."""


def measured_rows(rows: list[Row]) -> list[Row]:
    """Without those of dry runs."""
    return [row for row in rows if not row["dry"]]


def errors_of(rows: list[Row], kind: str) -> Errors | None:
    """None if no row has both figures."""
    found = [(float(row[f"{kind}_error"]), row["id"]) for row in measured_rows(rows) if row[f"{kind}_error"]]
    if not found:
        return None
    worst, worst_id = max(found, key=lambda each: abs(each[0]))
    return Errors(len(found), statistics.median(abs(error) for error, _ in found), worst, worst_id)


def verdicts_of(rows: list[Row]) -> Verdicts:
    """Of the rows with a limit: the need is what the virtual card reserved without it."""
    right, near = 0, 0
    wrong: list[str] = []
    for row in measured_rows(rows):
        if not int(row["allowed_bytes"] or 0) or not row["predicted_need_bytes"]:
            continue
        if abs(int(row["predicted_need_bytes"]) / int(row["allowed_bytes"]) - 1) <= NEAR_LIMIT:
            near += 1
        elif row["measured_outcome"] == row["predicted_outcome"]:
            right += 1
        else:
            wrong.append(row["id"])
    return Verdicts(right, tuple(wrong), near)


def markdown(folder: Path) -> str:
    """The report on the CSVs that are there; ConfigError if none is."""
    files = {name: read(folder / f"{name}.csv") for name in ("calibrate", "traces", "hidden", "speed")}
    if not any(files.values()):
        raise ConfigError(f"{folder} has none of calibrate.csv, traces.csv, hidden.csv and speed.csv")
    dry = sum(len(rows) - len(measured_rows(rows)) for rows in files.values())
    kept = {name: measured_rows(rows) for name, rows in files.items()}
    parts = [_title(kept)]
    if dry:
        parts.append(f"{dry} rows of dry runs are left out: nothing was measured in them.")
    for name, write in (("calibrate", _memory), ("traces", _traces), ("hidden", _hidden), ("speed", _speed)):
        if kept[name]:
            parts.append(write(kept[name]))
    return "\n\n".join(parts) + "\n"


def _title(kept: dict[str, list[Row]]) -> str:
    cards = {
        f"{r['gpu']}, torch {r['torch']}, driver {r['driver']}" for rows in kept.values() for r in rows if r["gpu"]
    }
    return "# Measured on " + ("; ".join(sorted(cards)) or "no card")


def _memory(rows: list[Row]) -> str:
    lines = ["## Memory", "", "| figure | rows | median error | worst | case |", "|---|---|---|---|---|"]
    for kind in KINDS:
        found = errors_of(rows, kind)
        if found:
            figures = f"{found.count} | {found.median:.2%} | {found.worst:+.2%} | {found.worst_id}"
            lines.append(f"| {kind.replace('_', ' ')} | {figures} |")
    reserved = errors_of(rows, "reserved")
    if reserved:
        met = reserved.median <= MEDIAN_TARGET and abs(reserved.worst) <= WORST_TARGET
        lines += [
            "",
            f"Target for reserved: median {MEDIAN_TARGET:.1%}, worst {WORST_TARGET:.0%}: {'met' if met else 'missed'}.",
        ]
    verdicts = verdicts_of(rows)
    wrong = f"{len(verdicts.wrong)} wrong" + (f" ({', '.join(verdicts.wrong)})" if verdicts.wrong else "")
    lines += [
        "",
        f"Verdicts on smaller cards, further than {NEAR_LIMIT:.0%} from the limit: {verdicts.right} right, {wrong}; "
        f"{verdicts.near} nearer.",
    ]
    told = [row for row in rows if row["predicted_outcome"] and row["id"] not in verdicts.wrong]
    others = [row for row in told if row["measured_outcome"] != row["predicted_outcome"]]
    lines += [f"- {r['id']}: {r['measured_outcome']} measured, {r['predicted_outcome']} predicted" for r in others]
    misses = _worst(rows)
    if misses:
        lines += ["", "| largest misses of reserved | measured | predicted | error |", "|---|---|---|---|"]
    for row in misses:
        sizes = [format_bytes(int(row[f"{side}_reserved_bytes"])) for side in ("measured", "predicted")]
        lines.append(f"| {row['id']} | {sizes[0]} | {sizes[1]} | {float(row['reserved_error']):+.2%} |")
    apart = [row["id"] for row in rows if row["predicted_not_modelled"]]
    if apart:
        lines += ["", f"Predicted with something left out, as the prediction itself says: {', '.join(apart)}."]
    context = [r for r in rows if r["measured_context_bytes"] and r["predicted_context_bytes"]]
    if context:
        sizes = [
            format_bytes(statistics.median(int(r[f"{s}_context_bytes"]) for r in context))
            for s in ("measured", "predicted")
        ]
        lines += ["", f"Outside PyTorch's allocator: {sizes[0]} measured (median), {sizes[1]} predicted."]
    return "\n".join(lines)


def _worst(rows: list[Row]) -> list[Row]:
    found = [row for row in rows if row["reserved_error"] and float(row["reserved_error"])]
    return sorted(found, key=lambda row: -abs(float(row["reserved_error"])))[:_NAMED]


def _traces(rows: list[Row]) -> str:
    lines = ["## Allocator traces", ""]
    for name, said in (
        ("segments", "made the same segments in the simulation, in the same order"),
        ("requests", "were seen by the virtual GPU request for request"),
    ):
        same = sum(row[f"{name}_equal"] == "yes" for row in rows)
        lines.append(f"- {same} of {len(rows)} traces {said}.")
        lines += [f"  - {r['id']}: {r[f'{name}_difference']}" for r in rows if r[f"{name}_equal"] == "no"]
    return "\n".join(lines)


def _hidden(rows: list[Row]) -> str:
    ran = [row for row in rows if row["difference_bytes"] != ""]
    missed = sorted((r for r in ran if int(r["difference_bytes"])), key=lambda r: -abs(int(r["difference_bytes"])))
    lines = [
        "## Bytes inside operators",
        "",
        f"{len(ran) - len(missed)} of {len(ran)} probes take what the table says.",
    ]
    if missed:
        lines += ["", "| operator | shape | dtype | measured | table |", "|---|---|---|---|---|"]
    for row in missed[: 4 * _NAMED]:
        name = f"{row['operator']} {row['variant']}".strip()
        sizes = f"{int(row['measured_extra_bytes']):,} | {int(row['table_extra_bytes']):,}"
        lines.append(f"| {name} | {row['shape']} | {row['dtype']} | {sizes} |")
    return "\n".join(lines)


def _speed(rows: list[Row]) -> str:
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["step_ms"]:
            by_name[row["name"]].append(row)
    head = ["program", "runs", "ms a step", "tokens/s", "of matmul", "peak"]
    lines = ["## Speed", "", f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for name, runs in by_name.items():
        times = [float(run["step_ms"]) for run in runs]
        spread = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        rate = statistics.median(int(run["tokens_per_s"]) for run in runs)
        share = statistics.median(float(run["share_of_matmul"]) for run in runs)
        peaks = [int(run["peak_bytes"]) for run in runs if run["peak_bytes"]]
        peak = f"{format_bytes(statistics.median(peaks))} ({runs[0]['peak_kind']})" if peaks else ""
        lines.append(f"| {name} | {len(runs)} | {spread} | {rate:,.0f} | {share:.1%} | {peak} |")
    for kind in ("eager", "compiled"):
        ratios = _ratios(by_name[f"nanogpt {kind}"], by_name[f"tightfit {kind}"])
        if ratios:
            lines += [
                "",
                f"tightfit against nanoGPT, {kind}: {statistics.median(ratios):.2f}x the speed "
                f"({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds).",
            ]
    return "\n".join(lines)


def _ratios(theirs: list[Row], ours: list[Row]) -> list[float]:
    """Of the rounds that both ran in."""
    one, other = ({run["round"]: float(run["step_ms"]) for run in runs} for runs in (theirs, ours))
    return [one[number] / other[number] for number in one if number in other]


def picture(rows: list[Row], path: Path) -> bool:
    """Predicted against measured reserved memory, the largest misses named; False if there is nothing to draw."""
    both = [row for row in measured_rows(rows) if row["reserved_error"]]
    if not both:
        return False
    from matplotlib.figure import Figure

    measured = [int(row["measured_reserved_bytes"]) / GIB for row in both]
    predicted = [int(row["predicted_reserved_bytes"]) / GIB for row in both]
    percent = [100 * float(row["reserved_error"]) for row in both]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(measured, predicted, "o", markersize=4)
    ends = [min(measured + predicted), max(measured + predicted)]
    left.plot(ends, ends, linewidth=0.8, color="grey")
    left.set(xlabel="measured reserved, GiB", ylabel="predicted reserved, GiB")
    right.semilogx(measured, percent, "o", markersize=4)
    right.axhline(0, linewidth=0.8, color="grey")
    right.set(xlabel="measured reserved, GiB", ylabel="error, %")
    for row in _worst(both):
        place = (int(row["measured_reserved_bytes"]) / GIB, 100 * float(row["reserved_error"]))
        right.annotate(row["id"], place, xytext=(4, 4), textcoords="offset points", fontsize=6)
    figure.suptitle(f"{both[0]['gpu']}, torch {both[0]['torch']}: {len(both)} runs", fontsize=10)
    figure.savefig(path)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the CSVs are")
    folder = parser.parse_args().folder
    text = markdown(folder)
    (folder / "report.md").write_text(text)
    print(text)
    try:
        drawn = picture(read(folder / "calibrate.csv"), folder / "report.svg")
    except ImportError:
        print("No picture was drawn: matplotlib is not installed.")
        return
    if not drawn:
        print("No picture was drawn: calibrate.csv has no run that fits, measured and predicted.")


if __name__ == "__main__":
    try:
        main()
    except TightfitError as error:
        sys.exit(str(error))
