"""Files of safetensors that a script saved in this run, read again without data."""

import os
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from tightfit.vgpu.assign import assign

Path = str | os.PathLike[str]

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Names of dtypes in the format, by those of torch."""


class Checkpoints(Protocol):
    """The part of the run's checkpoints that is needed here."""

    def save(self, content: object, file: Path, /) -> None: ...
    def is_stand_in(self, file: Path) -> bool: ...
    def load(self, file: Path, /, map_location: object = None) -> object: ...


def install(checkpoints: Checkpoints) -> None:
    """Keep the tensors that the script saves in this format, and answer its readers; nothing without the package."""
    try:
        import safetensors
        import safetensors.torch as for_torch
    except ImportError:
        return
    kept: dict[str, dict[str, str]] = {}
    usual_load: Callable[..., dict[str, Tensor]] = for_torch.load_file
    usual_open: Callable[..., object] = safetensors.safe_open

    def save_file(tensors: dict[str, Tensor], filename: Path, metadata: dict[str, str] | None = None) -> None:
        kept[os.path.realpath(filename)] = metadata or {}
        checkpoints.save(tensors, filename)

    def load_file(filename: Path, device: object = "cpu", **options: object) -> object:
        if not checkpoints.is_stand_in(filename):
            return usual_load(filename, device=device, **options)
        return checkpoints.load(filename, _where(device))

    def safe_open(filename: Path, framework: str = "pt", device: object = "cpu", **options: object) -> object:
        if not checkpoints.is_stand_in(filename):
            return usual_open(filename, framework, device=device, **options)
        tensors = checkpoints.load(filename, _where(device))
        assert isinstance(tensors, dict)
        return _Opened(tensors, kept.get(os.path.realpath(filename), {}))

    assign(for_torch, save_file=save_file, load_file=load_file)
    assign(safetensors, for_torch, safe_open=safe_open)


def _where(device: object) -> str:
    """Return a device as `torch.load` takes it; a number is that of a card."""
    return f"cuda:{device}" if isinstance(device, int) else str(device)


class _Opened:
    """Answers for an open file as `safetensors.safe_open` does."""

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self._tensors, self._metadata = tensors, metadata

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def keys(self) -> list[str]:
        return list(self._tensors)

    offset_keys = keys

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> "_Slice":
        return _Slice(self._tensors[name])


class _Slice:
    """Answers for one tensor of an open file, of which a script reads a part."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        name = str(self._tensor.dtype).removeprefix("torch.")
        return _DTYPES.get(name, name.upper())

    def __getitem__(self, key: object) -> Tensor:
        return self._tensor[key]  # type: ignore[index]
