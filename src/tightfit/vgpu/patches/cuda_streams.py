"""Streams, events and random generators of `torch.cuda` on the virtual GPU."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace, TracebackType

import torch

from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches.assign import assign

Where = torch.device | str | int | None


def install(device: VirtualDevice) -> None:
    """Patch this process for good."""
    _install_streams(device)
    _install_random()


class VirtualStream:
    """A stream of the virtual card: its work is done at once."""

    _numbers = itertools.count(1)

    def __init__(self, device: Where = None, priority: int = 0, *, stream_id: int | None = None, **_: object) -> None:
        self.stream_id = next(self._numbers) if stream_id is None else stream_id
        self.cuda_stream = self.stream_id
        self.device_index, self.device_type, self.priority = 0, 1, priority
        self.device = torch.device("cuda", 0)

    def wait_event(self, event: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: "VirtualEvent | None" = None) -> "VirtualEvent":
        return VirtualEvent() if event is None else event

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VirtualStream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def __enter__(self) -> "VirtualStream":
        on_stream: Callable[[VirtualStream], AbstractContextManager[object]] = torch.cuda.__dict__["stream"]
        self._context = on_stream(self)
        self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)


class VirtualEvent:
    """An event of the virtual card, which has always happened."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: object) -> None:
        self.device = torch.device("cuda", 0)

    def record(self, stream: object = None) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        """Milliseconds; nothing was computed, so no time passed."""
        return 1e-3


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


def _install_streams(device: VirtualDevice) -> None:
    default = VirtualStream(stream_id=0)

    def current_stream(where: Where = None) -> VirtualStream:
        return getattr(device.stream, "now", default)

    def set_stream(stream: VirtualStream | None) -> None:
        if stream is not None:
            device.stream.now, device.stream.number = stream, stream.stream_id

    @contextlib.contextmanager
    def on_stream(stream: VirtualStream | None) -> Iterator[VirtualStream | None]:
        before = current_stream()
        set_stream(stream)
        try:
            yield stream
        finally:
            set_stream(before)

    assign(torch.cuda, torch.cuda.streams, Stream=VirtualStream, Event=VirtualEvent)
    assign(
        torch.cuda,
        ExternalStream=VirtualStream,
        current_stream=current_stream,
        set_stream=set_stream,
        default_stream=lambda where=None: default,
        stream=on_stream,
        is_current_stream_capturing=lambda: False,
    )
    # The compiled ones ask the device guard, whose answer is not initialized memory: "Unknown device: 96".
    # Functions of their own: Dynamo refuses one function under two names.
    assign(
        torch.accelerator,
        current_stream=lambda where=None, /: current_stream(where),
        set_stream=lambda stream, /: set_stream(stream),
    )


def _install_random() -> None:
    states: dict[str, torch.Tensor] = {}

    def get_state(device: Where = "cuda") -> torch.Tensor:
        return states.get("now", torch.zeros(16, dtype=torch.uint8)).clone()

    def set_state(state: torch.Tensor, device: Where = "cuda") -> None:
        states["now"] = state.clone()

    seed = SimpleNamespace(value=0)

    def manual_seed(value: int) -> None:
        seed.value = int(value)

    assign(
        torch.cuda,
        torch.cuda.random,
        get_rng_state=get_state,
        set_rng_state=set_state,
        get_rng_state_all=lambda: [get_state()],
        set_rng_state_all=lambda all_states: set_state(next(iter(all_states), torch.zeros(16, dtype=torch.uint8))),
        manual_seed=manual_seed,
        manual_seed_all=manual_seed,
        seed=lambda: None,
        seed_all=lambda: None,
        initial_seed=lambda: seed.value,
    )
    assign(torch, Generator=VirtualGenerator)
