"""Which cards run a configuration, and how fast: one line of traces for each compute capability, read for each card."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tightfit.config import Resolved, TrainConfig
from tightfit.gpus import GPU, all_gpus
from tightfit.plan.budget import device_budget
from tightfit.plan.candidates import Plan, is_open
from tightfit.plan.choose import Line, line_through
from tightfit.plan.make import ALLOCATOR, EXPANDABLE, with_shape
from tightfit.plan.predict import Predictor, Target
from tightfit.plan.speed import rates_of

_SMALL_BATCH = 4


@dataclass(frozen=True, kw_only=True)
class CardRow:
    """One card; read off a line, so an estimate: `tightfit plan --gpu` traces the plan itself."""

    gpu: str
    memory_bytes: int
    fits: bool
    micro_batch: int
    """Sequences at once; 0 if not even one has room."""
    blocks: int
    """Recomputed ones."""
    offload: bool
    """Whether the optimizer has to be in host memory."""
    needs_bytes: int
    """By the least that was looked at, if nothing fits; else by this plan."""
    step_s: float | None
    tokens_per_s: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def every_card(resolved: Resolved[TrainConfig], *, say: Callable[[str], object] = lambda text: None) -> list[CardRow]:
    """Every card of the table, the smallest first."""
    config = replace(with_shape(resolved.config), device="cuda", loss="chunked")
    share = config.effective_batch
    may_offload = is_open(resolved, "offload")
    levels = [0, config.n_layer] if is_open(resolved, "activation_checkpointing") else [config.activation_checkpointing]
    by_capability: dict[tuple[int, int], list[GPU]] = {}
    for gpu in all_gpus():
        by_capability.setdefault(gpu.capability, []).append(gpu)
    rows = []
    for number, (capability, cards) in enumerate(sorted(by_capability.items()), 1):
        say(f"compute capability {capability[0]}.{capability[1]}, {number} of {len(by_capability)}")
        line = _line(config, cards[0], share, levels)
        here = [_row(config, card, cards[0], line, share, levels) for card in cards]
        if may_offload and not all(row.fits for row in here):
            offloaded = replace(config, offload="optimizer")
            line = _line(offloaded, cards[0], share, levels)
            others = [_row(offloaded, card, cards[0], line, share, levels) for card in cards]
            here = [row if row.fits else other for row, other in zip(here, others, strict=True)]
        rows += here
    return sorted(rows, key=lambda row: (row.memory_bytes, row.gpu))


def _line(config: TrainConfig, gpu: GPU, share: int, levels: list[int]) -> Line:
    small = min(_SMALL_BATCH, share)
    points = [(1, levels[0]), (small, levels[0]), (small, levels[-1])]
    plans = [
        Plan(
            micro_batch=size,
            eval_micro_batch=size,
            loss="chunked",
            activation_checkpointing=blocks,
            compile=False,
            offload=config.offload,
        )
        for size, blocks in points
    ]
    target = Target(
        gpu=gpu, known=True, share=share, environ={ALLOCATOR: EXPANDABLE}, host_flops={}, host_bandwidth=0.0
    )
    with Predictor(config, target) as predictor:
        return line_through(predictor.predict(plans, whole=False))


def _row(config: TrainConfig, gpu: GPU, traced: GPU, line: Line, share: int, levels: list[int]) -> CardRow:
    budget = device_budget(gpu)
    for blocks in levels:
        if size := line.largest(budget.bytes, blocks, share):
            seconds = line.step_s(size, blocks, share) * _slower(gpu, traced, config)
            return CardRow(
                gpu=gpu.name,
                memory_bytes=budget.total_bytes,
                fits=True,
                micro_batch=size,
                blocks=blocks,
                offload=config.offloads("optimizer"),
                needs_bytes=round(line.peak(size, blocks)),
                step_s=seconds,
                tokens_per_s=share * config.block_size / seconds,
            )
    return CardRow(
        gpu=gpu.name,
        memory_bytes=budget.total_bytes,
        fits=False,
        micro_batch=0,
        blocks=levels[-1],
        offload=config.offloads("optimizer"),
        needs_bytes=round(line.peak(1, levels[-1])) + budget.context_bytes + budget.margin_bytes,
        step_s=None,
        tokens_per_s=None,
    )


def _slower(gpu: GPU, traced: GPU, config: TrainConfig) -> float:
    """How many times as long a step takes on `gpu` as on the card that was traced, by the work of a transformer.

    Matrix products and the rest take about as long as each other's half on the traced card (choose.py's lines hold
    their sum), so both ratios count alike.
    """
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if gpu.native_bf16 else "float16")
    mine, theirs = rates_of(gpu, compiled=False), rates_of(traced, compiled=False)
    return 0.5 * theirs.matmul[dtype] / mine.matmul[dtype] + 0.5 * theirs.bandwidth / mine.bandwidth
