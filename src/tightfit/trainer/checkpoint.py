"""Checkpoints: what a run is at a step, written so that no crash loses it and read so that nothing is executed.

A file is nanoGPT's `ckpt.pt` with one entry more. `ckpt.pt` follows nanoGPT's rule (after an evaluation);
`last.pt` is a resume point at any other step. Beside each stands the one before it, `*.prev.pt`. Files are
written aside, synced and renamed; the checksums are those of the zip archive that a torch file is.
"""

import contextlib
import errno
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.errors import CheckpointError, ConfigError, DoesNotFit
from tightfit.models.conversion import check_state, strip_prefix
from tightfit.models.model import GPTConfig
from tightfit.storage import BEST, CHECKPOINTS, LAST, previous, sync_file, writing
from tightfit.trainer.out_of_memory import is_out_of_memory
from tightfit.units import format_bytes

_FORMAT = 1


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRONG_FOLDER = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run between two steps. Everything random in a step follows from seed and step, so no generator is in it."""

    model_config: GPTConfig
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None
    """As AdamW's state_dict; None if the file has none."""
    step: int
    """Optimizer steps done: the next one is number `step`."""
    best_val_loss: float
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration, as plain values."""
    scaler: Mapping[str, Any] | None = None
    evaluated: bool = False
    """Whether the evaluation due at this step has been made."""
    path: Path | None = None


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """A full disk becomes DoesNotFit; a folder that cannot be made or written, ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise DoesNotFit(f"the disk of {folder} is full; free space, or set another --out_dir") from None
        if error.errno in _WRONG_FOLDER:
            raise ConfigError(f"out_dir={folder} cannot be written ({error.strerror}); set another") from None
        raise


def save(folder: Path, checkpoint: Checkpoint, *, name: str = BEST) -> None:
    """Write `name` in `folder` atomically, keeping the one before it; DoesNotFit if the disk is full.

    Whatever happens here, the last good checkpoint stays.
    """
    content = {
        "model": dict(checkpoint.model),
        "optimizer": checkpoint.optimizer,
        "model_args": checkpoint.model_config.as_nanogpt(),
        "iter_num": checkpoint.step,
        "best_val_loss": checkpoint.best_val_loss,
        "config": dict(checkpoint.config),
        "tightfit": {"format": _FORMAT, "scaler": checkpoint.scaler, "evaluated": checkpoint.evaluated},
    }
    path = folder / name
    try:
        with writing(path, durable=True) as part:
            with part.open("wb") as file:
                torch.save(content, file)
            sync_file(part)  # before the one before it is given up
            if path.exists():
                _replace_link(path, folder / previous(name))
    except (OSError, RuntimeError) as error:
        _raise_for_full_disk(error, path, content)
        raise
    if name == BEST:  # the resume points are older now
        for stale in (LAST, previous(LAST)):
            (folder / stale).unlink(missing_ok=True)


def load_newest(folder: Path, *, say: Callable[[str], object]) -> Checkpoint:
    """The checkpoint of the latest step that is whole; `say` is told of every one that is not.

    CheckpointError if there is none.
    """
    found, broken = [], []
    for name in CHECKPOINTS:
        if not (folder / name).is_file():
            continue
        try:
            found.append(load(folder / name))
        except CheckpointError as error:
            broken.append(str(error))
    if not found:
        why = "; ".join(broken) or f"there is no {BEST} in it"
        raise CheckpointError(f"{folder} holds no checkpoint to resume: {why}; start anew with --init_from=scratch")
    newest = max(found, key=lambda checkpoint: checkpoint.step)
    for problem in broken:
        say(f"{problem}; using {newest.path} of step {newest.step} instead")
    return newest


def load_best(folder: Path, *, say: Callable[[str], object]) -> Checkpoint:
    """`ckpt.pt`, which holds the best model where `always_save_checkpoint` is off; else the newest that is whole."""
    if not any((folder / name).is_file() for name in CHECKPOINTS):
        raise CheckpointError(f"there is no checkpoint in {folder}; train a model there, or name another --out_dir")
    try:
        return load(folder / BEST)
    except CheckpointError:
        return load_newest(folder, say=say)


