"""The largest value of an argument that fits: bisection, helped by the straight line that memory follows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from tightfit.config.knob import (
    Knob,
    Variant,
    accumulation_of,
    find_knob,
    is_batch,
    options_of,
    with_expandable_segments,
)
from tightfit.errors import ConfigError
from tightfit.questions.asking import Asked
from tightfit.simulation.details import Detail, FailedAt
from tightfit.vgpu.records import VirtualCard, is_fragmented
from tightfit.wording import say

_FIXED = ("parameters", "optimizer state")
"""Categories that do not grow with a batch."""
_FAR = 0.9
"""Share of a value at which another one shows the slope of memory."""
_START = 8
_MOST = 2**24
_MOST_ROUNDS = 60
_MOST_BELOW = 2
"""Rounds in which all guesses may fit, before larger steps lead beyond the end."""
_MOST_OPTIONS = 12
"""Options of a script that are listed for one that it does not have."""
_MOST_SLOW = 2
"""Guesses that may leave more than half of the open range, before it is halved."""
Play = Callable[[Sequence[int]], list[Detail]]
Tell = Callable[[str, Sequence[int]], object]
"""Called with the name of the argument and values of it."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One value that was played."""

    value: int
    outcome: str
    """fits, out_of_memory or error."""
    device_bytes: int
    """Peak of the process; where it failed, with the request that failed."""
    allocated_bytes: int
    """Highest allocated bytes; where it failed, those at the failure."""
    reserved_bytes: int
    """Highest reserved bytes; where it failed, those at the failure."""
    reason: str
    """Why the play ended."""
    failure: FailedAt | None = None
    """The request that the card could not meet."""

    @property
    def cached_bytes(self) -> int:
        """Reserved bytes beyond the allocated ones."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def is_fragmented(self) -> bool:
        """True if the cache takes more than a quarter of the allocated bytes."""
        return is_fragmented(self.reserved_bytes, self.allocated_bytes)


class Unevenness(msgspec.Struct, frozen=True, kw_only=True):
    """Sign that memory may fall where the value grows, so that a value below one that fits may fail."""

    kind: str
    """fails (the smaller value fails, the larger one fits), falls (the smaller value takes more), or margin (the cache
    of another value is larger than that of the answer by more than the answer leaves free)."""
    low: Trial
    high: Trial


class Largest(msgspec.Struct, frozen=True, kw_only=True):
    """The largest value that fits, as `tightfit dryrun --largest --json` prints it."""

    name: str
    place: str
    """argument, environment, file, or added to the command."""
    file: str
    """Configuration file with the value; empty for other places."""
    gpu: VirtualCard
    largest: int | None
    """None if not even the smallest value fits."""
    next_value: int | None
    """The next larger value, which was played and does not fit; None if none was found."""
    next_outcome: str | None
    multiple: int
    device_bytes: int | None
    """Peak with the largest value."""
    free_bytes: int | None
    unevenness: Unevenness | None
    """None where no play shows that memory falls between two values."""
    expandable: Trial | None
    """Play with expandable segments, where much of the reserved memory was in the cache: of the next value, or of the
    smallest one where none fits."""
    effective_batch: int | None
    """Samples of an optimizer step: batch, passes and processes; None for a value that is no batch size."""
    accumulation: int | None
    processes: int
    command: list[str]
    """Words to run it with; empty for a value in a file."""
    trials: list[Trial]
    not_modelled: list[str]
    """Memory that the plays leave out."""
    plays: int
    """Plays that were made; others were remembered."""
    seconds: float


def largest(asked: Asked, name: str, *, multiple: int = 1, tell: Tell = lambda name, values: None) -> Largest:
    """Find the largest multiple that fits. ConfigError for a value on which no memory depends.

    `tell` hears of the values that are about to be played.
    """
    if multiple < 1:
        raise ConfigError(say("questions.largest.multiple", multiple=multiple))
    started, played = time.monotonic(), asked.simulator.played
    knob = _numeric_knob(asked.variant, name)
    start = _rounded(knob.number or _START, multiple)
    play = _player(asked, knob, start, tell)
    search = Search(asked.script, knob.name, play, multiple)
    fits, fails = search.run(start, explain=lambda reason: _why_not(asked, knob, start, reason))
    best = search.tried.get(fits) if fits else None
    known = best or search.tried[fails or start]
    trials = [_trial(value, search.tried[value]) for value in sorted(search.tried)]
    passes, size = accumulation_of(asked.variant) if is_batch(knob.name) else None, _processes(asked.variant)
    return Largest(
        name=knob.name,
        place=knob.kind,
        file=knob.file,
        gpu=known.findings.gpu,
        largest=fits or None,
        next_value=fails,
        next_outcome=search.tried[fails].findings.outcome if fails else None,
        multiple=multiple,
        device_bytes=best.findings.peak.device_bytes if best else None,
        free_bytes=best.findings.free_bytes if best else None,
        unevenness=unevenness(trials, fits, best.findings.free_bytes) if best else None,
        expandable=_with_expandable(asked, knob, trials, fits, fails),
        effective_batch=fits * (passes or 1) * size if fits and is_batch(knob.name) else None,
        accumulation=passes,
        processes=size,
        command=_command(asked, knob, fits),
        trials=trials,
        not_modelled=known.findings.not_modelled,
        plays=asked.simulator.played - played,
        seconds=round(time.monotonic() - started, 1),
    )


def _player(asked: Asked, knob: Knob, start: int, tell: Tell) -> Play:
    """Return a function that plays values; errors that are remembered count once the first value has run."""
    later = replace(asked, trusts_errors=True)

    def play(values: Sequence[int]) -> list[Detail]:
        tell(knob.name, values)
        return asked.play(
            [(asked if value == start else later).request(knob.set(asked.variant, value)) for value in values]
        )

    return play


def unevenness(trials: Sequence[Trial], fits: int, free_bytes: int) -> Unevenness | None:
    """Return the clearest sign among the values that were played."""
    answer = next(each for each in trials if each.value == fits)
    fitting = [each for each in trials if each.outcome == "fits"]
    pairs = [(low, high) for high in fitting for low in trials if low.value < high.value]
    if fails := [pair for pair in pairs if pair[0].outcome == "out_of_memory"]:
        low, high = fails[-1]
        return Unevenness(kind="fails", low=low, high=high)
    falls = [pair for pair in pairs if pair[0].outcome == "fits" and pair[0].reserved_bytes > pair[1].reserved_bytes]
    if falls:
        low, high = max(falls, key=lambda pair: pair[0].reserved_bytes - pair[1].reserved_bytes)
        return Unevenness(kind="falls", low=low, high=high)
    # The cache grows with the value, too, so that of a larger one counts by the share of the values.
    other = max(trials, key=lambda each: each.cached_bytes * min(1, fits / each.value))
    if other.cached_bytes * min(1, fits / other.value) - answer.cached_bytes > free_bytes:
        low, high = sorted((answer, other), key=lambda each: each.value)
        return Unevenness(kind="margin", low=low, high=high)
    return None


def _with_expandable(asked: Asked, knob: Knob, trials: Sequence[Trial], fits: int, fails: int | None) -> Trial | None:
    """Play the value that fails with expandable segments, if fragments of the cache are a reason and it has none."""
    failing = next((each for each in trials if each.value == fails and each.outcome == "out_of_memory"), None)
    answer = next((each for each in trials if each.value == fits), failing)
    if failing is None or not any(each is not None and each.is_fragmented for each in (failing, answer)):
        return None
    variant = with_expandable_segments(knob.set(asked.variant, failing.value))
    if variant is None:
        return None
    (detail,) = asked.play([replace(asked, trusts_errors=True).request(variant)])
    return _trial(failing.value, detail)


def _numeric_knob(variant: Variant, name: str) -> Knob:
    knob = find_knob(variant, name)
    if knob.kind in ("argument", "environment") and knob.number is None:
        raise ConfigError(say("questions.largest.no_number", name=knob.name, value=knob.value))
    return knob


def _processes(variant: Variant) -> int:
    return int(variant.environ.get("WORLD_SIZE", "1") or 1)


def _why_not(asked: Asked, knob: Knob, value: int, reason: str) -> str:
    """Return the sentence for a script that fails at the first value for another reason than memory."""
    fields = {"script": asked.script, "name": knob.name, "value": value, "reason": reason}
    options = options_of(asked.variant.words)
    if knob.kind == "added" and options:
        return say("questions.largest.not_taken", **fields, options=", ".join(options[:_MOST_OPTIONS]))
    return say("questions.largest.failed", **fields)


def _command(asked: Asked, knob: Knob, value: int) -> list[str]:
    if not value or knob.kind == "file":
        return []
    words = knob.set(asked.variant, value).words
    return [f"{knob.name}={value}", *words] if knob.kind == "environment" else list(words)


class Search:
    """Finds two neighbouring values of which the larger one does not fit."""

    def __init__(self, script: str, name: str, play: Play, step: int) -> None:
        self._script, self._name, self._play, self._step = script, name, play, step
        self.tried: dict[int, Detail] = {}
        self._width, self._slow = 0, 0
        """Width of the open range before, and guesses that left more than half of it."""

    def run(self, start: int, *, explain: Callable[[str], str] = str) -> tuple[int, int | None]:
        """Return the largest value that fits, 0 if none does, and the next larger one; None if all fit.

        ConfigError, in the words of `explain`, for a script that fails at the first value for another reason.
        """
        self._try([start])
        first = self.tried[start].findings
        if first.has_other_error:
            raise ConfigError(explain(first.stopped_because))
        for number in range(_MOST_ROUNDS):
            fits, fails = self._bracket()
            if fails is not None and fails - fits <= self._step:
                return fits, fails
            if fits >= _MOST:
                return fits, None
            self._try(self._values(number, fits, fails))
            self._check_dependence()
        return self._bracket()

    def _values(self, number: int, fits: int, fails: int | None) -> list[int]:
        """Return what to play in a round: guesses by the line, unless these come closer by too little each."""
        if fails is None:
            beyond = _rounded(fits + max(fits // 8, self._step), self._step)
            return [beyond] if number >= _MOST_BELOW else self._candidates(fits, fails)
        self._slow += 0 < self._width < 2 * (fails - fits)
        self._width = fails - fits
        is_error = self.tried[fails].findings.outcome == "error"  # of which memory's lines know nothing
        if fits and (is_error or self._slow >= _MOST_SLOW):
            return [_rounded((fits + fails) // 2, self._step)]
        return self._candidates(fits, fails)

    def _try(self, values: Sequence[int]) -> None:
        new = [value for value in values if value not in self.tried]
        self.tried.update(zip(new, self._play(new), strict=True))

    def _bracket(self) -> tuple[int, int | None]:
        """Return the largest value that fits and the next one above it that was played.

        A smaller value that failed decides nothing: the blocks of the cache may make a larger one take less.
        """
        fits = max(self._fitting(), default=0)
        return fits, min((value for value in self.tried if value > fits), default=None)

    def _candidates(self, fits: int, fails: int | None) -> list[int]:
        """Return the guess and its neighbour: if the lines are right, they are the answer."""
        step, fitting = self._step, self._fitting()
        if not fitting:
            assert fails is not None
            return [_rounded(fails // 2, step)]
        top = _MOST if fails is None else fails - step
        if len(fitting) == 1:
            guess = self._second_guess(fits)
            guess = guess if fails is None else min(guess, (fits + fails) // 2)
            return [min(max(_rounded(guess, step), fits + step), top)]
        guess = self._guess(fits, top)
        if fails is not None:  # where a guess was too large, smaller ones lie ever further from it
            failed = sum(each.findings.outcome != "fits" for each in self.tried.values())
            guess = min(guess, max(fails - step * 2**failed, (fits + fails) // 2))
        guess = min(max(_rounded(guess, step), fits + step), top)
        return [guess, guess + step] if guess < top else [guess]

    def _fitting(self) -> list[int]:
        return sorted(value for value, each in self.tried.items() if each.findings.outcome == "fits")

    def _second_guess(self, fits: int) -> int:
        """Return a value near the end from one play: everything but the model grows with the value, at most."""
        found = self.tried[fits].findings
        fixed = sum(found.categories.get(name, 0) for name in _FIXED)
        growing = max(nbytes - fixed for nbytes in found.phases.values()) if found.phases else 0
        if growing <= 0:
            return 2 * fits
        return max(2 * fits, fits + int(found.free_bytes * fits / growing)) if found.free_bytes > growing else fits + 1

    def _guess(self, fits: int, top: int) -> int:
        """Return the value at which the first phase reaches the card's memory: each follows a line of its own."""
        fitting = self._fitting()
        last = self.tried[fits].findings
        # Memory grows in steps, so two near neighbours would show one of those and not the slope.
        far = [value for value in fitting if value <= _FAR * fits] or fitting[:1]
        before = self.tried[far[-1]].findings
        cached = last.peak.device_bytes - last.peak.allocated_bytes
        room = last.peak.device_bytes + last.free_bytes - cached
        ends = [top]
        for phase, nbytes in last.phases.items():
            slope = (nbytes - before.phases.get(phase, nbytes)) / (fits - far[-1])
            if slope > 0:
                ends.append(fits + int((room - nbytes) / slope))
        return min(ends) if len(ends) > 1 else 2 * fits

    def _check_dependence(self) -> None:
        """ConfigError if twice the value and more takes exactly the same memory."""
        values = sorted(self.tried)
        if len(values) < 2 or len({each.findings.outcome for each in self.tried.values()}) > 1:
            return
        found = [self.tried[value].findings for value in values]
        if values[-1] < 2 * values[0] or len({(each.peak, each.needed_bytes) for each in found}) > 1:
            return
        fields = {"script": self._script, "name": self._name, "low": values[0], "high": values[-1]}
        raise ConfigError(say("questions.largest.independent", **fields, size=found[0].needed_bytes))


def _rounded(value: int, multiple: int) -> int:
    """Round down to a multiple above 0."""
    return max(multiple, value // multiple * multiple)


def _trial(value: int, detail: Detail) -> Trial:
    found, failure = detail.findings, detail.findings.failure
    return Trial(
        value=value,
        outcome=found.outcome,
        device_bytes=found.needed_bytes,
        allocated_bytes=failure.allocated_bytes if failure else found.peak.allocated_bytes,
        reserved_bytes=failure.reserved_bytes if failure else found.peak.reserved_bytes,
        reason=found.stopped_because,
        failure=msgspec.convert(failure, FailedAt, from_attributes=True) if failure else None,
    )
