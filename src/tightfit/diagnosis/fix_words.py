"""A fix in words: its lines as the user's program and version take them, with the run's numbers."""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from tightfit.diagnosis.cause_records import COMPUTED
from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.filled_lines import accumulation, divided, own_option, values_to_fill
from tightfit.diagnosis.framework_words import Pasted, pasted, programs
from tightfit.diagnosis.remedies import UNCHECKED, Remedy, Resized
from tightfit.diagnosis.report_words import inputs_of, shows
from tightfit.oomlog.facts import Facts
from tightfit.tables import read_table
from tightfit.units import GIB

NOT_CUDA = ("mps_out_of_memory", "xpu_out_of_memory", "npu_out_of_memory")
"""Kinds of failures on devices other than CUDA's and ROCm's."""
_BEFORE_INFERENCE_MODE = ("T0", "T1", "T2")
"""Messages of PyTorch up to 1.10, the older of which have no_grad alone; or of a later one, cut at its end."""


@functools.cache
def fix_tables() -> dict[str, dict[str, str | list[str]]]:
    """Return the tables of advice.toml."""
    return read_table("tightfit.diagnosis", "advice.toml", dict[str, dict[str, str | list[str]]])


def applicability(code: str) -> str:
    """Return exact, changes_result, needs_hardware or to_be_checked."""
    return str(fix_tables()["applicability"].get(code, "to_be_checked"))


def words_of(code: str, evidence: Evidence) -> Pasted | None:
    """Return a remedy's lines as the user's own option, or in the program's words; None where neither is known."""
    parts = divided(evidence)
    return own_option(code, evidence, parts) or pasted(code, evidence.run.frameworks, values_to_fill(evidence, parts))


def fix(code: str, facts: Facts, evidence: Evidence) -> Remedy:
    """Return a remedy in the words for this run."""
    words = _reworded(code, words_of(code, evidence), facts, evidence)
    effect = applicability(code)
    if code == "split_general" and shows(evidence.run.text, "subject.batch_norm"):
        effect = "changes_result"
    named = inputs_of(evidence) if code == "smaller_inputs" and not words else code
    remedy = Remedy(
        code=named,
        verdict=UNCHECKED,
        reason=named if named in ("fewer_atoms", "shorter_protein") else code,
        label=COMPUTED,
        exact={"exact": True, "changes_result": False}.get(effect),
        applicability=effect,
        paste=words.lines if words else (),
        page=words.page if words else "",
    )
    return _divided_batch(remedy, evidence) if code == "split_general" else remedy


