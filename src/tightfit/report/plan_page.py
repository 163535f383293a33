"""The sections of a plan and of a survey of all cards, for a terminal or a page."""

from collections.abc import Iterator, Sequence

from tightfit.planner.budget import Budget
from tightfit.planner.plan_record import PlanRow, plan_record
from tightfit.planner.planning import PlanResult
from tightfit.planner.predict import Prediction
from tightfit.planner.sentences import about, about_cards, device_name, in_words, nothing_fits
from tightfit.planner.survey import CardRow
from tightfit.report.bars import ALARM, CACHE, GOOD, MARGIN, OTHERS, OUTSIDE, Part, colour_of, parts_table
from tightfit.report.sections import Page, Section, Segment, Table
from tightfit.units import format_bytes, format_count, format_duration
from tightfit.wording.report import Words

_CATEGORIES = 3
"""Largest categories named for each plan."""


def plan_page(result: PlanResult, t: Words) -> Page:
    """Lay out a plan, or the reasons why none fits."""
    best = result.choice.best
    verdict, *reasons = [_verdict(result, best, t)] if best else nothing_fits(result)
    rows = plan_record(result).alternatives
    sections = [
        Section(id="shortage", title=t("plan", "shortage"), points=reasons) if reasons else None,
        Section(id="chosen", title=t("plan", "chosen"), code=_options(best)) if best else None,
        _request(result, t),
        _memory(result, t),
        _shardings(result, t) if len(result.shardings) > 1 else None,
        _alternatives(result, rows, t) if len(rows) > 1 or not best else None,
        _details(result.where.budget.bytes, rows, t) if rows else None,
        Section(id="remarks", title=t("remarks", "title"), points=[*_remarks(result, t)]),
    ]
    return Page(
        title=t("plan", "page"),
        verdict=verdict,
        is_bad=best is None,
        facts=_facts(result, t),
        sections=[each for each in sections if each],
    )


def _verdict(result: PlanResult, best: Prediction, t: Words) -> str:
    return t("plan", "verdict", plan=in_words(best, result.choice.share))


def _options(best: Prediction) -> str:
    return " ".join(f"--{key}={value}" for key, value in best.plan.keys().items())


def _facts(result: PlanResult, t: Words) -> list[tuple[str, str, str]]:
    best, budget = result.choice.best, format_bytes(result.where.budget.bytes)
    facts = [(t("plan", "budget"), budget, device_name(result))]
    if best:
        rate, time = _rate(result, best)
        phase = t("dryrun", "in_phase", phase=t.name("phase", best.phase))
        speed = t("run", "tokens_per_s", rate=rate)
        facts.insert(0, (t("run", "rate"), speed, t("plan", "a_step", time=time)))
        facts.insert(0, (t("run", "predicted"), format_bytes(best.peak_bytes), phase))
    return facts


def _rate(result: PlanResult, prediction: Prediction) -> tuple[str, str]:
    """Return tokens per second, of all cards together, and the time of a step."""
    seconds = prediction.step_s(result.choice.share)
    sequences = result.config.effective_batch if result.where.cards.count > 1 else result.choice.share
    tokens = sequences * (prediction.plan.block_size or result.config.block_size)
    return format_count(tokens / seconds), format_duration(seconds)


def _request(result: PlanResult, t: Words) -> Section:
    config, request, best = result.config, result.choice.request, result.choice.best
    is_changed = best and (best.plan.block_size or best.plan.effective_batch)
    step = t(
        "plan",
        "step" if is_changed else "step_stays",
        sequences=config.effective_batch,
        tokens=config.block_size,
        whole=f"{config.tokens_per_step:,}",
    )
    paragraphs = [step]
    if request:
        key = "request_fits" if request.peak_bytes <= result.where.budget.bytes else "request_does_not_fit"
        paragraphs.append(t("plan", key, micro_batch=request.plan.micro_batch, need=about(request)))
    return Section(id="request", title=t("plan", "request"), paragraphs=paragraphs)


def _memory(result: PlanResult, t: Words) -> Section | None:
    """Show the whole device when the chosen plan, or else the smallest one, is at its peak."""
    shown, budget = result.choice.best or result.choice.least, result.where.budget
    if shown is None:
        return None
    title = t("plan", "memory" if result.where.gpu else "memory_of_machine")
    total = format_bytes(budget.total_bytes)
    name = result.where.gpu.name if result.where.gpu else device_name(result)
    whole = t("plan", "device", name=name, total=total, budget=format_bytes(budget.bytes))
    table = parts_table(title, [*_parts(budget, shown, t)], budget.total_bytes, t)
    return Section(id="memory", title=title, paragraphs=[whole], tables=[table])


def _parts(budget: Budget, shown: Prediction, t: Words) -> Iterator[Part]:
    yield Part(t("bars", "others"), budget.used_by_others_bytes, OTHERS)
    yield Part(t("bars", "outside"), budget.context_bytes + budget.reserved_bytes, OUTSIDE)
    yield Part(t("bars", "nccl"), budget.nccl_bytes, OUTSIDE)
    for name, nbytes in sorted(shown.categories.items(), key=lambda item: -item[1]):
        yield Part(t.name("category", name), nbytes, colour_of(name))
    yield Part(t("bars", "cache"), shown.peak_bytes - sum(shown.categories.values()), CACHE)
    yield Part(t("bars", "margin"), budget.margin_bytes, MARGIN)


