"""The host's side of a script: torch's dealings with real files, parameters and threads, made safe for a dry run."""

import functools
import gc
import math
import multiprocessing
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library, nn
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.kernels.fused_attention import attention
from tightfit.kernels.temporaries import Argument
from tightfit.vgpu import play_folder
from tightfit.vgpu.assign import assign
from tightfit.vgpu.autotuning import Trials
from tightfit.vgpu.compiled import Compiler
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches import backend, inductor, lazy_modules, tensor_kinds, torchscript
from tightfit.vgpu.phases import EnoughSeen
from tightfit.vgpu.pinned import pin

if TYPE_CHECKING:
    import numpy as np

_DATA = torch.Tensor.__dict__["data"] if "data" in torch.Tensor.__dict__ else torch._C.TensorBase.__dict__["data"]
"""Torch's own descriptor of `tensor.data`."""


def install(device: VirtualDevice, properties: SimpleNamespace) -> None:
    """Patch this process for good."""
    _install_modules(device)
    _install_data()
    _install_ragged()
    _install_encoders()
    _install_validity(device)
    _install_steps(device)
    _install_lbfgs()
    install_storages(device)
    _install_fake_tensors(device)
    _install_parameters()
    tensor_kinds.install()
    _install_sharing()
    _install_threads(device)
    _install_compile(device, properties)
    torchscript.install(device)
    lazy_modules.install()
    _install_attention(device)
    _install_convolutions(device)
    _install_scalars(device)


def _install_steps(device: VirtualDevice) -> None:
    """Tell of each backward pass, and of the script's optimizers."""
    backward: Callable[..., object] = torch.autograd.backward
    init: Callable[..., None] = torch.optim.Optimizer.__init__

    @functools.wraps(backward)
    def counted(*args: object, **kwargs: object) -> None:
        backward(*args, **kwargs)
        device.phases.after_backward()

    @functools.wraps(init)
    def made(optimizer: torch.optim.Optimizer, *args: object, **kwargs: object) -> None:
        device.phases.made_optimizer()
        init(optimizer, *args, **kwargs)

    assign(torch.autograd, backward=counted)
    assign(torch.optim.Optimizer, __init__=made)


def _install_lbfgs() -> None:
    """Let L-BFGS fill its history: a loss that nobody computed does not change, which looks like its end."""
    usual: Callable[..., Tensor] = torch.optim.LBFGS.step

    @functools.wraps(usual)
    def step(optimizer: torch.optim.LBFGS, closure: Callable[[], Tensor]) -> Tensor:
        group = optimizer.param_groups[0]
        given = {name: group[name] for name in ("tolerance_grad", "tolerance_change")}
        group.update(dict.fromkeys(given, -math.inf))
        try:
            return usual(optimizer, closure)
        finally:
            group.update(given)

    assign(torch.optim.LBFGS, step=step)


