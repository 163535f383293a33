"""What a plan would take: traces in worker processes, remembered on disk.

A prediction is only ever of the plan itself: it was traced, on this torch, for this card.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tightfit.config import TrainConfig, to_dict
from tightfit.errors import DeviceError
from tightfit.gpus import GPU
from tightfit.planner.candidates import Plan
from tightfit.simulation.cache import Memory
from tightfit.simulation.speed import Rates, Work

_TIMEOUT_S = 600
_MEMORY_KEYS = (
    "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "vocab_size", "dtype", "compile", "mode", "loss",
    "activation_checkpointing", "activation_memory_budget", "micro_batch", "eval_micro_batch", "device", "offload",
    "optimizer", "param_dtype",
)  # fmt: skip
"""Keys that decide, as they are, what a step takes."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one plan takes, and how long its step would be."""

    plan: Plan
    peak_bytes: int
    """Reserved by PyTorch's allocator at most; on the host what tensors hold."""
    allocated_bytes: int
    phase: str
    """Where the peak is."""
    categories: dict[str, int]
    phases: dict[str, int]
    """Highest allocated bytes of each phase."""
    pass_s: float
    """Seconds of one forward and backward pass."""
    update_s: float
    """Seconds of clipping and the optimizer."""
    not_modelled: tuple[str, ...]
    parameters: int
    pass_work: Work = field(default_factory=Work)
    """Kernels of a pass."""
    update_work: Work = field(default_factory=Work)

    def at(self, rates: Rates) -> "Prediction":
        """The same on a device that has these rates and the same kernels."""
        return replace(self, pass_s=self.pass_work.seconds(rates), update_s=self.update_work.seconds(rates))

    def step_s(self, share: int) -> float:
        """Seconds of a step over `share` sequences."""
        return self.pass_s * share / self.plan.micro_batch + self.update_s


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the traces are made for."""

    gpu: GPU | None
    """None for the host."""
    known: bool
    """Whether the card is in the table."""
    share: int
    """Sequences of a step on this device."""
    environ: dict[str, str]
    """The allocator's settings."""
    host_flops: dict[str, float]
    host_bandwidth: float


class Tracer:
    """The processes that trace. To be closed."""

    def __init__(self) -> None:
        self._zygote: _Zygote | None = None
        self._compiler: _Zygote | None = None
        self.will_compile = False
        """Whether a compiled plan is to be expected."""
        self._lock = threading.Lock()
        self.traced = 0
        """Traces that were made, not found on disk."""

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (self._zygote, self._compiler):
            if process is not None:
                process.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the trace says, or its "error"."""
        with self._lock:
            if self._zygote is None:
                self._zygote = _Zygote()
                if self.will_compile and importlib.util.find_spec("triton"):
                    self._compiler = _Zygote("one")
            self.traced += 1
            asked = self._zygote
            if request["config"]["compile"] is True and self._compiler is not None:
                asked, self._compiler = self._compiler, None
        try:
            return asked.ask(request)
        finally:
            if asked is not self._zygote:
                asked.close()


class Predictor:
    """Predicts plans of one configuration on one device, two at a time, and remembers them."""

    def __init__(self, config: TrainConfig, target: Target, tracer: Tracer, *, workers: int | None = None) -> None:
        self._config, self._target, self._tracer = config, target, tracer
        self._workers = workers or min(4, os.cpu_count() or 1)

    def expect_compiled(self, expected: bool) -> None:
        """A compiled plan will be asked for: the process that traces it can load the compiler meanwhile."""
        self._tracer.will_compile = expected

    def predict(self, plans: list[Plan], *, whole: bool = True) -> list[Prediction]:
        """Predictions of `plans`, in their order, `whole` ones or of the steps alone.

        DeviceError where the virtual device does not work.
        """
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(lambda plan: self._predict(plan, whole), plans))

    def _predict(self, plan: Plan, whole: bool) -> Prediction:
        request = self._request(plan) | {"whole": whole}
        remembered = Memory(request)
        found = remembered.read()
        if found is None:
            found = self._tracer.ask(request)
            if "error" in found:
                raise DeviceError(f"the plan could not be traced: {found['error']}")
            remembered.write(found)
        return Prediction(
            plan=plan,
            peak_bytes=found["peak"]["reserved_bytes"],
            allocated_bytes=found["peak"]["allocated_bytes"],
            phase=found["peak"]["phase"],
            categories=found["categories"],
            phases=found["phases"],
            pass_s=found["pass_s"],
            update_s=found["update_s"],
            not_modelled=tuple(found["not_modelled"]),
            parameters=found["parameters"],
            pass_work=Work.of_rows(found["pass_kernels"]),
            update_work=Work.of_rows(found["update_kernels"]),
        )

    def _request(self, plan: Plan) -> dict[str, Any]:
        target = self._target
        config: dict[str, Any] = dict(to_dict(plan.applied_to(self._config)))
        kept: dict[str, Any] = {key: config[key] for key in _MEMORY_KEYS}
        # More passes than three take no more memory; which weights a run starts from shows while it is set up.
        most = plan.micro_batch * 2 + (target.share % plan.micro_batch or plan.micro_batch)
        share = plan.micro_batch if plan.effective_batch else min(target.share, most)
        kept |= {
            "batch_size": share,
            "gradient_accumulation_steps": 1,
            "init_from": "scratch" if config["init_from"] == "scratch" else "resume",
            "grad_clip": float(config["grad_clip"] > 0),
            "sample_at_end": int(config["sample_at_end"] > 0),
            "fit": "off",
        }
        gpu = target.gpu
        return {
            "config": kept,
            "share": share,
            "gpu": gpu.name if gpu else "",
            "capability": list(gpu.capability) if gpu and not target.known else None,
            "environ": target.environ,
            "host_flops": target.host_flops,
            "host_bandwidth": target.host_bandwidth,
        }


class _Zygote:
    """The process that forks a child for each trace, or, with "one", itself makes one."""

    def __init__(self, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tightfit-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tightfit.simulation.server", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        self._number = 0
        self._lock = threading.Lock()
        self._ended: dict[int, threading.Event] = {}
        self._codes: dict[int, int] = {}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._number += 1
            number = self._number
            answer = Path(self._folder.name, f"{number}.json")
            ended = self._ended[number] = threading.Event()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"id": number, "request": request, "answer": str(answer)}) + "\n")
                self._process.stdin.flush()
        if not ended.wait(_TIMEOUT_S):
            raise DeviceError(f"a trace took more than {_TIMEOUT_S} seconds; train with --fit=off, and report it")
        if not answer.exists():
            code = self._codes.get(number)
            raise DeviceError(
                f"a trace ended with code {code} and no answer; if this machine's memory ran out, that is the reason"
            )
        found: dict[str, Any] = json.loads(answer.read_text())
        return found

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if message["id"] is not None:
                self._codes[message["id"]] = message["code"]
                self._ended[message["id"]].set()
        for ended in self._ended.values():  # the process is gone
            ended.set()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()  # nobody waits for what it may still be doing
        self._process.wait()
        self._listener.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()
