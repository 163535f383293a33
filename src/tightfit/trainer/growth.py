"""Decide when settings grow back after an error, and when other processes' memory makes them shrink before one."""

from dataclasses import dataclass, field

from tightfit.trainer.fallback import Phase, Settings, least_that_failed
from tightfit.units import MIB

PATIENCE = 20
"""Steps without trouble before settings grow; twice as many after each attempt that failed."""
MARGIN_BYTES = 256 * MIB
"""Free memory below which others' growth is acted upon: about what cuBLAS, a kernel's load and a page cache take."""


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
