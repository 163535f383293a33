"""Lines of memory and time against the micro-batch, drawn through a few traces.

At a given loss the peak grows in a straight line with the micro-batch (tests hold that it never falls), and falls in a
straight line with the recomputed blocks. A line promises; only a trace is offered.
"""

from dataclasses import dataclass, replace

from tightfit.config import TrainConfig
from tightfit.models.shape import vocabulary_of
from tightfit.planner.candidates import Plan
from tightfit.planner.predict import Prediction

_COMPILED_SAVES = {"bfloat16": 12, "float16": 12, "float32": 4}
"""Bytes per logit that a compiled step saves, by dtype: it makes no float32 copies."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Plan read off the lines, not traced: never offered."""

    plan: Plan
    peak_bytes: int
    step_s: float | None
    """None: the peak is only a lower bound, from weights, gradients and moments."""


@dataclass(frozen=True)
class Line:
    """Peak bytes and seconds at any micro-batch and number of recomputed blocks."""

    start: float
    per_sequence: float
    saved_per_block: float
    pass_start_s: float
    pass_s: float
    pass_s_per_block: float
    update_s: float

    def peak(self, micro_batch: int, blocks: int) -> float:
        """Return the peak in bytes."""
        return self.start + micro_batch * (self.per_sequence - blocks * self.saved_per_block)

    def step_s(self, micro_batch: int, blocks: int, share: int) -> float:
        """Return the seconds of a step over `share` sequences."""
        passes = -(-share // micro_batch)
        return passes * self.pass_start_s + share * (self.pass_s + blocks * self.pass_s_per_block) + self.update_s

    def largest(self, budget: int, blocks: int, share: int) -> int:
        """Return the largest micro-batch within `budget` bytes; 0 if not even one sequence fits."""
        each = self.per_sequence - blocks * self.saved_per_block
        if each <= 0:
            return share if self.peak(share, blocks) <= budget else 0
        return max(0, min(share, int((budget - self.start) / each)))


def line_through(points: list[Prediction]) -> Line:
    """Draw a line through traces of few and of several sequences, and of several with blocks recomputed if given."""
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
        # what an update waits for other cards depends on the backward pass that hides it
        update_s=several.update_s if several.waiting_s else few.update_s,
    )


def shifted(line: Line, point: Prediction) -> Line:
    """Move a line so that it goes through a trace of the same step in another sharding, with the same slopes.

    A card computes the same at any sharding. Weights, gradients and waiting depend on no sequence.
    """
    size, blocks = point.plan.micro_batch, point.plan.activation_checkpointing
    return replace(
        line,
        start=line.start + point.peak_bytes - line.peak(size, blocks),
        pass_start_s=max(0.0, point.pass_s - size * (line.pass_s + blocks * line.pass_s_per_block)),
        update_s=point.update_s,
    )


def compiled_line(config: TrainConfig, loss: str, plain: Line) -> Line:
    """Estimate the line of compiled steps from one of uncompiled steps."""
    if loss != "full":
        return plain
    saved = _COMPILED_SAVES.get(config.dtype, max(_COMPILED_SAVES.values()))
    saved_bytes = saved * config.block_size * vocabulary_of(config)
    return replace(plain, per_sequence=max(plain.per_sequence / 4, plain.per_sequence - saved_bytes))
