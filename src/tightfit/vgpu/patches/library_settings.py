"""Settings of `torch.backends.cuda` and PyTorch's profilers on the virtual GPU.

Torch's own ask the driver where it was built with CUDA, and refuse where it was not.
"""

import math
import os
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.autograd.profiler as autograd_profiler
from torch.backends.cuda import SDPAParams

from tightfit.kernels.blas import cublas_bytes, cublaslt_bytes
from tightfit.kernels.fused_attention import choose_attention
from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice

_PLANS = 4096
"""Plans that the cache of cuFFT keeps by default (`CuFFTPlanCache.h`)."""
_CUBLAS, _CUBLASLT = "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"


def install(device: VirtualDevice) -> None:
    """Patch this process for good."""
    _install_libraries()
    _install_workspaces(device)
    _install_attention(device)
    _install_profilers()


def _install_libraries() -> None:
    """Keep the libraries that a script prefers, and the size of its cache of plans, which stays empty."""
    preferred = {"linalg": torch._C._LinalgBackend.Default, "blas": torch._C._BlasBackend.Cublas}
    for kind in preferred:
        assign(
            torch._C,
            **{
                f"_get_{kind}_preferred_backend": lambda kind=kind: preferred[kind],
                f"_set_{kind}_preferred_backend": lambda backend, kind=kind: preferred.update({kind: backend}),
            },
        )
    plans: Any = torch.backends.cuda.cuFFTPlanCache  # torch's annotations have properties there
    assign(plans, size=0, max_size=_PLANS, clear=lambda self: None)


def _install_workspaces(device: VirtualDevice) -> None:
    """Read and set the sizes of cuBLAS's workspaces, from torch 2.15, as the variables that also set them."""

    def set_size(size: int) -> None:
        os.environ[_CUBLAS] = f":{math.ceil(size / 1024)}:1"

    def set_size_of_lt(size: int) -> None:
        os.environ[_CUBLASLT] = str(math.ceil(size / 1024))

    assign(
        torch._C,
        _cuda_getCublasWorkspaceSize=lambda: device.answers.ask(lambda card: cublas_bytes(card, os.environ)),
        _cuda_setCublasWorkspaceSize=set_size,
        _cuda_resetCublasWorkspaceSize=lambda: os.environ.pop(_CUBLAS, None),
        _cuda_getCublasLtWorkspaceSize=lambda: cublaslt_bytes(os.environ),
        _cuda_setCublasLtWorkspaceSize=set_size_of_lt,
        _cuda_resetCublasLtWorkspaceSize=lambda: os.environ.pop(_CUBLASLT, None),
    )


def _install_attention(device: VirtualDevice) -> None:
    """Tell which kernels of attention the card has for a call: `torch.backends.cuda.can_use_flash_attention`."""

    def can_use(kernel: str) -> Callable[[SDPAParams, bool], bool]:
        def answer(call: SDPAParams, debug: bool = False) -> bool:
            q, k, v = call.query, call.key, call.value
            needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            given = (q, k, v, call.attn_mask, call.dropout, call.is_causal, call.enable_gqa)
            enabled = frozenset({kernel, "math"})
            chosen = device.answers.ask(
                lambda card: choose_attention(*given, card, enabled=enabled, needs_grad=needs_grad)
            )
            return chosen == kernel

        return answer

    assign(
        torch._C,
        _is_flash_attention_available=lambda: True,
        _can_use_flash_attention=can_use("flash"),
        _can_use_mem_efficient_attention=can_use("efficient"),
        _can_use_cudnn_attention=can_use("cudnn"),
    )


def _install_profilers() -> None:
    """Let profilers see the host alone: without a card, each operator would print that no CUDA event was recorded."""
    cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA

    def of_host(begin: Callable[..., object]) -> Callable[..., object]:
        def begun(config: object, activities: Collection[object], *args: object, **kwargs: object) -> object:
            return begin(config, set(activities) - {cuda} or {cpu}, *args, **kwargs)

        return begun

    activities = lambda: {cpu, cuda}  # noqa: E731  # a name of torch's
    assign(autograd_profiler, _supported_activities=activities)
    assign(torch.profiler, torch.profiler.profiler, supported_activities=activities)
    for name in ("_prepare_profiler", "_enable_profiler"):
        assign(autograd_profiler, **{name: of_host(autograd_profiler.__dict__[name])})
    ranges: Any = autograd_profiler.emit_nvtx
    assign(ranges, __enter__=lambda self: self, __exit__=lambda self, *error: None)