def _divided_batch(remedy: Remedy, evidence: Evidence) -> Remedy:
    """Return the fix of a divided batch with the printed numbers, or as a smaller batch where nothing accumulates."""
    if evidence.framework in programs("without_accumulation"):
        code = "smaller_batch"
        return replace(remedy, code=code, reason=code, exact=False, applicability=applicability(code))
    batch, size, passes = divided(evidence)
    if not (batch and size and passes):
        return remedy
    before = accumulation(evidence)
    change = Resized(size=size, passes=passes, batch=batch, accumulation=before or 1, parts=batch // size)
    return replace(remedy, code="split_logged" if before else "split_in_parts", reason="split_general", change=change)


def of_one_sequence(fix: Remedy, evidence: Evidence) -> Remedy:
    """Return the fix of a smaller batch with one sequence a pass."""
    assert isinstance(fix.change, Resized)
    batch, parts = fix.change.batch, (fix.change.batch, 1, fix.change.batch * fix.change.accumulation)
    words = own_option("split_general", evidence, parts) or pasted(
        "split_general", evidence.run.frameworks, values_to_fill(evidence, parts)
    )
    change = replace(fix.change, size=1, passes=batch * fix.change.accumulation, parts=batch)
    return replace(fix, change=change, paste=words.lines if words else ())


def _reworded(code: str, words: Pasted | None, facts: Facts, evidence: Evidence) -> Pasted | None:
    """Return a remedy's lines as this run's device, version and way of configuring take them."""
    if code == "half_precision" and facts.kind in NOT_CUDA:
        words = _autocast(facts.kind.partition("_")[0])
    if words is None:
        return None
    words = _for_version(words, facts)
    for change in _CHANGES:
        if (not change.codes or code in change.codes) and change.applies(evidence):
            words = replace(words, lines=tuple(change.line(each, facts, evidence) for each in words.lines))
    return words


def _autocast(device: str) -> Pasted:
    """Return the line that turns half precision on for a device other than CUDA's."""
    dtype = "float16" if device == "mps" else "bfloat16"
    page = "https://docs.pytorch.org/docs/stable/amp.html"
    return Pasted(lines=(f"with torch.autocast('{device}', dtype=torch.{dtype}):",), page=page)


_NEWER_WORDS = (
    (", use_reentrant=False", ""),
    ("torch.autocast('cuda', dtype=torch.bfloat16):", "torch.cuda.amp.autocast():  # PyTorch 1.6 or later"),
    ("inference_mode", "no_grad"),
    ("model.to(torch.bfloat16)", "model.half()"),
)
"""Words that PyTorch up to 1.9 does not have, and those that all versions take."""
_PAGES = {"inference_mode": "no_grad"}


def _for_version(words: Pasted, facts: Facts) -> Pasted:
    """Return the lines as the PyTorch of the message takes them."""
    if facts.torch_format not in _BEFORE_INFERENCE_MODE:
        return words
    lines, page = words.lines, words.page
    for newer, older in _NEWER_WORDS:
        lines = tuple(line.replace(newer, older) for line in lines)
    for newer, older in _PAGES.items():
        page = page.replace(f"autograd.grad_mode.{newer}", older)
    return Pasted(lines=lines, page=page)


_KEY = re.compile(r"^([a-z]\w*): ([\w*/.-]+)$")
"""A key with a plain value in YAML."""
_SHARE = re.compile(r"(?<=[ =])0?\.\d{1,2}\b")
_OF_CONTEXT, _SPARE = GIB // 2, 0.03
"""Bytes of a process's context on the card, and the share of it that is left free."""


def _beside_others(line: str, facts: Facts, evidence: Evidence) -> str:
    """Return a line with the share of the card that other programs leave, as an argument where the user has Python."""
    others = facts.others_bytes or max((facts.not_reserved_bytes or 0) - _OF_CONTEXT, 0)
    printed = _SHARE.search(line)
    if printed and others and facts.total_bytes:
        share = math.floor(10 * (1 - others / facts.total_bytes - _SPARE)) / 10
        if 0 < share < float(printed[0]):
            line = f"{line[: printed.start()]}{share:g}{line[printed.end() :]}"
    text = evidence.run.text
    if not line.startswith("--gpu-memory-utilization") or not shows(text, "switches.vllm_in_python"):
        return line
    is_shell = shows(text, "switches.vllm_in_shell")
    return line if is_shell else f"LLM(..., gpu_memory_utilization={line.rpartition(' ')[2]})"


class _Change(NamedTuple):
    """A change of a remedy's lines that some runs need."""

    codes: tuple[str, ...]
    """Remedies that it is for; empty is all."""
    applies: Callable[[Evidence], bool]
    line: Callable[[str, Facts, Evidence], str]
    """Returns a line, changed."""


_CHANGES = (
    _Change(
        ("shard", "offload"),
        lambda evidence: shows(evidence.run.text, "versions.old_deepspeed"),
        lambda line, facts, evidence: f"{line}  # DeepSpeed 0.3.13 or later",
    ),
    _Change(
        (),
        lambda evidence: (
            evidence.framework in programs("options_in_files") and shows(evidence.run.text, "switches.by_options")
        ),
        lambda line, facts, evidence: _KEY.sub(r"--\1 \2", line),
    ),
    _Change(("share_of_card",), lambda evidence: True, _beside_others),
)
