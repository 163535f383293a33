"""Details of a failure that the rest of its log shows: the library, the container, the program's own numbers."""

import functools
import re

import msgspec

from tightfit.diagnosis.purpose import INFERENCE, purpose_of
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.run_facts import RunFacts
from tightfit.tables import read_table
from tightfit.units import GIB, KIB, MIB

_HIGH_SHARE = re.compile(r"gpu[-_]memory[-_]utilization\W{1,3}(?:0?\.9[1-9]\d?|1\.0|1\b)")
"""A share of the card above vLLM's own 0.9."""
_PROGRAM = re.compile(r"\btotal allocation: *([\d.]{1,9}) ?([KMG])iB")
"""Memory of a compiled program in XLA's report on its buffers."""
_UNITS = {"K": KIB, "M": MIB, "G": GIB}
_SMALL_PROGRAM = GIB
"""Bytes that any card has free for a program, unless something else fills it."""


class _Detail(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of kind_details.toml."""

    kinds: list[str]
    name: str = ""
    becomes: str = ""
    shown: str = ""
    unless: str = ""
    with_detail: str = ""

    def is_shown(self, facts: Facts, text: str) -> bool:
        if facts.kind not in self.kinds or (self.with_detail and self.with_detail not in facts.details):
            return False
        if self.shown and not re.search(self.shown, text):
            return False
        return not (self.unless and re.search(self.unless, text))


@functools.cache
def _details() -> list[_Detail]:
    return read_table("tightfit.diagnosis", "kind_details.toml", dict[str, list[_Detail]])["detail"]


def detail_names() -> set[str]:
    """Return the names of details that a log's text may show."""
    return {each.name for each in _details() if each.name}


def with_run(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure with what the log prints of its run and its sentences need."""
    for each in _details():
        if not each.is_shown(facts, run.text):
            continue
        facts = msgspec.structs.replace(facts, kind=each.becomes) if each.becomes else _with(facts, each.name)
    if facts.kind == "vllm_no_cache_blocks" and _HIGH_SHARE.search(run.text):
        return _with(facts, "share_is_high")
    if facts.kind == "jax_out_of_memory":
        return _of_jax(facts, run)
    return facts


def _of_jax(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of JAX with a program that is small, or with the use of a trained model."""
    found = _PROGRAM.search(run.text)
    if found and float(found[1]) * _UNITS[found[2]] < _SMALL_PROGRAM:
        return _with(facts, "program", f"{found[1]} {found[2]}iB")
    return _with(facts, "inference") if purpose_of(facts, run) == INFERENCE else facts


def _with(facts: Facts, name: str, value: str = "yes") -> Facts:
    return msgspec.structs.replace(facts, details={**facts.details, name: value})
