"""Words that show the subject of a report (report_words.toml), and the inputs of an unknown program."""

import functools
import re

from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.framework_words import programs
from tightfit.tables import read_patterns

patterns = functools.partial(read_patterns, "tightfit.diagnosis", "report_words.toml", flags=re.ASCII)
"""Reads the tables of words."""


def sign(name: str) -> re.Pattern[str]:
    """Return a list of words as one pattern, by its table and its key.

    >>> bool(sign("subject.vae").search("vae.decode(latents)"))
    True
    """
    table, _, key = name.partition(".")
    return patterns()[table][key]


def shows(text: str, name: str) -> bool:
    """Return True if a text has one of the words of a list.

    >>> shows("InvokeAI version 3.2", "versions.before_offload")
    True
    """
    return sign(name).search(text) is not None


def is_in_words(code: str, evidence: Evidence) -> bool:
    """Return True if a report of an unknown program shows by its words that a remedy is about it."""
    known = patterns()["remedies"].get(code)
    return known is not None and _is_users_own(evidence) and known.search(evidence.run.text) is not None


def _is_users_own(evidence: Evidence) -> bool:
    """Return True for an unknown program, and for a script that stands on a library alone."""
    return evidence.framework is None or evidence.framework in programs("libraries")


def names_inputs(evidence: Evidence) -> bool:
    """Return True if a report of an unknown program shows by its words the inputs that a remedy is about."""
    return any(is_in_words(code, evidence) for code in patterns()["remedies"])


def hears(evidence: Evidence) -> bool:
    """Return True for a program, or a node of ComfyUI, that works on sound: words for pictures are not about it."""
    if evidence.framework == "comfyui":
        return shows(evidence.run.text, "subject.sound_nodes")
    return evidence.framework in programs("voices")


def inputs_of(evidence: Evidence) -> str:
    """Return the remedy by smaller inputs that names what a program works on, if the report shows it."""
    if evidence.grows == "logits":  # only texts have them
        return "shorter_length"
    if hears(evidence):
        return "shorter_audio"
    if evidence.tensor == "resized_image":
        return "smaller_picture"
    text = sign("not_inputs.stack_frames").sub("", evidence.run.text)
    counts = _counts("inputs", text)
    if any(counts.values()) and _is_users_own(evidence):
        return _most_of(counts, times=1)
    tables = (counts, _counts("common_inputs", text), _counts("named_inputs", text))
    return _most_of({code: sum(each.get(code, 0) for each in tables) for code in {*tables[0], *tables[1]}})


_CLEARLY = 2
"""Times as many words as of any other kind of inputs, for words that other reports have, too."""


def _most_of(counts: dict[str, int], times: int = _CLEARLY) -> str:
    """Return the code with clearly most hits; that of inputs of any kind where none has."""
    (first, most), (_, second) = sorted(counts.items(), key=lambda each: -each[1])[:2]
    return first if most > second and most >= times * second else "smaller_inputs"


def _counts(table: str, text: str) -> dict[str, int]:
    """Return the hits of each list of a table."""
    return {code: len(words.findall(text)) for code, words in patterns()[table].items()}
