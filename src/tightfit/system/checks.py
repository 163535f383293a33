"""One finding of doctor: which check, how it came out, and the facts that its sentence fills in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tightfit.wording.system import Words

Status = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Said by `outcome` in the table `name` of a language's words; its next step, if any, by `outcome_next`."""

    name: str
    outcome: str
    status: Status
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the sentences fill in: sizes in bytes, names, lists."""
    card: int | None = None
    """The card that this is about, by NVML's number; None if it is about the machine."""

    def title(self, words: Words) -> str:
        title = words(self.name, "title")
        return title if self.card is None else words("words", "of_card", title=title, card=self.card)

    def sentence(self, words: Words) -> str:
        return words(self.name, self.outcome, **self._values(words))

    def next_step(self, words: Words) -> str:
        key = f"{self.outcome}_next"
        return words(self.name, key, **self._values(words)) if words.has(self.name, key) else ""

    def _values(self, words: Words) -> dict[str, Any]:
        """The facts, with NVML's failure as its sentence."""
        failure = self.facts.get("failure")
        return (
            {**self.facts, "failure": words("nvml", failure["kind"], detail=failure["detail"])}
            if failure
            else dict(self.facts)
        )
