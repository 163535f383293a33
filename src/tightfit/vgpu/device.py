"""The virtual GPU: runs all operators of a process on "cuda" with tensors that have no data.

Tensors of the host stay real. One dispatch mode receives all operators below autograd and autocast, as CUDA's own
kernels would. A tensor on the device is a fake tensor, and the recorder counts the memory that it would take there.
"""

import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import cast

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.library import _impls
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tightfit.allocator.caching import CachingAllocator, OutOfMemory, PoolId
from tightfit.kernels import operators as kernels
from tightfit.kernels.card import Card
from tightfit.kernels.cost import kernel_of
from tightfit.kernels.fused_attention import attention
from tightfit.kernels.launch import Observer
from tightfit.kernels.refused_types import refuse
from tightfit.kernels.temporaries import Argument, Arguments, Options, Step
from tightfit.vgpu.assumed import Assumed
from tightfit.vgpu.card_answers import CardAnswers, HiddenByCard, Sizes
from tightfit.vgpu.chance import OF_TENSORS, Draws
from tightfit.vgpu.data_shapes import HANDLERS
from tightfit.vgpu.fakes import (
    SharedFakeMode,
    compressed_parts,
    fakes,
    has_fake,
    is_composite,
    is_on_card,
    is_on_meta,
    is_wrapper,
)
from tightfit.vgpu.frames import Frame, user_frames, users_line
from tightfit.vgpu.known_values import Values
from tightfit.vgpu.phases import EnoughSeen, Phases
from tightfit.vgpu.pinned import is_pinned, pin
from tightfit.vgpu.recorder import Allocation, Recorder
from tightfit.vgpu.records import Category, Phase
from tightfit.vgpu.result_cache import ResultCache
from tightfit.vgpu.roles import Roles
from tightfit.vgpu.transfers import Transfers
from tightfit.wording import say

aten = torch.ops.aten

LAZY_PARAMETER_ELEMENTS = 1 << 14
"""Elements from which a module's own host tensors have no data, so that a model of 70B fits any host."""
_LAZY_PINNED_ELEMENTS = 1 << 22
"""The same limit for pinned tensors of floats, which receive data from the device; integers are read from files."""
_CAN_PAUSE = sys.version_info < (3, 12)
"""From 3.12 on, taking a trace function off costs more than it saves within one operator."""

_FACTORIES = {
    aten.empty.memory_format,
    *(packet.default for packet in (aten.empty_strided, aten.zeros, aten.ones, aten.full, aten.randn, aten.rand)),
}
_NO_SCALED_PRODUCTS = (
    "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9, or ROCm MI300+"
)
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
"""Operators that cuDNN computes with a workspace of its own choice."""
_DEVICE_OF = torch.ops.prim.device.default
_attention: Callable[..., Argument] = attention
_UNKNOWN_SHAPE = (DynamicOutputShapeException, DataDependentOutputException, UnsupportedOperatorException)
_KEYS_OF_THE_CARD = ("CUDA", "CompositeExplicitAutograd")
"""Dispatch keys under which a script's own operator may have a kernel in Python for the card."""
_PACKAGES_OF_CUSTOM_OPERATORS = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional")


