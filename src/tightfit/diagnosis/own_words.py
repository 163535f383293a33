"""Fixes in the user's own options, or the program's words, and those before the others."""

import re
from collections.abc import Sequence

from msgspec.structs import replace

from tightfit.diagnosis.done_already import is_done
from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.filled_lines import divided, option_line, own_option
from tightfit.diagnosis.fix_words import words_of
from tightfit.diagnosis.framework_words import has_own, has_words, programs
from tightfit.diagnosis.measures import in_order_of_report, is_among, tried_in
from tightfit.diagnosis.own_options import SEARCHES, options_of
from tightfit.diagnosis.purpose import TRAINING
from tightfit.diagnosis.remedies import Remedy, Resized
from tightfit.diagnosis.report_words import shows

_BEFORE_OWN = frozenset({"load_on_host", "other_library", "tensorflow_off_card", "fused_kernel", "shapes_first"})
"""Cures of a known cause, which come before the user's own options."""
_NAMED = frozenset({"fewer_atoms", "shorter_protein"})
"""Inputs that have no batch: one system or one structure is what a pass holds."""
_LARGE_INPUTS = frozenset({"smaller_volumes", "coarser_points", "fewer_frames"})
"""Inputs of which a program that uses a trained model mostly takes one at a time."""

_OF_KEPT_RESULTS = frozenset({"no_gradients"})
"""The cure of passes that went well until results filled the card: where it leads the list, it stays there."""


def in_own_words_first(remedies: list[Remedy], evidence: Evidence) -> list[Remedy]:
    """Return the remedies that the report does not have already, those in the user's own or the program's words first.

    A trainer of language models has words for nearly all of them: its order is the tables'.
    """
    text = evidence.run.text
    found = in_order_of_report(_distinct([each for each in remedies if not is_done(each, text)]), text)
    if evidence.grows == "attention" and evidence.line is None:  # told by the size of a picture
        found.sort(key=lambda each: each.code != "fused_attention")
    if evidence.framework in programs("trainers"):
        return found
    is_no_mistake = evidence.infers or shows(text, "subject.smaller_fits")  # many items, or large ones
    first = _BEFORE_OWN - {"shapes_first"} if is_no_mistake else _BEFORE_OWN
    found = sorted(found, key=lambda each: each.code == "shapes_first" and is_no_mistake)
    first |= _NAMED | (_LARGE_INPUTS if evidence.infers or evidence.is_of_unknown_purpose else frozenset())
    if shows(text, "subject.lacks_no_grad"):
        first |= _OF_KEPT_RESULTS
    if evidence.infers and not evidence.run.signs.isdisjoint(("growing", "accumulates", "ran_first")):
        first |= _OF_KEPT_RESULTS & {each.code for each in found[:1]}
    first |= frozenset({"outputs_to_host", "outputs_reduced"}) if evidence.grows == "outputs" else frozenset()
    tried = tried_in(text)

    def place(each: Remedy) -> int:
        return 2 if is_among(each, tried) else int(each.code not in first and not _is_own(each, evidence))

    return sorted(found, key=place)


def _distinct(remedies: Sequence[Remedy]) -> list[Remedy]:
    """Return the remedies without those whose lines an earlier one has."""
    firsts = {each.paste: each for each in reversed(remedies) if each.paste}
    return [each for each in remedies if not each.paste or firsts[each.paste] is each]


def _is_own(remedy: Remedy, evidence: Evidence) -> bool:
    """Return True if a remedy's lines are the user's own options as the report prints them, or the program's."""
    is_of_batch = isinstance(remedy.change, Resized) or remedy.code == "smaller_batch"
    code = "split_general" if is_of_batch else remedy.code
    words = own_option(code, evidence, divided(evidence))
    is_printed = words is not None and words.lines == remedy.paste and not remedy.paste[0].startswith(SEARCHES)
    return is_printed or has_own(code, evidence.framework or "")


_OF_KINDS = {
    "kind_smaller_batch": ("less_at_once",),
    "kind_less_in_pass": ("less_at_once", "shorter_length", "smaller_picture", "smaller_inputs"),
    "kind_smaller_inputs_only": ("shorter_length", "smaller_picture", "smaller_inputs"),
    "kind_physx_envs": ("fewer_environments",),
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
    return next(filter(None, (options_of(each, run.text) for each in _OF_KINDS[code])), ()) or _of_program(
        code, evidence
    )


_OF_PROGRAMS = {
    "kind_smaller_batch": ("split_general", "less_at_once"),
    "kind_less_in_pass": ("split_general", "less_at_once", "smaller_picture", "shorter_length"),
    "kind_smaller_inputs_only": ("smaller_picture", "shorter_length"),
}
"""Remedies whose words in the user's program serve for a fix of a kind; those of a training's batch come first."""


def _of_program(code: str, evidence: Evidence) -> tuple[str, ...]:
    """Return the lines of the user's program for less in one pass; none of a training where a model is only used."""
    program, trains = evidence.framework or "", evidence.trains or evidence.purpose == TRAINING
    known = [each for each in _OF_PROGRAMS.get(code, ()) if has_words(each, program)]
    if evidence.infers or not (trains or has_own("split_general", program)):
        known = [each for each in known if each != "split_general"]
    words = words_of(known[0], evidence) if known else None
    if program == "tensorflow" and not re.search(_KERAS, evidence.run.text):
        return ()  # its words are Keras's
    return words.lines if words else ()


_KERAS = r"[Kk]eras|\bfit\(|\bfit_generator\b"
"""Signs of Keras, whose models have `fit`."""
