"""The virtual GPU: runs all operators of a process on "cuda" with tensors that have no data.

Tensors of the host stay real. One dispatch mode sees all operators below autograd and autocast, as CUDA's own kernels
would. A tensor on the device is a fake tensor, and the recorder gets the memory that it would take there.
"""

import importlib
import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from tightfit.allocator.caching import CachingAllocator, OutOfMemory, PoolId
from tightfit.kernels import operators as kernels
from tightfit.kernels.card import Card
from tightfit.kernels.cost import kernel_of
from tightfit.kernels.fused_attention import attention
from tightfit.kernels.launch import Observer
from tightfit.vgpu.data_shapes import HANDLERS
from tightfit.vgpu.frames import Frame, user_frames
from tightfit.vgpu.known_values import Values
from tightfit.vgpu.phases import EnoughSeen, Phases
from tightfit.vgpu.recorder import Allocation, Recorder
from tightfit.vgpu.records import Category, Phase

aten = torch.ops.aten

LAZY_PARAMETER_ELEMENTS = 1 << 14
"""Host tensors from this size on that a module makes for itself are without data: a model of 70B fits any host."""
_LAZY_PINNED_ELEMENTS = 1 << 22
"""The same limit for pinned tensors, which receive data from the device; a batch of tokens or images is smaller."""

_FACTORIES = {
    aten.empty.memory_format, aten.empty_strided.default, aten.zeros.default, aten.ones.default, aten.full.default,
    aten.randn.default, aten.rand.default,
}  # fmt: skip
_PACKAGES_OF_CUSTOM_OPERATORS = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional")


