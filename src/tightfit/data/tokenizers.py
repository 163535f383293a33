"""Text to token ids and back: characters, bytes, GPT-2's BPE, and a BPE trained on the text at hand.

All four lose nothing: decoding the ids gives the text again. The letters `<|endoftext|>` in a text are encoded as
letters, unless the caller asks for the end-of-text id.
"""

import threading
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from tightfit.data.meta import Meta, TokenizerInfo
from tightfit.errors import DataError
from tightfit.wording import say

if TYPE_CHECKING:  # both take long to import
    import tiktoken
    import tokenizers

Uint32 = npt.NDArray[np.uint32]

END_OF_TEXT = "<|endoftext|>"
TOKENIZERS = ("characters", "bytes", "gpt2", "bpe")

# The two files of GPT-2's vocabulary, and the names that tiktoken caches them under: the SHA-1 of each URL.
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_FILES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}

# Pre-tokens of a trained BPE: a word with the one space or sign before it (`.append`, `'t`, `_name`), up to
# three digits, a run of signs, a run of white space up to the one before a word, so that a line break and its
# indentation are one. On Python's standard library at 4,096 ids: 3.74 bytes per token, against 3.61 with
# GPT-2's pattern.
_PATTERN = r"[^\s\p{L}\p{N}]?[\p{L}_]+| [\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"
_SMALLEST_BPE = 257  # the 256 bytes and the end of text


class Tokenizer(Protocol):
    """Interface of a tokenizer for training, sampling and preparation."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""

    @property
    def eot(self) -> int | None:
        """Id of the end of a text; None where the vocabulary has none."""

    def encode(self, text: str, *, allow_eot: bool = False) -> list[int]:
        """Return the ids of the text; with `allow_eot`, `<|endoftext|>` becomes the end-of-text id, as in prompts."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; invalid UTF-8 becomes U+FFFD."""

    def encode_batch(self, texts: Sequence[str]) -> list[Uint32]:
        """Return the ids of each text, `<|endoftext|>` always as letters; other Python threads run meanwhile."""

    def describe(self) -> TokenizerInfo:
        """Return the description from which `load_tokenizer` makes the tokenizer again."""


class Characters:
    """One id per character of a fixed alphabet, as nanoGPT's shakespeare_char."""

    eot = None

    def __init__(self, characters: str) -> None:
        """`characters` in order of id."""
        self.characters = characters
        self._characters = np.array([ord(c) for c in characters], dtype=np.uint32)
        self._ids = np.full(int(self._characters.max(initial=0)) + 2, len(characters), dtype=np.uint32)
        self._ids[self._characters] = np.arange(len(characters), dtype=np.uint32)
        self.vocab_size = len(characters)

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Characters":
        """Make a tokenizer from all characters of the texts, in order of code point."""
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return cls("".join(sorted(alphabet)))

    def encode(self, text: str, *, allow_eot: bool = False) -> list[int]:
        ids: list[int] = self._encode(text).tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._characters[_checked(ids, self.vocab_size)].tobytes().decode("utf-32-le")

    def encode_batch(self, texts: Sequence[str]) -> list[Uint32]:
        return [self._encode(text) for text in texts]

    def describe(self) -> TokenizerInfo:
        return {"kind": "characters", "characters": self.characters}

    def _encode(self, text: str) -> Uint32:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids: Uint32 = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = np.flatnonzero(ids == self.vocab_size)
        if unknown.size:
            at = int(unknown[0])
            raise DataError(
                say("data.tokenizers.no_character", character=text[at], position=at, characters=self.vocab_size)
            )
        return ids