def _shardings(result: PlanResult, t: Words) -> Section:
    title, budget, step = t("plan", "shardings"), result.where.budget.bytes, result.config.tokens_per_step
    rows = [
        [
            each.name,
            format_bytes(each.peak_bytes),
            format_count(step / each.step_s) if each.step_s else "",
            t("page", "yes" if each.step_s and each.peak_bytes <= budget else "no"),
            t("plan", "sharding_traced" if each.is_traced else "sharding_estimated"),
        ]
        for each in result.shardings
    ]
    columns = ["--shard", *(t("plan_column", key) for key in ("peak_bytes", "rate", "fits", "how"))]
    table = Table(caption=title, columns=columns, rows=rows, numbers=frozenset({1, 2}), is_headed=True)
    return Section(id="shardings", title=title, tables=[table])


def _alternatives(result: PlanResult, rows: Sequence[PlanRow], t: Words) -> Section:
    title, traced = t("plan", "alternatives"), [*result.choice.offered, *result.choice.refused]
    cells = [
        [
            in_words(each, result.choice.share),
            format_bytes(row.peak_bytes),
            *_rate(result, each),
            t("page", "yes" if row.fits else "no"),
        ]
        for row, each in zip(rows, traced, strict=True)
    ]
    columns = [t("plan_column", key) for key in ("name", "peak_bytes", "rate", "step_s", "fits")]
    table = Table(caption=title, columns=columns, rows=cells, numbers=frozenset({1, 2, 3}), is_headed=True)
    return Section(id="alternatives", title=title, tables=[table])


def _details(budget: int, rows: Sequence[PlanRow], t: Words) -> Section:
    axis = max(budget, *(row.peak_bytes for row in rows))
    columns = ("name", "peak_bytes", "keys", "exact", "phase", "categories")
    table = Table(
        caption=t("plan", "details"),
        columns=[t("plan_column", key) for key in columns],
        rows=[_detail(row, t) for row in rows],
        numbers=frozenset({1}),
        bars=[[Segment(0, row.peak_bytes / axis, GOOD if row.fits else ALARM)] for row in rows],
        limit=budget / axis,
        note=t("plan", "note", budget=format_bytes(budget)),
    )
    return Section(id="plan", title=t("plan", "title"), paragraphs=[t("plan", "about")], tables=[table], page_only=True)


def _detail(row: PlanRow, t: Words) -> list[str]:
    separator = t("page", "separator")
    largest = sorted(row.categories.items(), key=lambda item: -item[1])[:_CATEGORIES]
    return [
        row.name,
        format_bytes(row.peak_bytes),
        ", ".join(f"{key}={value}" for key, value in row.keys.items()),
        t("page", "yes" if row.exact else "no"),
        t.name("phase", row.phase),
        separator.join(f"{t.name('category', name)} {format_bytes(size)}" for name, size in largest),
    ]


def _remarks(result: PlanResult, t: Words) -> Iterator[str]:
    budget, best = result.where.budget, result.choice.best
    yield budget.text
    if budget.reserved_bytes:
        yield t("plan", "reserved", bytes=format_bytes(budget.reserved_bytes))
    yield from result.notes
    yield from about_cards(result)
    if best and result.where.cards.count > 1:
        peaks = (f"{t.name('phase', phase)} {format_bytes(size)}" for phase, size in best.phases.items())
        yield t("plan", "phases", phases=t("page", "separator").join(peaks))
    for what in best.not_modelled if best else ():
        yield t("dryrun", "not_modelled", what=what)
    if result.environ:
        yield t("plan", "allocator", settings=", ".join(f"{name}={value}" for name, value in result.environ.items()))
    key = "traced" if result.traced else "remembered"
    yield t("plan", key, traces=result.traced, seconds=f"{result.seconds:.1f}")


def cards_page(rows: Sequence[CardRow], t: Words) -> Page:
    """Lay out a survey of every card."""
    compiled = {row.compile for row in rows}
    table = Table(
        caption=t("cards", "title"),
        columns=[t("cards", key) for key in ("card", "memory", "at_once", "recomputed", "rate", "remark")],
        rows=[_card(row, t) for row in rows],
        numbers=frozenset({1, 2, 3, 4}),
        is_headed=True,
    )
    about_compiling = t("cards", "both" if len(compiled) > 1 else "compiled" if True in compiled else "not_compiled")
    section = Section(id="cards", title=t("cards", "title"), paragraphs=[about_compiling], tables=[table])
    verdict = t("cards", "verdict", fitting=sum(row.fits for row in rows), cards=len(rows))
    return Page(title=t("cards", "title"), verdict=verdict, sections=[section])


def _card(row: CardRow, t: Words) -> list[str]:
    memory = format_bytes(row.memory_bytes)
    if not row.fits or row.tokens_per_s is None:
        return [row.gpu, memory, "", "", "", t("cards", "does_not_fit", bytes=format_bytes(row.needs_bytes))]
    remarks = [("offload", row.offload), ("emulates", row.emulates)]
    remark = t("page", "separator").join(t("cards", key) for key, is_so in remarks if is_so)
    return [row.gpu, memory, str(row.micro_batch), str(row.blocks or ""), format_count(row.tokens_per_s), remark]
