"""A remedy in the report's own words: its options, its lines that are there already, and the words of its subject."""

import re
from collections.abc import Sequence

from msgspec.structs import replace

from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.filled_lines import divided, option_line, own_option
from tightfit.diagnosis.framework_words import has_own, programs
from tightfit.diagnosis.measures import in_order_of_report
from tightfit.diagnosis.own_options import SEARCHES, SMALLER, is_on, options_of
from tightfit.diagnosis.remedies import Remedy, Resized

_SHORT_LINE = 12
"""Characters up to which a line may stand in a log by chance."""


_BEFORE_OWN = frozenset({"other_library", "fused_kernel", "shapes_first"})
"""Cures of a known cause, which come before the user's own options."""
_NAMED = frozenset({"fewer_atoms", "shorter_protein"})
"""Inputs that have no batch: one system or one structure is what a pass holds."""
_LARGE_INPUTS = frozenset({"smaller_volumes", "coarser_points", "fewer_frames"})
"""Inputs of which a program that uses a trained model mostly takes one at a time."""


def _is_own(remedy: Remedy, evidence: Evidence) -> bool:
    """Return True if a remedy's lines are the user's own options as the report prints them, or the program's."""
    is_of_batch = isinstance(remedy.change, Resized) or remedy.code == "smaller_batch"
    code = "split_general" if is_of_batch else remedy.code
    words = own_option(code, evidence, divided(evidence))
    is_printed = words is not None and words.lines == remedy.paste and not remedy.paste[0].startswith(SEARCHES)
    return is_printed or has_own(code, evidence.framework or "")


_HINT = re.compile(r"To run the model in eager mode, set [^\n]*")
"""vLLM's own hint, which names an option that the run does not have."""


def _stands(remedy: Remedy, text: str) -> bool:
    """Return True for a remedy if all its lines already stand in the log: it did not help."""
    text = _HINT.sub("", text)
    if remedy.code == "offload" and _ON_CARD.search(text):
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


_ON_CARD = re.compile(
    r"from_pretrained\([^)]{0,400}\)\.to\([\"']cuda|\bpipe(?:line)?(?: ?= ?pipe(?:line)?)?\.(?:to\([\"']cuda|cuda\()"
)
"""A pipeline that is put on the card as a whole, for which offloading comes too late."""
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
    options = options if dots else line
    if not dots and not _OPTIONS_ONLY.fullmatch(line):
        return False
    return options.startswith("-") and all(_has(each, text) for each in _OPTIONS.findall(options))


_OPTIONS_ONLY = re.compile(r"(?:--[A-Za-z][\w-]*(?:[ =][^\s\"'=-]\S*)?(?:\s+|$))+")
"""A line of nothing but options, none of them in quotation marks."""
_OPTIONS = re.compile(r"(--?[A-Za-z][\w-]*)(?:[ =]([^\s-]\S*))?")


def _has(option: tuple[str, str], text: str) -> bool:
    """Return True if a text has an option with its value, which a shell may need quotes for."""
    name, value = option
    behind = rf"[ =][\"']?{re.escape(value)}(?![\w.*])" if value else r"(?![\w-])"
    return bool(re.search(rf"(?<!\S){re.escape(name)}{behind}", text))


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
    found = [each for each in remedies if not (_stands(each, text) or _raises(each, text) or is_on(each.code, text))]
    found = in_order_of_report(found, text)
    if evidence.framework in programs("trainers"):
        return found
    first = _BEFORE_OWN - {"shapes_first"} if evidence.infers else _BEFORE_OWN  # many items in one pass, not a mistake
    found = sorted(found, key=lambda each: each.code == "shapes_first" and evidence.infers)
    first |= _NAMED | (_LARGE_INPUTS if evidence.infers or evidence.is_of_unknown_purpose else frozenset())
    return sorted(found, key=lambda each: each.code not in first and not _is_own(each, evidence))


_OF_KINDS = {
    "kind_smaller_batch": (),
    "kind_less_in_pass": ("shorter_length", "smaller_picture", "smaller_inputs"),
    "kind_smaller_inputs_only": ("shorter_length", "smaller_picture", "smaller_inputs"),
    "kind_jax_environments": ("fewer_environments", "smaller_buffer"),
    "kind_replay_smaller": ("fewer_environments", "smaller_buffer"),
}
"""Fixes of kinds of failures that name no option, and remedies whose printed options they may quote."""
_WITH_BATCH = ("kind_smaller_batch", "kind_less_in_pass")


