"""A log as clean lines: decoding, control codes, and the prefixes of loggers, launchers and mailers."""

import codecs
import html
import itertools
import re
from collections.abc import Iterator
from typing import IO

import msgspec

PIECE = 2**18
"""Characters read at a time."""
LONGEST_LINE = 8_000
"""Characters of a line; the rest becomes further lines."""
_ANSI = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,40}[ -/]{0,10}[@-~]|\x1b\][^\x07\x1b\n]{0,2000}(?:\x07|\x1b\\)|\x1b[ -/]?[0-~]"
)
_BARE_COLOUR = re.compile(r"(?:[␛?]|#033)\[[0-9;]{0,12}m")
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffe\uffff\ud800-\udfff]"
)
_UNPRINTED = re.compile(r"[\x01-\x06\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f]")
"""Control codes without those that logs have: bells, line ends, colours."""
_RAW_INDEX = re.compile(r"GPU ([\x01-\x08\x0b\x0c\x0e-\x1f]) has a total")
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")
_BOLD = re.compile(r"(?:(?<=\s)|^)\*\*(?=[\dA-Z])|(?<=[\dB.r])\*\*(?=[\s:,.;)]|$)|(?<=[A-Z]{3})\*\*(?=[A-Z]{3})")
"""Markdown's, around figures and words; not Python's powers and keywords."""
_WIDE = str.maketrans("（）；：，．＝\xa0\u3000│┃║", "();:,.=     ")
"""Translators' punctuation, spaces, and the frames that rich draws around tracebacks."""
_ESCAPED = re.compile(r"\\n(?:  |Traceback|[A-Za-z_.]{1,60}Error|\\n|\[rank)|Error: .{0,400}?\\n")


def pieces(source: str | bytes | IO[bytes] | IO[str]) -> Iterator[str]:
    """Yield the text in pieces that end with a line, or are PIECE long; memory never holds more than a few.

    The last piece is no smaller than the others, so that it holds the end of a log with the lines before it.
    """
    rest = waiting = ""
    for text in _decoded(source):
        if "\x00" in text:  # UTF-16 read as something else, or a cut file
            text = text.replace("\x00", "")
        rest += text
        if "\x1b" in rest:  # a colour in the middle of the words that are looked for
            rest = _ANSI.sub("", rest)
        cut = rest.rfind("\n") + 1
        if not cut:
            if len(rest) < 4 * PIECE:
                continue
            cut = len(rest)
        if waiting:
            yield waiting
        waiting, rest = rest[:cut], rest[cut:]
    if waiting or rest:
        yield waiting + rest


_TITLE = re.compile(
    r"(?![#>|\[{(<*$%\d-]|Traceback|File |\S*\w=\S)(?=[^\n]{8,160}\n[ \t]*\n)"
    r"(?![^\n]*(?:ried to alloc|Error: |\b(?:INFO|WARNING|DEBUG|ERROR)\b|[{(,;:=]\s*\n))"
    r"(?:[^\n]*?[A-Za-z]{2,}){3}"
)
"""A first line of words, with nothing in the next one."""
_OF_REPORT = re.compile(r"(?m)^#{2,4} |^```|^!\[|^\*\*\w|\b(?:I|I'm|I've|my|we)\b")
_OPENING = 3000


def titled(text: str) -> str:
    """Return a person's report with its title marked as such; any other text as it is.

    >>> titled("OOM in the third epoch\\n\\nI train on a card of 8 GB.\\n").partition("\\n")[0]
    '# OOM in the third epoch'
    """
    is_report = _TITLE.match(text) and _OF_REPORT.search(text, text.find("\n"), _OPENING)
    return f"# {text}" if is_report else text


