"""Sentences about a plan, or about the lack of one."""

from collections.abc import Iterator

from tightfit.config import TrainConfig
from tightfit.models.shape import OFFLOADED_BYTES
from tightfit.planner.candidates import Plan
from tightfit.planner.layers import PLAYED_LAYERS
from tightfit.planner.lines import Estimate
from tightfit.planner.planning import PlanResult
from tightfit.planner.predict import Prediction
from tightfit.units import MIB, format_bytes
from tightfit.wording import chosen_language, say
from tightfit.wording.report import words


def one_line(result: PlanResult) -> str:
    """Return the reason for a plan, for the log of a run."""
    best, request, budget = result.choice.best, result.choice.request, result.where.budget.bytes
    if best is None:
        return say("planner.sentences.none_fits", device=device_name(result))
    if request is None or request.peak_bytes <= budget:
        why = say("planner.sentences.as_asked")
    else:
        why = say("planner.sentences.because", micro_batch=request.plan.micro_batch, need=about(request))
    plan = in_words(best, result.choice.share)
    return say(
        "planner.sentences.one_line",
        plan=plan,
        peak=best.peak_bytes,
        budget=budget,
        device=device_name(result),
        why=why,
    )


def about(request: Estimate) -> str:
    """Return the memory that the requested run needs: an estimate, or a lower bound."""
    return say("planner.sentences.about" if request.step_s else "planner.sentences.at_least", peak=request.peak_bytes)


def in_words(prediction: Prediction, share: int) -> str:
    """Describe a plan for a step of `share` sequences."""
    plan = prediction.plan
    parts = [
        say("planner.sentences.size", micro_batch=plan.micro_batch, passes=plan.passes(share)),
        _loss(plan),
        *_recomputed(plan),
        say("planner.sentences.compiled" if plan.compile else "planner.sentences.not_compiled"),
        *_offloaded(plan, prediction.parameters),
        *([say("planner.sentences.sharded", shard=plan.shard)] if plan.shard != "none" else []),
        *_lossy(plan),
    ]
    return say("planner.sentences.separator").join(parts)


def _loss(plan: Plan) -> str:
    if plan.loss == "full":
        return say("planner.sentences.full")
    if plan.loss == "chunked":
        return say("planner.sentences.chunked")
    return say("planner.sentences.loss", loss=plan.loss)


def _recomputed(plan: Plan) -> Iterator[str]:
    if plan.activation_checkpointing:
        yield say("planner.sentences.blocks", blocks=plan.activation_checkpointing)
    if plan.activation_memory_budget < 1:
        yield say("planner.sentences.share", share=1 - plan.activation_memory_budget)


def _offloaded(plan: Plan, parameters: int) -> Iterator[str]:
    if "optimizer" in plan.offload:
        yield say("planner.sentences.offloaded", host=OFFLOADED_BYTES * parameters)
    if "activations" in plan.offload:
        yield say("planner.sentences.inputs")


def _lossy(plan: Plan) -> Iterator[str]:
    if plan.optimizer != "adamw":
        yield say("planner.sentences.moments")
    if plan.param_dtype != "float32":
        yield say("planner.sentences.weights", dtype=plan.param_dtype)
    if plan.block_size:
        yield say("planner.sentences.block_size", tokens=plan.block_size)
    if plan.effective_batch:
        yield say("planner.sentences.effective_batch", sequences=plan.effective_batch)


def device_name(result: PlanResult) -> str:
    """Return the card's name, with the number of cards if there are several, or the processor."""
    gpu, cards = result.where.gpu, result.where.cards
    if gpu is None:
        return say("planner.sentences.processor")
    if cards.nodes > 1:
        return f"{cards.nodes} x {cards.per_node} x {gpu.name}"
    return f"{cards.count} x {gpu.name}" if cards.count > 1 else gpu.name


def about_cards(result: PlanResult) -> Iterator[str]:
    """Explain the links between cards, the time that they cost, and NCCL's memory; nothing for one card."""
    cards, best, budget = result.where.cards, result.choice.best, result.where.budget
    if cards.link is None:
        return
    rate = round(cards.bytes_per_s(min(2, cards.per_node)) / 1e9, 1)
    yield say(
        "planner.sentences.link" if cards.has_peer_access else "planner.sentences.link_by_host",
        link=cards.link.name,
        rate=f"{rate:g}",
        source=cards.link.source,
    )
    if (network := cards.network) is not None:
        is_own = network.per == "card"
        yield say(
            "planner.sentences.network_of_card" if is_own else "planner.sentences.network_of_node",
            network=network.name,
            rate=f"{network.bytes_per_s / 1e9:g}",
            source=network.source,
        )
    if best is not None:
        yield say("planner.sentences.waiting", waiting=best.waiting_s, step=best.step_s(result.choice.share))
    yield say("planner.sentences.nccl", nccl=budget.nccl_bytes)
    if result.is_extended:
        yield say(
            "planner.sentences.extended",
            played=say("gpus.context.and").join(map(str, PLAYED_LAYERS)),
            layers=result.config.n_layer,
        )
    yield say("planner.sentences.start", launch=launch(result))


def launch(result: PlanResult) -> str:
    """Return the command before `tightfit train` on each node of several cards."""
    cards = result.where.cards
    nodes = f" --nnodes={cards.nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500" if cards.nodes > 1 else ""
    return f"torchrun --nproc_per_node={cards.per_node}{nodes} -m tightfit train"


def nothing_fits(result: PlanResult) -> list[str]:
    """Explain in numbers, a line each, why nothing fits."""
    choice, budget = result.choice, result.where.budget
    lines, least = [say("planner.sentences.nothing_fits")], choice.least
    if least is None:
        return lines
    lines.append(
        say(
            "planner.sentences.least",
            peak=least.peak_bytes,
            plan=in_words(least, choice.share),
            missing=least.peak_bytes - budget.bytes,
            parts=_largest(least),
        )
    )
    lossy = choice.lossy
    if lossy and lossy.best and lossy.relief:
        lines.append(
            say(
                "planner.sentences.lossy",
                name=lossy.relief.name,
                plan=in_words(lossy.best, lossy.share),
                peak=lossy.best.peak_bytes,
                costs=costs(lossy.best.plan, result.config),
            )
        )
    whole = least.peak_bytes + budget.taken_bytes
    if result.where.gpu:
        return [*lines, say("planner.sentences.card_would_do", whole=whole)]
    return [*lines, say("planner.sentences.machine_would_do", whole=whole)]


def costs(plan: Plan, config: TrainConfig) -> str:
    """Return the cost of a lossy plan to the user, as a clause."""
    if plan.block_size:
        return say("planner.costs.context", shorter=plan.block_size, requested=config.block_size)
    if plan.effective_batch:
        return say("planner.costs.one_pass")
    if plan.param_dtype != config.param_dtype:
        return say("planner.costs.weights")
    return say("planner.costs.moments")


def _largest(least: Prediction) -> str:
    name = words(chosen_language(None)).name
    sizes = [
        f"{name('category', category)} {format_bytes(size)}"
        for category, size in least.categories.items()
        if size > MIB
    ]
    return say("planner.sentences.separator").join(sizes)
