"""The wrapping that all lines of a log share: the name of a container or a logger, numbers, empty lines between."""

import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial

import msgspec

from tightfit.oomlog.log_text import Line, part

_SAMPLE = 400
"""Lines from a log's beginning of which all must have a prefix."""
_MARK = re.compile(r"[|*;](?: |$)")
"""A mark that stands before each line of a quotation."""


def without_shared_prefix(parts: Iterator[str]) -> Iterator[str]:
    """Yield the pieces of a log without what wraps all its lines: a prefix that tells of none, empty lines between.

    Ranks stay. A level that all lines have tells no error from the rest.

    >>> list(without_shared_prefix(iter(["12:00:01 - INFO - step 1\\n12:00:09 - INFO - step 2\\n"])))
    ['step 1\\nstep 2\\n']
    >>> list(without_shared_prefix(iter(["12:00:01 ERROR [a.py:3] step 1\\n12:00:09 ERROR [a.py:4] step 2\\n"])))
    ['step 1\\nstep 2\\n']
    >>> list(without_shared_prefix(iter(["trainer-1  | step 1\\ntrainer-1  |   File x\\n"])))
    ['trainer-1  | step 1\\n  File x\\n']
    """
    unwraps: list[_Unwrap] = []
    for number, text in enumerate(parts):
        if number:
            for unwrap in unwraps:
                text = unwrap(text)
        else:
            text, unwraps = _unwrapped(text)
        yield _IGNORED.sub(_if_of_memory, text) if "Exception ignored" in text else text


_IGNORED = re.compile(
    r"(?m)^Exception ignored (?:in|while|on)\b[^\n]*\n"
    r"(?:Traceback \(most recent[^\n]*\n(?:[ \t][^\n]*\n)*(?:[^ \t\n][^\n]*(?:\n|\Z))?)?"
)
"""A traceback of an exception that Python ignored: of an object that was deleted at the end, mostly."""


def _if_of_memory(ignored: re.Match[str]) -> str:
    return ignored[0] if "emory" in ignored[0] else ""


_Unwrap = Callable[[str], str]
"""Takes one wrapping off the lines of a piece."""


_LAYERS = 3
"""Wrappings around one another: a container's, a launcher's, and a logger's."""


def _unwrapped(text: str) -> tuple[str, list[_Unwrap]]:
    """Return a log's first piece without its wrappings, and what takes them off the others.

    The name of a program or a container stays on the first line: it may be all that tells which program it was.
    """
    found: list[_Unwrap] = []
    text = _without_fence(text)
    while len(found) < _LAYERS and (unwrap := _wrapping(text)):
        found.append(unwrap)
        text = unwrap(text)
    lines = [line for line in text.split("\n", _SAMPLE)[:_SAMPLE] if line.strip()]
    if name := _name_before(lines):
        found.append(partial(_pattern_of(_masked(name)).sub, ""))
        first, end, others = text.partition("\n")
        text = f"{first}{end}{found[-1](others)}"
    return text, found


def _without_fence(text: str) -> str:
    """Return a text without the marks of code that stand around all of it.

    >>> _without_fence("```text\\nstep 1\\nstep 2\\n```\\n")
    'step 1\\nstep 2\\n'
    """
    opened = _FENCE.match(text)
    if opened is None or text.count("```") > 2:
        return text
    inside, closed, behind = text[opened.end() :].rpartition("```")
    return inside if closed and not behind.strip() else text


_FENCE = re.compile(r"\A\s*```[\w+-]*[ \t]*\n")


def _wrapping(text: str) -> _Unwrap | None:
    """Return what takes the outermost wrapping off all lines; None if there is none."""
    lines = [line for line in text.split("\n", _SAMPLE)[:_SAMPLE] if line.strip()]
    if lines and all(_message_of(line) is not None for line in lines):
        return _of_messages
    if lines and all(map(_CELLS.match, lines)):
        return _of_cells
    if broken := _broken_at(lines):
        return partial(broken.sub, r"\1")
    if _is_double_spaced(text):
        return partial(_EMPTY_BETWEEN.sub, "\n")
    if _is_numbered(lines):
        return partial(_NUMBER.sub, "")
    if len(lines) >= _FEWEST_NUMBERED and all(map(_TASK.match, lines)):
        return partial(_TASK.sub, r"[rank\1]: ")
    if indentation := _indentation_of(lines):
        return partial(re.compile(rf"(?m)^{indentation}").sub, "")
    if prefix := _stream_before(lines) or _shared_prefix(lines):
        return partial(_pattern_of(prefix).sub, "")
    return None


