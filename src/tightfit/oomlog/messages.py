"""Every out-of-memory message in text from which all white space was removed.

Terminals, mailers and loggers break messages anywhere, in the middle of words and numbers, and indent what follows.
Without white space all those breaks are gone, and no format is ambiguous without it.
"""

import functools
import re
import tomllib
from collections.abc import Iterator
from importlib.resources import files

from tightfit.oomlog.allocator_messages import BACKENDS, HEAD, HEAD_WORDS, allocator_message, date
from tightfit.oomlog.facts import Figure
from tightfit.oomlog.message import SIZE, Message

_CLASS = re.compile(r"([A-Za-z_][\w.]{0,80}(?:Error|Exception|Warning|OutOfResources)):(?:[\w ]{0,40}:)?$")
_PLAIN = re.compile(
    r"(?:(?P<backend>CUDA|HIP|XPU|NPU|MPSbackend)outofmemory|torch(?:\.cuda)?\.OutOfMemoryError(?P<bare>))"
)
_CAUSE_UNSTATED = frozenset({"dataloader_killed", "expandable_segments_assert"})
"""Kinds whose messages never name memory."""


@functools.cache
def _formats() -> tuple[tuple[str, str, re.Pattern[str]], ...]:
    """Read kind, words and pattern of each format in `formats.toml`."""
    text = files("tightfit.oomlog").joinpath("formats.toml").read_text(encoding="utf-8")
    return tuple(
        (each["kind"], each["anchor"], re.compile(each["pattern"].replace("{SIZE}", SIZE)))
        for each in tomllib.loads(text)["format"]
    )


def messages_in(squeezed: str) -> Iterator[Message]:
    """Yield every message in text without white space, in order, each up to its last figure."""
    search, position = _Search(squeezed), 0
    while (message := search.next(position)) is not None:
        if message.exception is None and squeezed[message.start - 1 : message.start] == ":":
            found = _CLASS.search(squeezed, max(0, message.start - 120), message.start)
            message.exception = found[1] if found else None
        if message.kind in ("cuda_out_of_memory", "hip_out_of_memory"):
            date(message, squeezed)
        elif message.torch_format not in ("T0", "T9"):
            message.torch_format = None
        yield message
        position = max(message.end, position + 1)


class _Search:
    """The next message of any format in one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._heads = _Finder(HEAD, HEAD_WORDS, text, 50, 150)
        self._plains = _Finder(_PLAIN, ("outofmemory", "OutOfMemoryError"), text, 30, 30)
        self._others = [
            (kind, _Finder(pattern, (anchor,), text, 230, 400))
            for kind, anchor, pattern in _formats()
            if anchor in text
        ]

    def next(self, position: int) -> Message | None:
        """Return the first message that starts at or behind `position`."""
        head, plain = self._heads.at(position), self._plains.at(position)
        kind, other = self._other(position)
        near = min((found for found in (head, other, plain) if found), key=lambda found: found.start(), default=None)
        if near is None:
            return None
        if near is plain:  # the name of the class may stand before a message that says more
            near = next((more for more in (head, other) if more and more.start() <= plain.end() + 1), near)
        if near is head:
            return allocator_message(self._text, near)
        return _other_message(kind, near) if near is other else _plain_message(near)

    def _other(self, position: int) -> tuple[str, re.Match[str] | None]:
        kind, nearest = "", None
        for name, finder in self._others:
            match = finder.at(position)
            if match and (nearest is None or match.start() < nearest.start()):
                kind, nearest = name, match
        return kind, nearest


class _Finder:
    """The next match of a pattern, searched forward only, and only around words that each match has."""

    def __init__(self, pattern: re.Pattern[str], anchors: tuple[str, ...], text: str, back: int, on: int) -> None:
        self._pattern, self._text, self._back, self._on = pattern, text, back, on
        self._anchors = dict.fromkeys(anchors, -1)
        self._found: re.Match[str] | None = None

    def at(self, position: int) -> re.Match[str] | None:
        """Return the first match that starts at or behind `position`."""
        if self._found is None or self._found.start() < position:
            self._found = self._search(position)
        return self._found

    def _search(self, position: int) -> re.Match[str] | None:
        at = position
        while self._anchors:
            for anchor, known in list(self._anchors.items()):
                if known < at:
                    self._anchors[anchor] = self._text.find(anchor, at)
                    if self._anchors[anchor] < 0:
                        del self._anchors[anchor]
            near = min(self._anchors.values(), default=None)
            if near is None:
                return None
            found = self._pattern.search(self._text, max(position, near - self._back), near + self._on)
            if found:
                return found
            at = near + 1
        return None


def _plain_message(found: re.Match[str]) -> Message:
    """Read the words without any figure."""
    if found["bare"] is not None:
        message = Message("cuda_out_of_memory", found.start(), found.end(), exception=found[0])
        message.note("class_without_message")
        return message
    kind = f"{BACKENDS[found['backend']]}_out_of_memory" if found["backend"] else "device_out_of_memory"
    message = Message(kind, found.start(), found.end())
    message.note("message_cut")
    return message


def _other_message(kind: str, found: re.Match[str]) -> Message:
    message = Message(kind, found.start(), found.end())
    groups = {name: text for name, text in found.groupdict().items() if text is not None}
    if "size" in groups:
        message.take("requested_bytes", groups["size"])
    if "t0" in groups:
        message.torch_format = "T0"
    if "device" in groups:
        message.device_index = int(groups["device"])
    if "floor" in groups:  # printed with integer division
        low = int(groups["floor"]) * 2**30
        message.figures["requested_bytes"] = Figure(bytes=low, low=low, high=low + 2**30 - 1)
    if groups.get("what") == "sharedmemory":
        message.take("requested_bytes", f"{groups['need']} bytes")
        if "limit" in groups:
            message.take("allowed_bytes", f"{groups['limit']} bytes")
    if "unsure" in groups or kind in _CAUSE_UNSTATED:
        message.note("cause_unstated")
    if groups.get("pid", "").isdigit():
        message.pid = int(groups["pid"])
    if "rss" in groups:
        message.take("process_bytes", groups["rss"])
    return message
