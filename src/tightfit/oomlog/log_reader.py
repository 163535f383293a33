"""A whole log, of any size: every failure in it, and the one that matters.

The log is read once, in pieces. Plain searches for a few words decide which lines are looked at; around those,
lines are cleaned, parted by rank, and joined without white space for `messages`.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import IO

from msgspec import Struct
from msgspec.structs import replace

from tightfit.oomlog.allocator_messages import REACH
from tightfit.oomlog.counted_lines import advanced, counters_of
from tightfit.oomlog.cut_message import completed, last_line
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.kinds import status_of
from tightfit.oomlog.last_words import (
    last_words,
    quotes_error,
    reported_in,
    shortened,
    told_in,
)
from tightfit.oomlog.log_lines import BEFORE, Entry, Stream, entries_of, regions_of, streams_of
from tightfit.oomlog.log_record import (
    SURVIVED,
    Other,
    Record,
    as_reported,
    chosen_of,
    facts_of,
    follows_from,
    goes_on_with_next,
    in_brief,
    is_failure_beside,
    is_of,
    is_title,
    own_class,
    ran_out,
    with_facts,
)
from tightfit.oomlog.log_text import lines_of, part, pieces, titled, without_rank
from tightfit.oomlog.log_wrapping import without_shared_prefix
from tightfit.oomlog.message import Message
from tightfit.oomlog.messages import messages_in
from tightfit.oomlog.number_ends import with_own_number
from tightfit.oomlog.places import with_card, with_rank
from tightfit.oomlog.printed import READ, Printed, printed_in
from tightfit.oomlog.run_facts import RunFacts, run_facts_in
from tightfit.oomlog.same_failure import (
    behind_header,
    complete_each_other,
    is_general_for,
    is_header_of,
    is_of_xla,
    is_same,
    is_work_of,
    joined,
    later_format,
    names_shape_of,
    stated_in,
    with_work,
)
from tightfit.oomlog.standing import PATIENCE, Standing, goes_on, standing
from tightfit.oomlog.tracebacks import TraceFrame, frames_behind, frames_of, is_cut, is_warm_up, phase_of
from tightfit.oomlog.unnamed_failure import TOLD, Unnamed

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
    "it/s",
    "s/it]",
    ": loss ",
    "loss=",
    "loss: ",
    "'loss':",
    "train loss",
    "n_slots =",
    "server is listening",
)
_DONE = re.compile(
    r"\bPrompt executed in \d|\b\d+ epochs? completed\b|\b[Rr]esults saved\b|\b[Tt]raining (?:is )?"
    r"(?:complete[d]?|finished|done)\b|\b[Mm]odel (?:was )?saved (?:to|in)\b|\b[Ss]aved (?:to|in) \S"
    r"|['\"]train_runtime['\"]|\b(?:finished|exited|ended) with (?:exit )?code 0\b|\bexit(?: code|ed)?:? 0\b"
)
"""Words by which a program tells that its work was done, some time after it handled a failure."""
_RETRIED = re.compile(
    r"(?:\bto|\bwith|\bat|\bnow|=|→|->) ?(?:a )?(?:micro[-_ ]?|mini[-_ ]?)?batch(?:[-_ ]size)?(?: of)?[ =:]{1,3}"
    r"(\d{1,6})\b"
    r"|\bbatch(?:[-_ ]size)? (?:was )?(?:reduced|lowered|decreased|halved)?(?: from \d{1,6})? ?to (\d{1,6})\b",
    re.IGNORECASE,
)
"""The smaller batch with which a program tries again."""
_RUN_START = ("number of parameters:", "tokens per iteration will be", "$ python", "$ torchrun", "# python", "> python")
_WIDE_LINE = 120
"""Columns before a message, from which on a progress bar or another line stands before it."""
_HEAD, _TAIL = 28_000, 16_000
"""Characters of a long log's beginning and end that are looked through for what the program prints of its run."""
_TITLE = 3
"""Lines of a log of which one may be a report's title: what happened stands behind it."""
_REPORTS = re.compile(r"\bOOM: Ran out of memory with exception\b")
"""fairseq's line on any lack of memory, those that it does not survive, too."""
_RECOVERS = re.compile(r"\brecover from OOM\b")
_FAILED_LATER = re.compile(
    r"\b(?:the |my )?training (?:\w+ ){0,2}(?:fail(?:s|ed)|crash(?:es|ed)|stop(?:s|ped)|die[sd])\b", re.IGNORECASE
)
"""A person's words for the end of a run that handled a lack of memory at first."""
_CRASHED = re.compile(_RECOVERS.pattern + r"|\bProcess \S{1,40} terminated with\b|\bChildFailedError\b")
"""Words before the last traceback of a run that went on at first."""
_TRACEBACK = "Traceback (most recent call last)"
_CUT = "traceback_cut"
"""The note of a failure whose traceback stands behind its name, without the message that ends it."""
_COUNTED = 2**14
"""Characters behind a failure, up to the next one, in which counts are compared."""


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
    retried_batch: int | None = None
    """The last smaller batch with which the program tried again, where it prints one and then went on."""

    @property
    def status(self) -> str:
        """A key of the table `status` in codes.toml."""
        if self.failure is not None and _UNSHOWN & self.failure.details.keys():
            return "cause_not_shown"
        return status_of(self.failure.kind if self.failure else None, self.kind_of_nothing)


