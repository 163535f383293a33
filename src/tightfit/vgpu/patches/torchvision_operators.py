"""Operators of torchvision with results that depend on data."""

from types import ModuleType

import torch
from torch import Tensor
from torch._ops import OpOverload

from tightfit.vgpu.assign import assign
from tightfit.vgpu.data_shapes import HANDLERS, Device, Handler
from tightfit.vgpu.on_import import after_import
from tightfit.vgpu.torchvision_names import declare

aten = torch.ops.aten
_THREADS = 64
"""Boxes of a block, for each of which `nms` has a word of bits."""


def install() -> None:
    """Let the virtual card run them when the script imports torchvision."""
    after_import("torchvision.extension", declare)
    after_import("torchvision.ops.boxes", _take_over)


def _take_over(boxes: ModuleType) -> None:
    """Let `nms` run, though torchvision may hold that its library is missing."""
    declare(boxes)
    if hasattr(boxes, "_assert_has_ops"):
        assign(boxes, _assert_has_ops=lambda: None)
    HANDLERS.update(_handlers())


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
