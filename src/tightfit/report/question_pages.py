"""The sections of answers to questions about a script: largest value, cards, variants."""

import shlex
from collections.abc import Sequence

from tightfit.config.knob import ALLOCATOR, EXPANDABLE
from tightfit.questions.cards import CardRow, Cards
from tightfit.questions.compare import Comparison, LineRow, Side
from tightfit.questions.largest import Largest, Trial
from tightfit.report.dryrun_page import card_text
from tightfit.report.sections import Page, Section, Table
from tightfit.report.tensor_texts import place_text, source_line
from tightfit.simulation.details import FailedAt
from tightfit.units import format_bytes, format_duration
from tightfit.vgpu.records import Origin
from tightfit.wording import say
from tightfit.wording.report import Words

_SOURCE = 48
"""Characters of a line of source that stand beside columns of figures."""


def largest_page(found: Largest, t: Words) -> Page:
    """Lay out the largest value that fits."""
    rows = [[str(each.value), format_bytes(each.device_bytes), _trial(each)] for each in found.trials]
    columns = [say("questions.largest_page.value"), say("questions.largest_page.bytes")]
    columns.append(say("questions.largest_page.outcome"))
    title = say("questions.largest_page.trials")
    cost = say("questions.largest_page.cost", plays=found.plays, seconds=found.seconds)
    sections = [
        Section(
            id="trials",
            title=title,
            paragraphs=[cost],
            tables=[Table(caption=title, columns=columns, rows=rows, numbers=frozenset({0, 1}), is_headed=True)],
        )
    ]
    if found.command:
        heading = say("questions.largest_page.command")
        sections.insert(0, Section(id="command", title=heading, code=shlex.join(found.command)))
    if points := [*_uneven(found), *_fragments(found), *_left_out(found, t)]:
        sections.append(Section(id="remarks", title=t("dryrun", "remarks"), points=points))
    return Page(
        title=say("questions.largest_page.title", name=found.name),
        verdict=_largest_verdict(found, t),
        is_bad=found.largest is None,
        facts=_largest_facts(found, t),
        sections=sections,
    )


def _largest_verdict(found: Largest, t: Words) -> str:
    fields = {"name": found.name.lstrip("-"), "card": card_text(found.gpu, t)}
    if found.largest is None:
        return say("questions.largest_page.none", **fields, value=found.trials[0].value)
    if found.next_value is None:
        return say("questions.largest_page.unlimited", **fields, value=found.largest)
    if found.unevenness is not None:
        return say("questions.largest_page.found_uneven", **fields, value=found.largest, next=found.next_value)
    return say("questions.largest_page.found", **fields, value=found.largest)


def _largest_facts(found: Largest, t: Words) -> list[tuple[str, str, str]]:
    facts = []
    if found.device_bytes is not None and found.free_bytes is not None:
        left = say("questions.largest_page.left", free=found.free_bytes)
        facts.append((say("questions.largest_page.peak"), format_bytes(found.device_bytes), left))
    if found.effective_batch is not None:
        remark = say("questions.largest_page.effective_alone")
        if found.accumulation is not None:
            passes = {"accumulation": found.accumulation, "processes": found.processes}
            remark = say("questions.largest_page.effective_with", name=found.name.lstrip("-"), **passes)
        facts.append((say("questions.largest_page.effective"), str(found.effective_batch), remark))
    if found.file and found.largest is not None:
        key = f"{found.name}{' = ' if found.file.endswith(('.py', '.toml')) else ': '}{found.largest}"
        facts.append((say("questions.largest_page.in_file", file=found.file), key, ""))
    after = next((each for each in found.trials if each.value == found.next_value), None)
    if after is not None and found.largest is not None:
        facts.append((say("questions.largest_page.next"), "", _next(after)))
    failing = after or next((each for each in found.trials if found.largest is None), None)
    if failing is not None and failing.failure is not None:
        facts.append((say("questions.largest_page.where"), "", failed_at(failing.failure, t)))
    return facts


def _uneven(found: Largest) -> list[str]:
    """Say that values between the played ones may differ, where the plays give a sign that they do."""
    sign = found.unevenness
    if sign is None:
        return []
    fields = {"name": found.name.lstrip("-"), "low": sign.low.value, "high": sign.high.value}
    if sign.kind == "fails":
        return [say("questions.largest_page.uneven_fails", **fields)]
    if sign.kind == "falls":
        sizes = {"more": sign.low.device_bytes, "less": sign.high.device_bytes}
        if sign.low.allocated_bytes > sign.high.allocated_bytes:
            return [say("questions.largest_page.uneven_tensors", **fields, **sizes)]
        return [say("questions.largest_page.uneven_falls", **fields, **sizes)]
    caches = {"low_cached": sign.low.cached_bytes, "high_cached": sign.high.cached_bytes}
    return [say("questions.largest_page.uneven_margin", **fields, **caches, free=found.free_bytes)]


