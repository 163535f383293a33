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
from tightfit.vgpu.loop_source import Loop, blocks_of, loop_node, loops_around

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
    collecting = {each.id for each in _targets(node.body) if isinstance(each, ast.Name) and each.id in own}
    lists = {name: found for name in collecting if isinstance(found := names.get(name), list) and found}
    total = _length(items) if lists else None
    if not lists or total is None:
        return False
    rest = list(items)  # type: ignore[call-overload]
    done = total - len(rest)
    for name, entries in lists.items() if done > 0 and len(rest) > 1 else ():
        each = _appended(node.body, name)
        if each is None and _is_empty_before(frame, loop, name):
            each, remainder = divmod(len(entries), done)
            each = 0 if remainder else each
        _fill(entries, each or 0, len(rest) - 1)
    return replace_iterator(frame, iter(rest[-1:]))


def _appended(body: list[ast.stmt], name: str) -> int | None:
    """Return how many entries each iteration appends to a list; None if it does so in other ways, too."""
    count = 0
    for statement in body:
        adds = any(isinstance(each, ast.Name) and each.id == name for each in _targets([statement]))
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="append"))) if adds:
                count += 1
            case ast.With() if (within := _appended(statement.body, name)) is not None:
                count += within
            case _ if adds:
                return None
    return count


def _is_empty_before(frame: FrameType, loop: Loop, name: str) -> bool:
    """Return True if a list is made anew for each run of a loop, or the loop runs once."""
    code = frame.f_code
    *outer, _ = loops_around(code.co_filename, code.co_firstlineno, code.co_name, loop.first)
    node = loop_node(code.co_filename, code.co_firstlineno, code.co_name, outer[-1].first) if outer else None
    if node is None:
        return True
    targets = [target for each in ast.walk(node) if isinstance(each, ast.Assign) for target in each.targets]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _length(items: Any) -> int | None:
    """Return how many items an iterator had before the first: those of a list, a range, or tqdm around one."""
    inner = within_enumerate(items)
    if isinstance(inner, GeneratorType):
        return length_of(items)
    if type(inner) not in (type(iter([])), type(iter(range(0)))):
        return None
    place = inner.__reduce__()[2:]
    return len(inner.__reduce__()[1][0]) if place and isinstance(place[0], int) else None


def _fill(entries: list[Any], each: int, left_out: int) -> None:
    """Repeat the latest `each` entries."""
    latest = entries[len(entries) - each :]
    size = left_out * sum(map(_bytes_of, latest))
    if each and left_out * each <= _MOST_ENTRIES and size <= _MOST_BYTES:
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
