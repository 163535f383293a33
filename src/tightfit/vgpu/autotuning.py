"""Trials of Inductor on the card: of a kernel in several configurations, of a matrix product as it is and padded.

It times each candidate between passes over a buffer that clears the card's L2 cache. The buffer is freed at once, but
the allocator keeps its block: a card that compiles for the first time reserves more than one that finds the choices
of an earlier run on disk.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.wording import say

TRITON_CACHE_BYTES = 256 * 2**20
"""Of the buffer that Triton's benchmarks write to clear the card's cache (`get_empty_cache_for_benchmark`)."""

_OWN_BENCHMARKS_SINCE = (2, 7)
"""Torch's version whose Inductor measures by itself (`InductorBenchmarker`), with a buffer as large as the L2 cache."""

_DECORATOR = "@triton_heuristics."
_DECORATOR_ENDS = "\n@triton.jit"


def run_as_timed(candidate: Callable[[], object], buffer_bytes: int) -> None:
    """Run a candidate as a benchmark does: alone first, then beside the buffer that clears the cache."""
    candidate()
    buffer = torch.empty(buffer_bytes // 4, dtype=torch.int, device="cuda")
    candidate()
    del buffer


class Trials:
    """The candidates that Inductor times on a virtual card. Nothing is measured: only their memory is taken."""

    def __init__(self, device: VirtualDevice, l2_cache_bytes: Callable[[], int]) -> None:
        """`l2_cache_bytes` is called for each buffer: a play holds on other cards if they answer all calls alike."""
        self._device = device
        self._own_buffer_bytes = l2_cache_bytes
        self._kernels: dict[str, Kernel] = {}

    def time(self, candidate: Callable[[], object], *_: object, **__: object) -> float:
        """Take the memory of one candidate's timing; no time passes."""
        run_as_timed(candidate, self._buffer_bytes)
        return 0.0

    @property
    def _buffer_bytes(self) -> int:
        is_own = self._device.card.torch_version >= _OWN_BENCHMARKS_SINCE
        return self._own_buffer_bytes() if is_own else TRITON_CACHE_BYTES

    def kernel(self, source: str) -> "Kernel":
        """Return the kernel of Inductor's source code; equal code is one kernel, which is tried once."""
        return self._kernels.setdefault(source, Kernel(self, self._device, source))

    def install(self) -> None:
        """Let Inductor try here whether padding a matrix product pays."""
        decisions: dict[str, bool] = {}

        def decided(key: str) -> bool | None:
            self._device.note(say("vgpu.inductor.padding"))
            return decisions.get(key)

        assign(
            import_module("torch._inductor.fx_passes.pad_mm"),
            no_dispatch=self._on_device,
            get_cached_should_pad=decided,
            set_cached_should_pad=decisions.__setitem__,
            get_cached_base_mm_benchmark_time=lambda key: None,
            set_cached_base_mm_benchmark_time=lambda key, value: None,
            _skip_do_bench_times=True,  # padding unaligned matrices nearly always pays
        )
        assign(import_module("torch._inductor.runtime.benchmarking").benchmarker, benchmark_gpu=self.time)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        with _disable_current_modes(), self._device.mode(), torch.no_grad(), self.unobserved():
            yield

    @contextlib.contextmanager
    def unobserved(self) -> Iterator[None]:
        """Count no kernel within as the program's own work."""
        observer, self._device.observer = self._device.observer, None
        try:
            yield
        finally:
            self._device.observer = observer


class _Choices:
    """A kernel as Inductor's heuristics decided, in place of the one that tunes itself."""

    def __init__(
        self,
        size_hints: object,
        configs: list[object],
        triton_meta: dict[str, dict[str, object]],
        *_: object,
        unique: Callable[[list[object]], list[object]],
        inductor_meta: dict[str, object] | None = None,
        **__: object,
    ) -> None:
        meta = inductor_meta or {}
        self.count = len(unique(configs))
        changed = meta.get("mutated_arg_names") or ()
        assert isinstance(changed, (list, tuple))
        self.changed = [place for place, name in enumerate(triton_meta["signature"]) if name in changed]
        self.saves_memory = bool(meta.get("optimize_mem", True))


class Kernel:
    """A Triton kernel of Inductor's, which is tuned when it is first launched."""

    def __init__(self, trials: Trials, device: VirtualDevice, source: str) -> None:
        self._trials, self._device, self._source = trials, device, source
        self._is_tuned = False

    def tune(self, arguments: tuple[object, ...]) -> None:
        """Try the kernel's configurations once, with copies of the tensors that it changes."""
        if self._is_tuned:
            return
        self._is_tuned = True
        choices = self._choices()
        if choices is None or choices.count < 2:
            return
        copied = self._copied([arguments[place] for place in choices.changed], choices.saves_memory)
        with self._device.phases.named("compile"), self._trials.unobserved():
            for _ in range(choices.count):
                self._trials.time(lambda: [torch.empty_like(tensor) for tensor in copied])

    def _choices(self) -> _Choices | None:
        """Return the heuristics' choices; None for a template, for which one configuration was chosen before."""
        decorator = self._source.partition(_DECORATOR)[2].partition(_DECORATOR_ENDS)[0]
        if not decorator:
            return None
        names = {**vars(import_module("torch._inductor.runtime.hints")), "__file__": "kernel.py"}
        with _counting() as names["triton_heuristics"]:
            found = eval(f"triton_heuristics.{decorator}", names)  # our own compiler's output of this very process
        assert isinstance(found, _Choices)
        return found

    def _copied(self, changed: list[object], saves_memory: bool) -> list[Tensor]:
        """Return those that are copied on the card: the others go to the host, so that no copy raises the peak."""
        tensors = [each for each in changed if isinstance(each, Tensor)]
        if not saves_memory:
            return tensors
        copied = []
        budget = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        for tensor in tensors:
            if tensor.nbytes <= budget:
                budget -= tensor.nbytes
                copied.append(tensor)
        return copied


@contextlib.contextmanager
def _counting() -> Iterator[ModuleType]:
    """Let Inductor's heuristics, in the module yielded, return `_Choices` instead of decorators."""
    heuristics = import_module("torch._inductor.runtime.triton_heuristics")
    usual = heuristics.cached_autotune
    assign(heuristics, cached_autotune=functools.partial(_Choices, unique=heuristics.unique_configs))
    try:
        yield heuristics
    finally:
        assign(heuristics, cached_autotune=usual)
