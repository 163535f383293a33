"""Save and load a run's state in a folder, each process its part, with torch.distributed.checkpoint (DCP).

The folder `ckpt.dcp` stands for the file `ckpt.pt`, with the same promises. Processes write their parts beside it,
under another name; the marker `tightfit.json`, with the size and checksum of each part, is written last; then the
folder is renamed. Where a kill falls between two renames, the complete folder under its other name is read. DCP's own
index is a pickle: it is read with a list of the classes that it may name.
"""

import contextlib
import io
import math
import pickle
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tightfit.config.schema import Setting
from tightfit.errors import CannotSave, CheckpointError, DoesNotFit
from tightfit.foreign import DAMAGE, reads_in_bounds
from tightfit.models.conversion import check_state, parameter_shapes
from tightfit.models.model import GPTConfig
from tightfit.models.optimizer import SavedOptimizer
from tightfit.storage import (
    BEST,
    LAST,
    MARKER,
    bytes_of,
    delete_checkpoint,
    folder_of,
    make_room,
    previous,
    sync_folder,
    write_aside,
)
from tightfit.trainer.checkpoint import FULL_DISK, Checkpoint, kept
from tightfit.trainer.distributed import World
from tightfit.trainer.out_of_memory import error_chain, is_out_of_memory
from tightfit.trainer.recovery import exchanging
from tightfit.units import MIB
from tightfit.wording import say

_INDEX = ".metadata"
_FORMAT = 1
_MOST_INDEX_BYTES = 256 * MIB
_CHUNK_BYTES = 8 * MIB
_TIED = "transformer.wte.weight", "lm_head.weight"
_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""Everything that the index of such a folder names."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the folder."""

    size_bytes: int
    crc32: int


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """State of a run other than its tensors, and what its parts must be."""

    format: int
    step: int
    best_val_loss: float | None
    """None: not yet evaluated."""
    evaluated: bool
    model_args: dict[str, Setting]
    config: dict[str, Setting]
    scaler: dict[str, int | float]
    data: dict[str, str]
    param_groups: list[dict[str, bool | int | float | list[int | float] | None]]
    parts: dict[str, Part]
    crc32: int = 0
    """Checksum of the marker itself, with 0 here."""

    def sealed(self) -> "Marker":
        """Return the marker with its checksum."""
        plain = msgspec.structs.replace(self, crc32=0)
        return msgspec.structs.replace(self, crc32=zlib.crc32(msgspec.json.encode(plain)))


def _names(shape: GPTConfig) -> list[str]:
    """Names of the parameters in the optimizer's order: matrices, then vectors (`models.optimizer`)."""
    sizes = {name: size for name, size in parameter_shapes(shape) if name != _TIED[1]}
    return sorted(sizes, key=lambda name: len(sizes[name]) < 2)


def _tensors(content: Checkpoint) -> dict[str, Tensor]:
    """Return all tensors by their names in the folder; a tied weight is there once."""
    found = {f"model.{name}": tensor for name, tensor in content.model.items() if name != _TIED[1]}
    states = (content.optimizer or {}).get("state")
    assert isinstance(states, Mapping), "a run has its optimizer's state"
    for number, name in enumerate(_names(content.model_config)):
        found |= {f"optimizer.state.{name}.{key}": value for key, value in states[number].items()}
    return found


def _marker(content: Checkpoint, parts: dict[str, Part]) -> Marker:
    values = {
        "format": _FORMAT,
        "step": content.step,
        "best_val_loss": None if math.isinf(content.best_val_loss) else content.best_val_loss,
        "evaluated": content.evaluated,
        "model_args": content.model_config.as_nanogpt(),
        "config": content.config,
        "scaler": content.scaler or {},
        "data": content.data,
        "param_groups": (content.optimizer or {}).get("param_groups"),
        "parts": parts,
    }
    return msgspec.convert(values, Marker).sealed()


@dataclass(frozen=True)
class _Failure:
    """An error of one process, as it goes to the others."""

    kind: str
    """disk full, disk, or memory."""
    reason: str


class _Writer(FileSystemWriter):
    """Keeps its error: those that DCP sends to all processes have lost their causes."""

    error: Exception | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError, MemoryError) as error:
            self.error = error
            raise


def save_parts(folder: Path, content: Checkpoint, world: World, *, name: str, is_last: bool) -> None:
    """Write this process's part of a run's state; all processes call this, and end or fail alike.

    DoesNotFit if a disk is full, CannotSave for another error of a disk. The last good checkpoint stays. The one before
    it is given up if that makes enough room, or if this save `is_last`.
    """
    place = folder / folder_of(name)
    try:
        _save(place, content, world)
    except DoesNotFit:
        if not world.from_main(world.is_main and _makes_room(place, anyway=is_last)):
            raise
        _save(place, content, world)
    if world.is_main:
        _remove_older(folder, name)


