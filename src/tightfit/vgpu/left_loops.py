"""Loops that are left before their next iteration: by a jump behind them, or as all their items are taken away."""

import ast
import contextlib
import time
from collections.abc import Callable, Iterable
from types import CodeType, FrameType

from tightfit.vgpu.collected import go_to_last
from tightfit.vgpu.expressions import value_in
from tightfit.vgpu.frames import Frame
from tightfit.vgpu.loop_items import are_at_hand, iterator_of, largest_left, makes_items, replace_iterator
from tightfit.vgpu.loop_source import Loop, loop_node
from tightfit.vgpu.skipping import closed_lines
from tightfit.vgpu.taken_items import TakenItems

_SECONDS_TO_LEAVE = 3.0
"""Time for taking away the items of a loop that nothing follows."""
_JUMP = FrameType.__dict__["f_lineno"].__set__
"""Sets a frame's next line, which Python lets trace functions do alone."""


class LeftLoops:
    """Leaves loops of running functions."""

    def __init__(
        self,
        taken: TakenItems,
        forget: Callable[[FrameType, dict[str, object]], None],
        left: Callable[[tuple[CodeType, int]], None],
    ) -> None:
        """`forget` lets names go that were read from a function; `left` is told of each loop to leave."""
        self._taken, self._forget, self._left = taken, forget, left
        self._loops: dict[CodeType, list[Loop]] = {}
        """Loops to leave, by their functions."""
        self._if_closed: dict[tuple[CodeType, Loop], tuple[frozenset[int], Callable[[], object]]] = {}
        """Lines that such a loop must not be able to come to, and what to call when it is left."""
        self._differing: set[tuple[CodeType, Loop]] = set()
        """Such loops with iterations that are not alike."""
        self._only_for_largest: tuple[CodeType, int] | None = None
        """A loop to leave only by way of its largest item."""
        self.unlike: list[Frame] = []
        """Loops that were left although their iterations differ, and not all items could be looked at."""

    def leave(self, code: CodeType, loop: Loop) -> None:
        """Leave one loop of a running function before its next iteration."""
        self._left((code, loop.first))
        loops = self._loops.setdefault(code, [])
        if loop not in loops:
            loops.append(loop)

    def leave_if_closed(
        self, code: CodeType, loop: Loop, lines: Iterable[int], then: Callable[[], object], *, differs: bool
    ) -> None:
        """Leave a loop likewise if its conditions keep it from the lines, and call `then`.

        `differs`: its iterations are not alike.
        """
        self._if_closed[code, loop] = frozenset(lines), then
        if differs:
            self._differing.add((code, loop))
        self.leave(code, loop)

    def leave_with_largest(self, code: CodeType, loop: Loop) -> None:
        """Leave a loop only by way of the largest item that it has left."""
        self._only_for_largest = (code, loop.first)
        self.leave(code, loop)

    def of(self, code: CodeType, first: int) -> Loop | None:
        """Return the loop to leave at this line of a function."""
        return next((each for each in self._loops.get(code, ()) if each.first == first), None)

    def _may_leave(self, frame: FrameType, loop: Loop) -> bool:
        lines, then = self._if_closed.pop((frame.f_code, loop), (frozenset[int](), None))
        if then is not None and loop.has_items and not (loop.after or are_at_hand(iterator_of(frame))):
            return False
        if lines:
            code, names = frame.f_code, frame.f_locals
            node = loop_node(code.co_filename, code.co_firstlineno, code.co_name, loop.first)
            is_closed = node is not None and lines <= closed_lines(node, lines, names, frame.f_globals)
            self._forget(frame, names)
            if not is_closed:
                return False
        if then is not None:
            then()
        return True

    def leave_now(self, frame: FrameType, loop: Loop) -> None:
        """Jump behind a loop at its line, or take all items away that are left if nothing follows it."""
        items = iterator_of(frame) if loop.has_items or not loop.after else None
        if not loop.after and items is None:  # the loop only begins
            return
        self._loops[frame.f_code].remove(loop)
        is_evaluation = (frame.f_code, loop) in self._if_closed
        if not self._may_leave(frame, loop):
            return
        self._taken.has_passed = True
        if is_evaluation and self._goes_to_last(frame, loop):
            return
        if self._only_for_largest == (frame.f_code, loop.first):
            self._only_for_largest = None
            if not makes_items(items):
                return
        if loop.has_items and items is not None and self._ends_with_largest(frame, loop, items):
            return
        if loop.after:
            with contextlib.suppress(ValueError):  # a line that cannot be reached from here
                # By way of a line without blocks: of the several places of a `with` or `for`, Python takes the one
                # that keeps most of what is left behind, here the loop's iterator.
                _JUMP(frame, loop.by_way_of)
                _JUMP(frame, loop.after)
            return
        until = time.monotonic() + _SECONDS_TO_LEAVE
        with self._taken.passing():
            while time.monotonic() < until and not self._taken.is_cut_short and self._taken.take(items):
                pass

    def _goes_to_last(self, frame: FrameType, loop: Loop) -> bool:
        """Let an evaluation go on to its last iteration if it collects results in lists."""
        names = frame.f_locals
        with self._taken.passing():
            goes = go_to_last(frame, loop, names)
        self._forget(frame, names)
        return goes

    def _ends_with_largest(self, frame: FrameType, loop: Loop, items: object) -> bool:
        """Let a loop end after the largest item that is left; False if Python hides its iterator or all are alike."""
        node = loop_node(frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_code.co_name, loop.first)
        if not isinstance(node, ast.For):
            return False
        names = frame.f_locals
        played = value_in(node.target, names, frame.f_globals)
        self._forget(frame, names)
        with self._taken.passing():
            largest = largest_left(items, played, lambda: self._taken.is_cut_short)
        if (frame.f_code, loop) in self._differing and not largest.is_of_all:
            self.unlike.append(Frame(frame.f_code.co_filename, loop.first, frame.f_code.co_qualname))
        return largest.item is not None and replace_iterator(frame, iter([largest.item]))
