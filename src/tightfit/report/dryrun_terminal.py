"""The findings of a dry run as text that fits a terminal."""

import linecache
from pathlib import Path

from tightfit.units import MIB, format_bytes
from tightfit.vgpu.records import Failure, Findings, Origin, Place

_BAR = 24
_LARGEST = 10
_LINE = 100


def dryrun_text(found: Findings) -> str:
    """Findings (see `tightfit.vgpu.findings`) as a report of some thirty lines."""
    parts = [_verdict(found), _categories(found), _phases(found), _largest(found), _remarks(found)]
    return "\n\n".join(part for part in parts if part)


def _verdict(found: Findings) -> str:
    gpu, peak = found.gpu, found.peak
    card = f"{gpu.name}, {format_bytes(gpu.total_bytes)}"
    if gpu.used_by_others_bytes:
        card += f", {format_bytes(gpu.used_by_others_bytes)} of it used by others"
    if found.failure:
        return f"DOES NOT FIT on {card}\n{_failure(found.failure)}"
    if found.outcome == "error":
        return f"ENDED WITH AN ERROR on {card}\n{found.stopped_because}"
    free = gpu.total_bytes - gpu.used_by_others_bytes - peak.device_bytes
    verdict = "FITS AS FAR AS IT WAS PLAYED" if found.not_played else "FITS"
    return (
        f"{verdict} on {card}: at most {format_bytes(peak.device_bytes)} in use, {format_bytes(free)} left\n"
        f"peak in {peak.phase}: {format_bytes(peak.requested_bytes)} requested, "
        f"{format_bytes(peak.allocated_bytes)} allocated, {format_bytes(peak.reserved_bytes)} reserved, "
        f"and {format_bytes(gpu.context_bytes)} outside PyTorch"
    )


def _failure(failure: Failure) -> str:
    what = _tensor(failure)
    lines = [
        f"in {failure.phase}, {failure.operator} asked for {format_bytes(failure.requested_bytes)}"
        + (f": {what}" if what else ""),
        f"{format_bytes(failure.free_bytes)} were free; PyTorch had {format_bytes(failure.allocated_bytes)} "
        f"allocated and {format_bytes(failure.reserved_bytes - failure.allocated_bytes)} in its cache",
    ]
    if failure.file:
        lines.append(f"at {_place(failure)}, in {failure.function}")
        source = linecache.getline(failure.file, failure.line).strip()
        if source:
            lines.append(f"    {source[:_LINE]}")
    return "\n".join(lines)


def _categories(found: Findings) -> str:
    sums = found.categories
    if not sums:
        return ""
    total, largest = sum(sums.values()), max(sums.values())
    when = "when it failed" if found.failure else "at the peak"
    rows = []
    for category, nbytes in sorted(sums.items(), key=lambda item: -item[1]):
        bar = "█" * max(1, round(_BAR * nbytes / largest))
        phases = found.categories_by_phase.get(category, {})
        made = ", ".join(f"{phase} {format_bytes(count)}" for phase, count in sorted(phases.items(), key=_by_size))
        rows.append(f"  {category:<16} {format_bytes(nbytes):>12}  {bar:<{_BAR}}  made in {made}")
    return f"Memory {when}, {format_bytes(total)} requested\n" + "\n".join(rows)


def _by_size(item: tuple[str, int]) -> int:
    return -item[1]


def _phases(found: Findings) -> str:
    peaks = ", ".join(f"{phase} {format_bytes(nbytes)}" for phase, nbytes in found.phases.items())
    return f"Highest allocated in each phase: {peaks}" if peaks else ""


def _largest(found: Findings) -> str:
    rows = [
        f"  {format_bytes(each.bytes):>12}  {_tensor(each) or each.operator}"
        + (f"  {_place(each)}" if each.file else "")
        for each in found.largest[:_LARGEST]
        if each.bytes >= MIB
    ]
    return "Largest at that moment\n" + "\n".join(rows) if rows else ""


def _tensor(each: Origin) -> str:
    if not each.shape:
        return ""
    shape = " x ".join(map(str, each.shape))
    return f"{shape} {each.dtype}, {each.category}, by {each.operator.removeprefix('aten::')}"


def _place(each: Place) -> str:
    path = Path(each.file)
    try:
        path = path.resolve().relative_to(Path.cwd())
    except ValueError:
        path = Path(*path.parts[-3:])
    return f"{path}:{each.line}"


def _remarks(found: Findings) -> str:
    lines = [f"{found.steps} optimizer steps in {found.seconds:.1f}s; stopped because {found.stopped_because}"]
    if found.caught_failures:
        lines.append(f"out of memory {found.caught_failures} times before, which the script caught")
    made_up = sum(each.times for each in found.made_up_values)
    if made_up:
        where = found.made_up_values[0]
        lines.append(
            f"{made_up} answers were made up, most of them at {_place(where)}: no value was computed, "
            "so a branch that depends on one may go the other way"
        )
    if found.not_played:
        lines.append(f"not played: {', '.join(map(_place, found.not_played))}; --steps plays on")
    if found.not_written:
        lines.append(f"not written: {', '.join(dict.fromkeys(found.not_written))}")
    lines += [f"not modelled: {each}" for each in found.not_modelled]
    lines.append("what is never modelled: never_modelled in --json")
    lines += found.notes
    return "\n".join(lines)