def load(path: Path) -> Checkpoint:
    """A checkpoint of tightfit or nanoGPT on the CPU, its tensors mapped from the file until they are used.

    CheckpointError if it is missing, cut, altered, would run code, or is no GPT's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint such as out/{BEST}")
    found = path.stat()
    zipped = _is_checked_archive(path, found.st_size, found.st_mtime_ns)
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols other than torch's
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error).upper():
            raise CheckpointError(
                f"{path} holds more than weights and plain values, and reading it could run code; "
                "it was not read. Get it again from a source you trust, as a plain state or safetensors"
            ) from None
        raise CheckpointError(_damaged(path)) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, OSError, MemoryError) as error:
        if is_out_of_memory(error):  # says nothing of the file, and the checkpoint before it would repeat steps
            raise
        raise CheckpointError(_damaged(path)) from None
    return _checked(path, content)


def restore_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy weights into the model's own tensors, one at a time."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _checked(path: Path, content: object) -> Checkpoint:
    needed = {"model": Mapping, "model_args": Mapping, "iter_num": int}
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary")
    for key, kind in needed.items():
        if not isinstance(content.get(key), kind):
            raise CheckpointError(f"{path} is no checkpoint of nanoGPT or tightfit: it has no {key!r}")
    if not 0 <= content["iter_num"] < 2**63:
        raise CheckpointError(f"{path} cannot be used: its iter_num is negative or beyond 2**63")
    config = GPTConfig.from_nanogpt(content["model_args"])
    own = content.get("tightfit")
    own = own if isinstance(own, Mapping) else {}
    if own.get("format", _FORMAT) != _FORMAT:
        raise CheckpointError(f"{path} has format {own['format']!r}, and this version reads {_FORMAT}; update tightfit")
    weights = strip_prefix(content["model"])
    try:
        check_state(config, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    stored = content.get("config")
    optimizer, scaler = content.get("optimizer"), own.get("scaler")
    return Checkpoint(
        model_config=config,
        model=weights,
        optimizer=optimizer if isinstance(optimizer, Mapping) else None,
        step=content["iter_num"],
        best_val_loss=_best_val_loss(path, content),
        config=stored if isinstance(stored, Mapping) else {},
        scaler=scaler if isinstance(scaler, Mapping) else None,
        evaluated=bool(own.get("evaluated", False)),
        path=path,
    )


def _best_val_loss(path: Path, content: Mapping[str, Any]) -> float:
    """nanoGPT stores a tensor without axes."""
    value = content.get("best_val_loss", math.inf)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, float) and not (isinstance(value, int) and abs(value) < 2**63):
        raise CheckpointError(f"{path} cannot be used: its best_val_loss is no number but a {type(value).__name__}")
    return float(value)


@cache
def _is_checked_archive(path: Path, size: int, changed_ns: int) -> bool:
    """False for another format; in an archive every record is stored plainly, inside the file and with its checksum.

    Once for a file while its size and time of change are these: gigabytes take seconds, and a plan reads them first.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(f"{path} is compressed, which torch never does; it was not read")
            if archive.testzip() is not None:
                raise CheckpointError(_damaged(path))
    except (zipfile.BadZipFile, OSError, EOFError, ValueError):
        raise CheckpointError(_damaged(path)) from None
    return True


def _damaged(path: Path) -> str:
    size = path.stat().st_size if path.exists() else 0
    return f"{path} ({format_bytes(size)}) is cut or damaged"


def _replace_link(source: Path, target: Path) -> None:
    """`target` becomes the file that `source` is, with no moment without either."""
    aside = target.with_name(f".{target.name}.linking")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:  # a file system without hard links: the moment without `source` is covered by `target`
        os.replace(source, target)
        return
    os.replace(aside, target)


def _raise_for_full_disk(error: Exception, path: Path, content: Mapping[str, Any]) -> None:
    """torch reports a failed write as a RuntimeError whose cause or context is the OSError."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            break
    else:
        return
    needed = sum(t.numel() * t.element_size() for t in _tensors(content))
    raise DoesNotFit(
        f"{path} could not be written: it takes {format_bytes(needed)} and the disk is full; the last good "
        "checkpoint is kept. Free space, or set another --out_dir"
    ) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
