"""Datasets: tokenizers, token files, meta files from strangers, preparation with crashes and full disks."""

import contextlib
import http.server
import json
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightfit.data import TokenFile, load_tokenizer, open_dataset, prepare, read_meta
from tightfit.data import text as text_module
from tightfit.data.meta import MAX_META_BYTES, Meta
from tightfit.data.tokenizers import Bpe, Bytes, Characters, Gpt2, Tokenizer
from tightfit.data.workfolder import WORK_FOLDER
from tightfit.errors import DataError, DoesNotFit

SHARED = Path(__file__).parents[2] / "shared"
SHAKESPEARE = SHARED / "data" / "tinyshakespeare.txt"
GPT2_CACHE = SHARED / "tiktoken-cache"

needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no {SHAKESPEARE}")
needs_gpt2 = pytest.mark.skipif(not GPT2_CACHE.exists(), reason=f"no {GPT2_CACHE} with GPT-2's vocabulary")


@pytest.fixture(autouse=True)
def _gpt2_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))


def words(count: int, seed: int = 0) -> str:
    """Text with words, numbers, signs, indentation and characters beyond ASCII."""
    draw = random.Random(seed)
    bits = [
        "return",
        "self.x",
        " = ",
        "\n    ",
        "\n\n",
        "héllo",
        "日本語",
        "1234",
        "🙂",
        "don't",
        "  ",
        "()",
        ", ",
    ]
    return "".join(draw.choice(bits) + draw.choice(" \n  ") for _ in range(count))


def random_unicode(count: int, seed: int) -> str:
    draw = random.Random(seed)
    points = (
        draw.choice([draw.randrange(128), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])
        for _ in range(count)
    )
    return "".join(map(chr, points))


def read_ids(path: Path, dtype: str = "<u2") -> list[int]:
    return np.fromfile(path, dtype=dtype).tolist()


def write_dataset(folder: Path, train: list[int], val: list[int], **meta: Any) -> Path:
    folder.mkdir(parents=True)
    dtype = meta.get("dtype", "uint16")
    np.array(train, dtype=dtype).tofile(folder / "train.bin")
    np.array(val, dtype=dtype).tofile(folder / "val.bin")
    if meta:
        known = Meta(**{"train_tokens": len(train), "val_tokens": len(val), **meta})
        (folder / "meta.json").write_text(known.to_json())
    return folder


# Tokenizers


def every_tokenizer(alphabet: str) -> list[Tokenizer]:
    made: list[Tokenizer] = [Characters.of([alphabet]), Bytes(), Bpe.train([words(2000)], 600)]
    return [*made, Gpt2()] if GPT2_CACHE.exists() else made


@pytest.mark.parametrize("seed", range(5))
def test_every_tokenizer_gives_the_text_again(seed: int) -> None:
    text = random_unicode(500, seed) + words(50, seed) + "a<|endoftext|>b"
    for tokenizer in every_tokenizer(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
        assert tokenizer.eot not in ids
        assert [array.tolist() for array in tokenizer.encode_batch([text, "", text[:3]])] == [
            ids,
            [],
            tokenizer.encode(text[:3]),
        ]


def test_end_of_text_in_a_prompt_is_an_id_only_where_allowed() -> None:
    for tokenizer in every_tokenizer("ab<|endoftext|>"):
        if tokenizer.eot is not None:
            ids = tokenizer.encode("a<|endoftext|>b<|endoftext|>", allow_eot=True)
            assert ids == [*tokenizer.encode("a"), tokenizer.eot, *tokenizer.encode("b"), tokenizer.eot]
            assert tokenizer.decode(ids) == "a<|endoftext|>b<|endoftext|>"


def test_an_unknown_character_is_named_with_its_position() -> None:
    with pytest.raises(DataError, match=r"'é' at position 3 is not among the 4 "):
        Characters("abc ").encode("ab é")


def test_ids_beyond_the_vocabulary_and_broken_utf8_when_decoding() -> None:
    assert Bytes().decode([104, 255, 105]) == "h\ufffdi"
    for tokenizer in every_tokenizer("ab"):
        with pytest.raises(DataError, match=rf"the id {tokenizer.vocab_size} is not of this tokenizer"):
            tokenizer.decode([0, tokenizer.vocab_size])


@needs_gpt2
def test_gpt2_without_its_vocabulary_says_which_files_go_where(tmp_path: Path) -> None:
    """The real tiktoken, in a process whose proxy refuses, as on a machine without a network."""
    code = "from tightfit.data.tokenizers import Gpt2\ntry: Gpt2()\nexcept Exception as e: print(type(e).__name__, e)"
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    ).stdout
    assert said.startswith("DataError GPT-2's vocabulary could not be downloaded")
    assert "encodings/main/vocab.bpe under the name 6d1cbeee0f20b3d9449abfede4726ed8212e3aee" in said
    assert "encodings/main/encoder.json under the name 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6" in said
    assert "TIKTOKEN_CACHE_DIR" in said


