"""A whole log, of any size: every failure in it, and the one that matters.

The log is read once, in pieces. Plain searches for a few words decide which lines are looked at; around those,
lines are cleaned, parted by rank, and joined without white space for `messages`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import IO

from msgspec.structs import replace

from tightfit.oomlog.allocator_messages import REACH
from tightfit.oomlog.facts import CONSEQUENCES, Facts, with_arithmetic
from tightfit.oomlog.log_text import Line, clean, is_text, lines_of, part, pieces
from tightfit.oomlog.message import Message
from tightfit.oomlog.messages import messages_in
from tightfit.oomlog.printed import READ, Printed, printed_in
from tightfit.oomlog.standing import PATIENCE, RETRY, Standing, standing
from tightfit.oomlog.tracebacks import frames_of, phase_of

TRIGGERS = {
    "emory": ("ut of memory", "hared memory", "memory in use", "exceed allowed", "allocate memory", "MemoryError",
              "OutOfMemory", "ErrorMemoryAllocation"),
    "lloc": ("ried to allocate", "already allocated", "allocated by PyTorch", "Unable to allocate", "bad_alloc",
             "CUDA calloc", "CUDA malloc", "Allocation on device", "other allocations"),
    "erved": ("reserved in total", "reserved by PyTorch"),
    "apac": ("total capac",),
    "error": ("bus error", "Bus error", "CUDA error", "HIP error", "runtime error", "driver error", "error 1455",
              "error code: <1455"),
    "SIG": ("SIGKILL",),
    "_": ("ALLOC_FAILED", "NOT_INITIALIZED", "OUT_OF_MEMORY", "NVML_SUCCESS", "handles_.at", "oom_kill", "</torch_"),
    "ill": ("Killed", "killed by", "oom-kill", "OOMKilled", "sigkill"),
    "37": ("code 137", "code: 137", "code=137", "status 137", "status=137", "exit 137", "code: (137", "code (137"),
    "code": ("exitcode", "exit code", "return code"),
    "out of re": ("out of resource",),
    "ailure": ("failure '", "failure 2"),
    "WinE": ("WinError 1455",),
    "aging": ("paging file",),
    "uffer": ("Invalid buffer",),
    "unable": ("unable to mmap", "unable to write"),
    "页": ("页面文件",), "ペ": ("ページング",), "已": ("已杀死", "已终止"), "強": ("強制終了",),
}  # fmt: skip
"""Words of which at least one is on each line that starts a message or on the next one, by a part that they share."""
BEFORE, AFTER = 2**17, 2 * REACH
"""Characters kept of what was read before, for tracebacks, and looked at of what comes next."""
MOST = 400
"""Failures kept; more are only counted."""
_HANDLED = 2_000
"""Messages that are read, with their repetitions, before the last piece."""
STACKS = 40
"""Failures whose traceback is read."""
_BUCKET = 2048
"""Characters that are looked at together."""
_BUDGET = 25_000
"""Lines that are looked at closely, before the last piece; logs that consist of nothing else are sampled."""
_LINE_BOUND = re.compile(
    r"(?P<killed>(?:^|[\]\s*)>])Killed\**(?: *$| +(?:\S*/)?(?:python|torchrun|accelerate|deepspeed|CUDA_"
    r"|nohup))|^(?:已杀死|已终止|強制終了)\s*$)"
    r"|(?P<memory>^[\s`*>]*MemoryError\s*:?\s*$)"
)
_PROGRESS = ("it/s]", "s/it]", ": loss ", "loss=", "loss: ", "'loss':", "train loss")
_RUN_START = ("number of parameters:", "tokens per iteration will be", "$ python", "$ torchrun", "# python", "> python")
_SURVIVED = 3
"""Lines of progress after a failure that show it was survived; a progress bar is redrawn once or twice at the end."""
_ENDED = re.compile(r"^[\s>]*((?:[A-Za-z_][\w.]{0,80})(?:Error|Exception|Interrupt|Exit)\b[^\n]{0,300})")


@dataclass(frozen=True, kw_only=True)
class Other:
    """Another failure, or mention of one, in brief."""

    kind: str
    standing: str
    """A value of `Standing`."""
    line: int
    rank: int | None
    device_index: int | None
    requested_bytes: int | None
    repeats: int


@dataclass(frozen=True, kw_only=True)
class LogReading:
    """What a log says."""

    failure: Facts | None
    """The first failure that was not survived, and is no consequence of another."""
    others: tuple[Other, ...] = ()
    """The rest, in the order of the log; at most 100."""
    others_count: int = 0
    """Other failures, without mentions."""
    context: Printed = field(default_factory=Printed)
    kind_of_nothing: str | None = None
    """Why there is no failure: empty, binary, caught, warning, document, code, other_error or nothing; None if there is
    one."""
    evidence: str = ""
    """The line that decided for `kind_of_nothing`, shortened."""
    caught: Facts | None = None
    """The last out of memory that the program survived, if nothing failed."""

    @property
    def sentence(self) -> str:
        """One sentence on why there is no failure; empty if there is one."""
        return _SENTENCES.get(self.kind_of_nothing or "", "")


_SENTENCES = {
    "empty": "There is no text.",
    "binary": "It is not a text.",
    "caught": "Memory ran out, but the program caught it and went on.",
    "warning": "The message is in a warning, which stops nothing.",
    "document": "The words are in a text about such errors; nothing failed here.",
    "code": "The words are in a line of a program; nothing failed here.",
    "other_error": "The run ended with an error that is not about memory.",
    "nothing": "Nothing in it says that memory ran out.",
}


@dataclass
class _Record:
    facts: Facts
    standing: Standing
    body: str
    progress: int = 0
    closed: bool = False
    """Whether another run starts behind it."""

    @property
    def survived(self) -> bool:
        return self.progress >= _SURVIVED


def read_log(source: str | bytes | IO[bytes]) -> LogReading:
    """What a log, or a pasted message with anything around it, says; never raises, whatever the text is."""
    scan = _Scan()
    before, current = "", ""
    for piece in pieces(source):
        if current:
            scan.look_at(before, current, piece[:AFTER])
            before = (before + current)[-BEFORE:]
        current = piece
    scan.look_at(before, current, "", last=True)
    return scan.reading()


class _Scan:
    """What has been found so far."""

    def __init__(self) -> None:
        self.records: list[_Record] = []
        self.uncounted = 0
        self._lines = 0
        self._budget = _BUDGET
        self._seen: set[tuple[int, int, int | None]] = set()
        self._stacks = self._handled = 0
        self._head = ""
        self._ending = ""
        self._size = 0

    def look_at(self, before: str, text: str, after: str, *, last: bool = False) -> None:
        """Find what starts in `text`."""
        self._size += len(text)
        if len(self._head) < READ:
            self._head += text[: READ - len(self._head)]
        if last:
            self._budget = max(self._budget, _BUDGET // 4)
            self._handled = min(self._handled, _HANDLED * 3 // 4)
            self._stacks = min(self._stacks, STACKS * 3 // 4)
            self._ending = before[-4000:] + text[-20_000:]
        behind = 0
        for start, end in _regions(text):
            self._go_on(text[behind:start])
            behind = max(behind, end)
            if (self._budget <= 0 and not last) or len(self.records) >= MOST:
                self.uncounted += text.count("ried to allocate", start, end)
                continue
            self._region(before, text, after, start, end)
        self._go_on(text[behind:])
        self._lines += text.count("\n")

    def _go_on(self, text: str) -> None:
        """Note signs in what lies between failures that the run went on after the last one, or another began."""
        record = next((each for each in reversed(self.records) if each.standing is Standing.FAILURE), None)
        if record is None or record.closed or record.progress > 50 or not text:
            return
        starts = [at for at in map(text.find, _RUN_START) if at >= 0]
        until = min(starts, default=len(text))
        record.closed = bool(starts)
        record.progress += sum(text.count(words, 0, until) for words in _PROGRESS)

    def _region(self, before: str, text: str, after: str, start: int, end: int) -> None:
        lead = before[max(before.rfind("\n", 0, max(len(before) - 300, 0)), 0) :] if start == 0 else ""
        area = lead + text[start:end] + (after if end >= len(text) else "")
        first = self._lines + text.count("\n", 0, start) - lead.count("\n") + 1
        limit = first + (lead + text[start:end]).count("\n")
        entries = _entries(area, first)
        self._budget -= max(len(entries), len(area) // 60)
        for stream in _streams(entries):
            self._stream(stream, limit, before[: len(before) - len(lead)] + text[:start])

    def _stream(self, entries: list["_Entry"], limit: int, earlier: str) -> None:
        squeezed = [_squeeze(entry.line.body) for entry in entries]
        starts, total = [], 0
        for each in squeezed:
            starts.append(total)
            total += len(each)
        joined = "".join(squeezed)
        found = list(messages_in(joined)) + list(_line_bound(entries, starts))
        found.sort(key=lambda message: message.start)
        index = seen = 0
        for message in found:
            while index + 1 < len(entries) and starts[index + 1] <= message.start:
                index += 1
            entry = entries[index]
            key = (entry.number, entry.part, message.start - starts[index])
            if entry.number > limit or key in self._seen:
                continue
            if len(self.records) >= MOST or self._handled >= _HANDLED:
                self.uncounted += 1
                continue
            self._handled += 1
            self._go_on("\n".join(each.line.body for each in entries[seen:index]))
            seen = index
            self._seen.add(key)
            columns = entry.columns()
            column = _at(columns, message.start - starts[index])
            finish = _at(columns, message.end - starts[index])
            stand = standing(message, entry.line, column, finish, short_log=self._size < PATIENCE)
            if stand is Standing.FAILURE and any(
                RETRY.match(later.line.body) for later in entries[index + 1 : index + 13]
            ):
                stand = Standing.CAUGHT
            frames: list[str] = []
            if stand is Standing.FAILURE and self._stacks < STACKS:
                self._stacks += 1
                frames = _context(earlier, entries, index)
            if message.end - starts[index] <= len(squeezed[index]):
                words = clean(entry.line.body[column:finish])[:2000].strip()
            else:
                words = _readable(
                    entries[index : index + 40],
                    joined[message.start : message.start + 2000][: message.end - message.start],
                )
            self._add(message, stand, entry, words, frames)
        self._go_on("\n".join(each.line.body for each in entries[seen + bool(found) :] if each.number <= limit))
        if len(self._seen) > 10_000:
            self._seen = {key for key in self._seen if key[0] > limit - 200}

    def _add(self, message: Message, stand: Standing, entry: "_Entry", words: str, context: list[str]) -> None:
        frames = frames_of(context) if context else ()
        figures, notes = with_arithmetic(message.figures)
        if message.kind == "cuda_out_of_memory" and (message.torch_format or "") >= "T4":
            silent = "process_bytes" not in figures and "message_cut" not in message.notes
            notes += ["process_memory_unstated"] if silent else []
        facts = Facts(
            kind=message.kind,
            torch_format=message.torch_format,
            figures=figures,
            device_index=message.device_index,
            other_processes=tuple(message.other_processes),
            rank=entry.line.rank if entry.line.rank is not None else entry.rank,
            phase=phase_of(frames),
            frames=frames,
            exception=message.exception,
            message=words,
            line=entry.number,
            notes=tuple(dict.fromkeys(notes + message.notes)),
            pid=message.pid,
        )
        for record in reversed(self.records[-60:]):
            if record.standing is stand and not record.survived and _is_same(record.facts, facts):
                known = record.facts
                better = facts if facts.frames and not known.frames else known
                record.facts = replace(
                    known, repeats=known.repeats + 1, frames=better.frames, phase=better.phase,
                    exception=known.exception or facts.exception, torch_format=_later(known, facts),
                )  # fmt: skip
                return
        self.records.append(_Record(facts, stand, entry.line.body[:300]))

    def reading(self) -> LogReading:
        failures = [record for record in self.records if record.standing is Standing.FAILURE]
        chosen = _choose(failures) or next((each for each in self.records if each.standing is Standing.REPORT), None)
        rest = [record for record in self.records if record is not chosen]
        others = tuple(
            Other(
                kind=each.facts.kind,
                standing=(Standing.CAUGHT if each.survived else each.standing).value,
                line=each.facts.line,
                rank=each.facts.rank,
                device_index=each.facts.device_index,
                requested_bytes=each.facts.requested_bytes,
                repeats=each.facts.repeats,
            )
            for each in rest[:100]
        )
        count = self.uncounted + sum(each.standing in (Standing.FAILURE, Standing.CAUGHT) for each in rest)
        context = printed_in("\n".join(lines_of(self._head)))
        if chosen:
            return LogReading(failure=chosen.facts, others=others, others_count=count, context=context)
        nothing, evidence = self._nothing()
        caught = [each.facts for each in self.records if each.standing is Standing.CAUGHT or each.survived]
        return LogReading(
            failure=None, others=others, others_count=count, context=context, kind_of_nothing=nothing,
            evidence=evidence, caught=caught[-1] if caught else None,
        )  # fmt: skip

    def _nothing(self) -> tuple[str, str]:
        if not self._head.strip():
            return "empty", ""
        for record in reversed(self.records):
            if record.survived or record.standing is Standing.CAUGHT:
                return "caught", record.body
        for line in reversed(lines_of(self._ending)[-400:]):
            match = _ENDED.match(part(line).body)
            if match and "Warning" not in match[1]:
                return "other_error", match[1]
        for record in self.records:
            return record.standing.value, record.body
        return "nothing" if is_text(self._head) else "binary", ""


def _choose(failures: list[_Record]) -> _Record | None:
    """The first failure that the run did not survive; one that cannot be a consequence, if there is one."""
    fatal = [record for record in failures if not record.survived]
    if not fatal:
        return None
    roots = [record for record in fatal if record.facts.kind not in CONSEQUENCES]
    return (roots or fatal)[0]


def _is_same(one: Facts, two: Facts) -> bool:
    """Whether two messages tell of one failure: loggers print it, and so does Python at the end."""
    if one.rank != two.rank and None not in (one.rank, two.rank):
        return False
    if one.kind != two.kind:
        return False
    stated = {name: figure for name, figure in two.figures.items() if figure.stated}
    if stated and any(one.figures.get(name) == figure for name, figure in stated.items()):
        return all(one.figures.get(name, figure) == figure for name, figure in stated.items()) and (
            one.device_index == two.device_index or None in (one.device_index, two.device_index)
        )
    if stated and any(figure.stated for figure in one.figures.values()):
        return False
    return two.line - one.line <= 60 or two.kind in CONSEQUENCES


def _later(one: Facts, two: Facts) -> str | None:
    formats = [each for each in (one.torch_format, two.torch_format) if each]
    return max(formats, default=None)


# Around the words


def _regions(text: str) -> Iterator[tuple[int, int]]:
    """Parts of the text, from line starts, in which a message may start; in order, without overlap."""
    buckets: set[int] = set()
    for shared, words in TRIGGERS.items():
        if shared not in text:
            continue
        for word in words:
            at = text.find(word)
            while at >= 0:
                buckets.add(at // _BUCKET)
                at = text.find(word, (at // _BUCKET + 1) * _BUCKET)
    start = end = -1
    for bucket in sorted(buckets):
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


@dataclass
class _Entry:
    number: int
    """Of the line in the log, from 1."""
    part: int
    """Of the line, where it was taken apart."""
    line: Line
    rank: int | None
    """Its own, or that of the line before."""
    _columns: list[int] | None = None

    def columns(self) -> list[int]:
        if self._columns is None:
            self._columns = _columns(self.line.body)
        return self._columns


def _entries(area: str, first: int) -> list[_Entry]:
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
        entries.append(_Entry(number, piece, line, rank))
    return entries


_BEGINNING = re.compile(
    r"(?:[\w.]{0,40}(?:Error|Exception): ?)?(?:CUDA|HIP|XPU|NPU|MPS backend) out of mem|GPU \d{0,3} has a total"
    r"|Tried to allocate"
)


def _strange_prefix(lines: list[str]) -> str:
    """What a logger unknown to `part` puts before each line of a message, with its digits masked."""
    for one, two in pairwise(lines):
        match = _BEGINNING.search(one)
        if match and match.start() >= 3 and len(two) > match.start():
            mask = _mask(one[: match.start()])
            if mask == _mask(two[: match.start()]) and mask.strip(" >"):
                return mask
    return ""


def _mask(text: str) -> str:
    return re.sub(r"\d", "0", text)


def _streams(entries: list[_Entry]) -> list[list[_Entry]]:
    """Lines by rank, so that no other rank's line breaks a message."""
    streams: dict[int | None, list[_Entry]] = {}
    for entry in entries:
        streams.setdefault(entry.rank, []).append(entry)
    return list(streams.values())


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _columns(text: str) -> list[int]:
    """Where the characters are that are no spaces, and the end."""
    return [column for column, character in enumerate(text) if not character.isspace()] + [len(text)]


