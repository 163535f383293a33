"""A plan, or that there is none, in sentences."""

from tightfit.plan.make import PlanResult
from tightfit.plan.predict import Prediction
from tightfit.units import format_bytes


def one_line(result: PlanResult) -> str:
    """Why this plan, for the log of a run."""
    best = result.choice.best
    if best is None:
        return f"plan: none fits {device_name(result)}"
    request = result.choice.request
    why = (
        "as asked"
        if request is None or request.peak_bytes <= result.where.budget.bytes
        else (f"because {request.plan.micro_batch} at once would need about {format_bytes(request.peak_bytes)}")
    )
    return (
        f"plan: {in_words(best, result.choice.share)}; {format_bytes(best.peak_bytes)} of "
        f"{format_bytes(result.where.budget.bytes)} that {device_name(result)} has for it, {why}"
    )


def in_words(prediction: Prediction, share: int) -> str:
    """What a plan does, for a step of `share` sequences."""
    plan = prediction.plan
    words = [f"{plan.micro_batch} sequences at once, {plan.passes(share)} passes a step"]
    words.append({"full": "all logits kept", "chunked": "loss in chunks"}.get(plan.loss, f"loss={plan.loss}"))
    if plan.activation_checkpointing:
        words.append(f"{plan.activation_checkpointing} blocks recomputed")
    words.append("compiled" if plan.compile else "not compiled")
    return ", ".join(words)


def device_name(result: PlanResult) -> str:
    """The card's name, or the processor."""
    return result.where.gpu.name if result.where.gpu else "this machine's processor"


def nothing_fits(result: PlanResult) -> str:
    """What is missing, in numbers."""
    least = result.choice.least
    lines = ["NOTHING FITS that leaves the result as it is."]
    if least is not None:
        need = least.peak_bytes + result.where.budget.context_bytes + result.where.budget.margin_bytes
        lines.append(
            f"  The least is {format_bytes(least.peak_bytes)} ({in_words(least, result.choice.share)}), "
            f"{format_bytes(least.peak_bytes - result.where.budget.bytes)} too much:"
        )
        lines += [f"    {format_bytes(size):>11}  {name}" for name, size in least.categories.items() if size > 2**20]
        lines.append(f"  A card with {format_bytes(need + result.where.budget.used_bytes)} or more would do.")
    return "\n".join(lines)