def _install_validity(device: VirtualDevice) -> None:
    """Take the samples and parameters of a distribution as valid where nobody computed them."""
    from torch.distributions import constraints

    def assuming(check: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(check)
        def checked(constraint: object, value: Tensor) -> Tensor:
            valid = check(constraint, value)
            device.values.assume(valid, True)
            return valid

        return checked

    for kind in vars(constraints).values():
        if isinstance(kind, type) and issubclass(kind, constraints.Constraint) and "check" in vars(kind):
            assign(kind, check=assuming(vars(kind)["check"]))


def _install_modules(device: VirtualDevice) -> None:
    """Let `module.to(device)` keep each parameter's object, as on a real card: optimizers hold them."""

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in module.children():
                child._apply(function)
        for parameter in module._parameters.values():
            if parameter is None or lazy_modules.is_moved(parameter, function):
                continue
            with torch.no_grad():
                moved = function(parameter)
                gradient = None if parameter.grad is None else function(parameter.grad)
            if moved is not parameter:
                _become(parameter, moved)
            if gradient is not None:
                parameter.grad = gradient
            device.roles.mark_parameter(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and not lazy_modules.is_moved(buffer, function):
                module._buffers[name] = function(buffer)
                device.roles.mark_parameter(module._buffers[name])
        return module

    assign(nn.Module, _apply=apply)


def _install_encoders() -> None:
    """Let nn.TransformerEncoder keep padded batches, which take no less: fake tensors have no ragged ones."""
    assign(torch, _nested_tensor_from_mask_left_aligned=lambda source, mask: False)


def _install_ragged() -> None:
    """Let `nested.to("cuda")` find the ragged length of a host tensor, which torch looks for in fake tensors alone."""

    def length_of(offsets: Tensor) -> torch.SymInt:
        from torch.nested._internal.nested_tensor import get_tensor_symint

        length: Callable[..., torch.SymInt] = get_tensor_symint
        return length(offsets)

    assign(torch.Tensor, nested_int_memo=property(length_of))


def _install_data() -> None:
    """Let `tensor.data = value` move the tensor to wherever the value is."""

    def get_data(tensor: Tensor) -> Tensor:
        data: Tensor = _DATA.__get__(tensor)
        return data

    assign(torch.Tensor, data=property(get_data, _become))


def _become(tensor: Tensor, value: Tensor) -> None:
    """Let a tensor hold `value`, on whichever device that is."""
    if _can_hold(tensor, value):
        _DATA.__set__(tensor, value)
        return
    gradient = tensor.grad if tensor.is_leaf else None
    if tensor_kinds.is_own_kind(tensor):
        made = tensor_kinds.same_kind(tensor, value)
    elif isinstance(tensor, nn.Parameter):
        made = nn.Parameter(value.detach(), tensor.requires_grad)
    else:
        made = value.detach()
    backend.exchange(tensor, made)
    if not isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(made.requires_grad)
    if gradient is not None and gradient.device == tensor.device and gradient.shape == tensor.shape:
        tensor.grad = gradient


def _can_hold(tensor: Tensor, value: Tensor) -> bool:
    """Return True if torch's own assignment works, which keeps the kind of tensor and the device of a fake one."""
    if isinstance(tensor, FakeTensor) and isinstance(value, FakeTensor):
        return tensor.fake_device == value.fake_device and tensor.layout == value.layout
    if isinstance(tensor, FakeTensor) or isinstance(value, FakeTensor):
        return False
    return torch._has_compatible_shallow_copy_type(tensor, value)  # False from "meta" to the host, say


def install_storages(device: VirtualDevice) -> None:
    """Let storages answer for memory that the virtual device takes and frees."""
    usual_address, usual_resize = torch.UntypedStorage.data_ptr, torch.UntypedStorage.resize_
    usual_copy = torch.UntypedStorage.copy_

    def storage_address(storage: torch.UntypedStorage) -> int:
        """Return an address of its own for a storage without one: libraries tell by it which tensors share memory."""
        if storage.device.type != "meta":
            return int(usual_address(storage))
        address = device.recorder.address_of(storage)
        return (storage._cdata if storage.nbytes() else 0) if address is None else address

    def resize(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
        device.resize(storage, nbytes)
        usual_resize(storage, nbytes)
        return storage

    def address(tensor: Tensor) -> int:
        start = storage_address(tensor.untyped_storage())
        return start and start + int(tensor.storage_offset()) * tensor.element_size()

    def copy(
        storage: torch.UntypedStorage, source: torch.UntypedStorage, non_blocking: bool | None = None
    ) -> torch.UntypedStorage:
        """Copy bytes, unless one of the two has none: `dcp.async_save` copies storages of the card to the host."""
        if "meta" not in (storage.device.type, source.device.type):
            usual_copy(storage, source, non_blocking)
        return storage

    assign(torch.UntypedStorage, data_ptr=storage_address, resize_=resize, copy_=copy)
    assign(FakeTensor, data_ptr=address)


def _install_fake_tensors(device: VirtualDevice) -> None:
    """Let a fake tensor answer like a tensor on a card, where torch's own refuses to."""
    usual_format: Callable[[Tensor, str], str] = torch.Tensor.__format__

    def to_numpy(tensor: Tensor, *, force: bool = False) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
        if tensor.device.type == "cuda" and not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return device.values.on_host(tensor, tensor.dtype).numpy()

    def text(tensor: Tensor, *args: object, **kwargs: object) -> str:
        shape = tuple(tensor.shape)
        return f"tensor(<no data>, device='{tensor.device}', dtype={tensor.dtype}, shape={shape})"

    def formatted(tensor: Tensor, spec: str) -> str:
        return (
            usual_format(torch.full((), device.values.scalar(tensor), device="cpu"), spec)
            if tensor.dim() == 0
            else str(tensor)
        )

    assign(
        FakeTensor,
        numpy=to_numpy,
        tolist=lambda tensor: device.values.on_host(tensor, tensor.dtype).tolist(),
        __repr__=text,
        __str__=text,
        __array__=to_numpy,
        pin_memory=lambda tensor, *args: pin(tensor),
        __format__=formatted,
        __deepcopy__=_deep_copy,
        __reduce_ex__=_reduce,
        record_stream=lambda tensor, stream: device.record_stream(tensor, stream.stream_id),
    )
    assign(torch.Tensor, pin_memory=lambda tensor, *args: pin(tensor))


def _install_parameters() -> None:
    """Let `type(parameter)(data)` make a parameter, as libraries do that fill a model weight by weight."""
    usual: Callable[..., Tensor] = FakeTensor.__new__

    def make(kind: type[Tensor], *args: object, **options: object) -> Tensor:
        if len(args) == 1 and isinstance(args[0], Tensor) and set(options) <= {"requires_grad"}:
            return nn.Parameter(args[0], bool(options.get("requires_grad", True)))
        return usual(kind, *args, **options)

    assign(FakeTensor, __new__=make)


def _reduce(tensor: Tensor, protocol: object) -> tuple[Callable[..., Tensor], tuple[object, ...]]:
    """Let pickle and copy make a tensor of the same kind; there is no data to keep."""
    where = str(tensor.device)
    kind = isinstance(tensor, nn.Parameter)
    return _rebuild, (tuple(tensor.shape), tensor.stride(), tensor.dtype, where, tensor.requires_grad, kind)


def _rebuild(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    requires_grad: bool,
    is_parameter: bool,
) -> Tensor:
    card_of_this_process = play_folder.card_of_this_process
    is_given = torch.device(device).type == "cuda" and getattr(multiprocessing.current_process(), "_inheriting", False)
    if is_given and card_of_this_process is not None:
        made: Tensor = card_of_this_process().given(shape, stride, dtype)
    else:
        made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return nn.Parameter(made, requires_grad) if is_parameter else made.requires_grad_(requires_grad)


def _install_sharing() -> None:
    """Let tensors of the card be shared between processes as they are."""
    usual_share: Callable[[Tensor], Tensor] = torch.Tensor.share_memory_
    usual_is_shared: Callable[[Tensor], bool] = torch.Tensor.is_shared

    def share(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_cuda else usual_share(tensor)

    assign(torch.Tensor, share_memory_=share, is_shared=lambda tensor: tensor.is_cuda or usual_is_shared(tensor))


def _deep_copy(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in memo:
        with torch.no_grad():
            copied = tensor.detach().clone()
        memo[id(tensor)] = (
            nn.Parameter(copied, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else copied.requires_grad_(tensor.requires_grad)
        )
    return memo[id(tensor)]


def _install_threads(device: VirtualDevice) -> None:
    """Give each thread of the script a dispatch mode of its own, whatever its `run` is: modes belong to one thread."""
    usual_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        usual_run = thread.run

        def run() -> None:
            try:
                with device.mode():
                    usual_run()
            except EnoughSeen:
                device.end_soon()  # the main thread, too
            except torch.OutOfMemoryError as error:  # the main thread may wait for ever for what this one makes
                device.thread_error = error
                device.end_soon()
                raise
            finally:
                del thread.__dict__["run"]  # and with it the cycle that would keep what the thread holds

        assign(thread, run=run)
        usual_start(thread)

    assign(threading.Thread, start=start)


def _install_compile(device: VirtualDevice, properties: SimpleNamespace) -> None:
    trials = Trials(device, lambda: int(properties.L2_cache_size))
    compiler = Compiler(device, trials, lambda: inductor.install(device, properties, trials, compiler.running))

    compile_: Callable[..., Callable[..., object]] = compiler.compile

    def compile_module(module: nn.Module, *args: object, **options: object) -> None:
        assign(module, _compiled_call_impl=compile_(module._call_impl, *args, **options))

    assign(gc, collect=compiler.kept_frames.collecting())
    assign(torch, compile=compiler.compile)
    assign(nn.Module, compile=compile_module)


def _install_attention(device: VirtualDevice) -> None:
    """Let fake tensors take the kernel that a card would choose, instead of torch's plain implementation."""
    operators = library.Library("aten", "IMPL")

    attend: Callable[..., Tensor] = attention

    def chosen(*args: Argument, **kwargs: Argument) -> Tensor:
        return attend(device.answers.ask, *args, **kwargs)

    for key in ("AutogradCUDA", "CUDA"):
        operators.impl("scaled_dot_product_attention", chosen, key, allow_override=True)
    backend.KEPT.append(operators)


def _install_convolutions(device: VirtualDevice) -> None:
    """Lay out results of convolutions as cuDNN does, for which torch asks the driver, or which its build lacks.

    Follows `cudnn_conv_suggest_memory_format` (ATen/native/ConvUtils.h): "channels last" where the input or the
    weight is, but not in float64. Cards before Ampere have no convolution in bfloat16 there.
    """
    usual: Callable[[Tensor, Tensor, Any], torch.memory_format] = torch._C._conv_determine_backend_memory_format
    by_dims = {4: torch.channels_last, 5: torch.channels_last_3d}

    def layout(input: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
        if input.device.type != "cuda":
            return usual(input, weight, backend)
        last = by_dims.get(weight.dim(), torch.contiguous_format)
        if last not in map(torch._prims_common.suggest_memory_format, (input, weight)):
            return torch.contiguous_format
        unknown = torch.float64 in (input.dtype, weight.dtype) or not torch.backends.cudnn.enabled
        if unknown or (input.dtype == torch.bfloat16 and device.answers.ask(lambda card: card.capability < (8, 0))):
            return torch.contiguous_format
        return last

    assign(torch._C, _conv_determine_backend_memory_format=layout)


def _install_scalars(device: VirtualDevice) -> None:
    """Answer for single numbers where torch hides the dispatch mode, as `torch.Tensor([loss])` does."""
    operators = library.Library("aten", "IMPL")
    operators.impl("_local_scalar_dense", device.values.scalar, "CUDA", allow_override=True)
    backend.KEPT.append(operators)