class VirtualDevice:
    """One virtual card in this process: `mode` makes it active in a thread."""

    count = 1
    """Cards that the script finds; this process has the first, or the one of its local rank."""
    caught_failures = 0
    events_at_failure = 0
    """Number of the recorder's events when memory last ran out."""
    thread_error: torch.OutOfMemoryError | None = None
    """Error that ended a thread of the script."""
    out_of_time = False
    capture_stream = 0
    """Stream on which a CUDA graph is being captured, by this thread or autograd's; 0 if none is."""
    observer: Observer | None = None

    def __init__(self, card: Card, allocator: CachingAllocator, phases: Phases, where: str = "cuda:0") -> None:
        """Make the card virtual, or the host with `where` = "cpu": without kernels' own memory, to check a real run."""
        self.card = card
        self.answers = CardAnswers(card)
        self.recorder = Recorder(allocator)
        self.assumed = Assumed()
        self.has_whole_lengths = False
        """True while lengths that depend on data are known to be the largest."""
        self.values = Values(lambda frames: self.assumed.value(frames), lambda: phases.steps)
        self.phases = phases
        self.draws = Draws()
        self.fake = SharedFakeMode()
        self.of_sparse: Callable[[OpOverload, Arguments, Options], Argument] | None = None
        """Finds results of operators on sparse tensors, of which fake tensors forget the elements."""
        self._results = ResultCache(self.fake)
        self.where = torch.device(where)
        self.roles = Roles(self.recorder, phases, self.where)
        self._is_host = self.where.type == "cpu"
        self.stream = threading.local()
        self.failure: tuple[Allocation, OutOfMemory] | None = None
        """The last request that failed."""
        self.at_end: list[Callable[[], None]] = []
        """Functions to call when the script has ended."""
        self._peaks = {"requested": 0, "allocated": 0, "reserved": 0}
        self.not_written: list[str] = []
        """Files that the script would have saved."""
        self.not_modelled: list[str] = []
        """Features that this run used and the virtual GPU does not follow."""
        self.end_soon: Callable[[], None] = lambda: None
        """Ends the script at its next operator, or where it waits."""
        self.compiled_line: tuple[Frame, ...] = ()
        """The user's lines that the running part of a compiled graph comes from."""
        self._workspaces: dict[tuple[str, int, int], Allocation] = {}
        self._handles = itertools.count()
        self._free_handles: list[int] = []
        self._forward_lines: dict[int, tuple[Frame, ...]] = {}
        self._special = self._answered_here()

    def _answered_here(self) -> dict[OpOverload, Callable[..., Argument]]:
        """Functions of (operator, *args, **kwargs) for operators that are not steps of the card."""
        if self._is_host:
            return {aten._local_scalar_dense.default: self._read_scalar}
        transfers = Transfers(self)
        return {
            torch.ops.prim.device.default: lambda func, tensor: func(tensor),
            aten._local_scalar_dense.default: self._read_scalar,
            aten._to_copy.default: transfers.across,
            aten.to.device: self._in_parts,
            aten.copy_.default: transfers.into,
            aten.clone.default: transfers.cloned,
            aten._pin_memory.default: lambda func, tensor, *rest: pin(tensor.clone()),
            aten.is_pinned.default: lambda func, tensor, *rest: is_pinned(tensor),
            aten.equal.default: self._equal,
            aten.allclose.default: self._equal,
            torch.ops.inductor.resize_storage_bytes_.default: _resize_storage,
        }

    def mode(self) -> "VirtualDeviceMode":
        """Make a mode of this device; each thread needs its own."""
        return VirtualDeviceMode(self)

    def run(self, func: OpOverload, args: Arguments, kwargs: Options) -> Argument:
        """Run one operator, here if it touches the device, and unchanged if not."""
        special = self._special.get(func)
        if special is not None:
            return special(func, *args, **kwargs)
        if self._is_host:
            is_meta = is_on_meta(args, kwargs.get("device"))
            return func(*args, **kwargs) if is_meta else self.execute(func, args, kwargs)
        if kwargs.get("pin_memory"):  # of the driver, which is not there
            kwargs = {**kwargs, "pin_memory": False}
            is_lazy = _is_float(kwargs.get("dtype")) and func in _FACTORIES and _elements(args) >= _LAZY_PINNED_ELEMENTS
            made = self.without_data(func, args, kwargs) if is_lazy else self.run(func, args, kwargs)
            return pin(made) if isinstance(made, Tensor) else made
        device = kwargs.get("device")
        if isinstance(device, torch.device) and device.type == "cuda":
            self.check_ordinal(device.index)
            return self.execute(func, args, {**kwargs, "device": self.where})
        if has_fake(args) or (kwargs and has_fake(kwargs.values())):
            return self.execute(func, args, kwargs)
        on_host = not isinstance(device, torch.device) or device.type == "cpu"
        if func in _FACTORIES and on_host and _is_large_parameter(func, args):
            return self.without_data(func, args, kwargs)
        out: Argument = func(*args, **kwargs)
        if func in OF_TENSORS and isinstance(out, Tensor) and out.numel() == 1:
            self.draws.into(out, func, args)
        return out

    def without_data(self, func: OpOverload, args: Arguments, kwargs: Options) -> Argument:
        """Run an operator on fake tensors only, and record nothing."""
        with self.fake:
            out: Argument = func(*args, **kwargs)
        return out

    def given(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of the card that the process which started this one holds: it takes nothing here."""
        func, args = aten.empty_strided.default, (list(shape), list(stride))
        with _disable_current_modes():
            made = self.without_data(func, args, {"dtype": dtype, "device": self.where})
        assert isinstance(made, Tensor)
        self.recorder.note_given(made, self._describe(made, func, args, self.phases.now()))
        return made

    def execute(self, func: OpOverload, args: Arguments, kwargs: Options) -> Argument:
        """Run an operator on fake tensors and record the memory of its CUDA kernel."""
        if func.namespace == "aten":
            if is_composite(func, self.where.type):
                if func is not aten.scaled_dot_product_attention.default:
                    return self._in_parts(func, *args, **kwargs)
                with self.mode():
                    return _attention(self.answers.ask, *args, **kwargs)
        elif (body := self._python_body(func)) is not None:
            with self.mode():
                return body(*args, **kwargs)
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        with self.fake.lock:
            return self._launch(func, args, kwargs)

    def _in_parts(self, func: OpOverload, *args: Argument, **kwargs: Argument) -> Argument:
        """Run an operator as those that it is made of; `to` with a device, too, as no fake tensor shows where it goes.

        Autograd takes them apart before; only in inference mode they come here whole. `func.decompose` would prefer
        the decompositions in Python that compilers use.
        """
        with self.mode():
            parts: Argument = func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        return parts

    def _launch(self, func: OpOverload, args: Arguments, kwargs: Options) -> Argument:
        """Run an operator that is one step of the card; one thread at a time is in here."""
        if func in _WRITTEN_IN_PLACE:
            func = _as_without_mode(func)
        handler = HANDLERS.get(func)
        if handler is not None and not self._is_host:
            refuse(func._schema.name.removeprefix("aten::"), args)
        if handler is not None and (answer := handler(self, func, *args, **kwargs)) is not None:
            return answer
        on_card = not self._is_host and is_on_card(args, kwargs)
        hidden = self._hidden(func, args, kwargs) if on_card else HiddenByCard(None, {})
        taken: list[Allocation] = []
        phase = self.phases.now(func._schema.name)
        if self.out_of_time and phase != "backward":
            raise EnoughSeen
        try:
            steps = hidden.own.steps() if hidden.own else iter((("outputs", 0),))
            for step in steps:
                if step[0] == "outputs":
                    break
                self._live_through(step, taken, hidden, func, phase)
            out = self._result(func, args, kwargs, phase)
            if func is aten.add.Tensor and phase == "backward" and (first := _engine_adds(args, kwargs)) is not None:
                assert isinstance(out, Tensor)
                self.recorder.track_accumulation(out, first, self._describe(out, func, args, phase))
            else:
                self.track(out, func, args, phase)
            if on_card:
                self.take_workspaces(func, args, kwargs, phase)
            for step in steps:
                self._live_through(step, taken, hidden, func, phase)
        finally:
            for allocation in taken:
                self.recorder.give(allocation)
        self.values.follow(func, args, kwargs, out)
        if self.observer is not None and (kernel := kernel_of(func, args, kwargs, out)) is not None:
            self.observer(kernel)
        return out

    def _result(self, func: OpOverload, args: Arguments, kwargs: Options, phase: Phase) -> Argument:
        """Return a result without data. NotImplementedError, in one sentence, where nobody knows its shape."""
        try:
            return self._results.result(func, args, kwargs, partial(self._compute, func, args, kwargs))
        except (NotImplementedError, *_UNKNOWN_SHAPE):
            raise self.unknown(func, phase) from None

    def _compute(self, func: OpOverload, args: Arguments, kwargs: Options) -> Argument:
        if not self._is_host:
            refuse(func._schema.name.removeprefix("aten::"), args)
            if func is aten._scaled_mm.default and not self.answers.ask(lambda card: card.capability >= (8, 9)):
                raise RuntimeError(_NO_SCALED_PRODUCTS)
        if any(tensor.layout is not torch.strided for tensor in fakes(args)) and self.of_sparse is not None:
            return self.of_sparse(func, args, kwargs)
        return self.without_data(func, args, kwargs)

    def unknown(self, func: OpOverload, phase: Phase) -> NotImplementedError:
        """Return the error of an operator that cannot be played, in one sentence."""
        line = users_line(self._frames(phase))
        place = say("vgpu.device.place", file=line.file, line=line.line) if line else ""
        name = func._schema.name
        if func.namespace == "aten":
            return NotImplementedError(say("vgpu.device.own_operator_unknown", name=name, place=place))
        return NotImplementedError(say("vgpu.device.operator_unknown", name=name, place=place))

    # Memory

    def make(self, func: OpOverload, args: Arguments, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make a result of the caller's `shape`, for an operator with a shape that depends on data."""
        where = next((each.fake_device for each in fakes(args)), self.where)  # parameters of the host are fake, too
        with self.fake:
            out = torch.empty(shape, dtype=dtype, device=where)
        self.track(out, func, args, self.phases.now(func._schema.name))
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
        self._guarded(self.recorder.resize, new, storage)
        self.values.forget(storage)

    def peaks(self) -> dict[str, int]:
        """Highest requested, allocated and reserved bytes of the run, also from before the script reset its peaks."""
        for name, before in self._peaks.items():
            self._peaks[name] = max(before, getattr(self.recorder.allocator, f"peak_{name}_bytes"))
        return dict(self._peaks)

    def reset_peak_stats(self) -> None:
        """Reset the script's peaks, and keep ours."""
        self.peaks()
        self.recorder.allocator.reset_peak_stats()

    def note(self, feature: str) -> None:
        """Add a feature to `not_modelled`, once."""
        if feature not in self.not_modelled:
            self.not_modelled.append(feature)

    def length(self, played: int, largest: int | None = None) -> int:
        """Return the length of a result that depends on data: `played` if the user gave none for the running line.

        It counts as made up, unless it can only be 0. `largest` bounds it; nothing does if None.
        """
        if largest == 0 or (self.has_whole_lengths and largest is not None):
            return largest
        frames = self._frames(self.phases.now())
        self.values.count("the length of a result that depends on data", frames)
        return self.assumed.length(frames, played, largest)

    def track(self, out: Argument, func: OpOverload, args: Arguments, phase: Phase) -> None:
        """Record the memory of the tensors in an operator's result."""
        for tensor in fakes((out,)):
            if tensor.fake_device.type != self.where.type:
                continue
            for part in (tensor,) if tensor.layout == torch.strided else self._parts(tensor):
                self._guarded(self.recorder.track, self._describe(part, func, args, phase), part)

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """List the tensors that a sparse one is made of; it has no storage of its own."""
        with self.fake:
            if tensor.layout == torch.sparse_coo:
                return tensor._indices(), tensor._values()
            return compressed_parts(tensor)

    def _describe(self, tensor: Tensor, func: OpOverload, args: Arguments, phase: Phase) -> Callable[[int], Allocation]:
        def describe(nbytes: int) -> Allocation:
            allocation = self._allocation(
                nbytes, func._schema.name, phase, self.roles.category(tensor, func, args, phase)
            )
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

    def _hidden(self, func: OpOverload, args: Arguments, kwargs: Options) -> HiddenByCard:
        key = self._results.key_of(func, args, kwargs) if self.answers.alike else None
        return self.answers.hidden(lambda card: kernels.hidden_bytes(func, args, kwargs, card), key)

    def _live_through(
        self, step: Step, taken: list[Allocation], hidden: HiddenByCard, func: OpOverload, phase: Phase
    ) -> None:
        """Take some bytes of an operator's own memory, or free the block of a number early."""
        what, number = step
        if what == "take":
            if hidden.elsewhere:
                self.answers.before_request(hidden.sizes(len(taken)))
            taken.append(self._take_hidden(number, func, phase))
        else:
            self.recorder.give(taken[number])

    def _take_hidden(self, nbytes: int, func: OpOverload, phase: Phase) -> Allocation:
        allocation = self._allocation(nbytes, func._schema.name, phase)
        self._guarded(self.recorder.take, allocation)
        return allocation

    def take_raw(self, nbytes: int) -> Allocation:
        """Take memory for a script that asks the allocator itself."""
        allocation = self._allocation(nbytes, "caching_allocator_alloc", self.phases.now(), "other")
        self._guarded(self.recorder.take, allocation)
        return allocation

    def take_workspaces(self, func: OpOverload, args: Arguments, kwargs: Options, phase: Phase | None = None) -> None:
        """Take the memory that a library keeps from its first call on, for an operator that is about to run."""
        if self._is_host:
            return
        if func in _CONVOLUTIONS and torch.backends.cudnn.enabled:
            self.note(say("vgpu.device.cudnn_workspaces"))
        for workspace, elsewhere in self.answers.workspaces(lambda card: kernels.workspaces(func, args, kwargs, card)):
            self._take_workspace(workspace.key, workspace.nbytes, phase or self.phases.now(), elsewhere)

    def _take_workspace(self, key: str, nbytes: int, phase: Phase, elsewhere: Sizes) -> None:
        name = (key, self._handle(), self.current_stream)
        if name in self._workspaces:
            return
        if elsewhere:
            self.answers.before_request(elsewhere)
        allocation = self._allocation(nbytes, f"{key} workspace", phase)
        self._guarded(self.recorder.take, allocation)
        self._workspaces[name] = allocation

    def _handle(self) -> int:
        """Number of this thread's cuBLAS handle; another thread gets it when this one ends (`PoolWindow` of ATen)."""
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
        """Take memory from a private pool on another stream, with workspaces of its own."""
        before, self.recorder.pool = self.recorder.pool, pool
        usual, self.stream.number = self.current_stream, stream
        self.clear_workspaces()
        try:
            yield
        finally:
            self.clear_workspaces()
            self.recorder.pool, self.stream.number = before, usual

    def copy_into_pool(self, tensor: Tensor) -> Allocation:
        """Take memory for a copy of a graph's input, at an address that it keeps."""
        nbytes = tensor.untyped_storage().nbytes()
        allocation = self._allocation(nbytes, "input of a CUDA graph", self.phases.now(), "inputs")
        allocation.shape, allocation.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self._guarded(self.recorder.take, allocation)
        return allocation

    def record_stream(self, tensor: Tensor, stream: int) -> None:
        """Do as `tensor.record_stream`: its freed memory waits until that stream is done."""
        held = self.recorder.of_storage(tensor)
        if held is not None and held.block is not None:
            with self.recorder.exclusive():
                self.recorder.allocator.record_stream(held.block, stream)

    def _guarded(
        self,
        take: Callable[..., object],
        allocation: Allocation | Callable[[int], Allocation],
        *owner: Tensor | torch.UntypedStorage,
    ) -> None:
        """Take memory; where there is none, fail as PyTorch does."""
        try:
            take(*owner, allocation)
        except OutOfMemory as error:
            failed = allocation if isinstance(allocation, Allocation) else allocation(0)
            failed.nbytes = error.tensor_bytes
            self.failure = (failed, error.with_traceback(None))  # a traceback would keep the script's tensors
            self.caught_failures += 1
            self.events_at_failure = len(self.recorder.events)
            raise torch.OutOfMemoryError(error.message(self.card.torch_version)) from None

    @property
    def current_stream(self) -> int:
        return self.capture_stream or getattr(self.stream, "number", 0)

    def check_ordinal(self, index: int | None) -> None:
        """Fail as CUDA does where the script names a card that is not there."""
        if index is not None and not 0 <= index < self.count:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")

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

    # Between device and host

    def check_not_capturing(self) -> None:
        """Fail as CUDA does where the host would wait for a stream that is only being captured."""
        if self.capture_stream:
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

    def wait_for_streams(self) -> None:
        """Take back, at the next request, what other streams used: the host has waited for their work."""
        with self.recorder.exclusive():
            self.recorder.allocator.finish(self.recorder.allocator.waited)

    def _read_scalar(self, func: OpOverload, tensor: Tensor) -> Argument:
        if isinstance(tensor, FakeTensor):
            if tensor.fake_device.type == "cuda":
                self.check_not_capturing()
                self.wait_for_streams()
            return self.values.scalar(tensor)
        number: Argument = func(tensor)
        return number

    def _equal(self, func: OpOverload, one: Tensor, other: Tensor, *rest: Argument, **kwargs: Argument) -> Argument:
        """Compare as far as the values are known; fractions that nobody computed equal no known ones."""
        mine, others = self.values.exactly(one), self.values.exactly(other)
        if mine is None or others is None:
            if one.numel() == other.numel() == 1 and not one.is_floating_point():
                flags = [
                    self.values.scalar(each) if isinstance(each, FakeTensor) else each.item() for each in (one, other)
                ]
                return flags[0] == flags[1]
            self.values.count("a comparison of tensors")
            is_special = (mine is None) != (others is None) and one.is_floating_point() and func is aten.equal.default
            return one.shape == other.shape and not is_special
        equal: Argument = func(mine, others, *rest, **kwargs)
        return equal

    # Operators written in Python

    def _python_body(self, func: OpOverload) -> Callable[..., Argument] | None:
        """Return the function behind a custom operator (`custom_op`), which fake tensors treat as one step."""
        if func.namespace in _PACKAGES_OF_CUSTOM_OPERATORS:
            return None
        from torch._library.custom_ops import OPDEFS

        for definition in OPDEFS.values():
            if definition._opoverload is func:
                by_device: dict[str | None, Callable[..., Argument]] = definition._backend_fns
                body: Callable[..., Argument] = by_device.get("cuda", definition._init_fn)
                return body
        key = next((key for key in _KEYS_OF_THE_CARD if f"{func.namespace}/{_name(func)}/{key}" in _impls), None)
        return None if key is None else partial(func._op_dk, getattr(torch._C.DispatchKey, key))


@dataclass
class _Handle:
    number: int


class VirtualDeviceMode(TorchDispatchMode):
    """Sends the operators of one thread to the virtual device."""

    supports_higher_order_operators = True

    def __init__(self, device: VirtualDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, func: OpOverload, types: Iterable[type], args: Arguments = (), kwargs: Options | None = None
    ) -> Argument:
        if func is _DEVICE_OF and type(args[0]) is FakeTensor:  # by far the most frequent question
            return args[0].fake_device
        for each in types:
            if is_wrapper(each):
                # Its own dispatch comes back here with the tensors that it is made of.
                return cast("Argument", NotImplemented)
        if isinstance(func, HigherOrderOperator):
            return self._higher_order(func, args, kwargs or {})
        traced = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if traced is not None and traced is not self._device.fake:  # DTensor asks for the shapes of whole tensors
            shape_only: Argument = func(*args, **(kwargs or {}))
            return shape_only
        is_paused = _CAN_PAUSE and self._device.phases.pause_trace()
        try:
            return self._device.run(func, args, kwargs or {})
        except NotImplementedError as error:
            if "from the 'CUDA' backend" not in str(error):
                raise
        except torch.OutOfMemoryError as error:  # the script may keep it, and our frames with it: not their tensors
            del args, kwargs
            raise error.with_traceback(None) from None
        finally:
            if is_paused:
                self._device.phases.resume_trace()
        raise self._device.unknown(func, self._device.phases.now())

    def _higher_order(self, func: HigherOrderOperator, args: Arguments, kwargs: Options) -> Argument:
        """Run an operator of functions, such as `flex_attention`, by its plain implementation, unless it is traced.

        Fake tensors know only its result: outside of a compiled graph, it makes all scores.
        """
        body = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if body is None or func.name() not in _MADE_WHOLE or any(map(torch._C._get_dispatch_mode, _TRACERS)):
            traced_result: Argument = func(*args, **kwargs)
            return traced_result
        with self:
            result: Argument = body(*args, **kwargs)
        return result

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles under this mode instead of giving up."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Let Dynamo trace this mode: hiding it wraps every operator, and only `torch.compile` needs that."""
        return False


_TRACERS = tuple(torch._C._TorchDispatchModeKey.__members__.values())
_MADE_WHOLE = ("flex_attention", "flex_attention_backward", "associative_scan", "map_impl")
"""Operators of functions whose plain implementations do not ask for the card's values."""


def _name(func: OpOverload) -> str:
    name = func._schema.name.partition("::")[2]
    return f"{name}.{func._schema.overload_name}" if func._schema.overload_name else name


_WRITTEN_IN_PLACE: dict[OpOverload, tuple[OpOverload, tuple[str, ...]]] = {
    aten.scatter.src: (
        aten.scatter_.src,
        ("Sort", "Topk", "Max", "Min", "Median", "Nanmedian", "Kthvalue", "Mode"),
    ),
    aten.scatter_add.default: (aten.scatter_add_.default, ("Gather", "Cummax", "Cummin")),
    aten.masked_scatter.default: (aten.masked_scatter_.default, ("MaskedSelect",)),
    aten.put.default: (aten.put_.default, ("Take",)),
    aten.index_put.default: (aten.index_put_.default, ("Index",)),
}
"""Operators in the backward of others. They write into zeros of their own, and into a copy under a dispatch mode only
(`areAnyTensorSubclassLike` in FunctionsManual.cpp and TensorAdvancedIndexing.cpp)."""


def _as_without_mode(func: OpOverload) -> OpOverload:
    """Return the operator that autograd calls on a card in place of `func`."""
    in_place, of = _WRITTEN_IN_PLACE[func]
    node = torch._C._current_autograd_node()
    return in_place if node is not None and node.name().rstrip("0123456789").removesuffix("Backward") in of else func


def _engine_adds(args: Arguments, kwargs: Options) -> Tensor | None:
    """Return the first summand of autograd's own addition, which sums the gradients of a tensor used more than once."""
    if kwargs or torch.is_grad_enabled() or torch._C._current_autograd_node() is not None:
        return None
    one, other = args[:2]
    if not isinstance(one, FakeTensor) or not isinstance(other, FakeTensor) or one._is_view():
        return None
    return one if one.shape == other.shape and one.dtype == other.dtype else None


def _resize_storage(func: OpOverload, tensor: Tensor, nbytes: int) -> None:
    tensor.untyped_storage().resize_(nbytes)  # it calls `VirtualDevice.resize`


def _elements(args: Arguments) -> int:
    """Elements of a factory's result: its first argument is the shape."""
    shape: Argument = args[0] if args else ()
    return math.prod(shape) if isinstance(shape, (list, tuple)) else 1


def _is_float(dtype: Argument) -> bool:
    """Return True for a factory's `dtype` that is of floats, as the default is."""
    return dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype is None


def _is_large_parameter(func: OpOverload, args: Arguments) -> bool:
    if _elements(args) < LAZY_PARAMETER_ELEMENTS:
        return False
    frame: FrameType | None = sys._getframe(3)
    for _ in range(8):
        if frame is None:
            return False
        if frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back
    return False
