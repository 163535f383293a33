"""A whole log, of any size: every failure in it, and the one that matters.

The log is read once, in pieces. Plain searches for a few words decide which lines are looked at; around those,
lines are cleaned, parted by rank, and joined without white space for `messages`.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping
from typing import IO

from msgspec import Struct, field
from msgspec.structs import replace

from tightfit.oomlog.allocator_messages import REACH
from tightfit.oomlog.counted_lines import Counts, advanced, counters_of
from tightfit.oomlog.cut_message import begun_message, completed, last_line
from tightfit.oomlog.facts import Facts, Figure, with_arithmetic
from tightfit.oomlog.kinds import consequences, memory_of, status_of
from tightfit.oomlog.last_words import (
    advises,
    error_at_end,
    host_words_in,
    is_of_job,
    is_told,
    last_words,
    mentioned_in,
    met_in,
    quotes_error,
    reported_in,
    sentence_in,
    tells_of_failure,
    titled_error,
)
from tightfit.oomlog.log_lines import BEFORE, Entry, Stream, entries_of, regions_of, streams_of
from tightfit.oomlog.log_text import clean, is_text, lines_of, part, pieces, without_shared_prefix
from tightfit.oomlog.message import Message
from tightfit.oomlog.messages import messages_in
from tightfit.oomlog.ownership import own_process
from tightfit.oomlog.printed import READ, Printed, printed_in
from tightfit.oomlog.run_facts import RunFacts, run_facts_in
from tightfit.oomlog.same_failure import complete_each_other, is_same, joined, later_format, stated_in
from tightfit.oomlog.standing import OF_ITEM, PATIENCE, Standing, goes_on, standing
from tightfit.oomlog.tracebacks import TraceFrame, frames_behind, frames_of, is_cut, is_warm_up, phase_of
from tightfit.units import GIB, MIB

_AFTER = 2 * REACH
"""Characters looked at of what comes next."""
_MOST = 400
"""Failures kept; more are only counted."""
_HANDLED = 2_000
"""Messages that are read, with their repetitions, before the last piece."""
_STACKS = 40
"""Failures whose traceback is read."""
_BUDGET = 25_000
"""Lines that are looked at closely, before the last piece; logs that consist of nothing else are sampled."""
_PROGRESS = (
    "it/s]",
    "s/it]",
    ": loss ",
    "loss=",
    "loss: ",
    "'loss':",
    "train loss",
    "n_slots =",
    "server is listening",
)
_RUN_START = ("number of parameters:", "tokens per iteration will be", "$ python", "$ torchrun", "# python", "> python")
_WIDE_LINE = 120
"""Columns before a message, from which on a progress bar or another line stands before it."""
_HEAD, _TAIL = 28_000, 16_000
"""Characters of a long log's beginning and end that are looked through for what the program prints of its run."""
_TOLD = ("incomplete", "begun", "memory_words", "reported", "mentioned", "host_memory_error", "host_killed")
"""Kinds of failures that no format names."""
_REPORT = 2_000
"""Characters of a text that is a person's report if its title names the failure and nothing in it advises."""
_PROSE = 20_000
"""Characters of a report, of which any line that names a lack of memory is taken as what failed."""
_TITLE = 3
"""Lines of a log of which one may be a report's title: what happened stands behind it."""
_REPORTS = re.compile(r"\bOOM: Ran out of memory with exception\b")
"""fairseq's line on any lack of memory, those that it does not survive, too."""
_RECOVERS = re.compile(r"\brecover from OOM\b")
_TRACEBACK = "Traceback (most recent call last)"
_COUNTED = 2**14
"""Characters behind a failure, up to the next one, in which counts are compared."""
_SURVIVED = 3
"""Lines of progress after a failure that show it was survived; a progress bar is redrawn once or twice at the end."""


_NO_MEMORY = ("none", "unshown")
"""Memory of kinds of messages that do not tell of a lack of any."""


def _ran_out(record: "_Record") -> bool:
    """Return True if a message is of memory that ran out, not of a setting or another error that was warned of."""
    return memory_of(record.facts.kind) not in _NO_MEMORY and record.facts.kind != "vllm_sequence_too_long"


