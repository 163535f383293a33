# ruff: noqa: E501 - messages stand here as they are printed, on one line
"""Writes out-of-memory messages as PyTorch and others print them, with random figures, and the surroundings of pastes.

Written from the list of formats, not from the patterns that read them: `truth` is what a reader must find.
"""

import json
import random
import textwrap
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 2**10, "MB": 2**20, "GB": 2**30}


@dataclass
class Written:
    text: str
    kind: str
    truth: dict[str, Any] = field(default_factory=dict)
    """By the names of the properties of Facts."""


class Sizes:
    """Prints random sizes and remembers what they are exactly."""

    def __init__(self, rng: random.Random, truth: dict[str, Any]) -> None:
        self.rng, self.truth = rng, truth

    def __call__(
        self, name: str | None, *, units: tuple[str, ...] = ("MiB", "GiB", "GiB", "GiB"), zero: float = 0.05
    ) -> str:
        text = self._text(units, zero)
        if name:
            self.truth[name] = exact(text)
        return text

    def _text(self, units: tuple[str, ...], zero: float) -> str:
        if self.rng.random() < zero:
            return "0 bytes"
        unit = self.rng.choice((*units, units[0]))
        if self.rng.random() < 0.05:
            unit = "KiB" if "i" in unit else "KB"
        if self.rng.random() < 0.03:
            return f"{self.rng.randrange(1, 1025)} bytes"
        top = 1024 if unit[0] in "KM" else 190
        return f"{self.rng.randrange(1, top)}.{self.rng.randrange(100):02d} {unit}"


def exact(text: str) -> int:
    number, unit = text.split()
    return int((Decimal(number) * UNITS[unit]).to_integral_value(ROUND_HALF_UP))


MAX_SPLIT = "If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation.  See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF"
DOC_OLD = "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
DOC_NEW = "(https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"


def write(form: str, rng: random.Random) -> Written:
    """A message of one of FORMS."""
    truth: dict[str, Any] = {}
    size = Sizes(rng, truth)
    index = rng.randrange(8)
    if form in ("T1", "T2", "T3", "hip_old", "npu", "xpu_old"):
        return _old(form, rng, size, truth, index)
    if form in ALLOCATOR_FORMS and form not in ("async", "mps"):
        return _new(form, rng, size, truth, index)
    return _other(form, rng, size, truth, index)


def _old(form: str, rng: random.Random, size: Sizes, truth: dict[str, Any], index: int) -> Written:
    backend = {"hip_old": "HIP", "npu": "NPU", "xpu_old": "XPU"}.get(form, "CUDA")
    unit = "NPU" if form == "npu" else "GPU"
    truth["device_index"] = index
    asked = size("requested_bytes")
    parts = [
        f"{size('total_bytes', units=('GiB',), zero=0)} total capacity",
        f"{size('allocated_bytes')} already allocated",
    ]
    if form == "npu":
        parts.append(f"{size(None)} current active")
    if form != "xpu_old":
        parts.append(f"{size('free_bytes')} free")
    if form == "T1":
        parts.append(f"{size('unallocated_bytes')} cached")
    else:
        if rng.random() < 0.2 and form in ("T2", "T3"):
            parts.append(f"{size('allowed_bytes')} allowed")
        parts.append(f"{size('reserved_bytes')} reserved in total by PyTorch")
    text = f"{backend} out of memory. Tried to allocate {asked} ({unit} {index}; {'; '.join(parts)})"
    name = "RuntimeError"
    if form in ("T3", "hip_old"):
        name = rng.choice(("RuntimeError", "torch.cuda.OutOfMemoryError"))
        text += " " + MAX_SPLIT
    truth["torch_format"] = {"T1": "T1", "T2": "T2", "T3": "T3", "hip_old": "T3"}.get(form)
    return Written(f"{name}: {text}", f"{backend.lower()}_out_of_memory", truth)


