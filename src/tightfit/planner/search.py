"""Which plan: the fastest of those that fit, found with few traces, each one offered only after it was traced itself.

At a given loss and checkpointing the peak grows in a straight line with the micro-batch (tests hold that it never
falls), and falls in a straight line with the blocks that are recomputed. Two or three traces of a loss give both lines;
the micro-batch that they promise is then traced, and made smaller if the trace says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tightfit.config import Resolved, TrainConfig
from tightfit.models.shape import parameter_count, state_bytes, vocabulary_of
from tightfit.planner.budget import Budget
from tightfit.planner.candidates import (
    ONE_PASS,
    Plan,
    Relief,
    balanced,
    checkpointing_levels,
    even,
    is_open,
    may_recompute,
)
from tightfit.planner.predict import Prediction, Predictor
from tightfit.units import format_bytes

SMALL_BATCH = 4
"""The larger of the two micro-batches that give a line; where fewer have room, a loss in chunks makes more."""
_ATTEMPTS = 4
_OFFERED = 3
"""Plans traced in full."""
_COMPILED_SAVES = {"bfloat16": 12, "float16": 12, "float32": 4}
"""Bytes of each logit that a compiled step with all of them does not take, by dtype: it makes no float32 copies."""


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
    relief: Relief | None = None
    """What the best plan, or the least one, changes besides the size of a pass."""
    lossy: "Choice | None" = None
    """Where nothing fits: the first change of those that were not allowed with which something does."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A plan read off the lines, not traced: never offered."""

    plan: Plan
    peak_bytes: int
    step_s: float | None
    """None: the peak is a bound from below, by the weights and what comes with them."""


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
        if each <= 0:
            return share if self.peak(share, blocks) <= budget else 0
        return max(0, min(share, int((budget - self.start) / each)))


def choose(
    resolved: Resolved[TrainConfig],
    predictor: Predictor,
    budget: Budget,
    share: int,
    *,
    reliefs: list[Relief],
    compiled: bool,
    on_host: bool,
    processes: int = 1,
    say: Callable[[str], object] = lambda text: None,
) -> Choice:
    """The choice with the first of `reliefs` that gives one; lossy ones count if the configuration allows them.

    `share` is what one of `processes` computes of the effective batch.
    """
    config, choice, request, least = resolved.config, None, None, None
    last_exact = [relief for relief in reliefs if relief.exact][-1]
    for relief in sorted(reliefs, key=lambda each: not each.exact and each.name not in config.allowed):
        if not relief.exact and relief.name not in config.allowed and not is_open(resolved, "micro_batch"):
            continue  # what would help first is a smaller micro-batch than the one that was asked for
        search = Search(
            resolved,
            predictor,
            budget,
            share,
            compiled=compiled,
            on_host=on_host,
            processes=processes,
            relief=relief,
            say=say,
        )
        if "activations" in relief.keys.get("offload", "") and not _moving_helps(config, least, budget):
            continue
        needs = least_bytes(config, relief)
        if needs > budget.bytes and relief is not last_exact:
            say(f"weights, gradients and moments alone take {format_bytes(needs)}: nothing is traced")
            request = request or Estimate(plan=search.requested(), peak_bytes=needs, step_s=None)
            continue
        if relief.name:
            say(f"nothing fits; trying {relief.name}")
        is_allowed = relief.exact or relief.name in config.allowed
        found = search.run()
        request, least = request or found.request, found.least
        found = replace(found, relief=relief, request=request)
        if found.best and is_allowed:
            return found
        if found.best:
            assert choice is not None, "the first is no lossy one"
            return replace(choice, lossy=found)
        if is_allowed:
            choice = found
    assert choice is not None, "the last exact one is always tried"
    return choice


def _moving_helps(config: TrainConfig, least: Prediction | None, budget: Budget) -> bool:
    """Whether what recomputed blocks keep, moved to the host, could make up for what the `least` plan lacks."""
    inputs = 4 * (config.micro_batch or 1) * config.block_size * config.n_embd * config.n_layer
    return least is None or least.peak_bytes - inputs <= budget.bytes


def least_bytes(config: TrainConfig, relief: Relief) -> int:
    """Bytes of the device's memory below which no step is possible: weights, gradients and both moments together."""
    return state_bytes(replace(config, **relief.keys)) * parameter_count(config)


def _as_asked(config: TrainConfig) -> dict[str, Any]:
    """The keys that a relief may change, as they are without one."""
    return {"offload": config.offload, "optimizer": config.optimizer, "param_dtype": config.param_dtype}