class Other(Struct, frozen=True, kw_only=True):
    """Another failure, or mention of one, in brief; `Facts` describes the fields."""

    kind: str
    standing: str
    """A value of `Standing`."""
    line: int
    rank: int | None
    device_index: int | None
    requested_bytes: int | None
    repeats: int


_UNSHOWN = frozenset({"handle", "left"})
"""Details of messages that have several possible reasons."""


class LogReading(Struct, frozen=True, kw_only=True):
    """The failure that a log shows, or the reason why it shows none."""

    failure: Facts | None
    """The first failure that was not survived, and is no consequence of another."""
    others: tuple[Other, ...] = ()
    """The rest, in the order of the log; at most 100."""
    others_count: int = 0
    """Other failures, without mentions."""
    context: Printed = Printed()
    run: RunFacts = RunFacts()
    """Facts that the program prints about its run; of a long log, from its beginning and its end."""
    kind_of_nothing: str | None = None
    """Reason for no failure: a table `nothing` in wording/kinds names them, and binary."""
    evidence: str = ""
    """The line that decided for `kind_of_nothing`, shortened."""
    caught: Facts | None = None
    """The last out of memory that the program survived, if nothing failed."""

    went_on: bool = False
    """True if the log shows progress after an out of memory that was caught."""

    @property
    def status(self) -> str:
        """A key of the table `status` in codes.toml."""
        if self.failure is not None and _UNSHOWN & self.failure.details.keys():
            return "cause_not_shown"
        return status_of(self.failure.kind if self.failure else None, self.kind_of_nothing)


class _Record(Struct):
    facts: Facts
    standing: Standing
    body: str
    progress: int = 0
    closed: bool = False
    """True if another run starts behind it."""
    counters: dict[str, Counts] = field(default_factory=dict)
    """Counts of the lines of progress before it, by their text."""
    advanced: int = 0
    """Lines behind it whose counts are higher."""

    @property
    def survived(self) -> bool:
        # Behind a traceback, another process may have counted on to the next step before it was ended.
        return self.progress >= _SURVIVED or self.advanced > bool(self.facts.frames)


def read_log(source: str | bytes | IO[bytes] | IO[str]) -> LogReading:
    """Read a log, or a pasted message with anything around it; never raises, whatever the text is."""
    scan = _Scan()
    before, current = "", ""
    for piece in without_shared_prefix(pieces(source)):
        if current:
            scan.look_at(before, current, piece[:_AFTER])
            before = (before + current)[-BEFORE:]
        current = piece
    scan.look_at(before, current, "", last=True)
    return scan.reading()


