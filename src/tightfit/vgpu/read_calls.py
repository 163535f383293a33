"""Values of calls that change nothing, for conditions that are read ahead of the script.

A question about the machine (`os.path.exists(...)`, `torch.distributed.is_initialized()`) is asked. A short function,
such as one that takes a model out of its wrapper, is read and not called.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType

from tightfit.vgpu.loop_source import function_nodes
from tightfit.vgpu.operations import UnknownError
from tightfit.vgpu.running_loops import SUSPENDS

_QUESTIONS = {
    "bisect": ("bisect", "bisect_left", "bisect_right"),
    "numpy": ("interp", "clip", "floor", "ceil", "isclose"),
    "os": ("getenv",),
    "os.path": ("exists", "isfile", "isdir", "join", "basename", "dirname"),
    "torch": (
        *("is_tensor", "is_floating_point", "is_complex", "is_grad_enabled", "is_autocast_enabled"),
        *("is_inference_mode_enabled", "get_default_dtype"),
    ),
    "torch.cuda": (
        *("is_available", "device_count", "current_device", "is_bf16_supported", "get_device_capability"),
        *("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
    ),
    "torch.backends.mps": ("is_available",),
    "torch.distributed": ("is_available", "is_initialized", "get_rank", "get_world_size"),
}
"""Functions, by their modules, that may be called at any time: they only tell, or look up."""
_LONGEST = 12
"""Statements of a function up to which it is read."""

Evaluate = Callable[[ast.expr, Mapping[str, object]], object]
"""Returns an expression's value with these variables of a function."""


def is_question(function: object) -> bool:
    """Return True for a function that only tells something."""
    name = getattr(function, "__name__", "")
    return callable(function) and any(
        name in names and getattr(sys.modules.get(module), name, None) is function
        for module, names in _QUESTIONS.items()
    )


def body_of(function: FunctionType) -> Sequence[ast.stmt]:
    """Return the source of a short function. UnknownError if it cannot be told, or is long."""
    code = function.__code__
    nodes = [] if code.co_flags & SUSPENDS else function_nodes(code.co_filename, code.co_firstlineno, code.co_name)
    if len(nodes) != 1:
        raise UnknownError
    body = nodes[0].body
    statements = body if isinstance(body, list) else [ast.Return(body)]
    if sum(isinstance(each, ast.stmt) for part in statements for each in ast.walk(part)) > _LONGEST:
        raise UnknownError
    return statements


def bound(function: FunctionType, arguments: Sequence[object], options: Mapping[str, object]) -> dict[str, object]:
    """Return the values of a function's parameters and outer variables in a call. UnknownError if they do not fit."""
    try:
        given = inspect.signature(function, follow_wrapped=False).bind(*arguments, **options)
    except (TypeError, ValueError):
        raise UnknownError from None
    given.apply_defaults()
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {**{name: cell.cell_contents for name, cell in cells if _is_set(cell)}, **given.arguments}


def _is_set(cell: object) -> bool:
    try:
        cell.cell_contents  # type: ignore[attr-defined]  # noqa: B018
    except ValueError:
        return False
    return True


def returned(body: Sequence[ast.stmt], names: dict[str, object], evaluate: Evaluate) -> object:
    """Return a function's result. UnknownError if it does more than choose and return it."""
    found = _run(body, names, evaluate)
    return None if found is _GOES_ON else found


_GOES_ON = object()


def _run(block: Sequence[ast.stmt], names: dict[str, object], evaluate: Evaluate) -> object:
    for statement in block:
        match statement:
            case ast.Return(value=None):
                return None
            case ast.Return(value=ast.expr() as value):
                return evaluate(value, names)
            case ast.If(test=test, body=body, orelse=other):
                found = _run(body if evaluate(test, names) else other, names, evaluate)
                if found is not _GOES_ON:
                    return found
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = evaluate(value, names)
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass
            case _:
                raise UnknownError
    return _GOES_ON
