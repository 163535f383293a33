"""What the report itself tells of a remedy: its own options, lines that it has already, words of what it is about."""

import re

from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.filled_lines import divided, own_option
from tightfit.diagnosis.framework_words import has_own, programs
from tightfit.diagnosis.measures import in_order_of_report
from tightfit.diagnosis.remedies import Remedy, Resized

_SHORT_LINE = 12
"""Characters up to which a line may stand in a log by chance."""


_BEFORE_OWN = frozenset({"other_library", "fused_kernel"})
"""Cures of a known cause, which come before the user's own options."""


def _is_own(remedy: Remedy, evidence: Evidence) -> bool:
    """Return True if a remedy's lines are the user's own options as the report prints them, or the program's."""
    is_of_batch = isinstance(remedy.change, Resized) or remedy.code == "smaller_batch"
    code = "split_general" if is_of_batch else remedy.code
    words = own_option(code, evidence, divided(evidence))
    is_printed = words is not None and words.lines == remedy.paste
    return is_printed or has_own(code, evidence.framework or "")


def _stands(remedy: Remedy, text: str) -> bool:
    """Return True for a remedy whose every line already _stands in the log: it did not help."""
    lines = [line.partition("  #")[0].strip() for line in remedy.paste]
    return bool(lines) and all(len(line) > _SHORT_LINE and (line in text or _is_set(line, text)) for line in lines)


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
    """Return True if the report's code sets the variable of a shell's line to the same value."""
    found = _VARIABLE.fullmatch(line)
    return found is not None and bool(re.search(rf"\b{found[1]}\W{{1,8}}{found[2]}\b", text))


IN_WORDS = {
    "coarser_points": re.compile(r"[Pp]oint[- _]?[Cc]louds?\b|\b[Vv]oxels?\b|点云|点群"),
    "fewer_environments": re.compile(r"\bnum_?[Ee]nvs\b|\bn_envs\b|\bparallel environments\b"),
}
"""Words of a report by which an unknown program has what a remedy is about, though no option is printed."""


def is_in_words(code: str, evidence: Evidence) -> bool:
    """Return True if a report of an unknown program shows by its words that a remedy is about it."""
    sign = IN_WORDS.get(code)
    return sign is not None and evidence.framework is None and sign.search(evidence.run.text) is not None


def in_own_words_first(remedies: list[Remedy], evidence: Evidence) -> list[Remedy]:
    """Return the remedies that the report does not have already, those in the user's own or the program's words first.

    A trainer of language models has words for nearly all of them: its order is the tables'.
    """
    text = evidence.run.text
    found = [each for each in remedies if not (_stands(each, text) or _raises(each, text))]
    found = in_order_of_report(found, text)
    if evidence.framework in programs("trainers"):
        return found
    return sorted(found, key=lambda each: each.code not in _BEFORE_OWN and not _is_own(each, evidence))