def test_unknown_and_broken_tokenizers_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="kind 'rot13'; this tightfit knows characters, bytes, gpt2, bpe"):
        load_tokenizer(Meta(vocab_size=2, tokenizer={"kind": "rot13"}), tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match="is not a tokenizer"):
        load_tokenizer(Meta(vocab_size=2, tokenizer={"kind": "bpe"}), tmp_path)


# Cutting long text


@pytest.mark.parametrize("make", [lambda: Bpe.train([words(2000)], 600), pytest.param(Gpt2, marks=needs_gpt2)])
def test_cut_text_has_the_ids_of_the_whole(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "CHUNK", 61)
    tokenizer = make()
    for seed in range(20):
        text = words(150, seed).replace("日本語", "...\x1c\u2003x!!")
        pieces = [piece for piece, _, _ in text_module.cut(text_module.in_chunks(text, 0))]
        assert len(pieces) > 10
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_text_without_a_place_to_cut_is_cut_all_the_same() -> None:
    text = "日" * (3 * text_module.CHUNK + 5)
    pieces = list(text_module.cut(text_module.in_chunks(text, 7)))
    assert [len(piece) for piece, _, _ in pieces] == [text_module.CHUNK] * 3 + [5]
    assert [last for _, _, last in pieces] == [False, False, False, True]


# meta files


def nanogpt_pickle(folder: Path, content: Any, protocol: int = 4) -> None:
    (folder / "meta.pkl").write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("protocol", range(6))
def test_nanogpts_meta_is_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    alphabet = "\n !é日🙂"
    itos = dict(enumerate(alphabet))
    nanogpt_pickle(tmp_path, {"vocab_size": 6, "itos": itos, "stoi": {c: i for i, c in itos.items()}}, protocol)
    meta = read_meta(tmp_path)
    assert meta is not None
    assert (meta.vocab_size, meta.dtype) == (6, "uint16")
    assert load_tokenizer(meta, tmp_path).decode([5, 3, 0]) == "🙂é\n"


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_meta_pkl_that_would_run_code_runs_nothing(tmp_path: Path, protocol: int) -> None:
    nanogpt_pickle(tmp_path, {"vocab_size": _Runs(tmp_path / "ran")}, protocol)
    with pytest.raises(DataError, match=r"meta\.pkl: it asks for posix\.system, and a vocabulary needs no code"):
        read_meta(tmp_path)
    assert not (tmp_path / "ran").exists()


HOSTILE = {
    "empty": b"",
    "not a pickle": b"hello",
    "cut short": pickle.dumps({"vocab_size": 3, "itos": {0: "a"}})[:-8],
    "outside object": b"\x80\x02U\x01aQ.",
    "outside object, protocol 0": b"Pname\n.",
    "a global by extension code": b"\x80\x02\x82\x01.",
    "a class": b"(ios\nsystem\n.",
    "memo of 2**32 entries": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "memo by text": b"K\x01p99999999999999\n.",
    "text of 2**62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "bytearray of 2**40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.",
    "integer of 2**31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "integer of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "dicts without end": b"\x80\x02" + b"}" * 1_000_000 + b".",
    "deep nesting": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "stack underflow": b"\x80\x02s.",
    "a list": pickle.dumps([1, 2]),
    "no vocab_size": pickle.dumps({"itos": {}, "stoi": {}}),
    "vocab_size a text": pickle.dumps({"vocab_size": "65"}),
    "vocab_size true": pickle.dumps({"vocab_size": True}),
    "sizes differ": pickle.dumps({"vocab_size": 2, "itos": {0: "a"}, "stoi": {"a": 0}}),
    "tables disagree": pickle.dumps({"vocab_size": 1, "itos": {0: "a"}, "stoi": {"b": 0}}),
    "a word as character": pickle.dumps({"vocab_size": 1, "itos": {0: "ab"}, "stoi": {"ab": 0}}),
    "too large": b"\x80\x02" + b" " * MAX_META_BYTES,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_meta_pkl_is_one_error_in_little_memory(tmp_path: Path, name: str) -> None:
    import tracemalloc

    (tmp_path / "meta.pkl").write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"meta\.pkl: .*; prepare the dataset again, or remove the file$") as caught:
            read_meta(tmp_path)
        assert "\n" not in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_META_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": 9}', "not of format 1"),
        ('{"format": 1}', "no vocab_size"),
        ('{"format": 1, "vocab_size": 5, "dtype": "float32"}', "uint16, uint32, got 'float32'"),
        ('{"format": 1, "vocab_size": -5}', "vocab_size must be between"),
        ('{"format": 1, "vocab_size": 5, "train_tokens": "many"}', "train_tokens must be a whole number"),
    ],
)
def test_a_malformed_meta_json_is_one_error(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DataError, match=says):
        read_meta(tmp_path)


