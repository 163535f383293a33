"""Tell the failure of a run from a mere mention of one: a warning, a document, code."""

import functools
import re
from enum import Enum

from tightfit.oomlog.kinds import is_of_allocator, memory_of
from tightfit.oomlog.log_text import Line
from tightfit.oomlog.message import Message
from tightfit.tables import read_table


class Standing(Enum):
    """The part that a message plays in a log, the strongest first."""

    FAILURE = "failure"
    REPORT = "report"
    """A sentence that it happened, without the figures; counts if there is nothing better."""
    CAUGHT = "caught"
    """The program went on: a retry, a skipped batch, a line of a logger at the level of a warning."""
    WARNING = "warning"
    """Python's warnings."""
    DOCUMENT = "document"
    """Advice, a title, an example."""
    NOTICE = "notice"
    """A sentence of a program or a document that names the class of such errors."""
    CODE = "code"
    """A line of a program that names the message."""
    HARMLESS = "harmless"
    """A notice that a part of the program did without the memory."""


PATIENCE = 300
"""Characters of prose up to which a title alone is taken for a report."""
_CODE = re.compile(
    r"\s*(?:\d{1,6}[ :|]{1,8})?(?:-+> ?\d{1,6}[ |]{0,8})?(?:"
    r"(?:raise|assert|if|elif|return|except|catch|with|def|class|throw|while|case)\b[^:]{0,200}[\"'(`]|"
    r"(?:except|raise|catch|isinstance)\b|"
    r"(?:print|expect|self\.\w{1,40}|log(?:ger|ging)?\.\w{1,20}|warnings\.warn|TORCH_CHECK\w{0,20}|AT_ERROR|"
    r"console\.\w{1,20}|\w{1,40}\.append|\w{0,40}Error|\w{0,40}Exception|isinstance|pytest\.raises|re\.\w{1,10})\(|"
    r"//|/\*|[\w.\[\]]{1,60} ?[+=]?= ?[frb(\[]{0,3}[\"'])"
)
_COMMENT = re.compile(r"\s*#(?!\d{1,3} (?:\d+\.\d|ERROR|DONE|CANCELED|\[))")
_FIELD = re.compile(r"[^\n:*]{2,40}:\*\*:? +")
"""A bold label, in any language, of a field in a report of a failure that a program wrote."""
_IN_CODE = re.compile(
    r"[\"'](?: not)? in (?:str|repr|e\b|err|msg|message|ex|exc)|[\"']\.(?:lower|format)\(|isinstance\("
    r"|==? ?[frb]?[\"'] ?$"
)
_WARNS = re.compile(r"\bW[Aa][Rr][Nn](?:ing|ING)?\b:? *$")
_DECORATION = re.compile(r"[\s\"'`*_>~【「『(\[|!❌✗#-]*(?:E {2,8})?[\s\"'`*_>]*")
_TAIL = re.compile(r"[\s\"'`*_.,:;!~）)\]】」』。！？?-]*$")
_WORDS = re.compile(r"[A-Za-z][a-z']+ +[A-Za-z']+ +[A-Za-z']+")


@functools.cache
def _tables() -> dict[str, dict[str, list[str]]]:
    return read_table("tightfit.oomlog", "standing.toml", dict[str, dict[str, list[str]]])


@functools.cache
def _words(table: str) -> re.Pattern[str]:
    """Compile one table of `standing.toml`."""
    found = _tables()[table]
    pattern = "|".join([rf"\b(?:{'|'.join(found['words'])})\b", *found["parts"]])
    return re.compile(pattern, 0 if table in ("first_person", "asking") else re.IGNORECASE)


def _has(table: str, text: str) -> bool:
    return bool(_words(table).search(text))


@functools.cache
def _beginnings() -> re.Pattern[str]:
    return re.compile(rf"[\s*>\[\]-]{{0,8}}(?:{'|'.join(_tables()['retry']['beginnings'])})", re.IGNORECASE)


def goes_on(line: str) -> bool:
    """Return True for a line after a failure by which the program continues.

    >>> goes_on("Reducing batch size to 4"), goes_on("Reducing the batch size did not help.")
    (True, False)
    """
    return bool(_beginnings().match(line)) and not _IN_VAIN.search(line)


