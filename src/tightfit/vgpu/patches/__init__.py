"""Every assignment onto torch, and onto Python's own functions, that the virtual GPU makes."""

import os

from tightfit.gpus import GPU
from tightfit.vgpu import batch_norm, recurrent, shape_functions
from tightfit.vgpu.card_properties import watched
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches import (
    backend,
    bitsandbytes_library,
    checkpoints,
    cuda_api,
    host,
    nvml_module,
    pipeline_stages,
    process_groups,
    torchvision_operators,
    triton_kernels,
)
from tightfit.vgpu.patches.files import FileGuard
from tightfit.wording import say


def install(device: VirtualDevice, gpu: GPU | None = None, *, guards_files: bool = True, rank: int = 0) -> FileGuard:
    """Make this process's CUDA device a virtual `gpu` for good, and return the guard that keeps its files.

    `rank` is the process of a distributed run that is played.
    The guard does nothing where `guards_files` is False, as something else keeps the files.
    Without a `gpu`, for a trace of training on the processor, only fake tensors change. DeviceError where this torch
    cannot be patched.
    """
    files = FileGuard(device.not_written, is_needed=guards_files)
    if gpu is None:
        backend.answer_for_fake_tensors()
        return files
    backend.enable()
    processes = process_groups.prepare_environment(os.environ)
    cuda_api.install(device, gpu, count=processes)
    card = cuda_api.properties(gpu, device.recorder.allocator.total_bytes)
    nvml_module.install(device, card)
    seen = watched(card, device.answers)
    triton_kernels.install(device, seen)
    shape_functions.install(device)
    torchvision_operators.install()
    bitsandbytes_library.install()
    batch_norm.install()
    recurrent.install(device)
    process_groups.install(device, rank)
    pipeline_stages.install()
    if processes > 1:
        device.note(say("vgpu.patches.nccl"))
    checkpoints.install(device, files)
    files.install()
    host.install(device, seen)
    return files
