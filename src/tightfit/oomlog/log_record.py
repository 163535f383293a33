"""A message in a log with its standing: the facts that it states, and the one of several that ended the run."""

from collections.abc import Callable

from msgspec import Struct, field
from msgspec.structs import replace

from tightfit.oomlog.counted_lines import Counts
from tightfit.oomlog.facts import Facts, Figure, with_arithmetic
from tightfit.oomlog.kinds import consequences, goes_on_after, memory_of
from tightfit.oomlog.last_words import quotes_error, sentence_in, shortened
from tightfit.oomlog.log_lines import Entry
from tightfit.oomlog.log_text import clean
from tightfit.oomlog.message import Message
from tightfit.oomlog.ownership import own_process
from tightfit.oomlog.standing import OF_ITEM, Standing
from tightfit.oomlog.tracebacks import TraceFrame, phase_of
from tightfit.units import GIB, MIB

SURVIVED = 3
"""Lines of progress after a failure that show it was survived; a progress bar is redrawn once or twice at the end."""


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


class Record(Struct):
    """A message, its standing and the progress that the log shows after it."""

    facts: Facts
    standing: Standing
    body: str
    progress: int = 0
    closed: bool = False
    """True if another run starts behind it."""
    counters: dict[str, Counts] = field(default_factory=dict)
    """Counts of the lines of progress before it, by their text."""
    advanced: int = 0
    """Later lines with higher counts."""

    @property
    def survived(self) -> bool:
        # Behind a traceback, another process may have counted on to the next step before it was ended.
        return self.progress >= SURVIVED or self.advanced > bool(self.facts.frames)


_NO_MEMORY = ("none", "unshown")
"""Memory of kinds of messages that do not tell of a lack of any."""


def ran_out(record: Record) -> bool:
    """Return True if a message is of memory that ran out, not of a setting or another error that was warned of."""
    return memory_of(record.facts.kind) not in _NO_MEMORY and record.facts.kind != "vllm_sequence_too_long"


def with_facts(record: Record, facts: Facts) -> Record:
    """Return a failure with other facts."""
    return Record(facts, Standing.FAILURE, record.body, record.progress, record.closed)


def goes_on_with_next(record: Record) -> bool:
    """Return True for the same line on a second input: the program went on after the first."""
    return record.facts.repeats > 1 and bool(OF_ITEM.match(record.body))


def is_of(record: Record, chosen: Record | None) -> bool:
    """Return True for the chosen failure itself, also where it was handled first."""
    if chosen is None or record is chosen:
        return record is chosen
    return record.standing is Standing.CAUGHT and record.facts.line == chosen.facts.line


def is_failure_beside(record: Record) -> bool:
    """Return True for another failure, False for a launcher's report of the chosen one."""
    is_failure = record.standing in (Standing.FAILURE, Standing.CAUGHT) and not goes_on_after(record.facts.kind)
    return is_failure and memory_of(record.facts.kind) != "unshown"


_ENDS_CONTEXT = ("device_assert", "illegal_access", "launch_failed")
"""Failures after which every later call on the card fails, too."""


def follows_from(record: Record, chosen: Record) -> bool:
    """Return True for a program's own words on memory behind a failure that ended its use of the card."""
    is_behind = record.facts.line > chosen.facts.line
    return chosen.facts.kind in _ENDS_CONTEXT and is_behind and record.facts.kind in consequences()


def in_brief(record: Record) -> Other:
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


def _without_title(fatal: list[Record]) -> list[Record]:
    """Leave out a report's title if a later failure's line holds the same words, or the only size."""
    title = next(filter(is_title, fatal), None)
    words = title.body.lstrip("# ").strip() if title else ""
    rest = [each for each in fatal if each is not title]
    repeated = any(words in each.body for each in rest) if words else False
    is_shown = title is not None and (
        any(_is_fuller(each, title) for each in rest)
        or ("total_bytes" not in title.facts.figures and any(map(_states_more(title), rest)))
    )
    return rest if repeated or is_shown else fatal


def is_title(record: Record) -> bool:
    """Return True for the title of a report, which names the failure that its text shows."""
    return record.facts.line == 1 and record.body.startswith("# ")


def _is_fuller(record: Record, title: Record) -> bool:
    """Return True for a message of the title's request on the same card that states more of its memory."""
    own, its = title.facts.figures, record.facts.figures
    same = all(name in own and name in its and own[name].bytes == its[name].bytes for name in _OF_A_REQUEST)
    return same and "allocated_bytes" in its and "allocated_bytes" not in own


_OF_A_REQUEST = ("requested_bytes", "total_bytes")


def _states_more(title: Record) -> Callable[[Record], bool]:
    """Return the test for memory that ran out with the card's figures, or with a size where the title states none."""
    name = "total_bytes" if title.facts.figures else None

    def states(record: Record) -> bool:
        figures = record.facts.figures
        is_shown = bool(figures) if name is None else name in figures
        return is_shown and ran_out(record) and record.facts.kind not in consequences()

    return states


def chosen_of(failures: list[Record]) -> Record | None:
    """Return the first failure that ended the run; one that cannot be a consequence, if there is one."""
    fatal = _without_title([record for record in failures if not record.survived])
    order = consequences()

    def place(record: Record) -> int:
        if "not_oom" in record.facts.details:  # it denies what an exit code alone suggests
            return 1
        kind = "worker_lost" if "left" in record.facts.details else record.facts.kind  # its reason is not in its words
        return 1 + order.index(kind) if kind in order else 0

    return min(fatal, key=place, default=None)


def own_class(before: str, named: str | None) -> str | None:
    """Return the name of an exception as its line has it: without white space, the line before is joined to it.

    >>> own_class("torch.OutOfMemoryError: ", "bashtorch.OutOfMemoryError")
    'torch.OutOfMemoryError'
    """
    last = before.rstrip(": ").rpartition(" ")[2]
    return last if named and last and named not in before and named.endswith(last) else named


def facts_of(
    message: Message, entry: Entry, words: str, frames: tuple[TraceFrame, ...], before: list[str], said: str
) -> Facts:
    """Return the facts of a message, with its words as printed, and the frames and lines before it."""
    own = own_process(message.other_processes, message.figures)
    if own is not None and (figure := Figure.printed(f"{own.bytes} bytes")) is not None:
        rounding = 5 * MIB if own.bytes >= GIB else MIB // 100
        near = replace(figure, low=own.bytes - rounding, high=own.bytes + rounding, stated=False)
        message.figures = {**message.figures, "process_bytes": near}
    figures, notes = with_arithmetic(message.figures)
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


def _said(words: str) -> dict[str, str]:
    """Return the text of a program, or of a report's title."""
    plain = shortened(" ".join(clean(words).split()))
    return as_reported(plain.lstrip("# ")) if plain.startswith("#") else {"said": plain}


def as_reported(line: str) -> dict[str, str]:
    """Return the sentence of a report as details, with a sign of its own where it quotes the error."""
    line = sentence_in(line)
    return {"reported": line} | ({"quoted": "yes"} if quotes_error(line) else {})
