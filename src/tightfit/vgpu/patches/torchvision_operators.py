"""Operators of torchvision with results that depend on data."""

from types import ModuleType

import torch
from torch import Tensor
from torch._ops import OpOverload

from tightfit.vgpu.assign import assign
from tightfit.vgpu.data_shapes import HANDLERS, Device, Handler
from tightfit.vgpu.patches.on_import import after_import

aten = torch.ops.aten
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_DECLARED = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Operators of torchvision's library to which its Python code gives a meaning as it is imported."""
_THREADS = 64
"""Boxes of a block, for each of which `nms` has a word of bits."""


def install() -> None:
    """Let the virtual card run them when the script imports torchvision."""
    after_import("torchvision.extension", _declare)
    after_import("torchvision.ops.boxes", _take_over)


def _declare(extension: ModuleType) -> None:
    """Declare operators where torchvision's own library did not load, as one for a card on a host without CUDA.

    `extension` tried to load it. The next module that torchvision imports fails without them.
    """
    for name, schema in _DECLARED.items():
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(schema)


def _take_over(boxes: ModuleType) -> None:
    """Let `nms` run, though torchvision may hold that its library is missing."""
    _declare(boxes)
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
