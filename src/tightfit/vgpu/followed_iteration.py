"""An iteration of a running loop, counted as its source says; nothing else of the script runs."""

import ast
import operator
from dataclasses import dataclass
from types import CodeType
from typing import cast

from tightfit.vgpu.expressions import Reader
from tightfit.vgpu.inlined_loop import WATCHED
from tightfit.vgpu.reduced_iteration import ReducedIteration
from tightfit.vgpu.watched_values import Values

Names = dict[str, object]
"""Values of a function's own names, or of the global ones."""


@dataclass(frozen=True)
class FollowedIteration:
    """The next iteration of a loop."""

    code: CodeType
    """Its counts and conditions."""
    reduced: ReducedIteration
    names: Names
    others: Names

    def values(self) -> Values:
        """Return the values of the counters, by their expressions."""
        reader = Reader(self.names, self.others, frozenset())
        return {text: reader.value(target) for text, target in self.reduced.counters.items()}

    def write(self, values: Values) -> None:
        """Give the counters these values."""
        for text, value in values.items():
            target = self.reduced.counters[text]
            if isinstance(target, ast.Call) and isinstance(value, int):  # a list's length
                reader = Reader(self.names, self.others, frozenset())
                del cast("list[object]", reader.value(target.args[0]))[value:]
            else:
                self.assign(text, value)

    def assign(self, text: str, value: object) -> None:
        """Assign to a name, an attribute or an item of the running function."""
        reader = Reader(self.names, self.others, frozenset())
        match ast.parse(text, mode="eval").body:
            case ast.Attribute(value=owner, attr=name):
                setattr(reader.value(owner), name, value)
            case ast.Subscript(value=owner, slice=key):
                operator.setitem(cast("dict[object, object]", reader.value(owner)), reader.value(key), value)
            case _ if text in self.names:
                self.names[text] = value
            case _:
                self.others[text] = value

    def count(self, found: Values | None = None) -> Values:
        """Run the script's own counts and conditions, and nothing else; return the watched values.

        An iteration that is not followed to its end leaves in `found` the values before that. Raises the script's own.
        """
        found = {} if found is None else found
        self.names[WATCHED] = found
        try:
            exec(self.code, self.others, self.names)
        except StopIteration:
            pass
        finally:
            del self.names[WATCHED]
        for key in [key for key, value in found.items() if not _is_size(value)]:
            del found[key]
        return found


def _is_size(value: object) -> bool:
    """Return True for a value that may decide a size, and can be compared: tensors within a tuple cannot."""
    return all(map(_is_size, value)) if isinstance(value, tuple) else isinstance(value, (int, str))
