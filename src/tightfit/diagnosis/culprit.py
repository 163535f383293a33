"""Which tensor the failing request was for: by a play that fails as the log says, or by the usual models' sizes."""

from collections.abc import Mapping
from typing import Any

import msgspec

from tightfit.diagnosis.guess import Guess, Guesses, guess
from tightfit.diagnosis.variants import Outcome
from tightfit.oomlog.facts import Facts
from tightfit.units import MIB

_COMPARED = {
    "requested": ("requested_bytes", "requested_bytes"),
    "allocated": ("allocated_bytes", "allocated_bytes"),
    "free": ("free_bytes", "free_bytes"),
}
_SLACK = 0.01
"""Of a figure, besides its rounding: predictions of real runs were within 0.41% (benchmarks/virtual)."""


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that both the log and the play say."""

    what: str
    """requested, allocated, free, cache or phase."""
    log: int | str
    play: int | str
    agrees: bool


class Culprit(msgspec.Struct, frozen=True, kw_only=True):
    """The tensor that did not fit, as far as it is known."""

    label: str
    """simulated, or likely where only its size is known."""
    tensor: str
    """Its category: logits, activations, ...; attention_scores or mlp_activation where it is a guess."""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    bytes: int = 0
    operator: str = ""
    phase: str = ""
    file: str = ""
    """By the log's traceback if it has one, else of the script; empty for the play of a configuration."""
    line: int | None = None
    function: str = ""
    source: str = ""
    """The line of code, where it is known."""
    split: str | None = None
    """In an evaluation: train or val."""
    iteration: int | None = None
    """Of that split's evaluation, from 1."""
    step: int | None = None
    """In training: the step, from 1."""
    copies: int = 1
    """Tensors of this shape and dtype that were needed at once, with the one that did not fit."""
    from_before: bool = False
    """Whether one of them is of the iteration before, and still bound."""
    categories: Mapping[str, int] = msgspec.field(default_factory=dict)
    """Bytes by category at that moment, without the request."""
    compared: tuple[Compared, ...] = ()
    matches: bool = True
    """Whether the play asks for what the log says, in the phase that the log says."""
    guesses: tuple[Guess, ...] = ()
    """Tensors of usual models that make such a request, most likely first, where nothing was played."""

    def as_dict(self) -> dict[str, Any]:
        """For --json; what is not known is null."""
        found = msgspec.to_builtins(self) | {"guesses": [_guess_for_json(each) for each in self.guesses]}
        return {name: None if value == "" else value for name, value in found.items()}

    @property
    def disagreements(self) -> tuple[Compared, ...]:
        return tuple(each for each in self.compared if not each.agrees)


def culprit_of_play(facts: Facts, outcome: Outcome, *, of_script: bool = False) -> Culprit | None:
    """The tensor that the play could not get, set against what the log says; None if the play fits."""
    failure = outcome.failure
    if failure is None:
        return None
    shape = tuple(failure["shape"])
    same = [
        each
        for each in outcome.largest
        if each["bytes"] > MIB and (tuple(each["shape"]), each["dtype"]) == (shape, failure["dtype"])
    ]
    compared = tuple(_compared(facts, failure))
    place = outcome.place
    frame = next((each for each in reversed(facts.frames) if not each.is_library), None)
    where: dict[str, Any] = {"function": failure["function"].rsplit(".", 1)[-1], "source": failure.get("source", "")}
    if of_script:
        where |= {"file": failure["file"], "line": failure["line"] or None}
    elif frame:
        where = {"file": frame.file, "line": frame.line, "function": frame.function, "source": frame.source}
    return Culprit(
        label="simulated",
        tensor=failure["category"],
        shape=shape,
        dtype=failure["dtype"],
        bytes=failure["tensor_bytes"],
        operator=failure["operator"].removeprefix("aten::"),
        phase=failure["phase"],
        split=place.split if place else None,
        iteration=place.iteration + 1 if place and place.iteration is not None else None,
        step=place.step + 1 if place and place.step is not None else None,
        copies=1 + len(same),
        from_before=bool(place and place.iteration) and len(same) > _own(failure["operator"]),
        categories=dict(outcome.categories),
        compared=compared,
        matches=all(each.agrees for each in compared if each.what in ("requested", "phase")),
        **where,
    )


def _own(operator: str) -> int:
    """Tensors like the failing one that the iteration itself has already: the loss makes others of its logits' size."""
    return int(any(word in operator for word in ("softmax", "copy", "nll_loss")))


def _compared(facts: Facts, failure: Mapping[str, Any]) -> list[Compared]:
    found = []
    played = {play: failure[play] for _, play in _COMPARED.values()}
    played["cache_bytes"] = failure["reserved_bytes"] - failure["allocated_bytes"]
    for what, (name, play) in {**_COMPARED, "cache": ("cache_bytes", "cache_bytes")}.items():
        figure = facts.figures.get(name)
        if figure is None:
            continue
        slack = 0 if what == "requested" else round(figure.bytes * _SLACK)
        agrees = figure.low - slack <= played[play] <= figure.high + slack
        found.append(Compared(what=what, log=figure.bytes, play=played[play], agrees=agrees))
    if facts.phase is not None:
        # nanoGPT's loss is computed within the model's forward.
        alike = {facts.phase, failure["phase"]} in ({"forward", "loss"}, {facts.phase})
        found.append(Compared(what="phase", log=facts.phase, play=failure["phase"], agrees=alike))
    return found


def guesses_of(facts: Facts) -> Guesses | None:
    """What usual models would ask for so much; None if the log does not state the request."""
    figure = facts.figures.get("requested_bytes")
    return None if figure is None or "request_beyond_1eb" in facts.notes else guess(figure)


def culprit_of_guesses(facts: Facts, found: Guesses) -> Culprit | None:
    """The tensor that is more likely than not, with the others; None if there is no such tensor."""
    first = found.named
    if first is None:
        return None
    frame = next((each for each in reversed(facts.frames) if not each.is_library), None)
    return Culprit(
        label="likely",
        tensor=first.role,
        shape=first.shape,
        dtype=first.dtype,
        bytes=first.tensor_bytes,
        phase=facts.phase or "",
        file=frame.file if frame else "",
        line=frame.line if frame else None,
        function=frame.function if frame else "",
        source=frame.source if frame else "",
        guesses=found.likely,
    )


def _guess_for_json(each: Guess) -> dict[str, object]:
    return {
        "tensor": each.role, "batch": each.batch, "block": each.block, "vocab_size": each.vocab_size,
        "heads": each.heads, "width": each.width, "dtype": each.dtype, "shape": list(each.shape),
        "score": round(each.score, 4),
    }  # fmt: skip
