"""Fixes that the user has already: the report prints their lines, switch or smaller number, and the run failed."""

import re

from tightfit.diagnosis.own_options import SMALLER, is_on
from tightfit.diagnosis.remedies import Remedy, Resized
from tightfit.diagnosis.report_words import shows, sign

_SHORT_LINE = 12
"""Characters up to which a line may stand in a log by chance."""


def is_done(remedy: Remedy, text: str) -> bool:
    """Return True if a report shows that the user has a remedy already."""
    return _stands(remedy, text) or _raises(remedy, text) or is_on(remedy.code, text)


def _stands(remedy: Remedy, text: str) -> bool:
    """Return True if all lines of a remedy stand in the report."""
    text = sign("switches.printed_hint").sub("", text)
    if isinstance(remedy.change, Resized):  # it is smaller than the batch that failed
        return False
    if remedy.code == "no_gradients" and shows(text, "subject.lacks_no_grad"):  # it is what the report proposes
        return False
    if remedy.code == "offload" and shows(text, "switches.pipeline_on_card"):
        return False
    lines = [line.partition("  #")[0].strip() for line in remedy.paste if not line.endswith(SMALLER)]
    return bool(lines) and all(
        len(line) > _SHORT_LINE and (_is_last(line, text) or _is_set(line, text)) for line in lines
    )


_ASSIGNED = re.compile(r"(-{0,2}[A-Za-z_][\w.-]* ?[=: ] ?)[\d(\[]")


def _is_last(line: str, text: str) -> bool:
    """Return True if a text has a line; of an option with several values, the last is the run's."""
    option = _ASSIGNED.match(line)
    return text.startswith(line, text.rfind(option[1])) if option and option[1] in text else line in text


_OPTION = re.compile(r"(--[A-Za-z][\w-]*)[= ](\d+)\b")
_BY_LESS = frozenset({"smaller_picture", "smaller_inputs", "less_at_once", "fewer_environments", "eval_batch"})
"""Remedies by a smaller number."""


def _raises(remedy: Remedy, text: str) -> bool:
    """Return True if the report prints an option of a remedy's lines with a number that is as small already."""
    if remedy.code not in _BY_LESS or not remedy.page:  # the user's own options come without a page
        return False
    for name, value in _OPTION.findall("\n".join(remedy.paste)):
        printed = re.findall(rf"(?<![\w-]){re.escape(name)}[= ]{{1,3}}(\d{{1,6}})\b", text)
        if printed and int(printed[-1]) <= int(value):
            return True
    return False


_VARIABLE = re.compile(r"(?:export|set) (\w+)=(\w+)")


def _is_set(line: str, text: str) -> bool:
    """Return True if the report sets the variable of a shell's line, or a command's options, to the same value."""
    found = _VARIABLE.fullmatch(line)
    if found is not None:
        return bool(re.search(rf"\b{found[1]}\W{{1,8}}{found[2]}\b", text))
    _, dots, options = line.partition(" ... ")
    options = options if dots else _SCRIPT.sub("", line)
    is_of_script = bool(dots) or options != line
    if not is_of_script and not _OPTIONS_ONLY.fullmatch(line):
        return False
    return options.startswith("-") and all(_has(each, text) for each in _OPTIONS.findall(options))


_SCRIPT = re.compile(r"python3? \S+\.py (?=--)")
"""The command before the options of a line."""
_OPTIONS_ONLY = re.compile(r"(?:--[A-Za-z][\w-]*(?:[ =][^\s\"'=-]\S*)?(?:\s+|$))+")
"""A line of nothing but options, none of them in quotation marks."""
_OPTIONS = re.compile(r"(--?[A-Za-z][\w-]*)(?:[ =]([^\s-]\S*))?")


def _has(option: tuple[str, str], text: str) -> bool:
    """Return True if a text has an option with its value, which a shell may need quotes for."""
    name, value = option
    behind = rf"[ =][\"']?{re.escape(value)}(?![\w.*])" if value else r"(?![\w-])"
    return bool(re.search(rf"(?<!\S){re.escape(name)}{behind}", text))
