"""A log in which no format names a failure: its last words, its title or a person's sentences name one."""

import re
from collections.abc import Callable, Sequence

from msgspec import Struct

from tightfit.oomlog.cut_message import begun_message
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.last_words import (
    advises,
    cpu_words_in,
    error_at_end,
    host_words_in,
    is_of_job,
    is_told,
    last_words,
    mentioned_in,
    met_in,
    reported_in,
    shortened,
    tells_of_failure,
    titled_error,
)
from tightfit.oomlog.log_record import Record, as_reported, ran_out
from tightfit.oomlog.log_text import is_text, lines_of, part
from tightfit.oomlog.standing import Standing
from tightfit.oomlog.tracebacks import frames_of, phase_of

TOLD = (
    "incomplete",
    "begun",
    "memory_words",
    "reported",
    "mentioned",
    "host_memory_error",
    "host_killed",
    "rank_failed",
)
"""Kinds of failures that no format names."""
_REPORT = 2_000
"""Characters of a text that is a person's report if its title names the failure and nothing in it advises."""
_PROSE = 20_000
"""Characters of a report, of which any line that names a lack of memory is taken as what failed."""
_OF_RUN = re.compile(r"\d%\|[█▏▎▍▌▋▊▉# ]|\d(?:it/s|s/it)\b|(?m:^\s*\$ \w)")
"""A progress bar, or a command at a shell's prompt: a report with one is of a run, and no document."""
_TITLES = 4_000
"""Characters in which a report's title is looked for."""
_OF_LAUNCHER = re.compile(r"subprocess\.CalledProcessError: Command .*\.py\b.* returned non-zero exit status 1\.?$")
"""A launcher's report of the program that it started: that program's own error is not in it."""
_LAST_LINES = 400
_CUT_OFF = ("incomplete", "")
"""Last words of a log that ends in the middle of its work."""

_Found = tuple[str, str]
"""The kind of nothing, and the line that decided for it."""


