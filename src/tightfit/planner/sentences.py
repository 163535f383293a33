"""Sentences about a plan, or about the lack of one."""

from tightfit.models.shape import OFFLOADED_BYTES
from tightfit.planner.lines import Estimate
from tightfit.planner.planning import PlanResult
from tightfit.planner.predict import Prediction
from tightfit.units import format_bytes


def one_line(result: PlanResult) -> str:
    """Return the reason for a plan, for the log of a run."""
    best = result.choice.best
    if best is None:
        return f"plan: none fits {device_name(result)}"
    request = result.choice.request
    why = (
        "as asked"
        if request is None or request.peak_bytes <= result.where.budget.bytes
        else (f"because {request.plan.micro_batch} at once would need {about(request)}")
    )
    return (
        f"plan: {in_words(best, result.choice.share)}; {format_bytes(best.peak_bytes)} of "
        f"{format_bytes(result.where.budget.bytes)} that {device_name(result)} has for it, {why}"
    )


def about(request: Estimate) -> str:
    """Return the memory that the requested run needs: an estimate, or a lower bound."""
    return f"{'about' if request.step_s else 'at least'} {format_bytes(request.peak_bytes)}"


def in_words(prediction: Prediction, share: int) -> str:
    """Describe a plan for a step of `share` sequences."""
    plan = prediction.plan
    passes = plan.passes(share)
    words = [
        f"{plan.micro_batch} sequence{'s' * (plan.micro_batch > 1)} at once, {passes} pass{'es' * (passes > 1)} a step"
    ]
    words.append({"full": "all logits kept", "chunked": "loss in chunks"}.get(plan.loss, f"loss={plan.loss}"))
    if plan.activation_checkpointing:
        words.append(f"{plan.activation_checkpointing} blocks recomputed")
    if plan.activation_memory_budget < 1:
        words.append(f"{1 - plan.activation_memory_budget:.0%} of what backward needs recomputed")
    words.append("compiled" if plan.compile else "not compiled")
    if "optimizer" in plan.offload:
        host = format_bytes(OFFLOADED_BYTES * prediction.parameters)
        words.append(f"optimizer and gradients in {host} of host memory")
    if "activations" in plan.offload:
        words.append("inputs of the blocks in host memory")
    if plan.optimizer != "adamw":
        words.append("moments in 8 bits (lossy)")
    if plan.param_dtype != "float32":
        words.append(f"weights in {plan.param_dtype} (lossy)")
    if plan.block_size:
        words.append(f"block_size {plan.block_size} (lossy)")
    if plan.effective_batch:
        words.append(f"effective batch {plan.effective_batch} (lossy)")
    return ", ".join(words)


def device_name(result: PlanResult) -> str:
    """Return the card's name, or the processor."""
    return result.where.gpu.name if result.where.gpu else "this machine's processor"


def nothing_fits(result: PlanResult) -> str:
    """Explain in numbers why nothing fits."""
    least = result.choice.least
    lines = ["NOTHING FITS that leaves the result as it is."]
    if least is not None:
        need = least.peak_bytes + result.where.budget.context_bytes + result.where.budget.margin_bytes
        lines.append(
            f"  The least is {format_bytes(least.peak_bytes)} ({in_words(least, result.choice.share)}), "
            f"{format_bytes(least.peak_bytes - result.where.budget.bytes)} too much:"
        )
        lines += [f"    {format_bytes(size):>11}  {name}" for name, size in least.categories.items() if size > 2**20]
        lossy = result.choice.lossy
        if lossy and lossy.best and lossy.relief:
            lines.append(
                f"  With --allow={lossy.relief.name} it would fit: {in_words(lossy.best, lossy.share)}; "
                f"{format_bytes(lossy.best.peak_bytes)}. It is lossy: {lossy.relief.costs}."
            )
        whole = format_bytes(need + result.where.budget.used_by_others_bytes + result.where.budget.reserved_bytes)
        lines.append(f"  {'A card' if result.where.gpu else 'A machine'} with {whole} or more would do.")
    return "\n".join(lines)
