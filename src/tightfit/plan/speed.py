"""How long a step takes: each kernel by the card's peaks, and the time that the host needs to launch them.

The shares of the peaks were set on one published series: GPT-2 124M, 16 x 1024 tokens, bfloat16 on an A100 SXM 40 GB
(A. Karpathy, "Let's reproduce GPT-2 (124M)"): 300 ms a step, 130 with torch.compile, 96 with flash attention too, 93
with a vocabulary of 50304. benchmarks/plan/speed.py prints what this model says: within 6% of each, and of a figure
for an RTX 4090 that it was not set on.
"""

from dataclasses import dataclass

from tightfit.gpus import GPU
from tightfit.vgpu.work import Kernel

MATMUL_SHARE, MEASURED_MATMUL_SHARE = 0.75, 0.9
"""Of the peak, and of a measured large product, that matrix products reach in a model."""
GEFORCE_OF_PEAK = 1.06
"""Of the peak that a large product reaches on a GeForce, which clocks higher than it is rated: the median of the 49
measurements in the table of cards. Others reach 0.77, the median of 30: what `MATMUL_SHARE` is near to."""
ATTENTION_SHARE = 0.55
"""Of that, what fused attention reaches in forward and backward together."""
BANDWIDTH_SHARE_EAGER, BANDWIDTH_SHARE_COMPILED = 0.66, 0.86
"""Of the peak bandwidth: torch's own elementwise kernels, and Inductor's."""
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
    """What a device does in a second."""

    matmul: dict[str, float]
    """FLOP/s of matrix products by dtype."""
    attention: dict[str, float]
    bandwidth: float
    """Bytes/s."""
    launch_s: float = LAUNCH_S
    host_s: float = 0.0
    """Per kernel."""
    has_host: bool = True
    """Whether a host works beside the device; on the host itself everything is a kernel of its own."""

    def seconds(self, kernel: Kernel) -> float:
        """Time of one kernel, wherever it runs."""
        if kernel.place == "link":
            return kernel.nbytes / 2 / HOST_LINK  # what is read here is written there
        if kernel.place == "host" and self.has_host:
            return kernel.nbytes / HOST_MEMORY
        peaks = self.attention if kernel.is_attention else self.matmul
        rate = peaks.get(kernel.dtype, peaks["float32"])
        return max(kernel.flops / rate, kernel.nbytes / self.bandwidth) + self.launch_s


def rates_of(gpu: GPU, *, compiled: bool) -> Rates:
    """Rates of a card, by its peaks or, where one is published, by a measured matrix product."""
    matmul = {}
    for dtype, measured in (("bfloat16", gpu.measured_bf16_tflops), ("float16", gpu.measured_fp16_tflops)):
        peak = gpu.peak_flops(dtype)
        if measured is None and peak and gpu.name.startswith("GeForce"):
            measured = peak / 1e12 * GEFORCE_OF_PEAK
        matmul[dtype] = measured * 1e12 * MEASURED_MATMUL_SHARE if measured else (peak or UNKNOWN_TFLOPS) * MATMUL_SHARE
    float32 = (gpu.peak_flops("float32") or UNKNOWN_TFLOPS / 2) * MATMUL_SHARE
    matmul["float32"] = max(float32, matmul["bfloat16"] * TF32_OF_BF16) if gpu.native_bf16 else float32
    share = BANDWIDTH_SHARE_COMPILED if compiled else BANDWIDTH_SHARE_EAGER
    return Rates(
        matmul=matmul,
        attention={dtype: rate * ATTENTION_SHARE for dtype, rate in matmul.items()},
        bandwidth=(gpu.bandwidth_gbps * 1e9 if gpu.bandwidth_gbps else UNKNOWN_BANDWIDTH) * share,
        host_s=HOST_COMPILED_S if compiled else HOST_EAGER_S,
    )


def host_rates(flops: dict[str, float], bandwidth: float) -> Rates:
    """Rates of this machine's processor, from what was measured on it."""
    return Rates(matmul=flops, attention=flops, bandwidth=bandwidth, launch_s=0.0, has_host=False)


class Meter:
    """Adds up the time of what an observer hears."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self.device_s = 0.0
        self.flops = 0
        self.nbytes = 0
        self.kernels = 0

    def __call__(self, kernel: Kernel) -> None:
        self.device_s += self._rates.seconds(kernel)
        self.flops += kernel.flops
        self.nbytes += kernel.nbytes
        self.kernels += 1

    def read(self) -> "Work":
        """What was added up so far."""
        return Work(
            seconds=max(self.device_s, self.kernels * self._rates.host_s),
            flops=self.flops,
            nbytes=self.nbytes,
            kernels=self.kernels,
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a part of a step."""

    seconds: float
    flops: int
    nbytes: int
    kernels: int

    def __sub__(self, other: "Work") -> "Work":
        return Work(
            seconds=self.seconds - other.seconds,
            flops=self.flops - other.flops,
            nbytes=self.nbytes - other.nbytes,
            kernels=self.kernels - other.kernels,
        )
