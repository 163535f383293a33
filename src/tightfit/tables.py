"""Tables that come with the package: TOML files beside the code that reads them."""

import functools
import re
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


@functools.cache
def read_patterns(package: str, name: str, flags: int = 0) -> dict[str, dict[str, re.Pattern[str]]]:
    """Read a table of tables with lists of regular expressions, each list as one pattern; read once.

    >>> bool(read_patterns("tightfit.oomlog", "phases.toml")["functions"]["eval"].search("evaluate"))
    True
    """
    tables = read_table(package, name, dict[str, dict[str, list[str]]])
    return {
        table: {key: re.compile("|".join(each), flags) for key, each in lists.items()}
        for table, lists in tables.items()
    }
