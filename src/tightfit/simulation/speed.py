"""Seconds of a step: each kernel by the card's peaks, and the host's time to launch them.

The shares of the peaks were set on published runs of GPT-2 in bfloat16: four of 124M on an A100 SXM 40 GB (A. Karpathy,
"Let's reproduce GPT-2 (124M)") and one of 219M on an RTX 4070. benchmarks/plan/speed.py prints what this model says of
them and of others that it was not set on: within 5% of the former, within 18% of the latter.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from tightfit.gpus import GPU
from tightfit.kernels.launch import Kernel
from tightfit.links import Cards

MATMUL_SHARE, MEASURED_MATMUL_SHARE = 0.75, 0.9
"""Of the peak, and of a measured large product, that matrix products reach in a model."""
GEFORCE_OF_PEAK = 1.06
"""Of the peak that a large product reaches on a GeForce, which clocks higher than it is rated: the median of the 49
measurements in the table of cards. Others reach 0.77, the median of 30: what `MATMUL_SHARE` is near to."""
CREDIBLE_OF_PEAK = (0.42, 1.2)
"""Of the peak: a measurement beyond was of another card, another format, or of one that throttled. Of the table's 79
these leave out three."""
EMULATED_BF16 = 0.57
"""Of the float32 peak that a large product in bfloat16 reaches where it is emulated: the median of the table's eight
measurements, 0.30 to 0.66."""
ATTENTION_PER_FLOAT32 = 6.3
"""FLOP of fused attention in the time that its exponentials and masks take, which no tensor core computes, for each
FLOP of the card's float32 units: set on the last two rows of the A100's series. Of an RTX A5000's 66.9 TFLOP/s, forward
and backward, 16 x 1024 tokens, heads of 64 (https://github.com/gpu-mode/ring-attention/issues/10), it says 56.5."""
BANDWIDTH_SHARE_EAGER, BANDWIDTH_SHARE_COMPILED = 0.66, 0.86
"""Of the peak bandwidth: torch's own elementwise kernels, and Inductor's."""
CACHE_SPEEDUP = 2.5
"""Of kernels whose tensors all have room in the second-level cache, where the kernel before has left them. Set on an
RTX 4070 (36 MiB), 2 x 1024 tokens, uncompiled."""
TF32_OF_BF16 = 0.5
"""Peak of TF32 against bfloat16 on cards that have both (NVIDIA's architecture white papers)."""
LAUNCH_S = 2.5e-6
"""From one kernel's end to the next one's begin on the device."""
HOST_EAGER_S, HOST_COMPILED_S = 9e-6, 4e-6
"""Python and dispatch on the host for each kernel; the device waits if that takes longer than its own work."""
HOST_LINK = 12e9
"""Bytes/s between pinned host memory and the device: PCIe 3.0 x16 in practice, and half of 4.0's."""
HOST_MEMORY = 20e9
"""Bytes/s that a desktop's processor reads and writes in AdamW's update: half the peak of two channels of DDR4."""
UNKNOWN_TFLOPS, UNKNOWN_BANDWIDTH = 25e12, 300e9
"""For a card whose figures no source gives: an RTX 3060's."""


@dataclass(frozen=True)
class Rates:
    """Rates of a device, per second."""

    matmul: dict[str, float]
    """FLOP/s of matrix products by dtype."""
    attention: dict[str, float]
    bandwidth: float
    """Bytes/s."""
    cache_bytes: int = 0
    """Bytes of the second-level cache."""
    launch_s: float = LAUNCH_S
    host_s: float = 0.0
    """Per kernel."""
    has_host: bool = True
    """True if a host works beside the device; on the host itself everything is its own kernel."""
    cards: Cards | None = None
    """Cards that train together, for the time of their exchanges."""

    def seconds(self, kernel: Kernel) -> float:
        """Time of one kernel, wherever it runs."""
        if kernel.exchange and self.cards is not None:
            apart = kernel.stride >= self.cards.per_node
            return self.cards.exchange_s(kernel.exchange, kernel.nbytes, kernel.ranks, between_nodes=apart)
        if kernel.place == "link":
            return kernel.nbytes / 2 / HOST_LINK  # what is read here is written there
        if kernel.place == "host" and self.has_host:
            return kernel.nbytes / HOST_MEMORY
        peaks = self.attention if kernel.is_attention else self.matmul
        rate = peaks.get(kernel.dtype, peaks["float32"])
        bandwidth = self.bandwidth * (CACHE_SPEEDUP if kernel.nbytes <= self.cache_bytes else 1.0)
        return max(kernel.flops / rate, kernel.nbytes / bandwidth) + self.launch_s


def rates_of(gpu: GPU, *, compiled: bool, cards: Cards | None = None) -> Rates:
    """Rates of a card, by its peaks or, where one is published, by a measured matrix product."""
    float32 = gpu.peak_flops("float32") or UNKNOWN_TFLOPS / 2
    matmul = {
        "bfloat16": _product_flops(
            gpu, "bfloat16", gpu.measured_bf16_tflops, float32 * EMULATED_BF16 * MEASURED_MATMUL_SHARE
        ),
        "float16": _product_flops(gpu, "float16", gpu.measured_fp16_tflops, float32 * MATMUL_SHARE),
    }
    by_tf32 = matmul["bfloat16"] * TF32_OF_BF16 if gpu.native_bf16 else 0.0
    matmul["float32"] = max(float32 * MATMUL_SHARE, by_tf32)
    share = BANDWIDTH_SHARE_COMPILED if compiled else BANDWIDTH_SHARE_EAGER
    return Rates(
        matmul=matmul,
        attention={dtype: 1 / (1 / rate + 1 / (ATTENTION_PER_FLOAT32 * float32)) for dtype, rate in matmul.items()},
        bandwidth=(gpu.bandwidth_gbps * 1e9 if gpu.bandwidth_gbps else UNKNOWN_BANDWIDTH) * share,
        cache_bytes=gpu.cache_bytes or 0,
        host_s=HOST_COMPILED_S if compiled else HOST_EAGER_S,
        cards=cards,
    )


def _product_flops(gpu: GPU, dtype: str, measured_tflops: float | None, without_units: float) -> float:
    """Return the FLOP/s of a model's matrix products; `without_units` are those of a card without matrix units."""
    peak, measured = gpu.peak_flops(dtype), (measured_tflops or 0.0) * 1e12
    if peak is None:
        has_units = gpu.native_bf16 or (dtype == "float16" and gpu.capability >= (7, 0))
        if gpu.peak_flops("float32") is None and has_units:  # a card that the user described
            return UNKNOWN_TFLOPS * MATMUL_SHARE
        return measured * MEASURED_MATMUL_SHARE or without_units
    least, most = CREDIBLE_OF_PEAK
    if least * peak <= measured <= most * peak:
        return measured * MEASURED_MATMUL_SHARE
    if gpu.name.startswith("GeForce"):
        return peak * GEFORCE_OF_PEAK * MEASURED_MATMUL_SHARE
    return peak * MATMUL_SHARE


def host_rates(flops: dict[str, float], bandwidth: float) -> Rates:
    """Return the rates of this machine's processor from its measurements."""
    return Rates(matmul=flops, attention=flops, bandwidth=bandwidth, launch_s=0.0, has_host=False)


class Meter:
    """Count the kernels of a virtual device."""

    def __init__(self) -> None:
        self._heard: Counter[Kernel] = Counter()

    def __call__(self, kernel: Kernel) -> None:
        self._heard[kernel] += 1

    def repeat(self, work: "Work", times: int) -> None:
        """Count kernels that were heard as often again."""
        for kernel, count in work.kernels.items():
            self._heard[kernel] += count * times

    def read(self) -> "Work":
        """Return the kernels counted so far."""
        return Work(self._heard.copy())


@dataclass(frozen=True)
class Work:
    """Kernels of a part of a step, and how many of each."""

    kernels: Counter[Kernel] = field(default_factory=Counter)

    def __sub__(self, other: "Work") -> "Work":
        difference = self.kernels.copy()
        difference.subtract(other.kernels)
        return Work(Counter({kernel: count for kernel, count in difference.items() if count}))

    @property
    def launches(self) -> int:
        """Kernels in all."""
        return self.kernels.total()

    def seconds(self, rates: Rates) -> float:
        """Time of them all on a device of these rates."""
        on_device = sum(rates.seconds(kernel) * count for kernel, count in self.kernels.items())
        return max(0.0, on_device, self.launches * rates.host_s)

    def exchanges(self) -> "Work":
        """Return the exchanges between cards among these kernels."""
        return Work(Counter({kernel: count for kernel, count in self.kernels.items() if kernel.exchange}))

    def exchange_seconds(self, rates: Rates) -> float:
        """Time of all exchanges, one after another."""
        return max(0.0, sum(rates.seconds(kernel) * count for kernel, count in self.kernels.items()))

    def largest_s(self, rates: Rates, exchange: str) -> float:
        """Time of the longest exchange of one kind, 0 if there is none."""
        return max((rates.seconds(kernel) for kernel in self.kernels if kernel.exchange == exchange), default=0.0)

    def counts(self) -> "tuple[KernelCount, ...]":
        """Kernels and how many of each, as they cross a process or a file."""
        return tuple(KernelCount(kernel=kernel, count=count) for kernel, count in self.kernels.items())

    @classmethod
    def of(cls, counts: "Iterable[KernelCount]") -> "Work":
        """Work that `counts` wrote down."""
        return cls(Counter({each.kernel: each.count for each in counts}))


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Seconds of a step's parts."""

    pass_s: float
    """One forward and backward pass."""
    update_s: float
    """Clipping and the optimizer, and the time that the last pass needs longer to exchange gradients."""
    waiting_s: float = 0.0
    """Exchanges in a step of one pass that no computation hides."""


FORWARD_SHARE = 1 / 3
"""Share of a pass: backward has two matrix products for each one of forward."""


def step_time(one_pass: Work, update: Work, rates: Rates, *, overlaps: bool = True) -> StepParts:
    """Return the times of a pass and of an update.

    Cards exchange while they compute, if `overlaps`: DDP and FSDP2 do, and a sum of complete gradients after backward
    does not. Forward hides half of a pass's gatherings and backward the other half, with the sums of gradients that
    the last pass adds. No computation hides the first gathering and the last sum.
    """
    gathered, summed = one_pass.exchanges(), update.exchanges()
    if rates.cards is None or not (gathered.kernels or summed.kernels):
        return StepParts(pass_s=one_pass.seconds(rates), update_s=update.seconds(rates))
    compute, own = (one_pass - gathered).seconds(rates), (update - summed).seconds(rates)
    gather_s, sum_s = gathered.exchange_seconds(rates), summed.exchange_seconds(rates)
    if not overlaps:
        return StepParts(pass_s=compute + gather_s, update_s=own + sum_s, waiting_s=gather_s + sum_s)
    forward, backward = compute * FORWARD_SHARE, compute * (1 - FORWARD_SHARE)
    first = gathered.largest_s(rates, "all_gather")
    pass_s = max(forward, gather_s / 2) + max(backward, gather_s / 2) + first
    longer = max(backward, gather_s / 2 + sum_s) - max(backward, gather_s / 2)
    ends = sum(summed.largest_s(rates, kind) for kind in ("all_gather", "reduce_scatter", "all_reduce"))
    return StepParts(pass_s=pass_s, update_s=own + longer + ends, waiting_s=pass_s - compute + longer + ends)


class KernelCount(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Number of times that one kernel runs."""

    kernel: Kernel
    count: int
