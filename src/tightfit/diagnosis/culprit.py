"""The tensor of the failing request: from a play that fails like the log, or from the log itself."""

import re
from collections.abc import Iterator, Mapping

import msgspec

from tightfit.diagnosis.cause_records import LIKELY, MEASURED, SIMULATED
from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.outcome import Outcome
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.run_facts import RunFacts, made_in
from tightfit.oomlog.tracebacks import TraceFrame
from tightfit.units import MIB
from tightfit.vgpu.records import Failure

_SLACK = 0.01
"""Share of a figure, besides its rounding: predictions of real runs were within 0.41% (benchmarks/virtual)."""


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One value from the log beside the same value from the play."""

    what: str
    """requested, allocated, free, cache or phase."""
    log: int | str
    play: int | str
    agrees: bool


class Culprit(msgspec.Struct, frozen=True, kw_only=True):
    """The tensor that did not fit, as far as it is known."""

    label: str
    """simulated; measured where the log shows it; likely where the sizes of the printed model do."""
    tensor: str
    """Its category: logits, activations, ...; where nothing was played, a kind in lines.toml."""
    shape: tuple[int, ...] = ()
    dtype: str | None = None
    bytes: int = 0
    operator: str | None = None
    phase: str | None = None
    file: str | None = None
    """File from the log's traceback if it has one, else of the script; None for the play of a configuration."""
    line: int | None = None
    function: str | None = None
    source: str | None = None
    """The line of code, where it is known."""
    split: str | None = None
    """In an evaluation: train or val."""
    iteration: int | None = None
    """Iteration of that split's evaluation, from 1."""
    step: int | None = None
    """In training: the step, from 1."""
    copies: int = 1
    """Tensors of this shape and dtype that were needed at once, with the one that did not fit."""
    from_before: bool = False
    """True if one of them is from the iteration before, and still bound."""
    categories: Mapping[str, int] = {}
    """Bytes by category at that moment, without the request."""
    compared: tuple[Compared, ...] = ()
    matches: bool = True
    """True if the play requests as many bytes as the log, in the same phase."""
    evidence: str = ""
    """shape (printed), name (printed), line (the failing line's operator), model (its sizes); empty for a play."""
    name: str | None = None
    """The parameter's name, where the log prints it."""

    @property
    def disagreements(self) -> tuple[Compared, ...]:
        return tuple(each for each in self.compared if not each.agrees)


def culprit_of_play(facts: Facts, outcome: Outcome, *, of_script: bool = False) -> Culprit | None:
    """Return the tensor that failed in the play, compared with the log; None if the play fits."""
    failure, place = outcome.failure, outcome.place
    if failure is None:
        return None
    alike = [
        each
        for each in outcome.largest
        if each.bytes > MIB and (each.shape, each.dtype) == (failure.shape, failure.dtype)
    ]
    compared = tuple(_compared(facts, failure))
    where = _failing_line(facts, failure, of_script=of_script)
    return Culprit(
        label=SIMULATED,
        tensor=failure.category,
        shape=failure.shape,
        dtype=failure.dtype or None,
        bytes=failure.tensor_bytes,
        operator=failure.operator.removeprefix("aten::") or None,
        phase=failure.phase or None,
        file=where.file or None,
        line=where.line,
        function=where.function or None,
        source=where.source or None,
        split=place.split if place else None,
        iteration=place.iteration + 1 if place and place.iteration is not None else None,
        step=place.step + 1 if place and place.step is not None else None,
        copies=1 + len(alike),
        from_before=bool(place and place.iteration) and len(alike) > _own(failure.operator),
        categories=dict(outcome.categories),
        compared=compared,
        matches=all(each.agrees for each in compared if each.what in ("requested", "phase")),
    )


def _failing_line(facts: Facts, failure: Failure, *, of_script: bool) -> TraceFrame:
    """Return the script's failing line; without a script the log's, else that of nanoGPT's loop without a file."""
    function = failure.function.rsplit(".", 1)[-1]
    if of_script:
        return TraceFrame(file=failure.file, line=failure.line or None, function=function, source=failure.source)
    return users_frame(facts) or TraceFrame(file="", line=None, function=function, source=failure.source)


def users_frame(facts: Facts) -> TraceFrame | None:
    """Return the innermost frame of the log's traceback outside of libraries, or else outside of PyTorch and Python."""
    frames = [each for each in facts.frames if not _DISPATCHES.search(each.file.replace("\\", "/"))]
    own = [each for each in frames if not each.is_library] or [each for each in frames if _is_of_program(each)]
    telling = (each for each in reversed(own) if each.source and not _TELLS_NOTHING.fullmatch(each.source.strip()))
    return next(telling, own[-1] if own else None)


