"""Save a run at a step so that no crash loses it, and load it without executing anything.

A file is nanoGPT's `ckpt.pt` with one more entry, "tightfit". `ckpt.pt` follows nanoGPT's rule (after an evaluation);
`last.pt` is a resume point at any other step. Each has its predecessor as `*.prev.pt`. Files are written
under another name, synced and renamed. A torch file is a zip archive, and that holds the checksums.
"""

import contextlib
import errno
import math
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tightfit.errors import CannotSave, CheckpointError, ConfigError, DoesNotFit
from tightfit.foreign import DAMAGE, reads_in_bounds
from tightfit.models.conversion import check_state, strip_prefix
from tightfit.models.model import GPTConfig
from tightfit.storage import (
    BEST,
    CHECKPOINTS,
    DAMAGED,
    LAST,
    METRICS,
    PREVIOUS,
    folder_of,
    make_room,
    owner_of,
    owning,
    previous,
    sync_file,
    writing,
)
from tightfit.trainer.out_of_memory import error_chain, is_out_of_memory
from tightfit.units import MIB
from tightfit.wording import say

_FORMAT = 1
_MOST_PICKLE_BYTES = 32 * MIB
"""Size of the pickle in a checkpoint, without its numbers; GPT-2 XL's with AdamW's state is 0.6 MiB."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run between two steps. Seed and step decide everything random in a step, so no generator's state is saved."""

    model_config: GPTConfig
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, object] | None
    """AdamW's state_dict; None if the file has none. `models.optimizer` checks each entry when it restores it."""
    step: int
    """Optimizer steps done: the next one is number `step`."""
    best_val_loss: float
    config: Mapping[str, object] = field(default_factory=dict)
    """The run's configuration as plain values; those of a file are not checked."""
    scaler: Mapping[str, object] | None = None
    evaluated: bool = False
    """True if the evaluation due at this step has been made."""
    data: Mapping[str, object] = field(default_factory=dict)
    """Digests of the token files, by split; those of a file are not checked."""
    path: Path | None = None


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make the folder and hold it, so that no other run writes there; ConfigError if one does or it cannot be made."""
    with contextlib.ExitStack() as held:
        with folder_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(owning(folder))
            except BlockingIOError:
                owner = owner_of(folder)
                by = say("trainer.checkpoint.taken_by", owner=owner) if owner else ""
                raise ConfigError(say("trainer.checkpoint.taken", folder=folder, by=by)) from None
        yield


def check_folder(folder: Path) -> None:
    """Raise ConfigError if another run writes to the folder, or none can; one that is not there yet is not kept."""
    if folder.is_dir():
        with own_folder(folder):
            return
    with folder_errors(folder):
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True)
        for each in made:
            each.rmdir()


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Raise DoesNotFit for a full disk, ConfigError for a folder that cannot be made, read or written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise DoesNotFit(say("trainer.checkpoint.full_disk", folder=folder)) from None
        reason = error.strerror or error
        raise ConfigError(say("trainer.checkpoint.wrong_folder", folder=folder, reason=reason)) from None


def set_aside(folder: Path, *, log: Callable[[str], object]) -> None:
    """Move the files of an earlier run into `previous/` in `folder`, in place of the files there.

    A run that ended before it saved anything replaces nothing. The next run finishes a move that was cut short.
    """
    before, moving = folder / PREVIOUS, folder / f".{PREVIOUS}.moving"
    unfinished = [f".{folder_of(name)}.writing" for name in CHECKPOINTS]
    checkpoints = (*CHECKPOINTS, *map(folder_of, CHECKPOINTS), *unfinished)
    left = [folder / name for name in (*checkpoints, METRICS) if (folder / name).exists()]
    left += folder.glob(f"*{DAMAGED}")
    if any(path.name in checkpoints for path in left):
        moving.mkdir(exist_ok=True)
        for path in left:
            path.replace(moving / path.name)
    if moving.exists():
        shutil.rmtree(before, ignore_errors=True)
        moving.rename(before)
        log(say("trainer.checkpoint.set_aside", folder=folder, previous=before))


def save(folder: Path, checkpoint: Checkpoint, *, name: str = BEST, is_last: bool = False) -> None:
    """Write `name` in `folder` atomically and keep the one before it.

    DoesNotFit if the disk is full, CannotSave for any other error of the disk. Whatever happens here, the last good
    checkpoint stays. The one before it is given up if that makes enough room, or if this save `is_last`.
    """
    content = {
        "model": dict(checkpoint.model),
        "optimizer": checkpoint.optimizer,
        "model_args": checkpoint.model_config.as_nanogpt(),
        "iter_num": checkpoint.step,
        "best_val_loss": checkpoint.best_val_loss,
        "config": dict(checkpoint.config),
        "tightfit": {
            "format": _FORMAT,
            "scaler": checkpoint.scaler,
            "evaluated": checkpoint.evaluated,
            "data": dict(checkpoint.data),
        },
    }
    size = _tensor_bytes(content.values())
    try:
        _write(folder / name, content, size)
    except DoesNotFit:
        if not make_room(folder, _predecessors(folder), size, anyway=is_last):
            raise
        _write(folder / name, content, size)
    if name == BEST:  # the resume points are older now
        for stale in (LAST, previous(LAST)):
            with contextlib.suppress(OSError):  # a resume takes the latest step
                (folder / stale).unlink(missing_ok=True)
            shutil.rmtree(folder / folder_of(stale), ignore_errors=True)
    if (folder / previous(name)).is_file():  # two newer ones than those of a run of several processes
        for stale in (name, previous(name)):
            shutil.rmtree(folder / folder_of(stale), ignore_errors=True)


def _write(path: Path, content: Mapping[str, object], size: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have moved it
        with writing(path, durable=True) as part:
            with part.open("wb") as file:
                torch.save(content, file)
            sync_file(part)  # before the one before it is given up
            if path.is_file():
                _replace_link(path, path.with_name(previous(path.name)))
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError and keeps the OSError as its cause or context
        found = [each for each in error_chain(error) if isinstance(each, OSError)]
        if not found or is_out_of_memory(error):
            raise
        if any(each.errno in FULL_DISK for each in found):
            raise DoesNotFit(say("trainer.checkpoint.no_room", path=path, size=size, kept=kept(path))) from None
        reason = found[0].strerror or str(found[0])
        raise CannotSave(say("trainer.checkpoint.not_written", path=path, reason=reason, kept=kept(path))) from None


def kept(path: Path) -> str:
    """Return the words that an earlier checkpoint stays, if one is in the folder of this one."""
    there = (path.parent / place for name in CHECKPOINTS for place in (name, folder_of(name)))
    return say("trainer.checkpoint.kept") if any(map(Path.exists, there)) else ""


def _predecessors(folder: Path) -> list[Path]:
    """Return the predecessors of the checkpoints in a folder."""
    before = [folder / previous(name) for name in (BEST, LAST) if (folder / name).is_file()]
    return [path for path in before if path.is_file()]


def load_file(path: Path) -> Checkpoint:
    """Load a checkpoint of tightfit or nanoGPT on the CPU, its tensors mapped from the file until they are used.

    CheckpointError if it is missing, cut, altered, could run code, or holds something other than a GPT.
    """
    if not path.is_file():
        raise CheckpointError(say("trainer.checkpoint.no_file", path=path, name=BEST))
    found = path.stat()
    zipped = _is_checked_archive(path, found.st_size, found.st_mtime_ns)
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols other than torch's
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return _checked(path, content, found.st_size)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error).upper():
            raise CheckpointError(say("trainer.checkpoint.unsafe", path=path)) from None
        raise CheckpointError(_damaged(path)) from None
    except DAMAGE as error:
        if is_out_of_memory(error):  # the file may be good, and the checkpoint before it would repeat steps
            raise
        raise CheckpointError(_damaged(path)) from None


def refuse_not_finite(saved: Checkpoint) -> None:
    """CheckpointError if a weight is not a finite number."""
    for name, tensor in saved.model.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(say("trainer.checkpoint.not_finite", path=saved.path, name=name))


def restore_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy weights into the model's own tensors, one at a time."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _checked(path: Path, content: object, size: int) -> Checkpoint:
    needed = {"model": Mapping, "model_args": Mapping, "iter_num": int}
    if not isinstance(content, Mapping):
        raise CheckpointError(say("trainer.checkpoint.no_dictionary", path=path, kind=type(content).__name__))
    for key, kind in needed.items():
        if not isinstance(content.get(key), kind):
            raise CheckpointError(say("trainer.checkpoint.lacks_key", path=path, key=key))
    if not 0 <= content["iter_num"] < 2**63:
        raise CheckpointError(say("trainer.checkpoint.wrong_step", path=path))
    _refuse_more_than_stored(path, content.values(), size)
    config = GPTConfig.from_nanogpt(content["model_args"])
    own = content.get("tightfit")
    own = own if isinstance(own, Mapping) else {}
    if own.get("format", _FORMAT) != _FORMAT:
        raise CheckpointError(say("trainer.checkpoint.newer", path=path, found=own["format"], known=_FORMAT))
    weights = strip_prefix(content["model"])
    try:
        check_state(config, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    stored = content.get("config")
    optimizer, scaler, data = content.get("optimizer"), own.get("scaler"), own.get("data")
    return Checkpoint(
        model_config=config,
        model=weights,
        optimizer=optimizer if isinstance(optimizer, Mapping) else None,
        step=content["iter_num"],
        best_val_loss=_best_val_loss(path, content.get("best_val_loss", math.inf)),
        config=stored if isinstance(stored, Mapping) else {},
        scaler=scaler if isinstance(scaler, Mapping) else None,
        evaluated=bool(own.get("evaluated", False)),
        data=data if isinstance(data, Mapping) else {},
        path=path,
    )


def _refuse_more_than_stored(path: Path, values: Iterable[object], size: int) -> None:
    """Refuse tensors that claim more bytes than the file has: views that repeat a few stored numbers."""
    claimed = _tensor_bytes(values)
    if claimed > 4 * size:  # tied weights are stored once, and a vocabulary may be all of a tiny model
        raise CheckpointError(say("trainer.checkpoint.claims", path=path, claimed=claimed, size=size))


def _best_val_loss(path: Path, value: object) -> float:
    """Return the number in `value`, which nanoGPT stores as a tensor without axes."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, float) and not (isinstance(value, int) and abs(value) < 2**63):
        raise CheckpointError(say("trainer.checkpoint.wrong_loss", path=path, kind=type(value).__name__))
    return float(value)


