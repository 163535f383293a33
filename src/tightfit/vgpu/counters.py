"""Numbers that a script keeps between iterations, in attributes, items and closures: where they are, and new values.

Nothing of the script is called, and nothing is kept alive: a function's own objects are remembered by weak references.
"""

import ast
import contextlib
import gc
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import cast

from tightfit.vgpu.expressions import Reader
from tightfit.vgpu.loop_items import FAILURES
from tightfit.vgpu.operations import NUMBERS, UnknownError


@dataclass(frozen=True)
class Roots:
    """Where the names of an expression are found."""

    own: Mapping[str, object]
    """A function's own names, as numbers or weak references."""
    others: dict[str, object]
    """Its global names."""
    code: CodeType | None
    """The function's code, if it may have names of a function around it."""

    def names(self) -> dict[str, object]:
        """Return the objects that the own names stand for now."""
        found = {name: each() if isinstance(each, weakref.ref) else each for name, each in self.own.items()}
        cells = self.code.co_freevars if self.code is not None else ()
        for name in cells:
            cell = self.cell(name)
            if cell is not None:
                with contextlib.suppress(ValueError):  # an empty one
                    found[name] = cell.cell_contents
        return {name: each for name, each in found.items() if each is not None}

    def cell(self, name: str) -> CellType | None:
        """Return where a function around this one keeps a name; None unless there is just one such place."""
        assert self.code is not None
        place = self.code.co_freevars.index(name)
        functions = [each for each in gc.get_referrers(self.code) if isinstance(each, FunctionType)]
        cells = {
            id(cell): cell for each in functions if each.__closure__ for cell in each.__closure__[place : place + 1]
        }
        return next(iter(cells.values())) if len(cells) == 1 else None


def roots_of(
    inputs: Iterable[ast.expr], names: Mapping[str, object], others: dict[str, object], code: CodeType | None
) -> Roots:
    """Note where the names of expressions are found in a function that runs."""
    own: dict[str, object] = {}
    for input_ in inputs:
        for each in ast.walk(input_):
            if isinstance(each, ast.Name) and each.id in names and not isinstance(input_, ast.Name):
                value = names[each.id]
                with contextlib.suppress(TypeError):  # a list, for example
                    own[each.id] = value if isinstance(value, NUMBERS) else weakref.ref(value)
    return Roots(own, others, code)


def current(inputs: Iterable[ast.expr], roots: Roots) -> tuple[object, ...]:
    """Return the values of expressions now; None for a name that only its function has."""
    reader = Reader(roots.names(), roots.others, frozenset())
    found: list[object] = []
    for input_ in inputs:
        try:
            found.append(reader.value(input_))
        except UnknownError:
            found.append(None)
        if isinstance(input_, ast.Name) and roots.code is not None and input_.id in roots.code.co_varnames:
            found[-1] = None
    return tuple(found)


def write(input_: ast.expr, roots: Roots, before: int, after: int) -> None:
    """Set the named value if it is as before: else something else counts it."""
    names = roots.names()
    reader = Reader(names, roots.others, frozenset())
    with contextlib.suppress(UnknownError, *FAILURES):
        if reader.value(input_) != before:
            return
        match input_:
            case ast.Attribute(value=owner, attr=name):
                holder = reader.value(owner)
                fields = vars(holder)
                if name in fields and not isinstance(holder, type):
                    fields[name] = after
                elif name in fields or name in vars(type(holder)):
                    setattr(holder, name, after)
            case ast.Subscript(value=owner, slice=key):
                cast("dict[object, object]", reader.value(owner))[reader.value(key)] = after
            case ast.Name(id=name) if roots.code is not None and name in roots.code.co_freevars:
                cell = roots.cell(name)
                if cell is not None:
                    cell.cell_contents = after
            case ast.Name(id=name) if name in roots.others and name not in names:
                roots.others[name] = after
