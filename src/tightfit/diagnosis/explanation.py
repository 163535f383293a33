"""From a log, and a configuration or a script where there is one, to all that is said of the failure."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec.structs import replace

from tightfit.config import TrainConfig
from tightfit.diagnosis.causes import SIMULATED, Cause, causes_of, is_of_device
from tightfit.diagnosis.culprit import Culprit, culprit_of_guesses, culprit_of_play, guesses_of
from tightfit.diagnosis.named_card import Card, card_of
from tightfit.diagnosis.remedies import (
    DOES_NOT_FIT,
    EXPANDABLE,
    FITS,
    UNCHECKED,
    USUAL_SHARE,
    Remedy,
    play_all,
    ranked,
    unplayed,
)
from tightfit.diagnosis.variants import Outcome, Stage, variant_of
from tightfit.errors import ConfigError, TightfitError
from tightfit.gpus import find_gpu
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.log_reader import LogReading, read_log
from tightfit.oomlog.printed import Printed
from tightfit.oomlog.snapshot_facts import read_snapshot_failure
from tightfit.vgpu.records import Findings, Settings
from tightfit.wording.diagnosis import Words, words

_SHAPING = frozenset({"batch_size", "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "init_from", "compile"})
"""Keys of which a log must print at least one for its run to be played."""
_BYTES = (
    "requested_bytes", "total_bytes", "free_bytes", "process_bytes", "allocated_bytes", "unallocated_bytes",
    "reserved_bytes", "private_pool_bytes", "allowed_bytes", "others_bytes", "outside_pytorch_bytes",
)  # fmt: skip


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What failed, which tensor it was, why, and what to do."""

    facts: Facts | None
    """None: there is no failure in the log."""
    reading: LogReading
    language: str
    card: Card | None = None
    culprit: Culprit | None = None
    causes: tuple[Cause, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    played: str = ""
    """config, log (its printed keys), script, or empty."""
    unplayed_because: str = ""
    """A key of the words' table `unplayed`, where nothing was played."""
    config_names: tuple[str, ...] = ()
    """As given on the command line, for the commands to paste."""
    max_iters: int | None = None
    """Steps of the configuration that was played; None if none was."""
    not_modelled: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def best(self) -> Remedy | None:
        """The first remedy, if it fits."""
        return self.remedies[0] if self.remedies and self.remedies[0].verdict == FITS else None

    def __str__(self) -> str:
        from tightfit.diagnosis.render import render

        return render(self, words(self.language))

    def as_dict(self) -> dict[str, Any]:
        """For --json: what is absent is null; sizes are bytes, the printed ones converted exactly."""
        from tightfit.diagnosis.render import Sentences

        facts = self.facts
        said = Sentences(self, words(self.language))
        found: dict[str, Any] = {
            "kind": facts.kind if facts else None,
            "torch_format": facts.torch_format if facts else None,
            "requested_bytes": None,
            "device_index": facts.device_index if facts else None,
        }
        found |= {name: getattr(facts, name) if facts else None for name in _BYTES}
        found |= {
            "other_processes": [
                {"pid": each.pid, "bytes": each.bytes} for each in (facts.other_processes if facts else ())
            ],
            "rank": facts.rank if facts else None,
            "phase": facts.phase if facts else None,
            "frames": [
                {"file": each.file, "line": each.line, "function": each.function, "source": each.source or None}
                for each in (facts.frames if facts else ())
            ],
            "culprit": self.culprit.as_dict() if self.culprit else None,
            "causes": [
                {"code": each.code, "label": each.label, "sentence": said.cause(each), **dict(each.values)}
                for each in self.causes
            ],
            "remedies": [
                {
                    "code": each.code, "verdict": each.verdict, "label": each.label, "exact": each.exact,
                    "device_bytes": each.device_bytes, "saved_bytes": each.saved_bytes, "slowdown": each.slowdown,
                    "title": said.title(each), "sentence": said.reason(each), "paste": list(said.paste(each)),
                }
                for each in self.remedies
            ],
        }  # fmt: skip
        return found


def explain(
    source: str | bytes | os.PathLike[str] | IO[bytes] | None,
    *,
    config: TrainConfig | None = None,
    lang: str = "en",
    gpu: str | None = None,
    script: str | None = None,
    arguments: Sequence[str] = (),
    config_names: Sequence[str] = (),
    workers: int = 2,
) -> Explanation:
    """Explain a failure: a log's text, its path (a Path, not a string), an open file, or a `.pickle` memory snapshot.

    With `config`, or keys that the log prints, the run is played on a virtual card of the log's size, and so is every
    remedy; with `script` and its `arguments` that script is. `gpu` names the card. Raises TightfitError for a file,
    card or script that cannot be used; a log in which nothing failed is an answer.
    """
    started = time.monotonic()
    words(lang)  # an unknown language is refused before anything is played
    if script is not None and config is not None:
        raise ConfigError("--script and --config exclude each other: one run is played")
    reading = _read(source)
    facts = reading.failure
    if script is not None:
        found = _with_script(facts, reading, lang, gpu, script, list(arguments))
    elif facts is None:
        found = Explanation(facts=None, reading=reading, language=lang)
    else:
        found = _explained(facts, reading, config, lang, gpu, workers)
    return replace(found, config_names=tuple(config_names), seconds=time.monotonic() - started)


def explain_dryrun(played: Findings, script: str, arguments: Sequence[str] = (), *, lang: str = "en") -> Explanation:
    """A dry run that ended out of memory, from its findings (`tightfit.dryrun`); remedies are played as it was."""
    started = time.monotonic()
    words(lang)
    findings = msgspec.to_builtins(played)
    reading = read_log("torch.OutOfMemoryError: " + findings["failure"]["message"])
    gpu = findings["gpu"]
    major, minor = gpu["capability"].split(".")
    card = Card(
        name=gpu["name"],
        capability=(int(major), int(minor)),
        total_bytes=gpu["total_bytes"],
        used_bytes=gpu["used_by_others_bytes"],
        context_bytes=gpu["context_bytes"],
        how_named="given",
        total_stated=True,
    )
    found = _of_findings(findings, reading, card, lang, script, list(arguments))
    if found.culprit is not None:  # the message is the play's own: there is nothing to compare
        found = replace(found, culprit=replace(found.culprit, compared=()))
    return replace(found, seconds=time.monotonic() - started)


def _read(source: str | bytes | os.PathLike[str] | IO[bytes] | None) -> LogReading:
    if source is None:
        return LogReading(failure=None, kind_of_nothing="empty")
    if not isinstance(source, os.PathLike):
        return _readable(read_log(source), "the log")
    path = Path(source)
    try:
        if path.suffix == ".pickle":
            failure = read_snapshot_failure(path)
            return LogReading(failure=failure, kind_of_nothing=None if failure else "nothing")
        with path.open("rb") as file:
            return _readable(read_log(file), str(path))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; give the log's path, or pipe it in"
        ) from None