def _fragments(found: Largest) -> list[str]:
    """Explain reserved memory far above the allocated bytes, and whether expandable segments helped."""
    shown = [each for each in found.trials if each.value in (found.largest, found.next_value) and each.is_fragmented]
    if not shown:
        return []
    most = max(shown, key=lambda each: each.cached_bytes)
    fields = {"name": found.name.lstrip("-"), "value": most.value, "cached": most.cached_bytes}
    sizes = {"reserved": most.reserved_bytes, "allocated": most.allocated_bytes}
    points = [say("questions.largest_page.fragments", **fields, **sizes)]
    if (other := found.expandable) is not None:
        fields = {"name": found.name.lstrip("-"), "value": other.value, "setting": f"{ALLOCATOR}={EXPANDABLE}"}
        if other.outcome == "fits":
            points.append(say("questions.largest_page.expandable_helps", **fields, size=other.device_bytes))
        else:
            points.append(say("questions.largest_page.expandable_does_not_help", **fields))
    return points


def _left_out(found: Largest, t: Words) -> list[str]:
    return [t("dryrun", "not_modelled", what=what) for what in found.not_modelled]


def _next(after: Trial) -> str:
    if after.outcome == "error":
        return say("questions.largest_page.next_error", value=after.value, reason=after.reason)
    return say("questions.largest_page.next_out_of_memory", value=after.value, size=after.device_bytes)


def _trial(each: Trial) -> str:
    if each.outcome == "error":
        return say("questions.largest_page.error", reason=each.reason)
    fits = each.outcome == "fits"
    return say("questions.largest_page.fits" if fits else "questions.largest_page.out_of_memory")


def script_cards_page(found: Cards, t: Words) -> Page:
    """Lay out every card with the peak of a script on it."""
    fitting = [row for row in found.rows if row.fits]
    verdict = say("questions.cards_page.none")
    if smallest := found.smallest:
        counts = {"count": len(fitting), "all": len(found.rows)}
        verdict = say("questions.cards_page.smallest", **counts, name=smallest.name)
    caption = say("questions.cards_page.caption")
    columns = [
        say("questions.cards_page.card"),
        say("questions.cards_page.memory"),
        say("questions.cards_page.peak"),
        say("questions.cards_page.left"),
        say("questions.cards_page.outcome"),
    ]
    table = Table(
        caption=caption,
        columns=columns,
        rows=[_card_row(row, t) for row in found.rows],
        numbers=frozenset({1, 2, 3}),
        is_headed=True,
    )
    replayed = sum(row.replayed for row in found.rows)
    points = [say("questions.cards_page.played", plays=found.plays, seconds=found.seconds)]
    if replayed:
        points.insert(0, say("questions.cards_page.replayed", replayed=replayed, all=len(found.rows)))
    return Page(
        title=say("questions.cards_page.title", script=found.script),
        verdict=verdict,
        is_bad=not fitting,
        sections=[
            Section(id="cards", title=caption, tables=[table]),
            Section(id="remarks", title=t("dryrun", "remarks"), points=points),
        ],
    )


def _card_row(row: CardRow, t: Words) -> list[str]:
    left = format_bytes(row.free_bytes) if row.fits else ""
    return [row.name, format_bytes(row.total_bytes), format_bytes(row.device_bytes), left, _card_outcome(row, t)]


def _card_outcome(row: CardRow, t: Words) -> str:
    if row.error is not None:
        return say("questions.cards_page.error", reason=row.error)
    if row.fits or row.failure is None:
        return say("questions.cards_page.fits")
    if not row.failure.file:
        return say("questions.cards_page.fails_somewhere", phase=t.name("phase", row.failure.phase))
    return say("questions.cards_page.fails", where=failed_at(row.failure, t))


def failed_at(failure: FailedAt, t: Words) -> str:
    """Return the phase and the line in which memory ran out."""
    return t("page", "separator").join(filter(None, [t.name("phase", failure.phase), place_text(failure)]))


def compare_page(found: Comparison, t: Words) -> Page:
    """Lay out variants side by side."""
    names = [side.change or say("questions.compare_page.as_is") for side in found.sides]
    notes = [say("questions.compare_page.cost", plays=found.plays, seconds=found.seconds)]
    if any(side.outcome != "fits" for side in found.sides):
        notes.insert(0, say("questions.compare_page.at_failure"))
    notes += [t("dryrun", "not_modelled", what=what) for what in found.not_modelled]
    return Page(
        title=say("questions.compare_page.title", script=found.script),
        verdict=_compared_verdict(found, names, t),
        is_bad=all(side.outcome != "fits" for side in found.sides),
        sections=[
            _sides(found, names, t),
            _compared_categories(found, names, t),
            _compared_lines(found, names, t),
            Section(id="remarks", title=t("dryrun", "remarks"), points=notes),
        ],
    )


