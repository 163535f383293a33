"""An explanation as text: problem, cause, fixes, expected result; short, or with the arithmetic."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tightfit.diagnosis.causes import SIMULATED, Cause, is_of_device
from tightfit.diagnosis.culprit import Compared, Culprit
from tightfit.diagnosis.remedies import DOES_NOT_FIT, FITS, Remedy
from tightfit.system.wrapping import wrap
from tightfit.units import format_bytes
from tightfit.wording.diagnosis import Words

if TYPE_CHECKING:
    from tightfit.diagnosis.explanation import Explanation

_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MARKS = {FITS: "✓", "fits_slowly": "✓", "unchecked": "?", DOES_NOT_FIT: "✗", "no_effect": "✗", "not_memory": "-"}
_SHOWN_GUESSES = 5
_NO_CHANGE = 0.005
"""A slowdown that rounds to 0%."""


class Sentences:
    """What is said of each part of an explanation, in one language."""

    def __init__(self, explanation: "Explanation", words: Words) -> None:
        self._explanation, self._words = explanation, words

    def cause(self, cause: Cause) -> str:
        table, _, kind = cause.code.partition("_")
        if table == "kind":
            return self._words("kind_causes", kind)
        return self._words("causes", cause.code, **cause.values)

    def title(self, remedy: Remedy) -> str:
        table, _, kind = remedy.code.partition("_")
        if table == "kind":
            return self._words("kind_advice", kind)
        return self._words("remedies", remedy.code, **remedy.values)

    def reason(self, remedy: Remedy) -> str:
        return self._words("reasons", remedy.reason, **remedy.values)

    def paste(self, remedy: Remedy) -> tuple[str, ...]:
        """Lines to copy, with the configuration's own name."""
        return tuple(line.replace("CONFIG", self.config) for line in remedy.paste)

    @property
    def config(self) -> str:
        return " ".join(self._explanation.config_names) or "config.py"

    def effect(self, remedy: Remedy) -> str:
        """Exact or lossy, what it saves, and how much slower it is."""
        said = self._words
        parts = [said("effects", "exact" if remedy.exact else "lossy")] if remedy.exact is not None else []
        if remedy.saved_bytes is not None and remedy.saved_bytes > 0 and remedy.verdict == FITS:
            parts.append(said("effects", "saves", saved=remedy.saved_bytes))
        if remedy.verdict == FITS:
            change = remedy.slowdown
            if change is None:
                parts.append(said("effects", "not_estimated"))
            elif abs(change) < _NO_CHANGE:
                parts.append(said("effects", "same_time"))
            else:
                parts.append(said("effects", "slower", change=change))
        return said("units", "separator").join(parts)


def render(explanation: "Explanation", words: Words, verbose: bool = False, width: int = 100) -> str:
    """The text for a terminal of `width` columns; no control code of a log is in it."""
    facts = explanation.facts
    if facts is None:
        if explanation.played == "script":
            return _plain(words("problem", "not_failed"))
        return _plain(words("nothing", explanation.reading.kind_of_nothing or "nothing"))
    said = Sentences(explanation, words)
    sections = [
        ("problem", list(problem_lines(explanation, words))),
        ("cause", _causes(explanation, said, words)),
        ("fixes", list(_fixes(explanation, said, words, verbose, width))),
        ("expected", list(expected_lines(explanation, said, words))),
    ]
    if verbose:
        sections.append(("arithmetic", list(arithmetic_lines(explanation, words))))
    text = "\n\n".join(
        words("titles", title) + "\n" + "\n".join(_indented(line, width) for line in lines)
        for title, lines in sections
        if lines
    )
    return _plain(text)


def _plain(text: str) -> str:
    return _CONTROL.sub("", text)


def _indented(line: str, width: int) -> str:
    """A line below its section's title; what continues it stands further in. Lines to copy are never broken."""
    if line.startswith("    "):
        return line
    hang = re.match(r"(?:\d+\. |[✓✗?-] )?", line)
    inside = " " * (2 + (hang.end() if hang else 0))
    first, *rest = wrap(line, width - len(inside)) or [""]
    return "\n".join(["  " + first, *(inside + each for each in rest)])


