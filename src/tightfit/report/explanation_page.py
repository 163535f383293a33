"""The sections of an explanation's page: problem, memory at the failure, causes, fixes, expected result."""

from collections.abc import Iterable, Iterator, Sequence

from tightfit.diagnosis.cause_records import MEASURED, SIMULATED
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.log_sentences import nothing_lines
from tightfit.diagnosis.remedies import DOES_NOT_FIT, FITS, NO_EFFECT, Remedy
from tightfit.diagnosis.statements import (
    Sentences,
    arithmetic_lines,
    assumption_lines,
    expected_lines,
    problem_lines,
)
from tightfit.report.bars import ALARM, CACHE, GOOD, OTHERS, OUTSIDE, Part, colour_of, parts_table
from tightfit.report.sections import Advice, Page, Section, Segment, Table
from tightfit.units import format_bytes
from tightfit.wording.diagnosis import Words as Told
from tightfit.wording.diagnosis import words as told_in
from tightfit.wording.report import Words

_UNSAID = ("no_configuration", "general")
"""Reasons that the section says once."""
_NO_CHANGE = 0.005
"""A slowdown that rounds to 0%."""


def explanation_page(found: Explanation, t: Words) -> Page:
    """What `tightfit explain` found; the sentences are those of its text, in the same language."""
    said = told_in(found.language)
    if found.facts is None:
        return _nothing_failed(found, said, t)
    sentences = Sentences(found, said)
    sections = [
        _lines("problem", problem_lines(found, said), said, pasted=False),
        _memory(found, said, t),
        _causes(found, sentences, said),
        _fixes(found, sentences, said, t),
        _lines("expected", expected_lines(found, sentences, said), said, pasted=True),
        _listed("not_modelled", t("explanation", "not_modelled"), found.not_modelled),
        _listed("arithmetic", said("titles", "arithmetic"), arithmetic_lines(found, said)),
    ]
    return Page(
        title=t("explanation", "title"),
        verdict=next(expected_lines(found, sentences, said)),
        is_bad=found.best is None,
        facts=_facts(found, t),
        sections=[each for each in sections if each is not None],
    )


def _nothing_failed(found: Explanation, said: Told, t: Words) -> Page:
    kind = found.reading.kind_of_nothing or "nothing"
    lines = [said("problem", "not_failed")] if found.played == "script" else nothing_lines(found.reading, said)
    verdict = " ".join(lines)
    return Page(title=t("explanation", "nothing"), verdict=verdict, is_bad=kind == "other_error")


def _facts(found: Explanation, t: Words) -> list[tuple[str, str, str]]:
    facts, card = found.facts, found.card
    assert facts is not None
    short = facts.short_by_bytes
    rows = [
        (t("dryrun", "card"), facts.total_bytes or (card.total_bytes if card else None), card.name if card else ""),
        (t("dryrun", "others"), card.used_bytes if card else facts.others_bytes, ""),
        (t("dryrun", "asked"), facts.requested_bytes, ""),
        (t("dryrun", "free"), facts.free_bytes, t("explanation", "short", bytes=format_bytes(short)) if short else ""),
    ]
    return [(name, format_bytes(nbytes), remark) for name, nbytes, remark in rows if nbytes is not None]


def _lines(name: str, lines: Iterable[str], said: Told, *, pasted: bool) -> Section:
    """Sentences, and below them lines of code with the sentence that leads to them."""
    before: list[str] = []
    after: list[str] = []
    code: list[str] = []
    for line in lines:
        if line.startswith("    "):
            code.append(line.strip())
        else:
            (after if code else before).append(line.strip())
    paragraphs = [*before[:-1], *after, *before[-1:]] if code else before
    text = "\n".join(code)
    shown, to_paste = ("", text) if pasted else (text, "")
    return Section(id=name, title=said("titles", name), paragraphs=paragraphs, preformatted=shown, code=to_paste)


def _listed(name: str, title: str, points: Iterable[str]) -> Section | None:
    found = list(points)
    return Section(id=name, title=title, points=found) if found else None


def _causes(found: Explanation, sentences: Sentences, said: Told) -> Section | None:
    causes = [(said("labels", each.label), sentences.cause(each)) for each in found.causes]
    return Section(id="cause", title=said("titles", "cause"), labelled=causes) if causes else None


# Memory at the failure


def _memory(found: Explanation, said: Told, t: Words) -> Section | None:
    """The card from its beginning to what did not fit; None where the figures are not known."""
    facts, card = found.facts, found.card
    assert facts is not None
    total = card.total_bytes if card else facts.total_bytes
    parts = list(_parts(found, said, t))
    if not total or not facts.requested_bytes or not any(each.bytes for each in parts[:-1]):
        return None
    title = t("explanation", "memory")
    return Section(id="memory", title=title, tables=[parts_table(title, parts, total, t)])