def _compared_verdict(found: Comparison, names: Sequence[str], t: Words) -> str:
    """Name the variant that needs least among those that fit: the others failed before they took all they need."""
    card, sides = card_text(found.gpu, t), found.sides
    fitting = [number for number, side in enumerate(sides) if side.outcome == "fits"]
    if not fitting:
        return say("questions.compare_page.none", card=card)
    least = min(fitting, key=lambda number: sides[number].device_bytes)
    needs = {"card": card, "change": names[least], "size": sides[least].device_bytes}
    if len(fitting) == 1:
        return say("questions.compare_page.only", **needs)
    if len(fitting) == len(sides) and len({format_bytes(side.device_bytes) for side in sides}) == 1:
        return say("questions.compare_page.equal", **needs)
    if len(sides) == 2:
        less = sides[1 - least].device_bytes - sides[least].device_bytes
        return say("questions.compare_page.less", **needs, less=less, other=names[1 - least])
    return say("questions.compare_page.verdict", **needs)


def _sides(found: Comparison, names: Sequence[str], t: Words) -> Section:
    title, sides = say("questions.compare_page.summary"), found.sides
    fitting = [side.outcome == "fits" for side in sides]
    outcomes = [
        say("questions.compare_page.fits" if fits else "questions.compare_page.out_of_memory") for fits in fitting
    ]
    unknown = say("questions.compare_page.unknown")
    rows = [
        [say("questions.compare_page.outcome"), *outcomes],
        [say("questions.compare_page.peak"), *map(_needed, sides)],
        [say("questions.compare_page.phase"), *(t.name("phase", side.phase) for side in sides)],
        [say("questions.compare_page.left"), *(format_bytes(max(0, side.free_bytes)) for side in sides)],
        [
            say("questions.compare_page.step"),
            *(step_time(side.step.seconds) if side.step else unknown for side in sides),
        ],
    ]
    return Section(id="sides", title=title, tables=[_side_table(title, names, rows)])


def _needed(side: Side) -> str:
    if side.outcome == "fits":
        return format_bytes(side.device_bytes)
    return say("questions.compare_page.at_least", size=side.device_bytes)


def step_time(seconds: float) -> str:
    """Return the time of a step as text, of which milliseconds matter below a second."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else format_duration(seconds)


def _compared_categories(found: Comparison, names: Sequence[str], t: Words) -> Section:
    title = say("questions.compare_page.categories")
    columns = [*names, _difference(names)]
    rows = [[t.name("category", row.category), *_with_difference(row.bytes)] for row in found.categories]
    return Section(
        id="categories",
        title=title,
        tables=[_side_table(title, columns, rows)],
    )


def _compared_lines(found: Comparison, names: Sequence[str], t: Words) -> Section:
    title = say("questions.compare_page.lines")
    rows = [[_line(row, t), *_with_difference(row.bytes)] for row in found.lines]
    rows.append([say("questions.compare_page.same"), *_with_difference(found.other_bytes)])
    return Section(id="lines", title=title, tables=[_side_table(title, [*names, _difference(names)], rows)])


def _difference(names: Sequence[str]) -> str:
    several = len(names) > 2
    return say("questions.compare_page.last_difference" if several else "questions.compare_page.difference")


def _line(row: LineRow, t: Words) -> str:
    origin = Origin(
        file=row.file, line=row.line, function=row.function, shape=(), dtype="", operator="", category=row.category
    )
    place = place_text(origin) if row.file else say("questions.compare_page.no_line")
    named = t("page", "separator").join([place, t.name("category", row.category)])
    source = source_line(row)
    source = source if len(source) <= _SOURCE else f"{source[: _SOURCE - 1]}…"
    return f"{named}\n  {source}" if source else named


def _with_difference(row: Sequence[int]) -> list[str]:
    """Add the last value minus the first."""
    change = row[-1] - row[0]
    sign = "+" if change > 0 else "−" if change < 0 else ""
    return [*map(format_bytes, row), f"{sign}{format_bytes(abs(change))}" if change else "0"]


def _side_table(caption: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    numbers = frozenset(range(1, len(names) + 1))
    return Table(caption=caption, columns=["", *names], rows=rows, numbers=numbers, is_headed=True)
