"""The chart of a dry run's memory over time, by category, with the tensors of each moment."""

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from tightfit.report.sections import Chart, Section, Table
from tightfit.report.tensor_texts import place_text, shape_text, source_line
from tightfit.report.timeline_picture import CATEGORY_COLOURS
from tightfit.units import format_bytes
from tightfit.vgpu.records import Findings, LivingTensor, Timeline
from tightfit.wording.report import Words

_TABLE_ROWS = 24


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one category at each event."""

    key: str
    name: str
    colour: str
    """Custom property of the style sheet."""
    y: list[int]


class _Label(msgspec.Struct, frozen=True, kw_only=True):
    event: int
    label: str


class _Capacity(msgspec.Struct, frozen=True, kw_only=True):
    bytes: int
    label: str


class _Tensors(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors by column; `what`, `operator`, `place` and `source` are positions in `texts`, `category` in `keys`."""

    from_: list[int] = msgspec.field(name="from")
    to: list[int | None]
    bytes: list[int]
    category: list[int]
    what: list[int]
    operator: list[int]
    place: list[int]
    source: list[int]
    keys: list[str]
    texts: list[str]


class _StackChart(msgspec.Struct, frozen=True, kw_only=True):
    """Data of templates/charts/stack.js."""

    kind: str = "stack"
    x_name: str
    events: list[int]
    end: int
    rows: list[_Row]
    reserved: list[int] | None
    phases: list[tuple[int, str, str]]
    failures: list[_Label]
    failed: bool
    capacity: _Capacity
    peak: int
    mark: int
    tensors: _Tensors


def timeline_section(found: Findings, t: Words) -> Section | None:
    """Chart memory by category; None where the findings have no timeline, or nothing happened in it."""
    data = found.timeline
    if data is None or not data.events:
        return None
    mark = _marked_event(found, data)
    failed = found.outcome == "out_of_memory" and bool(data.failures)
    spec = _spec(data, t, mark=mark, failed=failed)
    notes = [spec.capacity.label, t("timeline", "how")]
    if len(data.events) < data.event_count:
        counts = {"events": f"{data.event_count:,}", "moments": f"{len(data.events):,}"}
        notes.insert(0, t("timeline", "spans", **counts))
    summary = t(
        "timeline",
        "summary_failed" if failed else "summary",
        phase=t.name("phase", data.phase_at(mark)),
        bytes=format_bytes(data.allocated_bytes(mark)),
        event=f"{data.event_count:,}",
    )
    chart = Chart(spec=spec, summary=summary, notes=notes, table=_table(data, t))
    return Section(id="timeline", title=t("timeline", "title"), chart=chart)


def _marked_event(found: Findings, data: Timeline) -> int:
    """Return the failure that ended the run, or else the peak."""
    if found.outcome == "out_of_memory" and data.failures:
        return max(0, data.failures[-1].event - 1)
    return data.peak.event


def _spec(data: Timeline, t: Words, *, mark: int, failed: bool) -> _StackChart:
    capacity = data.capacity_bytes
    return _StackChart(
        x_name=t("timeline", "x"),
        events=data.events,
        end=max(data.event_count, data.events[-1] + 1),
        rows=[
            _Row(key=name, name=t.name("category", name), colour=f"--c-{name.replace(' ', '-')}", y=row)
            for name, row in _rows(data)
        ],
        reserved=data.reserved_bytes,
        phases=[(each.event, each.phase.replace(" ", "-"), t.name("phase", each.phase)) for each in data.phases],
        failures=[
            _Label(event=each.event, label=t("timeline", "failure", bytes=format_bytes(each.requested_bytes)))
            for each in data.failures
        ],
        failed=failed,
        capacity=_Capacity(
            bytes=capacity,
            label=t("timeline", "capacity", bytes=format_bytes(capacity), total=format_bytes(data.total_bytes)),
        ),
        peak=data.peak.event,
        mark=mark,
        tensors=_columns(data.tensors),
    )


def _rows(data: Timeline) -> list[tuple[str, list[int]]]:
    """Return the categories in the order in which they are stacked."""
    return [(name, data.category_bytes[name]) for name in CATEGORY_COLOURS if name in data.category_bytes]


def _columns(tensors: Sequence[LivingTensor]) -> _Tensors:
    """Put tensors into columns, each text once: thousands of them have the same line."""
    texts: dict[str, int] = {"": 0}
    keys = list(dict.fromkeys(each.category for each in tensors))

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    return _Tensors(
        from_=[each.from_event for each in tensors],
        to=[each.to_event for each in tensors],
        bytes=[each.bytes for each in tensors],
        category=[keys.index(each.category) for each in tensors],
        what=[number(shape_text(each)) for each in tensors],
        operator=[number(each.operator) for each in tensors],
        place=[number(place_text(each)) for each in tensors],
        source=[number(source_line(each)) for each in tensors],
        keys=keys,
        texts=list(texts),
    )


def _table(data: Timeline, t: Words) -> Table:
    """Tabulate the highest moment of each stretch of the run."""
    rows, events = _rows(data), data.events
    totals = [sum(row[index] for _, row in rows) for index in range(len(events))]
    edges = sorted({len(events) * index // _TABLE_ROWS for index in range(_TABLE_ROWS + 1)})
    kept = [max(range(start, end), key=totals.__getitem__) for start, end in pairwise(edges)]
    cells = [
        [
            f"{events[index]:,}",
            t.name("phase", data.phase_at(events[index])),
            format_bytes(totals[index]),
            *(format_bytes(row[index]) for _, row in rows),
        ]
        for index in kept
    ]
    columns = [t("timeline", "event"), t("timeline", "phase"), t("timeline", "total")]
    columns += [t.name("category", name) for name, _ in rows]
    numbers = frozenset({0, *range(2, len(columns))})
    return Table(caption=t("timeline", "table"), columns=columns, rows=cells, numbers=numbers)
