"""Tell whether two messages of a log report one failure, and join their facts."""

from msgspec.structs import replace

from tightfit.oomlog.facts import Facts, Figure, with_arithmetic
from tightfit.oomlog.kinds import consequences, is_of_allocator, memory_of

_ASYNC = "cuda_async"
"""The kind that PyTorch's allocator cudaMallocAsync reports under the class of the other allocator."""
_NOTEBOOK_LINES = 1000
"""Lines between the head of a notebook's traceback, which names the class, and its message."""
_EXPLAINED = 60
"""Lines between a message and the words by which a program explains it."""


_REPORTED_AS = {
    "shared_memory": ("dataloader_killed",),
    "device_assert": ("cublas", "cudnn", "cuda_library"),
}
"""Kinds of failures, and those by which the part of the program that meets them reports them again."""


def is_same(one: Facts, two: Facts) -> bool:
    """Return True if two messages report one failure: loggers print it, and so does Python at the end."""
    if one.rank != two.rank and None not in (one.rank, two.rank):
        return False
    is_lack = memory_of(one.kind) == "device" or one.kind == "tensorflow_host_memory"
    if "explains" in two.details and is_lack:  # a program's own words about the message before
        return two.line - one.line <= _EXPLAINED
    is_cut = one.kind == "tensorflow_host_memory" and two.kind == "tensorflow_out_of_memory" and not two.figures
    if is_cut or is_header_of(one, two) or is_work_of(two, one):  # TensorFlow's exception behind its warning
        return two.line - one.line <= _EXPLAINED
    only_class = "class_without_message" in one.notes and one.rank == two.rank
    if one.kind != two.kind and (is_general_for(one, two) or is_general_for(two, one)):
        reach = _NOTEBOOK_LINES if one.line == 1 else _EXPLAINED  # a report's title may stand far above
        return two.line - one.line <= reach
    if is_of_xla(one, two):
        return True
    if two.kind in _REPORTED_AS.get(one.kind, ()):
        return two.line - one.line <= _EXPLAINED
    is_async = two.kind == _ASYNC and (only_class or (is_of_allocator(one.kind) and not two.figures))
    if one.kind != two.kind and not is_async:
        return False
    if only_class:  # a notebook's head, far above the message
        return two.line - one.line <= _NOTEBOOK_LINES
    if "pool" in one.details and "pool" in two.details:  # it asks for less and less
        return two.line - one.line <= _EXPLAINED
    if names_shape_of(two, one):
        return True
    if not is_of_allocator(one.kind) and _overlap(one.figures.get(_REQUEST), two.figures.get(_REQUEST)):
        return True  # one line prints the size, and another the shape
    stated = {name: figure for name, figure in two.figures.items() if figure.stated}
    if stated and any(one.figures.get(name) == figure for name, figure in stated.items()):
        return all(one.figures.get(name, figure) == figure for name, figure in stated.items()) and (
            one.device_index == two.device_index or None in (one.device_index, two.device_index)
        )
    if stated and any(figure.stated for figure in one.figures.values()):
        return complete_each_other(one, two)
    return two.line - one.line <= 60 or two.kind in consequences()


def names_shape_of(later: Facts, earlier: Facts) -> bool:
    """Return True if a line names the shape of a failure before it, as that of TensorFlow's coordinator does."""
    shape = later.details.get("shape")
    return bool(shape) and later.kind == earlier.kind and shape == earlier.details.get("shape")


def is_of_xla(allocator: Facts, failure: Facts) -> bool:
    """Return True if the allocator of TensorFlow's that JAX uses names a request, and then JAX does."""
    is_both = allocator.kind == "tensorflow_out_of_memory" and failure.kind == "jax_out_of_memory"
    return is_both and _overlap(allocator.figures.get(_REQUEST), failure.figures.get(_REQUEST))


def is_general_for(one: Facts, two: Facts) -> bool:
    """Return True if a message holds only words of the CUDA runtime that another, more specific one holds, too."""
    is_general = one.kind == "cuda_driver" and not one.figures and not one.details and bool(one.message)
    return is_general and one.kind != two.kind and _squeezed(one.message) in _squeezed(two.message)


def is_header_of(one: Facts, two: Facts) -> bool:
    """Return True if a wrapper's line names an error whose own traceback and message stand behind it."""
    is_header = "header" in one.details and not one.figures
    return is_header and bool(two.figures) and memory_of(two.kind) == "device"


_WORK = ("vllm_warm_up", "tgi_prefill")
"""Kinds whose message names what a server was doing, and has no figures."""


def is_work_of(outer: Facts, inner: Facts) -> bool:
    """Return True if a server's message names what it was doing when the allocator's message before it came."""
    return outer.kind in _WORK and not outer.figures and is_of_allocator(inner.kind)


def with_work(inner: Facts, outer: Facts) -> Facts:
    """Return a failure with the figures of its own message, and what was being done from the wrapper's."""
    return replace(inner, kind=outer.kind, phase=inner.phase or outer.phase, details={**inner.details, **outer.details})


def behind_header(header: Facts, inner: Facts) -> Facts:
    """Return the failure whose message stands behind a wrapper's header, with the rank and the card of both."""
    return replace(
        inner,
        rank=header.rank if inner.rank is None else inner.rank,
        device_index=header.device_index if inner.device_index is None else inner.device_index,
    )


def _squeezed(text: str) -> str:
    return "".join(text.split()).lower()


_REQUEST = "requested_bytes"


def _overlap(one: Figure | None, two: Figure | None) -> bool:
    return one is not None and two is not None and one.low <= two.high and two.low <= one.high


def stated_in(facts: Facts) -> set[str]:
    """Return the names of the figures that a message prints."""
    return {name for name, figure in facts.figures.items() if figure.stated}


_APART = 3
"""Lines between two pieces of one message that somebody put in another order."""


def complete_each_other(one: Facts, two: Facts) -> bool:
    """Return True if one message states the request and the next one the card, or the other way round."""
    names = [stated_in(each) for each in (one, two)]
    asks = ["requested_bytes" in each for each in names]
    has_card = ["total_bytes" in each for each in names]
    near = 0 <= two.line - one.line <= _APART
    return near and not names[0] & names[1] and asks in ([True, False], [False, True]) and has_card == asks[::-1]


def joined(one: Facts, two: Facts) -> Facts:
    """Return the facts of two pieces of one message."""
    stated = {name: figure for each in (one, two) for name, figure in each.figures.items() if figure.stated}
    figures, notes = with_arithmetic(stated)
    return replace(
        one,
        figures=figures,
        notes=tuple(dict.fromkeys([*notes, *(note for note in one.notes if note != "message_cut")])),
        device_index=one.device_index if one.device_index is not None else two.device_index,
        message=f"{one.message} {two.message}",
    )


def later_format(one: Facts, two: Facts) -> str | None:
    """Return the later format of PyTorch's of two messages."""
    formats = [each for each in (one.torch_format, two.torch_format) if each]
    return max(formats, default=None)
