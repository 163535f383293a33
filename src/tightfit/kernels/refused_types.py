"""Types of arguments that a CUDA kernel refuses, with PyTorch's message.

Fake tensors know shapes: most of them promote types where a kernel wants equal ones, and take whole numbers where it
has none. The rules follow the checks of ATen: Blas.cpp and LinearAlgebra.cpp for products, Convolution.cpp, Loss.cu,
TensorAdvancedIndexing.cpp, and the types that each kernel's AT_DISPATCH lists.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.kernels.temporaries import Argument, Arguments

_NAMES = {
    torch.float16: "Half",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.float8_e5m2: "Float8_e5m2",
}
_OF_PRODUCTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_IN_C = {torch.float16: "c10::Half", torch.bfloat16: "c10::BFloat16", torch.float64: "double", torch.float32: "float"}
_INDICES = (torch.int32, torch.int64)

_FLOATING = frozenset(
    (
        *("gelu", "silu", "mish", "softplus", "hardswish", "hardsigmoid", "elu", "leaky_relu", "log_sigmoid_forward"),
        *("_softmax", "_log_softmax", "std", "var", "std_mean", "var_mean", "native_layer_norm", "native_batch_norm"),
        *("native_group_norm", "_fused_rms_norm", "multinomial", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler_3d"),
    )
)
"""Operators without a kernel for whole numbers."""
_EQUAL_PAIRS = frozenset(("binary_cross_entropy",))
"""Operators that iterate over equal types (`check_all_same_dtype`)."""

Rule = Callable[[Sequence[Argument]], str | None]


def refusal(name: str, args: Arguments) -> str | None:
    """Return PyTorch's message where the card has no kernel for these types; None where it has one.

    >>> refusal("mm", (torch.ones(2, 2), torch.ones(2, 2).half()))
    'expected mat1 and mat2 to have the same dtype, but got: float != c10::Half'
    """
    rule = _RULES.get(name)
    if rule is not None:
        return rule(args)
    first = args[0] if args else None
    if not isinstance(first, Tensor):
        return None
    if name in _FLOATING and not (first.is_floating_point() or first.is_complex()):
        return _not_implemented(name.lstrip("_"), first.dtype)
    if name in _EQUAL_PAIRS:
        others = [each for each in args[1:] if isinstance(each, Tensor) and each.dtype != first.dtype]
        return f"Found dtype {_name(others[0].dtype)} but expected {_name(first.dtype)}" if others else None
    return None


def refuse(name: str, args: Arguments) -> None:
    """Fail as on a card where it has no kernel for these types. RuntimeError with PyTorch's message."""
    message = refusal(name, args)
    if message is not None:
        raise RuntimeError(message)


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _not_implemented(kernel: str, dtype: torch.dtype) -> str:
    return f"\"{kernel}\" not implemented for '{_name(dtype)}'"


def _tensors(args: Sequence[Argument], count: int) -> list[Tensor] | None:
    """Return the first arguments; None if one is no tensor of dense data."""
    found = [each for each in args[:count] if isinstance(each, Tensor) and each.layout is torch.strided]
    return found if len(found) == count else None


def _mm(args: Sequence[Argument]) -> str | None:
    if (pair := _tensors(args, 2)) is None:
        return None
    one, other = pair[0].dtype, pair[1].dtype
    if one != other:
        written = [_IN_C.get(each, _name(each)) for each in (one, other)]
        return f"expected mat1 and mat2 to have the same dtype, but got: {written[0]} != {written[1]}"
    return None if one in _OF_PRODUCTS else _not_implemented("addmm_cuda", one)


def _addmm(args: Sequence[Argument]) -> str | None:
    if (three := _tensors(args, 3)) is None:
        return None
    bias, one, other = (each.dtype for each in three)
    has_result_type = len(args) > 3  # which the bias may have
    if bias != other and not has_result_type:
        names = ("mat1", one) if bias == one else ("self", bias)
        return f"{names[0]} and mat2 must have the same dtype, but got {_name(names[1])} and {_name(other)}"
    if one != other:
        return f"mat1 and mat2 must have the same dtype, but got {_name(one)} and {_name(other)}"
    return None if one in _OF_PRODUCTS else _not_implemented("addmm_cuda", one)


def _bmm(args: Sequence[Argument]) -> str | None:
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.dtype in _OF_PRODUCTS:
        return None
    return _not_implemented("baddbmm_cuda", first.dtype)


