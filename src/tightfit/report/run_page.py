"""The sections of a training run's report."""

from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.report.runs import Points, Run, is_finite
from tightfit.report.sections import Chart, Page, Section, Table
from tightfit.report.series import SPANS, Curve, curve, highest, median
from tightfit.units import format_bytes, format_count, format_duration
from tightfit.wording.report import Words

_TABLE_ROWS = 24
"""Steps in the table beside a chart: enough to follow it by ear."""
_MARKS = 200
_CATEGORIES = 3
"""Of a plan, the largest ones."""


def run_page(run: Run, t: Words, extra: Sequence[Section] = ()) -> Page:
    """Loss, rate and memory over a run; `extra` comes after its charts."""
    sections = [_explanation(run, t), _loss(run, t), _rate(run, t), _memory(run, t), *extra]
    sections += [_ranks(run, t), _events(run, t)]
    sections += [_alternatives(run.alternatives, t), _config(run, t), _remarks(run, t)]
    folder = run.folder.resolve().name
    return Page(
        title=t("run", "title", folder=folder),
        verdict=t("run", "failed") if run.explanation else "",
        is_bad=bool(run.explanation),
        facts=_facts(run, t),
        sections=[section for section in sections if section is not None],
    )


def _facts(run: Run, t: Words) -> list[tuple[str, str, str]]:
    curves = run.curves
    facts = [(t("run", "steps"), f"{run.last_step:,}", "")] if any(curves.values()) else []
    if val_losses := _finite(curves["val_loss"]):
        step, best = min(val_losses, key=lambda point: point[1])
        facts.append((t("run", "best"), f"{best:.4f}", t("run", "at_step", step=f"{step:,}")))
    if losses := _finite(curves["loss"]):
        step, last = losses[-1]
        facts.append((t("run", "last_loss"), f"{last:.4f}", t("run", "at_step", step=f"{step:,}")))
    if rate := median([value for _, value in curves["tokens_per_s"]]):
        facts.append((t("run", "rate"), t("run", "tokens_per_s", rate=format_count(rate)), t("run", "median")))
    if measured := _measured(run):
        facts.append((t("run", "measured"), format_bytes(measured), ""))
    if run.predicted:
        last_one = run.predicted[-1][1]
        remark = t("run", "difference", percent=f"{(last_one / measured - 1) * 100:+.1f}") if measured else ""
        facts.append((t("run", "predicted"), format_bytes(last_one), remark))
    recovered = [event for event in run.events if event["event"] == "recovery"]
    if recovered:
        lost = sum(value for event in recovered if is_finite(value := event.get("seconds_lost")))
        remark = t("run", "lost", time=format_duration(lost))
        facts.append((t("run", "recoveries"), str(len(recovered)), remark))
    return facts


def _explanation(run: Run, t: Words) -> Section | None:
    title = t("run", "explanation")
    return Section(id="explanation", title=title, preformatted=run.explanation) if run.explanation else None


def _measured(run: Run) -> float | None:
    points = run.curves["memory_peak_bytes"] or run.curves["memory_bytes"]
    return max((value for _, value in _finite(points)), default=None)


def _finite(points: Points) -> Points:
    return [point for point in points if is_finite(point[1])]


def _loss(run: Run, t: Words) -> Section | None:
    rows = [("loss", "--s-1", ""), ("train_loss", "--s-3", ""), ("val_loss", "--s-2", "")]
    curves = [(key, colour, style, curve(run.curves[key])) for key, colour, style in rows if run.curves[key]]
    if not curves:
        return None
    said = []
    for key, _, _, each in curves:
        if each.x:
            lowest, step = min(zip(each.low or each.mean, each.x, strict=True))
            words = {"first": f"{each.mean[0]:.4f}", "last": f"{each.mean[-1]:.4f}", "low": f"{lowest:.4f}"}
            said.append(t("loss", "summary", name=t("series", key), step=f"{step:,}", **words))
    return _chart_section("loss", "number", curves, run, t, "\n".join(said), "{:.4f}".format)


def _rate(run: Run, t: Words) -> Section | None:
    points = _finite(run.curves["tokens_per_s"])
    if not points:
        return None
    values = [value for _, value in points]
    middle = format_count(median(values) or 0)
    low, high = format_count(min(values)), format_count(max(values))
    summary = t("rate", "summary", median=middle, low=low, high=high)
    return _chart_section("rate", "rate", [("tokens_per_s", "--s-3", "", curve(points))], run, t, summary, format_count)


