"""Tell the failure of a run from a mere mention of one: a warning, a document, code."""

import re
from enum import Enum

from tightfit.oomlog.log_text import Line
from tightfit.oomlog.message import Message


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
    CODE = "code"
    """A line of a program that names the message."""


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
_COMMENT = re.compile(r"\s*#")
_IN_CODE = re.compile(
    r"[\"'](?: not)? in (?:str|repr|e\b|err|msg|message|ex|exc)|[\"']\.(?:lower|format)\(|isinstance\("
    r"|==? ?[frb]?[\"'] ?$"
)
_CONDITIONAL = re.compile(
    r"\b(?:if|when|whenever|may|might|could|can|avoids?|prevents?|such as|e\.g\.|like|typical(?:ly)?|common(?:ly)?|"
    r"in case|examples?|would|causes?|should|often|usually|fix(?:es|ed)?|solve[sd]?|handles?|how to|troubleshooting|"
    r"sometimes|means|instead of|to reduce|try)\b|"
    r"如果|若是|万一|遇到.{0,12}时|避免|防止|例如|解决|可能|場合|避け|防ぐ|防止|たとえば|例えば|とき|対処|かもしれ|ことが(?:ある|あり)",
    re.IGNORECASE,
)
_STRICT = re.compile(
    r"\b(?:if you|if your|in case|e\.g\.|for example|for instance|such as|may see|might see|may get|typical(?:ly)?|"
    r"an error like|errors? like|to avoid|to fix|looks? like(?: this)?:?|you (?:will|would|can|could|may"
    r"|might) (?:see|get))\b|"
    r"如果|例如|比如|たとえば|例えば|場合",
    re.IGNORECASE,
)
_FIRST_PERSON = re.compile(
    r"\b(?:I|I'm|I've|my|me|we|our|got|get|gets|getting|gives|throws|raised|received|occurs?|occurred|following|"
    r"fails?|failed|crash(?:es|ed)?|help|keeps?|Same)\b|我|报错|報錯|出现|提示|错误|求助|怎么|请问|エラーが|出ます|出ました|なりました|発生し|落ち|助けて|出て"
)
_ASKING = re.compile(r"\b(?:I|I'm|I've|my|me|we|our)\b|我|私|请问|求助")
_CAUGHT = re.compile(
    r"\b(?:caught|skipp(?:ed|ing)|retry(?:ing)?|retries|ignor(?:ed|ing)|recover\w{0,6}|handled|warning"
    r"|fall(?:ing)? ?back)\b",
    re.IGNORECASE,
)
RETRY = re.compile(
    r"[\s*>\[\]-]{0,8}(?:(?:Decreas|Reduc|Lower|Halv)ing (?:the )?(?:micro[- _]?|mini[- _]?)?batch"
    r"|Decreasing batch size to|"
    r"Trying (?:again )?(?:with )?batch|Retry(?:ing)?\b|Trying again|Skipping (?:this |the )?(?:batch|step)"
    r"|Recovered|Recovering|"
    r"Falling back|batch size (?:reduced|halved|too large)|Reduced batch|OOM recovered|Got OOM|Continuing with)",
    re.IGNORECASE,
)
"""A line after a failure by which the program goes on."""
_WARNS = re.compile(r"\bW[Aa][Rr][Nn](?:ing|ING)?\b:? *$")
_DECORATION = re.compile(r"[\s\"'`*_>~【「『(\[|!❌✗#-]*(?:E {2,8})?[\s\"'`*_>]*")
_TAIL = re.compile(r"[\s\"'`*_.,:;!~）)\]】」』。！？?-]*$")
_WORDS = re.compile(r"[A-Za-z][a-z']+ +[A-Za-z']+ +[A-Za-z']+")


