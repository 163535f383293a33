"""A dataset from text: read, encode on all cores, write, and put in place as one.

    source ──► pieces ──► shards ──► tokenizer, in threads ──► files in the work folder ──► the dataset

Memory stays bounded for any size of text: each thread has two shards in progress. A journal records the written length
every few seconds. After a crash the same command reads the source again up to that point and continues to encode.
JSON lines are read at some 400 MB/s, plain text faster than disks. The files come out the same, byte for byte.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from tightfit.data.meta import DTYPES, FORMAT, Meta, dtype_for, nanogpt_meta, read_meta
from tightfit.data.recipes import Options, Paths, Recipe, bpe_vocab_size, resolve
from tightfit.data.sources import Piece, Source, Split
from tightfit.data.tokenizers import Bpe, Bytes, Characters, Gpt2, Tokenizer, Uint32
from tightfit.data.workfolder import (
    WORK_FOLDER,
    Journal,
    TokenWriter,
    discard_unstarted,
    disk_errors,
    finish_publishing,
    locked,
    open_journal,
    publish,
    require_space,
)
from tightfit.errors import DataError
from tightfit.storage import write_aside
from tightfit.units import MIB
from tightfit.wording import say

SHARD_CHARACTERS = 2**20
SHARD_PIECES = 4096
SPLIT_RULE = 2
"""Version of the rule that chooses validation text: unfinished work of another one is not continued."""
COMMIT_SECONDS = 5.0
"""Seconds between two fsyncs of the token files: the most work that a crash can lose."""
TRAINING_BYTES = 32 * MIB
"""Bytes of text to train a BPE on, spread over the source; 10 MB take 3 seconds on two cores."""

# No text that we know has more bytes for each token: English has 4.5 with GPT-2, Python 3.7 with 4,096 ids.
_MOST_BYTES_PER_TOKEN = {"characters": 4, "bytes": 1, "gpt2": 6, "bpe": 6}

Shard = list[Piece]
Encoded = dict[Split, Uint32]
Progress = Callable[[int, int | None, int], None]
"""Called with the bytes of input read, all there are (None if unknown), and the tokens written."""


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """Result of a preparation."""

    name: str
    folder: Path
    train_tokens: int
    val_tokens: int
    documents: int
    """0 for one text that is split by characters."""
    vocab_size: int
    dtype: str
    tokenizer: str
    """characters, bytes, gpt2 or bpe."""
    resumed: bool
    """True if it continued an interrupted preparation."""
    seconds: float


def prepare(
    name_or_path: str | Path,
    *,
    input: Paths | None = None,
    data_dir: str | Path = "data",
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    val_fraction: float | None = None,
    block_size: int | None = None,
    seed: int = 2357,
    field: str = "text",
    errors: str = "strict",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PrepareResult:
    """Make `<data_dir>/<name>` from shakespeare_char, shakespeare, openwebtext, stdlib, or the user's files.

    `Options` explains the choices. DataError if the text is missing or unreadable, DoesNotFit if the disk is full.
    An earlier dataset of that name stays until the new one is complete; one from another input is replaced only with
    `overwrite`.
    """
    started = time.monotonic()
    options = Options(
        tokenizer=tokenizer,
        vocab_size=vocab_size or bpe_vocab_size(str(name_or_path)),
        val_fraction=val_fraction,
        block_size=block_size,
        seed=seed,
        field=field,
        errors=errors,
        workers=workers,
    )
    with disk_errors(Path(data_dir)):
        recipe = resolve(name_or_path, input, data_dir, options)
        recipe.folder.mkdir(parents=True, exist_ok=True)
    with locked(recipe.folder), disk_errors(recipe.folder):
        finish_publishing(recipe.folder)
        if not overwrite:
            _refuse_another_input(recipe)
        try:
            made, journal, resumed = _write(recipe, options, progress or _silent)
        except DataError:
            discard_unstarted(recipe.folder)
            raise
        publish(recipe.folder)
    return PrepareResult(
        name=recipe.name,
        folder=recipe.folder,
        train_tokens=journal.train,
        val_tokens=journal.val,
        documents=journal.documents,
        vocab_size=made.vocab_size,
        dtype=journal.dtype,
        tokenizer=recipe.tokenizer,
        resumed=resumed,
        seconds=time.monotonic() - started,
    )


def _refuse_another_input(recipe: Recipe) -> None:
    """DataError if the folder holds a dataset that was made from another text."""
    try:
        meta = read_meta(recipe.folder)
    except DataError:  # a broken one is no loss
        return
    now, before = recipe.source.describe(), meta.source if meta else {}
    if not isinstance(before, dict) or not {"kind", "path"} <= before.keys():
        return
    if (before["kind"], os.path.abspath(before["path"])) != (now.get("kind"), os.path.abspath(now.get("path", ""))):
        raise DataError(say("data.workfolder.another_input", folder=recipe.folder, path=before["path"]))


def _silent(done_bytes: int, total_bytes: int | None, tokens: int) -> None:
    pass


def _write(recipe: Recipe, options: Options, progress: Progress) -> tuple[Tokenizer, Journal, bool]:
    """Write all files of the dataset to the work folder and sync them."""
    source, work = recipe.source, recipe.folder / WORK_FOLDER
    identity = source.identity()
    settings = [FORMAT, SHARD_CHARACTERS, SHARD_PIECES, SPLIT_RULE, identity, recipe.tokenizer, options.vocab_size]
    settings += [options.val_fraction, options.seed, options.field, options.errors, source.describe()]
    job = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    journal = open_journal(work, job)
    resumed = journal.shards > 0
    made = _make_tokenizer(recipe.tokenizer, source, work, options.vocab_size)
    journal.dtype = dtype_for(made.vocab_size)
    tokens = source.text_bytes // _MOST_BYTES_PER_TOKEN[recipe.tokenizer] - journal.train - journal.val
    require_space(recipe.folder, needed_bytes=tokens * DTYPES[journal.dtype])

    _encode_all(source, made, work, journal, options.workers, progress)
    if not journal.train or not journal.val:
        raise DataError(say("data.preparation.too_short", name=recipe.name, train=journal.train, val=journal.val))
    if options.block_size and (shortest := min(journal.train, journal.val)) <= options.block_size:
        raise DataError(say("data.preparation.shorter_than_block", tokens=shortest, block_size=options.block_size))
    if source.identity() != identity:
        raise DataError(say("data.preparation.changed", name=recipe.name))
    meta = Meta(
        vocab_size=made.vocab_size,
        dtype=journal.dtype,
        tokenizer=made.describe(),
        train_tokens=journal.train,
        val_tokens=journal.val,
        source=source.describe(),
        seed=options.seed,
    )
    if isinstance(made, Characters):
        write_aside(work / "meta.pkl", nanogpt_meta(made.characters), durable=True)
    write_aside(work / "meta.json", meta.to_json(), durable=True)
    return made, journal, resumed


def _make_tokenizer(kind: str, source: Source, work: Path, vocab_size: int) -> Tokenizer:
    if kind == "gpt2":
        return Gpt2()
    if kind == "bytes":
        return Bytes()
    if kind == "characters":
        between = ["\n"] if source.has_documents else []
        return Characters.of(text for texts in (between, (p.text for p in source.pieces())) for text in texts)
    saved = work / "tokenizer.json"
    if not saved.exists():
        write_aside(saved, Bpe.train(_training_text(source), vocab_size).to_json(), durable=True)
    return Bpe.load(saved)


def _training_text(source: Source) -> Iterator[str]:
    """Yield every n-th piece of training text, so that the sample covers the whole source."""
    step = (source.total_bytes or 0) // TRAINING_BYTES + 1
    left = TRAINING_BYTES
    for piece in islice((p for p in source.pieces() if p.split == "train"), 0, None, step):
        yield piece.text
        left -= len(piece.text)
        if left <= 0:
            return


def _encode_all(
    source: Source,
    tokenizer: Tokenizer,
    work: Path,
    journal: Journal,
    workers: int | None,
    progress: Progress,
) -> None:
    """Append the ids of all shards missing from the journal, in order, and update the journal."""
    end = [tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode("\n") if source.has_documents else []
    end_ids = np.array(end, dtype=np.uint32)
    workers = workers or os.cpu_count() or 1
    total_bytes = source.total_bytes
    # tiktoken and tokenizers release the GIL while they work, so threads do, without copies of the text.
    pool = ThreadPoolExecutor(workers)
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        lengths: dict[Split, int] = {"train": journal.train, "val": journal.val}
        writers = {
            split: TokenWriter(work / f"{split}.bin", journal.dtype, tokens) for split, tokens in lengths.items()
        }
        for writer in writers.values():
            stack.callback(writer.close)
        committed = time.monotonic()
        shards = islice(_shards(source.pieces()), journal.shards, None)
        for shard, ids in _in_order(pool, lambda shard: _encode(tokenizer, shard, end_ids), shards, 2 * workers):
            for split, writer in writers.items():
                writer.append(ids[split])
            journal.shards += 1
            journal.train += len(ids["train"])
            journal.val += len(ids["val"])
            journal.position = shard[-1].position
            journal.documents += sum(piece.ends for piece in shard)
            if time.monotonic() - committed >= COMMIT_SECONDS:
                _commit(writers, journal, work)
                committed = time.monotonic()
            progress(journal.position, total_bytes, journal.train + journal.val)
        _commit(writers, journal, work)


def _commit(writers: dict[Split, TokenWriter], journal: Journal, work: Path) -> None:
    for writer in writers.values():
        writer.sync()
    journal.save(work)


def _shards(pieces: Iterable[Piece]) -> Iterator[Shard]:
    """Group pieces into shards of about SHARD_CHARACTERS: the unit of encoding and of the journal."""
    shard: Shard = []
    characters = 0
    for piece in pieces:
        shard.append(piece)
        characters += len(piece.text)
        if characters >= SHARD_CHARACTERS or len(shard) >= SHARD_PIECES:
            yield shard
            shard, characters = [], 0
    if shard:
        yield shard


def _encode(tokenizer: Tokenizer, shard: Shard, end_ids: Uint32) -> Encoded:
    parts: dict[Split, list[Uint32]] = {"train": [end_ids[:0]], "val": [end_ids[:0]]}
    for piece, ids in zip(shard, tokenizer.encode_batch([piece.text for piece in shard]), strict=True):
        parts[piece.split].append(ids)
        if piece.ends:
            parts[piece.split].append(end_ids)
    return {split: np.concatenate(arrays) for split, arrays in parts.items()}


def _in_order(
    pool: ThreadPoolExecutor, encode: Callable[[Shard], Encoded], shards: Iterable[Shard], ahead: int
) -> Iterator[tuple[Shard, Encoded]]:
    """Yield each shard with its ids, in order, with at most `ahead` shards in progress."""
    waiting: deque[tuple[Shard, Future[Encoded]]] = deque()
    for shard in shards:
        waiting.append((shard, pool.submit(encode, shard)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