class Search:
    """One search, with one relief; `run` gives the choice."""

    def __init__(
        self,
        resolved: Resolved[TrainConfig],
        predictor: Predictor,
        budget: Budget,
        share: int,
        *,
        compiled: bool,
        on_host: bool,
        processes: int,
        relief: Relief,
        say: Callable[[str], object],
    ) -> None:
        config = resolved.config
        self._base = {**_as_asked(config), **relief.keys}
        self._predictor, self._budget, self._share, self._say = predictor, budget, share, say
        self._compiled, self._config = compiled, config
        self._micro_batch = 0 if is_open(resolved, "micro_batch") else min(config.micro_batch, share)
        self._eval_micro_batch = 0 if is_open(resolved, "eval_micro_batch") else config.eval_micro_batch
        self._losses = ["full", "chunked"] if is_open(resolved, "loss") else [config.loss]
        if (on_host or relief.name) and is_open(resolved, "loss"):
            self._losses = ["chunked"]  # on the host the faster one, too; elsewhere there was no room for the other
        is_free = may_recompute(resolved)
        self._levels = checkpointing_levels(config.n_layer) if is_free else [config.activation_checkpointing]
        moves_inputs = "activations" in self._base["offload"]
        self._one_pass, self._processes = relief is ONE_PASS, processes
        if is_free and (moves_inputs or self._one_pass):
            # A block that is not recomputed keeps what is not moved, and leaves room for fewer sequences.
            self._levels = [config.n_layer]
        # A compiled step is told how much it may keep: it recomputes what is cheap first, which whole blocks are not.
        self._by_budget = is_free and config.dropout == 0.0 and not moves_inputs
        self._may_not_compile = is_open(resolved, "compile")
        self._with_levels = False
        """Whether the lines say what recomputing saves."""
        self._traced: dict[Plan, Prediction] = {}

    def run(self) -> Choice:
        """The choice, after a handful of traces."""
        plain = self._lines()
        lines = (
            {loss: compiled_line(self._config, loss, line) for loss, line in plain.items()} if self._compiled else plain
        )
        request = self._request(lines)
        found = self._fitting(lines, plain)
        # Whether to compile was settled before: by the user, or because it is faster on this card.
        found.sort(key=lambda each: (each.plan.compile != self._compiled, each.step_s(self._share)))
        if found and (self._may_not_compile or found[0].plan.compile == self._compiled):
            return self._choice(found, request, line=lines[found[0].plan.loss])
        least = self._trace([self._plan(1, max(self._levels), self._losses[-1])])[0]
        if least.peak_bytes <= self._budget.bytes and not self._micro_batch:
            line = lines.get(least.plan.loss) or line_through([least, least])
            return self._choice([least], request, line=line)  # the lines had promised less
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
            share=found[0].plan.micro_batch if found and self._one_pass else self._share,
        )

    def _lines(self) -> dict[str, Line]:
        """Two or three traces for each loss, of plain kernels: compiling takes longer."""
        least, small = min(self._levels), min(SMALL_BATCH, self._share)
        self._predictor.expect_compiled(self._compiled)
        lines = self._traced_lines([(1, least), (small, least)], self._losses[:1])
        # A loss in chunks makes room for more sequences, which is of use where few have any; else it only takes longer.
        if self._most_sequences(lines) < small:
            lines |= self._traced_lines([(1, least), (small, least)], self._losses[1:])
        # Recomputing a block costs more than passes of fewer sequences: it is for where hardly one has room, or where
        # each pass adds up all gradients on the host.
        is_scarce = self._most_sequences(lines) < small or "optimizer" in self._base["offload"]
        if len(self._levels) > 1 and is_scarce:
            lines = self._traced_lines([(1, least), (small, least), (small, max(self._levels))], self._losses)
            self._with_levels = True
        return lines

    def _most_sequences(self, lines: dict[str, Line]) -> int:
        """The largest micro-batch that any of these plain lines lets in, with nothing recomputed."""
        own = [compiled_line(self._config, loss, line) if self._compiled else line for loss, line in lines.items()]
        return max(line.largest(self._budget.bytes, 0, self._share) for line in own)

    def _traced_lines(self, points: list[tuple[int, int]], losses: list[str]) -> dict[str, Line]:
        if not losses:
            return {}
        plans = {loss: [self._plan(size, blocks, loss, compiled=False) for size, blocks in points] for loss in losses}
        every = [plan for each in plans.values() for plan in each]
        self._say(f"tracing {len(every)} steps to see how memory grows")
        found = dict(zip(every, self._predictor.predict(every, whole=False), strict=True))
        return {loss: line_through([found[plan] for plan in each]) for loss, each in plans.items()}

    def _fitting(self, lines: dict[str, Line], plain: dict[str, Line]) -> list[Prediction]:
        """Plans traced in full that fit, out of those that the lines say are fastest."""
        wanted = self._promising(lines, compiled=self._compiled)[:_OFFERED]
        if (
            self._compiled
        ):  # compiling takes longer than tracing: the best one, and, if it is ours to choose, two without
            wanted = [*wanted[:1], *(self._promising(plain, compiled=False)[:2] if self._may_not_compile else [])]
        if not wanted:
            return []
        self._say(f"tracing the {len(wanted)} most promising plans in full")
        return self._trace_until_fits(wanted, lines)

    def _promising(self, lines: dict[str, Line], *, compiled: bool) -> list[Plan]:
        """The largest micro-batch at each loss and each number of recomputed blocks, the fastest plan first."""
        found = []
        for loss, line in lines.items():
            for blocks in self._levels if self._with_levels else [min(self._levels)]:
                if largest := self._largest(line, blocks):
                    size = self._micro_batch or self._split(largest)
                    found.append((line.step_s(size, blocks, self._share), loss, blocks, size))
        return [self._plan(size, blocks, loss, compiled=compiled) for _, loss, blocks, size in sorted(found)]

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
        return self._sized(plan, size)

    def _split(self, largest: int) -> int:
        """The micro-batch to use where `largest` sequences have room."""
        if self._one_pass:
            return largest
        return even(largest, self._share) if self._compiled else balanced(largest, self._share)

    def _largest(self, line: Line, blocks: int) -> int:
        """The largest micro-batch that a line lets in, or the one that is asked for; 0 where that has no room."""
        largest = line.largest(self._budget.bytes, blocks, self._share)
        if self._micro_batch:
            return self._micro_batch if largest >= self._micro_batch else 0
        return largest

    def _trace(self, plans: list[Plan]) -> list[Prediction]:
        found = self._predictor.predict(plans)
        self._traced.update(zip(plans, found, strict=True))
        return found

    def _plan(self, size: int, blocks: int, loss: str, *, compiled: bool | None = None) -> Plan:
        """`blocks` of them are recomputed, or, of a compiled step, the share of all that they are."""
        compiled = self._compiled if compiled is None else compiled
        kept = self._config.activation_memory_budget if compiled else 1.0
        if compiled and self._by_budget:
            blocks, kept = 0, 1 - blocks / self._config.n_layer
        plan = Plan(
            micro_batch=size,
            eval_micro_batch=size,
            loss=loss,
            activation_checkpointing=blocks,
            compile=compiled,
            activation_memory_budget=round(kept, 3),
            **self._base,
        )
        return self._sized(plan, size)

    def _sized(self, plan: Plan, size: int) -> Plan:
        """The plan with passes of `size` sequences."""
        return replace(
            plan,
            micro_batch=size,
            eval_micro_batch=self._eval_micro_batch or size,
            effective_batch=min(size * self._processes, self._config.effective_batch) if self._one_pass else 0,
        )

    def _request(self, lines: dict[str, Line]) -> Estimate:
        """nanoGPT's literal reading: `batch_size` sequences at once, all logits, nothing recomputed."""
        plan = self.requested()
        line, size, blocks = lines[plan.loss], plan.micro_batch, plan.activation_checkpointing
        return Estimate(
            plan=plan, peak_bytes=round(line.peak(size, blocks)), step_s=line.step_s(size, blocks, self._share)
        )

    def requested(self) -> Plan:
        """The plan of that reading."""
        size = self._micro_batch or min(self._config.batch_size, self._share)
        return self._plan(size, 0 if len(self._levels) > 1 else self._levels[0], self._losses[0])


