"""Example values in the lines of fixes, kept below the values that the report states."""

import functools
import re

from msgspec.structs import replace

from tightfit.diagnosis.remedies import Remedy

_LOWERS = re.compile(
    r"smaller_(?:cache|picture|inputs)|shorter|fewer_layers|less_at_once|_ubatch|_tokens|_chunk|_batches\b"
)
"""Codes of fixes that lower a number."""
_OPTION = re.compile(r"(?<![\w-])(--?)?([A-Za-z][\w.-]*)([\"']?(?: ?[=:] ?| ))(\d{1,7})(?![\w.])")
"""An option with a whole number: its dashes, its name, the sign between them, and the number."""
_COUNTS_UP = re.compile(r"accum|stride|workers|gpus\b|minibatches")
"""Names in such lines with numbers that do not fall."""
_OF_CONTEXT = re.compile(
    r"(?:n_?|num_?)?ctx|ctx_?size|context_?(?:size|length|len)?|contextsize|c|l|max_(?:seq|model)_len(?:gth)?|max_length"
    r"|max_seq_length|session_len|truncation_length|max_total_tokens|max_num_tokens|max_num_batched_tokens"
    r"|max_batch_prefill_tokens|max_input_len(?:gth)?|max_prefill_tokens|prefill_chunk_size"
)
"""Names of options for the tokens of a sequence; dashes are read as underlines."""
_ALIASES = {"ngl": "n_gpu_layers", "gpu_layers": "n_gpu_layers"}
_STATED = re.compile(
    r"(?:(?<![\w-])(?<!GPU )(?<!CUDA )context(?:[ _-]?(?:size|length|len|window))?|\bn_ctx(?:_per_seq)?"
    r"|--?ctx[-_]size|\bnum_ctx|--contextsize|\bmax[-_ ](?:seq|model)[-_ ]len(?:gth)?|\bsession[-_]len"
    r"|\btruncation_length)[`\"'*]{0,3}"
    r"(?: {0,12}[=:(>]{1,2}| (?:is|of|to|was|with|at|above|over|beyond|about|set))* ?[`\"'*]{0,3}"
    r"(\d{3,7})(?![\w.]| ?[KMG]i?B)"
    r"|(?<![\w.])(\d{3,7})(?=[ -]tokens? (?:of )?(?:context|prompt|sequence)| (?:context|ctx) (?:size|length|window))"
    r"|(?<![\w.])(?P<thousands>\d{1,4})[kK](?=[ -](?:context|ctx|tokens?)\b)"
    r"|(?:上下文(?:长度|大小|窗口)?|コンテキスト(?:長|サイズ)?)[^\d\n。]{0,6}(\d{3,7})",
    re.IGNORECASE,
)
"""The tokens of a context as a person, an option or a server's log states them."""
_HELPED = re.compile(r"[^.\n]{0,12}\b(?:works?|worked|fine|ok|fits?|runs?)\b", re.IGNORECASE)
_SHARE = 0.75
"""Part of a stated value up to which the next lower power of two is another one."""


_OF_LLAMA_CPP = re.compile(r"\bGGUF\b|(?:^|\s)(?:-ngl|--(?:n-)?gpu-layers|--cache-type(?:-[kv])?)\b")
"""Options of llama.cpp, which computes without PyTorch."""


def is_of_llama_cpp(fix: Remedy) -> bool:
    """Return True for a fix by an option of llama.cpp: PyTorch's own message shows that another engine failed."""
    return any(_OF_LLAMA_CPP.search(line) for line in fix.paste)


def below_stated(fix: Remedy, text: str) -> Remedy:
    """Return a fix without lines that set a value at or above the one in the report."""
    if not _LOWERS.search(fix.code):
        return fix
    unstated = "HALF" if fix.code in _OF_UNKNOWN_VALUE else None
    return replace(fix, paste=tuple(_lowered(line, text, unstated) for line in fix.paste))


_OF_UNKNOWN_VALUE = ("kind_llama_shorter", "kind_llama_fewer_layers")
"""Fixes whose number means nothing where the report does not state the present one."""


def _lowered(line: str, text: str, unstated: str | None = None) -> str:
    """Return a line with lower numbers where the report has the same or lower ones; `unstated` where it has none.

    >>> _lowered("--ctx-size 4096", "it sends a context size of 2096"), _lowered("--ctx-size 4096", "n_ctx = 131072")
    ('--ctx-size 1024', '--ctx-size 4096')
    >>> _lowered("--n-gpu-layers 20", "llama-server --n-gpu-layers 12")
    '--n-gpu-layers 6'
    """

    def lower(found: re.Match[str]) -> str:
        dashes, name, sign, value = found[1] or "", _name(found[2]), found[3], int(found[4])
        is_of_context = bool(_OF_CONTEXT.fullmatch(name))
        known = (_value_in(text, name), _context_in(text) if is_of_context else None)
        if unstated is not None and not any(known):
            return f"{dashes}{found[2]}{sign}{unstated}"
        stated = min((each for each in known if each is not None), default=value + 1)
        if value < stated or _COUNTS_UP.search(name):
            return found[0]
        least = 1 << (int(_SHARE * stated).bit_length() - 1) if is_of_context else stated // 2
        return f"{dashes}{found[2]}{sign}{least}" if least else found[0]

    head, mark, comment = line.partition("  #")
    return _OPTION.sub(lower, head) + mark + comment


def _name(printed: str) -> str:
    name = printed.lower().replace("-", "_")
    return _ALIASES.get(name, name)


@functools.lru_cache(maxsize=4)
def _context_in(text: str) -> int | None:
    """Return the smallest context that the report states, without one that it says works."""
    found = (match for match in _STATED.finditer(text) if not _HELPED.match(text, match.end()))
    return min((int(each[each.lastindex or 0]) * (1024 if each["thousands"] else 1) for each in found), default=None)


def _value_in(text: str, name: str) -> int | None:
    """Return the smallest value that the report gives to an option with this name."""
    named = "|".join([name.replace("_", "[-_]"), *(short for short, long in _ALIASES.items() if long == name)])
    found = re.findall(rf"(?i:(?<![\w.])(?:--?)?(?:{named})[\"'`]?(?: ?[=:] ?| )(\d{{1,7}})(?![\w.]))", text)
    return min(map(int, found), default=None)
