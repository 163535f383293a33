"""Which cards run a configuration, and how fast: a few traces for each compute capability, timed for each card."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tightfit.config import Resolved, TrainConfig
from tightfit.gpus import GPU, all_gpus
from tightfit.planner.budget import device_budget
from tightfit.planner.candidates import Plan, balanced, even, is_open, may_recompute
from tightfit.planner.planning import ALLOCATOR, EXPANDABLE, can_compile, with_shape
from tightfit.planner.predict import Prediction, Predictor, Target
from tightfit.planner.search import SMALL_BATCH, Line, compiled_line, line_through
from tightfit.simulation.client import Simulator
from tightfit.simulation.speed import rates_of

_SEVERAL = 16
"""Where more sequences have room: so many that few of their tensors have room in a cache."""


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
    compile: bool
    emulates: bool
    """Whether it has no bfloat16, which is asked for, and is slow for that."""
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
    config = replace(with_shape(resolved.config), device="cuda")
    by_capability: dict[tuple[int, int], list[GPU]] = {}
    for gpu in all_gpus():
        by_capability.setdefault(gpu.capability, []).append(gpu)
    rows, compiled = [], dict[bool, tuple[Prediction, Prediction]]()
    with Simulator() as simulator:
        simulator.will_compile = config.compile is not False
        for number, (capability, cards) in enumerate(sorted(by_capability.items()), 1):
            say(f"compute capability {capability[0]}.{capability[1]}, {number} of {len(by_capability)}")
            family = _Family(resolved, config, cards[0], simulator)
            if family.compiles:
                formats = cards[0].native_bf16  # what is compiled differs by those, not by the capability
                family.compiled = compiled[formats] = compiled.get(formats) or family.trace_compiled()
            rows += [_row(family, card) for card in cards]
    return sorted(rows, key=lambda row: (row.memory_bytes, row.gpu))


@dataclass(frozen=True)
class _Way:
    """A loss and what is on the host, with the numbers of blocks that may be recomputed."""

    loss: str
    offload: str
    levels: tuple[int, ...]
    few: int
    """Sequences that have to have room; with `several` it gives the lines."""
    several: int


class _Family:
    """Cards of one compute capability: they run the same kernels, each at its own rate."""

    def __init__(self, resolved: Resolved[TrainConfig], config: TrainConfig, traced: GPU, simulator: Simulator) -> None:
        self.config, self.share = config, config.effective_batch
        self.compiles = config.compile is not False and can_compile(traced)
        self.compiled: tuple[Prediction, Prediction] | None = None
        """One plan, compiled and not: what compiling gains. Inductor's kernels are those of other capabilities, too."""
        self._traced, self._simulator = traced, simulator
        self._small, self._several = min(SMALL_BATCH, self.share), min(_SEVERAL, self.share)
        is_free = may_recompute(resolved)
        levels = (0, config.n_layer) if is_free else (config.activation_checkpointing,)
        losses = ["full", "chunked"] if is_open(resolved, "loss") else [config.loss]
        self._ways = [_Way(losses[0], config.offload, levels, 1, self._several)]
        if len(losses) > 1:  # as a plan does: where hardly a sequence has room with all logits, they are not kept
            self._ways = [
                _Way("full", config.offload, levels[:1], self._small, self._several),
                _Way("chunked", config.offload, levels, 1, self._small),
            ]
        if is_open(resolved, "offload") and config.optimizer == "adamw":
            self._ways.append(_Way(losses[-1], "optimizer", levels, 1, self._small))
        self._fixed = 0 if is_open(resolved, "micro_batch") else min(config.micro_batch, self.share)
        self._points: dict[_Way, list[Prediction]] = {}

    def trace_compiled(self) -> tuple[Prediction, Prediction]:
        """The same plan, compiled and not: several sequences at once, all on the device, nothing recomputed."""
        plain = self._plan(self._several, 0, "full", "none")
        compiled, plainly = self._predict([replace(plain, compile=True), plain])
        return compiled, plainly

    def reading(self, gpu: GPU, budget: int) -> tuple[Plan, Line]:
        """What would run on `gpu`, and the line it is read off; of the way that takes least if nothing has room."""
        for way in self._ways:
            line = self._line(way, gpu)
            for blocks in way.levels:
                if (largest := line.largest(budget, blocks, self.share)) >= (self._fixed or way.few):
                    size = self._fixed or (even if self.compiles else balanced)(largest, self.share)
                    return self._plan(size, blocks, way.loss, way.offload), line
        return self._plan(0, way.levels[-1], way.loss, way.offload), line

    def _line(self, way: "_Way", gpu: GPU) -> Line:
        """Memory and time of steps on `gpu`, compiled ones if they would be."""
        if way not in self._points:
            points = [(way.few, way.levels[0]), (way.several, way.levels[0]), (way.several, way.levels[-1])]
            self._points[way] = self._predict(
                [self._plan(size, blocks, way.loss, way.offload) for size, blocks in points[: 1 + len(way.levels)]]
            )
        plain = [each.at(rates_of(gpu, compiled=False)) for each in self._points[way]]
        line = line_through(plain)
        if self.compiled is None:
            return line
        compiled, plainly = self.compiled
        faster = compiled.at(rates_of(gpu, compiled=True)).pass_s / plainly.at(rates_of(gpu, compiled=False)).pass_s
        line = replace(
            compiled_line(self.config, way.loss, line),
            pass_s=line.pass_s * faster,
            pass_s_per_block=line.pass_s_per_block * faster,
        )
        # What the host does in each pass takes its time, compiled or not.
        return line if way.offload != "none" else replace(line, pass_start_s=line.pass_start_s * faster)

    def _plan(self, size: int, blocks: int, loss: str, offload: str) -> Plan:
        return Plan(
            micro_batch=size,
            eval_micro_batch=size,
            loss=loss,
            activation_checkpointing=blocks,
            compile=False,
            offload=offload,
        )

    def _predict(self, plans: list[Plan]) -> list[Prediction]:
        """Of plans that have the same on the host."""
        target = Target(
            gpu=self._traced,
            known=True,
            share=max(self.share, 2 * self._several),  # two passes a trace: the second holds the first's gradients
            environ={ALLOCATOR: EXPANDABLE},
        )
        config = replace(self.config, offload=plans[0].offload)  # a plan that has none would leave the user's
        return Predictor(config, target, self._simulator).predict(plans, whole=False)


def _row(family: _Family, gpu: GPU) -> CardRow:
    budget = device_budget(gpu)
    plan, line = family.reading(gpu, budget.bytes)
    size, blocks = plan.micro_batch, plan.activation_checkpointing
    seconds = line.step_s(size, blocks, family.share) if size else None
    taken = round(line.peak(max(size, 1), blocks))
    return CardRow(
        gpu=gpu.name,
        memory_bytes=budget.total_bytes,
        fits=size > 0,
        micro_batch=size,
        blocks=blocks,
        compile=family.compiles,
        emulates=family.config.dtype == "bfloat16" and not gpu.native_bf16,
        offload=plan.offload == "optimizer",
        needs_bytes=taken if size else taken + budget.context_bytes + budget.margin_bytes,
        step_s=seconds,
        tokens_per_s=family.share * family.config.block_size / seconds if seconds else None,
    )