def standing(message: Message, line: Line, column: int, end: int, *, short_log: bool) -> Standing:
    """Return the standing of a message from `column` to `end` in the line's body; `end` may lie behind it.

    The class of the exception stands before the message, and belongs to `before`.
    """
    before, after = line.body[:column], line.body[end:] if end < len(line.body) else ""
    named = message.exception or ""
    bare = before[: before.rfind(named)] if named and named in before else before
    leads = not _DECORATION.sub("", bare, count=1).strip()
    if named.endswith("Warning") or (message.kind != "nccl" and _WARNS.search(before)):
        return Standing.WARNING
    if _is_code(message, line, before, after):
        return Standing.CODE
    if line.level in ("debug", "info", "warning") and not (leads and named) and message.kind != "nccl":
        return Standing.CAUGHT
    mine = bool(_FIRST_PERSON.search(bare))
    if _CAUGHT.search(bare) and not mine:
        return Standing.CAUGHT
    if message.states_figures or message.kind in ("cuda_async", "nvml_assert"):
        return (
            Standing.DOCUMENT if not leads and not _ASKING.search(bare) and _STRICT.search(bare) else Standing.FAILURE
        )
    if message.kind.endswith("out_of_memory") and "request_beyond_1eb" not in message.notes:
        return _of_plain_words(message, before, after, leads=leads, mine=mine, short_log=short_log)
    if leads and (named or _TAIL.match(after) or line.level == "error"):
        return Standing.FAILURE
    if message.kind in _SPEAKS_FOR_ITSELF and not _STRICT.search(bare):
        return Standing.FAILURE
    if (
        _CONDITIONAL.search(bare) or (not named and not bare.rstrip().endswith(":") and _CONDITIONAL.search(after))
    ) and not mine:
        return Standing.DOCUMENT
    if named or mine or bare.rstrip().endswith((":", "]", ")", "=")):
        return Standing.FAILURE
    return Standing.DOCUMENT if _WORDS.search(bare) or _WORDS.search(after) else Standing.FAILURE


_SPEAKS_FOR_ITSELF = frozenset({"host_killed", "dataloader_killed", "shared_memory", "windows_commit_limit", "nccl"})
"""Kinds whose words have no other meaning in a sentence."""


def _is_code(message: Message, line: Line, before: str, after: str) -> bool:
    if _CODE.match(line.body) and ("(" in before or '"' in before or "'" in before or not message.states_figures):
        return not (message.exception and line.body.lstrip().startswith(message.exception))
    if _COMMENT.match(before) and not message.states_figures and not before.lstrip().startswith(("# [", "##")):
        return bool(_COMMENT.sub("", before, count=1).strip()) or bool(after.strip())
    if _IN_CODE.search(after[:60]) or _IN_CODE.search(before[-60:]):
        return True
    # An item of a list in a program; JSON's are left alone, where the message follows a key.
    body = line.body.strip()
    return body.endswith(('",', "',")) and body[:2].lstrip("frb")[:1] in ("'", '"') and '": "' not in body


def _of_plain_words(message: Message, before: str, after: str, *, leads: bool, mine: bool, short_log: bool) -> Standing:
    """Judge `CUDA out of memory` and nothing else: words that everybody also uses in sentences."""
    ends = bool(_TAIL.match(after)) or after.lstrip(". ").startswith("Tried to")
    if "class_without_message" in message.notes:
        if leads and ends:
            return Standing.FAILURE
        return Standing.REPORT if mine and not _CONDITIONAL.search(before) else Standing.CODE
    errs = bool(message.exception) or bool(re.search(r"\b[Ee]rror:? *$|\bERROR:? *$", before))
    if errs and leads and (ends or after.startswith(".")):
        return Standing.FAILURE
    if errs and ends and not _CONDITIONAL.search(before):
        return Standing.FAILURE
    if (mine or errs) and not re.search(r"\bif\b|如果|場合|\bto avoid\b|\bmay\b|\bmight\b", before, re.IGNORECASE):
        return Standing.REPORT
    return Standing.REPORT if short_log and leads else Standing.DOCUMENT
