"""A configuration of another program, played: its model's training step on the virtual card, and with each fix.

The program itself is not run. A step of the same model with the same batch, adapters and optimizer shows what such a
run needs; where the program allocates in its own way, the play and the log differ, and nothing is concluded from it
about the tensor that failed.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tightfit.diagnosis.advice import advice
from tightfit.diagnosis.cause_records import SIMULATED, Cause, Held, ModelStep
from tightfit.diagnosis.causes import by_size, causes_of, play_fits
from tightfit.diagnosis.config_rules import fitted
from tightfit.diagnosis.culprit import Culprit, culprit_of_evidence, culprit_of_play
from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.fix_words import of_one_sequence
from tightfit.diagnosis.model_run import ModelRun
from tightfit.diagnosis.named_card import Card
from tightfit.diagnosis.outcome import Outcome, outcome_of_findings
from tightfit.diagnosis.remedies import DOES_NOT_FIT, FITS, UNCHECKED, Remedy, Resized, figures_of, ranked
from tightfit.gpus import find_gpu
from tightfit.oomlog.facts import Facts
from tightfit.vgpu.records import Findings, Settings

if TYPE_CHECKING:
    from tightfit.simulation.client import Progress, Simulator

_PATIENCE_S = 150.0
"""Seconds given to one play; a step of 8 billion parameters takes 30 on a slow machine."""
_MOST = 3
"""Fixes that are played."""
_KEPT = ("PATH", "HOME", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "TERM", "XDG_CACHE_HOME", "VIRTUAL_ENV")
"""Variables that the play is given: what it does depends on no other."""
_SCRIPT = "model_step.py"


def can_play() -> bool:
    """Return True where Transformers and torch are installed; neither is imported."""
    return find_spec("transformers") is not None and find_spec("torch") is not None


class ModelPlay:
    """A training step on one card."""

    def __init__(self, run: ModelRun, card: Card, *, progress: "Progress | None" = None) -> None:
        self._run, self._card, self._progress = run, card, progress
        self._simulator: Simulator | None = None
        self._script = ""

    def explained(self, plain: Explanation, facts: Facts, evidence: Evidence) -> Explanation | None:
        """Return the explanation with the results of the plays; None if the step could not be played."""
        from tightfit.simulation.client import Simulator

        source = Path(__file__).parents[1] / "simulation" / "model_script.py"
        with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
            self._script = shutil.copyfile(source, Path(folder, _SCRIPT)).as_posix()
            with Simulator(workers=1, progress=self._progress) as self._simulator:
                base = self._play(self._run)
                if base is None:
                    return None
                given = fitted(advice(facts, evidence), plain.foreign)
                fixes = tuple(each for each in given if not _is_done(self._run, each))
                remedies = fixes if base.fits else ranked(list(self._judged(fixes, evidence, base)))
        return replace(
            plain,
            card=self._card,
            culprit=self._culprit(facts, evidence, base),
            causes=self._causes(plain, facts, evidence, base),
            remedies=remedies,
            played="model",
            model_run=self._run,
            framework=evidence.framework,
            not_modelled=base.not_modelled,
        )

    def _culprit(self, facts: Facts, evidence: Evidence, base: Outcome) -> Culprit | None:
        played = culprit_of_play(facts, base)
        return played if played is not None and played.matches else culprit_of_evidence(facts, evidence)

    def _causes(self, plain: Explanation, facts: Facts, evidence: Evidence, base: Outcome) -> tuple[Cause, ...]:
        """Return the causes in the play, then those in the log."""
        culprit = self._culprit(facts, evidence, base)
        printed = plain.reading.context
        if culprit is not None and culprit.label == SIMULATED:
            return causes_of(facts, printed, culprit=culprit, base=base)
        found = causes_of(facts, printed, culprit=culprit, evidence=evidence, unplayed_because="config")
        if base.fits:
            return (*found, play_fits(base))
        step = ModelStep(
            code="model_step",
            label=SIMULATED,
            of=self._run.name,
            phase=base.phase,
            device_bytes=base.device_bytes,
            room_bytes=self._card.room_bytes,
        )
        return (step, Held(code="held", label=SIMULATED, held=by_size(base.categories)[:3]), *found)

    def _judged(self, fixes: tuple[Remedy, ...], evidence: Evidence, base: Outcome) -> Iterator[Remedy]:
        """Yield the fixes, the first of those that change the step with the verdict of a play."""
        left = _MOST
        for fix in fixes:
            changed = _with(self._run, fix) if left and fix.verdict == UNCHECKED else None
            after = self._play(changed) if changed is not None else None
            left -= changed is not None
            if after is not None and not after.fits and isinstance(fix.change, Resized) and fix.change.size > 1:
                # A quarter of the batch is not enough: one sequence a pass is the least.
                fix = of_one_sequence(fix, evidence)
                changed = _with(self._run, fix)
                after = self._play(changed) if changed is not None else None
            yield fix if after is None else self._verdict(fix, after, base)

    def _verdict(self, fix: Remedy, after: Outcome, base: Outcome) -> Remedy:
        reason = "fits" if after.fits else "fails_at" if after.failure else "too_much"
        return replace(
            fix,
            verdict=FITS if after.fits else DOES_NOT_FIT,
            reason=reason,
            label=SIMULATED,
            device_bytes=after.device_bytes,
            saved_bytes=base.device_bytes - after.device_bytes,
            figures=figures_of(after, self._card.room_bytes),
        )

    def _play(self, run: ModelRun) -> Outcome | None:
        """Return the outcome of a step, remembered or played; None if it did not come to an end."""
        from importlib.metadata import version

        from tightfit.simulation.cache import recall, remember
        from tightfit.simulation.dry_run import script_request

        environ = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environ["TIGHTFIT_TRANSFORMERS"] = version("transformers")
        request = replace(script_request(self._script, run.arguments(), self._settings(), environ), is_quiet=True)
        known = replace(request, script=_SCRIPT, folder="", environ={"transformers": version("transformers")})
        found = recall(known)
        if found is None:
            assert self._simulator is not None
            answer = self._simulator.play([request])[0]
            if not isinstance(answer, Findings):
                return None
            remember(known, found := answer)
        outcome = outcome_of_findings(found)
        return None if outcome.error or (outcome.fits and not outcome.steps) else outcome

    def _settings(self) -> Settings:
        card = self._card
        return Settings(
            gpu=card.name,
            memory_bytes=card.total_bytes if card.total_stated else None,
            used_bytes=card.used_bytes,
            context_bytes=card.context_bytes,
            capability=card.capability if find_gpu(card.name) is None else None,
            timeout_s=_PATIENCE_S,
        )


def _is_done(run: ModelRun, fix: Remedy) -> bool:
    """Return True for a fix that the step has already, by its program's own default."""
    return fix.code == "checkpointing_general" and run.checkpointing


def _with(run: ModelRun, fix: Remedy) -> ModelRun | None:
    """Return the step with a fix; None for one that a step of one card does not show, or that it has already."""
    if isinstance(fix.change, Resized):
        return replace(run, batch=fix.change.size, accumulation=fix.change.passes)
    if fix.code == "checkpointing_general" and not run.checkpointing:
        return replace(run, checkpointing=True)
    if fix.code == "shorter_length" and run.length > 1:
        return replace(run, length=run.length // 2)
    if fix.code == "lora" and not run.rank:
        return replace(run, rank=8, weights=run.cast or run.weights)
    if fix.code == "half_precision" and not run.cast and run.weights == "float32":
        return replace(run, cast="bfloat16")
    return None
