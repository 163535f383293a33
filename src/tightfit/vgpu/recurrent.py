"""Recurrent networks as cuDNN runs them: one call for all layers and positions (ATen/native/cudnn/RNN.cpp).

The weights of a module lie in one buffer, as do their gradients. Between forward and backward cuDNN keeps a reserve,
whose size its library decides: taken here is what a backward pass cannot do without, the gates and cells of each
position. A card may keep more.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, library
from torch._ops import OpOverload
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tightfit.kernels.temporaries import Argument
from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.patches import backend
from tightfit.wording import say

aten = torch.ops.aten

_RELU, _TANH, _LSTM, _GRU = 0, 1, 2, 3
"""cudnnRNNMode_t."""
_KEPT_OF_A_CELL = {_RELU: 1, _TANH: 1, _LSTM: 5, _GRU: 4}
"""Values of each cell that its backward pass needs: the gates, and a LSTM's cell or a GRU's inner product."""

Weights = Sequence[Tensor]
Cells = tuple[Tensor, Tensor, Tensor]


def install(device: VirtualDevice) -> None:
    """Patch this process for good."""
    operators = library.Library("aten", "IMPL")
    for name, mode in (("lstm", _LSTM), ("gru", _GRU), ("rnn_tanh", _TANH), ("rnn_relu", _RELU)):
        packet = getattr(aten, name)
        for overload, packed in (("input", False), ("data", True)):
            run = _runner(device, getattr(packet, overload), mode, packed)
            for key in ("AutogradCUDA", "CUDA"):
                operators.impl(f"{name}.{overload}", run, key, allow_override=True)
    backend.KEPT.append(operators)
    op_implementations_dict.update(
        {
            aten._cudnn_rnn.default: _forward,
            aten._cudnn_rnn_backward.default: _backward,
            aten._cudnn_rnn_flatten_weight.default: _flatten_weights,
        }
    )
    assign(torch, _use_cudnn_rnn_flatten_weight=lambda: True)
    modes = SimpleNamespace(rnn_relu=_RELU, rnn_tanh=_TANH, lstm=_LSTM, gru=_GRU)
    settings = importlib.import_module("torch.backends.cudnn.rnn")  # a module around the one with the functions
    assign(settings.__dict__.get("m", settings), _cudnn=SimpleNamespace(RNNMode=modes))


def _runner(device: VirtualDevice, func: OpOverload, mode: int, packed: bool) -> Callable[..., Argument]:
    def run(data: Tensor, *args: Any) -> Argument:  # the operator's own arguments
        sizes, args = (args[0], args[1:]) if packed else (None, args)
        hidden, weights, *rest = args
        if not torch.backends.cudnn.enabled or data.dtype not in (torch.float16, torch.float32, torch.float64):
            parts: Argument = func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, data, *_joined(sizes, args))
            return parts
        device.note(say("vgpu.recurrent.reserve"))
        return _run(mode, data, sizes, hidden, weights, *rest)

    return run


def _joined(sizes: Tensor | None, args: Sequence[Argument]) -> Sequence[Argument]:
    return args if sizes is None else (sizes, *args)


def _run(
    mode: int,
    data: Tensor,
    sizes: Tensor | None,
    hidden: Tensor | Sequence[Tensor],
    weights: Weights,
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> Argument:
    """Call cuDNN's operator as `_cudnn_impl` does; autocast casts the weights into a new buffer."""
    h, c = (hidden, None) if isinstance(hidden, Tensor) else (hidden[0], hidden[1])
    buffer = None
    if torch.is_autocast_enabled("cuda") and data.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cuda")
        data, h, c = data.to(dtype), h.to(dtype), None if c is None else c.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
        buffer = weights[0].detach()
    size = h.shape[2] if c is None else c.shape[2]
    projection = h.shape[2] if h.shape[2] != size else 0
    each = (4 if has_biases else 2) + bool(projection)
    batch_sizes = [] if sizes is None else sizes.tolist()
    out: tuple[Tensor, ...] = torch._cudnn_rnn(
        data,
        list(weights),
        each,
        buffer,
        h,
        c,
        mode,
        size,
        projection,
        layers,
        batch_first,
        dropout if train else 0.0,
        train,
        bidirectional,
        batch_sizes,
        None,
    )
    return out[:3] if mode == _LSTM else out[:2]


def _forward(
    fake: FakeTensorMode,
    func: OpOverload,
    data: Tensor,
    weights: Weights,
    weight_stride0: int,
    weight_buf: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    mode: int,
    size: int,
    projection: int,
    layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Sequence[int],
    dropout_state: Tensor | None,
) -> tuple[Tensor, ...]:
    directions = 2 if bidirectional else 1
    width = (projection or size) * directions
    if batch_sizes:
        shape: tuple[int, ...] = (data.shape[0], width)
    else:
        length, batch = (data.shape[1], data.shape[0]) if batch_first else data.shape[:2]
        shape = (length, batch, width)
    cells = math.prod(shape[:-1]) * directions * layers
    kept = cells * size * _KEPT_OF_A_CELL[mode] * data.dtype.itemsize if train else 0
    with fake:
        out = data.new_empty(shape)
        if batch_first and not batch_sizes:
            out = out.transpose(0, 1)
        hy = hx.new_empty(hx.shape)
        cy = hx.new_empty((0,)) if cx is None else cx.new_empty(cx.shape)
        reserve = data.new_empty((kept,), dtype=torch.uint8)
        if weight_buf is None:
            count = sum(weight.numel() for weight in weights)
            weight_buf = data.new_empty((0 if _in_one_buffer(weights) else count,))
        return out, hy, cy, reserve, weight_buf


def _in_one_buffer(weights: Weights) -> bool:
    return len({weight.untyped_storage()._cdata for weight in weights}) == 1


def _backward(
    fake: FakeTensorMode,
    func: OpOverload,
    data: Tensor,
    weights: Weights,
    weight_stride0: int,
    weight_buf: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    output: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    """Return the gradients; those of the weights lie in one buffer."""
    mask = rest[-1]
    with fake:
        gradient = data.new_empty(data.shape)
        inner = hx.new_empty(hx.shape)
        cell = None if cx is None else cx.new_empty(cx.shape)
        of_weights: list[Tensor] = []
        if mask[3]:
            buffer = data.new_empty((sum(weight.numel() for weight in weights),))
            of_weights = _views(buffer, weights)
        return gradient, inner, cell, of_weights


def _views(buffer: Tensor, weights: Weights) -> list[Tensor]:
    parts = buffer.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def _flatten_weights(fake: FakeTensorMode, func: OpOverload, weights: Weights, *_: Argument) -> Tensor:
    """Move the weights into one buffer, of which they become views."""
    with fake:
        buffer = weights[0].new_empty((sum(weight.numel() for weight in weights),))
        for weight, view in zip(weights, _views(buffer, weights), strict=True):
            if isinstance(weight, FakeTensor):
                weight.set_(view)  # type: ignore[call-overload]  # of a tensor, which torch's stub leaves out
    return buffer