def problem_lines(explanation: "Explanation", words: Words) -> Iterator[str]:
    """What failed, and which tensor it was."""
    facts, culprit = explanation.facts, explanation.culprit
    assert facts is not None
    if not is_of_device(facts):
        yield words("kinds", facts.kind)
    elif facts.requested_bytes is None:
        yield words("problem", "figures_missing")
    elif facts.free_bytes is None or facts.total_bytes is None:
        yield words("problem", "request_only", requested=facts.requested_bytes)
    else:
        given = {"requested": facts.requested_bytes, "free": facts.free_bytes, "total": facts.total_bytes}
        if facts.short_by_bytes is None:
            yield words("problem", "device_enough_free", **given)
        elif facts.phase is not None:
            yield words("problem", "device_in_phase", phase=facts.phase, short=facts.short_by_bytes, **given)
        else:
            yield words("problem", "device", short=facts.short_by_bytes, **given)
    if facts.device_index:
        yield words("problem", "on_device", index=facts.device_index)
    if facts.rank is not None:
        yield words("problem", "on_rank", rank=facts.rank)
    if culprit is not None:
        yield from _culprit(culprit, words)
    frame = next((each for each in reversed(facts.frames) if not each.is_library), None)
    if frame is not None and frame.line is not None:
        yield words("problem", "at", file=frame.file, line=frame.line, function=frame.function)
        if frame.source:
            yield f"    {frame.source}"
    elif culprit is not None and culprit.source:
        yield f"    {culprit.source}"
    if explanation.reading.others_count:
        count = explanation.reading.others_count
        yield words("problem", "one_other") if count == 1 else words("problem", "others", count=count)


def _culprit(culprit: Culprit, words: Words) -> Iterator[str]:
    values: dict[str, Any] = {
        "tensor": culprit.tensor, "shape": culprit.shape, "dtype": culprit.dtype, "size": culprit.bytes,
        "phase": culprit.phase, "iteration": culprit.iteration, "split": culprit.split, "step": culprit.step,
        "operator": culprit.operator, "file": culprit.file, "line": culprit.line,
    }  # fmt: skip
    if culprit.label != SIMULATED:
        first = culprit.guesses[0]
        yield _label(culprit, words) + words("culprit", "guess", batch=first.batch, block=first.block, **values)
        return
    if not culprit.shape:
        key = "shapeless"
    elif culprit.iteration is not None:
        key = "eval"
    elif culprit.step is not None:
        key = "step"
    else:
        key = "plain"
    yield _label(culprit, words) + words("culprit", key, **values)
    different = [_compared(each, words) for each in culprit.disagreements]
    allocated = next((each for each in culprit.compared if each.what == "allocated"), None)
    if not culprit.matches:
        yield words("culprit", "differs", compared=words("units", "separator").join(different))
        return
    if allocated is not None and allocated.agrees:
        yield words("culprit", "agrees", log=allocated.log, play=allocated.play)
    elif culprit.compared:
        yield words("culprit", "same_request")
    if different:
        yield words("culprit", "differs_slightly", compared=words("units", "separator").join(different))


def _label(culprit: Culprit, words: Words) -> str:
    return f"[{words('labels', culprit.label)}] "


def _compared(each: Compared, words: Words) -> str:
    if each.what == "phase":
        return words("culprit", "compared_phase", log=each.log, play=each.play)
    return words("culprit", "compared_bytes", what=each.what, log=each.log, play=each.play)


def _causes(explanation: "Explanation", said: Sentences, words: Words) -> list[str]:
    return [
        words("units", "bullet", number=number, text=said.cause(cause), label=words("labels", cause.label))
        for number, cause in enumerate(explanation.causes, 1)
    ]


def assumption_lines(explanation: "Explanation", words: Words) -> Iterator[str]:
    """What the fixes were judged on, where that was not told: each a sentence."""
    if explanation.unplayed_because:
        yield words("unplayed", explanation.unplayed_because)
    card = explanation.card
    if explanation.played and card is not None and card.how_named == "assumed":
        yield words("assumed", "card", name=card.name, total=card.total_bytes)
    if explanation.played == "log":
        yield words("assumed", "log")


def _fixes(explanation: "Explanation", said: Sentences, words: Words, verbose: bool, width: int) -> Iterator[str]:
    yield from assumption_lines(explanation, words)
    for remedy in explanation.remedies:
        yield from _fix(remedy, said, words, pasted=verbose or remedy.verdict == FITS, verbose=verbose)
    if verbose:
        for what in explanation.not_modelled:
            yield words("assumed", "not_modelled", what=what)


