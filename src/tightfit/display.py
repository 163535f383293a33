"""Records that show themselves: a line in an interpreter, a report when printed, a table in a notebook.

The room `report` does the drawing. It is above the records, so the package's face hands it down.
"""

from collections.abc import Callable
from typing import ClassVar, Protocol


class Views(Protocol):
    """Functions that draw any record."""

    def line(self, record: object, /) -> str: ...

    def text(self, record: object, /) -> str: ...

    def html(self, record: object, /) -> str: ...


class Displayed:
    """Base of the records that the public functions return. Encoding and comparing them stay as they are."""

    __slots__ = ()
    views: ClassVar[Callable[[], Views]]
    """Loads the views when a record is first shown."""

    def __repr__(self) -> str:
        return Displayed.views().line(self)

    def __str__(self) -> str:
        return Displayed.views().text(self)

    def _repr_html_(self) -> str:
        return Displayed.views().html(self)