class VirtualDevice:
    """One virtual card in this process: `mode` makes it active in a thread."""

    def __init__(self, card: Card, allocator: CachingAllocator, phases: Phases, where: str = "cuda:0") -> None:
        """With the host's `where`, all tensors there are virtual, and no kernel's own memory is added: for checks
        against what a real run on the host takes.
        """
        self.card = card
        self.recorder = Recorder(allocator)
        self.values = Values()
        self.phases = phases
        phases.after_forward = self._mark_own_parameters
        self.fake = _SharedFakeMode()
        self.where = torch.device(where)
        self._is_host = self.where.type == "cpu"
        self.stream = threading.local()
        self.failure: tuple[Allocation, OutOfMemory] | None = None
        """The last request that failed."""
        self.caught_failures = 0
        self.at_end: list[Callable[[], None]] = []
        """Functions to call when the script has ended."""
        self._peaks = {"requested": 0, "allocated": 0, "reserved": 0}
        self.not_written: list[str] = []
        """Files that the script would have saved."""
        self.not_modelled: list[str] = []
        """Features that this run used and the virtual GPU does not follow."""
        self.out_of_time = False
        self.observer: Observer | None = None
        self.compiled_line: tuple[Frame, ...] = ()
        """The user's lines that the running part of a compiled graph comes from."""
        self._workspaces: dict[tuple[str, int, int], Allocation] = {}
        self._handles = itertools.count()
        self._free_handles: list[int] = []
        self._forward_lines: dict[int, tuple[Frame, ...]] = {}
        self._special: dict[OpOverload, Callable[..., Any]] = {
            torch.ops.prim.device.default: lambda func, args, kwargs: func(*args, **kwargs),
            aten._local_scalar_dense.default: self._read_scalar,
            aten._to_copy.default: self._copy_across,
            aten.copy_.default: self._copy_into,
            aten._pin_memory.default: lambda func, args, kwargs: args[0].clone(),
            aten.is_pinned.default: lambda func, args, kwargs: False,
            aten.equal.default: self._equal,
            aten.allclose.default: self._equal,
            torch.ops.inductor.resize_storage_bytes_.default: _resize_storage,
        }

    def mode(self) -> "VirtualDeviceMode":
        """A new mode of this device; each thread needs its own."""
        return VirtualDeviceMode(self)

    def run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator, here if it touches the device, and as it is if not."""
        if self._is_host:
            if func is aten._local_scalar_dense.default:
                return self.values.scalar(args[0])
            return self.execute(func, args, kwargs)
        special = self._special.get(func)
        if special is not None:
            return special(func, args, kwargs)
        if kwargs.get("pin_memory"):  # of the driver, which is not there
            kwargs = {**kwargs, "pin_memory": False}
            if func in _FACTORIES and _elements(args) >= _LAZY_PINNED_ELEMENTS:
                with self.fake:
                    return func(*args, **kwargs)
        device = kwargs.get("device")
        on_device = device is not None and device.type == "cuda"
        if on_device:
            kwargs = {**kwargs, "device": self.where}
        elif not _has_fake(args) and not (kwargs and _has_fake(kwargs.values())):
            if func in _FACTORIES and (device is None or device.type == "cpu") and _is_large_parameter(func, args):
                with self.fake:
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        return self.execute(func, args, kwargs)

    def execute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator on fake tensors and record the memory of its CUDA kernel."""
        if func.namespace == "aten":
            if _is_composite(func, self.where.type):
                with self.mode():
                    if func is aten.scaled_dot_product_attention.default:
                        return attention(self.card, *args, **kwargs)
                    return func.decompose(*args, **kwargs)
        elif (body := self._python_body(func)) is not None:
            with self.mode():
                return body(*args, **kwargs)
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        with self.fake.lock:
            return self._launch(func, args, kwargs)

    def _launch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that is one step of the card; one thread at a time is in here."""
        handler = HANDLERS.get(func)
        if handler is not None and (answer := handler(self, func, args, kwargs)) is not None:
            return answer
        on_card = not self._is_host and _on_card(args, kwargs)
        hidden = kernels.hidden_bytes(func, args, kwargs, self.card) if on_card else None
        taken: list[Allocation] = []
        phase = self.phases.now(func._schema.name)
        if self.out_of_time and phase != "backward":
            raise EnoughSeen
        try:
            steps = hidden.steps() if hidden else iter((("outputs", 0),))
            for what, number in steps:
                if what == "outputs":
                    break
                self._live_through(what, number, taken, func, phase)
            with self.fake:
                out = func(*args, **kwargs)
            if func is aten.add.Tensor and phase == "backward" and self._engine_adds(args, kwargs):
                self.recorder.track_accumulation(out, args[0], self._describe(out, func, args, phase))
            else:
                self._track(out, func, args, phase)
            if on_card:
                self.take_workspaces(func, args, kwargs, phase)
            for what, number in steps:
                self._live_through(what, number, taken, func, phase)
        finally:
            for allocation in taken:
                self.recorder.give(allocation)
        self.values.follow(func, args, kwargs, out)
        if self.observer is not None and (kernel := kernel_of(func, args, kwargs, out)) is not None:
            self.observer(kernel)
        return out

    # Memory

    def make(self, func: OpOverload, args: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new result of an operator that only its data give a shape; `shape` is the caller's answer."""
        with self.fake:
            out = torch.empty(shape, dtype=dtype, device=self.where)
        self._track(out, func, args, self.phases.now(func._schema.name))
        return out

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Take and free memory as `storage.resize_(nbytes)` does on a card, before the storage itself changes.

        The new memory keeps the category of the old, and its shape if it has that size again.
        """
        old = self.recorder.held_by(storage)
        if old is None or not storage.resizable():
            return
        phase = self.phases.now()
        new = self._allocation(nbytes, "UntypedStorage.resize_", phase, old.category)
        new.frames = user_frames(sys._getframe(1)) or new.frames  # in backward the hook's own line, if it has one
        fits = nbytes in (0, math.prod(old.shape) * getattr(torch, old.dtype).itemsize)
        new.shape, new.dtype = (old.shape, old.dtype) if fits else ((nbytes,), "uint8")
        self._guarded(self.recorder.resize, storage, new)
        self.values.forget(storage)

    def peaks(self) -> dict[str, int]:
        """Highest requested, allocated and reserved bytes of the run, also from before the script reset its peaks."""
        for name, before in self._peaks.items():
            self._peaks[name] = max(before, getattr(self.recorder.allocator, f"peak_{name}_bytes"))
        return dict(self._peaks)

    def reset_peak_stats(self) -> None:
        """Start the script's peaks anew; ours go on."""
        self.peaks()
        self.recorder.allocator.reset_peak_stats()

    def count_made_up(self, what: str) -> None:
        """Count an answer for the line that the running operator comes from, also within backward."""
        self.values.count(what, self._frames(self.phases.now()))

    def _track(self, out: Any, func: OpOverload, args: tuple[Any, ...], phase: Phase) -> None:
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            # A sparse tensor has no storage of its own: its indices and values were results before.
            if (
                isinstance(tensor, FakeTensor)
                and tensor.fake_device.type == self.where.type
                and tensor.layout == torch.strided
            ):
                self._guarded(self.recorder.track, tensor, self._describe(tensor, func, args, phase))

    def _describe(
        self, tensor: Tensor, func: OpOverload, args: tuple[Any, ...], phase: Phase
    ) -> Callable[[int], Allocation]:
        def describe(nbytes: int) -> Allocation:
            allocation = self._allocation(nbytes, func._schema.name, phase, self._category(tensor, func, args, phase))
            allocation.shape, allocation.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            return allocation

        return describe

    def _allocation(self, nbytes: int, operator: str, phase: Phase, category: Category = "workspace") -> Allocation:
        """Describe memory that is taken next and belongs to no tensor yet."""
        return Allocation(
            number=0,
            nbytes=nbytes,
            operator=operator,
            shape=(),
            dtype="",
            phase=phase,
            category=category,
            frames=self._frames(phase),
            stream=self.current_stream,
        )

    def _live_through(self, what: str, number: int, taken: list[Allocation], func: OpOverload, phase: Phase) -> None:
        """One step of an operator's own memory: `number` bytes taken, or the block of that number freed early."""
        if what == "take":
            taken.append(self._take_hidden(number, func, phase))
        else:
            self.recorder.give(taken[number])

    def _take_hidden(self, nbytes: int, func: OpOverload, phase: Phase) -> Allocation:
        allocation = self._allocation(nbytes, func._schema.name, phase)
        self._guarded(self.recorder.take, allocation)
        return allocation

    def take_workspaces(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], phase: Phase | None = None
    ) -> None:
        """Memory that a library keeps from its first call on, for an operator that is about to run."""
        if self._is_host:
            return
        for workspace in kernels.workspaces(func, args, kwargs, self.card):
            self._take_workspace(workspace.key, workspace.nbytes, phase or self.phases.now())

    def _take_workspace(self, key: str, nbytes: int, phase: Phase) -> None:
        name = (key, self._handle(), self.current_stream)
        if name in self._workspaces:
            return
        allocation = self._allocation(nbytes, f"{key} workspace", phase)
        self._guarded(self.recorder.take, allocation)
        self._workspaces[name] = allocation

    def _handle(self) -> int:
        """The cuBLAS handle of this thread, which goes to another one when this has ended (`PoolWindow` of ATen)."""
        handle = getattr(self.stream, "handle", None)
        if handle is None:
            number = self._free_handles.pop() if self._free_handles else next(self._handles)
            handle = self.stream.handle = _Handle(number)
            weakref.finalize(handle, self._free_handles.append, number).atexit = False
        return handle.number

    def clear_workspaces(self) -> None:
        """Free the cuBLAS workspaces (`torch._C._cuda_clearCublasWorkspaces`): the next product takes one anew."""
        for name in [name for name in self._workspaces if name[0].startswith("cublas")]:
            self.recorder.give(self._workspaces.pop(name))

    @contextmanager
    def in_pool(self, pool: PoolId, stream: int) -> Iterator[None]:
        """Memory comes from a private pool on another stream, without the workspaces of outside."""
        before, self.recorder.pool = self.recorder.pool, pool
        usual, self.stream.number = self.current_stream, stream
        self.clear_workspaces()
        try:
            yield
        finally:
            self.clear_workspaces()
            self.recorder.pool, self.stream.number = before, usual

    def copy_into_pool(self, tensor: Tensor) -> Allocation:
        """Memory for a copy of a graph's input, at an address that it keeps."""
        nbytes = tensor.untyped_storage().nbytes()
        allocation = self._allocation(nbytes, "input of a CUDA graph", self.phases.now(), "inputs")
        allocation.shape, allocation.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self._guarded(self.recorder.take, allocation)
        return allocation

    def record_stream(self, tensor: Tensor, stream: int) -> None:
        """`tensor.record_stream`: freed, its memory waits until that stream is done."""
        held = self.recorder.of_storage(tensor)
        if held is not None and held.block is not None:
            with self.recorder.exclusive():
                self.recorder.allocator.record_stream(held.block, stream)

    def _guarded(self, take: Callable[..., object], *args: Any) -> None:
        """Take memory; where there is none, fail as PyTorch does."""
        try:
            take(*args)
        except OutOfMemory as error:
            allocation = args[-1](0) if callable(args[-1]) else args[-1]
            allocation.nbytes = error.tensor_bytes
            self.failure = (allocation, error)
            self.caught_failures += 1
            raise torch.OutOfMemoryError(error.message(self.card.torch_version)) from None

    @property
    def current_stream(self) -> int:
        return getattr(self.stream, "number", 0)

    def _category(self, tensor: Tensor, func: OpOverload, args: tuple[Any, ...], phase: Phase) -> Category:
        if tensor.dim() >= 2 and tensor.shape[-1] == self.phases.vocabulary and tensor.is_floating_point():
            source = self.recorder.of_storage(args[0]) if args and isinstance(args[0], FakeTensor) else None
            if source is None or source.category != "parameters":
                return "gradients" if tensor.dim() == 2 and _is_weight_gradient(func, phase) else "logits"
        if phase == "backward":
            return "gradients"
        if phase in ("setup", "optimizer"):  # what turns out to be a parameter or a state is marked later
            return "other"
        if func is aten._to_copy.default and isinstance(args[0], FakeTensor):
            source = self.recorder.of_storage(args[0])
            if source is not None and source.category == "parameters":
                return "cast copies"
        return "activations"

    def _frames(self, phase: Phase) -> tuple[Frame, ...]:
        if self.compiled_line:
            return self.compiled_line
        if phase == "backward":
            node = torch._C._current_autograd_node()
            if node is not None:
                return self._forward_lines.get(node._sequence_nr(), ())
            return ()
        frames = user_frames(sys._getframe(3))
        if torch.is_grad_enabled() and threading.current_thread() is threading.main_thread():  # each thread has numbers
            # Autograd makes an operator's node before it runs it; later operators may make none.
            self._forward_lines.setdefault(torch._C._autograd._get_sequence_nr() - 1, frames)
        return frames

    def _engine_adds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True for autograd's own addition: it sums the gradients of a tensor that was used more than once."""
        if kwargs or torch.is_grad_enabled() or torch._C._current_autograd_node() is not None:
            return False
        one, other = args[:2]
        return (
            isinstance(one, FakeTensor)
            and isinstance(other, FakeTensor)
            and one.shape == other.shape
            and one.dtype == other.dtype
            and not one._is_view()
        )

    def mark_roles(self) -> None:
        """Give parameters, gradients and optimizer states the category that they turned out to have."""
        for module in list(self.phases.modules):
            for tensor in (*module.parameters(), *module.buffers()):
                self._mark(tensor, "parameters")
                if tensor.grad is not None:
                    self._mark(tensor.grad, "gradients")
        for optimizer in list(self.phases.optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._mark(parameter, "parameters")
                    if parameter.grad is not None:
                        self._mark(parameter.grad, "gradients")
            for state in optimizer.state.values():
                for value in state.values() if isinstance(state, dict) else ():
                    if isinstance(value, Tensor):
                        self._mark_parts(value, "optimizer state")

    def _mark_own_parameters(self, module: nn.Module) -> None:
        """Mark the weights that FSDP gathered for this pass: they go when it ends."""
        for parameter in module._parameters.values():
            self.mark_parameter(parameter)

    def mark_parameter(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._mark(tensor, "parameters")

    def _mark_parts(self, tensor: Tensor, category: Category) -> None:
        """A tensor, or the tensors that a library's own kind of it is made of, such as codes and their scales."""
        if not isinstance(tensor, FakeTensor) and is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            for name in names:
                self._mark_parts(getattr(tensor, name), category)
        else:
            self._mark(tensor, category)

    def _mark(self, tensor: Tensor, category: Category) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # this card's shard of a distributed one
        if isinstance(tensor, FakeTensor) and tensor.fake_device.type == self.where.type:
            self.recorder.mark(tensor, category)

    # Between device and host

    def _read_scalar(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(args[0], FakeTensor):
            return self.values.scalar(args[0])
        return func(*args, **kwargs)

    def _equal(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _has_fake(args):
            return func(*args, **kwargs)
        one, other = (self.values.exactly(tensor) for tensor in args[:2])
        if one is not None and other is not None:
            return func(one, other, *args[2:], **kwargs)
        self.values.count("a comparison of tensors")
        return True

    def _copy_across(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, device = args[0], kwargs.get("device")
        target = source.device.type if device is None else device.type
        is_fake = isinstance(source, FakeTensor)
        if target == "cuda":
            kwargs = {**kwargs, "device": self.where}
            if is_fake:
                return self.execute(func, args, kwargs)
            with self.fake.lock:
                return self._upload(source, func, kwargs)
        if is_fake and target == "cpu":
            if source.fake_device.type == "cpu":
                with self.fake:
                    return func(*args, **kwargs)
            return self.values.on_host(source, kwargs.get("dtype") or source.dtype)
        return func(*args, **kwargs)

    def _upload(self, source: Tensor, func: OpOverload, kwargs: dict[str, Any]) -> Tensor:
        """A copy of a host tensor on the device."""
        phase = self.phases.now()
        with self.fake:
            out = torch.empty_strided(
                source.shape, _dense_strides(source), dtype=kwargs.get("dtype") or source.dtype, device=self.where
            )
        self._track(out, func, (source,), phase)
        if not isinstance(source, nn.Parameter) and phase != "setup":
            self.recorder.mark(out, "inputs")
        self.values.learn(out, source)
        return out

    def _copy_into(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, source = args[:2]
        to_host = target.device.type == "cpu"
        if to_host and self.observer and isinstance(source, FakeTensor) and (copy := kernel_of(func, args, {}, target)):
            self.observer(copy)
        if not isinstance(target, FakeTensor):
            if isinstance(source, FakeTensor):
                if source.fake_device.type == "cuda":
                    target.copy_(self.values.on_host(source, target.dtype))
                return target
            return func(*args, **kwargs)
        if to_host:
            return target  # a parameter without data
        if isinstance(source, FakeTensor):
            return self.execute(func, args, kwargs)
        self.values.follow(func, args, kwargs, target)
        return target

    # Operators written in Python

    def _python_body(self, func: OpOverload) -> Callable[..., Any] | None:
        """The function behind a custom operator (`custom_op`), which fake tensors treat as one step."""
        if func.namespace in _PACKAGES_OF_CUSTOM_OPERATORS:
            return None
        from torch._library.custom_ops import OPDEFS

        for definition in OPDEFS.values():
            if definition._opoverload is func:
                return definition._init_fn  # type: ignore[no-any-return]
        return None


class _SharedFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A fake mode for all threads of a script; `lock` lets one of them in at a time.

    Torch's own mode asserts that no other thread is in a kernel, and keeps its stack of modes in the object.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._thread = threading.local()
        super().__init__(allow_non_fake_inputs=True)

    @property
    def in_kernel_invocation(self) -> bool:
        return getattr(self._thread, "in_kernel", False)

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, value: bool) -> None:
        self._thread.in_kernel = value

    def __enter__(self) -> Self:
        self.lock.acquire()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.lock.release()


@dataclass
class _Handle:
    number: int


class VirtualDeviceMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sends the operators of one thread to the virtual device."""

    def __init__(self, device: VirtualDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._device.run(func, args, kwargs or {})

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles under this mode instead of giving up."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Let Dynamo see this mode: hiding wraps every operator, and only `torch.compile` needs that."""
        return False

    @classmethod
    def hide_from_dynamo(cls) -> None:
        hide: Any = importlib.import_module("torch._compile")._disable_dynamo
        cls.__torch_dispatch__ = hide(cls.__torch_dispatch__, recursive=True)  # type: ignore[method-assign]


@cache
def _is_composite(func: OpOverload, device: str) -> bool:
    """Return True if a device runs an operator as several others, and not as one kernel.

    Autograd takes such operators apart; tensors of inference mode do not pass it.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(func._name, device.upper())
    return func._can_decompose() and not has_kernel


def _has_fake(values: Any) -> bool:
    for value in values:
        if isinstance(value, FakeTensor):
            return True
        if isinstance(value, (list, tuple)) and _has_fake(value):
            return True
    return False


def _on_card(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """False if all fake tensors are in host memory, where a script may keep some."""
    found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    return not found or any(tensor.fake_device.type != "cpu" for tensor in found)


def _resize_storage(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensor, nbytes = args
    tensor.untyped_storage().resize_(nbytes)  # which comes to `VirtualDevice.resize`


def _is_weight_gradient(func: OpOverload, phase: Phase) -> bool:
    return phase == "backward" and func is aten.embedding_dense_backward.default


def _dense_strides(source: Tensor) -> tuple[int, ...]:
    """Strides of a copy that preserves the format: those of `source` if it is dense, else contiguous ones."""
    return torch.empty_like(source, device="meta").stride()


def _elements(args: tuple[Any, ...]) -> int:
    """Elements of a tensor whose shape is the factory's first argument."""
    return math.prod(args[0]) if args else 1


def _is_large_parameter(func: OpOverload, args: tuple[Any, ...]) -> bool:
    if _elements(args) < LAZY_PARAMETER_ELEMENTS:
        return False
    frame = sys._getframe(3)
    for _ in range(8):
        if frame is None:
            return False
        if frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
