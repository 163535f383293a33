"""Changes with which a script fits that does not: each is played, and those that fit are shown with their diffs."""

import os
import re
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from importlib.util import find_spec
from pathlib import Path

import msgspec

from tightfit.config.knob import (
    Knob,
    Variant,
    find_knob,
    is_accumulation,
    is_batch,
    is_of_training,
    number_in_environment,
    number_in_words,
    options_of,
    read_text,
    text_of,
    with_expandable_segments,
)
from tightfit.errors import ConfigError
from tightfit.packages import is_packages_file
from tightfit.questions.asking import Asked
from tightfit.questions.edits import KINDS, Kind
from tightfit.simulation.details import Detail, StepTime
from tightfit.storage import as_diff
from tightfit.vgpu.records import Settings, VirtualCard

_BATCHES = (
    "batch_size",
    "per_device_train_batch_size",
    "micro_batch_size",
    "train_batch_size",
    "device_batch_size",
    "mini_batch_size",
    "bs",
)
_PASSES = (
    "gradient_accumulation_steps",
    "accumulation_steps",
    "grad_accumulation_steps",
    "grad_accum_steps",
    "accum_steps",
    "gradient_accumulation",
    "accumulate_grad_batches",
    "grad_accum",
    "accumulation",
)
_TAKES_ARGUMENTS = re.compile(
    r"argparse|sys\.argv|HfArgumentParser|configurator|\bclick\b|\btyper\b|\bfire\b|hydra|absl"
)
_LARGEST_FILE = 1 << 20
_STEPS_AFTER = 2
"""Steps beyond the one that failed, in which a change shows whether it may help."""


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """A change with which the script fits, as it was played."""

    changes: list[str]
    """Kinds of changes, such as "checkpoint", all of them together."""
    values: dict[str, int]
    """New numbers of arguments or keys."""
    is_exact: bool
    """True if the result stays the same, up to rounding."""
    costs_time: bool
    """True if a part of the step is computed twice."""
    command: list[str]
    """Words to run it with; empty if they stay as they are."""
    diff: str
    """Change of the files, which `patch -p0` takes; empty if none is changed."""
    device_bytes: int
    free_bytes: int
    step: StepTime | None
    reason: str
    """Why the play ended."""


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """A change that was played and does not help."""

    changes: list[str]
    values: dict[str, int]
    outcome: str
    """out_of_memory, or error where the changed script does not run."""


class Suggestions(msgspec.Struct, frozen=True, kw_only=True):
    """The changes that were found, as `tightfit dryrun --suggest --json` prints them."""

    script: str
    gpu: VirtualCard
    fits: bool
    """True if the script fits as it is."""
    device_bytes: int
    """Peak of the script as it is; where it failed, with the request that failed."""
    free_bytes: int
    suggestions: list[Suggestion]
    tried: list[Tried]
    files_tried: bool
    """False where plays have no private view of the file system, so that no file could be changed for them."""
    plays: int
    seconds: float


@dataclass(frozen=True)
class Change:
    """Kinds of changes to the run, put together."""

    codes: tuple[str, ...]
    variant: Variant
    values: Mapping[str, int]
    is_exact: bool = True
    costs_time: bool = False
    one_pass: Variant | None = None
    """The same with as many passes a step as before: enough to see whether it may fit."""


