"""Write to a file, as JSON, how far each operator's forward and backward pass raise the memory that PyTorch has allocated."""

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS, COLUMNS = 1024, 4096


def peaks(operator: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Bytes above what lives before the forward pass, and before the backward pass with its gradient."""
    x = torch.randn(ROWS, COLUMNS, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = operator(x)
    forward = torch.cuda.max_memory_allocated() - before
    gradient = torch.ones_like(y)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y.backward(gradient)
    return forward, torch.cuda.max_memory_allocated() - before


def without_gradients(operator: Callable[[Tensor], Tensor]) -> int:
    """The same of a forward pass in inference mode, whose tensors autograd leaves alone."""
    with torch.inference_mode():
        x = torch.randn(ROWS, COLUMNS, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        operator(x)
        return torch.cuda.max_memory_allocated() - before


def differentiates_twice(operator: Callable[[Tensor], Tensor]) -> bool:
    x = torch.randn(ROWS, COLUMNS, device="cuda", requires_grad=True)
    (first,) = torch.autograd.grad(operator(x).sum(), x, create_graph=True)
    first.sum().backward()
    return x.grad is not None and x.grad.shape == x.shape


def main() -> None:
    target = torch.randn(ROWS, COLUMNS, device="cuda")
    labels = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    layer = nn.LayerNorm(COLUMNS, device="cuda")
    rms = nn.RMSNorm(COLUMNS, device="cuda")
    group = nn.GroupNorm(8, 64, device="cuda")
    batch = nn.BatchNorm1d(COLUMNS, device="cuda")
    prelu = nn.PReLU(device="cuda")
    operators: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "mish": F.mish,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "leaky_relu": F.leaky_relu,
        "elu": F.elu,
        "selu": F.selu,
        "softplus": F.softplus,
        "softshrink": F.softshrink,
        "logsigmoid": F.logsigmoid,
        "relu": F.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "glu": F.glu,
        "prelu": prelu,
        "dropout": lambda x: F.dropout(x, 0.1),
        "softmax": lambda x: F.softmax(x, -1),
        "log_softmax": lambda x: F.log_softmax(x, -1),
        "layer_norm": layer,
        "rms_norm": rms,
        "rms_norm without weight": lambda x: F.rms_norm(x, (COLUMNS,)),
        "group_norm": lambda x: group(x.view(64, 64, 1024)),
        "batch_norm": batch,
        "huber": lambda x: F.huber_loss(x, target),
        "smooth_l1": lambda x: F.smooth_l1_loss(x, target),
        "mse": lambda x: F.mse_loss(x, target),
        "cross_entropy": lambda x: F.cross_entropy(x, labels),
    }
    found = {
        "training": {name: peaks(operator) for name, operator in operators.items()},
        "inference": {name: without_gradients(operators[name]) for name in ("silu", "mish", "rms_norm")},
        "twice": {name: differentiates_twice(operators[name]) for name in ("silu", "mish", "rms_norm")},
    }
    print(json.dumps(found))


main()
