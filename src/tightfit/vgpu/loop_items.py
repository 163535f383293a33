"""Items of a running `for` loop: its iterator, which Python hides, and the largest item that is still to come."""

import copy
import ctypes
import dis
import gc
import operator
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice, product
from pathlib import Path
from types import FrameType, GeneratorType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

_FRAME, _CODE, _STACK_TOP, _STACK, _POINTER = 24, 32 if sys.version_info < (3, 12) else 0, 64, 72, 8
"""Where Python keeps a running function's frame, its code, the length of its stack and the stack, in bytes."""
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError, TypeError),
    ValueError,
)
"""Errors of a script's own expressions, which it raises again where it comes to them."""
_AT_HAND: tuple[type, ...] = type(iter([])), type(iter(())), type(iter(range(0))), type(reversed([]))
"""Iterators whose items exist already, so that taking them away does nothing else."""
_EMPTY: dict[object, object] = {}
_OF_SETTINGS: tuple[type, ...] = (
    *(type(iter([])), type(iter(())), type(iter(_EMPTY)), type(iter(_EMPTY.values())), type(iter(_EMPTY.items()))),
    product,
)
_MOST_SETTINGS = 64
"""Iterations of a loop over settings that are played one by one."""
_SECONDS = 2.0
"""Time for looking at the items that are left."""


def iterator_of(frame: FrameType) -> object:
    """Return the iterator of a `for` loop at the start of an iteration; None elsewhere, and where Python hides it.

    It is the last entry of the function's stack, which only the frame's memory shows (`_PyInterpreterFrame` in
    pycore_frame.h of Python 3.11 to 3.13).
    """
    code = frame.f_code
    place = frame.f_lasti
    while code.co_code[place] == dis.EXTENDED_ARG:
        place += 2
    if sys.version_info >= (3, 14) or dis.opname[code.co_code[place]] not in ("FOR_ITER", "JUMP_BACKWARD"):
        return None
    last = _last_of_stack(frame)
    found: object = ctypes.cast(last.value, ctypes.py_object).value if last is not None and last.value else None
    return found if hasattr(found, "__next__") else None


def _last_of_stack(frame: FrameType) -> ctypes.c_void_p | None:
    """Return the last entry of a function's stack; None where Python's frames look otherwise."""
    running = ctypes.c_void_p.from_address(id(frame) + _FRAME).value
    assert running is not None
    if ctypes.c_void_p.from_address(running + _CODE).value != id(frame.f_code):
        return None
    entries = ctypes.c_int.from_address(running + _STACK_TOP).value
    return ctypes.c_void_p.from_address(running + _STACK + _POINTER * (entries - 1)) if entries > 0 else None


def replace_iterator(frame: FrameType, items: Iterator[object]) -> bool:
    """Let a `for` loop at the start of an iteration go on with other items; False where Python hides its own."""
    usual = iterator_of(frame)
    last = _last_of_stack(frame) if usual is not None else None
    if last is None:
        return False
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(items))
    last.value = id(items)
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(usual))
    return True


def within_enumerate(items: Any) -> Any:
    """Return the iterator that `enumerate` numbers; another one as it is."""
    while type(items) is enumerate:
        items = items.__reduce__()[1][0]
    return items


def makes_items(items: object) -> bool:
    """Return True for an iterator with items of several sizes: a generator, a list, batches of an iterable dataset."""
    from torch.utils.data import dataloader

    items = within_enumerate(items)
    if isinstance(items, dataloader._BaseDataLoaderIter):
        return items._dataset_kind == dataloader._DatasetKind.Iterable
    return isinstance(items, (GeneratorType, zip, map, filter, type(iter([]))))


def are_at_hand(items: object) -> bool:
    """Return True for the iterator of a list, a tuple or a tensor, also within `enumerate`."""
    return isinstance(within_enumerate(items), _AT_HAND)


def length_of(items: Any) -> int | None:
    """Return how many items an iterator has, after it has given the first; None if that cannot be seen."""
    items = within_enumerate(items)
    if isinstance(items, GeneratorType):  # of tqdm, or of a library's loader: what it iterates over has a length
        items = next((each for each in gc.get_referents(items) if _is_made_by(items, each)), None)
    try:
        if hasattr(type(items), "__len__"):
            return len(items)
        left = operator.length_hint(items, -1)
    except FAILURES:  # the script's own
        return None
    return left + 1 if left >= 0 else None