def _readable(reading: LogReading, name: str) -> LogReading:
    if reading.kind_of_nothing == "binary":
        raise ConfigError(
            f"{name} is not a text; give what the run printed, or a memory snapshot of PyTorch with the ending .pickle"
        )
    return reading


def _explained(
    facts: Facts, reading: LogReading, config: TrainConfig | None, lang: str, gpu: str | None, workers: int
) -> Explanation:
    printed = reading.context
    plain = Explanation(facts=facts, reading=reading, language=lang)
    if not is_of_device(facts):
        causes = causes_of(facts, printed)
        return replace(plain, causes=causes, remedies=unplayed(facts, of_device=False), unplayed_because="kind")
    played = "config" if config is not None else "log"
    config = config if config is not None else _printed_config(printed)
    card = card_of(facts, printed, gpu)
    if config is None or card is None:
        guesses, because = guesses_of(facts), "config" if config is None else "card"
        culprit = culprit_of_guesses(facts, guesses) if guesses else None
        return replace(
            plain,
            card=card,
            culprit=culprit,
            causes=causes_of(facts, printed, culprit=culprit, guesses=guesses, unplayed_because=because),
            remedies=unplayed(facts, of_device=True),
            unplayed_because=because,
        )
    run = variant_of(config, card)
    with Stage(card, workers=workers) as stage:
        found = play_all(facts, card, run, stage, max_iters=config.max_iters, eval_iters=config.eval_iters)
    guesses = guesses_of(facts)
    culprit = culprit_of_play(facts, found.base) or (culprit_of_guesses(facts, guesses) if guesses else None)
    simulated = culprit is not None and culprit.label == SIMULATED
    return replace(
        plain,
        card=card,
        culprit=culprit,
        causes=causes_of(
            facts, printed, culprit=culprit, base=found.base, train=found.train, guesses=None if simulated else guesses
        ),
        remedies=found.remedies or unplayed(facts, of_device=True),
        played=played,
        not_modelled=found.base.not_modelled,
        max_iters=config.max_iters,
    )