def _new(form: str, rng: random.Random, size: Sizes, truth: dict[str, Any], index: int) -> Written:
    backend = {"hip": "HIP", "xpu": "XPU"}.get(form, "CUDA")
    head = "Out of memory" if form == "T9" else f"{backend} out of memory"
    word = "capacty" if form == "T4" else "capacity"
    text = f"{head}. Tried to allocate {size('requested_bytes')}. GPU "
    if form == "T5b":
        index = rng.randrange(1, 8)
        # The byte, as a terminal's log file has it, or lost, as in a paste.
        text += chr(index) if rng.random() < 0.5 else ""
        truth["device_index"] = index if text.endswith(chr(index)) else None
    else:
        text += str(index)
        truth["device_index"] = index
    text += f" has a total {word} of {size('total_bytes', units=('GiB',), zero=0)}"
    text += f" of which {size('free_bytes')} is free. " if form != "xpu" or rng.random() < 0.5 else ". "
    truth["other_processes"] = []
    if form not in ("hip", "xpu"):
        for _ in range(rng.choice((0, 0, 1, 2, 3))):
            pid, used = rng.randrange(1, 4_000_000), size(None)
            truth["other_processes"].append((pid, exact(used)))
            text += f"Process {pid} has {used} memory in use. "
        if rng.random() < 0.8:
            text += f"Including non-PyTorch memory, this process has {size('process_bytes')} memory in use. "
    if rng.random() < 0.2 and form not in ("hip", "xpu"):
        text += f"{size('allowed_bytes')} allowed; "
    text += f"Of the allocated memory {size('allocated_bytes')} is allocated by PyTorch, "
    private = form in ("T6", "T7", "T8") and rng.random() < 0.5
    if private:
        text += f"with {size('private_pool_bytes')} allocated in private pools (e.g., CUDA Graphs), "
    text += f"and {size('unallocated_bytes')} is reserved by PyTorch but unallocated. "
    variable = {"T7": "PYTORCH_ALLOC_CONF", "hip": "PYTORCH_HIP_ALLOC_CONF"}.get(form, "PYTORCH_CUDA_ALLOC_CONF")
    if form == "T4":
        text += "If reserved but unallocated memory is large try setting max_split_size_mb to avoid fragmentation.  See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF"
    elif form == "xpu":
        text += "Please use `empty_cache` to release all unoccupied cached memory."
    else:
        text += f"If reserved but unallocated memory is large try setting {variable}=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  {DOC_NEW if form == 'T8' else DOC_OLD}"
    name = "torch.cuda.OutOfMemoryError" if form in ("T4", "T5", "T5b") else "torch.OutOfMemoryError"
    truth["torch_format"] = {"hip": "T6", "xpu": None}.get(form, form)
    kind = "device_out_of_memory" if form == "T9" else f"{backend.lower()}_out_of_memory"
    return Written(f"{name}: {text}", kind, truth)