@cache
def _is_checked_archive(path: Path, size: int, changed_ns: int) -> bool:
    """Return True for a zip archive with uncompressed records and correct checksums, False for another format.

    CheckpointError for other archives. The answer is cached by size and time of change: gigabytes take seconds to
    check, and a plan reads them before the run does.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                begins = file.read(_MOST_PICKLE_BYTES)
            if begins.startswith(b"PK\x03\x04"):  # an archive without its end
                raise CheckpointError(_damaged(path))
            _refuse_endless(path, begins, streams=4)  # torch's old format: four pickles, and then the numbers
            return False
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(say("trainer.checkpoint.compressed", path=path))
            if archive.testzip() is not None:
                raise CheckpointError(_damaged(path))
            for record in archive.infolist():
                if record.filename.endswith(".pkl"):
                    _refuse_endless(path, archive.read(record) if record.file_size <= _MOST_PICKLE_BYTES else None)
    except DAMAGE as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(_damaged(path)) from None
    return True


def _refuse_endless(path: Path, pickled: bytes | None, *, streams: int = 1) -> None:
    if pickled is None or not reads_in_bounds(pickled, streams=streams):
        raise CheckpointError(say("trainer.checkpoint.endless", path=path))


def _damaged(path: Path) -> str:
    size = path.stat().st_size if path.exists() else 0
    return say("trainer.checkpoint.damaged", path=path, size=size)


def _replace_link(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`; at each moment at least one of the names exists."""
    aside = target.with_name(f".{target.name}.linking")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:  # a file system without hard links: the moment without `source` is covered by `target`
        os.replace(source, target)
        return
    os.replace(aside, target)


def _tensor_bytes(values: Iterable[object]) -> int:
    """Bytes of the tensors in nested mappings."""
    return sum(
        value.nbytes if isinstance(value, Tensor) else _tensor_bytes(value.values())
        for value in values
        if isinstance(value, (Tensor, Mapping))
    )
