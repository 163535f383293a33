"""The switch without which a run goes well, by a report's words: it names the cure."""

import re

_NAME = r"[`'\"]?(?:--)?(?P<{}>[A-Za-z][A-Za-z0-9]*(?:[_.-][A-Za-z0-9]+)+)[`'\"]?"
_ON = r"(?: is| was)?(?: set)?(?: to|[ =:]{1,3})[ `'\"]?(?:[Tt]rue|on|enabled|1)\b"
_OFF = r"(?:commented out|removed|disabled|turned off|switched off|(?:set to |= ?)?(?:[Ff]alse|off|0\b))"
_FINE = (
    r"(?:works?|worked|runs?|ran|trains?|trained|(?:is|was) (?:fine|ok)|no (?:OOM|error|issue|problem)|fine|succe\w+)"
)
_TITLE = re.compile(rf"\b(?<!even )(?:with|when|if|using) {_NAME.format('title')}{_ON}", re.IGNORECASE)
_WITHOUT = re.compile(
    rf"\b{_FINE}\b[^.\n]{{0,30}}\b(?:without|(?:when|if|after|once) (?:I |we )?"
    rf"(?:remov|disabl|turn(?:ed|ing)? off|comment(?:ed|ing)? out)\w*) (?:the |using )?{_NAME.format('without')}"
    rf"|\b(?:when|if|with|once) {_NAME.format('off')} (?:(?:is|was) )?{_OFF}[^.\n]{{0,50}}\b(?:can|{_FINE})\b",
    re.IGNORECASE,
)
_SAVES = re.compile(
    r"checkpoint|fp16|bf16|fp8|amp\b|half|precision|flash|xformers|sdpa|8bit|4bit|quant|lora|offload|low_?v?ram|medvram"
    r"|tiling|tiled|slicing|accumul|no_grad|empty_cache|expandable|torch\.|\.py$|max_split",
    re.IGNORECASE,
)
"""Names of switches that save memory, and of no switch at all."""


def switch_against(text: str) -> str | None:
    """Return the switch with which alone a run fails, by the report's title or sentences; None if it names none.

    >>> switch_against("# OOM with sample_packing set to true")
    'sample_packing'
    >>> switch_against("When compute_metrics is commented out, I can evaluate the model")
    'compute_metrics'
    >>> switch_against("# OOM with gradient_checkpointing set to true")
    """
    title = text.lstrip().partition("\n")[0]
    found = _TITLE.search(title) if title.startswith("# ") else None
    found = found or _WITHOUT.search(text)
    name = next(filter(None, found.groups()), None) if found else None
    return name if name and not _SAVES.search(name) else None


_HELPED = re.compile(
    r"(?<!not )(?<!n't )\b(?:[Ss]etting|[Cc]hanging|[Uu]sing|[Aa]dding|[Pp]assing|[Ee]nabling) (?:the )?"
    r"(?:parameter |option |flag )?[`'\"]?(?P<setting>(?:--)?[A-Za-z]\w*_\w+ ?(?:=|to|:) ?[\w\"'.]{1,40}"
    r"|--[a-z][\w-]{3,40}(?:[= ][\w.]{1,20})?)[`'\"]?"
    r" (?:has |have )?(?:fix(?:es|ed)|solv(?:es|ed)|resolv(?:es|ed)|help(?:s|ed)|works?|worked|did the trick)\b"
)


def setting_that_helped(text: str) -> str | None:
    """Return the setting by which the failure went away, by the report's words; None if it names none.

    >>> setting_that_helped('Setting embeddings_storage_mode="none" fixed the issue for me.')
    'embeddings_storage_mode="none"'
    >>> setting_that_helped("Setting batch_size=1 did not help.")
    """
    found = _HELPED.search(text)
    return found["setting"].strip("`") if found else None
