"""The sections of a dry run's report: the verdict, memory over time with its tensors, and what was assumed."""

import linecache
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tightfit.report.sections import Chart, Page, Section, Table
from tightfit.report.series import Timeline, shortened
from tightfit.report.timeline_picture import CATEGORY_COLOURS
from tightfit.units import format_bytes
from tightfit.wording.report import Words

_LINE = 100
_TABLE_ROWS = 24


def dryrun_page(found: Mapping[str, Any], t: Words) -> Page:
    """Findings (see `tightfit.vgpu.findings`) as a page."""
    gpu, fits = found["gpu"], found["outcome"] == "fits"
    sections = [timeline_section(found, t), _failure(found, t), _categories(found, t), _largest(found, t)]
    sections += [_phases(found, t), _remarks(found, t)]
    return Page(
        title=t("dryrun", "title", gpu=gpu["name"]),
        verdict=t("outcome", "fits_as_played" if found.get("not_played") and fits else found["outcome"]),
        is_bad=not fits,
        facts=_facts(found, t),
        sections=[section for section in sections if section is not None],
    )


def _facts(found: Mapping[str, Any], t: Words) -> list[tuple[str, str, str]]:
    gpu, peak = found["gpu"], found["peak"]
    free = gpu["total_bytes"] - gpu["used_by_others_bytes"] - peak["device_bytes"]
    in_phase = t("dryrun", "in_phase", phase=t.name("phase", peak["phase"]))
    facts = [
        (t("dryrun", "card"), format_bytes(gpu["total_bytes"]), gpu["name"]),
        (t("dryrun", "others"), format_bytes(gpu["used_by_others_bytes"]), ""),
        (t("dryrun", "device"), format_bytes(peak["device_bytes"]), t("dryrun", "with_context")),
        (t("dryrun", "allocated"), format_bytes(peak["allocated_bytes"]), in_phase),
        (t("dryrun", "reserved"), format_bytes(peak["reserved_bytes"]), ""),
    ]
    if found["failure"]:
        facts.append((t("dryrun", "asked"), format_bytes(found["failure"]["requested_bytes"]), ""))
        facts.append((t("dryrun", "free"), format_bytes(found["failure"]["free_bytes"]), ""))
    else:
        facts.append((t("dryrun", "left"), format_bytes(max(0, free)), ""))
    return facts


def timeline_section(found: Mapping[str, Any], t: Words) -> Section | None:
    """The chart of memory by category; None where the findings have no timeline, or nothing happened in it."""
    data = found.get("timeline")
    if not data or not data["events"]:
        return None
    only_peak = not data.get("tensors")
    if only_peak:
        event = _marked_event(found, data)
        data = {**data, "tensors": [{**each, "from_event": event, "to_event": event + 1} for each in found["largest"]]}
    short = shortened(data)
    mark = _marked_event(found, data)
    at = short.at(mark)
    total = sum(row[at] for row in short.category_bytes.values())
    words = {"bytes": format_bytes(total), "event": f"{short.event_count:,}"}
    spec = _spec(found, data, short, t, only_peak)
    notes = []
    if short.given_moments < short.event_count or len(short.events) < short.given_moments:
        notes.append(t("timeline", "spans", events=f"{short.event_count:,}", moments=f"{len(short.events):,}"))
    if not only_peak and len(short.tensors) < short.given_tensors:
        notes.append(t("timeline", "tensors", given=f"{short.given_tensors:,}", kept=f"{len(short.tensors):,}"))
    if spec["capacity"]:
        notes.append(spec["capacity"]["label"])
    notes.append(t("timeline", "how"))
    key = "summary_failed" if spec["failed"] else "summary"
    phase = t.name("phase", _phase_at(short, mark))
    chart = Chart(
        spec=spec, summary=t("timeline", key, phase=phase, **words), notes=notes, table=_timeline_table(short, t)
    )
    return Section(id="timeline", title=t("timeline", "title"), chart=chart)