def left_of(items: Any) -> int | None:
    """Return how many items an iterator still has; None if that cannot be seen."""
    from torch.utils.data import dataloader

    items = within_enumerate(items)
    match items:
        case dataloader._BaseDataLoaderIter():
            dropped = getattr(items._sampler_iter, "passed", 0)
            return None if length_of(items) is None else len(items) - items._num_yielded - dropped
        case zip():
            each = [left for part in items.__reduce__()[1] if (left := left_of(part)) is not None]
            return min(each, default=None)
        case GeneratorType(gi_frame=FrameType(f_locals={"n": int(given), "iterable": _})):  # of a bar of tqdm's
            length = length_of(items)
            return None if length is None else length - given - 1
    return operator.length_hint(items) if isinstance(items, _AT_HAND) else None


def _is_made_by(items: "GeneratorType[object, object, object]", owner: object) -> bool:
    method = getattr(type(owner), "__iter__", None)
    return getattr(method, "__code__", None) is items.gi_code


class Largest(NamedTuple):
    """The largest of the items that an iterator had left."""

    item: object | None
    """None if no item is larger than the one that was played."""
    is_of_all: bool
    """False if there was no time to look at all of them."""


def largest_left(items: Any, played: object, is_over: Callable[[], bool]) -> Largest:
    """Take the items that are left, as far as the time goes, and return the largest, if it is larger than `played`."""
    is_counted = type(items) is enumerate
    largest, most = None, _rank(played, is_counted=is_counted)
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and not is_over():
        try:
            item = next(items)
        except (StopIteration, *FAILURES):  # the script's own, which ends with its loop
            return Largest(largest, is_of_all=True)
        if (rank := _rank(item, is_counted=is_counted)) > most:
            largest, most = item, rank
    return Largest(largest, is_of_all=False)


def _rank(item: object, *, is_counted: bool) -> tuple[int, float]:
    """Return the size of an item, and the sum of its plain numbers: `for length in lengths` has sizes for items."""
    if is_counted and isinstance(item, (list, tuple)) and len(item) == 2:
        item = item[1]
    return size_of(item), _sum_of(item)


def _sum_of(item: object) -> float:
    match item:
        case int() | float():
            return item
        case Mapping():
            return sum(map(_sum_of, item.values()))
        case list() | tuple():
            return sum(map(_sum_of, item))
    return 0


def differ(items: Any) -> bool:
    """Return True if an iterator's items are known and are plain values that differ, such as settings to try.

    False for numbers that only count, for many items and for any with more than numbers, texts and their like.
    """
    items = within_enumerate(items)
    if not isinstance(items, _OF_SETTINGS):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # product's, of copies
        try:
            ahead: Any = copy.copy(items)
            known = list(islice(ahead, _MOST_SETTINGS + 1))
        except FAILURES:
            return False
    if not 0 < len(known) <= _MOST_SETTINGS or not all(map(_is_setting, known)):
        return False
    first = known[0]
    if isinstance(first, int) and known == list(range(first, first + len(known))):
        return False
    return len(known) == 1 or any(each != first for each in known)


def _is_setting(item: object) -> bool:
    match item:
        case None | int() | float() | str() | Path():
            return True
        case list() | tuple():
            return all(map(_is_setting, item))
        case dict():
            return all(map(_is_setting, item.values()))
    if isinstance(item, (SimpleNamespace, Namespace)):
        return all(map(_is_setting, vars(item).values()))
    if is_dataclass(item) and not isinstance(item, type):
        return all(_is_setting(getattr(item, each.name, None)) for each in fields(item))
    return False


def size_of(item: object, *, of_card: bool = True) -> int:
    """Return the number of values in an item: of its tensors (those of the card if asked), arrays, texts and lists."""
    match item:
        case Tensor():
            return item.numel() if of_card or not item.is_cuda else 0
        case str() | bytes():
            return len(item)
        case Mapping():
            return sum(size_of(each, of_card=of_card) for each in item.values())
        case list() | tuple():
            return sum(size_of(each, of_card=of_card) for each in item)
    size = getattr(item, "size", 1)
    return size if isinstance(size, int) else 1
