"""The kind of tensor that the failing line allocates, by the line's code, its file and its function (lines.toml)."""

import functools
import re
from collections.abc import Iterator, Sequence

import msgspec
from msgspec.structs import replace

from tightfit.oomlog.tracebacks import TraceFrame
from tightfit.tables import read_table

_CODE = re.compile(r"[\w\]] ?[+*-]?= ?[\w(.]{1,80}[\[(.]|^return \w")
_WORD = re.compile(r"[A-Za-z_]\w*")
_LOGGED = re.compile(
    r"\d%\||\d(?:it/s|s/it)\b|^\[?\d{2,4}[-/:]\d\d[-/:]\d\d|\b(?:INFO|DEBUG|WARNING)\b"
    r"|\b(?:Namespace|Config\w*|Arguments)\("
)
"""Lines of a logger or a progress bar, and printed options, which look like code."""
_TOLD = re.compile(
    r"\b(?:[Ee]rror|OOM|[Ee]xception|[Cc]rash(?:es|ed)?|[Ff]ail(?:s|ed|ure)?)\b[^\n\"'`]{0,40}?"
    r"\b(?:in|at|on|from) (?:the |this )?(?:line )?[\"`“]([\w.]{1,60}(?: ?= ?[\w.]+)?\([^\"`”\n]{0,200}\))[\"`”]"
)
"""A person's sentence that quotes the line which failed: the error occurs in "x = f(y)"."""
_LINES = 4
"""Lines before a message that may hold the failing line, with carets below it."""
_ONLY_CARETS = re.compile(r"[\^~ ]+")
_DEPTH = 8
"""Innermost frames that are looked at: further out, a line calls too much to show what was allocated."""


class LineKind(msgspec.Struct, frozen=True, kw_only=True):
    """The kind of tensor that a line allocates."""

    tensor: str
    """A table of lines.toml."""
    grows: str
    """Quantity that the tensor grows with: model, state, batch, logits, attention, outputs, saving, cache, ..."""
    frame: TraceFrame
    """The frame that shows it."""
    is_named: bool
    """True if the line leaves no doubt which kind of tensor it is."""


class _Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of lines.toml."""

    grows: str
    code: list[str] = []
    files: list[str] = []
    functions: list[str] = []
    alone: list[str] = []
    named: bool = True


class _Kind(msgspec.Struct, frozen=True, kw_only=True):
    tensor: str
    grows: str
    code: re.Pattern[str] | None
    files: re.Pattern[str] | None
    functions: re.Pattern[str] | None
    alone: re.Pattern[str] | None
    is_named: bool

    def shown_by(self, frame: TraceFrame) -> bool:
        if not frame.file:
            alone = self.alone or (self.code if self.files is None else None)
            return alone is not None and bool(alone.search(frame.source or ""))
        if self.files is not None and not self.files.search(frame.file.replace("\\", "/")):
            return False
        if frame.source and self.code is not None and self.code.search(frame.source):
            return True
        return self.functions is not None and bool(self.functions.fullmatch(frame.function.rsplit(".", 1)[-1]))


@functools.cache
def kinds_of_lines() -> tuple[_Kind, ...]:
    """Read lines.toml."""
    tables = read_table("tightfit.diagnosis", "lines.toml", dict[str, _Table])

    def pattern(signs: list[str]) -> re.Pattern[str] | None:
        return re.compile("|".join(signs)) if signs else None

    return tuple(
        _Kind(
            tensor=tensor,
            grows=table.grows,
            code=pattern(table.code),
            files=pattern(table.files),
            functions=pattern(table.functions),
            alone=pattern(table.alone),
            is_named=table.named,
        )
        for tensor, table in tables.items()
    )


def line_kind(frames: Sequence[TraceFrame]) -> LineKind | None:
    """Return the kind of tensor that the innermost telling frame shows; None if no frame does.

    A backward pass runs inside autograd's engine: the frames do not show the operator. A layer's own file shows what
    it computes, such as a product, and the line that calls the layer shows for what, such as the logits.
    """
    frames = [each for each in frames if not _COPIES.search(each.file.replace("\\", "/"))] or frames
    inner = list(reversed(frames[-_DEPTH:]))
    if inner and _is_engine(inner):
        return None
    found = _first_kind(inner, frames)
    if found is None or found.tensor != _ACTIVATION.tensor or not _is_layer(found.frame):
        return found
    caller = next((each for each in inner[inner.index(found.frame) :] if not _is_layer(each)), None)
    kind = _kind_shown(caller) if caller is not None else None
    if caller is None or kind is None or not kind.is_named or kind.grows not in _OF_CALLERS:
        return found
    return LineKind(tensor=kind.tensor, grows=kind.grows, frame=caller, is_named=True)


_COPIES = re.compile(r"/lib/python[\d.]{1,6}/copy\.py$|/[Ll]ib/copy\.py$")
"""Python's own file of deepcopy(), which calls itself for each part of a model."""
_MOST_CALLERS = 3


