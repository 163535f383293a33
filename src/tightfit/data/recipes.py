"""Resolve the name or path that a user gives into a source of text, a tokenizer and a split."""

import difflib
import http.client
import os
import re
import sys
import sysconfig
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tightfit.data.sources import Files, OpenWebText, Source, TextFile, collect
from tightfit.data.tokenizers import TOKENIZERS
from tightfit.errors import DataError
from tightfit.storage import write_aside
from tightfit.wording import say

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
NETWORK_TIMEOUT_S = 30.0

# Default tokenizer, and default share of validation text or documents, of each name; nanoGPT's for its three.
NAMES = {
    "shakespeare_char": ("characters", 0.1),
    "shakespeare": ("gpt2", 0.1),
    "openwebtext": ("gpt2", 0.0005),
    "stdlib": ("bpe", 0.05),
}

# Folders of the standard library that are tests, third-party, or tables that no person wrote.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
_NOT_LIBRARY |= {"encodings", "pydoc_data"}

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices of a preparation other than its name."""

    tokenizer: str | None = None
    """characters, bytes, gpt2 or bpe; None is the name's default, gpt2 for files of the user's."""
    vocab_size: int = 4096
    """Ids of a bpe vocabulary trained here; the others have theirs."""
    val_fraction: float | None = None
    """Share of characters (one text file) or documents for validation; None is the name's default."""
    block_size: int | None = None
    """Tokens of a sequence of the planned run: a split that holds none is refused. None asks for no length."""
    seed: int = 2357
    """Seed of the choice of validation documents; nanoGPT's."""
    field: str = "text"
    """JSONL key or Parquet column that holds the text."""
    errors: str = "strict"
    """Treatment of invalid UTF-8: strict stops, replace writes U+FFFD."""
    workers: int | None = None
    """Threads that encode; None is one for each core."""

    def __post_init__(self) -> None:
        if self.tokenizer not in (None, *TOKENIZERS):
            raise DataError(say("data.recipes.tokenizer", known=", ".join(TOKENIZERS), value=repr(self.tokenizer)))
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise DataError(say("data.recipes.val_fraction", value=self.val_fraction))
        if self.errors not in ("strict", "replace"):
            raise DataError(say("data.recipes.errors", value=repr(self.errors)))
        if self.workers is not None and self.workers < 1:
            raise DataError(say("data.recipes.workers", value=self.workers))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Source, tokenizer and target folder of a preparation."""

    name: str
    folder: Path
    source: Source
    tokenizer: str


def resolve(name_or_path: str | Path, input: Paths | None, data_dir: str | Path, options: Options) -> Recipe:
    """Return the recipe, after a download of Shakespeare if needed. DataError if there is no such name or file."""
    given = str(name_or_path)
    name = given if _is_name(given, has_input=input is not None) else Path(given).resolve().stem
    if not re.fullmatch(r"[^./\\][^/\\]*", name):
        raise DataError(say("data.recipes.no_name", given=given))
    folder = Path(data_dir) / name
    tokenizer, fraction = NAMES.get(name, ("gpt2", None)) if name == given else ("gpt2", None)
    if input is not None:
        paths = [Path(input)] if isinstance(input, str | Path) else [Path(path) for path in input]
        source = _from_paths(name, paths, fraction, options)
    elif name == given and name in NAMES:
        source = _from_name(name, folder, options)
    else:
        kept = folder / "input.txt"
        path = kept if name == given and kept.exists() else Path(given)
        source = _from_paths(name, [path], fraction, options)
    return Recipe(name=name, folder=folder, source=source, tokenizer=options.tokenizer or tokenizer)


def bpe_vocab_size(name: str) -> int:
    """Return the default number of ids of a BPE vocabulary trained here.

    A model that learns the standard library in minutes writes better text with few: GPT of 4 x 256, 2.1 million
    tokens seen, 1024 ids: whole methods; 4096 ids: fragments of lines.
    """
    return 1024 if name == "stdlib" else 4096


def stdlib_files(root: Path) -> tuple[Path, ...]:
    """Return the source files of Python's library: no tests, no installed packages, no generated tables."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and not name.startswith("config-")]
        found += [Path(parent, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _is_name(given: str, *, has_input: bool) -> bool:
    """Return True for a name, False for a path. A known name is a name; with an input, so is text without a slash."""
    if given in NAMES or (has_input and os.sep not in given):
        return True
    return os.sep not in given and not Path(given).exists()


def _from_name(name: str, folder: Path, options: Options) -> Source:
    _, fraction = NAMES[name]
    fraction = options.val_fraction or fraction
    if name == "openwebtext":
        return OpenWebText(val_fraction=fraction, seed=options.seed, workers=options.workers or os.cpu_count() or 1)
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        if len(files := stdlib_files(root)) < 2:
            raise DataError(say("data.recipes.no_library", root=root))
        label = f"Python {sys.version.split()[0]} standard library"
        return Files(
            name=label,
            root=root,
            files=files,
            val_fraction=fraction,
            seed=options.seed,
            errors=options.errors,
        )
    path = folder / "input.txt"
    if not path.exists():
        _download(SHAKESPEARE_URL, path)
    return TextFile(path=path, val_fraction=fraction, errors=options.errors)


def _from_paths(name: str, paths: list[Path], fraction: float | None, options: Options) -> Source:
    for path in paths:
        if not path.exists():
            close = difflib.get_close_matches(str(path), NAMES, n=1)
            hint = say("data.recipes.did_you_mean", near=close[0]) if close else ""
            raise DataError(say("data.recipes.no_input", path=path, names=", ".join(NAMES), hint=hint))
    fraction = options.val_fraction or fraction or 0.1
    files: list[Path] = []
    skipped = 0
    for path in paths:
        below, others = collect(path) if path.is_dir() else ((path,), 0)
        files += [file.absolute() for file in below]
        skipped += others
    if not files:
        raise DataError(say("data.recipes.no_text", path=paths[0], files=skipped))
    if len(files) == 1 and files[0].suffix not in (".jsonl", ".parquet"):
        return TextFile(path=files[0], val_fraction=fraction, errors=options.errors)
    folders = [path.absolute() if path.is_dir() else path.absolute().parent for path in paths]
    return Files(
        name=name,
        root=Path(os.path.commonpath(folders)),
        files=tuple(files),
        val_fraction=fraction,
        seed=options.seed,
        field=options.field,
        errors=options.errors,
        skipped=skipped,
    )


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT_S) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(say("data.recipes.no_download", url=url, reason=error, path=path)) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, data, durable=True)