def _printed_config(printed: Printed) -> TrainConfig | None:
    """The configuration that a log shows; None if it shows too little, or what is no configuration."""
    keys: dict[str, Any] = dict(printed.keys)
    if not _SHAPING & set(keys):
        return None
    if printed.vocab_size:
        keys.setdefault("vocab_size", printed.vocab_size)
    try:
        return TrainConfig(**keys)
    except TightfitError:
        return None


def _with_script(
    facts: Facts | None, reading: LogReading, lang: str, gpu: str | None, script: str, arguments: list[str]
) -> Explanation:
    """Somebody's own script on the card of the log, or on `gpu`."""
    from tightfit.simulation.dry_run import dryrun_script

    card = card_of(facts or Facts(kind="cuda_out_of_memory"), reading.context, gpu)
    if card is None:
        raise ConfigError("the log does not tell the card; name it with --gpu, such as --gpu 'RTX 3060 12GB'")
    found = msgspec.to_builtins(dryrun_script(script, arguments, _settings_of(card)))
    if facts is None and found["failure"]:
        reading = read_log("torch.OutOfMemoryError: " + found["failure"]["message"])
    return _of_findings(found, reading, card, lang, script, arguments)


def _settings_of(card: Card, *, used_bytes: int | None = None, timeout_s: float | None = None) -> Settings:
    return Settings(
        gpu=card.name,
        memory_bytes=card.total_bytes if card.total_stated else None,
        used_bytes=card.used_bytes if used_bytes is None else used_bytes,
        context_bytes=card.context_bytes,
        capability=card.capability if find_gpu(card.name) is None else None,
        timeout_s=timeout_s,
    )


def _of_findings(
    found: Mapping[str, Any], reading: LogReading, card: Card, lang: str, script: str, arguments: list[str]
) -> Explanation:
    facts, outcome = reading.failure, _outcome_of_script(found)
    plain = Explanation(facts=facts, reading=reading, language=lang, card=card, played="script")
    if facts is None or outcome is None:
        if outcome is None and found["outcome"] == "error":
            raise ConfigError(f"{script} did not run to its end on the virtual GPU: {found['stopped_because']}")
        fits = Cause(code="play_fits", label=SIMULATED, values={"device_bytes": found["peak"]["device_bytes"]})
        return replace(plain, causes=(fits,))
    culprit = culprit_of_play(facts, outcome, of_script=True)
    remedies = list(unplayed(facts, of_device=True))
    open_ = {each.code for each in remedies if each.verdict == UNCHECKED} & {"expandable_segments", "close_others"}
    remedies = [each for each in remedies if each.code not in open_]
    remedies += [_played_for_script(code, card, script, arguments, outcome) for code in sorted(open_)]
    if smaller := _smaller_batch(card, script, arguments, outcome):
        remedies = [smaller, *(each for each in remedies if each.code != "split_general")]
    return replace(
        plain,
        culprit=culprit,
        causes=causes_of(facts, reading.context, culprit=culprit, base=outcome),
        remedies=ranked(remedies),
        not_modelled=tuple(found["not_modelled"]),
    )


def _played_for_script(code: str, card: Card, script: str, arguments: list[str], before: Outcome) -> Remedy:
    """What changes nothing in a script, where the figures leave it open: the allocator's setting, nobody beside it."""
    from tightfit.simulation.dry_run import dryrun_script

    used, environ, paste = card.used_bytes, dict(os.environ), "nvidia-smi"
    if code == "close_others":
        used = 0
    else:
        environ["PYTORCH_CUDA_ALLOC_CONF"], paste = EXPANDABLE, f"export PYTORCH_CUDA_ALLOC_CONF={EXPANDABLE}"
    after = msgspec.to_builtins(dryrun_script(script, arguments, _settings_of(card, used_bytes=used), environ))
    return _judged(code, after, card, before, used_bytes=used, paste=paste, exact=True)


