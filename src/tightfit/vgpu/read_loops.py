"""The training loops that were read, and what iterations of them were passed over for."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import CodeType

from tightfit.vgpu.frames import Frame
from tightfit.vgpu.inlined_loop import InlinedLoop

MOST_CHANGES = 32
"""Iterations of a loop that are played because a size may change in them."""
CHANGES_OF_A_START = 8
"""The same for a loop that ends before any iteration is passed over: a few starts are enough."""
CHANGES_IN_TURN = 12
"""Changes after which only the largest and the smallest sizes are played."""
_MOST_RUNS = 64
"""Runs of one loop in which changes are looked for once more."""

Tried = tuple[CodeType, int, frozenset[int]]
"""A loop by its first line, and lines that iterations of it were passed over for."""


@dataclass
class ReadLoops:
    """Loops of running functions that were read in this way, each by its function and first line."""

    loops: dict[tuple[CodeType, int], InlinedLoop] = field(default_factory=dict)
    unread: set[tuple[CodeType, int]] = field(default_factory=set)
    """Loops to read at their next iteration."""
    asked_for_largest: set[tuple[CodeType, int]] = field(default_factory=set)
    """Loops that went on to their largest item before an end of the play."""
    changes: Counter[tuple[CodeType, int]] = field(default_factory=Counter)
    """Times that iterations were passed up to one with other values; the most of them if there is no other."""
    seen: defaultdict[tuple[CodeType, int], set[frozenset[tuple[str, object]]]] = field(
        default_factory=lambda: defaultdict(set)
    )
    """Values that may decide sizes, of iterations that ran: they need not run for the same ones again."""
    tried: set[Tried] = field(default_factory=set)
    runs: set[tuple[object, ...]] = field(default_factory=set)
    """Those that were tried again, each with an outer loop and its iteration."""
    reached: Counter[tuple[CodeType, int]] = field(default_factory=Counter)
    """Iterations that have to run to their end, because lines that never ran may come in them."""
    begun: Counter[tuple[CodeType, int]] = field(default_factory=Counter)
    """Runs of loops in which their sizes were looked at again."""
    growing: set[tuple[CodeType, int]] = field(default_factory=set)
    """Loops in which a size changed."""
    waiting: set[tuple[CodeType, int]] = field(default_factory=set)
    """Loops with a size, or a condition, that never came out otherwise and may do so in their next run."""
    collected: set[tuple[CodeType, int]] = field(default_factory=set)
    """Loops with their collecting lines looked for a second time."""

    def has_to_collect(self, place: tuple[CodeType, int]) -> bool:
        """Return True if a loop's lists behind conditions were not looked at a second time: they may grow."""
        return place not in self.collected and bool(self.loops[place].collecting)

    def collect(self, place: tuple[CodeType, int]) -> set[int]:
        """Return the lines to look for a second time, once."""
        lines = self.loops[place].collecting if self.has_to_collect(place) else set[int]()
        self.collected.add(place)
        return lines

    def note_changes(self, place: tuple[CodeType, int], *, sizes: bool, may_turn: bool) -> None:
        """Note if a loop had a new size, and if one, or a condition, may come out otherwise in its next run."""
        if sizes:
            self.growing.add(place)
        (self.waiting.add if may_turn else self.waiting.discard)(place)

    def again(self, lines: Iterable[Frame]) -> None:
        """Let loops be passed over for these lines once more."""
        sought = {(line.file, line.line) for line in lines}
        self._forget_if(lambda code, first, tried: any((code.co_filename, abs(line)) in sought for line in tried))

    def forget(self, place: tuple[CodeType, int]) -> None:
        """Let a loop be passed over once more for any line."""
        self._forget_if(lambda code, first, tried: (code, first) == place)

    def forget_within(self, code: CodeType, first: int, last: int) -> None:
        """Do so for the loops within lines of a function, but for one on the first of them."""
        self._forget_if(lambda each, line, tried: each is code and first < line <= last)

    def _forget_if(self, applies: Callable[[CodeType, int, frozenset[int]], bool]) -> None:
        self.tried = {each for each in self.tried if not applies(*each)}

    def begin_again(self, place: tuple[CodeType, int]) -> None:
        """Let the sizes of a loop that runs once more be watched again: they may go on growing."""
        may_change = place in self.growing or place in self.waiting
        if may_change and self.changes[place] > CHANGES_IN_TURN and self.begun[place] < _MOST_RUNS:
            self.begun[place] += 1
            self.changes[place] = CHANGES_IN_TURN + 1
