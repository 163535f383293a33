"""Lines of a log around a message: found by a few words, parted by rank, and joined without white space."""

import functools
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec
from msgspec.structs import replace

from tightfit.oomlog.allocator_messages import REACH
from tightfit.oomlog.log_text import Line, clean, lines_of, lower, part
from tightfit.oomlog.message import Message
from tightfit.tables import read_table

BEFORE = 2**17
"""Characters kept before a message, for its traceback."""
_BUCKET = 2048
"""Characters that are searched together for the words of `triggers.toml`."""
_STACK_LINES = 400
"""Lines before a message that are searched for its traceback."""
_WORDS = 2000
"""Characters kept of a message."""
_LINE_BOUND = re.compile(
    r"(?P<killed>(?:^|[\]\s*)>])Killed\**(?: *$| +(?:\S*/)?(?:python|torchrun|accelerate|deepspeed|CUDA_"
    r"|nohup))|^(?:已杀死|已终止|強制終了)\s*$)"
    r"|(?P<memory>(?:^[\s`*>]*|[\w\])]: )MemoryError\s*:?\s*$)"
)
_OF_LIBRARY = re.compile(r"C\+\+ Traceback \(")
"""The head of a library's own report behind Python's MemoryError: its last lines name the memory that ran out."""
_OF_SIGNAL = re.compile(r"killed by signal: ?Killed", re.IGNORECASE)
"""A message of PyTorch's, which ends with the same word."""
_MARKS = ("#", "//", "*", "|", ";", "--")
"""Marks of comments and quotations, which may be the whole prefix of a line."""
_BEGINNING = re.compile(
    r"(?:[\w.]{0,40}(?:Error|Exception): ?)?(?:CUDA|HIP|XPU|NPU|MPS backend) out of mem|GPU \d{0,3} has a total"
    r"|Tried to allocate"
)


@functools.cache
def _triggers() -> dict[str, dict[str, list[str]]]:
    """Read the words, by the table and a part that they share."""
    return read_table("tightfit.oomlog", "triggers.toml", dict[str, dict[str, list[str]]])


_BACK, _ON = 32, 32
"""Characters before and behind a shared part in which its words are looked for; none is longer."""
_KEPT = 4096
"""Surroundings of a shared part that are remembered as none of its words: most logs repeat a few."""


def _buckets_of(lowered: str, *, at_end: bool) -> set[int]:
    """Return the pieces of `_BUCKET` characters that hold a word of `triggers.toml`."""
    buckets: set[int] = set()
    tables = _triggers()
    for shared, words in [*tables["always"].items(), *(tables["ends"].items() if at_end else ())]:
        others: set[str] = set()
        at = lowered.find(shared)
        while at >= 0:
            bucket = at // _BUCKET
            around = lowered[max(at - _BACK, 0) : at + _ON]
            is_new = bucket not in buckets and around not in others
            if is_new and not any(word in around for word in words):
                if len(others) < _KEPT:
                    others.add(around)
                is_new = False
            if is_new:
                buckets.add(bucket)
            at = lowered.find(shared, (bucket + 1) * _BUCKET if bucket in buckets else at + 1)
    return buckets


def regions_of(text: str, *, at_end: bool = True) -> Iterator[tuple[int, int]]:
    """Yield the parts of a text in which a message may start, from line starts, in order and without overlap.

    `at_end` is False for a piece that is neither the first nor the last of its log.
    """
    start = end = -1
    for bucket in sorted(_buckets_of(lower(text), at_end=at_end)):
        # A message may start on the two lines before, if it was wrapped before the word that was found.
        begin = max(text.rfind("\n", 0, max(bucket * _BUCKET - 300, 0)) + 1, bucket * _BUCKET - 1500, 0)
        if begin > end:
            if end > 0:
                yield start, end
            start = begin
        reach = (bucket + 1) * _BUCKET + 2 * REACH
        found = text.find("\n", reach, reach + REACH)
        end = min(found + 1 if found >= 0 else reach, len(text))
    if end > 0:
        yield start, end


class Entry(msgspec.Struct):
    """One line, or a part of one, at its place in the log."""

    number: int
    """Number of the line, from 1."""
    part: int
    """Number of the part, where a line was taken apart."""
    line: Line
    rank: int | None
    """The rank of the line, or of the line before."""


