"""The host's side of a script: torch's dealings with real files, parameters and threads, made safe for a dry run."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library, nn
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.kernels.fused_attention import attention
from tightfit.vgpu.compiled import Compiler
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches import backend
from tightfit.vgpu.phases import EnoughSeen


def install(device: VirtualDevice, properties: Any) -> None:
    """Patch this process for good."""
    _install_modules(device)
    _install_tensors(device)
    _install_threads(device)
    _install_compile(device, properties)
    _install_attention(device)


def _install_modules(device: VirtualDevice) -> None:
    """`module.to(device)` keeps each parameter the object that it was, as on a real card: optimizers hold them."""

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in module.children():
                child._apply(function)  # type: ignore[no-untyped-call]
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                moved = function(parameter)
                gradient = None if parameter.grad is None else function(parameter.grad)
            if moved is not parameter:
                _become(parameter, moved)
            if gradient is not None:
                module._parameters[name].grad = gradient  # type: ignore[union-attr]
            device.mark_parameter(module._parameters[name])
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
                device.mark_parameter(module._buffers[name])
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]

    def get_data(parameter: Tensor) -> Tensor:
        return torch.Tensor.data.__get__(parameter)  # type: ignore[attr-defined, no-any-return]

    nn.Parameter.data = property(get_data, _become)  # type: ignore[assignment]

    def set_data(tensor: Tensor, value: Tensor) -> None:
        """A large parameter is a fake tensor already on the host; what is no parameter stays where it is."""
        if isinstance(tensor, nn.Parameter):
            _become(tensor, value)
        else:
            torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]

    FakeTensor.data = property(get_data, set_data)  # type: ignore[assignment]


def _become(parameter: Tensor, value: Tensor) -> None:
    """Let a parameter hold `value`, wherever that is."""
    fake = isinstance(parameter, FakeTensor) or isinstance(value, FakeTensor)
    if fake or not torch._has_compatible_shallow_copy_type(parameter, value):  # from "meta" to the host, say
        backend.exchange(parameter, nn.Parameter(value.detach(), parameter.requires_grad))
    else:
        torch.Tensor.data.__set__(parameter, value)  # type: ignore[attr-defined]


def _install_tensors(device: VirtualDevice) -> None:
    """Let a fake tensor answer what it refuses, and a tensor on a card answers."""
    fake: Any = FakeTensor

    usual_address: Any = torch.UntypedStorage.data_ptr

    def storage_address(storage: torch.UntypedStorage) -> int:
        """Libraries tell by it which tensors share memory; without a place on the device, any number of its own."""
        if storage.device.type != "meta":
            return int(usual_address(storage))
        address = device.recorder.address_of(storage)
        return (storage._cdata if storage.nbytes() else 0) if address is None else address

    def address(tensor: Tensor) -> int:
        start = storage_address(tensor.untyped_storage())
        return start and start + int(tensor.storage_offset()) * tensor.element_size()

    def to_numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.device.type == "cuda":
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return device.values.on_host(tensor, tensor.dtype).numpy()

    def text(tensor: Tensor, *args: Any, **kwargs: Any) -> str:
        shape = tuple(tensor.shape)
        return f"tensor(<no data>, device='{tensor.device}', dtype={tensor.dtype}, shape={shape})"

    usual_resize: Any = torch.UntypedStorage.resize_

    def resize_storage(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
        device.resize(storage, nbytes)
        usual_resize(storage, nbytes)
        return storage

    storages: Any = torch.UntypedStorage
    storages.data_ptr = storage_address
    storages.resize_ = resize_storage
    fake.data_ptr = address
    fake.numpy = to_numpy
    fake.tolist = lambda tensor: device.values.on_host(tensor, tensor.dtype).tolist()
    fake.__repr__ = text
    fake.__str__ = text
    fake.__array__ = to_numpy
    fake.pin_memory = lambda tensor, *args: tensor
    usual_format: Any = torch.Tensor.__format__
    fake.__format__ = lambda tensor, spec: (
        usual_format(torch.full((), device.values.scalar(tensor)), spec) if tensor.dim() == 0 else str(tensor)
    )
    fake.__deepcopy__ = _deep_copy
    fake.record_stream = lambda tensor, stream: device.record_stream(tensor, stream.stream_id)
    every: Any = torch.Tensor
    every.pin_memory = lambda tensor, *args: tensor


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        with torch.no_grad():
            copied = tensor.detach().clone()
        memo[id(tensor)] = (
            nn.Parameter(copied, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else copied.requires_grad_(tensor.requires_grad)
        )
    return memo[id(tensor)]  # type: ignore[no-any-return]


def _install_threads(device: VirtualDevice) -> None:
    """Dispatch modes belong to one thread: each thread of the script gets its own, whatever its `run` is."""
    usual_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        usual_run = thread.run

        def run() -> None:
            try:
                with device.mode():
                    usual_run()
            except EnoughSeen:
                device.out_of_time = True  # ends the main thread, too
            finally:
                del given.run  # and with it the cycle that would keep what the thread holds

        given: Any = thread
        given.run = run
        usual_start(thread)

    threads: Any = threading.Thread
    threads.start = start


def _install_compile(device: VirtualDevice, properties: Any) -> None:
    compiler = Compiler(device, properties)
    pytorch: Any = torch
    pytorch.compile = compiler.compile

    def compile_module(module: nn.Module, *args: Any, **options: Any) -> None:
        compiled = compiler.compile(module._call_impl, *args, **options)
        module._compiled_call_impl = compiled

    modules: Any = nn.Module
    modules.compile = compile_module


def _install_attention(device: VirtualDevice) -> None:
    """On fake tensors torch takes the plain implementation; a card chooses a kernel."""
    operators = library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

    def chosen(*args: Any, **kwargs: Any) -> Tensor:
        return attention(device.card, *args, **kwargs)

    for key in ("AutogradCUDA", "CUDA"):
        operators.impl("scaled_dot_product_attention", chosen, key, allow_override=True)  # type: ignore[no-untyped-call]
    backend.KEPT.append(operators)