class Bytes:
    """The 256 bytes of UTF-8."""

    vocab_size = 256
    eot = None

    def encode(self, text: str, *, allow_eot: bool = False) -> list[int]:
        return list(_utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        return _checked(ids, 256).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def encode_batch(self, texts: Sequence[str]) -> list[Uint32]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def describe(self) -> TokenizerInfo:
        return {"kind": "bytes"}


class Gpt2:
    """GPT-2's BPE, from tiktoken; the first use downloads its vocabulary."""

    vocab_size = 50_257
    eot = 50_256

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()
        self._threads = threading.local()

    def encode(self, text: str, *, allow_eot: bool = False) -> list[int]:
        if allow_eot:
            return list(self._encoding.encode(text, allowed_special={END_OF_TEXT}))
        return list(self._encoding.encode_ordinary(text))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._encoding.decode(_checked(ids, self.vocab_size).tolist()))

    def encode_batch(self, texts: Sequence[str]) -> list[Uint32]:
        # Equals encode_ordinary without its Python list: 6.0 against 5.0 million tokens per second.
        encoding = self._of_this_thread()
        return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def describe(self) -> TokenizerInfo:
        return {"kind": "gpt2"}

    def _of_this_thread(self) -> "tiktoken.Encoding":
        """Return this thread's copy: with a shared one, two threads take a third more CPU time per token."""
        import tiktoken

        own: tiktoken.Encoding | None = getattr(self._threads, "encoding", None)
        if own is None:
            own = self._threads.encoding = tiktoken.Encoding(
                "gpt2 of one thread",
                pat_str=self._encoding._pat_str,
                mergeable_ranks=self._encoding._mergeable_ranks,
                special_tokens=self._encoding._special_tokens,
            )
        return own


class Bpe:
    """A byte-level BPE trained by `tokenizers`, kept as tokenizer.json beside the tokens."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # the letters <|endoftext|> in a text are letters
        self.vocab_size: int = tokenizer.get_vocab_size()
        eot = tokenizer.token_to_id(END_OF_TEXT)
        assert eot is not None  # `train` adds it, `load` checks for it
        self.eot = eot

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Bpe":
        """Train a vocabulary of at most `vocab_size`; the same texts in the same order give the same one."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab_size < _SMALLEST_BPE:
            raise DataError(say("data.tokenizers.small_vocabulary", size=vocab_size, least=_SMALLEST_BPE))
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> "Bpe":
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(say("data.tokenizers.unreadable", path=path, reason=error.strerror)) from None
        except Exception as error:  # tokenizers raises nothing narrower for a broken file
            raise DataError(say("data.tokenizers.broken", path=path, reason=str(error))) from None
        if tokenizer.token_to_id(END_OF_TEXT) is None:
            raise DataError(say("data.tokenizers.no_end", path=path, end=END_OF_TEXT))
        return cls(tokenizer)

    def to_json(self) -> str:
        return str(self._tokenizer.to_str())

    def encode(self, text: str, *, allow_eot: bool = False) -> list[int]:
        _utf8(text)
        parts = text.split(END_OF_TEXT) if allow_eot else [text]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(parts)]
        return [*ids[0], *(i for part in ids[1:] for i in (self.eot, *part))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False))

    def encode_batch(self, texts: Sequence[str]) -> list[Uint32]:
        # encode_batch_fast frees the interpreter and uses all cores by itself; encode does neither.
        return [np.array(e.ids, dtype=np.uint32) for e in self._tokenizer.encode_batch_fast(list(texts))]

    def describe(self) -> TokenizerInfo:
        return {"kind": "bpe", "file": "tokenizer.json"}


def load_tokenizer(meta: Meta | None, folder: str | Path) -> Tokenizer:
    """Return the tokenizer that made a dataset; GPT-2's where the folder names none, as nanoGPT does."""
    description: TokenizerInfo = (meta.tokenizer if meta else None) or {"kind": "gpt2"}
    kind = description.get("kind")
    if kind == "characters" and isinstance(description.get("characters"), str):
        return Characters(description["characters"])
    if kind == "bytes":
        return Bytes()
    if kind == "gpt2":
        return Gpt2()
    if kind == "bpe":
        return Bpe.load(Path(folder) / "tokenizer.json")
    kind, known = str(kind)[:40], ", ".join(TOKENIZERS)
    raise DataError(say("data.tokenizers.unknown_kind", folder=folder, kind=kind, known=known))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(say("data.tokenizers.half_pair", position=error.start)) from None


def _checked(ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int64]:
    array = np.asarray(ids, dtype=np.int64)
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        bad = array.max() if array.max() >= vocab_size else array.min()
        raise DataError(say("data.tokenizers.no_id", id=bad, most=vocab_size - 1))
    return array


@cache
def _gpt2_encoding() -> "tiktoken.Encoding":
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, a refused download, or one with a wrong hash
        reason, (vocabulary, encoder) = type(error).__name__, _GPT2_FILES.values()
        raise DataError(
            say("data.tokenizers.no_gpt2", reason=reason, url=_GPT2_URL, vocabulary=vocabulary, encoder=encoder)
        ) from None