def _memory(run: Run, t: Words) -> Section | None:
    now, peak = _finite(run.curves["memory_bytes"]), _finite(run.curves["memory_peak_bytes"])
    if not now and not peak:
        return None
    curves = [("memory_bytes", "--s-1", "", curve(now))] if now else []
    curves += [("memory_peak_bytes", "--s-2", "", highest(peak))] if peak else []
    measured = format_bytes(_measured(run) or 0)
    summary = t("memory", "summary", measured=measured)
    if run.predicted:
        curves.append(("predicted", "--s-4", "dash", _levels(run.predicted, run.last_step)))
        summary += " " + t("memory", "predicted", predicted=format_bytes(run.predicted[-1][1]))
    return _chart_section("memory", "bytes", curves, run, t, summary, format_bytes)


def _ranks(run: Run, t: Words) -> Section | None:
    """The time and the memory of each process, and how much slower than the others it is."""
    if not run.ranks:
        return None
    rows = []
    for number, rank in enumerate(run.ranks):
        others = median([each.own_ms for other, each in enumerate(run.ranks) if other != number])
        ratio = f"{rank.own_ms / others:.2f}" if others else ""
        rows.append([str(number), rank.host, f"{rank.own_ms:,.1f} ms", ratio, format_bytes(rank.peak_bytes)])
    columns = [t("ranks", key) for key in ("rank", "host", "own", "ratio", "peak")]
    table = Table(caption=t("ranks", "title"), columns=columns, rows=rows, numbers=frozenset({0, 2, 3, 4}))
    return Section(id="ranks", title=t("ranks", "title"), paragraphs=[t("ranks", "about")], tables=[table])


def _levels(points: Points, end: int) -> Curve:
    """A level from each of the steps on, the last one until the end."""
    kept = points if points[-1][0] >= end else [*points, (end, points[-1][1])]
    return Curve(x=[step for step, _ in kept], mean=[value for _, value in kept], points=len(points))


def _chart_section(
    key: str,
    unit: str,
    curves: Sequence[tuple[str, str, str, Curve]],
    run: Run,
    t: Words,
    summary: str,
    shown: Any,
) -> Section:
    series = [
        {
            "key": name,
            "name": t("series", name),
            "colour": colour,
            "style": style,
            "x": each.x,
            "y": each.mean,
            **({"low": each.low, "high": each.high} if each.low else {}),
        }
        for name, colour, style, each in curves
        if each.x
    ]
    steps = sorted({event["step"] for event in run.events})
    notes = _curve_notes(curves, t)
    if not series:
        return Section(id=key, title=t(key, "title"), paragraphs=notes)
    if steps:
        notes.append(t("note", "marks"))
    notes.append(t("note", "how"))
    spec = {"kind": "lines", "unit": unit, "x_name": t("page", "step"), "series": series, "marks": steps[-_MARKS:]}
    table = _steps_table(t("page", "at_steps", what=t(key, "title")), curves, t, shown)
    return Section(id=key, title=t(key, "title"), chart=Chart(spec=spec, summary=summary, notes=notes, table=table))


def _curve_notes(curves: Sequence[tuple[str, str, str, Curve]], t: Words) -> list[str]:
    """Name the curves with points that were put together or left out."""
    spans = [
        t("note", "spans", name=t("series", name), points=f"{each.points:,}", spans=f"{SPANS:,}")
        for name, _, _, each in curves
        if each.low
    ]
    not_finite = [
        t("note", "not_finite", name=t("series", name), count=f"{each.not_finite:,}")
        for name, _, _, each in curves
        if each.not_finite
    ]
    return [*spans, *not_finite]


def _steps_table(caption: str, curves: Sequence[tuple[str, str, str, Curve]], t: Words, shown: Any) -> Table:
    """Evenly spread steps, and each curve's lowest and highest as its own columns where spans were formed."""
    steps = sorted({x for _, _, _, each in curves for x in each.x})
    kept = sorted(
        {steps[round(index * (len(steps) - 1) / (_TABLE_ROWS - 1))] for index in range(_TABLE_ROWS)} if steps else ()
    )
    columns = [t("page", "step"), *(t("series", name) for name, _, _, _ in curves)]
    rows = [[f"{step:,}", *(_value_at(each, step, shown) for _, _, _, each in curves)] for step in kept]
    return Table(caption=caption, columns=columns, rows=rows, numbers=frozenset(range(len(columns))))


