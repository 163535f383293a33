"""Mistaken commands and hostile files: each ends with exit code 2 and one sentence, or with 0, and executes nothing."""

import json
import os
import pickle
import random
import re
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from forked import Forked
from runs import TINY, arguments, here

from tightfit.cli.main import commands, main

Trials = Iterator[str | None]
MOST_S, MOST_BYTES = 30.0, 2**30
"""Seconds and bytes that a command may take, the bytes beyond those with which it begins."""
_NUMBERS = ("", "-1", "0", "1e309", "nan", "9" * 40, "12 GB", "12GiB", "None", "[1, 2]", "yes")
_TEXTS = ("RTX 9090", "a\u202eb", "\x1b[2J", "日本語", "x" * 5000, "--", "=", "a=b=c", "__import__('os')")
_PLACES = ("/", "/proc", "/dev/null", ".", "..", "~")
_VALUES = (*_NUMBERS, *_TEXTS, *_PLACES)
_SCRIPTS = ("dryrun", "check")
"""Commands that would run a file as a script, whose own errors are not tightfit's."""


def _run(words: list[str], folder: Path) -> tuple[int | None, str, str, int]:
    """Run a command; return its exit code (None if it goes on), its output, its errors and its most bytes."""
    out, err = folder / "output.txt", folder / "errors.txt"
    for path in (out, err):
        path.write_bytes(b"")

    def begin() -> int:
        torch.set_num_threads(1)
        os.chdir(folder / "here")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        return main(words)

    running = Forked(begin, out, err)
    try:
        code: int | None = running.wait(MOST_S)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGKILL)
        running.wait()
        code = None
    return code, out.read_text(errors="replace"), err.read_text(errors="replace"), running.peak_bytes


def _problem(words: list[str], found: tuple[int | None, str, str, int], own_bytes: int) -> str | None:
    code, out, err, peak = found
    told = [line for line in err.splitlines() if line.startswith("tightfit: ")]
    if code is None and re.search(r"\(\d+ s\)$", err, re.M):
        return None  # it works at what was asked for, and shows how far it is
    if code is None:
        return f"{words}: it went on for {MOST_S:.0f} s"
    if "Traceback" in out + err or code not in (0, 1, 2) or (code == 2 and len(told) != 1):
        return f"{words}: exit code {code}: {err[-1500:]}"
    if peak - own_bytes > MOST_BYTES:
        return f"{words}: {peak - own_bytes} bytes"
    return None


def mistakes(folder: Path, draw: random.Random) -> Trials:
    """Give commands random names and values for their options, and files that are not what they ask for."""
    (folder / "here").mkdir()
    binary = folder / "binary.bin"
    binary.write_bytes(draw.randbytes(5000))
    empty = folder / "empty.txt"
    empty.touch()
    files = [str(binary), str(empty), str(folder), str(folder / "absent")]
    names = {each: _options(each) for each in commands()}
    while True:
        command = draw.choice(sorted(names))
        words = [command, *(["--once"] if command == "watch" else [])]
        for _ in range(draw.randrange(1, 4)):
            kind = draw.random()
            value = draw.choice([*_VALUES, *files]) if command not in _SCRIPTS else draw.choice(_VALUES)
            if kind < 0.6:
                words.append(f"{draw.choice(names[command])}={value}")
            elif kind < 0.75:
                words += [draw.choice(names[command]), value]
            elif kind < 0.85:
                words.append(f"--{''.join(draw.choices('abcdefg_-', k=draw.randrange(1, 9)))}={value}")
            else:
                words.append(value)
        yield _problem(words, _run(words, folder), 0 if command == "train" else MOST_BYTES)


def _options(command: str) -> list[str]:
    """Return the options that a command's help names, and a key of its configuration."""
    found = re.findall(r"(?<![\w-])--[a-z][a-z_-]*", here([command, "--help"]).out)
    return [*dict.fromkeys(found), "--batch_size"]


class _Hostile:
    """Its unpickling makes a folder."""

    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.planted),)


def hostile_files(folder: Path, draw: random.Random) -> Trials:
    """Read files that would execute something, or claim or unpack to more than there is."""
    (folder / "here").mkdir()
    planted, place = folder / "planted", folder / "file"
    good = folder / "good"
    assert here(arguments(good, folder / "data", max_iters=2, eval_interval=1, fit="off", compile=False)).code == 0
    own_bytes = _run(["gpus"], folder)[3]
    makers = [_pickle, _pickle, _checkpoint, _checkpoint, _safetensors, _parquet, _tokenizer]
    while True:
        place.mkdir(exist_ok=True)
        words = draw.choice(makers)(place, good, planted, draw)
        found = _run(words, folder)
        yield "something was executed" if planted.exists() else _problem(words, found, own_bytes)
        subprocess.run(["rm", "-rf", str(place), str(planted)], check=True)


