"""Type of the context of a custom autograd function, which torch leaves untyped."""

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The part of torch's context that every function here uses."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
