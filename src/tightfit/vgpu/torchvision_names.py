"""Names of torchvision's operators, without which its Python code cannot be imported."""

from types import ModuleType

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_DECLARED = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Operators of torchvision's library to which its Python code gives a meaning as it is imported."""


def declare(extension: ModuleType) -> None:
    """Declare operators where torchvision's own library did not load, as one for a card on a host without CUDA.

    `extension` tried to load it. The next module that torchvision imports fails without them.
    """
    for name, schema in _DECLARED.items():
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(schema)