def read_log(source: str | bytes | IO[bytes] | IO[str]) -> LogReading:
    """Read a log, or a pasted message with anything around it; never raises, whatever the text is."""
    scan = _Scan()
    before, current = "", ""
    for number, piece in enumerate(without_shared_prefix(pieces(source))):
        piece = piece if number else titled(piece)
        if current:
            scan.look_at(before, current, piece[:_AFTER])
            before = (before + current)[-BEFORE:]
        current = piece
    scan.look_at(before, current, "", last=True)
    return scan.reading()


class _Scan:
    """Everything found so far."""

    def __init__(self) -> None:
        self.records: list[Record] = []
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
        if record.counters and record.advanced < SURVIVED:
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
        messages = (with_own_number(each, stream) for each in messages_in(stream.joined))
        found = sorted([*messages, *stream.line_bound()], key=lambda message: message.start)
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
        message.exception = own_class(entry.line.body[:column], message.exception)
        titles = entry.number == 1 and (entry.line.body.startswith("# ") or _is_set_off(stream.entries[index + 1 :]))
        stand = standing(message, entry.line, column, finish, short_log=self._size < PATIENCE, is_title=titles)
        following = stream.entries[index + 1 : index + 13]
        if stand is Standing.FAILURE and not titles and any(goes_on(later.line.body) for later in following):
            stand = Standing.CAUGHT
        frames: tuple[TraceFrame, ...] = ()
        before: list[str] = []
        is_before = False
        behind = [each.line.body for each in stream.entries[index + 1 : index + 40]]
        is_read = stand in (Standing.FAILURE, Standing.REPORT, Standing.CAUGHT) and self._stacks < _STACKS
        if is_read:
            self._stacks += 1
            before = stream.before(index, earlier)
        if is_read and stand is not Standing.CAUGHT:
            frames = frames_of(before)
            is_before = bool(frames)
            frames = frames or frames_behind(behind, anywhere=titles)
        words = stream.words(message, index, column, finish)
        said = entry.line.body[max(column - 60, 0) :] if message.kind == "program_words" else ""
        body = entry.line.body[max(column - 80, 0) :] if column > _WIDE_LINE else entry.line.body
        told = told_in(entry.line.body) if said and stand is Standing.REPORT else ""
        is_told = bool(told) and not quotes_error(told)
        facts = with_card(facts_of(message, entry, words, frames, before, "" if is_told else said), entry.line)
        if is_told:
            facts = replace(facts, details={**facts.details, **as_reported(shortened(told))})
        if frames and not is_before and (is_cut(behind) or _TRACEBACK in entry.line.body[column:]):
            facts = replace(facts, notes=(*facts.notes, _CUT))
        if facts.phase is None and not frames and entry.number <= _TITLE and is_warm_up(behind):
            facts = replace(facts, phase="warmup")
        record = Record(facts, stand, body[:300], closed=titles, counters=counters_of(before))
        self._add(record, titles=titles)

    def _add(self, found: Record, *, titles: bool) -> None:
        """Keep a failure, or count it as a repetition; lines behind a report's title are not progress after it."""
        facts, stand = found.facts, found.standing
        for record in reversed(self.records[-60:]):
            over = record.survived and stand is not Standing.CAUGHT
            if stand is Standing.CAUGHT and not record.survived and names_shape_of(facts, record.facts):
                return
            if record.standing is stand and not over and is_same(record.facts, facts):
                known = record.facts
                record.closed = record.closed and titles
                if is_header_of(known, facts):
                    record.facts = behind_header(known, facts)
                    return
                if is_work_of(facts, known):
                    record.facts = with_work(known, facts)
                    return
                better = facts if facts.frames and not known.frames else known
                is_first_less = is_general_for(known, facts) or is_of_xla(known, facts)
                is_first_less = is_first_less or (not known.figures and bool(facts.figures))
                if is_first_less:  # it says only that it failed
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
                    details={**_limits_of(record.facts), **known.details, **facts.details},
                    notes=_notes_of(known, facts, better),
                    exception=known.exception or facts.exception,
                    torch_format=later_format(known, facts),
                )
                return
        self.records.append(found)

    def reading(self) -> LogReading:
        failures = [record for record in self.records if record.standing is Standing.FAILURE]
        chosen = chosen_of(failures) or next((each for each in self.records if each.standing is Standing.REPORT), None)
        chosen = chosen or self._failed_afterwards()
        rest = [record for record in self.records if not is_of(record, chosen)]
        others = tuple(map(in_brief, rest[:100]))
        apart = [
            record
            for record in rest
            if chosen is None
            or not (is_title(record) or record.facts.line == chosen.facts.line or follows_from(record, chosen))
        ]
        count = self.uncounted + sum(map(is_failure_beside, apart))
        context = printed_in("\n".join(lines_of(self._head)))
        run = self._run() if failures or chosen else RunFacts()
        if chosen:
            chosen = self._with_cut_traceback(chosen)
            failure = with_rank(self._as_printed(chosen.facts), [part(each).body for each in lines_of(self._ending)])
            return LogReading(failure=failure, others=others, others_count=count, context=context, run=run)
        unnamed = Unnamed(_without_ranks(self._head), _without_ranks(self._ending), self._size, self.records)
        nothing, evidence = unnamed.kind()
        if nothing in TOLD:
            failure = unnamed.facts(nothing, evidence, line=self._lines + 1)
            return LogReading(failure=failure, others=others, others_count=count, context=context, run=self._run())
        caught = [
            each for each in self.records if (each.standing is Standing.CAUGHT or each.survived) and ran_out(each)
        ]
        return LogReading(
            failure=None,
            others=others,
            others_count=count,
            context=context,
            kind_of_nothing=nothing,
            evidence=evidence,
            caught=caught[-1].facts if caught else None,
            went_on=any(map(self._went_on, caught)),
            retried_batch=self._retried_batch(caught[-1]) if caught else None,
        )

    def _with_cut_traceback(self, chosen: Record) -> Record:
        """Return a sentence on a failure with the traceback that the report ends with, whose end is cut off."""
        if chosen.standing is not Standing.REPORT or chosen.facts.frames:
            return chosen
        lines = [part(each).body for each in lines_of(self._ending)]
        frames = frames_of(lines)
        if not frames:
            return chosen
        return replace(chosen, facts=replace(chosen.facts, frames=frames, phase=phase_of(frames, lines)))

    def _retried_batch(self, record: Record) -> int | None:
        """Return the last batch that the program names behind a failure that it handled."""
        behind = self._ending[max(self._ending.rfind(record.body[:60]), 0) :]
        sizes = [int(one or two) for one, two in _RETRIED.findall(behind)]
        return sizes[-1] if sizes and self._went_on(record) else None

    def _run(self) -> RunFacts:
        """Return the program's own words on its run, on lines with a rank or an error's level before them, too."""
        return run_facts_in(_without_ranks("\n".join(lines_of(self._both_ends()))))

    def _both_ends(self) -> str:
        if self._size <= _HEAD + _TAIL:
            return self._head
        return self._head[:_HEAD] + "\n" + self._ending[-_TAIL:]

    def _went_on(self, record: Record) -> bool:
        """Return True if progress follows a failure; behind a traceback, more than a progress bar's last lines."""
        behind = self._ending[self._ending.rfind(record.body[:60]) :]
        least = SURVIVED if _TRACEBACK in behind else 1
        is_done = record.standing is Standing.CAUGHT and _DONE.search(behind, len(record.body)) is not None
        return is_done or record.progress >= least or record.advanced > 0 or goes_on_with_next(record)

    def _failed_afterwards(self) -> Record | None:
        """Return an out of memory that the program handled, if it shows no progress after it and ends with an error."""
        handled = [each for each in self.records if each.standing is Standing.CAUGHT and not each.survived]
        last = last_words(lines_of(self._ending)[-400:], with_lines_before=False) if handled else None
        record = handled[-1] if handled else None
        if record is None or record.progress or record.advanced:
            return None
        behind = self._ending[self._ending.rfind(record.body[:60]) :]
        is_told = _REPORTS.search(record.body) or _FAILED_LATER.search(behind)
        if is_told and not _RECOVERS.search(behind):
            return with_facts(record, record.facts)
        is_cut_off = last is None or last[0] == "incomplete"
        if is_cut_off and _CRASHED.search(behind) and _TRACEBACK in behind:
            return with_facts(record, replace(record.facts, notes=(*record.facts.notes, "failed_afterwards_cut")))
        if last is None or last[1][:60] in record.body:
            return None
        if self._ending.rfind(last[1][:60]) < self._ending.rfind(record.body[:60]):
            is_the_matter = self._head.startswith("# ") and reported_in(lines_of(self._head[:4000])) is not None
            return record if is_the_matter else None
        details = dict(record.facts.details) | {"afterwards": " ".join(last[1].split())}
        notes = (*record.facts.notes, "failed_afterwards")
        return with_facts(record, replace(record.facts, notes=notes, details=details))

    def _as_printed(self, facts: Facts) -> Facts:
        """Return a failure without the words that were added to its message where the log ends."""
        if not self._missing or facts.line <= self._lines or facts.figures:
            return facts
        printed = last_line(self._ending)
        message = facts.message if facts.message in printed else printed
        return replace(facts, message=message, notes=(*facts.notes, "log_ends_within"))


def _is_set_off(following: Sequence[Entry]) -> bool:
    """Return True if an empty line stands below a log's first line: it is a report's title, and no part of the log."""
    return bool(following) and not following[0].line.body.strip()


def _notes_of(known: Facts, facts: Facts, framed: Facts) -> tuple[str, ...]:
    """Return the notes of two messages of one failure; `framed` is the one with the traceback, which may be cut."""
    notes = tuple(each for each in known.notes if each != _CUT or each in facts.notes)
    return (*notes, _CUT) if framed is facts and _CUT in facts.notes and _CUT not in notes else notes


def _limits_of(facts: Facts) -> dict[str, str]:
    """Return the limit of a container that the kernel's first line on a killed process prints."""
    return {name: value for name, value in facts.details.items() if name == "memcg"}


def _without_ranks(text: str) -> str:
    return "\n".join(map(without_rank, text.split("\n")))