def outer_kinds(frames: Sequence[TraceFrame]) -> Iterator[LineKind]:
    """Yield the kinds that the lines around a layer's call show, which only a size can tell: a head has two layers."""
    outer = [each for each in reversed(frames[-2 * _DEPTH :]) if not _is_layer(each)]
    for frame in outer[1 : 1 + _MOST_CALLERS]:
        kind = _kind_shown(frame)
        if kind is not None and kind.grows == "logits":
            yield LineKind(tensor=kind.tensor, grows=kind.grows, frame=frame, is_named=True)


_LAYERS = re.compile(
    r"torch/nn/(?:modules/(?!transformer|rnn)\w+|functional)\.py|torch/(?:utils/(?:checkpoint|_contextlib)|_jit_internal)\.py"
    r"|torch/(?:autograd/function|amp/\w+|_dynamo/\w+)\.py|accelerate/hooks\.py|peft/tuners/.*layer\.py|bitsandbytes/"
)
"""Files of layers, and of what is put around their calls."""
_OF_CALLERS = ("logits", "attention", "batch", "joint")
"""Quantities of a layer's result that the line which calls it shows."""


def _is_layer(frame: TraceFrame) -> bool:
    return bool(_LAYERS.search(frame.file.replace("\\", "/")))


def _first_kind(inner: Sequence[TraceFrame], frames: Sequence[TraceFrame]) -> LineKind | None:
    """Return the kind of the innermost frame that shows one."""
    for frame in inner:
        kind = _kind_shown(frame)
        if kind is not None and frame is not frames[-1] and _is_argument(kind, frame):
            kind = None  # the arguments of a call that went on were made already
        if kind is not None and kind.grows == "batch" and frame is frames[-1] and (own := operators_alone(frames)):
            kind = _kind_shown(own) or _ACTIVATION
        if kind is not None:
            return LineKind(tensor=kind.tensor, grows=kind.grows, frame=frame, is_named=kind.is_named)
    return None


def _is_argument(kind: _Kind, frame: TraceFrame) -> bool:
    """Return True if a line that calls a function of another frame makes the tensor for that call's arguments."""
    joins = kind.grows == "outputs" and _JOINS.search(frame.source or "") is not None
    return kind.tensor == "moved_batch" or joins


_JOINS = re.compile(r"\btorch\.(?:cat|concat|stack)\(")
"""Operators that leave no frame in a traceback."""


def _kind_shown(frame: TraceFrame) -> _Kind | None:
    return next((kind for kind in kinds_of_lines() if kind.shown_by(frame)), None)


