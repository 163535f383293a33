"""The place in the user's own program that a fix is about: the file and the line, as the traceback shows them."""

import re
from collections.abc import Sequence

from msgspec.structs import replace

from tightfit.diagnosis.own_options import is_installed
from tightfit.diagnosis.remedies import Remedy
from tightfit.oomlog.tracebacks import TraceFrame

_AROUND = frozenset({"half_precision", "no_gradients"})
"""Remedies whose line stands around the call of the model."""
_OF_PASS = frozenset(
    {"split_general", "smaller_batch", "split_in_parts", "less_at_once", "smaller_inputs", "shorter_length"}
    | {"smaller_picture", "smaller_volumes", "coarser_points", "fewer_frames", "shorter_audio", "kind_smaller_batch"}
    | {"kind_less_in_pass", "kind_smaller_inputs_only"}
)
"""Remedies by less of what the model gets in one call."""
_MODULE = re.compile(r"forward|__call__|call|_call_impl|apply|<lambda>|wrapper|inner|decorate\w*|new_func")
"""Functions within a model, and wrappers."""
_CALL = re.compile(
    r"(?:(?P<to>[\w.]+(?:, ?[\w.]+)*) ?= ?|return )?(?P<callee>(?:self\.)?\w+(?:\[\w+\])?)"
    r"\((?P<given>[\w.]+(?:, ?[\w.]+)*)\)$"
)
"""A line that is one call of a part of a model, with names alone as arguments."""
_STEP = re.compile(r"(?:^|[^\w.])[\w.]*\([^\n]*")
_NO_MODEL = re.compile(
    r"\.(?:backward|step|clip_grad_\w+|to|cuda|load_state_dict|train|fit|run|main|load|save)\(|^(?:main|run|train|fit|app|cli)\(|from_pretrained"
    r"|^(?:for|if|elif|while|with|assert|async|await|yield|def|class|raise)\b"
)
"""Lines that call no model on data: what they start does."""
_LAYERS = re.compile(r"layer|block|blk|stage|module|encoder|decoder|unet|net|mlp|attn|conv|res|up|down|mid")


def own_frames(frames: Sequence[TraceFrame]) -> list[TraceFrame]:
    """Return the frames with code of the user's own files, outermost first."""
    return [
        each
        for each in frames
        if each.source and not (each.is_library or is_installed(each.file)) and (each.line or each.is_cell)
    ]


def placed(remedy: Remedy, frames: Sequence[TraceFrame]) -> Remedy:
    """Return a remedy without an option of the user's with the place of the traceback that it is about."""
    own = own_frames(frames)
    if remedy.code == "checkpointing_general":
        lines = next(filter(None, map(_recomputed, reversed(own))), remedy.paste)
        return replace(remedy, paste=lines)
    call = _call_of_model(own)
    if call is None:
        return remedy
    if remedy.code in _AROUND and remedy.paste and remedy.paste[-1].endswith(":"):
        return replace(remedy, paste=(*remedy.paste, f"    {call.source}  # {_where(call)}"))
    if remedy.code in _OF_PASS and not remedy.paste:
        return replace(remedy, paste=(f"{call.source}  # {_where(call)}: fewer or smaller inputs in this call",))
    return remedy


def _where(frame: TraceFrame) -> str:
    name = frame.file.replace("\\", "/").rpartition("/")[2]
    return f"{name}:{frame.line}" if frame.line else name


def _call_of_model(own: Sequence[TraceFrame]) -> TraceFrame | None:
    """Return the innermost line outside of any model that calls one, with the data that it gets."""
    for frame in reversed(own):
        if _MODULE.fullmatch(frame.function.rpartition(".")[2]):
            continue
        source = frame.source or ""
        is_call = bool(_STEP.search(source)) and not _NO_MODEL.search(source) and not source.endswith(("(", ","))
        return frame if is_call and source.count("(") == source.count(")") and len(source) < _LONGEST else None
    return None


_LONGEST = 100
"""Characters of a line that is quoted."""


def _recomputed(frame: TraceFrame) -> tuple[str, ...]:
    """Return the line of a model's forward pass that calls one of its parts, with that part recomputed."""
    found = _CALL.match(frame.source or "") if frame.function.rpartition(".")[2] == "forward" else None
    if found is None or not _LAYERS.search(found["callee"].lower()):
        return ()
    before = f"{found['to']} = " if found["to"] else "return " if (frame.source or "").startswith("return") else ""
    call = f"torch.utils.checkpoint.checkpoint({found['callee']}, {found['given']}, use_reentrant=False)"
    return (f"{before}{call}  # {_where(frame)}",)