def _other(form: str, rng: random.Random, size: Sizes, truth: dict[str, Any], index: int) -> Written:
    if form == "async":
        truth["device_index"] = index
        return Written(
            f"torch.OutOfMemoryError: Allocation on device {index} would exceed allowed memory. (out of memory)\n"
            f"Currently allocated     : {size('allocated_bytes')}\nRequested               : {size('requested_bytes')}\n"
            f"Device limit            : {size('total_bytes', units=('GiB',), zero=0)}\nFree (according to CUDA): {size('free_bytes')}\n"
            "PyTorch limit (set by user-supplied memory fraction)\n                        : 17179869184.00 GiB",
            "cuda_async", truth | {"allowed_bytes": 2**64},
        )  # fmt: skip
    if form == "mps":
        units = rng.choice((("MB", "GB", "GB"), ("MiB", "GiB", "GiB")))
        return Written(
            f"RuntimeError: MPS backend out of memory (MPS allocated: {size('allocated_bytes', units=units)}, other allocations: "
            f"{size('outside_pytorch_bytes', units=units)}, max allowed: {size('allowed_bytes', units=units)}). Tried to allocate "
            f"{size('requested_bytes', units=units)} on {rng.choice(('private', 'shared'))} pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 "
            "to disable upper limit for memory allocations (may cause system failure).",
            "mps_out_of_memory", truth,
        )  # fmt: skip
    count, other = rng.randrange(1, 2**40), rng.randrange(1, 300_000)
    plain = {
        "T0": ("RuntimeError: cuda runtime error (2) : out of memory at /pytorch/torch/lib/THC/generic/THCStorage.cu:58", "cuda_driver", {"torch_format": "T0"}),
        "T0old": ("RuntimeError: cuda runtime err(2) : out of memory at /data/torch/lib/THC/THCStorage.cu:66", "cuda_driver", {"torch_format": "T0"}),
        "driver": ("RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call", "cuda_driver", {}),
        "accelerator": ("torch.AcceleratorError: CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com", "cuda_driver", {}),
        "cudaMalloc": (f"ggml_backend_cuda_buffer_type_alloc_buffer: allocating {count % 90000}.50 MiB on device {index}: cudaMalloc failed: out of memory", "cuda_driver", {"device_index": index, "requested_bytes": exact(f"{count % 90000}.50 MiB")}),
        "cublas": ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "cublas", {}),
        "cublas_init": ("RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "cublas", {}),
        "cudnn": ("RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cudnn", {}),
        "nccl": ("torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:219, unhandled cuda error, NCCL version 2.19.3\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'", "nccl", {}),
        "nvml": ('RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830, please report a bug to PyTorch.', "nvml_assert", {}),
        "handles": ('RuntimeError: !handles_.at(i) INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":396, please report a bug to PyTorch.', "expandable_segments_assert", {}),
        "triton": (f"triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: {other}, Hardware limit: 101376. Reducing block sizes or `num_stages` may help.", "triton_resources", {"requested_bytes": other, "allowed_bytes": 101376}),
        "cpu": (f"RuntimeError: [enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate {count} bytes. Error code 12 (Cannot allocate memory)", "host_allocator", {"requested_bytes": count}),
        "cpu_windows": (f"RuntimeError: [enforce fail at C:\\cb\\c10\\core\\impl\\alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried to allocate {count} bytes.", "host_allocator", {"requested_bytes": count}),
        "numpy": (f"numpy.core._exceptions._ArrayMemoryError: Unable to allocate {other % 90 + 1}.{other % 10} GiB for an array with shape (9, 99) and data type float64", "host_numpy", {"requested_bytes": exact(f"{other % 90 + 1}.{other % 10} GiB")}),
        "killed": ("Killed", "host_killed", {}),
        "exit137": ("Process finished with exit code 137 (interrupted by signal 9: SIGKILL)", "host_killed", {}),
        "oomkill": (f"[12345.678901] Out of memory: Killed process {other} (python) total-vm:99999999kB, anon-rss:{other}kB, file-rss:0kB", "host_killed", {"pid": other, "process_bytes": other * 1024}),
        "slurm": ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=123.batch. Some of your processes may have been killed by the cgroup out-of-memory handler.", "host_killed", {}),
        "worker": (f"RuntimeError: DataLoader worker (pid {other}) is killed by signal: Killed. ", "dataloader_killed", {"pid": other}),
        "shm": (f"RuntimeError: DataLoader worker (pid {other}) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit.", "shared_memory", {"pid": other}),
        "bus": ("ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).", "shared_memory", {}),
        "windows": ("OSError: The paging file is too small for this operation to complete. (os error 1455)", "windows_commit_limit", {}),
        "windows_zh": ("OSError: [WinError 1455] 页面文件太小，无法完成操作。 Error loading \"D:\\torch\\lib\\cufft64_10.dll\"", "windows_commit_limit", {}),
    }  # fmt: skip
    text, kind, known = plain[form]
    return Written(text, kind, truth | known)


ALLOCATOR_FORMS = (
    "T1", "T2", "T3", "T4", "T5", "T5b", "T6", "T7", "T8", "T9", "hip", "hip_old", "xpu", "xpu_old", "npu", "async", "mps",
)  # fmt: skip
PLAIN_FORMS = (
    "T0", "T0old", "driver", "accelerator", "cudaMalloc", "cublas", "cublas_init", "cudnn", "nccl", "nvml", "handles", "triton",
    "cpu", "cpu_windows", "numpy", "killed", "exit137", "oomkill", "slurm", "worker", "shm", "bus", "windows", "windows_zh",
)  # fmt: skip
FORMS = ALLOCATOR_FORMS + PLAIN_FORMS

