"""A user's own script: played on the card, and again with each remedy that needs no knowledge of its code."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tightfit.config.knob import Variant, is_accumulation, is_batch, number_in_words
from tightfit.diagnosis.advice import advice
from tightfit.diagnosis.causes import causes_of, play_fits
from tightfit.diagnosis.culprit import culprit_of_play
from tightfit.diagnosis.evidence import evidence_of
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.named_card import Card
from tightfit.diagnosis.outcome import Outcome, outcome_of_findings
from tightfit.diagnosis.plays import EXPANDABLE
from tightfit.diagnosis.remedies import (
    UNCHECKED,
    USUAL_SHARE,
    Option,
    Remedy,
    close_others,
    expandable_segments,
    judged,
    ranked,
)
from tightfit.errors import ConfigError
from tightfit.gpus import find_gpu
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.log_reader import LogReading, read_log
from tightfit.oomlog.run_facts import RunFacts
from tightfit.vgpu.records import Settings
from tightfit.wording import say

if TYPE_CHECKING:
    from tightfit.simulation.client import Progress, Simulator

_UNCHANGED = ("close_others", "expandable_segments")
"""Remedies that leave the script as it is."""
_PATIENCE_S = 60.0
"""Seconds given to the play with a smaller batch, which may take many more passes."""


def read_failure(outcome: Outcome) -> LogReading:
    """Read the message of a play's failure as if it stood in a log."""
    assert outcome.failure is not None
    return read_log("torch.OutOfMemoryError: " + outcome.failure.message)


class OwnScript:
    """A script with its arguments on one card."""

    def __init__(
        self,
        card: Card,
        script: str,
        arguments: Sequence[str],
        *,
        settings: Settings | None = None,
        progress: "Progress | None" = None,
    ) -> None:
        """`settings` are those of the play that failed, such as its torch: the card's figures stand in `card`."""
        self._progress = progress
        self._settings = replace(settings or Settings(gpu=card.name), timeline=False, snapshot=None)
        self.card, self.script, self.arguments = card, script, list(arguments)
        self._simulator: Simulator | None = None

    def play(
        self,
        arguments: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        used_bytes: int | None = None,
        timeout_s: float | None = None,
        is_quiet: bool = True,
    ) -> Outcome:
        """Play the script on the virtual GPU; `used_bytes` are those of other processes, if not the card's."""
        card = self.card
        settings = replace(
            self._settings,
            gpu=card.name,
            memory_bytes=card.total_bytes if card.total_stated else None,
            used_bytes=card.used_bytes if used_bytes is None else used_bytes,
            context_bytes=card.context_bytes,
            capability=card.capability if find_gpu(card.name) is None else None,
            timeout_s=timeout_s or self._settings.timeout_s,
        )
        from tightfit.simulation.dry_run import dryrun_script

        found = dryrun_script(self.script, arguments, settings, environ, simulator=self._simulator, is_quiet=is_quiet)
        return outcome_of_findings(found)

    def explained(self, plain: Explanation, outcome: Outcome) -> Explanation:
        """Explain the outcome of the script. ConfigError for a script that fails for another reason."""
        facts = plain.facts
        plain = replace(plain, card=self.card, played="script")
        if outcome.error:
            raise ConfigError(say("explain.own_script.failed", script=self.script, reason=outcome.error))
        if facts is None or outcome.failure is None:
            return replace(plain, causes=(play_fits(outcome),))
        culprit = culprit_of_play(facts, outcome, of_script=True)
        from tightfit.simulation.client import Simulator

        with Simulator(workers=1, progress=self._progress) as self._simulator:
            remedies = list(self._remedies(_general(facts, plain.reading.run), outcome))
        self._simulator = None
        return replace(
            plain,
            culprit=culprit,
            causes=causes_of(facts, plain.reading.context, culprit=culprit, base=outcome),
            remedies=ranked(remedies),
            not_modelled=outcome.not_modelled,
        )

    def _remedies(self, general: Sequence[Remedy], before: Outcome) -> Iterator[Remedy]:
        """Yield the general advice, played where the figures leave it open and the script need not be changed."""
        smaller = self._smaller_batch(before)
        if smaller is not None:
            yield smaller
        left_open = {each.code: each for each in general if each.verdict == UNCHECKED and each.code in _UNCHANGED}
        judged_otherwise = {*left_open, *(["split_general", "split_logged"] if smaller else [])}
        yield from (each for each in general if each.code not in judged_otherwise)
        if alone := left_open.get("close_others"):
            after = self.play(self.arguments, used_bytes=0)
            yield self._judged(alone, after, before, self.card.total_bytes)
        if setting := left_open.get("expandable_segments"):
            after = self.play(self.arguments, environ={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": EXPANDABLE})
            yield self._judged(setting, after, before, self.card.room_bytes)

    def _judged(self, remedy: Remedy, after: Outcome, before: Outcome, room_bytes: int) -> Remedy:
        if after.error:
            return remedy
        return judged(remedy.code, after, before=before, room_bytes=room_bytes, paste=remedy.paste)

    def _smaller_batch(self, before: Outcome) -> Remedy | None:
        """Judge a sixteenth of the batch size that the arguments name, with as many more passes if they name them."""
        run = Variant(tuple(self.arguments), os.environ)
        batch = number_in_words(run.words, is_batch)
        value = batch.number if batch else None
        if batch is None or value is None or value == 1:
            return None
        parts = min(USUAL_SHARE, value)
        run, passes = batch.set(run, value // parts), number_in_words(run.words, is_accumulation)
        changes = {batch.name: value // parts}
        if passes is not None and passes.number is not None:
            changes[passes.name] = passes.number * parts
            run = passes.set(run, passes.number * parts)
        after = self.play(run.words, timeout_s=_PATIENCE_S)
        if after.error or (after.fits and not after.steps):
            return None  # it could not be judged
        return judged(
            "script_batch",
            after,
            before=before,
            room_bytes=self.card.room_bytes,
            exact=len(changes) == 2,
            paste=(" ".join(f"{option}={number}" for option, number in changes.items()),),
            change=Option(name=batch.name, size=value // parts, value=value),
        )


def _general(facts: Facts, run: RunFacts) -> list[Remedy]:
    """Return the general advice, and the two remedies that only a play can judge where the figures do not."""
    found = advice(facts, evidence_of(facts, run))
    known = {each.code for each in found}
    return [*found, *(each for each in (expandable_segments(facts), close_others(facts)) if each.code not in known)]