def _value_at(each: Curve, step: float, shown: Any) -> str:
    if not each.x:
        return ""
    index = min(range(len(each.x)), key=lambda position: abs(each.x[position] - step))
    if each.low and each.high:
        return f"{shown(each.mean[index])} ({shown(each.low[index])} – {shown(each.high[index])})"
    return str(shown(each.mean[index]))


def _events(run: Run, t: Words) -> Section | None:
    if not run.events:
        return None
    known = ("event", "step", "phase", "before", "after", "requested_bytes", "seconds_lost", "kind")
    rows = []
    for event in run.events:
        asked, lost = event.get("requested_bytes"), event.get("seconds_lost")
        rest = {key: value for key, value in event.items() if key not in known}
        rows.append(
            [
                f"{event['step']:,}",
                t.name("event", event["event"]),
                t.name("phase", str(event.get("phase") or "")) if event.get("phase") else "",
                format_bytes(asked) if is_finite(asked) else "",
                _change(event.get("before"), event.get("after"), t) or _plain(rest),
                format_duration(lost) if is_finite(lost) else "",
            ]
        )
    columns = [t("events", key) for key in ("step", "what", "phase", "requested", "change", "lost")]
    table = Table(caption=t("events", "title"), columns=columns, rows=rows, numbers=frozenset({0, 3, 5}))
    return Section(id="events", title=t("events", "title"), paragraphs=[t("events", "about")], tables=[table])


def _change(before: object, after: object, t: Words) -> str:
    """Settings that changed, as "micro_batch 8 → 4"."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return ""
    pairs = [(key, before.get(key), value) for key, value in after.items()]
    changed = [f"{key} {_text(old)} → {_text(new)}" for key, old, new in pairs if old != new]
    return ", ".join(changed) or t("events", "unchanged")


def _alternatives(rows: Sequence[Mapping[str, Any]], t: Words) -> Section | None:
    """List a plan's alternatives, in the columns that any row has."""
    if not rows:
        return None
    known = ("name", "keys", "peak_bytes", "step_s", "fits", "exact", "phase", "categories")
    extra = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in known]
    columns = [key for key in known if any(key in row for row in rows)] + extra
    table = Table(
        caption=t("plan", "alternatives"),
        columns=[t.name("plan_column", key) for key in columns],
        rows=[[_cell(key, row.get(key), t) for key in columns] for row in rows],
        numbers=frozenset(i for i, key in enumerate(columns) if key in ("peak_bytes", "step_s")),
    )
    return Section(id="plan", title=t("plan", "title"), paragraphs=[t("plan", "about")], tables=[table])


def _cell(key: str, value: object, t: Words) -> str:
    if key == "phase" and isinstance(value, str):
        return t.name("phase", value)
    if key == "categories" and isinstance(value, Mapping):
        largest = sorted(((size, name) for name, size in value.items() if is_finite(size)), reverse=True)
        parts = [f"{t.name('category', name)} {format_bytes(size)}" for size, name in largest[:_CATEGORIES]]
        return t("page", "separator").join(parts)
    if isinstance(value, bool):
        return t("page", "yes" if value else "no")
    if is_finite(value):
        if key.endswith("_bytes"):
            return format_bytes(value)
        return f"{value:.3g} s" if key.endswith("_s") else _text(value)
    return _text(value)


def _config(run: Run, t: Words) -> Section | None:
    if not run.config:
        return None
    rows = [[str(key), _text(value)] for key, value in run.config.items()]
    table = Table(caption=t("config", "title"), columns=[t("config", "key"), t("config", "value")], rows=rows)
    return Section(id="config", title=t("config", "title"), tables=[table])


def _remarks(run: Run, t: Words) -> Section | None:
    points = []
    if run.unreadable:
        points.append(t("remarks", "unreadable", count=len(run.unreadable), first=run.unreadable[0]))
    if not run.predicted:
        points.append(t("remarks", "no_prediction"))
    if not run.config:
        points.append(t("remarks", "no_config"))
    return Section(id="remarks", title=t("remarks", "title"), points=points) if points else None


def _plain(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items())


def _text(value: object) -> str:
    """A value of a configuration or an event as a person writes it."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return _plain(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
