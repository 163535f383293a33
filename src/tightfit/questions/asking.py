"""The plays of a question: one warm service for all of them, and the answers of earlier questions remembered."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from tightfit.config.knob import Variant
from tightfit.errors import ConfigError
from tightfit.simulation.client import Simulator
from tightfit.simulation.details import CardSize, Detail
from tightfit.simulation.dry_run import error_of, script_request
from tightfit.simulation.requests import DetailRequest
from tightfit.vgpu.command_line import program_word
from tightfit.vgpu.records import Settings
from tightfit.wording import say


def detail_request(
    words: Sequence[str],
    settings: Settings,
    environ: Mapping[str, str] | None = None,
    *,
    replaced: Mapping[str, str] | None = None,
    cards: Sequence[CardSize] = (),
    remember: bool = True,
    trusts_errors: bool = False,
) -> DetailRequest:
    """Return the request for a quiet play of a command in this folder.

    Raises this package's errors for an unknown card or script.
    """
    script, *arguments = words or [""]
    run = script_request(script, arguments, settings, environ, replaced=replaced)
    return DetailRequest(
        run=replace(run, is_quiet=True), cards=tuple(cards), remember=remember, trusts_errors=trusts_errors
    )


def details_of(simulator: Simulator, requests: Sequence[DetailRequest]) -> list[Detail]:
    """Return the details of each play. Raises the error of one that could not be made."""
    details = []
    for answer in simulator.play(requests):
        if not isinstance(answer, Detail):
            raise error_of(answer)
        details.append(answer)
    return details


@dataclass(frozen=True)
class Asked:
    """A command on a card, and the service that plays it."""

    simulator: Simulator
    settings: Settings
    variant: Variant
    trusts_errors: bool = False
    """True once the script has run: a remembered error is then one of its variant or card."""

    @classmethod
    def of(
        cls,
        simulator: Simulator,
        settings: Settings,
        words: Sequence[str],
        environ: Mapping[str, str] | None = None,
    ) -> "Asked":
        return cls(simulator, settings, Variant(tuple(words), dict(os.environ if environ is None else environ)))

    @property
    def script(self) -> str:
        return program_word(self.variant.words)

    def request(
        self, variant: Variant | None = None, *, settings: Settings | None = None, cards: Sequence[CardSize] = ()
    ) -> DetailRequest:
        """Return the request for one play. Raises this package's errors for an unknown card or script."""
        variant = variant or self.variant
        return detail_request(
            variant.words,
            settings or self.settings,
            variant.environ,
            replaced=variant.replaced,
            cards=cards,
            trusts_errors=self.trusts_errors,
        )

    def play(self, requests: Sequence[DetailRequest]) -> list[Detail]:
        """Return the details of each play. Raises the error of one that could not be made."""
        return details_of(self.simulator, requests)

    def must_run(self, detail: Detail) -> Detail:
        """Return it. ConfigError for a script that fails, and not for memory or after it ran out."""
        if detail.findings.has_other_error:
            reason = detail.findings.stopped_because
            raise ConfigError(say("questions.asking.failed", script=self.script, reason=reason))
        return detail
