"""Search for the fastest plan that fits, with few traces; each plan is traced itself before it is offered.

Two or three traces of a loss give its lines. The micro-batch that they promise is traced, and made smaller if the trace
disagrees.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tightfit.config import Resolved, TrainConfig, batch_split
from tightfit.links import Cards
from tightfit.models.shape import parameter_count, state_bytes
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
    with_values,
)
from tightfit.planner.layers import may_extend
from tightfit.planner.lines import Estimate, Line, compiled_line, line_through, shifted
from tightfit.planner.predict import Prediction, Predictor
from tightfit.wording import say

SMALL_BATCH = 4
"""Larger of the two micro-batches that give a line; where fewer fit, a chunked loss makes room for more."""
_ATTEMPTS = 4
_OFFERED = 3
"""Most plans traced in full."""


SINGLE = Cards()
GATHERED_BYTES = 2
"""Bytes of a gathered weight, in autocast's format."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Outcome of a search."""

    best: Prediction | None
    """Fastest plan that fits, or None."""
    offered: list[Prediction]
    """Traced plans that fit, the fastest first."""
    refused: list[Prediction] = field(default_factory=list)
    """Traced plans that do not fit."""
    least: Prediction | None = None
    """Plan with the lowest peak, if none fits."""
    request: Estimate | None = None
    """The requested run, read off the lines."""
    line: Line | None = None
    """Growth of the best plan's memory."""
    share: int = 1
    """Sequences of a step on this device."""
    relief: Relief | None = None
    """Change that the best plan, or the least one, makes besides the size of a pass."""
    lossy: "Choice | None" = None
    """If nothing fits: the choice with the first lossy change that was not allowed and would fit."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Run to plan, with its device."""

    resolved: Resolved[TrainConfig]
    predictor: Predictor
    budget: Budget
    share: int
    """Sequences of a step that one of `processes` computes."""
    compiled: bool
    """Compiling is faster on this device, or the user asked for it."""
    on_host: bool
    processes: int = 1
    cards: Cards = SINGLE
    """Cards that train together."""
    log: Callable[[str], object] = lambda text: None


def choose(task: Task, reliefs: list[Relief], started: "Search | None" = None) -> Choice:
    """Return the choice with the first of `reliefs` that fits; lossy ones count if the configuration allows them.

    `started` is the search without any relief, where it has begun.
    """
    config, choice, request, least = task.resolved.config, None, None, None
    last_exact = [relief for relief in reliefs if relief.exact][-1]
    for relief in sorted(reliefs, key=lambda each: not _is_allowed(each, config)):
        if not _may_help(relief, task, least):
            continue
        search = started if started and not relief.name else Search(task, relief)
        needs = least_bytes(config, relief, cards=task.cards)
        if needs > task.budget.bytes and relief is not last_exact:
            task.log(say("planner.search.state", needs=needs))
            request = request or Estimate(plan=search.requested(), peak_bytes=needs, step_s=None)
            continue
        if relief.name:
            task.log(say("planner.search.trying", name=relief.name))
        found = search.run()
        request, least = request or found.request, found.least
        found = replace(found, relief=relief, request=request)
        if _is_allowed(relief, config):
            choice = found
        if found.best:
            assert choice is not None, "the first is no lossy one"
            return replace(choice, lossy=None if choice is found else found)
    assert choice is not None, "the last exact one is always tried"
    return choice


def _is_allowed(relief: Relief, config: TrainConfig) -> bool:
    return relief.exact or relief.name in config.allowed


def _may_help(relief: Relief, task: Task, least: Prediction | None) -> bool:
    """Return True unless a smaller micro-batch would help first, or moving inputs could not make `least` fit."""
    config = task.resolved.config
    if not _is_allowed(relief, config) and not is_open(task.resolved, "micro_batch"):
        return False
    if "activations" not in relief.offloads or least is None:
        return True
    inputs = 4 * (config.micro_batch or 1) * config.block_size * config.n_embd * config.n_layer
    return least.peak_bytes - inputs <= task.budget.bytes


def least_bytes(config: TrainConfig, relief: Relief, *, cards: Cards = SINGLE) -> int:
    """Return the device memory that any step needs: weights, gradients and both moments, or a card's part of them.

    With shard=optimizer also the gathered weights, at least in autocast's format.
    """
    whole = state_bytes(with_values(config, relief.keys)) * parameter_count(config)
    gathered = GATHERED_BYTES * parameter_count(config) if config.shard == "optimizer" and cards.count > 1 else 0
    return whole // cards.parts(config.shard, config.shard_size) + gathered


