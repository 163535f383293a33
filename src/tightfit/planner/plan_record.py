"""The plan as a record: what `tightfit plan --json` prints and its page shows. Sizes in bytes, times in seconds."""

import msgspec

from tightfit.config import TrainConfig
from tightfit.links import Link
from tightfit.planner.candidates import KeyValue
from tightfit.planner.planning import PlanResult
from tightfit.planner.predict import Prediction
from tightfit.planner.search import Choice
from tightfit.planner.sentences import costs, launch


class BudgetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that the plan may take; the fields are those of `Budget`."""

    total_bytes: int
    used_by_others_bytes: int
    context_bytes: int
    reserved_bytes: int
    margin_bytes: int
    bytes: int
    nccl_bytes: int = 0
    """Left for NCCL, on several cards."""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The requested run, estimated."""

    keys: dict[str, KeyValue]
    peak_bytes_estimate: int


class PlanRow(msgspec.Struct, frozen=True, kw_only=True):
    """One traced plan."""

    name: str
    """Micro-batch x passes."""
    keys: dict[str, KeyValue]
    """Configuration keys that it sets."""
    peak_bytes: int
    phase: str
    """Phase of the peak."""
    step_s: float
    fits: bool
    exact: bool
    categories: dict[str, int]
    """Bytes at the peak."""


class LossyRow(PlanRow, frozen=True, kw_only=True):
    """Plan with the first lossy change that would fit."""

    allow: str
    """Word for --allow."""
    costs: str
    """Cost of the change, as a clause."""


class LinkRow(msgspec.Struct, frozen=True, kw_only=True):
    """A link of `links.csv`."""

    name: str
    bytes_per_s: float
    source: str


class ShardingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One way to spread the model over several cards."""

    shard: str
    peak_bytes: int
    """Peak of its fastest plan; where none fits, the least that a step needs."""
    step_s: float | None
    """None: nothing fits."""
    is_traced: bool
    """False: an estimate."""


class CardsRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Cards that train together."""

    nodes: int
    per_node: int
    link: LinkRow | None
    network: LinkRow | None
    has_peer_access: bool
    waiting_s: float | None
    """Seconds of the best plan's step, if it is of one pass, in which it waits for other cards."""
    shardings: list[ShardingRow]
    launch: str
    """Command before `tightfit train`, on each node."""
    phases: dict[str, int]
    """Highest allocated bytes of each phase of the best plan, on one card."""


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All of a plan."""

    device: str
    """Card's name, or cpu."""
    budget: BudgetRecord
    effective_batch: int
    tokens_per_step: int
    share: int
    """Sequences of a step on this device."""
    request: RequestRecord | None
    best: PlanRow | None
    alternatives: list[PlanRow]
    least: PlanRow | None
    """Plan with the lowest peak, if none fits."""
    lossy: LossyRow | None
    environment: dict[str, str]
    """Allocator settings that the plan was made with."""
    traces: int
    """Traces made; the others were recalled from the cache."""
    seconds: float
    notes: list[str]
    cards: CardsRecord | None = None
    """None: one card, or the processor."""


def plan_record(result: PlanResult) -> PlanRecord:
    """Return the record of a plan."""
    choice, request = result.choice, result.choice.request
    rows = [(each, True) for each in choice.offered] + [(each, False) for each in choice.refused]
    return PlanRecord(
        device=result.where.gpu.name if result.where.gpu else "cpu",
        budget=msgspec.convert(result.where.budget, BudgetRecord, from_attributes=True),
        effective_batch=result.config.effective_batch,
        tokens_per_step=result.config.tokens_per_step,
        share=choice.share,
        request=RequestRecord(keys=request.plan.keys(), peak_bytes_estimate=request.peak_bytes) if request else None,
        best=_row(choice.best, choice.share, fits=True) if choice.best else None,
        alternatives=[_row(each, choice.share, fits=fits) for each, fits in rows],
        least=_row(choice.least, choice.share, fits=False) if choice.least else None,
        lossy=_lossy(choice.lossy, result.config),
        environment=result.environ,
        traces=result.traced,
        seconds=result.seconds,
        notes=result.notes,
        cards=_cards(result) if result.where.cards.count > 1 else None,
    )


def _cards(result: PlanResult) -> CardsRecord:
    cards, best = result.where.cards, result.choice.best
    return CardsRecord(
        nodes=cards.nodes,
        per_node=cards.per_node,
        link=_link(cards.link),
        network=_link(cards.network),
        has_peer_access=cards.has_peer_access,
        waiting_s=best.waiting_s if best else None,
        shardings=[
            ShardingRow(shard=each.name, peak_bytes=each.peak_bytes, step_s=each.step_s, is_traced=each.is_traced)
            for each in result.shardings
        ],
        launch=launch(result),
        phases=best.phases if best else {},
    )


def _link(link: Link | None) -> LinkRow | None:
    return None if link is None else LinkRow(name=link.name, bytes_per_s=link.bytes_per_s, source=link.source)


def _row(prediction: Prediction, share: int, *, fits: bool) -> PlanRow:
    plan = prediction.plan
    return PlanRow(
        name=f"{plan.micro_batch} x {plan.passes(share)}",
        keys=plan.keys(),
        peak_bytes=prediction.peak_bytes,
        phase=prediction.phase,
        step_s=prediction.step_s(share),
        fits=fits,
        exact=plan.is_exact,
        categories=prediction.categories,
    )


def _lossy(choice: Choice | None, config: TrainConfig) -> LossyRow | None:
    if choice is None or choice.best is None or choice.relief is None:
        return None
    row = msgspec.structs.asdict(_row(choice.best, choice.share, fits=True))
    return LossyRow(allow=choice.relief.name, costs=costs(choice.best.plan, config), **row)
