"""Read files with one document per row: JSON lines and Parquet."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tightfit.data.text import not_utf8, open_input, without_surrogates
from tightfit.errors import DataError
from tightfit.units import MIB
from tightfit.wording import say

MAX_LINE_BYTES = 256 * MIB
"""Longest line of a JSONL file; each line is read into memory whole."""

Rows = Iterator[tuple[str, int]]
"""Text of each row, and bytes of the file read so far."""


def jsonl_rows(path: Path, field: str, errors: str) -> Rows:
    """Yield the strings under the key `field`; skip empty lines."""
    position = 0
    with open_input(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            start, position = position, position + len(line)
            if line.strip():
                yield _text_of(line, field, errors, path, start, f"{path}:{number}"), position


def parquet_rows(path: Path, field: str, errors: str) -> Rows:
    """Yield the strings of the column `field`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(say("data.rows.no_pyarrow", path=path)) from None
    size, row = path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                columns = ", ".join(map(repr, file.schema_arrow.names[:8]))
                raise DataError(say("data.rows.no_column", path=path, field=field, columns=columns))
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise DataError(say("data.rows.row_without_text", path=path, row=row, field=field))
                    yield text, size * row // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(say("data.rows.not_parquet", path=path, row=row, reason=str(error))) from None


ROW_READERS: dict[str, Callable[[Path, str, str], Rows]] = {".jsonl": jsonl_rows, ".parquet": parquet_rows}


def _text_of(line: bytes, field: str, errors: str, path: Path, offset: int, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8", errors).removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start, error) from None
    except json.JSONDecodeError as error:
        raise DataError(say("data.rows.not_json", where=where, reason=error.msg, column=error.colno)) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(say("data.rows.unusable_json", where=where, reason=str(error))) from None
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        if not isinstance(row, dict):
            raise DataError(say("data.rows.no_object", where=where, field=field))
        keys = ", ".join(map(repr, list(row)[:8]))
        raise DataError(say("data.rows.no_key", where=where, field=field, keys=keys))
    return without_surrogates(text, errors, where)


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise DataError(say("data.rows.long_line", path=path, line=number, most=MAX_LINE_BYTES))
        yield line