def _marked_event(found: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    """The failure that ended the run, or else the peak."""
    failures = data.get("failures") or []
    if found["outcome"] == "out_of_memory" and failures:
        return max(0, int(failures[-1]["event"]) - 1)
    return int(data["peak"]["event"])


def _phase_at(short: Timeline, event: int) -> str:
    return next((phase for start, phase in reversed(short.phases) if start <= event), "")


def _spec(
    found: Mapping[str, Any], data: Mapping[str, Any], short: Timeline, t: Words, only_peak: bool
) -> dict[str, Any]:
    capacity = data["total_bytes"] - data["used_by_others_bytes"] - data["context_bytes"]
    names = [name for name in CATEGORY_COLOURS if name in short.category_bytes]
    return {
        "kind": "stack",
        "x_name": t("timeline", "x"),
        "events": short.events,
        "end": max(short.event_count, short.events[-1] + 1),
        "rows": [
            {
                "key": name,
                "name": t.name("category", name),
                "colour": f"--c-{name.replace(' ', '-')}",
                "y": short.category_bytes[name],
            }
            for name in names
        ],
        "reserved": short.reserved_bytes,
        "phases": [[event, phase.replace(" ", "-"), t.name("phase", phase)] for event, phase in short.phases],
        "failures": [
            {
                "event": each["event"],
                "label": t("timeline", "failure", bytes=format_bytes(each["requested_bytes"])),
            }
            for each in short.failures
        ],
        "failed": found["outcome"] == "out_of_memory" and bool(short.failures),
        "capacity": {
            "bytes": capacity,
            "label": t(
                "timeline", "capacity", bytes=format_bytes(capacity), total=format_bytes(data["total_bytes"])
            ),
        },
        "peak": short.peak_event,
        "mark": _marked_event(found, data),
        "tensors": {**_columns(short.tensors), "only_peak": only_peak},
    }  # fmt: skip


def _columns(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tensors by column, each text once: thousands of them have the same line."""
    texts: dict[str, int] = {"": 0}
    keys = list(dict.fromkeys(str(each["category"]) for each in tensors))

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    columns = {
        "from": [int(each["from_event"]) for each in tensors],
        "to": [each["to_event"] for each in tensors],
        "bytes": [int(each["bytes"]) for each in tensors],
        "category": [keys.index(str(each["category"])) for each in tensors],
        "what": [number(shape_text(each)) for each in tensors],
        "operator": [number(str(each.get("operator") or "")) for each in tensors],
        "place": [number(place_text(each)) for each in tensors],
        "source": [number(source_line(each)) for each in tensors],
    }
    return {**columns, "keys": keys, "texts": list(texts)}


def _timeline_table(short: Timeline, t: Words) -> Table:
    """Spread over the run, with each stretch's highest moment."""
    names = [name for name in CATEGORY_COLOURS if name in short.category_bytes]
    totals = [sum(row[index] for row in short.category_bytes.values()) for index in range(len(short.events))]
    count = len(short.events)
    edges = sorted({count * index // _TABLE_ROWS for index in range(_TABLE_ROWS + 1)})
    kept = [max(range(start, end), key=totals.__getitem__) for start, end in pairwise(edges)]
    rows = [
        [
            f"{short.events[index]:,}",
            t.name("phase", _phase_at(short, short.events[index])),
            format_bytes(totals[index]),
            *(format_bytes(short.category_bytes[name][index]) for name in names),
        ]
        for index in kept
    ]
    columns = [t("timeline", "event"), t("timeline", "phase"), t("timeline", "total")]
    columns += [t.name("category", name) for name in names]
    numbers = frozenset({0, *range(2, len(columns))})
    return Table(caption=t("timeline", "table"), columns=columns, rows=rows, numbers=numbers)


def _failure(found: Mapping[str, Any], t: Words) -> Section | None:
    failure = found["failure"]
    if not failure:
        return None
    said = t(
        "failure",
        "sentence",
        phase=t.name("phase", failure["phase"]),
        operator=failure["operator"],
        requested=format_bytes(failure["requested_bytes"]),
        free=format_bytes(failure["free_bytes"]),
        allocated=format_bytes(failure["allocated_bytes"]),
        cached=format_bytes(failure["reserved_bytes"] - failure["allocated_bytes"]),
    )
    what = [shape_text(failure), t.name("category", failure["category"])]
    lines = [place_text(failure), source_line(failure), "", failure["message"]]
    return Section(
        id="failure",
        title=t("failure", "title"),
        paragraphs=[said, t("failure", "tensor", what=t("page", "separator").join(filter(None, what)))],
        preformatted="\n".join(lines).strip(),
    )


def _categories(found: Mapping[str, Any], t: Words) -> Section | None:
    sums = found["categories"]
    if not sums:
        return None
    whole = sum(sums.values())
    rows = []
    for category, nbytes in sorted(sums.items(), key=lambda item: -item[1]):
        phases = sorted(found["categories_by_phase"].get(category, {}).items(), key=lambda item: -item[1])
        made = t("page", "separator").join(f"{t.name('phase', phase)} {format_bytes(each)}" for phase, each in phases)
        rows.append([t.name("category", category), format_bytes(nbytes), f"{nbytes / whole:.1%}", made])
    columns = [t("categories", key) for key in ("category", "bytes", "share", "made")]
    caption = t("categories", "failed" if found["failure"] else "peak")
    table = Table(caption=caption, columns=columns, rows=rows, numbers=frozenset({1, 2}))
    return Section(id="categories", title=t("categories", "title"), tables=[table])


def _largest(found: Mapping[str, Any], t: Words) -> Section | None:
    if not found["largest"]:
        return None
    rows = [
        [
            shape_text(each) or t("largest", "workspace"),
            format_bytes(each["bytes"]),
            t.name("category", each["category"]),
            each["operator"],
            " ".join(filter(None, (place_text(each), source_line(each)))),
        ]
        for each in found["largest"]
    ]
    columns = [t("largest", key) for key in ("tensor", "bytes", "category", "operator", "line")]
    caption = t("largest", "failed" if found["failure"] else "peak")
    table = Table(caption=caption, columns=columns, rows=rows, numbers=frozenset({1}))
    return Section(id="largest", title=t("largest", "title"), tables=[table])


def _phases(found: Mapping[str, Any], t: Words) -> Section | None:
    if not found["phases"]:
        return None
    rows = [[t.name("phase", phase), format_bytes(nbytes)] for phase, nbytes in found["phases"].items()]
    columns = [t("phases", "phase"), t("phases", "bytes")]
    table = Table(caption=t("phases", "caption"), columns=columns, rows=rows, numbers=frozenset({1}))
    return Section(id="phases", title=t("phases", "title"), tables=[table])


def _remarks(found: Mapping[str, Any], t: Words) -> Section:
    points = [t("dryrun", "ended", steps=found["steps"], seconds=f"{found.get('seconds', 0):.1f}")]
    points.append(t("dryrun", "because", reason=found["stopped_because"]))
    if found["caught_failures"]:
        points.append(t("dryrun", "caught", count=found["caught_failures"]))
    if times := sum(each["times"] for each in found["made_up_values"]):
        points.append(t("dryrun", "made_up", count=f"{times:,}", place=place_text(found["made_up_values"][0])))
    points += [t("dryrun", "not_played", place=place_text(each)) for each in found.get("not_played", ())]
    points += [t("dryrun", "not_written", path=path) for path in dict.fromkeys(found["not_written"])]
    points += [t("dryrun", "not_modelled", what=what) for what in found["not_modelled"]]
    points += [t("dryrun", "never_modelled", what=what) for what in found["never_modelled"]]
    points += found["notes"]
    return Section(id="remarks", title=t("dryrun", "remarks"), points=points)


def shape_text(each: Mapping[str, Any]) -> str:
    """`65536 × 50304 bfloat16`; empty for a kernel's own memory."""
    return f"{' × '.join(map(str, each['shape']))} {each['dtype']}" if each.get("shape") else ""


def place_text(each: Mapping[str, Any]) -> str:
    """`model.py:186 in GPT.forward`."""
    if not each.get("file"):
        return ""
    function = f" in {each['function']}" if each.get("function") else ""
    return f"{_short_path(each['file'])}:{each['line']}{function}"


def source_line(each: Mapping[str, Any]) -> str:
    """The line itself, where its file is at hand."""
    return linecache.getline(each["file"], each["line"]).strip()[:_LINE] if each.get("file") else ""


@cache
def _short_path(file: str) -> str:
    """A page may be sent to others: no more of a path than tells files apart."""
    path = Path(file)
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(Path(*path.parts[-3:]))
