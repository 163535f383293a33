"""Old names of `torch.cuda` on the virtual GPU: tensor types such as `torch.cuda.FloatTensor`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _device

from tightfit.vgpu.assign import assign
from tightfit.vgpu.pinned import pin

_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Bool": torch.bool,
}


class VirtualType:
    """A legacy tensor type of the device, such as torch.cuda.FloatTensor: makes tensors and knows its own."""

    is_cuda, is_sparse, layout = True, False, torch.strided

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.__name__, self.__module__, self.dtype = f"{name}Tensor", "torch.cuda", dtype

    def __call__(self, *sizes_or_data: object, device: object = "cuda") -> Tensor:
        if len(sizes_or_data) == 1 and not isinstance(sizes_or_data[0], (int, torch.Size)):
            if isinstance(sizes_or_data[0], Tensor):
                return sizes_or_data[0].to("cuda", self.dtype)
            return torch.tensor(sizes_or_data[0], dtype=self.dtype, device="cuda")
        shape = sizes_or_data[0] if sizes_or_data and isinstance(sizes_or_data[0], torch.Size) else sizes_or_data
        empty: Callable[..., Tensor] = torch.empty
        return empty(shape or (0,), dtype=self.dtype, device="cuda")

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.is_cuda and value.dtype == self.dtype

    def __repr__(self) -> str:
        return f"<class 'torch.cuda.{self.__name__}'>"

    def __str__(self) -> str:
        return f"torch.cuda.{self.__name__}"


class VirtualStorageType:
    """A legacy storage type of the device, such as torch.cuda.FloatStorage."""

    def __init__(self, usual: type, dtype: torch.dtype) -> None:
        self.__name__, self.__module__, self.dtype, self._usual = usual.__name__, "torch.cuda", dtype, usual

    def __call__(self, size: int = 0, **_: object) -> torch.TypedStorage:
        storage = torch.empty(size, dtype=self.dtype, device="cuda").untyped_storage()
        return torch.TypedStorage(wrap_storage=storage, dtype=self.dtype, _internal=True)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, torch.TypedStorage) and value.dtype == self.dtype and value.device.type != "cpu"


def install() -> None:
    """Patch this process for good."""
    types = {f"torch.cuda.{name}Tensor": VirtualType(name, dtype) for name, dtype in _DTYPES.items()}
    assign(torch.cuda, **{f"{name}Tensor": types[f"torch.cuda.{name}Tensor"] for name in _DTYPES})
    for name, dtype in {**_DTYPES, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}.items():
        usual = getattr(torch.cuda, f"{name}Storage", None)
        if usual is not None:
            assign(torch.cuda, **{f"{name}Storage": VirtualStorageType(usual, dtype)})
    usual_type: Callable[..., Tensor | str] = torch.Tensor.type

    def type_of(tensor: Tensor, dtype: object = None, non_blocking: bool = False, **options: object) -> Tensor | str:
        """Do as `tensor.type(dtype)`, also for types of the device."""
        wanted = types.get(dtype) if isinstance(dtype, str) else dtype
        if isinstance(wanted, VirtualType):
            return tensor.to("cuda", wanted.dtype, non_blocking=non_blocking)
        if dtype is None:
            return usual_type(tensor)
        if (isinstance(dtype, str) and tensor.is_cuda) or isinstance(dtype, type):
            name = str(dtype) if isinstance(dtype, str) else f"torch.{dtype.__name__}"
            plain = _DTYPES.get(name.removeprefix("torch.").removesuffix("Tensor"))
            if plain is not None:
                return tensor.to("cpu", plain)
        return usual_type(tensor, dtype, non_blocking=non_blocking)

    assign(torch.Tensor, type=type_of)
    _install_default_type(types)
    _install_pinned_data()


def _install_default_type(types: dict[str, VirtualType]) -> None:
    """Let `torch.set_default_tensor_type` take a type of the device: `torch.Tensor(...)` then makes tensors there.

    Factories take the default device. `torch.Tensor(...)` does not look at it, only at the default type.
    """
    usual_default: Callable[..., None] = torch.set_default_tensor_type
    usual_new: Callable[..., Tensor] = torch.Tensor.__new__
    default: list[VirtualType] = []

    def new(*args: object, **options: object) -> Tensor:
        """Dynamo compares this signature with that of its own function, unless it takes anything."""
        kept = len(args) > 1 and isinstance(args[1], (Tensor, torch.TypedStorage, torch.UntypedStorage))
        if args[0] is not torch.Tensor or not default or options or kept:
            return usual_new(*args, **options)
        return default[0](*args[1:])

    def set_default_tensor_type(t: object) -> None:
        wanted = types.get(t) if isinstance(t, str) else t
        if isinstance(wanted, VirtualType):
            default[:] = [wanted]
            torch.set_default_dtype(wanted.dtype)
            torch.set_default_device("cuda")
            assign(torch.Tensor, __new__=new)
            return
        usual_default(t)
        if default:
            default.clear()
            torch.set_default_device(None)

    assign(torch, set_default_tensor_type=set_default_tensor_type)


def _install_pinned_data() -> None:
    """Let `torch.tensor(data, device="cuda", pin_memory=True)` work without a driver, in every thread.

    Other factories reach the dispatch mode. These make a host tensor first where `_set_only_lift_cpu_tensors` is set,
    which holds for one thread: autograd's run a script's own backward functions.
    """
    _device._device_constructors()  # torch keeps a list of these functions, which a default device is for

    usual: Callable[..., Tensor] = torch.tensor

    def tensor(data: object, *, pin_memory: bool = False, **options: object) -> Tensor:
        torch._C._set_only_lift_cpu_tensors(True)
        made = _of_read(usual, data, **options)
        return pin(made) if pin_memory else made

    tensor.__doc__ = torch.tensor.__doc__
    usual_new: Callable[..., Tensor] = torch.Tensor.new_tensor

    def new_tensor(like: Tensor, data: object, *, pin_memory: bool = False, **options: object) -> Tensor:
        torch._C._set_only_lift_cpu_tensors(True)
        made = _of_read(functools.partial(usual_new, like), data, **options)
        return pin(made) if pin_memory else made

    usual_as: Callable[..., Tensor] = torch.as_tensor

    def as_tensor(data: object, *options: object, **named: object) -> Tensor:
        torch._C._set_only_lift_cpu_tensors(True)
        return _of_read(usual_as, data, *options, **named)

    as_tensor.__doc__ = torch.as_tensor.__doc__
    assign(torch, tensor=tensor, as_tensor=as_tensor)
    assign(torch.Tensor, new_tensor=new_tensor)


def _of_read(make: Callable[..., Tensor], data: object, *options: object, **named: object) -> Tensor:
    """Make a tensor of numbers, among which there may be tensors of the card: torch reads those without a mode."""
    try:
        return make(data, *options, **named)
    except NotImplementedError:
        return make(_read(data), *options, **named)


def _read(data: object) -> object:
    """Return nested sequences with host tensors in place of the card's."""
    if isinstance(data, FakeTensor):
        numbers = torch.tensor(data.tolist() if data.dim() else data.item(), dtype=data.dtype, device="cpu")
        return numbers if data.dim() == 0 else list(numbers)
    return [_read(each) for each in data] if isinstance(data, list | tuple) else data