def _indentation_of(lines: list[str]) -> str:
    """Return the spaces before all lines; empty for one line, and for code that begins with a comment."""
    if len(lines) < 2 or lines[0].lstrip().startswith("#"):
        return ""
    return re.sub(r"\S.*", "", _beginning_of([f"{line}x" for line in lines]))


_MESSAGES = ("log", "message", "msg", "textPayload", "@message", "text")
"""Keys under which loggers and containers write a line into a JSON object."""
_CELLS = re.compile(r'[^,"\n]{4,80}(?:,[^,"\n]{0,80}){0,6},"((?:[^"]|"")*)"\s*$')
"""A row of comma-separated values of which the last is a line."""


def _message_of(line: str) -> str | None:
    """Return the line that a JSON object on one line holds; None for any other line.

    >>> _message_of('{"log": "step 1\\\\n", "stream": "stderr"}'), _message_of('{"loss": 1.0}')
    ('step 1\\n', None)
    """
    if not line.startswith("{"):
        return None
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeError):
        return None
    return next((fields[key] for key in _MESSAGES if isinstance(fields.get(key), str)), None)


def _of_messages(text: str) -> str:
    """Return a piece whose lines are JSON objects with the lines that they hold."""
    found = ((_message_of(line), line) for line in text.split("\n"))
    return "\n".join(line if message is None else message.removesuffix("\n") for message, line in found)


def _of_cells(text: str) -> str:
    """Return a piece whose lines are rows of a table with the lines that these hold."""
    rows = ((_CELLS.match(line), line) for line in text.split("\n"))
    return "\n".join(row[1].replace('""', '"') if row else line for row, line in rows)


_NARROWEST, _WIDEST = 60, 400
_FEWEST_FULL = 3
_NOT_BROKEN = re.compile(r"[^\w.,:;/\\()'\"\[=^~ -]$|([-=~^. ])\1$|\d%\||(?:it/s|s/it)")
"""A line of a table, a rule or a progress bar: these are as long as one another anyhow."""


_USUAL_WIDTHS = (80, 100, 120, 132)
_GOES_ON = r"[a-z\d_.,:;)\]'/(=](?!orch\.)"
"""The beginning of a line that no message has, and no line of prose."""


def _broken_at(lines: list[str]) -> re.Pattern[str] | None:
    """Return the pattern of a line that a terminal broke, with the end of the line; None if it seems to have none.

    Several lines of the greatest length tell of a terminal's width, or one of a usual width that goes on in the next.
    """
    width = max(map(len, lines), default=0)
    full = {line for line in lines if len(line) == width}
    kinds = set(map(_masked, full))  # lines of one form are as long as one another anyhow
    if any(map(_NOT_BROKEN.search, full)) or not _NARROWEST <= width <= _WIDEST:
        return None
    if len(kinds) >= _FEWEST_FULL:
        return re.compile(rf"(?m)^(.{{{width}}})\n(?=[^\n\[])")
    one = re.compile(rf"(?m)^(.{{{width}}})\n(?={_GOES_ON})")
    return one if width in _USUAL_WIDTHS and one.search("\n".join(lines)) else None


_EMPTY_BETWEEN = re.compile(r"\n[ \t]*\n")
_TASK = re.compile(r"(?m)^ {0,4}(\d{1,4}): ?(?!\d)")
"""The number of a task, as `srun --label` prints it."""
_FEWEST_SPACED = 3
"""Lines of text that tell."""


def _is_double_spaced(text: str) -> bool:
    """Return True if each second line is empty, and few others are: a paste doubled the ends of lines."""
    lines = text.strip("\n").split("\n", _SAMPLE)[:_SAMPLE]
    full = [line for line in lines[::2] if line.strip()]
    return len(full) >= _FEWEST_SPACED and 4 * len(full) > len(lines) and not any(map(str.strip, lines[1::2]))


