"""Choose smaller settings when memory is short and larger ones later; none needs the run to be rebuilt."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol

from tightfit.units import MIB

PATIENCE = 20
"""Steps without trouble before settings grow; twice as many after each attempt that failed."""
MARGIN_BYTES = 256 * MIB
"""Free memory below which others' growth is acted upon: about what cuBLAS, a kernel's load and a page cache take."""
Phase = Literal[
    "setup", "resume", "eval", "forward", "loss", "backward", "optimizer", "compile", "log", "save", "sample"
]
"""Part of a run in which an error can happen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that decide how the effective batch is run; they change the result only by rounding."""

    micro_batch: int
    """Sequences per forward pass on one device."""
    eval_micro_batch: int
    """The same for evaluations."""
    loss: str
    """A value of the key `loss`: full, chunked, liger or auto."""
    checkpointed_blocks: int
    """Blocks, from the first, that are recomputed in backward."""

    def needs_as_much_as(self, other: "Settings") -> bool:
        """Return True if no part of these settings takes less memory than the same part of `other`.

        >>> small = Settings(micro_batch=1, eval_micro_batch=8, loss="auto", checkpointed_blocks=0)
        >>> replace(small, micro_batch=4).needs_as_much_as(small), small.needs_as_much_as(replace(small, loss="full"))
        (True, False)
        """
        return (
            self.micro_batch >= other.micro_batch
            and self.eval_micro_batch >= other.eval_micro_batch
            and _LOSS_ORDER.get(self.loss, 0) >= _LOSS_ORDER.get(other.loss, 0)
            and self.checkpointed_blocks <= other.checkpointed_blocks
        )

    def changes_to(self, other: "Settings") -> str:
        """Print the fields that differ, as "micro_batch 8 -> 4"."""
        pairs = [(each.name, getattr(self, each.name), getattr(other, each.name)) for each in fields(self)]
        return ", ".join(f"{name} {mine} -> {its}" for name, mine, its in pairs if mine != its)

    def __str__(self) -> str:
        return ", ".join(f"{each.name}={getattr(self, each.name)}" for each in fields(self))


_LOSS_ORDER = {"liger": 0, "chunked": 0, "auto": 1, "full": 2}
"""Order by the bytes of logits that are held; auto holds them only while they are small."""


class Adjustable(Protocol):
    """A run with settings that can change between two passes."""

    @property
    def settings(self) -> Settings:
        """Return the settings of the next pass."""

    def use_settings(self, settings: Settings) -> None:
        """Run every pass from the next one on with `settings`."""


class Fallback(Protocol):
    """Decides the next settings of a run when its own fail, and when they have not failed for a while."""

    @property
    def is_tight(self) -> bool:
        """Return True if the run is known to need nearly all of the memory."""

    @property
    def predicted_peak_bytes(self) -> int | None:
        """Return the predicted peak of the wanted settings, counted as in `metrics.jsonl`; None without a plan."""

    def smaller(self, now: Settings, phase: Phase, free_bytes: int | None) -> Settings | None:
        """Return settings that need less in `phase` than `now`, which just failed there; None if there are none."""

    def larger(self, now: Settings, failed: frozenset[Settings]) -> Settings | None:
        """Return settings one step nearer to the wanted ones that need less than those that failed; None if none do."""


@dataclass(frozen=True)
class Halving:
    """Halves the micro-batch until it fits; then chunks the loss; then recomputes a quarter, half, all blocks."""

    n_layer: int
    share: int
    """Sequences of a step that this process runs."""
    wanted: Settings
    is_tight: bool = False
    predicted_peak_bytes: int | None = None

    def smaller(self, now: Settings, phase: Phase, free_bytes: int | None) -> Settings | None:
        """Return the next smaller settings; `free_bytes` is unused: without a plan the needs of others are unknown."""
        if phase in ("eval", "sample"):
            if now.eval_micro_batch > 1:
                return replace(now, eval_micro_batch=now.eval_micro_batch // 2)
            return None if _LOSS_ORDER.get(now.loss, 0) == 0 else replace(now, loss="chunked")
        if (micro_batch := min(now.micro_batch, self.share)) > 1:
            return replace(now, micro_batch=micro_batch // 2)
        if _LOSS_ORDER.get(now.loss, 0) > 0:
            return replace(now, loss="chunked")
        more = next((blocks for blocks in self._levels() if blocks > now.checkpointed_blocks), None)
        return None if more is None else replace(now, checkpointed_blocks=more)

    def larger(self, now: Settings, failed: frozenset[Settings]) -> Settings | None:
        """Go back one step of `smaller`; a part that cannot grow does not keep another from growing."""
        candidates = (each for each in self._steps_back(now) if each != now)
        return next((each for each in candidates if not any(each.needs_as_much_as(one) for one in failed)), None)

    def _steps_back(self, now: Settings) -> Iterator[Settings]:
        wanted = self.wanted
        fewer = [blocks for blocks in (0, *self._levels()) if wanted.checkpointed_blocks <= blocks]
        fewer = [blocks for blocks in (wanted.checkpointed_blocks, *fewer) if blocks < now.checkpointed_blocks]
        if fewer:
            yield replace(now, checkpointed_blocks=max(fewer))
        yield replace(now, loss=wanted.loss)
        yield replace(now, micro_batch=max(now.micro_batch, min(2 * now.micro_batch, wanted.micro_batch)))
        doubled = min(2 * now.eval_micro_batch, wanted.eval_micro_batch)
        yield replace(now, eval_micro_batch=max(now.eval_micro_batch, doubled))

    def _levels(self) -> list[int]:
        return sorted({-(-self.n_layer // 4), -(-self.n_layer // 2), self.n_layer})


def least_that_failed(now: Settings, phase: Phase) -> Settings:
    """Return the least settings known to fail after `now` failed in `phase`.

    A failed evaluation does not count against the micro-batch of training, nor the other way round.
    """
    return replace(now, micro_batch=1) if phase in ("eval", "sample") else replace(now, eval_micro_batch=1)


@dataclass
class Growth:
    """Settings that failed, steps without trouble since then, and the room that others leave."""

    patience: int = field(default_factory=lambda: PATIENCE)
    """Steps without trouble that the next growth needs."""
    room_bytes: int = 0
    """Largest sum so far of free bytes and those of this process."""
    has_grown: bool = False
    """True after the settings grew, until the next error."""
    _failed: dict[Settings, int | None] = field(default_factory=dict)
    """Settings that failed, with the memory that was free after they were given up."""
    _clean_steps: int = 0

    def failed(self, settings: Settings, phase: Phase, free: int | None) -> None:
        """Remember settings that failed in `phase`, with the bytes that were free afterwards."""
        self._failed[least_that_failed(settings, phase)] = free
        self._clean_steps = 0

    def after_error(self) -> None:
        """Count steps from zero again; if the settings had just grown, be twice as patient."""
        if self.has_grown:
            self.patience *= 2
        self._clean_steps, self.has_grown = 0, False

    def is_due(self) -> bool:
        """Count a step without trouble; return True if settings failed before and enough steps have passed."""
        if not self._failed:
            return False
        self._clean_steps += 1
        if self._clean_steps < self.patience:
            return False
        self._clean_steps, self.has_grown = 0, False
        return True

    def too_large(self, free: int | None) -> frozenset[Settings]:
        """Return the settings that failed, without those that had less than half of the memory free now."""
        return frozenset(one for one, then in self._failed.items() if not free or not then or free < 2 * then)

    def is_pressed(self, free: int, whole: int) -> bool:
        """Return True if others took memory so that less than the margin is free; `whole` adds this process's own."""
        self.room_bytes = max(whole, self.room_bytes)
        return free < MARGIN_BYTES and whole < self.room_bytes - MARGIN_BYTES
