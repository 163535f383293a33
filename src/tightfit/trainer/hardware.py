"""Choose the device, the number format and compilation of a run, each with its reason."""

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass

import torch

from tightfit.config import SampleConfig, TrainConfig
from tightfit.errors import DeviceError
from tightfit.gpus import find_gpu
from tightfit.system.cpuinfo import processor_flags
from tightfit.vgpu.lazy_dynamo import keep_dynamo_out
from tightfit.wording import say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The choice for one process."""

    device: torch.device
    dtype: torch.dtype
    """Number format of matrix products under autocast."""
    compile: bool
    reasons: tuple[str, ...]
    """A line for each choice that the user left open or that could not be met."""

    def autocast(self) -> torch.autocast:
        """Return the context in which a forward pass runs; it does nothing for float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of the device at best in this format, or None where no source gives them."""
        if self.device.type != "cuda":
            return None
        gpu = find_gpu(torch.cuda.get_device_name(self.device))
        return gpu.peak_flops(str(self.dtype).removeprefix("torch.")) if gpu else None


def choose_hardware(config: TrainConfig | SampleConfig, *, local_rank: int = 0, local_size: int = 1) -> Hardware:
    """Choose for process `local_rank` of `local_size` on this machine; DeviceError if the device does not exist."""
    device, why_device = _device(config.device, local_rank, local_size)
    dtype, why_dtype = _dtype(config.dtype, device)
    compiled, why_compile = _compile(config.compile, device)
    choices = (
        ("device", device, why_device),
        ("dtype", str(dtype).removeprefix("torch."), why_dtype),
        ("compile", compiled, why_compile),
    )
    reasons = tuple(say("trainer.hardware.choice", key=key, value=value, why=why) for key, value, why in choices if why)
    return Hardware(device=device, dtype=dtype, compile=compiled, reasons=reasons)


def set_process_options(hardware: Hardware, *, activation_memory_budget: float = 1.0) -> None:
    """Set torch's options of the whole process: the current card, TF32, what compiled steps keep and specialize."""
    if hardware.device.type == "cuda":
        torch.cuda.set_device(hardware.device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32, as nanoGPT
    if not hardware.compile:
        keep_dynamo_out()  # optimizers load it for a handful of names, which takes a second
    else:
        from torch._dynamo import config as dynamo  # only here: the import takes seconds
        from torch._functorch import config as functorch

        functorch.activation_memory_budget = activation_memory_budget  # read when something is compiled
        dynamo.specialize_float = True  # the loss's factor stays; as an input it would be a tensor of the host


def _device(wanted: str, local_rank: int, local_size: int) -> tuple[torch.device, str]:
    """Return the device and, where it was chosen here, the reason."""
    why = ""
    if wanted == "auto":
        if torch.cuda.is_available():
            wanted, why = "cuda", say("trainer.hardware.has_cuda")
        elif torch.backends.mps.is_available():
            wanted, why = "mps", say("trainer.hardware.has_mps")
        else:
            wanted, why = "cpu", say("trainer.hardware.has_no_gpu")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(say("trainer.hardware.no_mps"))
    if not wanted.startswith("cuda"):
        return torch.device(wanted), why
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        is_cpu_build = torch.version.cuda is None
        raise DeviceError(
            say("trainer.hardware.no_cuda_build" if is_cpu_build else "trainer.hardware.no_cuda", device=wanted)
        )
    index = local_rank if wanted == "cuda" or local_size > 1 else int(wanted.removeprefix("cuda:"))
    if index >= count:
        raise DeviceError(say("trainer.hardware.no_such_card", index=index, count=count))
    return torch.device("cuda", index), why


def _dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the number format and, where it was chosen or criticized here, the reason."""
    if device.type == "cuda":
        return _dtype_on_cuda(wanted, torch.cuda.get_device_capability(device))
    if device.type == "mps":
        return (torch.float32, say("trainer.hardware.float32_on_mps")) if wanted == "auto" else (DTYPES[wanted], "")
    if wanted == "float32":
        return torch.float32, ""
    if wanted == "float16":
        return torch.float32, say("trainer.hardware.float16_is_slow_on_cpu")
    if flag := native_bfloat16():
        return torch.bfloat16, say("trainer.hardware.bfloat16_on_cpu", flag=flag) if wanted == "auto" else ""
    return torch.float32, say("trainer.hardware.no_bfloat16_on_cpu")


def _dtype_on_cuda(wanted: str, capability: tuple[int, int]) -> tuple[torch.dtype, str]:
    has = "{}.{}".format(*capability)
    is_native = capability >= (8, 0)
    if wanted == "auto" and is_native:
        return torch.bfloat16, say("trainer.hardware.bfloat16_on_cuda", capability=has)
    if wanted == "auto":
        return torch.float16, say("trainer.hardware.float16_on_cuda", capability=has)
    is_slow = wanted == "bfloat16" and not is_native
    return DTYPES[wanted], say("trainer.hardware.bfloat16_is_slow_on_cuda", capability=has) if is_slow else ""


def native_bfloat16() -> str:
    """Return the processor's feature that multiplies bfloat16 matrices, or an empty string."""
    if not torch.backends.mkldnn.is_available():
        return ""
    flags = processor_flags()
    return next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags), "")


def _compile(wanted: bool | str, device: torch.device) -> tuple[bool, str]:
    """Return True to compile and, where it was decided here, the reason."""
    if wanted is False:
        return False, ""
    obstacle = compile_obstacle(device)
    if wanted is True:
        if device.type == "cpu" and obstacle:
            raise DeviceError(say("trainer.hardware.cannot_compile", obstacle=obstacle))
        return True, ""
    if device.type == "cpu":
        return False, say("trainer.hardware.compile_gains_little")
    if obstacle:
        return False, say("trainer.hardware.compile_fails", obstacle=obstacle)
    return True, say("trainer.hardware.compile_gains")


def compile_obstacle(device: torch.device) -> str:
    """Return the reason why torch.compile does not work on this device; empty if it does."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return say("trainer.hardware.no_triton")
        too_old = torch.cuda.get_device_capability(device) < (7, 0)
        return say("trainer.hardware.too_old_for_triton") if too_old else ""
    if device.type == "cpu":
        names = ["cl"] if platform.system() == "Windows" else ["g++", "clang++", "c++"]
        found = any(map(shutil.which, filter(None, [os.environ.get("CXX"), *names])))
        return "" if found else say("trainer.hardware.no_compiler")
    return say("trainer.hardware.no_compiling_on", device=device.type)