_TELLS_NOTHING = re.compile(
    r"raise\b.*|(?:return |\w+ ?= ?)(?:f|fn|func|function|method|wrapped|executor)\(\*.*|(\w+)=\1,?|[\])},]+|@.*"
)
"""Lines of wrappers and of arguments: another frame tells more of what failed."""


_DISPATCHES = re.compile(
    r"(?:^|/)(?:runpy|threading)\.py$|/(?:click|typer|fire|ipykernel|IPython)/|tensorflow/python/(?:client|framework)/"
)
"""Files that only call what a program does: Python's start, command lines, TensorFlow's sessions."""


def _is_of_program(frame: TraceFrame) -> bool:
    """Return True for an installed package other than PyTorch."""
    path = frame.file.replace("\\", "/")
    return "-packages/" in path and not path.rsplit("-packages/", 1)[-1].startswith(("torch/", "accelerate/"))


def _own(operator: str) -> int:
    """Count the tensors of the logits' size that the iteration itself has already: the loss makes others."""
    return int(any(word in operator for word in ("softmax", "copy", "nll_loss")))


def _compared(facts: Facts, failure: Failure) -> Iterator[Compared]:
    played = {
        "requested": failure.requested_bytes,
        "allocated": failure.allocated_bytes,
        "free": failure.free_bytes,
        "cache": failure.reserved_bytes - failure.allocated_bytes,
    }
    for what, play in played.items():
        figure = facts.figures.get(f"{what}_bytes")
        if figure is None:
            continue
        slack = 0 if what == "requested" else round(figure.bytes * _SLACK)
        agrees = figure.low - slack <= play <= figure.high + slack
        yield Compared(what=what, log=figure.bytes, play=play, agrees=agrees)
    if facts.phase is not None:
        # nanoGPT's loss is computed within the model's forward.
        agrees = {facts.phase, failure.phase} in ({"forward", "loss"}, {facts.phase})
        yield Compared(what="phase", log=facts.phase, play=failure.phase, agrees=agrees)


def _kind_of(evidence: Evidence) -> str:
    """Return shape, name, line, model or parameters: a key of the words' table `culprit`."""
    if evidence.line is None and evidence.sized is not None:
        return "picture"
    if evidence.shape is not None:
        return "shape_solved" if evidence.shape.is_solved else "shape"
    if evidence.run.tensor_name:
        return "name"
    if evidence.line is not None:
        return "line"
    return "parameters" if evidence.is_all_parameters else "model"


_LEAST_MADE = 256 * MIB


def culprit_of_line(facts: Facts, run: RunFacts) -> Culprit | None:
    """Return a large tensor that the failing line makes, where the message has no figures; None without one."""
    frame = users_frame(facts)
    made = made_in(frame.source, run.text) if frame is not None and frame.source else None
    if frame is None or made is None or made.bytes < _LEAST_MADE:
        return None
    return Culprit(
        label=MEASURED,
        evidence="made",
        tensor="printed_tensor",
        shape=made.shape,
        dtype=made.dtype or "float32",
        bytes=made.bytes,
        phase=facts.phase,
        file=frame.file,
        line=frame.line,
        function=frame.function,
        source=frame.source,
    )


def culprit_of_evidence(facts: Facts, evidence: Evidence) -> Culprit | None:
    """Return the tensor that the log itself shows; None where only the request's size is known."""
    tensor, line, printed = evidence.tensor, evidence.line, evidence.shape
    sized = evidence.sized
    if tensor is None or (line is not None and printed is None and sized is None and not line.is_named):
        return None
    frame = line.frame if line is not None else users_frame(facts)
    known = sized or (evidence.fit if evidence.model is not None else None)
    dtype = printed.dtype or "float32" if printed else known.dtype if known else None
    shape = printed.shape if printed else known.shape if known else ()
    if tensor == "weight" and facts.phase == "backward":
        tensor = "weight_gradient"
    is_likely = evidence.is_complete or evidence.is_all_parameters or "log_ends_within" in facts.notes
    return Culprit(
        label=LIKELY if is_likely else MEASURED,
        evidence=_kind_of(evidence),
        tensor=tensor,
        name=evidence.run.tensor_name if printed is None else None,
        shape=shape,
        dtype=dtype,
        bytes=printed.bytes if printed else known.bytes if known else 0,
        phase=facts.phase,
        file=frame.file if frame else None,
        line=frame.line if frame else None,
        function=frame.function if frame else None,
        source=frame.source if frame else None,
    )