class Workshop:
    """The script with its files, and the changes that can be made to it."""

    def __init__(self, variant: Variant, files: Sequence[str]) -> None:
        self._variant = variant
        self._texts = dict(_readable(files))
        self._has_training_arguments = any("HfArgumentParser" in text for text in self._texts.values())
        self.kinds = [kind for kind in KINDS if self._rewritten(variant, kind) is not None]

    def changed(self, kinds: Sequence[Kind], variant: Variant | None = None) -> Change:
        """Put kinds of changes together, upon a variant if one is given."""
        variant = variant or self._variant
        for kind in kinds:
            variant = self._rewritten(variant, kind) or variant
        codes = tuple(kind.code for kind in kinds)
        is_exact = all(kind.is_exact for kind in kinds)
        return Change(codes, variant, {}, is_exact, any(kind.costs_time for kind in kinds))

    def smaller(self, kinds: Sequence[Kind] = ()) -> Iterator[Change]:
        """Yield smaller and smaller batches of the same step, where the script names its batch size."""
        base = self.changed(kinds)
        batch = self._knob(base.variant, is_batch, _BATCHES)
        if batch is None or batch.number is None:
            return
        for parts in (2**power for power in range(1, 20)):
            if batch.number % parts:
                return
            values = {batch.name.lstrip("-"): batch.number // parts}
            variant = one_pass = batch.set(base.variant, batch.number // parts)
            passes = self._knob(variant, is_accumulation, _PASSES)
            if passes is not None and passes.number is not None:
                values[passes.name.lstrip("-")] = passes.number * parts
                variant = passes.set(variant, passes.number * parts)
            is_exact = base.is_exact and len(values) == 2
            yield Change((*base.codes, "batch"), variant, values, is_exact, base.costs_time, one_pass)

    def expandable(self) -> Change | None:
        """Return the run with the allocator's setting against fragments; None if it has one already."""
        variant = with_expandable_segments(self._variant)
        return Change(("expandable_segments",), variant, {}) if variant else None

    def diff(self, variant: Variant) -> str:
        """Return the changes of files as a unified diff, with paths from this folder."""
        return "".join(_diff(path, text) for path, text in variant.replaced.items())

    def _rewritten(self, variant: Variant, kind: Kind) -> Variant | None:
        """Make a change by its option, else in the files; None if there is no place for it."""
        if option := self._option(kind):
            name = option.partition("=")[0]
            is_there = any(word.partition("=")[0] == name for word in variant.words)
            if is_there or (kind.package and find_spec(kind.package) is None):
                return None
            return with_fields(variant, words=(*variant.words, option))
        texts = {path: variant.replaced.get(path, text) for path, text in self._texts.items()}
        changed = {path: after for path, text in texts.items() if (after := kind.apply(text)) is not None}
        return with_fields(variant, replaced={**variant.replaced, **changed}) if changed else None

    def _option(self, kind: Kind) -> str:
        """Return the program's own option for a kind of change, or nothing."""
        if kind.option and self._has_training_arguments:
            return kind.option
        found = kind.switch and kind.switch.search("\n".join(self._texts.values()))
        return found[1] if found else ""

    def _knob(self, variant: Variant, is_wanted: Callable[[str], bool], names: Sequence[str]) -> Knob | None:
        """Return the place of a number: in the command, else in a file or a script under one of the names."""
        given = number_in_words(variant.words, is_wanted) or number_in_environment(variant, is_wanted)
        options = [name.lstrip("-") for name in options_of(variant.words) if is_wanted(name)]
        named = (self._knob_of(variant, name) for name in dict.fromkeys((*names, *options)))
        return given or next(filter(None, named), None)

    def _knob_of(self, variant: Variant, name: str) -> Knob | None:
        try:
            knob = find_knob(variant, name, is_wanted=is_of_training)
        except ConfigError:  # several keys of a file have that name
            return None
        texts = {path: text_of(variant, path) for path in self._texts}
        whole = "".join(texts.values())
        if knob.number is not None and (knob.kind != "added" or _TAKES_ARGUMENTS.search(whole)):
            return knob
        if self._has_training_arguments and name in _OF_TRANSFORMERS:
            return with_fields(knob, value=_OF_TRANSFORMERS[name])
        return next((each for path, text in texts.items() for each in _constants(path, text, name)), None)


_OF_TRANSFORMERS = {"per_device_train_batch_size": "8", "gradient_accumulation_steps": "1"}
"""Defaults of TrainingArguments."""


def _constants(path: str, text: str, name: str) -> Iterator[Knob]:
    """Yield the numbers that a script gives a name of its own, or an argument of that name."""
    found = re.finditer(rf"(?<![\w.\"'-])({name}|{name.upper()})[ ]*=[ ]*(\d+)(?![\w.])", text)
    yield from (Knob(each[1], "file", each[2], file=path, span=each.span(2)) for each in found)


def suggest(asked: Asked, *, tell: Callable[[Sequence[str]], object] = lambda codes: None) -> Suggestions:
    """Find changes with which the script fits; `tell` hears of the kinds of each before it is played.

    ConfigError for a script that fails for another reason than memory.
    """
    started, played = time.monotonic(), asked.simulator.played
    base = asked.must_run(asked.play([asked.request()])[0])
    found = base.findings
    has_view = found.protection == "view"  # in which a play finds changed files
    workshop = Workshop(asked.variant, [each.path for each in base.files] if has_view else [])
    search = Search(with_fields(asked, trusts_errors=True), workshop, first_steps=found.steps + _STEPS_AFTER, tell=tell)
    if found.outcome != "fits":
        search.run()
    return Suggestions(
        script=asked.script,
        gpu=found.gpu,
        fits=found.outcome == "fits",
        device_bytes=found.needed_bytes,
        free_bytes=found.left_bytes,
        suggestions=[search.suggestion(change, detail) for change, detail in search.fitting],
        tried=search.failing,
        files_tried=has_view,
        plays=asked.simulator.played - played,
        seconds=round(time.monotonic() - started, 1),
    )


class Search:
    """Plays single changes, then those together that alone do not suffice.

    A change is played a few steps beyond the failure first, and to the end only if it then still fits.
    """

    def __init__(
        self, asked: Asked, workshop: Workshop, *, first_steps: int, tell: Callable[[Sequence[str]], object]
    ) -> None:
        self._asked, self._workshop, self._tell = asked, workshop, tell
        self._short = msgspec.structs.replace(
            asked.settings, steps=min(first_steps, asked.settings.steps or first_steps)
        )
        self.fitting: list[tuple[Change, Detail]] = []
        self.failing: list[Tried] = []
        self._broken: set[str] = set()
        """Kinds with which the script does not run."""

    def run(self) -> None:
        workshop = self._workshop
        expandable = workshop.expandable()
        for change in [*(workshop.changed([kind]) for kind in workshop.kinds), *([expandable] if expandable else [])]:
            self._try([change])
        self._try(workshop.smaller())
        kinds = [kind for kind in workshop.kinds if kind.code not in self._broken]
        exact = [kind for kind in kinds if kind.is_exact]
        for together in ([kind for kind in exact if not kind.costs_time], exact):
            if len(together) > 1 and not self._has_part_of(together):
                self._try_together(together)
        for last in filter(None, dict.fromkeys((tuple(exact), tuple(kinds)))):
            if not self.fitting and last != tuple(exact):
                self._try_together(last)
            if not self.fitting:
                self._try(workshop.smaller(last))
        self.fitting.sort(key=lambda each: (not each[0].is_exact, each[0].costs_time, len(each[0].codes)))

    def suggestion(self, change: Change, detail: Detail) -> Suggestion:
        found = detail.findings
        environ = change.variant.environ
        given = self._asked.variant.environ
        set_anew = [f"{name}={value}" for name, value in environ.items() if given.get(name) != value]
        words = [*set_anew, *change.variant.words]
        return Suggestion(
            changes=list(change.codes),
            values=dict(change.values),
            is_exact=change.is_exact,
            costs_time=change.costs_time,
            command=words if words != list(self._asked.variant.words) else [],
            diff=self._workshop.diff(change.variant),
            device_bytes=found.needed_bytes,
            free_bytes=found.left_bytes,
            step=detail.step,
            reason=found.stopped_because,
        )

    def _try(self, changes: Iterable[Change]) -> None:
        """Keep the first change that fits."""
        for change in changes:
            if self._fits(change) and self._keep(change):
                return

    def _try_together(self, kinds: Sequence[Kind]) -> None:
        """Keep kinds that fit together: without those that the first steps do not need, if it then fits to its end."""
        if not self._fits(self._workshop.changed(kinds)):
            return
        needed = self._needed(kinds)
        if not self._keep(self._workshop.changed(needed)) and len(needed) < len(kinds):
            self._keep(self._workshop.changed(kinds))  # some are needed only later in the run

    def _needed(self, kinds: Sequence[Kind]) -> list[Kind]:
        """Return the kinds without which the first steps do not fit."""
        needed = list(kinds)
        for kind in reversed(kinds):
            fewer = [each for each in needed if each is not kind]
            if fewer and self._fits(self._workshop.changed(fewer), is_attempt=True):
                needed = fewer
        return needed

    def _fits(self, change: Change, *, is_attempt: bool = False) -> bool:
        """Play the first steps with a change; `is_attempt`: that it does not fit is nothing to tell."""
        outcome = _outcome(self._played(change, self._short))
        if outcome == "error":
            self._broken |= set(change.codes)
        if outcome != "fits" and not is_attempt:
            self._fail(change, outcome)
        return outcome == "fits"

    def _keep(self, change: Change) -> bool:
        """Play a change to the end, and keep it if it fits."""
        detail = self._played(change, self._asked.settings)
        if _outcome(detail) == "fits":
            self.fitting.append((change, detail))
            return True
        self._fail(change, _outcome(detail))
        return False

    def _fail(self, change: Change, outcome: str) -> None:
        self.failing.append(Tried(changes=list(change.codes), values=dict(change.values), outcome=outcome))

    def _played(self, change: Change, settings: Settings) -> Detail:
        self._tell(change.codes)
        variant = change.one_pass if settings is self._short and change.one_pass else change.variant
        (detail,) = self._asked.play([self._asked.request(variant, settings=settings)])
        return detail

    def _has_part_of(self, kinds: Sequence[Kind]) -> bool:
        """Return True if some of the kinds fit already."""
        codes = {kind.code for kind in kinds}
        return any(codes >= set(change.codes) for change, _ in self.fitting)


def _outcome(detail: Detail) -> str:
    """Return the outcome of a play; a script that failed after it caught an out-of-memory error did not fit."""
    found = detail.findings
    return "out_of_memory" if found.outcome == "error" and not found.has_other_error else found.outcome


def _readable(files: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the Python files of the user among those that a play read, with their texts."""
    of_python = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
    for path in files:
        is_own = not (is_packages_file(path) or os.path.realpath(path).startswith(of_python))
        if not path.endswith(".py") or not is_own:
            continue
        try:
            data = Path(path).read_bytes()
            if len(data) <= _LARGEST_FILE:
                yield path, data.decode()
        except (OSError, UnicodeDecodeError):
            continue


def _diff(path: str, after: str) -> str:
    name = os.path.relpath(path)
    name = os.path.abspath(path) if name.startswith("..") else name
    return as_diff(name, read_text(path), after)
