"""Read and write a dataset's description: our meta.json, or nanoGPT's meta.pkl.

A meta.pkl may come from anybody, so it is read as data: it cannot reach a class, function or outside object. Its
operations are checked before they run, so a small file cannot ask for much memory.
"""

import io
import json
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn, Required, TypedDict

from tightfit.errors import DataError
from tightfit.units import MIB
from tightfit.wording import say

FORMAT = 1
DTYPES = {"uint16": 2, "uint32": 4}
"""Number formats of token files, always little-endian, and their bytes per token."""
MAX_META_BYTES = 32 * MIB
"""All of Unicode as a character vocabulary takes 24 MB as meta.pkl, 13 MB as meta.json."""
MAX_CONTAINERS = 100_000
"""Dicts and lists in a meta.pkl; nanoGPT writes 3. A dict is 1 byte there, 64 in memory."""

_CONTAINERS = {"EMPTY_DICT", "DICT", "EMPTY_LIST", "LIST"}
"""No tuples: as keys, nested ones take hours to hash, and nanoGPT writes none."""
_MEMO_BY_INDEX = {"PUT", "BINPUT", "LONG_BINPUT"}
_VALUES = """
    PROTO FRAME STOP MARK MEMOIZE GET BINGET LONG_BINGET SETITEM SETITEMS APPEND APPENDS NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    STRING BINSTRING SHORT_BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8
"""
_PLAIN = {*_CONTAINERS, *_MEMO_BY_INDEX, *_VALUES.split()}
"""Operations of pickle that make plain values and cannot reach code."""
_REFUSED_BY_NAME = {"GLOBAL", "STACK_GLOBAL", "INST", "PERSID", "BINPERSID"}


class TokenizerInfo(TypedDict, total=False):
    """Kind of a tokenizer and the data to make it again."""

    kind: Required[str]
    """characters, bytes, gpt2 or bpe."""
    characters: str
    """Alphabet in order of id, for kind characters."""
    file: str
    """Name of the vocabulary file, for kind bpe."""


class SourceInfo(TypedDict, total=False):
    """Origin of a dataset's text."""

    kind: str
    """text, files or openwebtext."""
    name: str
    path: str
    files: int
    """Files that were read."""
    skipped: int
    """Files of no known kind."""
    bytes: int
    """Size of the input."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Description of a dataset's tokens."""

    vocab_size: int
    """Every token id is below this."""
    dtype: str = "uint16"
    """Number format of train.bin and val.bin, little-endian."""
    tokenizer: TokenizerInfo | None = None
    """`Tokenizer.describe()` of the tokenizer that made the ids; None if the folder does not name one."""
    train_tokens: int | None = None
    """Tokens in train.bin, if known."""
    val_tokens: int | None = None
    """Tokens in val.bin, if known."""
    source: SourceInfo = field(default_factory=SourceInfo)
    """Origin of the text."""
    seed: int | None = None
    """Seed of the split into training and validation documents."""

    def __post_init__(self) -> None:
        if not _is_count(self.vocab_size) or not 1 <= self.vocab_size <= 2**32:
            raise DataError(say("data.meta.vocab_size", value=repr(self.vocab_size)))
        if self.dtype not in DTYPES:
            raise DataError(say("data.meta.dtype", known=", ".join(DTYPES), value=repr(self.dtype)))
        for name in ("train_tokens", "val_tokens", "seed"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise DataError(say("data.meta.count", name=name, value=repr(value)))
        if self.tokenizer is not None and not isinstance(self.tokenizer, Mapping):
            raise DataError(say("data.meta.tokenizer", value=repr(self.tokenizer)))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=True) + "\n"


def dtype_for(vocab_size: int) -> str:
    """Return the smallest number format that holds every id.

    >>> dtype_for(65_536), dtype_for(65_537)
    ('uint16', 'uint32')
    """
    return "uint16" if vocab_size <= 2**16 else "uint32"