def _decoded(source: str | bytes | IO[bytes] | IO[str]) -> Iterator[str]:
    if isinstance(source, str):
        for start in range(0, len(source), PIECE):
            yield source[start : start + PIECE]
        return
    raw = _raw(source)
    first = next(raw, b"")
    decoder = codecs.getincrementaldecoder(_encoding(first))(errors="replace")
    yield decoder.decode(first)
    for block in raw:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _raw(source: bytes | IO[bytes] | IO[str]) -> Iterator[bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        for start in range(0, len(source), PIECE):
            yield bytes(source[start : start + PIECE])
        return
    while block := source.read(PIECE):
        # A text stream is taken, too: the caller's sys.stdin, for example.
        yield block.encode("utf-8", "surrogatepass") if isinstance(block, str) else block


def _encoding(first: bytes) -> str:
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    start = first[:4096]
    if len(start) >= 4 and start.count(0) > len(start) // 4:  # Windows' redirection, without its mark
        return "utf-16-le" if start[1::2].count(0) >= start[::2].count(0) else "utf-16-be"
    return "utf-8-sig"


def is_text(start: str) -> bool:
    """True unless more than one character in twenty is a control code that no terminal would get.

    >>> is_text("iter 0: loss 10.9"), is_text("PK" + "".join(map(chr, range(1, 7))))
    (True, False)
    """
    return 20 * len(_UNPRINTED.findall(start)) <= len(start)


def lower(text: str) -> str:
    """Return `text` in small letters, with every character at its place."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else "".join(each.lower()[:1] for each in text)


def clean(text: str) -> str:
    """Remove control codes; tabs and line ends stay.

    >>> clean("\\x1b[31mCUDA\\x1b[0m out\\r")
    'CUDA out\\n'
    """
    text = _RAW_INDEX.sub(lambda match: f"GPU #{ord(match[1])} has a total", text)
    if "\x1b" in text or "\x9b" in text:
        text = _ANSI.sub("", text)
    if "[0m" in text or "[31m" in text or "#033[" in text:
        text = _BARE_COLOUR.sub("", text)
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    if "&" in text and (";" in text):
        text = _CONTROL.sub("", html.unescape(text))
    return text.translate(_WIDE) if not text.isascii() else text


_RANKS = re.compile(r" (?=\[rank\d{1,6}\]:)")
"""The place between two lines of ranks that a paste joined."""
_ROW = re.compile(r"\s*(?:\|\s*){1,4}(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,\d]*)\s*\|(.*?)\|?\s*$")
"""A row of a table of log lines, as a web page prints them: its time, and its text."""
_LINK = re.compile(r"\[([^\]\n]{1,400})\]\(https?://[^)\s]{1,400}\)")
"""A link of Markdown; Colab makes one of each file's name in a traceback."""


_MISREAD = (
    (re.compile(r"\b0ut(?=Of| of)"), "Out"),
    (re.compile(r"\b(?:rn|m)em[o0]ry\b"), "memory"),
    (re.compile(r"\bMem0ry"), "Memory"),
    (re.compile(r"\bPyT0rch\b"), "PyTorch"),
    (re.compile(r"MemoryErr0r\b"), "MemoryError"),
    (re.compile(r"\b0f memory\b"), "of memory"),
    (re.compile(r"\ba(?!ll)[lI1]{2}ocat(?=e|ion)"), "allocat"),
    (re.compile(r"\ba(?:[I1]|l1|11)ready\b"), "already"),
    (re.compile(r"\btota[1I] by\b"), "total by"),
    (re.compile(r"\b[l1]f reserved\b"), "If reserved"),
    (re.compile(r"\bGPU [Oo](?=;| has)"), "GPU 0"),
    (re.compile(r"\bGPU [lI](?=;| has)"), "GPU 1"),
)
"""Words of PyTorch's message as programs read them from a picture, which take O for 0, l for 1, and rn for m."""
_MISREAD_SIZE = re.compile(
    r"(?<![\w.])[\dOolI]{1,4}[.,][\dOolI]{1,2}(?= ?[KMG]iB)|(?<=\bProcess )[\dOolI]{2,9}(?= has)"
)
_AS_DIGITS = str.maketrans("OolI,", "0011.")


def well_read(line: str) -> str:
    """Return a line of PyTorch's message without the mistakes of a program that read it from a picture.

    >>> well_read("CUDA out of rnemory. Tried to al1ocate l.50 GiB (GPU O; 1.Ol GiB free)")
    'CUDA out of memory. Tried to allocate 1.50 GiB (GPU 0; 1.01 GiB free)'
    """
    for pattern, word in _MISREAD:
        line = pattern.sub(word, line)
    return _MISREAD_SIZE.sub(lambda size: size[0].translate(_AS_DIGITS), line)


def lines_of(text: str) -> list[str]:
    """Return the clean lines of a piece of log; a line that holds escaped ones, like in JSON, is taken apart."""
    lines: list[str] = []
    for raw in text.split("\n"):
        for line in (
            (raw,)
            if raw.isascii() and raw.isprintable() and "&" not in raw and "#033[" not in raw
            else clean(raw).split("\n")
        ):
            if line.rstrip().endswith("|") and (row := _ROW.match(line)):
                line = row[2]
            if "](http" in line:
                line = _LINK.sub(r"\1", line)
            if line.count("[rank") > 1:
                lines += _RANKS.split(line[:200_000])
                continue
            if "**" in line:
                line = _BOLD.sub("", line)
            if "iB" in line or "rnemory" in line:
                line = well_read(line)
            if "\\n" in line and _ESCAPED.search(line[:200_000]):
                inner = line.replace("\\\\n", "\\n").replace('\\"', '"').replace("\\t", "\t")
                inner = clean(_UNICODE.sub(lambda match: chr(int(match[1], 16)), inner)).replace("\\n", "\n")
                lines += [each[:LONGEST_LINE] for each in inner.split("\n")]
            else:
                lines += [line[at : at + LONGEST_LINE] for at in range(0, max(len(line), 1), LONGEST_LINE)]
    return lines


class Line(msgspec.Struct, frozen=True):
    """One line without the prefix of its logger or launcher."""

    body: str
    """The text behind the prefix, with its indentation."""
    rank: int | None = None
    """The rank that the prefix names."""
    level: str | None = None
    """debug, info, warning or error."""
    prefix: str = ""
    """The text that was taken off."""
    quoted: bool = False
    """True if a `>` was taken off."""


_LEVELS = {"warn": "warning", "critical": "error", "fatal": "error"}
"""Levels that are known by another name."""
_RANK = re.compile(
    r"\[(?:rank|default) ?(?P<a>\d{1,6})\]:? ?|\(\w{0,20}[Ww]orker\w{0,20}?(?:_?TP|_DP\d{1,4}_TP"
    r"| rank=)(?P<b>\d{1,6})[^)\n]{0,60}\) ?"
    r"|\[\d{1,4},(?P<c>\d{1,6})\]<std\w{2,4}>:? ?|\[?[Rr][Aa][Nn][Kk](?:[ =#-]|: ?)?(?P<d>\d{1,6})\]?(?:[:|]|\]) ?"
    r"|\(\w{1,30} pid=\d{1,9}\) ?"
    r"| {0,3}(?P<e>\d{1,4}): (?=(?:Traceback|  ?File|    |torch|Runtime|\w{1,40}Error|\[rank\d))"
)
_TIME = re.compile(
    r"\[?(?:(?:\d{2}(?:\d{2})?[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4})[T _|]{0,2})?"
    r"\d{1,2}:\d{2}:\d{2}(?:[.,]\d{1,9})?(?:Z|[+-]\d{2}:?\d{2}"
    r"| [AP]M)?[\]|]?[:,-]? ?(?:-(?: |$))?"
    r"|\[?\d{4}[-/]\d{2}[-/]\d{2}\]? |[A-Z][a-z]{2} [ \d]\d \d{2}:\d{2}:\d{2} |\d{2}-\d{2} (?=\d{2}:)"
    r"|\d{4} \d{2}:\d{2}:\d{2}"
    r"|\d{1,3}\.\d{2}\.\d{3}\.\d{3} (?:[DIWE] )?"
)
_LEVEL = re.compile(
    r"(?:[\[<|(]|\| )?(?P<level>DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)(?: *[\]>|)])?(?::[A-Za-z_][\w.]{0,60}:"
    r"|[:\s|/-]| *$)[ -]*"
)
_SOURCE = re.compile(
    r"\[?[\w./-]{1,60}\.(?:py|cpp|cc|go|rs):\d{1,6}\b(?! in [\w<])\]? ?:?|\[(?:stderr|stdout|err|out)\] ?"
    r"|[IWEF]\d{4} \d\d:\d\d:\d\d\.\d{1,9} +\d{1,20} [\w.-]{1,60}:\d{1,6}\] ?"
    r"|[\w.-]{1,40} {1,6}\| |"
    r"std(?:err|out) [FP] |[\w.-]{1,40} [\w.-]{1,40}\[\d{1,8}\]: |\[[\w.:/ -]{1,40}\] ?(?:- )?(?=\S)|(?:stdout"
    r"|stderr)/(?=[A-Z])|- (?=\S)|[\w.-]{1,40}\[\d{1,8}\]: |\[pid=\d{1,8}\] ?"
)
_QUOTE = re.compile(r" {0,3}(?:> ?|&gt; ?)+")
_ORDER = (_RANK, _TIME, _LEVEL, _SOURCE)


def part(line: str) -> Line:
    """Split a line from its prefix; spaces that indent code are kept.

    >>> part("[rank3]:   File x"), part("> 2025-01-02 03:04:05,678 - ERROR - CUDA out").level
    (Line(body='  File x', rank=3, level=None, prefix='[rank3]: ', quoted=False), 'error')
    """
    at = 0
    rank: int | None = None
    level: str | None = None
    quoted = False
    for _ in range(8):
        begin = at
        match = _QUOTE.match(line, at)
        if match:
            quoted, at = True, match.end()
        spaces = len(line) - len(line[at:].lstrip(" ")) if at else at
        for pattern in _ORDER:
            match = pattern.match(line, at)
            if match is None and pattern is not _RANK and spaces > at and spaces - at <= 2:
                match = pattern.match(line, spaces)
            if match is None or match.end() == at:
                continue
            found = match.groupdict()
            if pattern is _RANK:
                number = next((value for value in found.values() if value), None)
                is_named = match[0].startswith("[rank")  # behind [default3], a number on one machine
                rank = int(number) if number and (rank is None or is_named) else rank
            elif pattern is _LEVEL:
                word = found["level"].lower()
                level = level or _LEVELS.get(word, word)
            at = match.end()
            break
        if at == begin:
            break
    return Line(line[at:], rank, level, line[:at], quoted)


def without_rank(line: str) -> str:
    """Return a line without the rank or the process that a launcher writes before it.

    >>> without_rank("[rank0]:   File x"), without_rank("12:00:01 - step 1")
    ('  File x', '12:00:01 - step 1')
    """
    while match := _RANK.match(line):
        line = line[match.end() :]
    return line


_SAMPLE = 400
"""Lines from a log's beginning of which all must have a prefix."""
_MARK = re.compile(r"[|*;](?: |$)")
"""A mark that stands before each line of a quotation."""


def without_shared_prefix(parts: Iterator[str]) -> Iterator[str]:
    """Yield the pieces of a log without the prefix that all its lines have: a wrapper's, which tells of none.

    Ranks stay. A level that all lines have tells no error from the rest.

    >>> list(without_shared_prefix(iter(["12:00:01 - INFO - step 1\\n12:00:09 - INFO - step 2\\n"])))
    ['step 1\\nstep 2\\n']
    >>> list(without_shared_prefix(iter(["12:00:01 ERROR [a.py:3] step 1\\n12:00:09 ERROR [a.py:4] step 2\\n"])))
    ['step 1\\nstep 2\\n']
    """
    pattern: re.Pattern[str] | None = None
    for number, text in enumerate(parts):
        if not number and _is_numbered(text):
            pattern = _NUMBER
        elif not number and (prefix := _shared_prefix(text)):
            pattern = _pattern_of(prefix)
        yield pattern.sub("", text) if pattern else text


_NUMBER = re.compile(r"(?m)^\d{1,7}[:-]")
"""The number of a line, as grep -n prints it; a line of its context has a hyphen."""
_FEWEST_NUMBERED = 3


def _is_numbered(text: str) -> bool:
    """Return True if all lines of a piece begin with numbers that rise: those of the lines, and of no ranks."""
    lines = [line for line in text.split("\n", _SAMPLE)[:_SAMPLE] if line.strip()]
    numbers = [int(match[0][:-1]) for match in map(_NUMBER.match, lines) if match]
    rises = all(one < two for one, two in itertools.pairwise(numbers))
    return len(numbers) == len(lines) >= _FEWEST_NUMBERED and rises


def _masked(text: str) -> str:
    return re.sub(r"\d+", "0", text)


def _shared_prefix(text: str) -> str:
    """Return the prefix of all lines of a piece, with each number as 0; empty if they have none."""
    lines = [line for line in text.split("\n", _SAMPLE)[:_SAMPLE] if line.strip()]
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
    r"(?:[\W\d_]|(?<=\d)[TZ]|\b(?:INFO|DEBUG|WARN(?:ING)?|ERROR)\b|\b[A-Za-z]\w* pid=\d+|\b[a-z]\w*\.py:\d+)+"
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
