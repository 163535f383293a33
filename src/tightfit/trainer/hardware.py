"""Where a run computes, in which number format, compiled or not: every choice with its reason."""

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from tightfit.config import SampleConfig, TrainConfig
from tightfit.errors import DeviceError
from tightfit.gpus import find_gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What was chosen."""

    device: torch.device
    dtype: torch.dtype
    """Of matrix products under autocast."""
    compile: bool
    reasons: tuple[str, ...]
    """A line for each choice that the user left open or that could not be met."""

    def autocast(self) -> torch.autocast:
        """The context in which a forward pass runs; does nothing for float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that the device could do at best in this format, or None where no source says."""
        if self.device.type != "cuda":
            return None
        gpu = find_gpu(torch.cuda.get_device_name(self.device))
        return gpu.peak_flops(str(self.dtype).removeprefix("torch.")) if gpu else None


def choose_hardware(config: TrainConfig | SampleConfig, *, local_rank: int = 0, local_size: int = 1) -> Hardware:
    """The device for process `local_rank` of `local_size` on this machine; DeviceError if it is not there."""
    device, why_device = _device(config.device, local_rank, local_size)
    dtype, why_dtype = _dtype(config.dtype, device)
    compiled, why_compile = _compile(config.compile, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32, as nanoGPT
    reasons = tuple(
        f"{key}: {value}, {why}"
        for key, value, why in (
            ("device", device, why_device),
            ("dtype", str(dtype).removeprefix("torch."), why_dtype),
            ("compile", compiled, why_compile),
        )
        if why
    )
    return Hardware(device=device, dtype=dtype, compile=compiled, reasons=reasons)


def _device(wanted: str, local_rank: int, local_size: int) -> tuple[torch.device, str]:
    why = ""
    if wanted == "auto":
        if torch.cuda.is_available():
            wanted, why = "cuda", "because this machine has one"
        elif torch.backends.mps.is_available():
            wanted, why = "mps", "because this machine has no CUDA device but Apple's GPU"
        else:
            wanted, why = "cpu", "because torch finds no GPU here"
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device=mps is Apple's GPU, which is not available here; use --device=cpu")
    if not wanted.startswith("cuda"):
        return torch.device(wanted), why
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise DeviceError(f"device={wanted}, but {build}; use --device=cpu, or install a CUDA build and driver")
    index = local_rank if wanted == "cuda" or local_size > 1 else int(wanted.removeprefix("cuda:"))
    if index >= count:
        raise DeviceError(f"device cuda:{index} does not exist: there are {count}, from cuda:0; use fewer processes")
    torch.cuda.set_device(index)
    return torch.device("cuda", index), why


def _dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        has = f"compute capability {major}.{minor}"
        if wanted == "auto":
            if major >= 8:
                return torch.bfloat16, f"because {has} computes it natively (8.0 and up)"
            return (
                torch.float16,
                f"with gradient scaling, because {has} only emulates bfloat16 (native from 8.0)",
            )
        if wanted == "bfloat16" and major < 8:
            return torch.bfloat16, f"as asked, but {has} only emulates it; dtype=float16 is many times faster"
        return DTYPES[wanted], ""
    if device.type == "mps":
        return (torch.float32, "nanoGPT's choice on mps") if wanted == "auto" else (DTYPES[wanted], "")
    if wanted == "float32":
        return torch.float32, ""
    if wanted == "float16":
        return torch.float32, "because no processor trains in float16 at speed"
    flag = native_bfloat16()
    if flag:
        return (
            torch.bfloat16,
            f"because this processor computes it natively ({flag})" if wanted == "auto" else "",
        )
    return torch.float32, "because this processor has no bfloat16 instructions"


def native_bfloat16() -> str:
    """The processor feature that multiplies bfloat16 matrices, or an empty string."""
    if not torch.backends.mkldnn.is_available():
        return ""
    flags = _processor_flags()
    return next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags), "")


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()  # not Linux: macOS and Windows builds of torch have no fast bfloat16 for processors
    return next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.lower().startswith(("flags", "features"))),
        set(),
    )


def _compile(wanted: bool | str, device: torch.device) -> tuple[bool, str]:
    if wanted is False:
        return False, ""
    obstacle = compile_obstacle(device)
    if wanted is True:
        if device.type == "cpu" and obstacle:
            raise DeviceError(f"compile=True cannot be had here: {obstacle}; use --no-compile")
        return True, ""
    if device.type == "cpu":
        return False, "because on processors it gains 0 to 4% and costs a minute and memory"
    return (False, f"because {obstacle}") if obstacle else (True, "because it makes training on CUDA faster")


def compile_obstacle(device: torch.device) -> str:
    """Why torch.compile does not work on this device; empty if it does."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton, which torch.compile needs on CUDA, is not installed"
        too_old = torch.cuda.get_device_capability(device) < (7, 0)
        return "triton needs compute capability 7.0" if too_old else ""
    if device.type == "cpu":
        return "" if _has_compiler() else "torch.compile needs a C++ compiler for processors, and none is found"
    return f"it is not dependable on {device.type}"


def _has_compiler() -> bool:
    candidates = [os.environ.get("CXX", "")] + (["cl"] if platform.system() == "Windows" else ["g++", "clang++", "c++"])
    folders = os.environ.get("PATH", "").split(os.pathsep)
    names = [name + end for name in candidates if name for end in ("", ".exe")]
    return any((Path(folder) / name).is_file() for folder in folders for name in names)
