"""Streams, events and random generators of `torch.cuda` on the virtual GPU."""

import ctypes
import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import SimpleNamespace, TracebackType
from typing import ClassVar

import torch

from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.recorder import Recorder

Where = torch.device | str | int | None


def install(device: VirtualDevice) -> None:
    """Patch this process for good."""
    _Waits.recorder = device.recorder
    _install_streams(device)
    _install_random()


class _Waits:
    """Freed blocks that another stream still uses come back once the host has waited for that stream, too."""

    recorder: ClassVar[Recorder | None] = None

    @classmethod
    def waited(cls) -> int:
        """Return a mark of the blocks that were freed up to now."""
        return 0 if cls.recorder is None else cls.recorder.allocator.waited

    @classmethod
    def finish(cls, waited: int) -> None:
        """Finish what streams did with the blocks that were freed up to a mark."""
        if cls.recorder is not None:
            with cls.recorder.exclusive():
                cls.recorder.allocator.finish(waited)


class VirtualStream:
    """A stream of the virtual card: its work is done at once."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        device: Where = None,
        priority: int = 0,
        *,
        stream_id: int | None = None,
        stream_ptr: int | None = None,
        **_: object,
    ) -> None:
        self.stream_id = next(self._numbers) if stream_id is None else stream_id
        self.cuda_stream = self.stream_id if stream_ptr is None else stream_ptr
        self.native_handle = self.cuda_stream
        self.device_index, self.device_type, self.priority = 0, 1, priority
        self.device = torch.device("cuda", 0)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority."""
        return 0, -5

    def wait_event(self, event: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...

    def synchronize(self) -> None:
        _Waits.finish(_Waits.waited())

    def record_event(self, event: "VirtualEvent | None" = None) -> "VirtualEvent":
        event = VirtualEvent() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        self.synchronize()
        return True

    def is_capturing(self) -> bool:
        return False

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.cuda_stream)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VirtualStream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device=cuda:0 cuda_stream={self.cuda_stream:#x}>"

    def __enter__(self) -> "VirtualStream":
        on_stream: Callable[[VirtualStream], AbstractContextManager[object]] = torch.cuda.__dict__["stream"]
        self._context = on_stream(self)
        self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)


class VirtualExternalStream(VirtualStream):
    """A stream that another library made: its address tells it apart."""

    def __init__(self, stream_ptr: int, device: Where = None, **_: object) -> None:
        super().__init__(device, stream_id=stream_ptr, stream_ptr=stream_ptr)


class VirtualEvent:
    """An event of the virtual card, which has always happened."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
        **_: object,
    ) -> None:
        self.device = torch.device("cuda", 0)
        self.event_id = self.cuda_event = id(self)
        self.enable_timing, self.blocking = enable_timing, blocking
        self._waited = 0

    @classmethod
    def from_ipc_handle(cls, device: Where, handle: bytes) -> "VirtualEvent":
        return cls()

    def ipc_handle(self) -> bytes:
        return bytes(64)

    def record(self, stream: object = None) -> None:
        self._waited = _Waits.waited()

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None:
        _Waits.finish(self._waited)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end_event: object) -> float:
        """Milliseconds; nothing was computed, so no time passed."""
        return 1e-3


class _AcceleratorEvent(VirtualEvent):
    """An event as `torch.Event` makes it: its first argument is the device."""

    def __init__(self, device: Where = None, **options: bool) -> None:
        super().__init__(**options)


class VirtualGenerator(torch.Generator):
    """A generator that a script made for the device: real numbers, which no kernel uses."""

    _device: torch.device

    def __new__(cls, device: Where = "cpu") -> "VirtualGenerator":
        new: Callable[..., VirtualGenerator] = super().__new__
        made = new(cls, "cpu")
        made._device = torch.device("cpu" if device is None else device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # torch's stub has a plain attribute
        return self._device

    def get_offset(self) -> int:
        return int(getattr(self, "_offset", 0))

    def set_offset(self, offset: int) -> "VirtualGenerator":
        """Keep the offset of a card's Philox generator, a multiple of 4."""
        if offset % 4:
            raise RuntimeError("offset must be a multiple of 4")
        self._offset = offset
        return self

    def clone_state(self) -> "VirtualGenerator":
        made = VirtualGenerator(self._device)
        made.set_state(self.get_state())
        return made

    def graphsafe_get_state(self) -> "VirtualGenerator":
        return self

    def graphsafe_set_state(self, state: torch.Generator) -> "VirtualGenerator":
        return self


def _install_streams(virtual: VirtualDevice) -> None:
    default = VirtualStream(stream_id=0)

    def current_stream(device: Where = None) -> VirtualStream:
        return getattr(virtual.stream, "now", default)

    def default_stream(device: Where = None) -> VirtualStream:
        return default

    def set_stream(stream: VirtualStream | None) -> None:
        if stream is not None:
            virtual.stream.now, virtual.stream.number = stream, stream.stream_id

    class StreamContext:
        """Makes a stream the current one for the lines within."""

        def __init__(self, stream: VirtualStream | None) -> None:
            self.stream = stream
            self._before: list[VirtualStream] = []

        def __enter__(self) -> VirtualStream | None:
            self._before.append(current_stream())
            set_stream(self.stream)
            return self.stream

        def __exit__(self, *error: object) -> None:
            set_stream(self._before.pop())

    def on_stream(stream: VirtualStream | None) -> StreamContext:
        return StreamContext(stream)

    def stream_from_external(data_ptr: int, device: Where = None) -> VirtualStream:
        return VirtualExternalStream(data_ptr, device)

    assign(torch.cuda, torch.cuda.streams, Stream=VirtualStream, Event=VirtualEvent)
    assign(torch.cuda, torch.cuda.streams, ExternalStream=VirtualExternalStream)
    assign(torch, Stream=VirtualStream, Event=_AcceleratorEvent)
    assign(
        torch.cuda,
        current_stream=current_stream,
        set_stream=set_stream,
        default_stream=default_stream,
        get_stream_from_external=stream_from_external,
        stream=on_stream,
        StreamContext=StreamContext,
    )
    # The compiled ones ask the device guard, whose answer is not initialized memory: "Unknown device: 96".
    # Functions of their own: Dynamo refuses one function under two names.
    assign(
        torch.accelerator,
        current_stream=lambda device=None, /: current_stream(device),
        set_stream=lambda stream, /: set_stream(stream),
    )


def _install_random() -> None:
    states: dict[str, torch.Tensor] = {}
    seeds = SimpleNamespace(value=0)

    def get_state(device: Where = "cuda") -> torch.Tensor:
        return states["now"].clone() if "now" in states else torch.zeros(16, dtype=torch.uint8, device="cpu")

    def set_state(new_state: torch.Tensor, device: Where = "cuda") -> None:
        states["now"] = new_state.clone()

    def set_states(new_states: Iterable[torch.Tensor]) -> None:
        for state in new_states:
            set_state(state)

    def manual_seed(seed: int) -> None:
        seeds.value = int(seed)

    assign(
        torch.cuda,
        torch.cuda.random,
        get_rng_state=get_state,
        set_rng_state=set_state,
        get_rng_state_all=lambda: [get_state()],
        set_rng_state_all=set_states,
        manual_seed=manual_seed,
        manual_seed_all=lambda seed: manual_seed(seed),
        seed=lambda: None,
        seed_all=lambda: None,
        initial_seed=lambda: seeds.value,
    )
    assign(torch, Generator=VirtualGenerator)
    default = VirtualGenerator("cuda")
    assign(torch.cuda, default_generators=(default,))
    assign(torch._C, _accelerator_getDefaultGenerator=lambda index: default)