def _mv(args: Sequence[Argument]) -> str | None:
    if (pair := _tensors(args, 2)) is None:
        return None
    one, other = pair[0].dtype, pair[1].dtype
    if one != other:
        names = f"{_name(other)}, {_name(one)}, and {_name(other)}"
        return f"addmv input tensors must have the same dtype, but got {names}"
    return None if one in _OF_PRODUCTS else _not_implemented("addmv_impl_cuda", one)


def _convolution(args: Sequence[Argument]) -> str | None:
    if (pair := _tensors(args, 2)) is None:
        return None
    bias = args[2] if len(args) > 2 else None
    source, weight = pair[0], pair[1]
    if source.dtype != weight.dtype:
        return f"Input type ({_type(source)}) and weight type ({_type(weight)}) should be the same"
    if isinstance(bias, Tensor) and bias.dtype != source.dtype:
        return f"Input type ({_type(source)}) and bias type ({_type(bias)}) should be the same"
    return None if source.dtype in _OF_PRODUCTS else _not_implemented("slow_conv2d_cuda", source.dtype)


def _type(tensor: Tensor) -> str:
    place = "torch.cuda." if tensor.device.type == "cuda" else "torch."
    return f"{place}{_name(tensor.dtype)}Tensor"


def _nll_loss(args: Sequence[Argument]) -> str | None:
    pair = _tensors(args, 2)
    if pair is None or pair[1].dtype in (torch.int64, torch.uint8):
        return None
    return f"expected target dtype to be Long or Byte, but got {_name(pair[1].dtype)}"


def _index_add(args: Sequence[Argument]) -> str | None:
    target, source = args[0], args[3] if len(args) > 3 else None
    if not isinstance(target, Tensor) or not isinstance(source, Tensor) or target.dtype == source.dtype:
        return None
    types = f"self ({_name(target.dtype)}) and source ({_name(source.dtype)})"
    return f"index_add_(): {types} must have the same scalar type"


def _index_put(args: Sequence[Argument]) -> str | None:
    target, source = args[0], args[2] if len(args) > 2 else None
    if not isinstance(target, Tensor) or not isinstance(source, Tensor) or target.dtype == source.dtype:
        return _index(args)
    types = f"got {_name(target.dtype)} for the destination and {_name(source.dtype)} for the source"
    return f"Index put requires the source and destination dtypes match, {types}."


def _index(args: Sequence[Argument]) -> str | None:
    source, indices = args[:2]
    if not isinstance(source, Tensor) or source.device.type != "cpu" or not isinstance(indices, (list, tuple)):
        return None
    if all(each is None or not isinstance(each, Tensor) or each.device.type == "cpu" for each in indices):
        return None
    return "indices should be either on cpu or on the same device as the indexed tensor (cpu)"


def _index_select(args: Sequence[Argument]) -> str | None:
    index = args[2] if len(args) > 2 else None
    if not isinstance(index, Tensor) or index.dtype in _INDICES:
        return None
    return "index_select(): Expected dtype int32 or int64 for index"


def _bincount(args: Sequence[Argument]) -> str | None:
    source = args[0]
    if not isinstance(source, Tensor) or not (source.is_floating_point() or source.is_complex()):
        return None
    return _not_implemented("bincount_cuda", source.dtype)


def _attention(args: Sequence[Argument]) -> str | None:
    three = _tensors(args, 3)
    if three is None or len({each.dtype for each in three}) == 1:
        return None
    query, key, value = (_IN_C.get(each.dtype, _name(each.dtype)) for each in three)
    found = f"query.dtype: {query} key.dtype: {key} and value.dtype: {value}"
    return f"Expected query, key, and value to have the same dtype, but got {found} instead."


_RULES: dict[str, Rule] = {
    "mm": _mm,
    "addmm": _addmm,
    "_addmm_activation": _addmm,
    "bmm": _bmm,
    "baddbmm": _bmm,
    "mv": _mv,
    "convolution": _convolution,
    "nll_loss_forward": _nll_loss,
    "nll_loss2d_forward": _nll_loss,
    "index_add": _index_add,
    "index_add_": _index_add,
    "index": _index,
    "index_put": _index_put,
    "index_put_": _index_put,
    "_index_put_impl_": _index_put,
    "index_select": _index_select,
    "bincount": _bincount,
    "scaled_dot_product_attention": _attention,
}