def _fix(remedy: Remedy, said: Sentences, words: Words, *, pasted: bool, verbose: bool) -> Iterator[str]:
    text = f"{_MARKS[remedy.verdict]} {said.title(remedy)}: {words('verdicts', remedy.verdict)}"
    if remedy.reason not in ("no_configuration", "general"):
        text += words("units", "clause") + said.reason(remedy)
    effect = said.effect(remedy)
    if remedy.verdict == FITS or verbose:
        notes = [each for each in (effect, words("labels", remedy.label)) if each]
        text += f" [{words('units', 'separator').join(notes)}]"
    yield text
    if pasted:
        yield from (f"      {line}" for line in said.paste(remedy))


def expected_lines(explanation: "Explanation", said: Sentences, words: Words) -> Iterator[str]:
    """What the best fix gives, and how to check it."""
    best = explanation.best
    facts, max_iters = explanation.facts, explanation.max_iters
    assert facts is not None
    if best is None:
        if not is_of_device(facts):
            yield words("expected", "other_kind")
        else:
            keys = {"config": "nothing_fits", "log": "nothing_fits", "script": "script_unchecked"}
            fits = any(each.code == "play_fits" for each in explanation.causes)
            yield words("expected", "configuration_fits" if fits else keys.get(explanation.played, "unchecked"))
        return
    yield words("expected", "fits", title=said.title(best), device=best.device_bytes, room=best.values["room_bytes"])
    if best.exact and "effective" in best.values:
        yield words("expected", "result_same", effective=best.values["effective"])
    step_s = best.values.get("step_s")
    if step_s and max_iters is not None:
        yield words("expected", "time", step=step_s, max_iters=max_iters, all=step_s * max_iters)
    if max_iters is not None and explanation.card is not None:
        yield words("expected", "verify", command="")
        yield f"      {_command(explanation, best)}"
    if explanation.config_names:
        yield words("expected", "own", config=said.config)


def _command(explanation: "Explanation", best: Remedy) -> str:
    """A dry run of the user's own script as the best remedy has it."""
    card = explanation.card
    assert card is not None
    used, context = format_bytes(card.used_bytes), format_bytes(card.context_bytes)
    words = [
        "tightfit dryrun",
        f'--gpu "{card.name}"',
        f"--memory {format_bytes(card.total_bytes).replace(' ', '')}",
        f"--used {used.replace(' ', '')} --context {context.replace(' ', '')}",
        "train.py",
        *explanation.config_names,
    ]
    if best.code == "split":
        words += [f"--batch_size={best.values['size']}", f"--gradient_accumulation_steps={best.values['passes']}"]
    return " ".join(words)


def arithmetic_lines(explanation: "Explanation", words: Words) -> Iterator[str]:
    """How the figures follow from those of the log."""
    facts, culprit = explanation.facts, explanation.culprit
    assert facts is not None
    yield words("arithmetic", "message", message=facts.message)
    figures = facts.figures

    def line(key: str, name: str, /, **terms: str) -> Iterator[str]:
        result = figures.get(name)
        values = {term: facts_bytes(each) for term, each in terms.items()}
        if result is not None and not result.stated and None not in values.values():
            yield words("arithmetic", key, result=result.bytes, low=result.low, high=result.high, **values)

    def facts_bytes(name: str) -> int | None:
        figure = figures.get(name)
        return None if figure is None else figure.bytes

    yield from line("reserved", "reserved_bytes", allocated="allocated_bytes", unallocated="unallocated_bytes")
    yield from line("outside", "outside_pytorch_bytes", process="process_bytes", reserved="reserved_bytes")
    yield from line("others", "others_bytes", total="total_bytes", free="free_bytes", process="process_bytes")
    yield from line("short", "short_by_bytes", requested="requested_bytes", free="free_bytes")
    if facts.process_bytes and facts.requested_bytes:
        need = facts.process_bytes + facts.requested_bytes
        yield words("arithmetic", "need", process=facts.process_bytes, requested=facts.requested_bytes, result=need)
    if culprit is None:
        return
    if culprit.categories:
        held: list[Mapping[str, Any]] = [
            {"category": name, "held_bytes": size}
            for name, size in sorted(culprit.categories.items(), key=lambda item: -item[1])
        ]
        yield words("arithmetic", "held", held=held)
    if culprit.compared:
        compared = words("units", "separator").join(_compared(each, words) for each in culprit.compared)
        yield words("arithmetic", "compared", compared=compared)
    for guess in culprit.guesses[:_SHOWN_GUESSES]:
        yield words("arithmetic", "guess", tensor=guess.role, shape=guess.shape, dtype=guess.dtype, batch=guess.batch,
                    block=guess.block, score=guess.score)  # fmt: skip