def in_own_options(remedies: Sequence[Remedy], evidence: Evidence) -> tuple[Remedy, ...]:
    """Return the fixes of a kind with the lines of the user's own options, where the report prints some.

    A program of the tables has words of its own.
    """
    return tuple(
        replace(each, paste=_own_lines(each.code, evidence)) if each.code in _OF_KINDS and not each.paste else each
        for each in remedies
    )


def _own_lines(code: str, evidence: Evidence) -> tuple[str, ...]:
    run, (_, size, _) = evidence.run, divided(evidence)
    name = run.names.get("batch_size") if code in _WITH_BATCH else None
    if name and size:
        return (option_line(name, size, run.text),)
    return next(filter(None, (options_of(each, run.text) for each in _OF_KINDS[code])), ())


_OF_STACK = re.compile(
    r"(?m)^[^\w\n]*\d{1,3} frames[^\w\n]*$|\b(?:stack|internal|hidden|library|inner|outer|call) frames\b"
    r"|\bframes? (?:hidden|from the traceback)"
)
"""Frames of a traceback, which Colab counts, and JAX leaves out."""
_NODES = re.compile(r"(?i)custom_nodes[\\/][^\"\n]*?(?:tts|speech|voice|audio|whisper|music|chatterbox)")
"""Nodes of ComfyUI that work on sound."""


def hears(evidence: Evidence) -> bool:
    """Return True if a node of ComfyUI that works on sound failed: words for pictures are not about it."""
    return evidence.framework == "comfyui" and bool(_NODES.search(evidence.run.text))


_DOMAINS = {
    "fewer_frames": re.compile(r"\b\w{0,12}[Vv]ideos?\b(?! ?(?:memory|card|RAM|ram))|\bframes\b|\.mp4\b"),
    "smaller_volumes": re.compile(r"\b3[Dd]\b|\bvolumes?\b|\bC?B?CT\b|\bMRI\b|\.nii\b|[Cc]onv3d|CBCT"),
    "fewer_atoms": re.compile(r"\batoms\b(?! (?:theme|package|editor))|\bLAMMPS\b|\bsupercells?\b"),
    "shorter_protein": re.compile(
        r"\b[Pp]roteins?[- ](?:sequences?|structures?|complex(?:es)?|chains?|folding|design|docking|pairs?|language)\b"
        r"|\bresidues\b|\b[Aa]mino[- ]?[Aa]cids?\b|\.a3m\b"
    ),
    "shorter_audio": re.compile(
        r"\b[Aa]udio\b|\bA(?:udio|UDIO)[A-Z]\w*|\b(?:[Dd]eep_?)?[Ss]peech\b|\butterances?\b|\.wav\b|\bASR\b"
        r"|\basr\b|\btranscri(?:be|ption|pts?)\w*|[Ww]hisper\w*|\.srt\b|_srt\b"
    ),
}
"""Words of what a program works on, by the remedy that names it."""


_PICTURES = re.compile(
    r"\b(?:images?|imgs?|pictures?|photos?|pixels?|masks?)\b|\.(?:png|jpe?g|tiff?)\b|[Cc]onv2d|torchvision"
)
_TEXTS = re.compile(
    r"\b(?:tokens?|prompts?|LLMs?|sequences?|time series|forecasts?|(?<!Error )texts?|sentences?|documents?|lengths?)\b"
    r"|transformers/|\btokenizer"
)
"""Words of programs that work on pictures, and of those that work on texts or other sequences."""


def inputs_of(evidence: Evidence) -> str:
    """Return the remedy by smaller inputs that names what an unknown program works on, if the report shows one."""
    if evidence.grows == "logits":  # only texts have them
        return "shorter_length"
    if hears(evidence):
        return "shorter_audio"
    if evidence.tensor == "resized_image" and evidence.framework is None:
        return "smaller_picture"
    text = _OF_STACK.sub("", evidence.run.text)
    found = {code: len(sign.findall(text)) for code, sign in _DOMAINS.items()}
    if evidence.framework is not None:
        return "smaller_inputs"
    most = max(found.values())
    fitting = [code for code, count in found.items() if count == most]
    if most:
        return fitting[0] if len(fitting) == 1 else "smaller_inputs"
    pictures, texts = (len(sign.findall(text)) for sign in (_PICTURES, _TEXTS))
    if pictures and not texts:
        return "smaller_picture"
    return "shorter_length" if texts and not pictures else "smaller_inputs"
