"""Operators of torchvision whose results depend on data."""

import torch
from torch import Tensor
from torch._ops import OpOverload

from tightfit.vgpu.data_shapes import HANDLERS, Device, Handler
from tightfit.vgpu.patches.on_import import after_import

aten = torch.ops.aten
_THREADS = 64
"""Boxes of a block, for each of which `nms` has a word of bits."""


def install() -> None:
    """Let the virtual card run them when the script imports torchvision."""
    after_import("torchvision.ops.boxes", lambda module: HANDLERS.update(_handlers()))


def _handlers() -> dict[OpOverload, Handler]:
    operator = getattr(torch.ops.torchvision, "nms", None)
    return {} if operator is None else {operator.default: _nms}


def _nms(device: Device, func: OpOverload, boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """nms_kernel.cu: a word of bits for each box and each block of others. All boxes may be kept."""
    count = boxes.shape[0]
    ranked = device.execute(aten.sort.stable, (scores,), {"stable": True, "dim": 0, "descending": True})
    assert isinstance(ranked, tuple)
    order = ranked[1]
    ordered = device.execute(aten.index_select.default, (boxes, 0, order), {})
    overlaps = device.make(func, (ordered,), (count * -(-count // _THREADS),), torch.int64)
    kept = device.make(func, (overlaps,), (count,), torch.bool)
    chosen = device.execute(aten.masked_select.default, (order, kept), {})
    assert isinstance(chosen, Tensor)
    return chosen
