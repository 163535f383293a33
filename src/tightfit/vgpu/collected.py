"""Lists in which a loop without gradients collects its results, where iterations that repeat are left out.

`embeddings.extend(model(batch).cpu())` is read by the number of each sample later. The lists get copies of their latest
entries for the iterations that are left out, and the last iteration runs. Lists that the function shares with others
stay as they are.
"""

import ast
import sys
from collections.abc import Iterator
from types import FrameType, GeneratorType
from typing import Any

from torch import Tensor

from tightfit.vgpu.loop_items import iterator_of, length_of, replace_iterator, within_enumerate
from tightfit.vgpu.loop_source import Loop, blocks_of, loop_node

_MOST_ENTRIES = 1_000_000
_MOST_BYTES = 1 << 30
"""Host memory of what a list may grow to, as a script may join its entries."""


def go_to_last(frame: FrameType, loop: Loop, names: dict[str, object]) -> bool:
    """Let a `for` loop at the start of an iteration go on to its last item; False if it collects nothing in lists.

    Also False where the number of its iterations cannot be seen.
    """
    code = frame.f_code
    node = loop_node(code.co_filename, code.co_firstlineno, code.co_name, loop.first)
    items = iterator_of(frame)
    if not isinstance(node, ast.For) or items is None:
        return False
    own = {*code.co_varnames, *code.co_cellvars} if names is not frame.f_globals else set(names)
    values = [names.get(each.id) for each in _targets(node.body) if isinstance(each, ast.Name) and each.id in own]
    lists = [each for each in values if isinstance(each, list) and each]
    total = _length(items) if lists else None
    if not lists or total is None:
        return False
    rest = list(items)  # type: ignore[call-overload]
    done = total - len(rest)
    for each in lists if done > 0 and len(rest) > 1 else ():
        _fill(each, done, len(rest) - 1)
    return replace_iterator(frame, iter(rest[-1:]))


def _length(items: Any) -> int | None:
    """Return how many items an iterator had before the first: those of a list, a range, or tqdm around one."""
    inner = within_enumerate(items)
    if isinstance(inner, GeneratorType):
        return length_of(items)
    if type(inner) not in (type(iter([])), type(iter(range(0)))):
        return None
    place = inner.__reduce__()[2:]
    return len(inner.__reduce__()[1][0]) if place and isinstance(place[0], int) else None


def _fill(entries: list[Any], done: int, left_out: int) -> None:
    """Repeat the entries of the latest iteration, if each one of those `done` added as many."""
    each, remainder = divmod(len(entries), done)
    latest = entries[len(entries) - each :]
    size = left_out * sum(map(_bytes_of, latest))
    if each and not remainder and left_out * each <= _MOST_ENTRIES and size <= _MOST_BYTES:
        entries.extend(latest * left_out)


def _bytes_of(entry: object) -> int:
    if isinstance(entry, Tensor):
        return entry.numel() * entry.element_size()
    size = getattr(entry, "nbytes", None)
    return size if isinstance(size, int) else sys.getsizeof(entry)


def _targets(body: list[ast.stmt]) -> Iterator[ast.expr]:
    """Yield the expressions of lists that a loop's body appends to."""
    for statement in body:
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=target, attr="append" | "extend"))):
                yield target
            case ast.AugAssign(target=target, op=ast.Add()):
                yield target
        if not isinstance(statement, (ast.For, ast.While)):
            for block in blocks_of(statement):
                yield from _targets(block)
