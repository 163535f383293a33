"""A tiny dataset, a tiny model and runs of it, in this process or in one of their own; no fixtures here."""

import contextlib
import io
import json
import os
import signal
import string
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tightfit.cli.main import main
from tightfit.data.meta import Meta

CHARACTERS = string.ascii_letters + string.digits + " \n"
VOCAB = len(CHARACTERS)
TINY = {
    "dataset": "tiny",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_iters": 12,
    "eval_interval": 100,
    "eval_iters": 2,
    "warmup_iters": 2,
    "lr_decay_iters": 12,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "device": "cpu",
    "dtype": "float32",
}
"""Keys of every run here, unless a test says otherwise."""
TIMES = ("ms", "tokens_per_s", "memory_bytes", "memory_peak_bytes")
"""What differs between two runs that are the same."""


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


def make_dataset(folder: Path, *, train: int = 4000, val: int = 600, seed: int = 0) -> Path:
    """Text that a tiny model learns in part: each character follows from the one before, but one in four."""
    draw = np.random.default_rng(seed)
    successor = draw.permutation(VOCAB)
    ids = [0]
    for surprise in draw.integers(0, 4, size=train + val - 1):
        ids.append(int(draw.integers(VOCAB)) if surprise == 0 else int(successor[ids[-1]]))
    folder.mkdir(parents=True)
    np.array(ids[:train], dtype="<u2").tofile(folder / "train.bin")
    np.array(ids[train:], dtype="<u2").tofile(folder / "val.bin")
    meta = Meta(
        vocab_size=VOCAB,
        tokenizer={"kind": "characters", "characters": CHARACTERS},
        train_tokens=train,
        val_tokens=val,
    )
    (folder / "meta.json").write_text(meta.to_json())
    return folder


def arguments(out_dir: Path, data_dir: Path, **keys: Any) -> list[str]:
    """`train` and the options of a tiny run."""
    chosen = {**TINY, "out_dir": out_dir, "data_dir": data_dir, **keys}
    return ["train", *(f"--{key}={value}" for key, value in chosen.items())]


def here(words: Iterable[object]) -> Done:
    """The command in this process, through the function that the real one calls."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(words: Iterable[object]) -> list[str]:
    return [sys.executable, "-m", "tightfit", *map(str, words)]


def process(words: Iterable[object], *, cwd: Path | None = None, timeout: float = 60) -> Done:
    """The command in a process of its own, to its end."""
    ended = subprocess.run(
        command(words), env=environment(), cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Done(ended.returncode, ended.stdout, ended.stderr)


def rows(out_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured in time or memory."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


LOSSES = ("loss", "grad_norm", "train_loss", "val_loss")


def column(out_dir: Path, name: str) -> dict[int, float]:
    """One quantity by step; fails if a step has it twice."""
    found = [(row["step"], row[name]) for row in rows(out_dir) if name in row and "event" not in row]
    assert len(dict(found)) == len(found), f"{name} doubled: {[step for step, _ in found]}"
    return dict(found)


def assert_close(one: Path, other: Path) -> None:
    """Two runs have the same losses and norms, up to the order of sums."""
    for name in LOSSES:
        expected = column(one, name)
        assert expected
        assert column(other, name) == pytest.approx(expected, rel=1e-5), name


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Weights and AdamW's moments of a checkpoint, by name."""
    content = torch.load(path, weights_only=True)
    found = dict(content["model"])
    for number, state in content["optimizer"]["state"].items():
        found |= {f"{key} of parameter {number}": value for key, value in state.items()}
    return found


def newest(out_dir: Path) -> Path:
    """The checkpoint of the latest step, as torch reads it."""
    found = [out_dir / name for name in ("ckpt.pt", "last.pt") if (out_dir / name).exists()]
    return max(found, key=lambda path: torch.load(path, weights_only=True)["iter_num"])


def assert_same_end(one: Path, other: Path) -> None:
    """Both runs ended at the same step with the same bits, and logged the same numbers for the same steps."""
    first, second = (tensors(newest(folder)) for folder in (one, other))
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, {different[0]} among them"
    assert rows(one) == rows(other)


def torchrun(processes: int, program: list[str]) -> "subprocess.Popen[str]":
    """In a process group of its own, as a shell would start it."""
    return _started(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *program])


def ranks(processes: int, program: list[str]) -> "subprocess.Popen[str]":
    """The same processes without torchrun, which loads torch in each of them and in its own."""
    return _started([str(Path(__file__).parent / "ranks.py"), str(processes), *program])


def _started(words: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(running: "subprocess.Popen[str]") -> Done:
    """Wait for a run of several processes; one that hangs is killed with all of them."""
    try:
        out, err = running.communicate(timeout=150)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
    return Done(running.returncode, out, err)
