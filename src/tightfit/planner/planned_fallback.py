"""Fallback of a planned run when memory is short after all: the same plan with measured free memory."""

from dataclasses import dataclass, replace

from tightfit.planner.budget import Budget
from tightfit.planner.search import Choice
from tightfit.trainer.fallback import Halving, Phase, Settings

_KEPT_FREE = 0.03
"""Share of free memory that a smaller plan leaves unused."""
_FRAGMENTED = 1.25
"""Ratio of a process's memory to its tensors if it keeps freed memory: 1.14 for GPT-2 124M (trainer.resident)."""
_STAYS = ("parameters", "optimizer state", "other")


@dataclass(frozen=True)
class PlannedFallback:
    """Falls back to the largest micro-batch that fits in free memory; if none does, to halving."""

    halving: Halving
    planned: Settings
    per_step_bytes: float
    """Bytes of a step besides its sequences: gradients, cast copies, workspaces."""
    per_sequence_bytes: float
    is_tight: bool
    """True if the plan takes nearly all memory."""
    predicted_peak_bytes: int | None
    """On the host, includes the process's memory besides its tensors."""

    @classmethod
    def of(cls, choice: Choice, n_layer: int, budget: Budget, *, on_host: bool) -> "PlannedFallback":
        """Return the fallback of a choice: its line, with the slope through the plan's own trace."""
        best, line = choice.best, choice.line
        assert best is not None, "something fits"
        assert line is not None, "and was found along a line"
        plan = best.plan
        settings = Settings(
            micro_batch=plan.micro_batch,
            eval_micro_batch=plan.eval_micro_batch,
            loss=plan.loss,
            checkpointed_blocks=plan.activation_checkpointing,
        )
        stays = sum(best.categories.get(name, 0) for name in _STAYS)
        return cls(
            halving=Halving(n_layer, choice.share, settings),
            planned=settings,
            per_step_bytes=max(0.0, line.start - stays),
            per_sequence_bytes=max(1.0, (best.peak_bytes - line.start) / plan.micro_batch),
            is_tight=best.peak_bytes * _FRAGMENTED > budget.bytes,
            predicted_peak_bytes=best.peak_bytes + (budget.context_bytes if on_host else 0),
        )

    def smaller(self, now: Settings, phase: Phase, free_bytes: int | None) -> Settings | None:
        """Return smaller settings; `free_bytes` is the free memory after the failed step's release."""
        as_planned = (now.loss, now.checkpointed_blocks) == (self.planned.loss, self.planned.checkpointed_blocks)
        if phase not in ("eval", "sample") and free_bytes and as_planned:
            room = free_bytes * (1 - _KEPT_FREE) - self.per_step_bytes
            size = int(room / self.per_sequence_bytes)
            if 1 <= size < now.micro_batch:
                return replace(now, micro_batch=size, eval_micro_batch=min(size, now.eval_micro_batch))
        return self.halving.smaller(now, phase, free_bytes)

    def larger(self, now: Settings, failed: frozenset[Settings]) -> Settings | None:
        """Return the plan at once, which was traced, unless settings that need no more memory failed."""
        if now != self.planned and not any(self.planned.needs_as_much_as(one) for one in failed):
            return self.planned
        return self.halving.larger(now, failed)
