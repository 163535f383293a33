"""Survey of all cards: which run a configuration and how fast, by a few traces for each compute capability."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tightfit.config import Resolved, TrainConfig, batch_split
from tightfit.gpus import GPU, all_gpus
from tightfit.planner.budget import device_budget
from tightfit.planner.candidates import Plan, balanced, even, is_open, may_recompute
from tightfit.planner.lines import Line, compiled_line, line_through
from tightfit.planner.planning import ALLOCATOR, EXPANDABLE, can_compile, with_shape
from tightfit.planner.predict import Prediction, Predictor, Target
from tightfit.planner.search import SMALL_BATCH
from tightfit.simulation.client import Progress, Simulator
from tightfit.simulation.speed import rates_of
from tightfit.wording import say

_SEVERAL = 16
"""Micro-batch of a line where many fit: so large that few tensors fit a second-level cache."""


@dataclass(frozen=True, kw_only=True)
class CardRow:
    """Estimate for one card, read off a line: `tightfit plan --gpu` traces the plan itself."""

    gpu: str
    memory_bytes: int
    fits: bool
    micro_batch: int
    """Sequences at once; 0 if not even one fits."""
    blocks: int
    """Recomputed blocks."""
    compile: bool
    emulates: bool
    """The run asks for bfloat16, which the card only emulates, slowly."""
    offload: bool
    """The optimizer must be in host memory."""
    needs_bytes: int
    """Bytes of this plan; if nothing fits, of the smallest one tried."""
    step_s: float | None
    tokens_per_s: float | None


def every_card(
    resolved: Resolved[TrainConfig],
    *,
    log: Callable[[str], object] = lambda text: None,
    progress: Progress | None = None,
) -> list[CardRow]:
    """Return a row for every card of the table, the smallest first."""
    config = replace(with_shape(resolved.config), device="cuda")
    by_capability: dict[tuple[int, int], list[GPU]] = {}
    for gpu in all_gpus():
        by_capability.setdefault(gpu.capability, []).append(gpu)
    rows, compiled = [], dict[bool, tuple[Prediction, Prediction]]()
    with Simulator(progress=progress) as simulator:
        simulator.will_compile = config.compile is not False
        for number, (capability, cards) in enumerate(sorted(by_capability.items()), 1):
            dotted = "{}.{}".format(*capability)
            log(say("planner.survey.capability", capability=dotted, number=number, whole=len(by_capability)))
            family = _Family(resolved, config, cards[0], simulator)
            if family.compiles:
                formats = cards[0].native_bf16  # compiled code differs by those, not by the capability
                family.compiled = compiled[formats] = compiled.get(formats) or family.trace_compiled()
            rows += [_row(family, card) for card in cards]
    return sorted(rows, key=lambda row: (row.memory_bytes, row.gpu))


@dataclass(frozen=True)
class _Way:
    """Loss, offload, and the numbers of blocks that may be recomputed."""

    loss: str
    offload: str
    levels: tuple[int, ...]
    few: int
    """Sequences that must fit; with `several` they give the lines."""
    several: int


class _Family:
    """Cards of one compute capability, which run the same kernels, each at its own rate."""

    def __init__(self, resolved: Resolved[TrainConfig], config: TrainConfig, traced: GPU, simulator: Simulator) -> None:
        self.config, self.share = config, config.effective_batch
        self.compiles = config.compile is not False and can_compile(traced)
        self.compiled: tuple[Prediction, Prediction] | None = None
        """One plan, compiled and not, for the gain of compiling. Inductor's kernels do not depend on the capability."""
        self._traced, self._simulator = traced, simulator
        self._small, self._several = min(SMALL_BATCH, self.share), min(_SEVERAL, self.share)
        is_free = may_recompute(resolved)
        levels = (0, config.n_layer) if is_free else (config.activation_checkpointing,)
        losses = ["full", "chunked"] if is_open(resolved, "loss") else [config.loss]
        self._ways = [_Way(losses[0], config.offload, levels, 1, self._several)]
        if len(losses) > 1:  # as a plan does: where hardly a sequence fits with all logits, they are not kept
            self._ways = [
                _Way("full", config.offload, levels[:1], self._small, self._several),
                _Way("chunked", config.offload, levels, 1, self._small),
            ]
        if is_open(resolved, "offload") and config.optimizer == "adamw":
            self._ways.append(_Way(losses[-1], "optimizer", levels, 1, self._small))
        self._fixed = 0 if is_open(resolved, "micro_batch") else batch_split(config, share=self.share).micro_batch
        self._points: dict[_Way, list[Prediction]] = {}

    def trace_compiled(self) -> tuple[Prediction, Prediction]:
        """Predict one plan compiled and not: several sequences at once, all on the device, nothing recomputed."""
        plain = self._plan(self._several, 0, "full", "none")
        compiled, plainly = self._predict([replace(plain, compile=True), plain])
        return compiled, plainly

    def reading(self, gpu: GPU, budget: int) -> tuple[Plan, Line]:
        """Return the plan for `gpu` and its line; if nothing fits, those of the way that takes least."""
        for way in self._ways:
            line = self._line(way, gpu)
            for blocks in way.levels:
                if (largest := line.largest(budget, blocks, self.share)) >= (self._fixed or way.few):
                    size = self._fixed or (even if self.compiles else balanced)(largest, self.share)
                    return self._plan(size, blocks, way.loss, way.offload), line
        return self._plan(0, way.levels[-1], way.loss, way.offload), line

    def _line(self, way: "_Way", gpu: GPU) -> Line:
        """Return memory and time of steps on `gpu`, compiled if they would be."""
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
        # Work on the host in each pass takes its time, compiled or not.
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
        """Predict the steps of plans that share one offload."""
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
