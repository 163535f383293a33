"""Sources of text: one file, many files and rows, or OpenWebText, each as one stream of pieces.

Every reading yields the same pieces: an interrupted preparation reads again up to the point it had reached.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypedDict

from tightfit.data.meta import SourceInfo
from tightfit.data.rows import ROW_READERS
from tightfit.data.text import CHUNK, cut, in_chunks, read_text
from tightfit.errors import DataError
from tightfit.units import GIB
from tightfit.wording import say

Split = Literal["train", "val"]

TEXT_SUFFIXES = re.compile(
    r"\.(txt|text|md|rst|tex|org|html|xml|css|pyi?|c|h|cc|cpp|hpp|cuh?|rs|go|java|kt|scala|swift|jsx?|tsx?"
    r"|rb|php|pl|lua|r|jl|hs|ml|ex|erl|el|lisp|scm|clj|sh|sql|toml|ya?ml|ini)",
    re.IGNORECASE,
)
"""Files of these names in a folder are documents; .jsonl and .parquet hold one in each row."""


class Piece(NamedTuple):
    """Part of one document's text."""

    text: str
    split: Split
    ends: bool
    """True if a document ends here, so that an end-of-text id follows."""
    position: int
    """Bytes of input read so far."""


class Source(Protocol):
    """A stream of text that can be read again."""

    @property
    def total_bytes(self) -> int | None:
        """Bytes of input, if known."""

    @property
    def text_bytes(self) -> int:
        """Bytes of input known to be text."""

    @property
    def has_documents(self) -> bool:
        """True if pieces end documents."""

    def describe(self) -> SourceInfo:
        """Return the origin of the text, for meta.json."""

    def identity(self) -> str:
        """Return a digest of file names, sizes and times, which changes with the text."""

    def pieces(self) -> Iterator[Piece]: ...


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """One text, split by characters: the first for training, the rest for validation, as in nanoGPT."""

    path: Path
    val_fraction: float
    """Share of characters for validation."""
    errors: str = "strict"

    has_documents = False

    @property
    def total_bytes(self) -> int:
        return self.path.stat().st_size

    text_bytes = total_bytes

    def describe(self) -> SourceInfo:
        return {"kind": "text", "path": str(self.path), "bytes": self.total_bytes}

    def identity(self) -> str:
        return _digest([self.path], self.path.parent)

    def pieces(self) -> Iterator[Piece]:
        for split, chunks in _divided(self.path, self.errors, self.val_fraction):
            for text, position, _ in cut(chunks):
                yield Piece(text, split, False, position)


Chunks = Iterable[tuple[str, int]]
"""Text with the bytes of input read up to its end."""


def _divided(path: Path, errors: str, val_fraction: float) -> Iterator[tuple[Split, Chunks]]:
    """Yield a text's first characters for training and its last ones for validation."""
    characters = sum(len(text) for text, _ in read_text(path, errors))
    marked = _marked(read_text(path, errors), int(characters * (1 - val_fraction)))
    for split, group in groupby(marked, key=lambda chunk: chunk[0]):
        yield split, ((text, position) for _, text, position in group)


def _marked(chunks: Chunks, train_characters: int) -> Iterator[tuple[Split, str, int]]:
    left = train_characters
    for text, position in chunks:
        if left:
            yield "train", text[:left], position
        if len(text) > left:
            yield "val", text[left:], position
        left = max(0, left - len(text))