_JOURNAL = r"(?:[A-Z][a-z]{2} {1,2}\d{1,2} [\d:]{8} )?[\w.-]{1,60} "
_STREAM = re.compile(rf"std(?:err|out)(?:: | [FP] )|{_JOURNAL}(?:python[\d.]*|bash|sh)\[\d{{1,9}}\]: ")
"""A stream's name before a line, and an interpreter's in the journal: they tell nothing."""
_NAME = re.compile(
    r"[A-Za-z][\w.-]{0,60} {1,8}\| "  # docker compose
    r"|\[pod/[^\]\n]{1,160}\] "  # kubectl logs --prefix
    rf"|{_JOURNAL}(?!kernel|systemd)[\w./-]{{1,40}}\[\d{{1,9}}\]: "
)
"""The name of a container, a pod or a program before a line."""


def _stream_before(lines: list[str]) -> str:
    """Return the same stream's name before all lines, with each number as 0; empty if they have none."""
    return _masked(_before_all(lines, _STREAM))


def _name_before(lines: list[str]) -> str:
    """Return the same name of a program or a container before all lines; empty if they have none."""
    return _before_all(lines, _NAME)


def _before_all(lines: list[str], form: re.Pattern[str]) -> str:
    first = form.match(lines[0]) if lines else None
    if first is None:
        return ""
    pattern = _pattern_of(_masked(first[0]))
    return first[0] if all(map(pattern.match, lines)) else ""


_NUMBER = re.compile(r"(?m)^\d{1,7}[:-]")
"""The number of a line, as grep -n prints it; a line of its context has a hyphen."""
_FEWEST_NUMBERED = 3


def _is_numbered(lines: list[str]) -> bool:
    """Return True if all lines begin with numbers that rise: those of the lines, and of no ranks."""
    numbers = [int(match[0][:-1]) for match in map(_NUMBER.match, lines) if match]
    rises = all(one < two for one, two in itertools.pairwise(numbers))
    return len(numbers) == len(lines) >= _FEWEST_NUMBERED and rises


def _masked(text: str) -> str:
    return re.sub(r"\d+", "0", text)


def _shared_prefix(lines: list[str]) -> str:
    """Return the prefix of all lines, with each number as 0; empty if they have none."""
    parted = [_wrapped(line) for line in lines]
    first = parted[0].prefix if len(lines) > 1 else ""
    if not first.strip() or parted[0].rank is not None:
        return ""
    masks = [_masked(each.prefix) for each in parted if each.body.strip()]
    shared = _beginning_of(masks)
    shared = shared if shared in masks else shared[: shared.rfind(" ") + 1]
    while shared and not _OF_WRAPPER.fullmatch(shared):
        shared = shared[: shared.rstrip().rfind(" ") + 1]
    if not shared.strip() or not all(_masked(line).startswith(shared.rstrip()) for line in lines):
        return ""
    pattern = _pattern_of(shared)
    left = (part(pattern.sub("", line)).body for line in lines)
    cut = (one.removesuffix(two.body.lstrip()) for one, two in zip(left, parted, strict=True))
    return shared if _MARK.match(first) or not any(re.search(r"\w", each) for each in cut) else ""


def _beginning_of(texts: list[str]) -> str:
    """Return the characters with which all texts begin."""
    first, last = min(texts, default=""), max(texts, default="")
    length = next((at for at, both in enumerate(zip(first, last, strict=False)) if both[0] != both[1]), len(first))
    return first[:length]


_OF_WRAPPER = re.compile(
    r"(?:[\W\d_]|(?<=\d)[TZ]|\b(?:INFO|DEBUG|WARN(?:ING)?|ERROR|Error|Process)\b|\b[A-Za-z]\w* pid=\d+"
    r"|\b[a-z]\w*\.py:\d+)+"
)
"""Times, levels, processes and lines of code: any other name in a prefix is evidence."""


def _pattern_of(prefix: str) -> re.Pattern[str]:
    """Return the pattern of a prefix at the beginning of a line; lines without text lack its last spaces."""
    plain = re.sub(r"0", lambda _: r"\d+", re.escape(prefix.rstrip()))
    return re.compile(rf"(?m)^{plain}(?:{' ' * (len(prefix) - len(prefix.rstrip()))}| *$)")


def _wrapped(line: str) -> Line:
    """Return a line without a mark of quotation, or without the prefix of a logger."""
    mark = _MARK.match(line)
    return Line(line[mark.end() :], prefix=mark[0]) if mark else part(line)
