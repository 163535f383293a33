"""Details of failures of compiled programs: JAX and XLA, TensorFlow's pool, ONNX Runtime's arena."""

import re

import msgspec

from tightfit.diagnosis.printed_tables import largest_allocation, peak_buffer
from tightfit.diagnosis.purpose import INFERENCE, purpose_of
from tightfit.oomlog.facts import Facts, with_detail
from tightfit.oomlog.run_facts import RunFacts
from tightfit.units import GIB, KIB, MIB

_PROGRAM = re.compile(r"\btotal allocation: *([\d.]{1,9}) ?([KMG])iB")
"""Memory of a compiled program in XLA's report on its buffers."""
_ONLY_COPIES = re.compile(r"preallocated temp allocation: +0B")
"""XLA's line for a program without a result in between: it copies, converts or joins arrays."""
_UNITS = {"K": KIB, "M": MIB, "G": GIB}
_SMALL_PROGRAM = GIB
"""Bytes that any card has free for a program, unless something else fills it."""
_LITTLE = 256 * MIB
"""Bytes of arrays that are copied or converted, which any card has room for beside a model."""
_MOST_OF_A_CARD = 30 * GIB
"""Bytes of one request that few cards have, beside anything else."""


def of_jax(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of JAX with a program that is small, or with the use of a trained model."""
    facts = msgspec.structs.replace(facts, details={**facts.details, **largest_allocation(run.text)})
    facts = _of_tpu(facts, run)
    found = _PROGRAM.search(run.text)
    program_bytes = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if found and _ONLY_COPIES.search(run.text):
        facts = with_detail(facts, "copied_little") if program_bytes < _LITTLE else facts
        return with_detail(facts, "copied", f"{found[1]} {found[2]}iB")
    if found and program_bytes < _SMALL_PROGRAM:
        return with_detail(facts, "program", f"{found[1]} {found[2]}iB")
    own = [each for each in facts.frames if not each.is_library]
    if any(each.function.rsplit(".", 1)[-1] in _CREATES for each in own) or (own and _creates(own[-1].source)):
        return with_detail(facts, "weights")
    shown = purpose_of(facts, run)
    if shown is not None and shown.purpose == INFERENCE:
        return with_detail(facts, "small_request" if 0 < (facts.requested_bytes or 0) < GIB else "inference")
    if found and "tpu" not in facts.details:
        facts = msgspec.structs.replace(facts, details={**facts.details, **peak_buffer(run.text)})
        facts = _with_parts(facts, run.text)
        return with_detail(facts, "large_program", f"{found[1]} {found[2]}iB")
    return with_detail(facts, "large_request") if (facts.requested_bytes or 0) >= _MOST_OF_A_CARD else facts


_PART = r"\b{}: *([\d.]{{1,9}}) ?([KMG])iB"
_PARTS = {
    "xla_arguments": re.compile(_PART.format("parameter allocation")),
    "xla_results": re.compile(_PART.format("maybe_live_out allocation")),
    "xla_between": re.compile(_PART.format("preallocated temp allocation")),
}
"""Parts of a compiled program's memory in XLA's report."""


def _with_parts(facts: Facts, text: str) -> Facts:
    """Return the failure with XLA's figures for arguments, results and temporary buffers, if it prints them."""
    found = {name: pattern.search(text) for name, pattern in _PARTS.items()}
    if not all(found.values()):
        return facts
    parts = {name: f"{match[1]} {match[2]}iB" for name, match in found.items() if match}
    return msgspec.structs.replace(facts, details={**facts.details, **parts})


def _creates(source: str | None) -> bool:
    """Return True for a line that calls a function in which parameters are created."""
    return source is not None and any(
        re.search(rf"(?<![\w.]){name}\(", source) for name in _CREATES - {"init", "__init__"}
    )


_CREATES = frozenset({"__init__", "init", "init_params", "create_train_state", "init_train_state", "init_state"})
"""Functions in which a program of JAX creates its parameters."""
_PADDING = re.compile(r"Unpadded \(([\d.]{1,9})([KMG])\) Padded \(([\d.]{1,9})([KMG])\)")
"""XLA's figures for the values of a TPU's arrays, and for the tiles that hold them."""
_MOSTLY_PADDING = 2
"""Times of its values that a program takes, from which on the shapes are the cause."""


def _of_tpu(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure on a TPU whose arrays are mostly padding, or whose free memory is in pieces."""
    if (found := _PADDING.search(run.text)) is not None:
        values, tiles = (float(found[each]) * _UNITS[found[each + 1]] for each in (1, 3))
        if tiles >= _MOSTLY_PADDING * values:
            facts = with_detail(
                with_detail(facts, "unpadded", f"{found[1]} {found[2]}iB"), "padded", f"{found[3]} {found[4]}iB"
            )
    asked, free = facts.requested_bytes, facts.free_bytes
    is_in_pieces = "reservable" in run.text and asked is not None and free is not None and free >= asked
    return with_detail(facts, "pieces") if is_in_pieces else facts


_OF_ARENA = {"cap", "full", "loading", "either"}
"""Details of ONNX Runtime's arena that show more than the size of the request."""
_NODE = re.compile(r"returned while running \w{1,60} node\.\s*Name:\s*'([^'\n]{1,160})'")
"""The operator of a model that ONNX Runtime was running."""
_RANDOM = re.compile(r"\[Op:(?:RandomStandardNormal|RandomUniform|(?:Parameterized)?TruncatedNormal)\]")
"""TensorFlow's operators that make a weight's first values, and noise."""
_LARGE_AXIS = 512
"""Rows and columns from which on random numbers are a weight's, and no batch of noise."""


def _is_first_value(facts: Facts, run: RunFacts) -> bool:
    sizes = [int(each) for each in facts.details.get("shape", "").split(",") if each.strip().isdigit()]
    return len(sizes) == 2 and min(sizes) >= _LARGE_AXIS and bool(_RANDOM.search(run.text))


_OF_DATA_SET = 4096
"""Examples from which on a tensor is a data set's, and no batch's."""


def _first_axis(facts: Facts) -> int:
    first = facts.details.get("shape", "").partition(",")[0].strip()
    return int(first) if first.isdigit() else 0


_COUNT = 8192
"""Size of an axis that is neither a batch nor the width of a layer."""


def _has_two_counts(facts: Facts) -> bool:
    """Return True for a tensor of two axes, both of which count something, and no batch."""
    sizes = [int(each) for each in facts.details.get("shape", "").split(",") if each.strip().isdigit()]
    return len(sizes) == 2 and min(sizes) > _COUNT


def of_pool(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of TensorFlow with the limit of its pool, where the tensor alone is larger."""
    if _is_first_value(facts, run):
        facts = with_detail(facts, "created")
    if _has_two_counts(facts) and (shown := purpose_of(facts, run)) is not None and shown.purpose == INFERENCE:
        facts = with_detail(facts, "flat_input")
    if facts.details.get("dtype") in ("half", "bfloat16", "float16"):
        facts = with_detail(facts, "half")
    limit = _LIMIT.search(run.text)
    if limit is not None and int(limit[1]) < _SMALL_POOL:
        return with_detail(facts, "small_pool", f"{int(limit[1]) / MIB:.1f} MiB")
    if limit is None or facts.requested_bytes is None or facts.requested_bytes <= int(limit[1]):
        return facts
    name = "beyond_flat" if facts.details.get("shape", ",").isdigit() else "beyond"
    return with_detail(with_detail(facts, name), "beyond", f"{int(limit[1]) / GIB:.2f} GiB")


_SMALL_POOL = GIB // 2
"""Bytes below which TensorFlow's pool is no part of a card that it has for itself."""
_LIMIT = re.compile(r"\bLimit: {1,40}(\d{6,15})\b")
"""Bytes that TensorFlow's pool may hold at most, in its statistics."""


def of_arena(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of ONNX Runtime's arena with the node that ran, or about one large tensor."""
    node = _NODE.search(run.text)
    facts = with_detail(facts, "node", node[1]) if node else facts
    requested = facts.requested_bytes or 0
    if 0 < requested < _SMALL_REQUEST and facts.details.keys() & _OF_ARENA <= {"either"}:
        return with_detail(facts, "small_request")
    return with_detail(facts, "one_tensor") if requested >= GIB and not facts.details.keys() & _OF_ARENA else facts


_SMALL_REQUEST = 16 * MIB
"""Bytes that any card has room for, unless it is full."""


def of_host_tensor(facts: Facts, run: RunFacts) -> Facts:
    """Return a tensor of TensorFlow's on the host that holds a whole data set."""
    return with_detail(facts, "whole_data") if _first_axis(facts) >= _OF_DATA_SET else facts