_IN_VAIN = re.compile(
    r"\b(?:not|never|no) (?:help|work|fix|solve|change|matter|effect|use|difference|success)"
    r"|\b(?:still|same error|persists?)\b|\b(?:doesn|didn|don|won)'?t\b",
    re.IGNORECASE,
)
"""A person's words for a measure that did not help."""
_TRIED = re.compile(r"\b(?:have|has|I|we|already) (?:already )?tried\b|\btried to\b", re.IGNORECASE)


def standing(
    message: Message, line: Line, column: int, end: int, *, short_log: bool, is_title: bool = False
) -> Standing:
    """Return the standing of a message from `column` to `end` in the line's body; `end` may lie behind it.

    `is_title` is true for a report's first line: its `#` marks a title, not a comment.
    The class of the exception stands before the message, and belongs to `before`.
    """
    before, after = line.body[:column], line.body[end:] if end < len(line.body) else ""
    named = message.exception or ""
    bare = before[: before.rfind(named)] if named and named in before else before
    leads = not _DECORATION.sub("", bare, count=1).strip()
    if (message.kind == "program_words" and _SKIPS.match(line.body, column)) or OF_ITEM.match(line.body):
        return Standing.CAUGHT
    if (aside := _aside(message, line, before, after, is_title=is_title)) is not None:
        return aside
    at_any_level = _fails_at_any_level(message, bare)
    fails = "Traceback (most recent" in after or (leads and named) or at_any_level
    if line.level in ("debug", "info", "warning") and not fails:
        return Standing.CAUGHT
    mine = _has("first_person", bare) or (is_title and "class_without_message" in message.notes)
    if (_has("caught", bare) and not (mine or at_any_level)) or _has("fallback", after[:80]):
        return Standing.CAUGHT
    if message.states_figures or message.kind in ("cuda_async", "nvml_assert"):
        is_told = not leads and not _has("asking", bare) and _has("strict", bare)
        return Standing.DOCUMENT if is_told else Standing.FAILURE
    if message.kind == "program_words" and line.level == "error" and not _has("conditional", before):
        return Standing.FAILURE
    if (is_of_allocator(message.kind) and not message.is_sure) or message.kind == "program_words":
        return _of_plain_words(message, before, after, leads=leads, mine=mine, short_log=short_log)
    is_class = line.body[:end].rstrip().endswith("Error:") and not _WHEN.search(after)
    if leads and (named or _TAIL.match(after) or line.level == "error" or (is_class and not is_title)):
        return Standing.FAILURE
    is_plain = (message.is_sure or message.kind in _SPEAKS_FOR_ITSELF) and not _has("strict", bare)
    if is_plain or not _speaks_of_it(bare, after, named=bool(named), mine=mine):
        return Standing.FAILURE
    is_class = after.startswith(":") if named else is_class
    return Standing.REPORT if is_title and is_class and not _has("conditional", bare) else Standing.DOCUMENT


def _aside(message: Message, line: Line, before: str, after: str, *, is_title: bool) -> Standing | None:
    """Return the standing of a message that tells of no failure, whatever its words are; None for any other."""
    if (message.exception or "").endswith("Warning") or (message.kind != "nccl" and _WARNS.search(before)):
        return Standing.WARNING
    if _is_code(message, line, before, after, is_title=is_title):
        return Standing.CODE
    if message.kind == "program_words" and _NEGATED.search(before):
        return Standing.DOCUMENT
    return Standing.HARMLESS if memory_of(message.kind) == "harmless" else None


_WHEN = re.compile(r"\b(?:when|if|whenever)\b", re.IGNORECASE)
_ERROR_LINE = re.compile(r"\W{0,8}[A-Za-z_][\w.]{0,80}(?:Error|Exception): (?!.{0,200}\b(?:Error|Exception)\b)")
"""The last line of a traceback, whose message goes on."""
_NEGATED = re.compile(r"\b(?:without|never|not|no longer|no)\b[^.\n]{0,12}$", re.IGNORECASE)
"""Words right before a message, which say that it did not come."""


def _speaks_of_it(bare: str, after: str, *, named: bool, mine: bool) -> bool:
    """Return True if the words around a message are about such failures in general."""
    is_condition = _has("conditional", bare)
    if not named and not bare.rstrip().endswith(":"):
        is_condition = is_condition or _has("conditional", after)
    if is_condition and not mine:
        return True
    if named or mine or bare.rstrip().endswith((":", "]", ")", "=")):
        return False
    return bool(_WORDS.search(bare) or _WORDS.search(after))


