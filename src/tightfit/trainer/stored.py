"""Load a folder's newest or best checkpoint, be it one file or a folder of parts."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from tightfit.errors import CheckpointError
from tightfit.storage import BEST, CHECKPOINTS, DAMAGED, MARKER, delete_checkpoint, folder_of
from tightfit.trainer.checkpoint import Checkpoint, load_file
from tightfit.wording import say


def load(path: Path) -> Checkpoint:
    """Load a checkpoint, its tensors when they are used. CheckpointError as `load_file` raises it."""
    if path.is_dir():
        from tightfit.trainer.parts import load_parts  # DCP takes a second to import

        return load_parts(path)
    return load_file(path)


def load_newest(folder: Path, *, log: Callable[[str], object]) -> Checkpoint:
    """Load the undamaged checkpoint of the latest step and log each damaged one; CheckpointError if there is none."""
    newest, reason = _newest(folder, log)
    if newest is None:
        reason = reason or say("trainer.checkpoint.not_there", name=BEST)
        raise CheckpointError(say("trainer.checkpoint.nothing_to_resume", folder=folder, reason=reason))
    return newest


def _newest(folder: Path, log: Callable[[str], object]) -> tuple[Checkpoint | None, str]:
    """Return the undamaged checkpoint of the latest step, if any, and the faults of the others."""
    found, broken = [], []
    for path in _checkpoints(folder, CHECKPOINTS):
        try:
            found.append(load(path))
        except CheckpointError as error:
            broken.append(str(error))
    newest = max(found, key=lambda checkpoint: checkpoint.step, default=None)
    if newest is not None:
        for problem in broken:
            log(say("trainer.checkpoint.using_another", problem=problem, path=newest.path, step=newest.step))
    return newest, "; ".join(broken)


def rename_damaged(folder: Path, *, log: Callable[[str], object]) -> None:
    """Rename damaged checkpoints, so that no save takes one for the last good state and deletes the good one before."""
    for path in _checkpoints(folder, CHECKPOINTS):
        try:
            load(path)
        except CheckpointError:
            kept = path.with_name(path.name + DAMAGED)
            with contextlib.suppress(OSError):
                delete_checkpoint(kept)  # of an earlier resume
                path.rename(kept)
                log(say("trainer.checkpoint.renamed", path=path, name=kept.name))


def load_best(folder: Path, *, log: Callable[[str], object]) -> Checkpoint:
    """Load `ckpt.pt`, the best model where `always_save_checkpoint` is off; if it is damaged, the newest undamaged."""
    if not has_checkpoint(folder):
        raise CheckpointError(say("trainer.checkpoint.none_in_folder", folder=folder))
    try:
        best = [load(path) for path in _checkpoints(folder, (BEST,))]
    except CheckpointError:
        best = []
    if best:
        return max(best, key=lambda saved: saved.step)
    newest, reason = _newest(folder, log)
    if newest is None:
        raise CheckpointError(say("trainer.checkpoint.all_damaged", folder=folder, reason=reason))
    return newest


def has_checkpoint(folder: Path) -> bool:
    """Return True if the folder holds a checkpoint, whether damaged or not."""
    return bool(_checkpoints(folder, CHECKPOINTS))


def _checkpoints(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the files and folders that stand for these checkpoints."""
    found: list[Path] = []
    for name in names:
        if (folder / name).is_file():
            found.append(folder / name)
        places = (folder / folder_of(name), folder / f".{folder_of(name)}.writing")
        # A save that was killed before its last rename has its marker, and waits under the other name.
        complete = [place for place in places if (place / MARKER).is_file()]
        found += complete or [place for place in places[:1] if place.is_dir()]
    return found