def line_through(points: list[Prediction]) -> Line:
    """Lines through few sequences, several of them, and, where it was traced, those with blocks recomputed."""
    few, several = points[:2]
    size, more = several.plan.micro_batch, several.plan.micro_batch - few.plan.micro_batch
    per_sequence, pass_s = 0.0, few.pass_s / few.plan.micro_batch
    if more:
        per_sequence = (several.peak_bytes - few.peak_bytes) / more
        pass_s = (several.pass_s - few.pass_s) / more
    saved_bytes = more_s = 0.0
    if len(points) > 2 and (blocks := points[2].plan.activation_checkpointing - few.plan.activation_checkpointing):
        saved_bytes = (several.peak_bytes - points[2].peak_bytes) / size / blocks
        more_s = max(0.0, points[2].pass_s - several.pass_s) / size / blocks
    return Line(
        start=few.peak_bytes - few.plan.micro_batch * per_sequence,
        per_sequence=per_sequence,
        saved_per_block=saved_bytes,
        pass_start_s=max(0.0, few.pass_s - few.plan.micro_batch * pass_s),
        pass_s=pass_s,
        pass_s_per_block=more_s,
        update_s=few.update_s,
    )


def compiled_line(config: TrainConfig, loss: str, plain: Line) -> Line:
    """What a line of plain kernels says of the memory of compiled ones; each promise is traced before it is made."""
    if loss != "full":
        return plain
    saved = _COMPILED_SAVES.get(config.dtype, max(_COMPILED_SAVES.values()))
    saved_bytes = saved * config.block_size * vocabulary_of(config)
    return replace(plain, per_sequence=max(plain.per_sequence / 4, plain.per_sequence - saved_bytes))


def as_dict(choice: Choice) -> dict[str, Any]:
    """For --json and the report."""
    rows = [(each, True) for each in choice.offered] + [(each, False) for each in choice.refused]
    return {
        "best": None if choice.best is None else _row(choice.best, choice.share, fits=True),
        "alternatives": [_row(each, choice.share, fits=fits) for each, fits in rows],
        "least": None if choice.least is None else _row(choice.least, choice.share, fits=False),
        "lossy": None
        if choice.lossy is None or choice.lossy.best is None or choice.lossy.relief is None
        else {
            "allow": choice.lossy.relief.name,
            "costs": choice.lossy.relief.costs,
            **_row(choice.lossy.best, choice.lossy.share, fits=True),
        },
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
        "exact": plan.is_exact,
        "categories": prediction.categories,
    }