class Stream:
    """Lines of one rank, in which no other rank's line breaks a message."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.squeezed = [squeeze(entry.line.body) for entry in entries]
        self.starts: list[int] = []
        """Place of each line in the text without white space."""
        total = 0
        for each in self.squeezed:
            self.starts.append(total)
            total += len(each)
        self.joined = "".join(self.squeezed)

    def span(self, message: Message, index: int) -> tuple[int, int]:
        """Return the columns of a message in the line that it starts on."""
        columns = _columns(self.entries[index].line.body)
        start = self.starts[index]
        return _at(columns, message.start - start), _at(columns, message.end - start)

    def words(self, message: Message, index: int, column: int, finish: int) -> str:
        """Return the message with its spaces, on one line."""
        if message.end - self.starts[index] <= len(self.squeezed[index]):
            return clean(self.entries[index].line.body[column:finish])[:_WORDS].strip()
        squeezed = self.joined[message.start : min(message.end, message.start + _WORDS)]
        return _readable(self.entries[index : index + 40], squeezed)

    def line_bound(self) -> Iterator[Message]:
        """Yield messages that are a line by themselves, which text without line ends does not show."""
        for index, (entry, start) in enumerate(zip(self.entries, self.starts, strict=True)):
            body = entry.line.body
            if "Killed" not in body and "MemoryError" not in body and body.isascii():
                continue
            match = _LINE_BOUND.search(body)
            if match and not _OF_SIGNAL.search(body, 0, match.end()):
                at = start + len(squeeze(body[: match.start()]))
                if match["memory"] and any(_OF_LIBRARY.match(each.line.body) for each in self.entries[index + 1 :][:6]):
                    continue
                kind = "host_memory_error" if match["memory"] else "host_killed"
                message = Message(kind, at, at + len(squeeze(match[0])))
                if kind == "host_killed":
                    message.note("cause_unstated")
                yield message

    def before(self, index: int, earlier: str) -> list[str]:
        """Return the lines of the same rank before a message, the nearest last; `earlier` comes before the stream."""
        rank = self.entries[index].rank
        found = [entry.line.body for entry in self.entries[:index]]
        missing = _STACK_LINES - len(found)
        if missing <= 0:
            return found
        area = earlier[-BEFORE // 2 :] if rank is None else earlier[-BEFORE:]
        raw = area.split("\n")[-(missing if rank is None else 4 * missing) - 1 :]
        if raw and not raw[-1]:
            raw.pop()
        ahead = entries_of("\n".join(raw), 0)
        return [entry.line.body for entry in ahead if entry.rank == rank][-missing:] + found


def streams_of(entries: Sequence[Entry]) -> list[Stream]:
    """Part lines by rank."""
    by_rank: dict[int | None, list[Entry]] = {}
    for entry in entries:
        by_rank.setdefault(entry.rank, []).append(entry)
    return [Stream(each) for each in by_rank.values()]


def entries_of(area: str, first: int) -> list[Entry]:
    """Part the lines of a piece of log from their prefixes; the first line has the number `first`."""
    entries = []
    rank: int | None = None
    lines = [(number, each) for number, raw in enumerate(area.split("\n"), first) for each in enumerate(lines_of(raw))]
    strange = _strange_prefix([text for _, (_, text) in lines])
    for number, (piece, text) in lines:
        line = part(text)
        if strange and _mask(text[: len(strange)]) == strange:
            line = replace(line, body=text[len(strange) :], prefix=text[: len(strange)])
        if line.rank is not None or not text.strip():
            rank = line.rank
        elif line.prefix and not line.quoted and line.level:
            rank = None
        entries.append(Entry(number, piece, line, rank))
    return _with_traceback_above(_without_wrappers_level(entries))


_OF_TRACEBACK = re.compile(r"\s{2,}\S|Traceback \(")


def _with_traceback_above(entries: list[Entry]) -> list[Entry]:
    """Give a traceback without a rank to the ranked message right below it: only that line was copied with its rank."""
    of_rank = {each.rank for each in entries if _FRAME.match(each.line.body)}
    for index, entry in enumerate(entries):
        if entry.rank is None or entry.rank in of_rank:
            continue
        for above in reversed(entries[:index]):
            if above.rank is not None or not _OF_TRACEBACK.match(above.line.body):
                break
            above.rank = entry.rank
    return entries


_FRAME = re.compile(r'\s*File "[^"\n]{1,400}", line \d')


def _without_wrappers_level(entries: list[Entry]) -> list[Entry]:
    """Leave out levels that the lines of a traceback have, too: a program that wrapped another one put them there."""
    levels = {_mask(each.line.prefix) for each in entries if each.line.level and _FRAME.match(each.line.body)}
    for each in entries if levels else ():
        if each.line.level and _mask(each.line.prefix) in levels:
            each.line = replace(each.line, level=None)
    return entries


def _strange_prefix(lines: list[str]) -> str:
    """Return the prefix that a logger unknown to `part` puts before each line, with its digits masked."""
    for one, two in pairwise(lines):
        match = _BEGINNING.search(one)
        if match and match.start() and len(two) > match.start():
            mask = _mask(one[: match.start()])
            if mask == _mask(two[: match.start()]) and (mask.strip(" >") if len(mask) > 2 else mask.strip() in _MARKS):
                return mask
    return ""


def _mask(text: str) -> str:
    return re.sub(r"\d", "0", text)


def squeeze(text: str) -> str:
    """Remove all white space."""
    return "".join(text.split())


@functools.lru_cache(maxsize=2)  # a line may hold thousands of messages
def _columns(text: str) -> tuple[int, ...]:
    """Return the columns of all characters but spaces, and the end."""
    return (*(column for column, character in enumerate(text) if not character.isspace()), len(text))


def _at(columns: Sequence[int], count: int) -> int:
    return columns[min(max(count, 0), len(columns) - 1)]


def _readable(area: Sequence[Entry], words: str) -> str:
    """Return a message of several lines with its spaces, from the shortest run of lines that holds it."""
    text = ""
    for entry in area:
        text += entry.line.body if not text else " " + entry.line.body.strip()
        squeezed = squeeze(text)
        at = squeezed.find(words)
        if at >= 0:
            columns = _columns(text)
            return clean(text[_at(columns, at) : _at(columns, at + len(words))])[:_WORDS].strip()
        if len(squeezed) > 2 * len(words) + 4000:
            break
    return clean(words)[:_WORDS]