def _makes_room(place: Path, *, anyway: bool) -> bool:
    """Make room for another checkpoint of the size of `place`; its predecessor is given up only if it is complete."""
    before, is_complete = _before(place), (place / MARKER).is_file()
    predecessors = [before] if is_complete and before.is_dir() else []
    try:
        size = bytes_of(place) if is_complete else 0
    except OSError:
        return False
    return make_room(place.parent, predecessors, size, anyway=anyway)


def _save(place: Path, content: Checkpoint, world: World) -> None:
    with contextlib.ExitStack() as failed:
        if world.is_main:
            failed.callback(delete_checkpoint, _beside(place))
        _write(place, content, world)
        failed.pop_all()


def _write(place: Path, content: Checkpoint, world: World) -> None:
    work, writer = _beside(place), None
    result: dict[str, Part] | _Failure = {}
    try:
        if world.is_main:
            _finish_move(place)
            delete_checkpoint(work)
            work.mkdir(parents=True)
    except OSError as error:
        result = _failure(error)
    _agreed(place, world, result)
    try:
        writer = _Writer(work)
        with _exchanging(), warnings.catch_warnings(action="ignore"):
            save(dict(_tensors(content)), storage_writer=writer, process_group=world.group)
        result = _sums(work, world.rank)
    except (OSError, MemoryError, CheckpointException) as error:
        result = _failure(writer.error if writer and writer.error else error)
    parts, result = _agreed(place, world, result), {}
    try:
        if world.is_main:
            _publish(work, place, _marker(content, parts))
    except OSError as error:
        result = _failure(error)
    _agreed(place, world, result)


def _sums(work: Path, rank: int) -> dict[str, Part]:
    """Return the checksums of this process's files, in the main process also of the index."""
    names = [path.name for path in work.glob(f"__{rank}_*")] + ([_INDEX] if rank == 0 else [])
    return {name: _sum(work / name) for name in names}


def _sum(path: Path) -> Part:
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return Part(size_bytes=size, crc32=crc)


def _failure(error: BaseException) -> _Failure:
    """Describe an error of a disk or of memory; raise any other again."""
    if isinstance(error, CheckpointException):  # of another process, which describes it itself
        inner = next(iter(error.failures.values()))[0]
        return _Failure("disk", str(inner))
    if is_out_of_memory(error):
        return _Failure("memory", str(error))
    of_disk = next((each for each in error_chain(error) if isinstance(each, OSError)), None)
    if of_disk is None:
        raise error
    return _Failure("disk full" if of_disk.errno in FULL_DISK else "disk", of_disk.strerror or str(of_disk))


def _agreed(place: Path, world: World, result: dict[str, Part] | _Failure) -> dict[str, Part]:
    """Return the parts of all processes; raise the gravest error of any in all of them."""
    with _exchanging():
        results = world.all(result)
    failures = {each.kind: each.reason for each in results if isinstance(each, _Failure)}
    if "memory" in failures:
        raise MemoryError(failures["memory"])
    if "disk full" in failures:
        raise DoesNotFit(say("trainer.parts.no_room", path=place, kept=kept(place)))
    if failures:
        raise CannotSave(say("trainer.checkpoint.not_written", path=place, reason=failures["disk"], kept=kept(place)))
    return {name: part for each in results if not isinstance(each, _Failure) for name, part in each.items()}


def _exchanging() -> AbstractContextManager[None]:
    return exchanging(lambda error: say("trainer.parts.exchange_failed", reason=error))


def _publish(work: Path, place: Path, marker: Marker) -> None:
    """Write the marker, and put the folder in the place of the one before, which becomes the predecessor."""
    write_aside(work / MARKER, msgspec.json.encode(marker), durable=True)
    sync_folder(work)
    _move(work, place)


def _move(work: Path, place: Path) -> None:
    if place.exists():
        delete_checkpoint(_before(place))
        place.rename(_before(place))
    work.rename(place)
    sync_folder(place.parent)


def _finish_move(place: Path) -> None:
    """Finish a save that was killed after its marker was written."""
    if (_beside(place) / MARKER).is_file():
        _move(_beside(place), place)


def _before(place: Path) -> Path:
    return place.with_name(folder_of(previous(place.with_suffix(".pt").name)))


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.writing")


def _remove_older(folder: Path, name: str) -> None:
    """Delete resume points that are older than a checkpoint `name`, and files that its two folders replace."""
    if name == BEST:
        for stale in (LAST, previous(LAST)):
            delete_checkpoint(folder / folder_of(stale))
    names = (LAST, previous(LAST)) if name == BEST else ()
    if (folder / folder_of(previous(name))).is_dir():
        names = (*names, name, previous(name))
    for stale in names:
        with contextlib.suppress(OSError):  # a resume takes the latest step
            (folder / stale).unlink(missing_ok=True)


