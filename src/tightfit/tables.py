"""Tables that come with the package: TOML files beside the code that reads them."""

import tomllib
from importlib.resources import files
from typing import TypeVar

import msgspec

T = TypeVar("T")


def read_table(package: str, name: str, kind: type[T]) -> T:
    """Read a table as values of a type, such as a record or a dict of lists; whoever calls keeps it.

    >>> read_table("tightfit.oomlog", "codes.toml", dict[str, dict[str, object]])["status"]["empty"]
    'there is no text'
    """
    text = files(package).joinpath(name).read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), kind)
