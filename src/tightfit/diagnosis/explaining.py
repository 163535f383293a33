"""From a log, and a configuration or a script where there is one, to the explanation of its failure."""

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TypeGuard

from msgspec.structs import replace

from tightfit.config import TrainConfig
from tightfit.diagnosis.advice import advice, closing_first
from tightfit.diagnosis.cause_records import LIKELY, MEASURED, SIMULATED, Cause, OtherKind
from tightfit.diagnosis.causes import causes_of, is_of_device
from tightfit.diagnosis.config_rules import fitted
from tightfit.diagnosis.contrast import setting_that_helped, switch_against
from tightfit.diagnosis.culprit import culprit_of_evidence, culprit_of_line, culprit_of_play
from tightfit.diagnosis.done_already import is_done
from tightfit.diagnosis.evidence import Evidence, evidence_of
from tightfit.diagnosis.evidence_causes import with_closed
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.foreign_config import Foreign, with_foreign
from tightfit.diagnosis.framework_words import programs
from tightfit.diagnosis.kind_details import with_run
from tightfit.diagnosis.kind_fixes import fixes_of
from tightfit.diagnosis.lower_values import below_stated, is_of_llama_cpp
from tightfit.diagnosis.measures import excluded_in, is_among, tried_in
from tightfit.diagnosis.model_run import model_run_of
from tightfit.diagnosis.named_card import OF_OTHER_MAKERS, Card, card_of
from tightfit.diagnosis.outcome import Outcome, card_of_findings, outcome_of_findings
from tightfit.diagnosis.own_script import OwnScript, read_failure
from tightfit.diagnosis.own_words import in_own_options
from tightfit.diagnosis.plays import Plays
from tightfit.diagnosis.printed_config import printed_config
from tightfit.diagnosis.printed_version import with_printed_version
from tightfit.diagnosis.purpose import INFERENCE, TRAINING
from tightfit.diagnosis.remedies import UNCHECKED, Remedy, Switch, for_machine
from tightfit.diagnosis.report_words import shows
from tightfit.diagnosis.variants import Stage, variant_of
from tightfit.diagnosis.verdicts import verdicts
from tightfit.errors import ConfigError
from tightfit.links import split_count
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.kinds import is_of_allocator, memory_of
from tightfit.oomlog.log_reader import LogReading, read_log
from tightfit.oomlog.ownership import ownership
from tightfit.oomlog.snapshot_facts import read_snapshot_failure
from tightfit.units import format_bytes
from tightfit.vgpu.card_arguments import check_name
from tightfit.vgpu.records import Findings, Settings
from tightfit.wording import chosen_language, say

_MAY_BE_PATH = re.compile(r"[^\n\0]{1,1024}")
_LOG_NAME = re.compile(r"\S+\.(log|txt|out|err|pickle)")
if TYPE_CHECKING:
    from tightfit.simulation.client import Progress


def explain(
    source: str | bytes | os.PathLike[str] | IO[bytes] | IO[str] | None,
    *,
    config: TrainConfig | None = None,
    lang: str | None = None,
    gpu: str | None = None,
    script: str | None = None,
    arguments: Sequence[str] = (),
    config_names: Sequence[str] = (),
    workers: int = 2,
    log: Callable[[str], object] = lambda text: None,
    progress: "Progress | None" = None,
    foreign: Foreign | None = None,
) -> Explanation:
    """Explain a failure from a log's text, its path, an open file, or the path of a `.pickle` memory snapshot.

    With `config`, or keys that the log prints, the run is played on a virtual card of the log's size, and so is every
    remedy; with `script` and its `arguments` that script is. `gpu` names the card. `foreign` is a configuration of
    another program; its values count like those that the log prints. Raises TightfitError for a file, card or
    script that cannot be used; a log in which nothing failed is an answer. `log` gets a line when plays begin,
    `progress` hears of those done.
    """
    started = time.monotonic()
    lang = chosen_language(lang)  # an unknown one is refused before anything is played
    if not _is_log(source) and (source is not None or script is None):
        raise ConfigError(say("explain.explaining.no_source", value=source))
    gpu = _checked_gpu(gpu)
    if script is not None and config is not None:
        raise ConfigError(say("explain.explaining.two_runs"))
    reading = _with_run(_read(source), foreign)
    plain = Explanation(facts=reading.failure, reading=reading, language=lang, foreign=foreign)
    player = _Player(gpu=gpu, workers=workers, log=log, progress=progress)
    found = _for_machine(
        _explained(plain, config, player) if script is None else _with_script(plain, script, arguments, player)
    )
    return replace(found, config_names=tuple(config_names), seconds=time.monotonic() - started)