def _at(columns: list[int], count: int) -> int:
    return columns[min(max(count, 0), len(columns) - 1)]


def _line_bound(entries: list[_Entry], starts: list[int]) -> Iterator[Message]:
    """Messages that are a line by themselves, which text without line ends does not show."""
    for entry, start in zip(entries, starts, strict=True):
        body = entry.line.body
        match = _LINE_BOUND.search(body) if "Killed" in body or "MemoryError" in body or not body.isascii() else None
        if match:
            at = start + len(_squeeze(body[: match.start()]))
            kind = "host_memory_error" if match["memory"] else "host_killed"
            message = Message(kind, at, at + len(_squeeze(match[0])))
            if kind == "host_killed":
                message.note("cause_unstated")
            yield message


def _context(earlier: str, entries: list[_Entry], index: int) -> list[str]:
    """The lines of the same rank before a message, the nearest last."""
    rank = entries[index].rank
    found = [entry.line.body for entry in entries[:index]]
    missing = 400 - len(found)
    if missing > 0:
        area = earlier[-BEFORE // 2 :] if rank is None else earlier[-BEFORE:]
        raw = area.split("\n")[-(missing if rank is None else 4 * missing) - 1 :]
        if raw and not raw[-1]:
            raw.pop()
        ahead = _entries("\n".join(raw), 0)
        found = [entry.line.body for entry in ahead if entry.rank == rank][-missing:] + found
    return found


def _readable(area: list[_Entry], words: str) -> str:
    """The message with its spaces, on one line: the shortest run of lines that holds it."""
    text = ""
    for entry in area:
        text += entry.line.body if not text else " " + entry.line.body.strip()
        squeezed = _squeeze(text)
        at = squeezed.find(words)
        if at >= 0:
            columns = _columns(text)
            return clean(text[_at(columns, at) : _at(columns, at + len(words))])[:2000].strip()
        if len(squeezed) > 2 * len(words) + 4000:
            break
    return clean(words)[:2000]
