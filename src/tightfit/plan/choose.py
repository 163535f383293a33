"""Which plan: the fastest of those that fit, found with few traces, each one offered only after it was traced itself.

At a given loss and checkpointing the peak grows in a straight line with the micro-batch (tests hold that it never
falls), and falls in a straight line with the blocks that are recomputed. Two or three traces of a loss give both lines;
the micro-batch that they promise is then traced, and made smaller if the trace says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tightfit.config import Resolved, TrainConfig
from tightfit.plan.budget import Budget
from tightfit.plan.candidates import Plan, balanced, checkpointing_levels, even, is_open
from tightfit.plan.predict import Prediction, Predictor

_SMALL_BATCH = 4
"""The larger of the two micro-batches that give a line."""
_ATTEMPTS = 4
_OFFERED = 3
"""Plans traced in full."""
_COMPILED_HOLDS = 1.3
"""Sequences of a compiled step in the memory of one of an uncompiled one: 1.45 for GPT-2 124M with all its logits."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was found."""

    best: Prediction | None
    """The fastest plan that fits, or None."""
    offered: list[Prediction]
    """All plans that were traced and fit, the fastest first."""
    refused: list[Prediction] = field(default_factory=list)
    """Those that were traced and do not fit."""
    least: Prediction | None = None
    """The plan that takes least, if none fits."""
    request: "Estimate | None" = None
    """What was asked for, read off the lines."""
    line: "Line | None" = None
    """How the best plan's memory grows."""
    share: int = 1


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A plan read off the lines, not traced: never offered."""

    plan: Plan
    peak_bytes: int
    step_s: float


@dataclass(frozen=True)
class Line:
    """Peak and time of a loss at any micro-batch and number of recomputed blocks."""

    start: float
    per_sequence: float
    saved_per_block: float
    pass_start_s: float
    pass_s: float
    pass_s_per_block: float
    update_s: float

    def peak(self, micro_batch: int, blocks: int) -> float:
        return self.start + micro_batch * (self.per_sequence - blocks * self.saved_per_block)

    def step_s(self, micro_batch: int, blocks: int, share: int) -> float:
        passes = -(-share // micro_batch)
        return passes * self.pass_start_s + share * (self.pass_s + blocks * self.pass_s_per_block) + self.update_s

    def largest(self, budget: int, blocks: int, share: int) -> int:
        """The largest micro-batch that the line lets in; 0 if not even one sequence."""
        each = self.per_sequence - blocks * self.saved_per_block
        return max(0, min(share, int((budget - self.start) / each) if each > 0 else share))


class Search:
    """One search; `run` gives the choice."""

    def __init__(
        self,
        resolved: Resolved[TrainConfig],
        predictor: Predictor,
        budget: Budget,
        share: int,
        *,
        compiled: bool,
        on_host: bool,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        config = resolved.config
        self._predictor, self._budget, self._share, self._say = predictor, budget, share, say
        self._compiled, self._config = compiled, config
        self._micro_batch = 0 if is_open(resolved, "micro_batch") else min(config.micro_batch, share)
        self._eval_micro_batch = 0 if is_open(resolved, "eval_micro_batch") else config.eval_micro_batch
        self._losses = ["chunked", "full"] if is_open(resolved, "loss") else [config.loss]
        if on_host and is_open(resolved, "loss"):  # chunks are what is faster there, too
            self._losses = ["chunked"]
        is_free = is_open(resolved, "activation_checkpointing")
        self._levels = checkpointing_levels(config.n_layer) if is_free else [config.activation_checkpointing]
        self._may_not_compile = is_open(resolved, "compile")
        self._with_levels = False
        """Whether the lines say what recomputing saves."""
        self._traced: dict[Plan, Prediction] = {}

    def run(self) -> Choice:
        """The choice, after a handful of traces."""
        lines = self._lines()
        request = self._request(lines)
        found = self._fitting(lines)
        # Whether to compile was settled before: by the user, or because it is faster on this card.
        found.sort(key=lambda each: (each.plan.compile != self._compiled, each.step_s(self._share)))
        if found and (self._may_not_compile or found[0].plan.compile == self._compiled):
            return self._choice(found, request, line=lines[found[0].plan.loss])
        least = self._trace([self._plan(1, max(self._levels), self._losses[0])])[0]
        return self._choice([], request, least=least)

    def _choice(
        self,
        found: list[Prediction],
        request: Estimate,
        *,
        least: Prediction | None = None,
        line: Line | None = None,
    ) -> Choice:
        refused = [each for each in self._traced.values() if each.peak_bytes > self._budget.bytes]
        return Choice(
            best=found[0] if found else None,
            offered=found,
            refused=refused,
            least=least,
            request=request,
            line=line,
            share=self._share,
        )

    def _lines(self) -> dict[str, Line]:
        """Two or three traces for each loss, of plain kernels: compiling takes longer and hardly moves the lines."""
        least, small = min(self._levels), min(_SMALL_BATCH, self._share)
        lines = self._traced_lines([(1, least), (small, least)])
        budget = self._budget.bytes
        # Recomputing a block costs more than passes of fewer sequences: it is for where hardly one has room.
        if len(self._levels) > 1 and all(line.largest(budget, 0, self._share) < small for line in lines.values()):
            lines = self._traced_lines([(1, least), (small, least), (small, max(self._levels))])
            self._with_levels = True
        return lines

    def _traced_lines(self, points: list[tuple[int, int]]) -> dict[str, Line]:
        plans = {
            loss: [self._plan(size, blocks, loss, compiled=False) for size, blocks in points] for loss in self._losses
        }
        every = [plan for each in plans.values() for plan in each]
        self._say(f"tracing {len(every)} steps to see how memory grows")
        found = dict(zip(every, self._predictor.predict(every, whole=False), strict=True))
        return {loss: line_through([found[plan] for plan in each]) for loss, each in plans.items()}

    def _fitting(self, lines: dict[str, Line]) -> list[Prediction]:
        """Plans traced in full that fit, out of those that the lines say are fastest."""
        promising = []
        for loss, line in lines.items():
            for blocks in self._levels if self._with_levels else [min(self._levels)]:
                largest = line.largest(self._budget.bytes, blocks, self._share)
                if self._micro_batch:
                    largest = self._micro_batch if largest >= self._micro_batch else 0
                if largest:
                    size = self._micro_batch or self._split(largest)
                    promising.append((line.step_s(size, blocks, self._share), loss, blocks, size, largest))
        promising.sort()
        wanted = [self._plan(size, blocks, loss) for _, loss, blocks, size, _ in promising[:_OFFERED]]
        if self._compiled and wanted:
            # Compiling takes ten times as long as tracing: the best one, and two as they would be without it.
            wanted = [self._larger(wanted[0], promising[0][-1]), *(replace(plan, compile=False) for plan in wanted[:2])]
        self._say(f"tracing the {len(wanted)} most promising plans in full")
        return self._trace_until_fits(wanted, lines) if wanted else []

    def _trace_until_fits(self, plans: list[Plan], lines: dict[str, Line]) -> list[Prediction]:
        """Predictions that fit, of `plans` or, where the first does not, of smaller ones."""
        found = self._trace(plans)
        for _ in range(_ATTEMPTS):
            if found[0].peak_bytes <= self._budget.bytes:
                break
            smaller = self._smaller(found[0], lines[found[0].plan.loss])
            if smaller is None:
                break
            found = [*self._trace([smaller]), *found]
        return [each for each in found if each.peak_bytes <= self._budget.bytes]

    def _smaller(self, prediction: Prediction, line: Line) -> Plan | None:
        """The plan with as many sequences as the trace says would have fitted."""
        plan = prediction.plan
        if plan.micro_batch == 1 or self._micro_batch:
            return None
        per_sequence = max(1.0, (prediction.peak_bytes - line.start) / plan.micro_batch)
        size = int((self._budget.bytes - line.start) / per_sequence)
        size = self._split(max(1, min(plan.micro_batch - 1, size)))
        return replace(plan, micro_batch=size, eval_micro_batch=self._eval_micro_batch or size)

    def _split(self, largest: int) -> int:
        """The micro-batch to use where `largest` sequences have room."""
        return even(largest, self._share) if self._compiled else balanced(largest, self._share)

    def _larger(self, plan: Plan, largest: int) -> Plan:
        """With more sequences than the `largest` that the lines let in: they are of kernels that hold more."""
        if self._micro_batch:
            return plan
        size = self._split(min(self._share, int(largest * _COMPILED_HOLDS)))
        return replace(plan, micro_batch=size, eval_micro_batch=self._eval_micro_batch or size)

    def _trace(self, plans: list[Plan]) -> list[Prediction]:
        found = self._predictor.predict(plans)
        self._traced.update(zip(plans, found, strict=True))
        return found

    def _plan(self, size: int, blocks: int, loss: str, *, compiled: bool | None = None) -> Plan:
        return Plan(
            micro_batch=size,
            eval_micro_batch=self._eval_micro_batch or size,
            loss=loss,
            activation_checkpointing=blocks,
            compile=self._compiled if compiled is None else compiled,
        )

    def _request(self, lines: dict[str, Line]) -> Estimate:
        """nanoGPT's literal reading: `batch_size` sequences at once, all logits, nothing recomputed."""
        config = self._config
        size = self._micro_batch or min(config.batch_size, self._share)
        loss = "full" if "full" in lines else self._losses[0]
        blocks = 0 if len(self._levels) > 1 else self._levels[0]
        plan = self._plan(size, blocks, loss)
        return Estimate(
            plan=plan,
            peak_bytes=round(lines[loss].peak(size, blocks)),
            step_s=lines[loss].step_s(size, blocks, self._share),
        )


