"""A number that ends a message, and another one right behind it: without white space, their digits are one number."""

from bisect import bisect_right

from tightfit.oomlog.log_lines import Stream, squeeze
from tightfit.oomlog.message import Message
from tightfit.oomlog.messages import message_at

_LONGEST = 60
"""Characters of the longest two numbers in a row."""
_CONTEXT = 200
"""Characters before a message that its pattern may look at."""
_NARROWEST = 40
"""Columns of the narrowest terminal that breaks lines."""
_NEAR = 4
"""Lines before and behind a broken one that a terminal broke at the same column."""


def with_own_number(message: Message, stream: Stream) -> Message:
    """Return a message without the digits that begin what follows; without the figure where they may belong to it."""
    last = stream.joined[max(message.end - _LONGEST, message.start) : message.end]
    begin = message.end - len(last) + len(last.rstrip("0123456789.,"))
    end = next(iter(_breaks(stream, begin, message.end)), None)
    if end is None:
        return message
    line = bisect_right(stream.starts, end - 1) - 1
    is_line_end = end == stream.starts[line] + len(stream.squeezed[line])
    is_wrapped = _is_wrapped(stream, line) if is_line_end else False
    if is_wrapped:
        return message
    first = max(message.start - _CONTEXT, 0)
    own = message_at(stream.joined[first:end], message.start - first)
    if own is None or own.kind != message.kind:
        return message
    own.start, own.end = message.start, own.end + first
    if is_wrapped is None:
        own.figures = {name: each for name, each in own.figures.items() if message.figures.get(name) == each}
    return own


def _breaks(stream: Stream, begin: int, end: int) -> list[int]:
    """Return the places between `begin` and `end` at which white space stands in the log."""
    found = []
    for index in range(bisect_right(stream.starts, begin) - 1, len(stream.starts)):
        at = stream.starts[index]
        if at >= end:
            break
        for word in stream.entries[index].line.body.split():
            found += [at] if begin < at < end else []
            at += len(squeeze(word))
    return found


def _is_wrapped(stream: Stream, line: int) -> bool | None:
    """Return True if a terminal broke a line at its width, and None if that is open."""
    lengths = [len(each.line.body.strip()) for each in stream.entries[max(line - _NEAR, 0) : line + _NEAR + 1]]
    own = len(stream.entries[line].line.body.strip())
    following = stream.entries[line + 1].line
    has_prefix = following.prefix.strip() and not stream.entries[line].line.prefix.strip()
    if own < _NARROWEST or not following.body.strip() or has_prefix:
        return False
    return True if max(lengths) == own and lengths.count(own) > 1 else None
