"""A log as clean lines: decoding, control codes, and the prefixes of loggers, launchers and mailers."""

import codecs
import html
import re
from collections.abc import Iterator
from typing import IO

import msgspec

from tightfit.oomlog.log_repair import apart, recased, well_read

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
_WIDE = str.maketrans("（）；：，．＝\xa0\u3000│┃║“”„’‘", '();:,.=     """\'\'')
"""Translators' and word processors' punctuation, spaces, and the frames that rich draws around tracebacks."""
_ESCAPED = re.compile(r"\\n(?:  |Traceback|[A-Za-z_.]{1,60}Error|\\n|\[rank)|Error: .{0,400}?\\n")


def pieces(source: str | bytes | IO[bytes] | IO[str]) -> Iterator[str]:
    """Yield the text in pieces that end with a line, or are PIECE long; memory never holds more than a few.

    The last piece is no smaller than the others, so that it holds the end of a log with the lines before it.
    """
    rest = waiting = ""
    for text in _decoded(source):
        if "\x00" in text:  # UTF-16 read as something else, or a cut file
            text = text.replace("\x00", "")
        rest += text if rest or waiting else text.removeprefix("\ufeff")
        if "\r\n" in rest:
            rest = rest.replace("\r\n", "\n")
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
_ABOVE_TITLE = re.compile(
    r"(?:(?!# |```|Traceback|\s*File |[ \t]|(?:import|from|def|class|if|for) |[^\n]*(?:Error|emory|[=(]))"
    r"[^\n]{0,100}\n){1,8}"
    r"(?=# (?=[^\n]{8,160}\n)(?:[^\n]*?[A-Za-z]{2,}){3})"
)
"""Lines of words above a report's title: neither code nor a log."""
_OF_REPORT = re.compile(r"(?m)^#{2,4} |^```|^!\[|^\*\*\w|\b(?:I|I'm|I've|my|we)\b")
_OPENING = 3000


def titled(text: str) -> str:
    """Return a person's report with its title marked as such; any other text as it is.

    >>> titled("OOM in the third epoch\\n\\nI train on a card of 8 GB.\\n").partition("\\n")[0]
    '# OOM in the third epoch'
    """
    if above := _ABOVE_TITLE.match(text):  # a page's labels and dates
        title, end, rest = text[above.end() :].partition("\n")
        return f"{title}{end}{above[0]}{rest}"
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
            if '", line ' in line and "\\n" not in line and len(frames := apart(line[:200_000])) > 1:
                lines += frames
                continue
            if "**" in line:
                line = _BOLD.sub("", line)
            if line.islower() or line.isupper():
                line = recased(line)
            if "iB" in line or "rnemory" in line or " of me" in line or "off memory" in line:
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
    r"std(?:err|out) [FP] |[\w.-]{1,40} [\w.-]{1,40}\[\d{1,8}\]: "
    r"|\[(?!\d{1,3}\] ?\+? *\d+ killed)[\w.:/ -]{1,40}\] ?(?:- )?(?=\S)|(?:stdout|stderr)/(?=[A-Z])"
    r"|- (?=\S)|[\w.-]{1,40}\[\d{1,8}\]: |\[pid=\d{1,8}\] ?|\(Process\) "
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