class Search:
    """Search with one relief; `run` returns the choice."""

    def __init__(self, task: Task, relief: Relief, like: "Search | None" = None) -> None:
        """Begin a search; `like` is one of another sharding of the same step, with its lines drawn."""
        resolved, config, share = task.resolved, task.resolved.config, task.share
        self._base = with_values(config, relief.keys)
        """Configuration with the relief's keys."""
        self._block_size = self._base.block_size if "block_size" in relief.keys else 0
        self._predictor, self._budget, self._share, self._log = task.predictor, task.budget, share, task.log
        self._compiled, self._config = task.compiled, config
        self._is_deep = task.cards.count > 1 and may_extend(config)
        """Played long enough that only the plan that promises most is played in full."""
        self._micro_batch = 0 if is_open(resolved, "micro_batch") else batch_split(config, share=share).micro_batch
        self._eval_micro_batch = 0 if is_open(resolved, "eval_micro_batch") else config.eval_micro_batch
        self._losses = ["full", "chunked"] if is_open(resolved, "loss") else [config.loss]
        if (task.on_host or relief.name) and is_open(resolved, "loss"):
            self._losses = ["chunked"]  # on the host the faster one, too; elsewhere there was no room for the other
        is_free = may_recompute(resolved)
        self._levels = checkpointing_levels(config.n_layer) if is_free else [config.activation_checkpointing]
        self._like = like
        if self._is_deep:
            if is_free:
                halves = 2 if config.n_layer % 2 == 0 else 1  # parts that fewer blocks can stand for
                self._levels = [config.n_layer * part // halves for part in range(halves + 1)]
            if is_open(resolved, "loss"):
                self._losses = ["chunked"]  # all logits would save about 1% of a step's time
        moves_inputs = self._base.offloads("activations")
        self._one_pass, self._processes = relief is ONE_PASS, task.processes
        if is_free and (moves_inputs or self._one_pass):
            # A block that is not recomputed keeps its activations on the device: fewer sequences fit.
            self._levels = [config.n_layer]
        # A compiled step gets a share to keep: it recomputes cheap operators first, not whole blocks.
        self._by_budget = is_free and config.dropout == 0.0 and not moves_inputs
        self._may_not_compile = is_open(resolved, "compile")
        self._with_levels = False
        """The lines know what recomputing saves."""
        self._traced: dict[Plan, Prediction] = {}
        self._drawn: tuple[dict[str, Line], dict[str, Line]] | None = None

    def promise(self) -> Estimate | None:
        """Return the plan that the lines promise to be fastest; None where they promise that none fits."""
        lines = self._all_lines()[1]
        found = self._promising(lines, compiled=self._compiled)
        if not found:
            return None
        plan, line = found[0], lines[found[0].loss]
        blocks = plan.activation_checkpointing or round((1 - plan.activation_memory_budget) * self._config.n_layer)
        return self._estimate(plan, line, blocks)

    def _all_lines(self) -> tuple[dict[str, Line], dict[str, Line]]:
        """Return the lines of uncompiled steps, and those of steps as they would run."""
        if self._drawn is None:
            plain = self._lines()
            losses = {loss: compiled_line(self._config, loss, line) for loss, line in plain.items()}
            self._drawn = plain, losses if self._compiled else plain
        return self._drawn

    def run(self) -> Choice:
        """Return the choice, after a handful of traces."""
        plain, lines = self._all_lines()
        request = self._request(lines)
        found = self._fitting(lines, plain)
        # Compiling or not was decided before: by the user, or because it is faster on this card.
        found.sort(key=lambda each: (each.plan.compile != self._compiled, each.step_s(self._share)))
        if found and (self._may_not_compile or found[0].plan.compile == self._compiled):
            return self._choice(found, request, line=lines[found[0].plan.loss])
        least = self._trace([self._plan(1, max(self._levels), self._losses[-1])])[0]
        if least.peak_bytes <= self._budget.bytes and not self._micro_batch:
            line = lines.get(least.plan.loss) or line_through([least, least])
            return self._choice([least], request, line=line)  # it fits after all
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
        """Trace two or three steps of each loss, uncompiled: compiling takes longer."""
        least, small = min(self._levels), min(SMALL_BATCH, self._share)
        self._predictor.expect_compiled(self._compiled)
        if self._is_deep:
            return self._deep_lines(small)
        lines = self._traced_lines([(1, least), (small, least)], self._losses[:1])
        # A chunked loss makes room for more sequences, which helps where few fit; else it only takes longer.
        if self._most_sequences(lines) < small:
            lines |= self._traced_lines([(1, least), (small, least)], self._losses[1:])
        # Recomputing costs more than passes of fewer sequences: it helps where hardly one fits, or where each pass adds
        # up all gradients on the host.
        is_scarce = self._most_sequences(lines) < small or self._base.offloads("optimizer")
        if len(self._levels) > 1 and is_scarce:
            lines = self._traced_lines([(1, least), (small, least), (small, max(self._levels))], self._losses)
            self._with_levels = True
        return lines

    def _deep_lines(self, small: int) -> dict[str, Line]:
        """Draw a line with few plays: only one where another sharding's lines give the slopes."""
        least, most, loss = min(self._levels), max(self._levels), self._losses[0]
        self._with_levels = most > least
        if self._like is not None and self._like._drawn is not None and loss in (drawn := self._like._drawn[0]):
            self._log(say("planner.search.growth", steps=1))
            (point,) = self._predictor.predict([self._plan(small, least, loss, compiled=False)], whole=False)
            return {loss: shifted(drawn[loss], point)}
        points = dict.fromkeys([(1, least), (small, least), (small, most)])
        return self._traced_lines([*points, *([(1, least)] if len(points) < 2 else [])], [loss])

    def _most_sequences(self, lines: dict[str, Line]) -> int:
        """Return the largest micro-batch that any of these uncompiled lines allows, with nothing recomputed."""
        own = [compiled_line(self._config, loss, line) if self._compiled else line for loss, line in lines.items()]
        return max(line.largest(self._budget.bytes, 0, self._share) for line in own)

    def _traced_lines(self, points: list[tuple[int, int]], losses: list[str]) -> dict[str, Line]:
        if not losses:
            return {}
        plans = {loss: [self._plan(size, blocks, loss, compiled=False) for size, blocks in points] for loss in losses}
        every = [plan for each in plans.values() for plan in each]
        self._log(say("planner.search.growth", steps=len(every)))
        found = dict(zip(every, self._predictor.predict(every, whole=False), strict=True))
        return {loss: line_through([found[plan] for plan in each]) for loss, each in plans.items()}

    def _fitting(self, lines: dict[str, Line], plain: dict[str, Line]) -> list[Prediction]:
        """Trace the plans in full that the lines promise to be fastest; return those that fit."""
        wanted = self._promising(lines, compiled=self._compiled)[:_OFFERED]
        if (
            self._compiled
        ):  # compiling takes longer than tracing: only the best; two without, where that is ours to choose
            wanted = wanted[:1]
            if self._may_not_compile and not self._is_deep:
                wanted += self._promising(plain, compiled=False)[:2]
        if not wanted:
            return []
        self._log(say("planner.search.full", plans=len(wanted)))
        return self._trace_until_fits(wanted, lines)

    def _promising(self, lines: dict[str, Line], *, compiled: bool) -> list[Plan]:
        """List plans of the largest micro-batch at each loss and number of recomputed blocks, the fastest first."""
        found = []
        for loss, line in lines.items():
            for blocks in self._levels if self._with_levels else [min(self._levels)]:
                if largest := self._largest(line, blocks):
                    size = self._micro_batch or self._split(largest)
                    found.append((line.step_s(size, blocks, self._share), loss, blocks, size))
        return [self._plan(size, blocks, loss, compiled=compiled) for _, loss, blocks, size in sorted(found)]

    def _trace_until_fits(self, plans: list[Plan], lines: dict[str, Line]) -> list[Prediction]:
        """Return the predictions of `plans` that fit; where the first does not, try smaller ones."""
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
        """Return the plan with as many sequences as would have fitted by its trace."""
        plan = prediction.plan
        if plan.micro_batch == 1 or self._micro_batch:
            return None
        per_sequence = max(1.0, (prediction.peak_bytes - line.start) / plan.micro_batch)
        size = int((self._budget.bytes - line.start) / per_sequence)
        size = self._split(max(1, min(plan.micro_batch - 1, size)))
        return self._sized(plan, size)

    def _split(self, largest: int) -> int:
        """Return the micro-batch to use where `largest` sequences fit."""
        if self._one_pass:
            return largest
        return even(largest, self._share) if self._compiled else balanced(largest, self._share)

    def _largest(self, line: Line, blocks: int) -> int:
        """Return the largest micro-batch that a line allows, or the requested one; 0 where that does not fit."""
        largest = line.largest(self._budget.bytes, blocks, self._share)
        if self._micro_batch:
            return self._micro_batch if largest >= self._micro_batch else 0
        return largest

    def _trace(self, plans: list[Plan]) -> list[Prediction]:
        found = self._predictor.predict(plans)
        self._traced.update(zip(plans, found, strict=True))
        return found

    def _plan(self, size: int, blocks: int, loss: str, *, compiled: bool | None = None) -> Plan:
        """Return a plan that recomputes `blocks`, or, compiled, the share of all blocks that they are."""
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
            offload=self._base.offload,
            optimizer=self._base.optimizer,
            param_dtype=self._base.param_dtype,
            block_size=self._block_size,
            shard=self._base.shard,
        )
        return self._sized(plan, size)

    def _sized(self, plan: Plan, size: int) -> Plan:
        """Return the plan with passes of `size` sequences."""
        return replace(
            plan,
            micro_batch=size,
            eval_micro_batch=self._eval_micro_batch or size,
            effective_batch=min(size * self._processes, self._config.effective_batch) if self._one_pass else 0,
        )

    def _request(self, lines: dict[str, Line]) -> Estimate:
        """Estimate nanoGPT's literal reading: `batch_size` sequences at once, all logits, nothing recomputed."""
        plan = self.requested()
        return self._estimate(plan, lines[plan.loss], plan.activation_checkpointing)

    def _estimate(self, plan: Plan, line: Line, blocks: int) -> Estimate:
        """Read a plan off a line, with `blocks` recomputed."""
        size = plan.micro_batch
        return Estimate(
            plan=plan, peak_bytes=round(line.peak(size, blocks)), step_s=line.step_s(size, blocks, self._share)
        )

    def requested(self) -> Plan:
        """Return the plan of that reading."""
        size = batch_split(self._config, share=self._share).micro_batch
        return self._plan(size, 0 if len(self._levels) > 1 else self._levels[0], self._losses[0])