class _Player(NamedTuple):
    """Settings of the plays of a run."""

    gpu: str | None
    """The card that the user names."""
    workers: int
    log: Callable[[str], object]
    progress: "Progress | None"


def _checked_gpu(gpu: str | None) -> str | None:
    """Return the name of one card of those that the user names."""
    if gpu is None:
        return None
    check_name(gpu)
    return split_count(gpu)[2]


def _with_run(reading: LogReading, foreign: Foreign | None) -> LogReading:
    """Return a reading with the values of another program's configuration, and the failure with details of its run."""
    if foreign is not None:
        reading = replace(reading, run=with_foreign(reading.run, foreign))
    if reading.failure is None:
        return reading
    failure = with_printed_version(with_run(reading.failure, reading.run), reading.run)
    return _of_torch(replace(reading, failure=failure))


def _explained(plain: Explanation, config: TrainConfig | None, player: _Player) -> Explanation:
    """Explain a log without the user's script."""
    if plain.facts is None:
        return plain
    if not is_of_device(plain.facts):
        return _of_kind(plain, plain.facts)
    return _of_device(plain, plain.facts, config, player)


_OLDER_VERSION = (Remedy(code="older_version", verdict=UNCHECKED, reason="older_version", label=LIKELY, exact=None),)
"""The fix of a report that tells of an older version that ran."""


def _for_machine(found: Explanation) -> Explanation:
    """Return an explanation with lines to paste for the user's shell."""
    facts, run = found.facts, found.reading.run
    if facts is None:
        return found
    excluded = excluded_in(run.text)
    known = found.remedies if found.played == "model" else fitted(found.remedies, found.foreign)
    wanted = tuple(below_stated(each, run.text) for each in known if not excluded.has(each))
    if "one_buffer" in facts.details:
        wanted = tuple(each for each in wanted if each.code != "mps_watermark")
    if is_of_allocator(facts.kind):
        wanted = tuple(each for each in wanted if not is_of_llama_cpp(each))
    if shows(run.text, "subject.closing_helps") and memory_of(facts.kind) == "device":
        found, wanted = replace(found, causes=with_closed(found.causes)), closing_first(wanted)
    if shows(run.text, "subject.older_worked"):
        wanted = (*_OLDER_VERSION, *wanted)
    if (name := switch_against(run.text)) is not None:
        off = replace(_OLDER_VERSION[0], code="switch_off", reason="switch_off", change=Switch(name=name))
        wanted = (*wanted[:1], off, *wanted[1:])
    if (setting := setting_that_helped(run.text)) is not None:
        told = replace(_OLDER_VERSION[0], code="told_setting", reason="told_setting", paste=(setting,))
        wanted = (told, *(each for each in wanted if not is_done(each, setting)))
    tried = tried_in(run.text)
    wanted = tuple(sorted(wanted, key=lambda each: is_among(each, tried)))
    remedies = for_machine(wanted, facts, run.text, on_windows="windows" in run.signs)
    return replace(found, remedies=_with_processes(remedies, facts))


_NAMED = 3
"""Other processes of a message that are named, the largest first."""


def _with_processes(remedies: tuple[Remedy, ...], facts: Facts) -> tuple[Remedy, ...]:
    """Return the fixes with the numbers of the processes that hold the card, beside the tool that lists them."""
    others = [each for each in facts.other_processes if each.pid != facts.own_pid and each.bytes < 2**63]
    ranks = {each.pid for each in ownership(facts).ranks}  # of this process's own job
    others = sorted((each for each in others if each.pid not in ranks), key=lambda each: -each.bytes)[:_NAMED]
    named = ", ".join(f"PID {each.pid}: {format_bytes(each.bytes)}" for each in others)
    if not named:
        return remedies
    return tuple(
        replace(each, paste=(f"{each.paste[0]}  # {named}", *each.paste[1:]))
        if each.code == "close_others" and each.paste
        else each
        for each in remedies
    )