class _Reader(FileSystemReader):
    """Reads single tensors, and the index only once."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self.index

    def whole(self, key: str) -> Tensor:
        """Read one tensor, put together from its parts."""
        about = self.index.state_dict_metadata[key]
        assert isinstance(about, TensorStorageMetadata), "checked when the index was read"
        tensor = torch.empty(about.size, dtype=about.properties.dtype)
        self.fill({key: tensor})
        return tensor

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read into these tensors, of those in shards this process's parts only."""
        try:
            with warnings.catch_warnings(action="ignore"):
                load(dict(tensors), storage_reader=self, no_dist=True)
        except (*DAMAGE, CheckpointException) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(say("trainer.parts.damaged", path=self.path)) from None


class _Stored(Mapping[str, Tensor]):
    """Tensors in a folder, each read when it is asked for."""

    def __init__(self, reader: _Reader, keys: Mapping[str, str]) -> None:
        self.reader, self._keys = reader, keys

    def __getitem__(self, name: str) -> Tensor:
        return self.reader.whole(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def load_parts(path: Path) -> Checkpoint:
    """Read a folder's state; its tensors are read when they are used. CheckpointError if anything is cut or altered."""
    try:
        marker = msgspec.json.decode((path / MARKER).read_bytes(), type=Marker)
        if marker != marker.sealed():
            raise CheckpointError(say("trainer.parts.damaged", path=path))
        if marker.format != _FORMAT:
            found = marker.format
            raise CheckpointError(say("trainer.checkpoint.newer", path=path, found=found, known=_FORMAT))
        shape = GPTConfig.from_nanogpt(marker.model_args)
        stamps = tuple((name, (path / name).stat().st_mtime_ns) for name in marker.parts)
        _check_sums(path, msgspec.json.encode(marker.parts), stamps)
        reader = _Reader(path, _index(path, marker))
        return _checkpoint(path, marker, shape, reader)
    except DAMAGE as error:
        if is_out_of_memory(error):  # the folder may be good, and the one before it would repeat steps
            raise
        raise CheckpointError(say("trainer.parts.damaged", path=path)) from None


@cache
def _check_sums(path: Path, parts: bytes, stamps: tuple[tuple[str, int], ...]) -> None:
    """ValueError unless all parts are as they were written; remembered while none changes (`stamps`)."""
    for name, part in msgspec.json.decode(parts, type=dict[str, Part]).items():
        if Path(name).name != name or _sum(path / name) != part:
            raise ValueError(name)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _index(path: Path, marker: Marker) -> Metadata:
    """Read DCP's index. ValueError if it names other files than the marker, or more bytes than these have."""
    pickled = (path / _INDEX).read_bytes()
    if len(pickled) > _MOST_INDEX_BYTES or not reads_in_bounds(pickled):
        raise ValueError(path)
    index = _Unpickler(io.BytesIO(pickled)).load()
    tensors = index.state_dict_metadata.values()
    if not isinstance(index, Metadata) or not all(isinstance(each, TensorStorageMetadata) for each in tensors):
        raise TypeError(path)
    if not {each.relative_path for each in index.storage_data.values()} <= marker.parts.keys():
        raise ValueError(path)
    claimed = sum(each.size.numel() * each.properties.dtype.itemsize for each in tensors)
    if claimed > sum(part.size_bytes for part in marker.parts.values()):
        raise ValueError(path)
    index.storage_meta = StorageMeta()
    return index


def _checkpoint(path: Path, marker: Marker, shape: GPTConfig, reader: _Reader) -> Checkpoint:
    keys = {name: f"model.{name}" for name in _names(shape)}
    keys[_TIED[1]] = keys[_TIED[0]]
    about = {
        key: torch.empty((), dtype=each.properties.dtype).expand(each.size)  # of its shape, without memory
        for key, each in reader.index.state_dict_metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }
    try:
        check_state(shape, {name: about[key] for name, key in keys.items() if key in about})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    states = {
        number: _Stored(reader, {key: f"optimizer.state.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")})
        for number, name in enumerate(_names(shape))
    }
    return Checkpoint(
        model_config=shape,
        model=_Stored(reader, keys),
        optimizer={"state": states, "param_groups": marker.param_groups},
        step=marker.step,
        best_val_loss=math.inf if marker.best_val_loss is None else marker.best_val_loss,
        config=marker.config,
        scaler=marker.scaler,
        evaluated=marker.evaluated,
        data=marker.data,
        path=path,
    )


def read_parts(saved: Checkpoint, model: Mapping[str, Tensor], optimizer: SavedOptimizer) -> None:
    """Read the saved values into a model and the state of its optimizer; each process reads its own parts."""
    assert isinstance(saved.model, _Stored), "saved by several processes"
    saved.model.reader.fill(_tensors(replace(saved, model=model, optimizer=optimizer)))


def in_memory(saved: Checkpoint) -> Checkpoint:
    """Return the checkpoint with all of its tensors read, each once."""
    model = {name: saved.model[name] for name in saved.model if name != _TIED[1]}
    model[_TIED[1]] = model[_TIED[0]]
    optimizer = dict(saved.optimizer or {})
    states = optimizer.get("state")
    if isinstance(states, Mapping):
        optimizer["state"] = {number: dict(state) for number, state in states.items()}
    return replace(saved, model=model, optimizer=optimizer)
