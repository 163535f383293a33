"""Makes allocations fail: at chosen operators of torch, or for real by lowering the limit of this process.

Nothing in the package knows of these: errors arise where torch itself would raise them.
"""

import contextlib
import io
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from runs import arguments
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.config import TrainConfig, read_config
from tightfit.trainer import loop
from tightfit.trainer.fallback import Settings
from tightfit.trainer.out_of_memory import release_memory

REFUSED = 12_345_678
MESSAGE = (
    f"[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    f"{REFUSED} bytes. Error code 12 (Cannot allocate memory)"
)
_PHASES = {
    "_write_state": "save",
    "_sample": "sample",
    "_evaluation_sums": "eval",
    "write": "optimizer",
    "clip_grad_norm_": "clip",
    "backward": "backward",
    "token_loss": "loss",
    "_train_step": "forward",
    "_build": "setup",
    "_starting_point": "resume",
    "_as_floats": "log",
}
"""Functions on the stack, the innermost deciding, and the phase that they are."""
_WITHOUT_MEMORY = ("_local_scalar_dense", "detach", "view", "t", "transpose", "split", "split_with_sizes", "expand")
_OF_TORCH = ("backward", "clip_grad_norm_")


class Failing(TorchDispatchMode):
    """Raises before the operators that `chooses` picks by number (in its phase), name and phase."""

    def __init__(self, chooses: Callable[[int, str, str], bool]) -> None:
        super().__init__()
        self._chooses = chooses
        self.seen: Counter[str] = Counter()
        self.failed: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        phase = _phase(sys._getframe(1))
        if phase:
            self.seen[phase] += 1
            if self._chooses(self.seen[phase], str(func), phase):
                self.failed.append((phase, str(func)))
                raise RuntimeError(MESSAGE)
        return func(*args, **(kwargs or {}))


def _phase(frame: Any) -> str:
    """The innermost function of `_PHASES`; the loss within an evaluation is evaluation."""
    found = ""
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name == "tried" and file.endswith("recovery.py"):
            return found
        if file.endswith("distributed_c10d.py"):
            return ""  # within an exchange, where an error ends the run
        if name in _PHASES and found in ("", "loss") and ("tightfit" in file or name in _OF_TORCH):
            found = _PHASES[name] if not found or name == "_evaluation_sums" else found
        frame = frame.f_back
    return ""


def at(phase: str, *numbers: int) -> Failing:
    """Fails at these operators of a phase, counted over the whole run."""
    return Failing(lambda number, _name, its: its == phase and number in numbers)


def once_in_each(phases: Iterable[str], *, spared: int = 1000) -> Failing:
    """Fails once in each phase, but not again within the next `spared` operators, more than a tiny step."""
    left, since = set(phases), spared

    def chooses(_number: int, _name: str, phase: str) -> bool:
        nonlocal since
        since += 1
        if phase not in left or since < spared:
            return False
        left.discard(phase)
        since = 0
        return True

    return Failing(chooses)


def at_random(
    seed: int, one_in: int, *, spared: int = 1500, allocating_only: bool = False, phases: Iterable[str] = ()
) -> Failing:
    """Fails before one in so many operators, but not again within the next `spared`, about two tiny steps.

    `allocating_only` leaves alone those that read or write what exists: with two processes an error that no allocator
    could raise, between a sum over both and its result, ends the run instead of being survived. `phases`: only there.
    """
    draw, since, only = random.Random(seed), spared, set(phases)

    def chooses(_number: int, name: str, phase: str) -> bool:
        nonlocal since
        since += 1
        operator = name.split(".")[1]
        allocates = not (operator.endswith("_") or operator in _WITHOUT_MEMORY or name.startswith(("profiler", "c10d")))
        allowed = (allocates or not allocating_only) and (not only or phase in only)
        fails = since > spared and allowed and draw.randrange(one_in) == 0
        since = 0 if fails else since
        return fails

    return Failing(chooses)


class Same:
    """A fallback with nothing smaller: what failed runs again as it was."""

    is_tight = False
    predicted_peak_bytes = None

    def smaller(self, now: Settings, phase: str, free_bytes: int | None) -> Settings | None:
        return None

    def larger(self, now: Settings, failed: frozenset[Settings]) -> Settings | None:
        return None


@dataclass
class Trained:
    """A run in this process."""

    printed: str
    sequences: dict[tuple[str, int], list[int]]
    """By purpose and step: the sequences of its last attempt, in the order they were read."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """Phase and operator of each error injected."""


def trained(
    out_dir: Path, data_dir: Path, failing: Failing | None = None, *, fallback: Any = None, **keys: Any
) -> Trained:
    """A run of the tiny model with `failing` at work from its setup to its sample."""
    words = arguments(out_dir, data_dir, **keys)[1:]
    out = io.StringIO()
    with recorded_reads() as sequences, contextlib.redirect_stdout(out), failing or contextlib.nullcontext():
        loop.train(read_config(TrainConfig, words), fallback)
    return Trained(out.getvalue(), sequences, failing.failed if failing else [])


@contextlib.contextmanager
def recorded_reads() -> Iterator[dict[tuple[str, int], list[int]]]:
    """What is read for each step; reading its first sequence again forgets an attempt that failed."""
    found: dict[tuple[str, int], list[int]] = {}
    usual = loop.Batches.read

    def read(self: Any, purpose: Any, step: int, sequences: range) -> Any:
        if not found.get((purpose, step)) or sequences.start <= found[purpose, step][0]:
            found[purpose, step] = []
        ids = usual(self, purpose, step, sequences)
        found[purpose, step] += sequences
        return ids

    loop.Batches.read = read  # type: ignore[method-assign]
    try:
        yield found
    finally:
        loop.Batches.read = usual  # type: ignore[method-assign]


_ballast: list[torch.Tensor] = []


def squeeze(spare_bytes: int) -> None:
    """From now on the C library has no more than this to give: its limit is lowered, and what it kept is taken."""
    release_memory(torch.device("cpu"))
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(fields["VmData"].split()[0]) * 1024 + spare_bytes, hard))
    with contextlib.suppress(RuntimeError):
        while True:
            _ballast.append(torch.empty(2**20, dtype=torch.uint8))
    del _ballast[-spare_bytes // 2**20 :]


def unsqueeze() -> None:
    _ballast.clear()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