_ACTIVATION = _Kind(
    tensor="activation", grows="batch", code=None, files=None, functions=None, alone=None, is_named=False
)
"""The result of an operator that no table of lines.toml describes."""
_OF_MODULE = re.compile(
    r"(?<![\w.])(?:self(?:\.\w+|\[[^\[\]\n]{0,40}\])*?(?:\.(?!TENSOR\()\w+|\[[^\[\]\n]{0,40}\])"
    r"|(?!conv\dd|conv_tr)(?:conv|deconv|layer|block|module|head|encoder|decoder|norm|bn|mlp|attn)\w{0,12}"
    r"(?:\[[^\[\]\n]{0,40}\])?)(?=\()".replace(
        "TENSOR",
        "(?:to|cuda|cpu|float|half|clone|copy_?|contiguous|reshape|view|matmul|mm|bmm|sum|mean|exp|log|sqrt|pow|add_?"
        "|mul_?|sub_?|div_?|repeat|expand|softmax|sigmoid|detach|index_select|gather|masked_fill_?|zero_|fill_)",
    )
)
"""The name of a module, or of a method of the user's, that a line calls; no method of a tensor."""
_OPERATOR = re.compile(
    r"\b(?:torch|F)\.(?!device|nn\.|no_grad|relu\b|jit|utils|autocast|cuda|tensor\()\w+\("
    r"|\.(?:contiguous|clone|reshape|flatten|repeat|repeat_interleave|softmax|log_softmax|matmul|bmm|mm|sum|mean"
    r"|masked_fill|float|half|sigmoid|exp|pow|sqrt)\("
    r"|[\w)\]] ?(?:\*\*|[-+*/@])=? ?[A-Za-z_(\[]"
)
"""An operator of PyTorch's that leaves no frame in a traceback."""
_INDEX = re.compile(r"(?<=[\w\])])\[[^\[\]\n]{0,80}\]")


def operators_alone(frames: Sequence[TraceFrame]) -> TraceFrame | None:
    """Return the innermost frame without the modules that its line calls, if an operator on the line failed.

    Calls of modules leave frames in a traceback. Where one of PyTorch's modules has left some, the innermost line's
    own modules have none: they had returned, or were not called yet.

    >>> module = TraceFrame(file="torch/nn/modules/module.py", line=1, function="__call__")
    >>> line = TraceFrame(file="net.py", line=2, function="forward", source="x = torch.cat([self.conv(x), x], 1)")
    >>> operators_alone([module, line]).source
    'x = torch.cat([called(x), x], 1)'
    """
    frame = frames[-1] if frames else None
    if frame is None or frame.is_library or not frame.source:
        return None
    if not any(each.file.replace("\\", "/").endswith("nn/modules/module.py") for each in frames):
        return None
    source, calls = _OF_MODULE.subn("called", frame.source)
    if not calls or not _OPERATOR.search(_INDEX.sub("", source)):
        return None
    return replace(frame, source=source)


def line_before_message(text: str) -> TraceFrame | None:
    """Return the line of code right before the message of a report without a traceback, or the one it says failed.

    Code that a report quotes further up is the program's, not the line that failed, unless it is all that it quotes.
    """
    lines = text[: text.find("ried to allocate")].splitlines()[:-1] if "ried to allocate" in text else []
    if sum(_CODE.search(each) is not None for each in lines) == 1:
        while not lines[-1].strip():
            lines.pop()
    last = [each.strip(" `>|\t") for each in lines[-_LINES:]]
    has_carets = False
    while last and _ONLY_CARETS.fullmatch(last[-1]):
        has_carets = bool(last.pop().strip()) or has_carets
    for line in last[-1:]:
        is_code = _CODE.search(line) or (has_carets and _WORD.search(line))
        if is_code and not _LOGGED.search(line):
            return TraceFrame(file="", line=None, function="", source=line[:400])
    told = _TOLD.search(text)
    return TraceFrame(file="", line=None, function="", source=told[1]) if told else None


_CALL = re.compile(r"^\s*([\w*]+(?:, ?[\w*]+)+) ?= ?[\w.]*(?:model|net|network|rnn|lstm|gru)\w*\(([^\n]*)")


def feeds_back(frames: Sequence[TraceFrame]) -> bool:
    """Return True if a line of the user's gives a model a state that the same line gets from it.

    >>> line = "out, *rec = model(x, *rec)"
    >>> feeds_back([TraceFrame(file="camera.py", line=9, function="<module>", source=line)])
    True
    """
    for frame in frames:
        call = None if frame.is_library or frame.function == "forward" else _CALL.match(frame.source or "")
        if call and {each.strip(" *") for each in call[1].split(",")} & set(re.findall(r"\w+", call[2])):
            return "detach" not in call[2]
    return False


def _is_engine(inner: Sequence[TraceFrame]) -> bool:
    """Return True if autograd's engine is the innermost frame."""
    innermost = inner[0]
    return (
        "run_backward" in (innermost.source or "")
        or "run_backward" in innermost.function
        or ("autograd" in innermost.file and "backward" in innermost.function and "function.py" not in innermost.file)
    )