def _fails_at_any_level(message: Message, before: str) -> bool:
    """Return True for a failure that programs log as less: NCCL's, a lost worker's or rank's, a job's, a full cache."""
    return message.kind in _AT_ANY_LEVEL or (
        message.kind == "host_killed" and ("ailed" in before or "hild process" in before)
    )


_AT_ANY_LEVEL = ("nccl", "worker_lost", "rank_failed", "job_memory_limit", "cache_preemption", "cache_flushes")
_SPEAKS_FOR_ITSELF = frozenset({"host_killed", "dataloader_killed", "shared_memory", "windows_commit_limit", "nccl"})
"""Kinds whose words have no other meaning in a sentence."""


_SKIPS = re.compile(
    r"(?:ran out of memory|OOM)\b[^\n]{0,60}?\b(?:skipp(?:ed|ing)|retrying)\b"
    r"|Attempting to copy inputs of[^\n]{0,160}? to CPU due to CUDA OOM"
    r"|Prediction on device was unsuccessful[^\n]{0,60}?\bMoving results",
    re.IGNORECASE,
)
"""A program's warning that it leaves a batch out, or tries it again."""
OF_ITEM = re.compile(r"\W*(?:failed \()?CUDA out of memory\) on \w", re.IGNORECASE)
"""A program's line on one of its inputs, which it leaves out."""
_PRINTED = re.compile(r"\s*[\w.]{0,60}(?:Error|Exception)\(['\"]")
"""An exception as a program prints it with repr; code that raises one does not know a card's figures."""


def _is_code(message: Message, line: Line, before: str, after: str, *, is_title: bool) -> bool:
    if "total_bytes" in message.figures and _PRINTED.match(line.body):
        return False
    if _CODE.match(line.body) and ("(" in before or '"' in before or "'" in before or not message.states_figures):
        is_raised = message.exception and line.body.lstrip().startswith(message.exception)
        return not is_raised and not _ends_code(message, before)
    is_comment = _COMMENT.match(before) and not is_title and not before.lstrip().startswith(("# [", "##"))
    if is_comment and not message.states_figures:
        return bool(_COMMENT.sub("", before, count=1).strip()) or bool(after.strip())
    if _IN_CODE.search(after[:60]) or _IN_CODE.search(before[-60:]):
        return True
    # An item of a list in a program; JSON's are left alone, where the message follows a key.
    body = line.body.strip()
    return body.endswith(('",', "',")) and body[:2].lstrip("frb")[:1] in ("'", '"') and '": "' not in body


def _ends_code(message: Message, before: str) -> bool:
    """Return True if the exception's name stands right before its message, behind a line of code that raised it."""
    if message.exception is None or before.count('"') % 2:
        return False
    return before.rstrip().endswith(f"{message.exception}:")


def _of_plain_words(message: Message, before: str, after: str, *, leads: bool, mine: bool, short_log: bool) -> Standing:
    """Judge `CUDA out of memory` and nothing else: words that everybody also uses in sentences."""
    ends = bool(_TAIL.match(after)) or after.lstrip(". ").startswith("Tried to")
    if "class_without_message" in message.notes:
        is_value = _has("labels", before) or (ends and _FIELD.fullmatch(before))
        if (leads and (ends or after.lstrip().startswith("Traceback"))) or is_value:
            return Standing.FAILURE
        if mine and not _has("conditional", before):
            return Standing.REPORT
        return Standing.NOTICE if _WORDS.search(before) or _WORDS.search(after) else Standing.CODE
    errs = bool(message.exception) or bool(re.search(r"\b[Ee]rror:? *$|\bERROR:? *$", before))
    errs = errs or bool(_ERROR_LINE.match(before))
    if errs and leads and (ends or after.startswith(".")):
        return Standing.FAILURE
    if errs and ends and not _has("conditional", before):
        return Standing.FAILURE
    if (mine or errs) and not re.search(r"\bif\b|如果|場合|\bto avoid\b|\bmay\b|\bmight\b", before, re.IGNORECASE):
        return Standing.REPORT
    if short_log and _TRIED.search(after) and _IN_VAIN.search(after):
        return Standing.REPORT
    return Standing.REPORT if short_log and leads else Standing.DOCUMENT
