"""One finding of doctor: the check, its outcome, and the facts that its sentences fill in."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from tightfit.system.nvml import Failure
from tightfit.wording.system import Words

Status = Literal["ok", "warning", "problem", "unknown"]


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A process that has memory on a card."""

    name: str
    pid: int
    used_bytes: int | None


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a card that MIG divides."""

    name: str
    free_bytes: int
    total_bytes: int


Fact: TypeAlias = str | int | float | Sequence[str] | Sequence[Program] | Sequence[Part] | Failure | None


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A finding. Its sentence is `outcome` in the table `name` of the wording, its next step `outcome_next`."""

    name: str
    outcome: str
    status: Status
    facts: Mapping[str, Fact] = {}
    """Values for the sentences: sizes in bytes, names, lists."""
    card: int | None = None
    """NVML's number of the card; None for a finding about the machine."""

    def title(self, words: Words) -> str:
        title = words(self.name, "title")
        return title if self.card is None else words("words", "of_card", title=title, card=self.card)

    def sentence(self, words: Words) -> str:
        return words(self.name, self.outcome, **self._values(words))

    def next_step(self, words: Words) -> str:
        key = f"{self.outcome}_next"
        return words(self.name, key, **self._values(words)) if words.has(self.name, key) else ""

    def _values(self, words: Words) -> dict[str, Fact]:
        """The facts, with NVML's failure as its sentence."""
        return {
            name: fact.sentence(words.language) if isinstance(fact, Failure) else fact
            for name, fact in self.facts.items()
        }