class _Scan:
    """Everything found so far."""

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
        self._missing = ""
        """End of the last message that the log lacks, and that was read as if it were there."""

    def look_at(self, before: str, text: str, after: str, *, last: bool = False) -> None:
        """Read the messages that start in `text`."""
        at_end = last or not self._size
        self._size += len(text)
        if len(self._head) < READ:
            self._head += text[: READ - len(self._head)]
        if last:
            self._budget = max(self._budget, _BUDGET // 4)
            self._handled = min(self._handled, _HANDLED * 3 // 4)
            self._stacks = min(self._stacks, _STACKS * 3 // 4)
            self._ending = before[-4000:] + text[-20_000:]
            text, self._missing = completed(text)
        behind = 0
        for start, end in regions_of(text, at_end=at_end):
            self._go_on(text[behind:start])
            behind = max(behind, end)
            if (self._budget <= 0 and not last) or len(self.records) >= _MOST:
                self.uncounted += text.count("ried to allocate", start, end)
                continue
            self._region(before, text, after, start, end)
        self._go_on(text[behind:])
        self._lines += text.count("\n")

    def _go_on(self, text: str) -> None:
        """Look in `text`, which follows a failure, for progress that shows it was survived, or for another run."""
        happened = (Standing.FAILURE, Standing.CAUGHT)
        record = next((each for each in reversed(self.records) if each.standing in happened), None)
        if record is None or record.closed or record.progress > 50 or not text:
            return
        starts = [at for at in map(text.find, _RUN_START) if at >= 0]
        until = min(starts, default=len(text))
        record.closed = bool(starts)
        record.progress += sum(text.count(words, 0, until) for words in _PROGRESS)
        if record.counters and record.advanced < _SURVIVED:
            behind = map(part, lines_of(text[: min(until, _COUNTED)]))
            own = (each.body for each in behind if each.rank in (None, record.facts.rank))
            record.advanced += advanced(record.counters, own)

    def _region(self, before: str, text: str, after: str, start: int, end: int) -> None:
        lead = before[max(before.rfind("\n", 0, max(len(before) - 300, 0)), 0) :] if start == 0 else ""
        area = lead + text[start:end] + (after if end >= len(text) else "")
        first = self._lines + text.count("\n", 0, start) - lead.count("\n") + 1
        limit = first + (lead + text[start:end]).count("\n")
        entries = entries_of(area, first)
        self._budget -= max(len(entries), len(area) // 60)
        for stream in streams_of(entries):
            self._stream(stream, limit, before[: len(before) - len(lead)] + text[:start])

    def _stream(self, stream: Stream, limit: int, earlier: str) -> None:
        """Read the messages of one rank's lines up to line `limit`; `earlier` is the text before them."""
        found = sorted([*messages_in(stream.joined), *stream.line_bound()], key=lambda message: message.start)
        seen = 0
        for message in found:
            index = bisect_right(stream.starts, message.start) - 1
            entry = stream.entries[index]
            key = (entry.number, entry.part, message.start - stream.starts[index])
            if entry.number > limit or key in self._seen:
                continue
            if len(self.records) >= _MOST or self._handled >= _HANDLED:
                self.uncounted += 1
                continue
            self._handled += 1
            self._seen.add(key)
            self._go_on("\n".join(each.line.body for each in stream.entries[seen:index]))
            seen = index
            self._message(message, stream, index, earlier)
        rest = stream.entries[seen + bool(found) :]
        self._go_on("\n".join(each.line.body for each in rest if each.number <= limit))
        if len(self._seen) > 10_000:
            self._seen = {key for key in self._seen if key[0] > limit - 200}

    def _message(self, message: Message, stream: Stream, index: int, earlier: str) -> None:
        """Keep a message that starts on the line `index` of its stream."""
        entry, (column, finish) = stream.entries[index], stream.span(message, index)
        message.exception = _own_class(entry.line.body[:column], message.exception)
        is_title = entry.number == 1 and entry.line.body.startswith("# ")
        stand = standing(message, entry.line, column, finish, short_log=self._size < PATIENCE, is_title=is_title)
        following = stream.entries[index + 1 : index + 13]
        if stand is Standing.FAILURE and any(goes_on(later.line.body) for later in following):
            stand = Standing.CAUGHT
        frames: tuple[TraceFrame, ...] = ()
        before: list[str] = []
        is_before = False
        behind = [each.line.body for each in stream.entries[index + 1 : index + 40]]
        if stand in (Standing.FAILURE, Standing.REPORT, Standing.CAUGHT) and self._stacks < _STACKS:
            self._stacks += 1
            before = stream.before(index, earlier)
        if before and stand is not Standing.CAUGHT:
            frames = frames_of(before)
            is_before = bool(frames)
            frames = frames or frames_behind(behind)
        words = stream.words(message, index, column, finish)
        said = entry.line.body[max(column - 60, 0) :] if message.kind == "program_words" else ""
        body = entry.line.body[max(column - 80, 0) :] if column > _WIDE_LINE else entry.line.body
        facts = _facts(message, entry, words, frames, before, said)
        if frames and not is_before and is_cut(behind):
            facts = replace(facts, notes=(*facts.notes, "traceback_cut"))
        if facts.phase is None and not frames and entry.number <= _TITLE and is_warm_up(behind):
            facts = replace(facts, phase="warmup")
        record = _Record(facts, stand, body[:300], closed=is_title, counters=counters_of(before))
        self._add(record, is_title=is_title)

    def _add(self, found: _Record, *, is_title: bool) -> None:
        """Keep a failure, or count it as a repetition; lines behind a report's title are not progress after it."""
        facts, stand = found.facts, found.standing
        for record in reversed(self.records[-60:]):
            over = record.survived and stand is not Standing.CAUGHT
            if record.standing is stand and not over and is_same(record.facts, facts):
                known = record.facts
                record.closed = record.closed and is_title
                better = facts if facts.frames and not known.frames else known
                if not known.figures and facts.figures:  # the first says only that it failed
                    known = replace(facts, line=known.line, rank=known.rank if facts.rank is None else facts.rank)
                elif complete_each_other(known, facts):
                    known = joined(known, facts)
                elif stated_in(known) < stated_in(facts):  # a title, and the message in full
                    known = replace(facts, line=known.line, rank=known.rank if facts.rank is None else facts.rank)
                record.facts = replace(
                    known,
                    repeats=record.facts.repeats + 1,
                    frames=better.frames,
                    phase=better.phase,
                    details={**known.details, **facts.details},
                    exception=known.exception or facts.exception,
                    torch_format=later_format(known, facts),
                )
                return
        self.records.append(found)

    def reading(self) -> LogReading:
        failures = [record for record in self.records if record.standing is Standing.FAILURE]
        chosen = _choose(failures) or next((each for each in self.records if each.standing is Standing.REPORT), None)
        chosen = chosen or self._failed_afterwards()
        rest = [record for record in self.records if not _is_of(record, chosen)]
        others = tuple(map(_other, rest[:100]))
        apart = [record for record in rest if chosen is None or record.facts.line != chosen.facts.line]
        count = self.uncounted + sum(map(_counts, apart))
        context = printed_in("\n".join(lines_of(self._head)))
        run = run_facts_in("\n".join(lines_of(self._both_ends()))) if failures or chosen else RunFacts()
        if chosen:
            failure = self._as_printed(chosen.facts)
            return LogReading(failure=failure, others=others, others_count=count, context=context, run=run)
        nothing, evidence = self._nothing()
        if nothing in _TOLD:
            failure = self._unnamed(nothing, evidence)
            run = run_facts_in("\n".join(lines_of(self._both_ends())))
            return LogReading(failure=failure, others=others, others_count=count, context=context, run=run)
        caught = [
            each for each in self.records if (each.standing is Standing.CAUGHT or each.survived) and _ran_out(each)
        ]
        return LogReading(
            failure=None,
            others=others,
            others_count=count,
            context=context,
            kind_of_nothing=nothing,
            evidence=evidence,
            caught=caught[-1].facts if caught else None,
            went_on=any(self._went_on(each) for each in caught),
        )

    def _both_ends(self) -> str:
        if self._size <= _HEAD + _TAIL:
            return self._head
        return self._head[:_HEAD] + "\n" + self._ending[-_TAIL:]

    def _went_on(self, record: _Record) -> bool:
        """Return True if progress follows a failure; behind a traceback, more than a progress bar's last lines."""
        behind = self._ending[self._ending.rfind(record.body[:60]) :]
        least = _SURVIVED if _TRACEBACK in behind else 1
        return record.progress >= least or record.advanced > 0 or _goes_on_with_next(record)

    def _failed_afterwards(self) -> _Record | None:
        """Return an out of memory that the program handled, if it shows no progress after it and ends with an error."""
        handled = [each for each in self.records if each.standing is Standing.CAUGHT and not each.survived]
        last = last_words(lines_of(self._ending)[-400:], with_lines_before=False) if handled else None
        record = handled[-1] if handled else None
        if record is None or record.progress or record.advanced:
            return None
        behind = self._ending[self._ending.rfind(record.body[:60]) :]
        if _REPORTS.search(record.body) and not _RECOVERS.search(behind):
            return _with_facts(record, record.facts)
        is_cut_off = last is None or last[0] == "incomplete"
        if is_cut_off and _RECOVERS.search(behind) and _TRACEBACK in behind:
            return _with_facts(record, replace(record.facts, notes=(*record.facts.notes, "failed_afterwards_cut")))
        if last is None or last[1][:60] in record.body:
            return None
        if self._ending.rfind(last[1][:60]) < self._ending.rfind(record.body[:60]):
            is_the_matter = self._head.startswith("# ") and reported_in(lines_of(self._head[:4000])) is not None
            return record if is_the_matter else None
        details = dict(record.facts.details) | {"afterwards": " ".join(last[1].split())}
        notes = (*record.facts.notes, "failed_afterwards")
        return _with_facts(record, replace(record.facts, notes=notes, details=details))

    def _as_printed(self, facts: Facts) -> Facts:
        """Return a failure whose message ends with the log without the words that were added to it."""
        if not self._missing or facts.line <= self._lines or facts.figures:
            return facts
        printed = last_line(self._ending)
        message = facts.message if facts.message in printed else printed
        return replace(facts, message=message, notes=(*facts.notes, "log_ends_within"))

    def _nothing(self) -> tuple[str, str]:
        if not self._head.strip():
            return "empty", ""
        for record in reversed(self.records):
            if (record.survived or record.standing is Standing.CAUGHT) and _ran_out(record):
                return "caught", record.body
        last = last_words(lines_of(self._ending)[-400:])
        if last is not None and last[0] in ("other_error", "incomplete") and (begun := begun_message(self._ending)):
            return "begun", begun
        if last is not None and last[0] == "other_error" and not self.records and mentioned_in([last[1]]):
            last = ("memory_words", last[1])
        if last is not None and last[0] == "memory_words" and is_told(last[1]):
            last = ("reported", last[1])
        title = reported_in(lines_of(self._head[:4000])) if last is None or last == ("incomplete", "") else None
        told = host_words_in(lines_of(self._head[:4000])[:1]) if last == ("incomplete", "") else None
        if told is not None:
            return told
        if title is not None and (self._has_frames() or self._is_short_report()):
            return "reported", title
        if last is not None:
            return last
        if self._size < _PROSE and (met := met_in(lines_of(self._head))) is not None:
            return "reported", met
        for record in self.records:
            if record.standing is Standing.FAILURE:
                return "survived_error", record.body
            if record.standing is not Standing.CAUGHT or _ran_out(record):
                return record.standing.value, record.body
        told = host_words_in(lines_of(self._head)) if self._size < _PROSE else None
        if self._size < _PROSE and (mention := mentioned_in(lines_of(self._head))) is not None:
            if told is not None and not mention[1]:
                return told
            return ("mentioned" if mention[1] else "memory_words"), mention[0]
        if told is not None:
            return told
        if (line := titled_error(self._head)) is not None and self._size < _PROSE:
            return "other_error", line
        if not is_text(self._head):
            return "binary", ""
        if (line := error_at_end(self._ending)) is not None:
            return "cut_error", line
        return ("told" if tells_of_failure(self._head[:_REPORT]) else "nothing"), ""

    def _is_short_report(self) -> bool:
        """Return True for a short text that has no code, no warning and no chapter of advice."""
        if self._size >= _REPORT or any(each.standing is not Standing.DOCUMENT for each in self.records):
            return False
        return not advises(lines_of(self._head))

    def _has_frames(self) -> bool:
        """Return True if a traceback, or a part of one, is in the end of the log."""
        return bool(frames_of([part(line).body for line in lines_of(self._ending)[-400:]]))

    def _unnamed(self, kind: str, evidence: str) -> Facts:
        """Return the facts of a failure that no format names: its last words, and its traceback."""
        lines = [part(line).body for line in lines_of(self._ending)[-400:]]
        frames = frames_of(lines)
        if kind in ("reported", "mentioned"):
            kind, details = "program_words", _as_reported(evidence)
        elif kind in ("host_memory_error", "host_killed"):
            details = {"reported": evidence} | ({"job": "yes"} if is_of_job(evidence) else {})
        elif kind == "begun":
            kind, details = "incomplete", {"said": evidence, "begun": "yes"}
        else:
            details = {"said": evidence} if evidence else {}
        return Facts(kind=kind, frames=frames, phase=phase_of(frames, lines), details=details, line=self._lines + 1)


def _own_class(before: str, named: str | None) -> str | None:
    """Return the name of an exception as its line has it: without white space, the line before is joined to it.

    >>> _own_class("torch.OutOfMemoryError: ", "bashtorch.OutOfMemoryError")
    'torch.OutOfMemoryError'
    """
    last = before.rstrip(": ").rpartition(" ")[2]
    return last if named and last and named not in before and named.endswith(last) else named


def _with_facts(record: _Record, facts: Facts) -> _Record:
    """Return a failure with other facts."""
    return _Record(facts, Standing.FAILURE, record.body, record.progress, record.closed)


def _goes_on_with_next(record: _Record) -> bool:
    """Return True for the same line on a second input: the program went on after the first."""
    return record.facts.repeats > 1 and bool(OF_ITEM.match(record.body))


def _is_of(record: _Record, chosen: _Record | None) -> bool:
    """Return True for the chosen failure itself, also as what was handled first."""
    if chosen is None or record is chosen:
        return record is chosen
    return record.standing is Standing.CAUGHT and record.facts.line == chosen.facts.line


def _counts(record: _Record) -> bool:
    """Return True for a failure beside the chosen one, False for a launcher's report of the chosen one."""
    is_failure = record.standing in (Standing.FAILURE, Standing.CAUGHT) and record.facts.kind != "tensorrt_tactic"
    return is_failure and memory_of(record.facts.kind) != "unshown"


def _other(record: _Record) -> Other:
    facts = record.facts
    return Other(
        kind=facts.kind,
        standing=(Standing.CAUGHT if record.survived else record.standing).value,
        line=facts.line,
        rank=facts.rank,
        device_index=facts.device_index,
        requested_bytes=facts.requested_bytes,
        repeats=facts.repeats,
    )


def _facts(
    message: Message, entry: Entry, words: str, frames: tuple[TraceFrame, ...], before: list[str], said: str
) -> Facts:
    """Return the facts of a message, with its words as printed, and the frames and lines before it."""
    own = own_process(message.other_processes, message.figures)
    if own is not None and (figure := Figure.printed(f"{own.bytes} bytes")) is not None:
        rounding = 5 * MIB if own.bytes >= GIB else MIB // 100
        near = replace(figure, low=own.bytes - rounding, high=own.bytes + rounding, stated=False)
        message.figures = {**message.figures, "process_bytes": near}
    figures, notes = with_arithmetic(_without_next_line(message.figures, words))
    if message.kind == "cuda_out_of_memory" and (message.torch_format or "") >= "T4":
        silent = own is not None or "process_bytes" not in figures
        silent = silent and "message_cut" not in message.notes
        notes += ["process_memory_unstated"] if silent else []
    return Facts(
        kind=message.kind,
        torch_format=message.torch_format,
        figures=figures,
        device_index=message.device_index,
        other_processes=tuple(message.other_processes),
        rank=entry.line.rank if entry.line.rank is not None else entry.rank,
        phase=phase_of(frames, before),
        frames=frames,
        exception=message.exception,
        message=words,
        line=entry.number,
        notes=tuple(dict.fromkeys(notes + message.notes)),
        pid=message.pid,
        own_pid=own.pid if own else None,
        details=message.details | (_said(said) if said else {}),
    )


_RUNS_ON = re.compile(r"(?<![\d.])(\d{4,20})\s{2,}(\d+)$")
"""A number at the end of a message, and the digits that begin the text behind an empty line."""


def _without_next_line(figures: Mapping[str, Figure], words: str) -> Mapping[str, Figure]:
    """Return the figures without digits of the following text in the size that was requested."""
    requested, match = figures.get("requested_bytes"), _RUNS_ON.search(words)
    if requested is None or match is None or requested.bytes != int(match[1] + match[2]):
        return figures
    return {**figures, "requested_bytes": Figure(bytes=int(match[1]), low=int(match[1]), high=int(match[1]))}


def _said(words: str) -> dict[str, str]:
    """Return the text of a program, or of a report's title."""
    plain = " ".join(clean(words).split())[:200]
    return _as_reported(plain.lstrip("# ")) if plain.startswith("#") else {"said": plain}


def _as_reported(line: str) -> dict[str, str]:
    """Return the sentence of a report as details, with a sign of its own where it quotes the error."""
    line = sentence_in(line)
    return {"reported": line} | ({"quoted": "yes"} if quotes_error(line) else {})


def _without_title(fatal: list[_Record]) -> list[_Record]:
    """Leave out a report's title if a later failure's line holds the same words."""
    title = next((each for each in fatal if each.facts.line == 1 and each.body.startswith("# ")), None)
    words = title.body.lstrip("# ").strip() if title else ""
    repeated = any(words in each.body for each in fatal if each is not title) if words else False
    return [each for each in fatal if each is not title] if repeated else fatal


def _choose(failures: list[_Record]) -> _Record | None:
    """Return the first failure that ended the run; one that cannot be a consequence, if there is one."""
    fatal = _without_title([record for record in failures if not record.survived])
    order = consequences()

    def place(record: _Record) -> int:
        if "not_oom" in record.facts.details:  # it denies what an exit code alone suggests
            return 1
        return 1 + order.index(record.facts.kind) if record.facts.kind in order else 0

    return min(fatal, key=place, default=None)