def line_through(points: list[Prediction]) -> Line:
    """Lines through a single sequence, several of them, and, where it was traced, those with blocks recomputed."""
    one, several = points[:2]
    size = several.plan.micro_batch
    per_sequence, pass_s = 0.0, one.pass_s
    if size > 1:
        per_sequence = (several.peak_bytes - one.peak_bytes) / (size - 1)
        pass_s = (several.pass_s - one.pass_s) / (size - 1)
    saved_bytes = more_s = 0.0
    if len(points) > 2 and (blocks := points[2].plan.activation_checkpointing - one.plan.activation_checkpointing):
        saved_bytes = (several.peak_bytes - points[2].peak_bytes) / size / blocks
        more_s = max(0.0, points[2].pass_s - several.pass_s) / size / blocks
    return Line(
        start=one.peak_bytes - per_sequence,
        per_sequence=per_sequence,
        saved_per_block=saved_bytes,
        pass_start_s=max(0.0, one.pass_s - pass_s),
        pass_s=pass_s,
        pass_s_per_block=more_s,
        update_s=one.update_s,
    )


def as_dict(choice: Choice) -> dict[str, Any]:
    """For --json and the report."""
    rows = [(each, True) for each in choice.offered] + [(each, False) for each in choice.refused]
    return {
        "best": None if choice.best is None else _row(choice.best, choice.share, fits=True),
        "alternatives": [_row(each, choice.share, fits=fits) for each, fits in rows],
        "least": None if choice.least is None else _row(choice.least, choice.share, fits=False),
    }


def _row(prediction: Prediction, share: int, *, fits: bool) -> dict[str, Any]:
    plan = prediction.plan
    return {
        "name": f"{plan.micro_batch} x {plan.passes(share)}",
        "keys": plan.keys(),
        "peak_bytes": prediction.peak_bytes,
        "phase": prediction.phase,
        "step_s": prediction.step_s(share),
        "fits": fits,
        "exact": True,
        "categories": prediction.categories,
    }