def _parts(found: Explanation, said: Told, t: Words) -> Iterator[Part]:
    facts, card, culprit = found.facts, found.card, found.culprit
    assert facts is not None
    measured, simulated = said("labels", MEASURED), said("labels", SIMULATED)
    others = card.used_bytes if card else facts.others_bytes
    outside = card.context_bytes if card else facts.outside_pytorch_bytes
    yield Part(t("bars", "others"), others or 0, OTHERS, measured)
    yield Part(t("bars", "outside"), outside or 0, OUTSIDE, measured)
    if culprit is not None and culprit.categories:
        for name, nbytes in sorted(culprit.categories.items(), key=lambda item: -item[1]):
            yield Part(said.name("categories", name), nbytes, colour_of(name), simulated)
    else:
        yield Part(t("bars", "allocated"), facts.allocated_bytes or 0, colour_of("activations"), measured)
    yield Part(t("bars", "cache"), facts.cache_bytes or 0, CACHE, measured)
    yield Part(t("bars", "request"), facts.requested_bytes or 0, ALARM, measured)


# Fixes


def _fixes(found: Explanation, sentences: Sentences, said: Told, t: Words) -> Section:
    return Section(
        id="fixes",
        title=said("titles", "fixes"),
        paragraphs=list(assumption_lines(found, said)),
        tables=[_fix_table(found, sentences, said, t)] if found.remedies else [],
        advice=[_advice(each, sentences, said) for each in found.remedies],
    )


_COLUMNS = ("fix", "verdict", "needed", "saved", "time", "result", "basis")


def _fix_table(found: Explanation, sentences: Sentences, said: Told, t: Words) -> Table:
    total = found.card.total_bytes if found.card else None
    uses = [_uses(each, found) for each in found.remedies]
    axis = max([total or 0, *map(sum, uses)])
    has_bars = bool(total) and any(need for _, need in uses)
    return Table(
        caption=t("explanation", "comparison"),
        columns=[t("explanation", key) for key in _COLUMNS],
        rows=[_fix_row(each, sentences, said) for each in found.remedies],
        numbers=frozenset({2, 3, 4}),
        bars=[_fix_bar(each, use, axis) for each, use in zip(found.remedies, uses, strict=True)] if has_bars else (),
        limit=total / axis if total and has_bars else None,
        tones=[_tone(each) for each in found.remedies],
        note=t("explanation", "comparison_note", total=format_bytes(total)) if total and has_bars else "",
    )


def _uses(remedy: Remedy, found: Explanation) -> tuple[int, int]:
    """What others use of the card, and this process with the remedy."""
    card = found.card
    if card is None or remedy.device_bytes is None:
        return 0, 0
    room_bytes = card.room_bytes if remedy.figures.room_bytes is None else remedy.figures.room_bytes
    return max(0, card.total_bytes - room_bytes), remedy.device_bytes


def _fix_bar(remedy: Remedy, use: tuple[int, int], axis: int) -> Sequence[Segment]:
    others, need = (nbytes / axis for nbytes in use)
    colour = GOOD if remedy.verdict == FITS else ALARM
    return [Segment(0, others, OTHERS), Segment(others, need, colour)] if need else []


def _fix_row(remedy: Remedy, sentences: Sentences, said: Told) -> list[str]:
    saved, result = remedy.saved_bytes, "exact" if remedy.exact else "lossy"
    return [
        sentences.title(remedy),
        said("verdicts", remedy.verdict),
        "–" if remedy.device_bytes is None else format_bytes(remedy.device_bytes),
        ("−" if saved < 0 else "") + format_bytes(abs(saved)) if saved else "–",
        _change(remedy.slowdown),
        "–" if remedy.exact is None else said("effects", result),
        said("labels", remedy.label),
    ]


def _change(slowdown: float | None) -> str:
    """Return the change of a step's time as text.

    >>> _change(0.05), _change(-0.001), _change(51.2), _change(None)
    ('+5%', '±0%', '×52', '–')
    """
    if slowdown is None:
        return "–"
    if slowdown >= 1:
        return f"×{1 + slowdown:,.0f}"
    return "±0%" if abs(slowdown) < _NO_CHANGE else f"{slowdown:+.0%}"


def _tone(remedy: Remedy) -> str:
    return "good" if remedy.verdict == FITS else "bad" if remedy.verdict in (DOES_NOT_FIT, NO_EFFECT) else ""


def _advice(remedy: Remedy, sentences: Sentences, said: Told) -> Advice:
    return Advice(
        title=sentences.title(remedy),
        remark=said("verdicts", remedy.verdict),
        tone=_tone(remedy),
        text="" if remedy.reason in _UNSAID else said("units", "clause") + sentences.reason(remedy),
        code="\n".join(sentences.paste(remedy)),
    )
