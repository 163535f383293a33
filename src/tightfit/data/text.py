"""Read text from files in bounded memory: decode it, report the offset of invalid UTF-8, cut between tokens."""

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tightfit.errors import DataError
from tightfit.wording import say

CHUNK = 2**18
"""Bytes read, and characters encoded, in one go."""

# White space as Unicode and the tokenizers' patterns define it; str.isspace also takes U+001C to U+001F.
_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def open_input(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(say("data.text.unreadable", path=path, reason=error.strerror)) from None


def read_text(path: Path, errors: str) -> Iterator[tuple[str, int]]:
    """Yield chunks of a UTF-8 file with the bytes read so far; line ends become "\\n", as in nanoGPT."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(errors), translate=True)
    position = 0
    with open_input(path) as file:
        while True:
            data = file.read(CHUNK)
            position += len(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # The decoder's object is what it kept of the last chunk followed by this one.
                raise not_utf8(path, position - len(error.object) + error.start, error) from None
            yield text, position
            if not data:
                return


def not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    return DataError(say("data.text.not_utf8", path=path, offset=offset, byte=error.object[error.start]))


def cut(chunks: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int, bool]]:
    """Yield the text in pieces of at most CHUNK characters, each with its position and True for the last.

    A piece ends where white space begins. No token of GPT-2's BPE or of ours crosses such a place or depends on text
    behind it, so the ids equal those of the whole text. CHUNK characters may have no such place: one run of white
    space, or Chinese without a space or a line break. They are cut at CHUNK, and the two tokens there may differ.

    >>> [piece for piece, _, _ in cut([("one two\\n" * 40_000, 0)])][0][-9:]
    'o\\none two'
    """
    held, position = "", 0
    for text, position in chunks:
        held += text
        while len(held) > CHUNK:
            end = _safe_end(held)
            yield held[:end], position, False
            held = held[end:]
    yield held, position, True


def _safe_end(text: str) -> int:
    space = max(text.rfind(" ", 0, CHUNK), text.rfind("\n", 0, CHUNK))
    return len(text[: space + 1].rstrip(_WHITE)) or CHUNK


def in_chunks(text: str, position: int) -> Iterator[tuple[str, int]]:
    """Yield a text in memory as chunks for `cut`."""
    for start in range(0, max(len(text), 1), CHUNK):
        yield text[start : start + CHUNK], position


def without_surrogates(text: str, errors: str, where: str) -> str:
    """Return valid text, or raise or replace: JSON can hold half of a surrogate pair, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        raise DataError(say("data.text.half_pair", where=where, character=error.start)) from None
    return text
