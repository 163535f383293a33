"""Every out-of-memory message in text from which all white space was removed.

Terminals, mailers and loggers break messages anywhere, in the middle of words and numbers, and indent what follows.
Without white space all those breaks are gone, and no format is ambiguous without it. Letter case does not count.
"""

import functools
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain
from math import prod

import msgspec

from tightfit.oomlog.allocator_messages import HEAD, HEAD_WORDS, allocator_message, backend_kind, date
from tightfit.oomlog.dtypes import ELEMENT_BYTES
from tightfit.oomlog.facts import FIGURES, Figure
from tightfit.oomlog.log_text import lower
from tightfit.oomlog.message import Message, filled
from tightfit.tables import read_table

_CLASS = re.compile(r"([A-Za-z_][\w.]{0,80}(?:Error|Exception|Warning|OutOfResources)):(?:[\w ]{0,40}:)?$")
_PLAIN = re.compile(
    r"(?:(?P<backend>CUDA|HIP|XPU|NPU|MPSbackend)outofmemory"
    r"|(?P<bare>torch(?:\.cuda)?\.OutOfMemoryError|(?<![\w.])OutOfMemoryError(?=Traceback\(mostrecent)))",
    re.IGNORECASE,
)
_CAUSE_UNSTATED = frozenset({"dataloader_killed", "expandable_segments_assert"})
"""Kinds whose messages never name memory."""
_LARGEST = 2**44
"""16 TiB: far beyond any card and nearly any host, so a larger request is a mistake in its size."""


class _Format(msgspec.Struct, frozen=True):
    """An entry of `formats.toml`."""

    kind: str
    anchor: str
    pattern: str
    sure: bool = False
    """True if the words have no other meaning in a sentence."""


@functools.cache
def _formats() -> tuple[tuple[str, _Format], ...]:
    """Read `formats.toml`: the anchor of each format in small letters, and the format."""
    found = read_table("tightfit.oomlog", "formats.toml", dict[str, list[_Format]])
    return tuple((each.anchor.lower(), each) for each in found["format"])


@functools.cache
def _pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern when a text first has its anchor."""
    return re.compile(filled(pattern), re.IGNORECASE)


_LONGEST_RUN = 100
"""Words around which one search looks."""
_BEFORE_WORDS, _BEHIND_WORDS = 700, 500
"""Characters before and behind the words of a format in which its pattern begins and can be seen."""


def messages_in(squeezed: str) -> Iterator[Message]:
    """Yield every message in text without white space, in order, each up to its last figure."""
    search, position = _Search(squeezed), 0
    while (message := search.next(position)) is not None:
        yield _in_full(message, squeezed)
        position = max(message.end, position + 1)


def message_at(squeezed: str, start: int) -> Message | None:
    """Return the message that begins at `start` in text without white space; None if none does."""
    message = _Search(squeezed).next(start)
    return _in_full(message, squeezed) if message and message.start == start else None


def _in_full(message: Message, squeezed: str) -> Message:
    """Return a message with the name of its exception, its version, and the kind that its size shows."""
    if message.exception is None and squeezed[message.start - 1 : message.start] == ":":
        found = _CLASS.search(squeezed, max(0, message.start - 120), message.start)
        message.exception = found[1] if found else None
    if message.kind in ("cuda_out_of_memory", "hip_out_of_memory"):
        date(message, squeezed)
    elif message.torch_format not in ("T0", "T9"):
        message.torch_format = None
    requested = message.figures.get("requested_bytes")
    if "request_beyond_1eb" in message.notes or (requested is not None and requested.low > _LARGEST):
        message.kind = "impossible_size"
    after = lower(squeezed[message.end : message.end + 400])
    if "ignoringthischoice" in after or "forbenchmarkchoice" in after[:120]:
        message.kind = "autotune_choice"
    return message


class _Search:
    """The next message of any format in one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        lowered = lower(text)
        self._heads = _Finder(HEAD, HEAD_WORDS, text, lowered, 50, 150)
        self._plains = _Finder(_PLAIN, ("outofmemory",), text, lowered, 30, 50)
        self._others = [
            (each, _Finder(_pattern(each.pattern), (anchor,), text, lowered, _BEFORE_WORDS, _BEHIND_WORDS))
            for anchor, each in _formats()
            if anchor in lowered
        ]

    def next(self, position: int) -> Message | None:
        """Return the first message that starts at or behind `position`."""
        head, plain = self._heads.at(position), self._plains.at(position)
        form, other = self._other(position)
        near = min((found for found in (head, other, plain) if found), key=lambda found: found.start(), default=None)
        if near is None:
            return None
        if near is plain:  # the name of the class may stand before a message that says more
            near = next((more for more in (head, other) if more and more.start() <= plain.end() + 1), near)
        if near is head:
            return allocator_message(self._text, near)
        return _other_message(form, near) if near is other and form else _plain_message(near)

    def _other(self, position: int) -> tuple[_Format | None, re.Match[str] | None]:
        form, nearest = None, None
        for each, finder in self._others:
            match = finder.at(position)
            if match and (nearest is None or match.start() < nearest.start()):
                form, nearest = each, match
        return form, nearest


