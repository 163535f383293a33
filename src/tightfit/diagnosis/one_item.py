"""Programs that work on one document or recording at a time: their inputs can be shorter, and they have no batch."""

import re

from tightfit.oomlog.facts import Facts
from tightfit.oomlog.run_facts import RunFacts

_ITEM = (
    r"(?:doc|document|article|paragraph|recording|song|utterance|movie"
    r"|wav|wav_?file|audio|audio_?file|video|video_?file)"
)
_IN_LINE = re.compile(
    rf"\bfor (?:\w+, ?)?{_ITEM} in\b"
    rf"|\b(?:predict|transcribe|process\w*|analy[sz]e|separate|summari[sz]e)\w*\( ?(?:self\.)?{_ITEM}\b"
    r"|\b(?:model|net)\( ?(?:self\.)?(?:doc|document|article)\b|(?<![a-z])(?:content|style)_loss(?!es)"
)
"""A line that takes one item: of a loop or a call, or the loss of a transfer of one item's style."""
_IN_WORDS = re.compile(
    r"(?i:\bone (?:\w+ )?(?:document|recording|audio|song|video|article|file) at a time\b)"
    r"|(?:1|一)(?:件|つ|ファイル)ずつ"
)
_BATCH = re.compile(r"batch|loader", re.IGNORECASE)


def takes_one_item(facts: Facts, run: RunFacts) -> bool:
    """Return True if the failing lines, or the report's words, take one item, and no line has a batch."""
    lines = [each.source or "" for each in facts.frames if not each.is_library]
    if "batch_size" in run.numbers or any(map(_BATCH.search, lines)):
        return False
    return any(map(_IN_LINE.search, lines)) or bool(_IN_WORDS.search(run.text))