def test_meta_json_is_preferred_and_a_bare_folder_has_none(tmp_path: Path) -> None:
    assert read_meta(tmp_path) is None
    (tmp_path / "meta.pkl").write_bytes(b"broken")
    meta = Meta(vocab_size=300, tokenizer={"kind": "bytes"}, train_tokens=5, val_tokens=1, seed=7)
    (tmp_path / "meta.json").write_text(meta.to_json())
    assert read_meta(tmp_path) == meta


# Token files


def test_a_token_file_opens_maps_and_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    file = TokenFile.open(path)
    assert len(file) == 1000
    assert file.array()[-1] == 999
    file.validate(block_size=999, vocab_size=1000)
    with pytest.raises(DataError, match=r"holds the id 999, but vocab_size=999 .* set vocab_size=1000 or more"):
        file.validate(vocab_size=999)
    monkeypatch.setattr(TokenFile, "array", lambda self: pytest.fail("scanned again"))
    assert file.largest_id() == 999
    monkeypatch.undo()
    np.full(1000, 5, dtype="<u2").tofile(path)
    os.utime(path, ns=(1, 1))
    assert file.largest_id() == 5


def test_token_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    for content, says in (
        (None, "cannot be opened"),
        (b"", "is empty"),
        (b"123", "has 3 bytes, not a multiple of the 2"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=says):
            TokenFile.open(path)
    path.write_bytes(b"1234")
    with pytest.raises(DataError, match="has 2 tokens; block_size=2 needs more"):
        TokenFile.open(path).validate(block_size=2)


def test_a_dataset_that_is_cut_short_or_of_another_format(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", list(range(100)), [1, 2, 3], vocab_size=100)
    assert open_dataset("a", tmp_path).vocab_size == 100
    assert open_dataset(folder).train.tokens == 100
    os.truncate(folder / "train.bin", 150)
    with pytest.raises(DataError, match=r"has 75 tokens but meta\.json says 100, so it is cut short"):
        open_dataset("a", tmp_path)
    os.truncate(folder / "train.bin", 149)
    with pytest.raises(DataError, match="has 149 bytes, not a multiple of the 2"):
        open_dataset("a", tmp_path)

    folder = write_dataset(tmp_path / "b", list(range(100)), [1, 2, 3], vocab_size=70_000, dtype="uint32")
    assert open_dataset("b", tmp_path).train.array().dtype == np.dtype("<u4")
    np.arange(100, dtype="<u2").tofile(folder / "train.bin")
    with pytest.raises(DataError, match=r"200 bytes, which is 100 tokens as uint16, but meta\.json says uint32"):
        open_dataset("b", tmp_path)

    write_dataset(tmp_path / "c", [1], [1])
    np.arange(5000, dtype="<u4").tofile(tmp_path / "c" / "train.bin")
    with pytest.raises(DataError, match="looks like uint32 ids read as uint16"):
        open_dataset("c", tmp_path).train.validate(block_size=8)


def test_a_missing_dataset_names_the_command_and_the_nearest(tmp_path: Path) -> None:
    place = re.escape(f"--data_dir={tmp_path}") + "$"
    with pytest.raises(DataError, match=rf"there is no dataset 'owt' in .*: tightfit prepare owt --input PATH {place}"):
        open_dataset("owt", tmp_path)
    folder = write_dataset(tmp_path / "shakespeare_char", [1], [1])
    with pytest.raises(DataError, match=r"did you mean shakespeare_char\? .*: tightfit prepare shakespear_char"):
        open_dataset("shakespear_char", tmp_path)
    (folder / "val.bin").unlink()
    with pytest.raises(DataError, match=rf"has no val\.bin; make it with: tightfit prepare shakespeare_char {place}"):
        open_dataset("shakespeare_char", tmp_path)


# Preparation: Shakespeare as nanoGPT does it


@needs_shakespeare
def test_shakespeare_char_is_byte_for_byte_nanogpts(tmp_path: Path) -> None:
    result = prepare("shakespeare_char", input=SHAKESPEARE, data_dir=tmp_path)
    text = SHAKESPEARE.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    expected = np.array([ids[c] for c in text], dtype=np.uint16)
    middle = int(len(text) * 0.9)
    assert (result.folder / "train.bin").read_bytes() == expected[:middle].tobytes()
    assert (result.folder / "val.bin").read_bytes() == expected[middle:].tobytes()
    assert (result.train_tokens, result.val_tokens, result.vocab_size) == (1_003_854, 111_540, 65)
    content = pickle.loads((result.folder / "meta.pkl").read_bytes())
    assert content == {"vocab_size": 65, "itos": {i: c for c, i in ids.items()}, "stoi": ids}

    dataset = open_dataset("shakespeare_char", tmp_path)
    dataset.validate(block_size=256)
    assert load_tokenizer(dataset.meta, dataset.folder).decode(dataset.train.array()[:14]) == "First Citizen:"
    (result.folder / "meta.json").unlink()
    assert open_dataset("shakespeare_char", tmp_path).vocab_size == 65


@needs_shakespeare
@needs_gpt2
def test_shakespeare_is_byte_for_byte_nanogpts(tmp_path: Path) -> None:
    import tiktoken

    result = prepare("shakespeare", input=SHAKESPEARE, data_dir=tmp_path)
    text = SHAKESPEARE.read_text()
    middle = int(len(text) * 0.9)
    for split, part in (("train", text[:middle]), ("val", text[middle:])):
        expected = np.array(tiktoken.get_encoding("gpt2").encode_ordinary(part), dtype=np.uint16)
        assert (result.folder / f"{split}.bin").read_bytes() == expected.tobytes()
    assert (result.train_tokens, result.val_tokens, result.dtype) == (301_966, 36_059, "uint16")
    assert sorted(os.listdir(result.folder)) == ["meta.json", "train.bin", "val.bin"]


def test_shakespeare_is_downloaded_kept_and_without_a_network_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"to be or not to be")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr("tightfit.data.recipes.SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        first = prepare("shakespeare_char", data_dir=tmp_path)
        server.shutdown()
        thread.join()
    assert (first.folder / "input.txt").read_text() == "to be or not to be"
    assert prepare("shakespeare_char", data_dir=tmp_path).train_tokens == 16  # from the kept file

    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.undo()
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(
        DataError, match=r"https://raw\.githubusercontent\.com.*input\.txt could not be downloaded"
    ) as caught:
        prepare("shakespeare", data_dir=tmp_path)
    assert f"put it at {tmp_path / 'shakespeare' / 'input.txt'}, or name a copy with --input" in str(caught.value)


# Preparation: documents


def test_rows_become_documents_ended_by_the_end_of_text(tmp_path: Path) -> None:
    rows = [words(20, seed) for seed in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in rows) + "\n\n")
    result = prepare(tmp_path / "rows.jsonl", data_dir=tmp_path, tokenizer="bpe", vocab_size=300, field="body")
    assert (result.name, result.documents, result.vocab_size) == ("rows", 60, 300)
    dataset = open_dataset("rows", tmp_path)
    tokenizer = load_tokenizer(dataset.meta, dataset.folder)
    sides = [tokenizer.decode(file.array()).split("<|endoftext|>") for file in (dataset.train, dataset.val)]
    assert [side.pop() for side in sides] == ["", ""]
    assert sorted(sides[0] + sides[1]) == sorted(rows)
    assert [row for row in rows if row in sides[0]] == sides[0]  # in order
    assert 1 <= len(sides[1]) <= 20


def test_parquet_rows_are_documents_as_jsonl_rows_are(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [f"row {i} " * (i % 5) for i in range(700)]
    for folder in ("j", "p"):
        (tmp_path / folder).mkdir()
    (tmp_path / "j" / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "p" / "a.parquet")
    results = [prepare(name, input=tmp_path / name, data_dir=tmp_path / "d", tokenizer="bytes") for name in ("j", "p")]
    for result in results:
        assert result.documents == 700
        assert result.train_tokens + result.val_tokens == sum(len(row) + 1 for row in rows)
    with pytest.raises(DataError, match="has no column 'body', only 'text'; name one with --field"):
        prepare(tmp_path / "p" / "a.parquet", data_dir=tmp_path, tokenizer="bytes", field="body")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"x" * 50)
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read as Parquet"):
        prepare(tmp_path / "bad.parquet", data_dir=tmp_path, tokenizer="bytes")


def test_a_folder_holds_out_whole_files_and_counts_what_it_skips(tmp_path: Path) -> None:
    source = tmp_path / "code"
    for i in range(40):
        (source / f"m{i % 3}").mkdir(parents=True, exist_ok=True)
        (source / f"m{i % 3}" / f"f{i}.py").write_text(f"# file {i:02}\n" + "x = 1\n" * 30)
    (source / "image.png").write_bytes(b"\x89PNG\xff")
    (source / ".git").mkdir()
    (source / ".git" / "config.txt").write_text("secret")
    result = prepare(source, data_dir=tmp_path / "d", tokenizer="characters", val_fraction=0.2)
    dataset = open_dataset("code", tmp_path / "d")
    assert dataset.meta is not None
    assert (dataset.meta.source["files"], dataset.meta.source["skipped"]) == (40, 1)
    assert dataset.val.tokens == 8 * (len("# file 00\n" + "x = 1\n" * 30) + 1)
    other = prepare(source, data_dir=tmp_path / "e", tokenizer="characters", val_fraction=0.2, seed=1)
    assert (other.folder / "val.bin").read_bytes() != (result.folder / "val.bin").read_bytes()


@pytest.mark.parametrize("sizes", [(40, 6000, 6000), (6000, 6000), (4000,) * 3])
def test_few_files_are_divided_so_that_validation_gets_its_share(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    source = tmp_path / "few"
    source.mkdir()
    texts = [f"{number}" * size for number, size in enumerate(sizes)]
    for number, text in enumerate(texts):
        (source / f"{number}.txt").write_text(text)
    result = prepare(source, data_dir=tmp_path / "d", tokenizer="characters", block_size=1000)
    assert result.val_tokens == pytest.approx(0.1 * sum(sizes), rel=0.02)
    dataset = open_dataset("few", tmp_path / "d")
    tokenizer = load_tokenizer(dataset.meta, dataset.folder)
    train, val = (tokenizer.decode(file.array()).replace("\n", "") for file in (dataset.train, dataset.val))
    assert Counter(train + val) == Counter("".join(texts)), "every character is in one of the splits"
    with pytest.raises(DataError, match=r"holds no sequence of block_size=5,000; give more text"):
        prepare(source, data_dir=tmp_path / "e", tokenizer="characters", block_size=5000)


@pytest.mark.slow
def test_the_standard_library_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    result = prepare("stdlib", data_dir=tmp_path)
    assert (result.vocab_size, result.tokenizer) == (1024, "bpe")
    assert result.documents > 400
    assert 0.04 < result.val_tokens / (result.train_tokens + result.val_tokens) < 0.07
    dataset = open_dataset("stdlib", tmp_path)
    dataset.validate(block_size=1024)
    tokenizer = load_tokenizer(dataset.meta, dataset.folder)
    documents = tokenizer.decode(dataset.val.array()).split("<|endoftext|>")
    compile(documents[1], "held out", "exec")


class _FakeHub(types.ModuleType):
    """What prepare uses of `datasets`, which this machine has neither the package nor the network for."""

    def load_dataset(self, name: str, *, split: str, num_proc: int) -> "_FakeHub":
        assert (name, split) == ("Skylion007/openwebtext", "train")
        return self

    def train_test_split(self, *, test_size: float, seed: int, shuffle: bool) -> dict[str, list[dict[str, str]]]:
        assert (test_size, seed, shuffle) == (0.0005, 2357, True)
        return {
            "train": [{"text": "hello world"}, {"text": ""}, {"text": "again"}],
            "test": [{"text": "held out"}],
        }


@needs_gpt2
def test_openwebtext_takes_nanogpts_split_and_appends_the_end_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets package; install it: pip install 'tightfit\[data\]'"):
        prepare("openwebtext", data_dir=tmp_path)
    hub = _FakeHub("datasets")
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(sys.modules["tightfit.data.preparation"], "require_space", lambda *_, **__: None)
    result = prepare("openwebtext", data_dir=tmp_path)
    eot = 50_256
    assert read_ids(result.folder / "train.bin") == [
        *Gpt2().encode("hello world"),
        eot,
        eot,
        *Gpt2().encode("again"),
        eot,
    ]
    assert read_ids(result.folder / "val.bin") == [*Gpt2().encode("held out"), eot]

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"could not be loaded .*Couldn't reach the Hub.* --input"):
        prepare("openwebtext", data_dir=tmp_path)


def test_a_vocabulary_above_65536_is_written_as_uint32(tmp_path: Path) -> None:
    alphabet = "".join(chr(i) for i in range(0x20, 0x11000) if not 0xD800 <= i < 0xE000)
    (tmp_path / "all.txt").write_text(alphabet * 2, encoding="utf-8", newline="")
    result = prepare(tmp_path / "all.txt", data_dir=tmp_path, tokenizer="characters")
    assert (result.dtype, result.vocab_size) == ("uint32", len(alphabet))
    assert read_ids(result.folder / "train.bin", "<u4")[:3] == [0, 1, 2]
    open_dataset("all", tmp_path).validate(block_size=8)


# Preparation: input that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", r"a: the text gives 0 training and 0 validation tokens"),
        ("a.txt", b"fine \xff bad", r"a\.txt is not UTF-8 at byte 5 \(0xff\).*--errors=replace"),
        ("a.txt", b"x" * 300_000 + "é".encode()[:1], r"a\.txt is not UTF-8 at byte 300,000 \(0xc3\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1\n', r"a\.jsonl:2: not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "y"}\n',
            r"a\.jsonl:3: no text under 'text', its keys are 'body'.*--field",
        ),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl:2: no text under 'text', because the line is not a JSON"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: no text under 'text'"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1: not usable JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\\ud800"}',
            r"a\.jsonl:2: character 0 is half of a surrogate pair",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl is not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n', r"one document, and a split by documents needs two"),
        ("a.jsonl", b"", r"gives 0 training and 0 validation"),
    ],
)
def test_unusable_input_is_one_error_and_leaves_nothing(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        prepare(tmp_path / name, data_dir=tmp_path / "data", tokenizer="bytes")
    assert os.listdir(tmp_path / "data") == []


def test_errors_replace_puts_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine \xff bad")
    result = prepare(tmp_path / "a.txt", data_dir=tmp_path, tokenizer="bytes", errors="replace", val_fraction=0.5)
    assert (
        Bytes().decode(read_ids(result.folder / "train.bin") + read_ids(result.folder / "val.bin")) == "fine \ufffd bad"
    )


def test_names_paths_and_options_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder stdlb, .* did you mean stdlib\? Else give a text"):
        prepare("stdlb", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"no file or folder nowhere/x\.txt, nor is it one of the names"):
        prepare("nowhere/x.txt", data_dir=tmp_path)
    with pytest.raises(DataError, match="tokenizer must be one of characters, bytes, gpt2, bpe, got 'word'"):
        prepare("stdlib", data_dir=tmp_path, tokenizer="word")
    with pytest.raises(DataError, match=r"val_fraction must be between 0 and 1, got 1\.5"):
        prepare("stdlib", data_dir=tmp_path, val_fraction=1.5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.bin").write_bytes(b"1")
    with pytest.raises(DataError, match=r"has no text, \.jsonl or \.parquet file among its 1 files"):
        prepare(tmp_path / "empty", data_dir=tmp_path)
    (tmp_path / "a.txt").write_text("abc def " * 9)
    with pytest.raises(DataError, match="vocab_size=100 is too small: a byte-level BPE needs 257"):
        prepare(tmp_path / "a.txt", data_dir=tmp_path, tokenizer="bpe", vocab_size=100)


def test_a_dataset_that_another_process_prepares_is_left_to_it(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "a.txt").write_text("abc def " * 9)
    (tmp_path / "a").mkdir()
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing"):
            prepare(tmp_path / "a.txt", data_dir=tmp_path, tokenizer="bytes")
    finally:
        os.close(descriptor)


# Preparation: crashes and full disks

SLOW = """
import sys, time, tightfit.data.workfolder
from tightfit.data import prepare
module = sys.modules["tightfit.data.preparation"]
module.SHARD_CHARACTERS, module.COMMIT_SECONDS = 20_000, 0.0
def progress(done, total, tokens):
    print(done, flush=True)
    time.sleep(float(sys.argv[3]))
options = {"tokenizer": "bpe", "vocab_size": 400, "progress": progress}
result = prepare("job", input=sys.argv[1], data_dir=sys.argv[2], **options)
print("resumed" if result.resumed else "fresh", result.documents)
"""


def slow_command(source: Path, data_dir: Path, pause: float) -> list[str]:
    return [sys.executable, "-c", SLOW, str(source), str(data_dir), str(pause)]


def run_prepare(source: Path, data_dir: Path, pause: float, kill_after: int | None = None) -> str:
    """prepare in its own process, which gets a SIGKILL after so many shards."""
    with subprocess.Popen(slow_command(source, data_dir, pause), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if len(lines) == kill_after:
                process.send_signal(signal.SIGKILL)
        assert process.wait() == (-signal.SIGKILL if kill_after else 0)
    assert lines[-1][:1].isdigit() == bool(kill_after), "it ended before it was killed"
    return lines[-1].strip()


def write_rows(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps({"text": words(300, seed)}) + "\n" for seed in range(count)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_killed_preparation_continues_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": words(300, i)}) + "\n" for i in range(300)))
    assert run_prepare(tmp_path / "rows.jsonl", tmp_path / "unbroken", 0) == "fresh 300"
    for kill_after in (3, 9):
        run_prepare(tmp_path / "rows.jsonl", tmp_path / "broken", 0.05, kill_after)
        with pytest.raises(DataError, match="continue its unfinished preparation with: tightfit prepare job"):
            open_dataset("job", tmp_path / "broken")
    with (tmp_path / "broken" / "job" / WORK_FOLDER / "train.bin").open("ab") as file:
        file.write(b"written, but not in the journal")
    assert run_prepare(tmp_path / "rows.jsonl", tmp_path / "broken", 0) == "resumed 300"
    assert contents(tmp_path / "broken" / "job") == contents(tmp_path / "unbroken" / "job")
    assert not (tmp_path / "broken" / "job" / WORK_FOLDER).exists()


def test_an_error_of_the_moment_does_not_cost_what_is_done(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 150)
    run_prepare(tmp_path / "a.jsonl", tmp_path / "d", 0.05, kill_after=5)
    vocabulary = tmp_path / "d" / "job" / WORK_FOLDER / "tokenizer.json"
    content = vocabulary.read_bytes()
    vocabulary.write_text("unreadable for now")
    failed = subprocess.run(slow_command(tmp_path / "a.jsonl", tmp_path / "d", 0), capture_output=True, text=True)
    assert "DataError" in failed.stderr
    vocabulary.write_bytes(content)
    assert run_prepare(tmp_path / "a.jsonl", tmp_path / "d", 0) == "resumed 150"


def test_an_unfinished_preparation_of_other_text_is_not_continued(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 150)
    run_prepare(tmp_path / "a.jsonl", tmp_path / "d", 0.05, kill_after=5)
    write_rows(tmp_path / "a.jsonl", 100)
    assert run_prepare(tmp_path / "a.jsonl", tmp_path / "d", 0) == "fresh 100"


@pytest.mark.parametrize("renamed", range(5))
def test_a_crash_between_the_renames_is_seen_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    """The old dataset has a meta.pkl and no tokenizer.json, the new one the other way round."""
    source = tmp_path / "job.txt"
    source.write_text(words(3000))
    old = prepare(source, data_dir=tmp_path, tokenizer="characters")
    expected = prepare(source, data_dir=tmp_path / "other", tokenizer="bpe", vocab_size=300)

    class Crash(Exception):
        pass

    replace, done = Path.replace, 0

    def crash(self: Path, target: Path) -> Path:
        nonlocal done
        if self.parent.name == WORK_FOLDER and Path(target).parent == old.folder:
            if done == renamed:
                raise Crash
            done += 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with contextlib.suppress(Crash):
        prepare(source, data_dir=tmp_path, tokenizer="bpe", vocab_size=300)
    monkeypatch.undo()
    if renamed < 4:
        with pytest.raises(DataError, match="interrupted while it put its files in place"):
            open_dataset("job", tmp_path)
        # Any next preparation completes the last one first, even one that then fails.
        source.write_bytes(b"\xff")
        with pytest.raises(DataError, match="not UTF-8"):
            prepare(source, data_dir=tmp_path, tokenizer="bytes")
    assert contents(old.folder) == contents(expected.folder)
    open_dataset("job", tmp_path).validate(block_size=8)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder_is_scanned_without_a_cache(small_disk: Path) -> None:
    np.arange(10, dtype="<u2").tofile(small_disk / "train.bin")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    TokenFile.open(small_disk / "train.bin").validate(vocab_size=10)
    assert os.listdir(small_disk) == ["train.bin"]
    with pytest.raises(DataError, match=r"may not be written \(Read-only file system\); choose another --data_dir"):
        prepare("stdlib", data_dir=small_disk, tokenizer="bytes")


def test_a_full_disk_is_one_error_and_the_dataset_stays(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "job.txt").write_text(words(3000))
    before = contents(prepare(tmp_path / "job.txt", data_dir=small_disk, tokenizer="bytes").folder)
    (tmp_path / "job.txt").write_text("x" * 700_000)
    with pytest.raises(DoesNotFit, match=r"need at least 1\.34 MiB but the disk of .* has .* free; make room"):
        prepare(tmp_path / "job.txt", data_dir=small_disk, tokenizer="bytes")
    assert contents(small_disk / "job") == before
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": "x" * 9000}) + "\n") * 120)
    arguments: dict[str, Any] = {
        "input": tmp_path / "rows.jsonl",
        "data_dir": small_disk,
        "tokenizer": "bytes",
        "overwrite": True,
    }
    with pytest.raises(DoesNotFit, match=r"no room to write in .*untouched\. Make room and run the same command"):
        prepare("job", **arguments)
    assert contents(small_disk / "job") == before
    open_dataset("job", small_disk).validate(block_size=8)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert prepare("job", **arguments).documents == 120


def test_a_file_size_limit_is_one_error_too(tmp_path: Path) -> None:
    (tmp_path / "job.txt").write_text("x" * 300_000)
    code = (
        "import resource, sys; from tightfit.data import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: prepare(sys.argv[1], data_dir=sys.argv[2], tokenizer='bytes')\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "job.txt"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert said.startswith("DoesNotFit no room to write in")
    assert "File too large" in said


def test_progress_counts_up_to_the_whole_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tightfit.data.preparation"], "SHARD_CHARACTERS", 50_000)
    (tmp_path / "a.txt").write_text("one two\n" * 100_000)
    seen: list[tuple[int, int | None, int]] = []
    started = time.monotonic()
    result = prepare(
        tmp_path / "a.txt",
        data_dir=tmp_path,
        tokenizer="bytes",
        workers=2,
        progress=lambda *now: seen.append(now),
    )
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] == (800_000, 800_000, 800_000)
    assert 0 < result.seconds <= time.monotonic() - started


def test_importing_the_room_imports_no_torch_and_no_tokenizer_library() -> None:
    code = "import sys, tightfit.data; print({'torch', 'tiktoken', 'tokenizers', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("place", ["file.txt", "/proc", "/dev/null", "file.txt/below"])
def test_a_data_dir_that_cannot_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file.txt").write_text("text " * 100)
    folder = tmp_path / place  # an absolute place stays itself
    with pytest.raises(DataError, match=r"may not be written \(.*\); choose another --data_dir"):
        prepare("name", input=tmp_path / "file.txt", data_dir=folder, tokenizer="bytes")


def test_a_dataset_of_another_input_is_replaced_only_when_told(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / f"{name}.txt").write_text(name * 1000)
    given: dict[str, Any] = {"data_dir": tmp_path, "tokenizer": "bytes"}
    first = contents(prepare("data", input=tmp_path / "one.txt", **given).folder)
    with pytest.raises(DataError, match=r"holds a dataset made from .*one\.txt, another input; .* --overwrite"):
        prepare("data", input=tmp_path / "other.txt", **given)
    assert contents(tmp_path / "data") == first
    (tmp_path / "one.txt").write_text("grown" * 2000)
    assert prepare("data", input=tmp_path / "one.txt", **given).train_tokens == 9000
    assert prepare("data", input=tmp_path / "other.txt", **given, overwrite=True).train_tokens == 4500


@pytest.mark.parametrize("form", ["[]", "{}", '{"job": 1}', '{"shards": "x"}', "1", "[" * 5000, '[{"a": 1}]'])
def test_a_journal_of_another_shape(tmp_path: Path, form: str) -> None:
    (tmp_path / "text.txt").write_text("text " * 1000)
    work = tmp_path / "data" / ".prepare"
    work.mkdir(parents=True)
    (work / "journal.json").write_text(form)
    given: dict[str, Any] = {"input": tmp_path / "text.txt", "data_dir": tmp_path, "tokenizer": "bytes"}
    before = contents(prepare("data", **given).folder)
    work.mkdir()
    (work / "publish.json").write_text(form)
    with pytest.raises(DataError, match=r"publish\.json is not what tightfit writes there; delete"):
        prepare("data", **given)
    assert {name: data for name, data in contents(tmp_path / "data").items() if name in before} == before