class _HeldOut(NamedTuple):
    """Validation text among whole files."""

    files: frozenset[Path]
    divided: Path | None
    """File that gives its end to validation, too."""
    val_fraction: float
    """Share of the divided file."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Documents: whole text files, and the rows of .jsonl and .parquet files, in order of their names."""

    name: str
    root: Path
    """Folder to which file names are relative, for their order and for the split."""
    files: tuple[Path, ...]
    val_fraction: float
    """Validation share of rows, and of the bytes of text files; drawn by a hash of name, row and seed."""
    seed: int
    field: str = "text"
    """Key of a JSONL row, or column of a Parquet file, that holds the text."""
    errors: str = "strict"
    skipped: int = 0
    """Files in the folder of no known kind."""

    has_documents = True

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def text_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files if not _has_rows(path))

    def describe(self) -> SourceInfo:
        return {
            "kind": "files",
            "name": self.name,
            "path": str(self.root),
            "files": len(self.files),
            "skipped": self.skipped,
            "bytes": self.total_bytes,
        }

    def identity(self) -> str:
        return _digest(self.files, self.root)

    def pieces(self) -> Iterator[Piece]:
        held_out = self._held_out()
        documents = rows = before = 0
        for path in self.files:
            for row, (split, chunks) in enumerate(self._documents(path, held_out)):
                documents += 1
                if _has_rows(path):
                    split = self._split_of_row(f"{self._name(path)}:{row}", rows)
                    rows += 1
                for text, position, last in cut(chunks):
                    yield Piece(text, split, last, before + position)
            before += path.stat().st_size
        if documents == 1:
            raise DataError(say("data.sources.one_document", root=self.root))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _hash(self, name: str) -> int:
        text = f"{self.seed}:{name}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())

    def _held_out(self) -> _HeldOut:
        """Return whole files in order of hash, up to the share of bytes; the end of the largest if they miss half."""
        sizes = {path: size for path in self.files if not _has_rows(path) and (size := path.stat().st_size)}
        share = left = int(sum(sizes.values()) * self.val_fraction)
        held = set[Path]()
        for path in sorted(sizes, key=lambda path: self._hash(self._name(path))):
            if sizes[path] <= left:
                left -= sizes[path]
                held.add(path)
        others = sizes.keys() - held
        if 2 * left <= share or not others:
            return _HeldOut(frozenset(held), None, 0.0)
        largest = max(others, key=lambda path: (sizes[path], self._name(path)))
        return _HeldOut(frozenset(held), largest, left / sizes[largest])

    def _split_of_row(self, name: str, number: int) -> Split:
        if number < 2:  # so that neither side is empty, however few there are
            return "val" if number else "train"
        return "val" if self._hash(name) < self.val_fraction * 2**64 else "train"

    def _documents(self, path: Path, held_out: _HeldOut) -> Iterator[tuple[Split, Chunks]]:
        if _has_rows(path):
            rows = ROW_READERS[path.suffix](path, self.field, self.errors)
            return (("train", in_chunks(text, position)) for text, position in rows)
        if path == held_out.divided:
            return _divided(path, self.errors, held_out.val_fraction)
        return iter([("val" if path in held_out.files else "train", read_text(path, self.errors))])


class _Row(TypedDict):
    text: str


class _HubDataset(Protocol):
    """The part of `datasets.Dataset` that is used here."""

    def train_test_split(self, *, test_size: float, seed: int, shuffle: bool) -> Mapping[str, Iterable[_Row]]: ...


@dataclass(frozen=True, kw_only=True)
class OpenWebText:
    """OpenWebText by Hugging Face's `datasets`, in nanoGPT's order and split: shuffled, 0.05% held out."""

    val_fraction: float
    seed: int
    workers: int

    has_documents = True
    total_bytes = None
    text_bytes = 38 * GIB  # of its 8,013,769 documents, from its authors' announcement

    def describe(self) -> SourceInfo:
        return {"kind": "openwebtext", "name": "Skylion007/openwebtext"}

    def identity(self) -> str:
        return "openwebtext"

    def pieces(self) -> Iterator[Piece]:
        parts = self._load().train_test_split(test_size=self.val_fraction, seed=self.seed, shuffle=True)
        position = 0
        splits: tuple[tuple[Split, str], ...] = (("train", "train"), ("val", "test"))
        for split, part in splits:
            for row in parts[part]:
                position += len(row["text"])
                for text, _, last in cut(in_chunks(row["text"], position)):
                    yield Piece(text, split, last, position)

    def _load(self) -> _HubDataset:
        try:
            import datasets
        except ImportError:
            raise DataError(say("data.sources.no_datasets")) from None
        try:
            loaded: _HubDataset = datasets.load_dataset("Skylion007/openwebtext", split="train", num_proc=self.workers)
            return loaded
        except (OSError, ValueError, RuntimeError) as error:
            # No network (ConnectionError), not found there, or a script instead of data, which is never run.
            kind = type(error).__name__
            raise DataError(say("data.sources.no_openwebtext", kind=kind, reason=str(error))) from None


def collect(path: Path) -> tuple[tuple[Path, ...], int]:
    """Return the files of known kinds under a folder, sorted by name, and the number of others; skip hidden ones."""
    found, skipped = [], 0
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if (
                not name.startswith(".")
                and (TEXT_SUFFIXES.fullmatch(file.suffix) or _has_rows(file))
                and file.is_file()
            ):
                found.append(file)
            else:
                skipped += 1
    return tuple(sorted(found, key=lambda file: file.relative_to(path).as_posix())), skipped


def _has_rows(path: Path) -> bool:
    return path.suffix in ROW_READERS


def _digest(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256(str(CHUNK).encode())
    for path in files:
        status = path.stat()
        name = path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")
        digest.update(name + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