def _smaller_batch(card: Card, script: str, arguments: list[str], before: Outcome) -> Remedy | None:
    """A sixteenth of the batch size that the script's arguments name, if they name one; with as many more passes."""
    from tightfit.simulation.dry_run import dryrun_script

    found = _argument(arguments, _BATCH)
    if found is None:
        return None
    (name, value), accumulation = found, _argument(arguments, _ACCUMULATION)
    parts = min(USUAL_SHARE, value)
    changes = {name: value // parts}
    if accumulation:
        changes[accumulation[0]] = accumulation[1] * parts
    changed = _with_arguments(arguments, changes)
    after = msgspec.to_builtins(dryrun_script(script, changed, _settings_of(card, timeout_s=_PATIENCE_S)))
    if after["outcome"] == "error" or (after["outcome"] == "fits" and not after["steps"]):
        return None  # it could not be judged
    return _judged(
        "script_batch",
        after,
        card,
        before,
        used_bytes=card.used_bytes,
        paste=" ".join(f"{option}={number}" for option, number in changes.items()),
        exact=accumulation is not None,
        name=name,
        size=value // parts,
        value=value,
    )


_PATIENCE_S = 60.0
_BATCH = re.compile(r"--(?:per[_-]device[_-]train[_-]|train[_-]|micro[_-]?|mini[_-]?)?(?:batch[_-]?size|batch|bs)")
_ACCUMULATION = re.compile(r"--(?:gradient[_-]|grad[_-])?(?:accumulation|accum)(?:[_-]steps)?")


def _argument(arguments: Sequence[str], name: re.Pattern[str]) -> tuple[str, int] | None:
    """The option of that name and its whole number above 1, as `--name=8` or `--name 8`."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        value = value if equals else after
        if name.fullmatch(option) and value.isdecimal() and (int(value) > 1 or name is _ACCUMULATION):
            return option, int(value)
    return None


def _with_arguments(arguments: Sequence[str], changes: Mapping[str, int]) -> list[str]:
    """The arguments with other numbers for some options, in the form in which each was given."""
    words = list(arguments)
    for number, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if option in changes and equals:
            words[number] = f"{option}={changes[option]}"
        elif option in changes:
            words[number + 1] = str(changes[option])
    return words


def _judged(
    code: str,
    after: Mapping[str, Any],
    card: Card,
    before: Outcome,
    *,
    used_bytes: int,
    paste: str,
    exact: bool,
    **values: Any,
) -> Remedy:
    """A remedy by the findings of the script with it."""
    failure, fits = after["failure"], after["outcome"] == "fits"
    device_bytes = failure["process_bytes"] + failure["requested_bytes"] if failure else after["peak"]["device_bytes"]
    values |= {
        "device_bytes": device_bytes, "total_bytes": card.total_bytes, "phase": after["peak"]["phase"],
        "room_bytes": card.total_bytes - used_bytes, "others_bytes": card.used_bytes,
    }  # fmt: skip
    if failure:
        values |= {key: failure[key] for key in ("requested_bytes", "free_bytes", "phase")}
    return Remedy(
        code=code, verdict=FITS if fits else DOES_NOT_FIT, reason="fits" if fits else "fails_at", label=SIMULATED,
        exact=exact, device_bytes=device_bytes, saved_bytes=before.device_bytes - device_bytes, paste=(paste,),
        values=values,
    )  # fmt: skip


def _outcome_of_script(found: Mapping[str, Any]) -> Outcome | None:
    """The findings of a script that failed, in the form of a play."""
    failure = found["failure"]
    if failure is None:
        return None
    return Outcome(
        variant=None, fits=False, device_bytes=failure["process_bytes"] + failure["requested_bytes"],
        phase=failure["phase"], failure=failure, place=None, categories=found["categories"], largest=found["largest"],
        step_s=None, launch_s=0.0, not_modelled=tuple(found["not_modelled"]),
    )  # fmt: skip


__all__ = ["Explanation", "Words", "explain", "explain_dryrun"]