class Unnamed(Struct):
    """The text of a log of which no message is a failure."""

    head: str
    ending: str
    size: int
    records: Sequence[Record]

    def kind(self) -> tuple[str, str]:
        """Return the kind of a log without a failure, and the line that decides; the surest sign first."""
        signs: tuple[Callable[[], _Found | None], ...] = (
            self._empty,
            self._survived,
            self._in_last_words,
            self._met_on_the_host,
            self._met_by_a_person,
            self._warned_of,
            self._in_prose,
            self._in_a_title,
            self._at_the_end,
        )
        found = next(filter(None, (sign() for sign in signs)), None)
        return found or (("told" if tells_of_failure(self.head[:_REPORT]) else "nothing"), "")

    def facts(self, kind: str, evidence: str, *, line: int) -> Facts:
        """Return the facts of a failure that no format names: its last words, and its traceback."""
        lines = self._last_lines()
        frames = frames_of(lines)
        if kind in ("reported", "mentioned"):
            kind, details = "program_words", as_reported(evidence)
        elif kind in ("host_memory_error", "host_killed"):
            details = {"reported": evidence} | ({"job": "yes"} if is_of_job(evidence) else {})
        elif kind == "incomplete" and evidence == "MemoryError":  # Python's own, so of the host
            kind, details = "host_memory_error", {"header_alone": "yes"}
        elif kind == "begun":
            kind, details = "incomplete", {"said": evidence, "begun": "yes"}
        else:
            details = {"said": shortened(evidence)} if evidence else {}
        return Facts(kind=kind, frames=frames, phase=phase_of(frames, lines), details=details, line=line)

    def _empty(self) -> _Found | None:
        return None if self.head.strip() else ("empty", "")

    def _survived(self) -> _Found | None:
        """Return the last lack of memory that the program handled."""
        for record in reversed(self.records):
            if (record.survived or record.standing is Standing.CAUGHT) and ran_out(record):
                return "caught", record.body
        return None

    def _in_last_words(self) -> _Found | None:
        """Return the last words of the log; its title where they name nothing of memory."""
        last = self._last()
        if last == _CUT_OFF and (told := host_words_in(lines_of(self.head[:_TITLES])[:1])) is not None:
            return told
        title = reported_in(lines_of(self.head[:_TITLES])) if last is None or last[0] == "incomplete" else None
        if title is not None and (self._has_frames() or self._is_short_report()):
            return cpu_words_in(lines_of(self.head)) or ("reported", title)
        return last

    def _last(self) -> _Found | None:
        """Return the last words of the log, as an error of memory where they name one, or begin to."""
        last = last_words(lines_of(self.ending)[-_LAST_LINES:])
        if last is not None and last[0] in ("other_error", "incomplete") and (begun := begun_message(self.ending)):
            return "begun", begun
        if last is not None and last[0] == "other_error" and _OF_LAUNCHER.match(last[1]):
            return "rank_failed", last[1]
        if last is not None and last[0] == "other_error" and not self.records and mentioned_in([last[1]]):
            last = ("memory_words", last[1])
        if last is not None and any(record.body == last[1] for record in self._harmless()):
            return None
        if last is not None and last[0] == "memory_words" and (is_told(last[1]) or self._titles_a_card(last[1])):
            return "reported", last[1].strip(" #")
        return last

    def _harmless(self) -> list[Record]:
        """Return the messages that tell of no failure, whatever their words are."""
        return [record for record in self.records if record.standing is Standing.HARMLESS]

    def _titles_a_card(self, words: str) -> bool:
        """Return True for the title of a person's report of a card's memory, in words of no library."""
        title = self.head.lstrip().partition("\n")[0]
        is_title = title.startswith("# ") and words.strip(" #") == title.strip(" #")
        return is_title and self._is_short_report() and reported_in(lines_of(self.head[:_TITLES])) is not None

    def _met_on_the_host(self) -> _Found | None:
        """Return the sentence in which a person tells that the host's memory ran out, in words that leave no doubt."""
        return cpu_words_in(lines_of(self.head)) if self.size < _PROSE else None

    def _met_by_a_person(self) -> _Found | None:
        """Return the sentence in which a person tells of the failure."""
        met = met_in(lines_of(self.head)) if self.size < _PROSE else None
        return None if met is None else ("reported", met)

    def _warned_of(self) -> _Found | None:
        """Return the first message that was no failure, or one that was survived."""
        for record in self.records:
            if record.standing is Standing.FAILURE:
                return "survived_error", record.body
            if record.standing is not Standing.CAUGHT or ran_out(record):
                return record.standing.value, record.body
        return None

    def _in_prose(self) -> _Found | None:
        """Return a mention of memory in a short text; the host's counts before one that a person does not report."""
        if self.size >= _PROSE:
            return None
        told, mention = host_words_in(lines_of(self.head)), mentioned_in(lines_of(self.head))
        if mention is None or (told is not None and not mention[1]):
            return told
        return ("mentioned" if mention[1] else "memory_words"), mention[0]

    def _in_a_title(self) -> _Found | None:
        line = titled_error(self.head) if self.size < _PROSE else None
        return None if line is None else ("other_error", line)

    def _at_the_end(self) -> _Found | None:
        """Return an error without its end; of a file that is no text, that."""
        if not is_text(self.head):
            return "binary", ""
        line = error_at_end(self.ending)
        return None if line is None else ("cut_error", line)

    def _is_short_report(self) -> bool:
        """Return True for a short text, or one that shows a run, without code, warnings and chapters of advice."""
        shows_run = _OF_RUN.search(self.head)
        most = _PROSE if shows_run else _REPORT
        if self.size >= most or any(each.standing is not Standing.DOCUMENT for each in self.records):
            return False
        lines = lines_of(self.head)
        return not advises([each for each in lines if each.startswith("#")] if shows_run else lines)

    def _last_lines(self) -> list[str]:
        return [part(line).body for line in lines_of(self.ending)[-_LAST_LINES:]]

    def _has_frames(self) -> bool:
        """Return True if a traceback, or a part of one, is in the end of the log."""
        return bool(frames_of(self._last_lines()))