def _bytes_of(planted: Path, draw: random.Random) -> bytes:
    """Return a pickle that executes, claims 2**40 bytes, nests or multiplies itself."""
    protocol = draw.randrange(6)
    many = b"\x80\x04]" + b"(" * draw.choice([10, 10**6]) + b"t" * draw.choice([10, 10**6]) + b"."
    doubled = b"\x80\x04]\x94" + b"h\x00h\x00\x86\x94" * 40 + b"."
    return draw.choice(
        [
            pickle.dumps(_Hostile(planted), protocol),
            pickle.dumps({"segments": [_Hostile(planted)], "device_traces": []}, protocol),
            pickle.dumps({"stoi": _Hostile(planted), "vocab_size": 2}, protocol),
            b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x",
            b"\x80\x02\x8b" + struct.pack("<i", 2**30),
            b"\x80\x02K\x00r\xff\xff\xff\x7f.",
            pickle.dumps({(number, -number) * 1000: None for number in range(1000)}, protocol),
            many,
            doubled,
            draw.randbytes(500),
        ]
    )


def _pickle(place: Path, good: Path, planted: Path, draw: random.Random) -> list[str]:
    content = _bytes_of(planted, draw)
    if draw.random() < 0.5:
        (place / "snapshot.pickle").write_bytes(content)
        return ["explain", str(place / "snapshot.pickle")]
    for name in ("train.bin", "val.bin"):
        (place / name).write_bytes(bytes(4000))
    (place / "meta.pkl").write_bytes(content)
    keys = {**TINY, "dataset": place.name, "data_dir": place.parent, "out_dir": place / "out", "max_iters": 1}
    return ["train", *(f"--{key}={value}" for key, value in keys.items()), "--fit=off", "--compile=False"]


def _checkpoint(place: Path, good: Path, planted: Path, draw: random.Random) -> list[str]:
    path = place / "ckpt.pt"
    content = torch.load(good / "ckpt.pt", weights_only=True)
    kind = draw.randrange(5)
    if kind == 0:
        path.write_bytes(_bytes_of(planted, draw))
    elif kind == 1:
        torch.save(content | {"config": _Hostile(planted)}, path, _use_new_zipfile_serialization=draw.random() < 0.5)
    elif kind == 2:
        torch.save(content | {"model_args": content["model_args"] | {"n_layer": 2**40, "n_embd": 2**36}}, path)
    elif kind == 3:
        huge = torch.empty(1).as_strided((2**20, 2**16), (0, 0))
        torch.save(content | {"model": dict.fromkeys(content["model"], huge)}, path)
    else:
        torch.save({name: draw.choice([None, [], {}, "x", -1, float("nan")]) for name in content}, path)
    resumed = arguments(place, good.parent / "data", init_from="resume", fit="off", compile=False)
    return draw.choice([["sample", f"--out_dir={place}"], resumed, ["convert", str(path), str(place / "hf")]])


def _safetensors(place: Path, good: Path, planted: Path, draw: random.Random) -> list[str]:
    folder = place / "hf"
    assert here(["convert", good / "ckpt.pt", folder]).code == 0
    path = next(folder.glob("*.safetensors"))
    whole = bytearray(path.read_bytes())
    kind = draw.randrange(4)
    if kind == 0:
        whole[:8] = struct.pack("<Q", draw.choice([2**62, 10**8, len(whole)]))
    elif kind == 1:
        whole[8 + draw.randrange(200)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        header = ("[" * 10**5).encode()
        whole = bytearray(struct.pack("<Q", len(header)) + header)
    else:
        header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        whole = bytearray(struct.pack("<Q", len(header)) + header + bytes(64))
    path.write_bytes(whole)
    return ["convert", str(folder), str(place / "back.pt")]


def _parquet(place: Path, good: Path, planted: Path, draw: random.Random) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    path = place / "text.parquet"
    text = ["x" * 1000] * draw.choice([10, 300_000])  # compressed to almost nothing
    parquet.write_table(pyarrow.table({"text": text}), path, compression="zstd")
    if draw.random() < 0.7:
        whole = bytearray(path.read_bytes())
        for _ in range(draw.randrange(1, 5)):
            whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(whole[: draw.choice([len(whole), len(whole) // 2])])
    return ["prepare", "made", f"--input={path}", f"--data_dir={place}", "--tokenizer=bytes"]


def _tokenizer(place: Path, good: Path, planted: Path, draw: random.Random) -> list[str]:
    for name in ("train.bin", "val.bin"):
        (place / name).write_bytes(bytes(4000))
    nested: object = "x"
    for _ in range(draw.choice([1, 500])):
        nested = [nested]
    tokenizer = draw.choice(
        [
            {"kind": "characters", "characters": "a" * 10**7},
            {"kind": "bpe", "tokenizer": nested},
            {"kind": "bpe", "json": "{" * 10**6},
            {"kind": "x", "module": "os"},
            {"kind": "characters", "characters": nested},
        ]
    )
    meta = {"vocab_size": draw.choice([2**62, -1, 64, "64"]), "tokenizer": tokenizer, "train_tokens": 2000}
    (place / "meta.json").write_text(json.dumps({**meta, "val_tokens": 2000}))
    keys = {**TINY, "dataset": place.name, "data_dir": place.parent, "out_dir": place / "out", "max_iters": 1}
    return ["train", *(f"--{key}={value}" for key, value in keys.items()), "--fit=off", "--compile=False"]
