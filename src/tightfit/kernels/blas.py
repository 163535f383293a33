"""Memory of matrix products: cuBLAS's workspaces, and copies of matrices that cuBLAS cannot read.

Sources: ATen/cuda/CublasHandlePool.cpp, ATen/cuda/CUDABlas.cpp, ATen/native/cuda/Blas.cpp and cuBlasCommonArgs.h.
Numbers in docstrings are PyTorch's pull requests.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tightfit.kernels.card import Card
from tightfit.kernels.temporaries import HALF, Argument, Temporaries, nbytes, row
from tightfit.units import MIB

if TYPE_CHECKING:
    from torch._ops import OpOverload


@dataclass(frozen=True)
class Workspace:
    """Memory that a library takes once for each thread and stream and keeps.

    It takes it the first time one of its operators runs, after the outputs.
    """

    key: str
    nbytes: int


_GEMM = {
    f"aten::{name}"
    for name in (
        *("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot"),
        *("linear", "matmul", "_scaled_mm", "_int_mm"),
    )
}


def cublas_bytes(card: Card, environ: Mapping[str, str]) -> int:
    """Bytes of CUBLAS_WORKSPACE_CONFIG (:KiB:count ...), else 32 MiB on large cards and 8.125 MiB on others.

    Follows `parseChosenWorkspaceSize`. Large cards are Hopper, Blackwell from torch 2.12 (pull request 175344), and
    Thor from 2.14 (189312).
    """
    given = re.findall(r":([0-9]+):([0-9]+)", environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if given:
        return sum(int(kib) * 1024 * int(count) for kib, count in given)
    large = card.capability == (9, 0)
    if card.torch_version >= (2, 12):
        large = card.capability[0] in (9, 10, 12) or (card.capability[0] == 11 and card.torch_version >= (2, 14))
    return 32 * MIB if large else 2 * 4096 * 1024 + 8 * 16 * 1024


def cublaslt_bytes(environ: Mapping[str, str]) -> int:
    """Bytes of CUBLASLT_WORKSPACE_SIZE (in KiB), else 1 MiB, as in `parseCUDABlasLtWorkspaceSize`."""
    given = re.match(r"\s*(\d+)", environ.get("CUBLASLT_WORKSPACE_SIZE", ""))
    return (int(given[1]) if given else 1024) * 1024


def _unified(card: Card, environ: Mapping[str, str]) -> bool:
    """Return True if cublasLt uses the cuBLAS workspace.

    It does on request from torch 2.8 (151163), and by default from 2.12 (175879).
    """
    wish = environ.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE")
    if card.torch_version < (2, 8):
        return False
    return wish != "0" if card.torch_version >= (2, 12) else wish == "1"


def _uses_lt(
    name: str, args: Sequence[Argument], kwargs: Mapping[str, Argument], card: Card, environ: Mapping[str, str]
) -> bool:
    """Return True if cublasLt adds the bias of a product, as in `isInputCompliesAddmmCudaLt`."""
    if name == "aten::_scaled_mm":
        return True
    if name not in ("aten::addmm", "aten::_addmm_activation") or environ.get("DISABLE_ADDMM_CUDA_LT") == "1":
        return False
    bias, a, b = (x for x in args[:3] if isinstance(x, Tensor))
    column = bias.dim() == 1 if card.torch_version < (2, 10) else sum(size != 1 for size in bias.shape) <= 1
    return bool(
        kwargs.get("beta", 1) == 1
        and column
        and bias.dim() >= 1
        and bias.is_contiguous()
        and bias.shape[-1] == b.shape[1]
        and a.dtype in (*HALF, torch.float32, torch.float64)
        and min(b.shape) > 1
        and (min(a.shape) > 1 or card.torch_version < (2, 10))
    )


def workspaces(
    func: "OpOverload",
    args: Sequence[Argument],
    kwargs: Mapping[str, Argument],
    card: Card,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Workspace, ...]:
    """Workspaces of a matrix product when it first runs in a thread and on a stream; backward has its own.

    An addmm that leaves its bias to cublasLt fetches the same cuBLAS handle, and so takes this workspace too. Until
    torch 2.8, cublasLt takes its own 1 MiB at each call (`hidden_bytes`). In 2.9 to 2.11 it keeps it (156495), and from
    2.12 on it shares the other one. From 2.15 on, torch keeps none (194311).
    """
    name = func.overloadpacket._qualified_op_name
    if name not in _GEMM or _is_empty(args) or not _keeps_workspaces(card, environ):
        return ()
    found = [Workspace("cublas", cublas_bytes(card, environ))]
    kept_apart = card.torch_version >= (2, 9) and not _unified(card, environ)
    if kept_apart and _uses_lt(name, args, kwargs, card, environ):
        size = cublaslt_bytes(environ)
        if card.torch_version == (2, 11) and environ.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE") is None:
            size = min(size, found[0].nbytes)
        found.append(Workspace("cublaslt", size))
    return tuple(workspace for workspace in found if workspace.nbytes)


def _keeps_workspaces(card: Card, environ: Mapping[str, str]) -> bool:
    return card.torch_version < (2, 15) or environ.get("TORCH_CUBLAS_WORKSPACE_CACHE") == "1"


def _is_empty(args: Sequence[Argument]) -> bool:
    return any(isinstance(x, Tensor) and x.numel() == 0 for x in args)


def _unusual_layout(matrix: Tensor) -> int:
    """Bytes of the copy `prepare_matrix_for_cublas` makes of a matrix with neither dense rows nor dense columns."""
    rows, columns = matrix.shape[-2:]
    down, along = matrix.stride()[-2:]
    by_column = down == 1 and along >= max(1, rows)
    by_row = along == 1 and down >= max(1, columns)
    if by_column or by_row or (matrix.dim() == 3 and matrix.is_contiguous() and down and along):
        return 0
    return nbytes(matrix)


def _product(t: Temporaries, card: Card, name: str, args: Sequence[Argument], kwargs: Mapping[str, Argument]) -> None:
    t.outputs()
    matrices = [x for x in args if isinstance(x, Tensor)][-2:]
    if _is_empty(matrices):
        return
    for matrix in matrices:
        t.take(_unusual_layout(matrix))
    lt = _uses_lt(name, args, kwargs, card, os.environ)
    if not _keeps_workspaces(card, os.environ):
        t.take(cublaslt_bytes(os.environ) if lt else cublas_bytes(card, os.environ))
    elif lt and card.torch_version < (2, 9) and not _unified(card, os.environ):
        t.take(cublaslt_bytes(os.environ))


@row("mm")
def _mm(t: Temporaries, card: Card, *args: Argument, **kwargs: Argument) -> None:
    _product(t, card, "aten::mm", args, kwargs)


@row("addmm", "_addmm_activation")
def _addmm(t: Temporaries, card: Card, *args: Argument, **kwargs: Argument) -> None:
    _product(t, card, "aten::addmm", args, kwargs)


@row("bmm", "baddbmm")
def _bmm(t: Temporaries, card: Card, *args: Argument, **kwargs: Argument) -> None:
    _product(t, card, "aten::bmm", args, kwargs)