def read_meta(folder: str | Path) -> Meta | None:
    """Read the folder's meta.json, else its meta.pkl, else return None. DataError if the file is broken."""
    for name, parse in (("meta.json", _parse_json), ("meta.pkl", _parse_pickle)):
        path = Path(folder) / name
        if path.exists():
            try:
                return parse(_read_small(path))
            except DataError as error:
                raise DataError(say("data.meta.broken", path=path, problem=error)) from None
    return None


def nanogpt_meta(characters: Sequence[str]) -> bytes:
    """Return the meta.pkl that nanoGPT's sample.py and train.py read, for characters in order of id."""
    itos = dict(enumerate(characters))
    stoi = {character: i for i, character in itos.items()}
    return pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_small(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_META_BYTES + 1)
    except OSError as error:
        raise DataError(say("data.meta.unreadable", reason=error.strerror)) from None
    if len(data) > MAX_META_BYTES:
        raise DataError(say("data.meta.too_large", most=MAX_META_BYTES))
    return data


def _parse_json(data: bytes) -> Meta:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(say("data.meta.not_json", reason=_first_line(error))) from None
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise DataError(say("data.meta.other_format", known=FORMAT))
    known = {name: value for name, value in fields.items() if name in Meta.__dataclass_fields__}
    if "vocab_size" not in known:
        raise DataError(say("data.meta.no_vocab_size"))
    return Meta(**known)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(say("data.meta.asks_for_code", module=module, name=name))

    def persistent_load(self, pid: object) -> NoReturn:
        raise DataError(say("data.meta.outside_object"))


def _parse_pickle(data: bytes) -> Meta:
    # The exceptions that pickle's documentation and the C unpickler's source name for malformed input.
    try:
        _check_operations(data)
        content = _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(say("data.meta.not_plain", reason=_first_line(error))) from None
    except (OverflowError, MemoryError):
        raise DataError(say("data.meta.not_plain", reason=say("data.meta.much_memory"))) from None
    return _nanogpt_content(content)


def _check_operations(data: bytes) -> None:
    """Refuse a hostile or broken pickle before anything is built from it.

    `PUT` with a large index makes the unpickler fill a table of that length, 2**32 entries from five bytes.
    """
    containers = 0
    for done, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name in _REFUSED_BY_NAME:
            return  # the unpickler stops there too, and can say the name
        if operation.name not in _PLAIN:
            raise ValueError(say("data.meta.operation", name=operation.name))
        if isinstance(argument, int) and argument.bit_length() > 64:  # as keys, many of them can share one hash
            raise ValueError(say("data.meta.operation", name=operation.name))
        containers += operation.name in _CONTAINERS
        if containers > MAX_CONTAINERS:
            raise ValueError(say("data.meta.many_containers", most=MAX_CONTAINERS))
        if operation.name in _MEMO_BY_INDEX and not (isinstance(argument, int) and 0 <= argument <= done):
            raise ValueError(say("data.meta.misnumbered", value=done, number=argument))


def _nanogpt_content(content: object) -> Meta:
    if not isinstance(content, dict) or not _is_count(content.get("vocab_size")):
        raise DataError(say("data.meta.no_dict"))
    vocab_size = content["vocab_size"]
    itos, stoi = content.get("itos"), content.get("stoi")
    if itos is None and stoi is None:
        return Meta(vocab_size=vocab_size)
    if not isinstance(itos, dict) or not isinstance(stoi, dict):
        raise DataError(say("data.meta.no_two_dicts"))
    if len(itos) != vocab_size or len(stoi) != vocab_size:
        raise DataError(say("data.meta.lengths", vocab_size=vocab_size, itos=len(itos), stoi=len(stoi)))
    for i in range(vocab_size):
        character = itos.get(i)
        if not isinstance(character, str) or len(character) != 1 or stoi.get(character) != i:
            raise DataError(say("data.meta.no_character", id=i))
    return Meta(
        vocab_size=vocab_size,
        tokenizer={"kind": "characters", "characters": "".join(itos[i] for i in range(vocab_size))},
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
