"""A plan as a person reads it: the card, the memory by category, the choice, the alternatives."""

from typing import TYPE_CHECKING

from tightfit.planner.planning import PlanResult
from tightfit.planner.predict import Prediction
from tightfit.planner.sentences import about, device_name, in_words, nothing_fits
from tightfit.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from tightfit.planner.survey import CardRow

_BAR = 48
_MARKS = "█▓▒░▚▞▤▥▦"


def plan_text(result: PlanResult) -> str:
    """Several paragraphs, at most 100 columns wide."""
    choice = result.choice
    parts = [_device(result), _request(result)]
    if choice.best is None:
        parts.append(nothing_fits(result))
    else:
        parts += [_chosen(result, choice.best), _memory(result, choice.best), _others(result)]
    parts.append(_notes(result))
    return "\n\n".join(part for part in parts if part)


def _device(result: PlanResult) -> str:
    budget = result.where.budget
    lines = [f"{device_name(result)}: {format_bytes(budget.total_bytes)}"]
    if budget.used_by_others_bytes:
        lines.append(f"  {format_bytes(budget.used_by_others_bytes):>11}  used by other programs")
    if budget.reserved_bytes:
        lines.append(
            f"  {format_bytes(budget.reserved_bytes):>11}  reserved by this process and not used, which counts too"
        )
    lines.append(f"  {format_bytes(budget.context_bytes):>11}  {budget.text.partition(' for ')[2] or budget.text}")
    lines.append(f"  {format_bytes(budget.margin_bytes):>11}  left free, because predictions err")
    lines.append(f"  {format_bytes(budget.bytes):>11}  for the plan")
    return "\n".join(lines)


def _request(result: PlanResult) -> str:
    config, request, best = result.config, result.choice.request, result.choice.best
    stays = "" if best and (best.plan.block_size or best.plan.effective_batch) else "; that stays"
    text = (
        f"A step is {config.effective_batch} sequences of {config.block_size} tokens, "
        f"{config.tokens_per_step:,} in all{stays}."
    )
    if request is None:
        return text
    verdict = "fits" if request.peak_bytes <= result.where.budget.bytes else "does not fit"
    asked = f"{request.plan.micro_batch} at once with all their logits"
    return f"{text}\nAs asked, {asked}: {about(request)}, which {verdict}."


def _rate(result: PlanResult, prediction: Prediction) -> str:
    seconds = prediction.step_s(result.choice.share)
    tokens = result.choice.share * (prediction.plan.block_size or result.config.block_size)
    return f"{format_count(tokens / seconds)} tokens/s, {format_duration(seconds)} a step"


def _chosen(result: PlanResult, best: Prediction) -> str:
    keys = " ".join(f"--{key}={value}" for key, value in best.plan.keys().items())
    rate = _rate(result, best)
    return (
        f"PLAN: {in_words(best, result.choice.share)}\n"
        f"  peak {format_bytes(best.peak_bytes)} in {best.phase}; about {rate}"
        f"\n  {keys}"
    )


def _memory(result: PlanResult, best: Prediction) -> str:
    total = result.where.budget.bytes
    rows = sorted(((size, name) for name, size in best.categories.items() if size >= total / 500), reverse=True)
    bar = "".join(mark * max(1, round(size / total * _BAR)) for (size, _), mark in zip(rows, _MARKS, strict=False))
    lines = [f"Memory at the peak: [{bar[:_BAR]:<{_BAR}}] {best.peak_bytes / total:.0%} of what there is for it"]
    lines += [f"  {mark} {name:<16} {format_bytes(size):>11}" for (size, name), mark in zip(rows, _MARKS, strict=False)]
    return "\n".join(lines)


def _others(result: PlanResult) -> str:
    rows = [(each, True) for each in result.choice.offered[1:]] + [(each, False) for each in result.choice.refused]
    if not rows:
        return ""
    lines = ["Also traced:"]
    for each, fits in rows:
        lines.append(
            f"  {'fits' if fits else 'does not fit':<12} {format_bytes(each.peak_bytes):>10}  "
            f"{_rate(result, each)}: {in_words(each, result.choice.share)}"
        )
    return "\n".join(lines)


def _notes(result: PlanResult) -> str:
    notes = list(result.notes)
    best = result.choice.best
    if best is not None:
        notes += [f"not modelled: {each}" for each in best.not_modelled]
    if result.environ:
        notes.append("allocator: " + ", ".join(f"{name}={value}" for name, value in result.environ.items()))
    notes.append(
        f"rates are a model's, from the card's peaks; {result.traced} traces in {result.seconds:.1f} s"
        + ("" if result.traced else " (all remembered)")
    )
    return "\n".join(notes)


def cards_text(rows: "list[CardRow]") -> str:
    """A table of every card."""
    lines = [f"{'card':<38} {'memory':>10}  {'at once':>7}  {'recomputed':>10}  {'tokens/s':>9}"]
    for row in rows:
        if row.fits and row.tokens_per_s is not None:
            rest = f"{row.micro_batch:>7}  {row.blocks or '':>10}  {format_count(row.tokens_per_s):>9}"
            rest += "  optimizer on the host" if row.offload else ""
            rest += "  bfloat16 emulated: try --dtype=float16" if row.emulates else ""
        else:
            rest = f"does not fit: {format_bytes(row.needs_bytes)} at least"
        lines.append(f"{row.gpu:<38} {format_bytes(row.memory_bytes):>10}  {rest}")
    compiled = [row for row in rows if row.compile]
    how = "without torch.compile" if not compiled else "with torch.compile"
    if compiled and len(compiled) < len(rows):
        how += ", but for cards that are too old for it"
    lines.append(f"Estimates, {how}; tightfit plan --gpu NAME traces the plan of one card.")
    return "\n".join(lines)