TRACEBACK = """Traceback (most recent call last):
  File "/home/me/nanoGPT/train.py", line 300, in <module>
    scaler.scale(loss).backward()
  File "/opt/conda/lib/python3.11/site-packages/torch/_tensor.py", line 581, in backward
    torch.autograd.backward(
  File "/opt/conda/lib/python3.11/site-packages/torch/autograd/__init__.py", line 347, in backward
    _engine_run_backward("""


def plain(text: str, rng: random.Random) -> str:
    return text


def traceback(text: str, rng: random.Random) -> str:
    return f"step 0: train loss 10.9, val loss 10.9\n{TRACEBACK}\n{text}\n"


def ranks(text: str, rng: random.Random) -> str:
    """Rank 1 fails; rank 0's lines stand between."""
    lines = f"{TRACEBACK}\n{text}".split("\n")
    return "\n".join(f"[rank1]: {line}\n[rank0]: iter {number} waits" for number, line in enumerate(lines))


def timestamps(text: str, rng: random.Random) -> str:
    return "\n".join(
        f"2025-03-0{rng.randrange(1, 9)} 12:30:{n % 60:02d},123 - ERROR - {line}"
        for n, line in enumerate(f"{TRACEBACK}\n{text}".split("\n"))
    )


def iso(text: str, rng: random.Random) -> str:
    return "\n".join(f"2025-03-01T10:00:{n % 60:02d}.123456Z {line}" for n, line in enumerate(text.split("\n")))


def colours(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    at = rng.randrange(len(words))
    words[at] = f"\x1b[1;31m{words[at]}\x1b[0m"
    return "\x1b[2J\x1b]0;title\x07" + " ".join(words)


def wrapped(text: str, rng: random.Random) -> str:
    """A terminal cuts lines anywhere."""
    width = rng.choice((60, 80, 100, 120))
    return "\n".join(line[at : at + width] for line in text.split("\n") for at in range(0, max(len(line), 1), width))


def wrapped_rank(text: str, rng: random.Random) -> str:
    return "\n".join(f"[rank3]: {line}" for line in wrapped(text, rng).split("\n"))


def indented(text: str, rng: random.Random) -> str:
    return "\n    ".join(wrapped(text, rng).split("\n"))


def fenced(text: str, rng: random.Random) -> str:
    return f"When I train I get this error:\n```\n{text}\n```\nWhat can I do? If you know please help.\n"


def quoted(text: str, rng: random.Random) -> str:
    return "> > I see\n" + "\n".join(f"> > {line}" for line in text.split("\n"))


def chinese(text: str, rng: random.Random) -> str:
    return f"训练到第二轮的时候报错，请问怎么解决？\n{text}\n显存明明够用。"


def japanese(text: str, rng: random.Random) -> str:
    return f"学習を始めると次のエラーが出ます。\n\n{text}\n\nどうすればよいでしょうか。"


def windows(text: str, rng: random.Random) -> str:
    return f"{TRACEBACK}\n{text}\n".replace("\n", "\r\n")


def as_json(text: str, rng: random.Random) -> str:
    return json.dumps({"level": "error", "stream": "stderr", "message": f"{TRACEBACK}\n{text}\n"})


def entities(text: str, rng: random.Random) -> str:
    return (
        "<pre>"
        + text.replace("&", "&amp;").replace(">", "&gt;").replace('"', "&quot;").replace("'", "&#39;")
        + "\n</pre>"
    )


def framed(text: str, rng: random.Random) -> str:
    return (
        "\n".join(f"│ {line:<60} │" for line in textwrap.wrap(text, 60))
        if "\n" not in text and len(text) > 200
        else text
    )


def bold(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    return " ".join(f"**{word}**" if "." in word and word[0].isdigit() else word for word in words)


def consequences(text: str, rng: random.Random) -> str:
    return (
        f"{TRACEBACK}\n{text}\nE0101 12:00:00.000000 1 torch/distributed/elastic/multiprocessing/api.py:826] failed (exitcode: 1) "
        "local_rank: 0 (pid: 71) of binary: /usr/bin/python\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    )


SURROUNDINGS = (
    plain, traceback, ranks, timestamps, iso, colours, wrapped, wrapped_rank, indented, fenced, quoted, chinese, japanese, windows,
    as_json, entities, framed, bold, consequences,
)  # fmt: skip
LINE_BOUND = ("killed",)
"""Forms that are a whole line by themselves."""