def explain_dryrun(
    findings: Findings, script: str, arguments: Sequence[str] = (), *, settings: Settings, lang: str = "en"
) -> Explanation:
    """Explain a dry run that ran out of memory, from its findings; remedies are played with the same settings."""
    started = time.monotonic()
    outcome, card = outcome_of_findings(findings), card_of_findings(findings)
    reading = read_failure(outcome)
    plain = Explanation(facts=reading.failure, reading=reading, language=lang)
    found = OwnScript(card, script, arguments, settings=settings).explained(plain, outcome)
    if found.culprit is not None:  # the message is the play's own: there is nothing to compare
        found = replace(found, culprit=replace(found.culprit, compared=()))
    return replace(found, seconds=time.monotonic() - started)


def _read(source: str | bytes | os.PathLike[str] | IO[bytes] | IO[str] | None) -> LogReading:
    if source is None:
        return LogReading(failure=None, kind_of_nothing="empty")
    if not isinstance(source, os.PathLike) and not _names_file(source):
        return _text_only(read_log(source))
    path = Path(source)
    try:
        if path.suffix == ".pickle":
            failure = read_snapshot_failure(path)
            return LogReading(failure=failure, kind_of_nothing=None if failure else "nothing")
        with path.open("rb") as file:
            return _text_only(read_log(file), path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(say("explain.explaining.unreadable", path=path, reason=reason)) from None


def _of_torch(reading: LogReading) -> LogReading:
    """Leave out JAX, TensorFlow and Paddle where PyTorch's own figures are printed: the report only compares."""
    if reading.failure is None or reading.failure.allocated_bytes is None or not is_of_device(reading.failure):
        return reading
    kept = tuple(each for each in reading.run.frameworks if each not in programs("without_torch"))
    return replace(reading, run=replace(reading.run, frameworks=kept))


def _is_log(source: object) -> bool:
    return isinstance(source, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(source, "read")


def _names_file(source: str | bytes | IO[bytes] | IO[str]) -> TypeGuard[str]:
    """Return True for a text that is one line and names a file, or looks as if it should."""
    if not isinstance(source, str) or not _MAY_BE_PATH.fullmatch(source):
        return False
    return bool(_LOG_NAME.fullmatch(source)) or os.path.isfile(source)


def _text_only(reading: LogReading, path: Path | None = None) -> LogReading:
    if reading.kind_of_nothing != "binary":
        return reading
    if path is None:
        raise ConfigError(say("explain.explaining.binary_log"))
    raise ConfigError(say("explain.explaining.binary_file", path=path))


def _of_device(plain: Explanation, facts: Facts, config: TrainConfig | None, player: _Player) -> Explanation:
    """Explain memory that ran out on a device: by plays if the configuration and the card are known."""
    printed, evidence = plain.reading.context, evidence_of(facts, plain.reading.run)
    played = "config" if config is not None else "log"
    if config is None and plain.foreign is None:
        config = printed_config(printed, evidence)
    card = card_of(facts, printed, player.gpu)
    of_model = _of_model(plain, facts, card, evidence, player) if card is not None else None
    if of_model is not None:
        return of_model
    if config is None or card is None:
        because = "config" if config is None else "maker" if facts.kind in OF_OTHER_MAKERS else "card"
        return _unplayed(plain, facts, card, because, evidence)
    return replace(_of_plays(plain, facts, card, evidence, config, player), played=played)


def _of_plays(
    plain: Explanation, facts: Facts, card: Card, evidence: Evidence, config: TrainConfig, player: _Player
) -> Explanation:
    """Explain by plays of the trainer's step with this configuration."""
    player.log(say("explain.explaining.playing", gpu=card.name))
    with Stage(card, workers=player.workers, progress=player.progress) as stage:
        plays = Plays(facts, card, variant_of(config, card))
        plays.play(stage)
    culprit = culprit_of_play(facts, plays.base) or culprit_of_evidence(facts, evidence)
    is_simulated = culprit is not None and culprit.label == SIMULATED
    causes = causes_of(
        facts,
        plain.reading.context,
        run=plays.run,
        culprit=culprit,
        base=plays.base,
        train=plays.train,
        evidence=None if is_simulated else evidence,
    )
    return replace(
        plain,
        card=card,
        culprit=culprit,
        causes=causes,
        remedies=verdicts(plays, max_iters=config.max_iters, eval_iters=config.eval_iters)
        or _of_figures_alone(advice(facts, evidence), plays.base),
        not_modelled=plays.base.not_modelled,
        max_iters=config.max_iters,
    )


_BY_FIGURES = ("close_others", "expandable_segments", "max_split_size", "set_device", "raise_fraction")


def _of_figures_alone(remedies: tuple[Remedy, ...], base: Outcome) -> tuple[Remedy, ...]:
    """Return the fixes; only those by the log's figures if the given configuration fits, for it is another run's."""
    return tuple(each for each in remedies if each.code in _BY_FIGURES) if base.fits else remedies


def _of_model(plain: Explanation, facts: Facts, card: Card, evidence: Evidence, player: _Player) -> Explanation | None:
    """Explain by a training step of the model in another program's configuration; None where it cannot be played."""
    run = model_run_of(plain.foreign, evidence) if plain.foreign is not None else None
    if run is None:
        return None
    from tightfit.diagnosis.model_play import ModelPlay, can_play

    if not can_play():
        return None
    player.log(say("explain.explaining.playing_model", model=run.name, gpu=card.name))
    return ModelPlay(run, card, progress=player.progress).explained(plain, facts, evidence)


def _unplayed(plain: Explanation, facts: Facts, card: Card | None, because: str, evidence: Evidence) -> Explanation:
    """Explain by the log alone."""
    culprit = culprit_of_evidence(facts, evidence)
    causes = causes_of(facts, plain.reading.context, culprit=culprit, evidence=evidence, unplayed_because=because)
    return replace(
        _with_purpose(plain, evidence),
        card=card,
        culprit=culprit,
        causes=_with_buffer_limit(causes, facts),
        remedies=advice(facts, evidence),
        unplayed_because=because,
        framework=evidence.framework,
        is_bare=evidence.may_be_of_nanogpt and evidence.is_bare,
    )


def _with_buffer_limit(causes: tuple[Cause, ...], facts: Facts) -> tuple[Cause, ...]:
    """Return the causes with Metal's limit of one buffer first, where the message is about it."""
    if "one_buffer" not in facts.details:
        return causes
    return (OtherKind(code=f"kind_{facts.kind}", label=MEASURED, pid=None), *causes)


def _with_purpose(plain: Explanation, evidence: Evidence) -> Explanation:
    """Return an explanation with the purpose that its fixes suppose, and the words that show it."""
    purpose = _purpose(evidence)
    sign = evidence.purpose_sign if purpose == evidence.purpose else ""
    return replace(plain, purpose=purpose, purpose_sign=sign)


def _purpose(evidence: Evidence) -> str | None:
    """Return the purpose that the fixes suppose."""
    if evidence.infers:
        return INFERENCE
    return TRAINING if evidence.trains else evidence.purpose


def _of_kind(plain: Explanation, facts: Facts) -> Explanation:
    """Explain a failure that no tensor of PyTorch's own message shows."""
    evidence = evidence_of(facts, plain.reading.run)
    culprit = culprit_of_evidence(facts, evidence) if facts.kind in _TOLD and evidence.line else None
    if culprit is None and facts.kind in _WITHOUT_FIGURES:
        culprit = culprit_of_line(facts, plain.reading.run)
    causes = causes_of(facts, plain.reading.context, evidence=evidence, culprit=culprit)
    found = replace(plain, causes=causes, remedies=_fixes_of_kind(plain, facts), culprit=culprit)
    is_plain = facts.kind == "cuda_driver" and facts.details.keys() <= _PLAIN
    return _with_purpose(found, evidence) if is_plain else found


_TOLD = ("program_words", "memory_words")
"""Kinds of failures of which a person's or a program's words tell, and perhaps a traceback."""
_WITHOUT_FIGURES = ("cuda_driver", "nvml_assert")
"""Kinds of failures whose message hides the figures of a tensor that did not fit."""
_REST, _OTHERS, _KEPT = "kind_rest_of_log", "kind_other_programs", "kind_kept_tensors"
_IN_TURN = "kind_in_turn"
_BEFORE_REST = 3
"""Fixes that come before the wish for the rest of a log."""
_PINNING = "kind_no_pinning"
_SHARE = "kind_memory_share"
_OF_UNSLOTH = ("kind_unsloth_target", "kind_unsloth_empty")
_OF_PAIRS = ("kind_pairs_as_product", "kind_pairs_in_rows")


_PASSES = ("forward", "loss", "backward", "optimizer", "sample", "gather")
_PLAIN = frozenset({"native", "one"})
"""Details of a runtime's failure that name no program."""
_BEFORE_PASS = ("setup", "load", "resume")
_BEFORE_OTHERS = 2
"""Fixes of a pass that come before a look at other programs on the card."""


def _of_runtime(found: tuple[Remedy, ...], cures: tuple[Remedy, ...], *, is_in_pass: bool) -> tuple[Remedy, ...]:
    """Return the fixes of a runtime that got no memory: those of a pass first, where the traceback is of one."""
    others = tuple(each for each in found if each.code == _OTHERS)
    pinning = tuple(each for each in found if each.code == _PINNING)
    first, rest = cures[:_BEFORE_OTHERS], cures[_BEFORE_OTHERS:]
    return (*first, *others, *pinning, *rest) if is_in_pass else (*others, *first, *pinning, *rest)


def _fixes_of_kind(plain: Explanation, facts: Facts) -> tuple[Remedy, ...]:
    """Return the fixes of a kind; of a report in a person's words, those in the words of the program that it names."""
    found = fixes_of(facts, plain.reading.run)
    evidence = evidence_of(facts, plain.reading.run)
    is_plain = facts.details.keys() <= _PLAIN
    of_runtime = facts.kind == "cuda_driver" and facts.phase not in _BEFORE_PASS and is_plain
    has_purpose = evidence.framework is not None or evidence.purpose is not None
    if of_runtime and (facts.phase in _PASSES or has_purpose):
        is_in_pass = facts.phase in _PASSES or (evidence.line is not None and evidence.grows != "model")
        return _of_runtime(found, advice(facts, evidence), is_in_pass=is_in_pass)
    if facts.kind == "cuda_driver" and facts.phase == "save":
        cures, others = advice(facts, evidence), tuple(each for each in found if each.code == _OTHERS)
        return (*cures[:1], *others, *cures[1:])
    if facts.kind == "no_batch_fits" and _purpose(evidence) == TRAINING:
        return (*advice(facts, evidence), *(each for each in found if each.code == _OTHERS))
    known = programs("trainers") | programs("applications")
    is_of_known = facts.kind == "memory_words" and evidence.framework in known
    in_phase = facts.kind in ("program_words", "memory_words") and facts.phase in ("save", "eval")
    is_shown = evidence.purpose is not None and "growing" not in facts.details
    is_told = facts.kind == "program_words" and (is_shown or evidence.framework is not None)
    is_known = is_told or (evidence.framework is not None and is_of_known)
    if not (is_known or in_phase):
        return in_own_options(found, evidence)
    asks_for_others = facts.phase in ("load", "setup") or shows(evidence.run.text, "subject.other_programs")
    first = (*_OF_UNSLOTH, _SHARE, *_OF_PAIRS, _IN_TURN, _KEPT, *((_OTHERS,) if asks_for_others else ()))
    cures = (*(each for each in found if each.code in first), *advice(facts, evidence))
    rest = tuple(each for each in found if each.code == _REST)
    return (*cures[:_BEFORE_REST], *rest, *cures[_BEFORE_REST:]) or found


def _with_script(plain: Explanation, script: str, arguments: Sequence[str], player: _Player) -> Explanation:
    """Explain by playing the user's own script on the card of the log, or on the one that the user names."""
    card = card_of(plain.facts or Facts(kind="cuda_out_of_memory"), plain.reading.context, player.gpu)
    if card is None:
        raise ConfigError(say("explain.explaining.no_card" if plain.facts else "explain.explaining.no_card_at_all"))
    own = OwnScript(card, script, arguments, progress=player.progress)
    player.log(say("explain.explaining.playing_script", script=script, gpu=card.name))
    outcome = own.play(own.arguments, is_quiet=False)
    if plain.facts is None and outcome.failure is not None:
        reading = read_failure(outcome)
        plain = replace(plain, facts=reading.failure, reading=reading)
    player.log(say("explain.explaining.checking", script=script, gpu=card.name))
    return own.explained(plain, outcome)