class _Finder:
    """The next match of a pattern, searched forward only, and only around words that each match has."""

    def __init__(
        self, pattern: re.Pattern[str], anchors: tuple[str, ...], text: str, lowered: str, back: int, on: int
    ) -> None:
        self._pattern, self._text, self._lowered, self._back, self._on = pattern, text, lowered, back, on
        self._anchors = dict.fromkeys(anchors, -1)
        self._ahead: deque[int] = deque()
        """Places of words that were found and not passed yet, in order."""
        self._known = 0
        """All words before this place were found."""
        self._found: re.Match[str] | None = None
        self._is_over = False
        """True if the rest of the text has no match: it is not searched again for each message."""

    def at(self, position: int) -> re.Match[str] | None:
        """Return the first match that starts at or behind `position`."""
        if not self._is_over and (self._found is None or self._found.start() < position):
            self._found = self._search(position)
            self._is_over = self._found is None
        return self._found

    def _search(self, position: int) -> re.Match[str] | None:
        at = position
        while run := self._run(at):
            at = run[-1] + 1
            # One search around them all: nearly always there is no match.
            first = self._pattern.search(self._text, max(position, run[0] - self._back), run[-1] + self._on)
            for near in run if first else ():
                found = self._around(max(position, near - self._back), near + self._on)
                if found:
                    return found
        return None

    def _around(self, start: int, stop: int) -> re.Match[str] | None:
        """Return the first match that starts from `start` on and can be seen before `stop`, in full."""
        while found := self._pattern.search(self._text, start, stop):
            # A search that ends at `stop` may end in the middle of a number, or before words that rule a match out.
            if whole := self._pattern.match(self._text, found.start()):
                return whole
            start = found.start() + 1
        return None

    def _run(self, at: int) -> list[int]:
        """Return the places of the next words at or behind `at` that stand close together."""
        while self._ahead and self._ahead[0] < at:
            self._ahead.popleft()
        run: list[int] = []
        for place in chain(tuple(self._ahead), self._more(at)):
            if (run and place > run[-1] + self._on) or len(run) == _LONGEST_RUN:
                break
            run.append(place)
        return run

    def _more(self, at: int) -> Iterator[int]:
        """Find words that were not found before, and keep their places."""
        while True:
            start = max(at, self._known)
            for anchor, known in list(self._anchors.items()):
                if known < start:
                    self._anchors[anchor] = self._lowered.find(anchor, start)
                    if self._anchors[anchor] < 0:
                        del self._anchors[anchor]
            if not self._anchors:
                return
            place = min(self._anchors.values())
            self._known = place + 1
            self._ahead.append(place)
            yield place


def _plain_message(found: re.Match[str]) -> Message:
    """Read the words without any figure."""
    if found["bare"] is not None:
        message = Message("cuda_out_of_memory", found.start(), found.end(), exception=found[0])
        message.note("class_without_message")
        return message
    message = Message(backend_kind(found["backend"]), found.start(), found.end())
    message.note("message_cut")
    return message


def _other_message(form: _Format, found: re.Match[str]) -> Message:
    message = Message(form.kind, found.start(), found.end(), is_sure=form.sure)
    groups = {name: text for name, text in found.groupdict().items() if text is not None}
    _take_request(message, groups)
    if "t0" in groups:
        message.torch_format = "T0"
    if "device" in groups:
        message.device_index = int(groups["device"])
    if groups.get("what", "").lower() == "sharedmemory":
        message.take("requested_bytes", f"{groups['need']} bytes")
        if "limit" in groups:
            message.take("allowed_bytes", f"{groups['limit']} bytes")
    if "unsure" in groups or form.kind in _CAUSE_UNSTATED:
        message.note("cause_unstated")
    if groups.get("pid", "").isdigit():
        message.pid = int(groups["pid"])
    if "rss" in groups:
        message.take("process_bytes", groups["rss"])
    for name, text in groups.items():
        figure, _, unit = name.partition("__")
        if f"{figure}_bytes" in FIGURES:
            message.take(f"{figure}_bytes", f"{text.replace(',', '')} {unit}" if unit else text)
        elif name not in _NOT_REPEATED:
            message.details[name] = text[:200]
    return message


_NOT_REPEATED = frozenset(
    {"size", "asked", "floor", "bytes", "t0", "device", "what", "need", "limit", "unsure", "pid", "rss"}
)


def _take_request(message: Message, groups: dict[str, str]) -> None:
    """Keep the size of the request: a number of bytes, a printed size, whole GB, or a tensor's shape and dtype."""
    if "bytes" in groups:
        message.take("requested_bytes", f"{groups['bytes'].replace(',', '')} bytes")
    for name in ("size", "asked"):
        if name in groups:
            message.take("requested_bytes", groups[name])
    if "floor" in groups:  # printed with integer division
        low = int(groups["floor"]) * 2**30
        message.figures["requested_bytes"] = Figure(bytes=low, low=low, high=low + 2**30 - 1)
    each = ELEMENT_BYTES.get(groups.get("dtype", "").lower())
    if each is not None and "requested_bytes" not in message.figures:
        sizes = [int(size) for size in groups.get("shape", "").split(",") if size]
        message.take("requested_bytes", f"{each * prod(sizes)} bytes")
