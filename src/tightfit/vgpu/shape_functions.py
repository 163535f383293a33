"""Shapes of results that torch's fake tensors do not know: operators of CUDA without a kernel for "meta".

Operators that are not listed here run once on the host, on zeros, which shows the shapes of their results.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, library
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from tightfit.kernels.temporaries import Argument, Arguments, Options
from tightfit.vgpu.assign import assign
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.fakes import fakes
from tightfit.vgpu.patches.backend import KEPT

aten = torch.ops.aten

_MOST_BYTES = 2 * 2**30
"""Of the arguments of an operator that runs on the host for its shapes."""


def install(device: VirtualDevice) -> None:
    """Let torch's fake tensors know these operators, in this process for good."""
    assign(fake_tensor, run_fallback_kernel=_run_on_host)
    device.of_sparse = functools.partial(_of_sparse, device.fake)
    lengths = _lengths_of(device)

    def ctc_loss(
        fake: FakeTensorMode,
        func: OpOverload,
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Argument,
        target_lengths: Argument,
        *_: Argument,
        **__: Argument,
    ) -> tuple[Tensor, Tensor]:
        """LossCTC.cu: a loss for each sample, and alphas for each position of it."""
        batch = log_probs.shape[1] if log_probs.dim() == 3 else 1
        known = lengths(target_lengths)
        longest = max(known) if known else targets.shape[-1]
        with fake:
            loss = log_probs.new_empty((batch,))
            return loss, log_probs.new_empty((batch, log_probs.shape[0], 2 * longest + 1))

    _install_ctc(lengths)
    op_implementations_dict.update(
        {
            aten._ctc_loss.default: ctc_loss,
            aten._ctc_loss.Tensor: ctc_loss,
            aten._ctc_loss_backward.default: _ctc_backward,
            aten._ctc_loss_backward.Tensor: _ctc_backward,
            **dict.fromkeys(_choices_of_ctc(), _never),
            aten._thnn_fused_lstm_cell.default: _lstm_cell,
            aten._thnn_fused_gru_cell.default: _gru_cell,
            aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
            **dict.fromkeys(_LIKE_FIRST_WITH_MASK, _like_first_with_mask),
            **_OF_SYNC_BATCH_NORM,
            **_OF_OTHERS,
        }
    )


def _install_ctc(lengths: Callable[[Argument], list[int] | None]) -> None:
    """Read the lengths on the host first, as `ctc_loss` does for tensors of a card (LossCTC.cpp)."""
    operators = library.Library("aten", "IMPL")

    def ctc_loss(
        log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, *rest: Argument
    ) -> Argument:
        count = input_lengths.numel()
        inputs = lengths(input_lengths) or [log_probs.shape[0]] * count
        labels = (
            lengths(target_lengths) or [targets.shape[-1] if targets.dim() == 2 else targets.numel() // count] * count
        )
        loss: Argument = aten.ctc_loss.IntList(log_probs, targets, inputs, labels, *rest)
        return loss

    for key in ("AutogradCUDA", "CUDA"):
        operators.impl("ctc_loss.Tensor", ctc_loss, key, allow_override=True)
    KEPT.append(operators)


def _lengths_of(device: VirtualDevice) -> Callable[[Argument], list[int] | None]:
    def lengths(given: Argument) -> list[int] | None:
        """Return lengths that are known; None for those that nobody computed."""
        if not isinstance(given, Tensor):
            return [int(each) for each in given] if isinstance(given, (list, tuple)) else None
        known = device.values.exactly(given)
        return None if known is None else [int(each) for each in known.flatten().tolist()]

    return lengths


def _choices_of_ctc() -> list[OpOverload]:
    packets = (getattr(aten, f"_use_{library}_ctc_loss", None) for library in ("cudnn", "miopen"))
    return [getattr(packet, name) for packet in packets if packet is not None for name in packet.overloads()]


def _never(fake: FakeTensorMode, func: OpOverload, *_: Argument) -> bool:
    """Return False: cuDNN takes targets of int32 on the host alone, and PyTorch's own kernel takes the rest."""
    return False


def _ctc_backward(
    fake: FakeTensorMode, func: OpOverload, grad: Tensor, log_probs: Tensor, *_: Argument, **__: Argument
) -> Tensor:
    with fake:
        return log_probs.new_empty(log_probs.shape)


def _lstm_cell(
    fake: FakeTensorMode, func: OpOverload, input_gates: Tensor, hidden_gates: Tensor, cx: Tensor, *_: Argument
) -> tuple[Tensor, Tensor, Tensor]:
    """RNN.cu: the four gates stay for backward. torch's own function asks for biases."""
    with fake:
        return cx.new_empty(cx.shape), cx.new_empty(cx.shape), input_gates.new_empty(input_gates.shape)


def _gru_cell(
    fake: FakeTensorMode, func: OpOverload, input_gates: Tensor, hidden_gates: Tensor, hx: Tensor, *_: Argument
) -> tuple[Tensor, Tensor]:
    """RNN.cu: five values of each cell stay for backward."""
    with fake:
        return hx.new_empty(hx.shape), hx.new_empty((hx.shape[0], hx.shape[1] * 5))


def _gru_cell_backward(
    fake: FakeTensorMode, func: OpOverload, grad_hy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor | None, ...]:
    batch, width = workspace.shape[0], workspace.shape[1] // 5 * 3
    with fake:
        gates = [workspace.new_empty((batch, width)) for _ in range(2)]
        biases = [workspace.new_empty((width,)) if has_bias else None for _ in range(2)]
        return (*gates, grad_hy.new_empty(grad_hy.shape), *biases)


def _statistics(source: Tensor) -> torch.dtype:
    return torch.float32 if source.dtype in (torch.float16, torch.bfloat16) else source.dtype


def _batch_norm_stats(
    fake: FakeTensorMode, func: OpOverload, source: Tensor, *_: Argument, **__: Argument
) -> tuple[Tensor, Tensor]:
    """Normalization.cu: mean and inverse deviation of each channel, of this process or of all."""
    with fake:
        made = [source.new_empty((source.shape[1],), dtype=_statistics(source)) for _ in range(2)]
        return made[0], made[1]


def _batch_norm_elements(
    fake: FakeTensorMode, func: OpOverload, source: Tensor, *_: Argument, **__: Argument
) -> Tensor:
    with fake:
        return torch.empty_like(source)


def _batch_norm_backward_reduce(
    fake: FakeTensorMode,
    func: OpOverload,
    grad: Tensor,
    source: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, ...]:
    channels, like = (source.shape[1],), source if weight is None else weight
    with fake:
        sums = [source.new_empty(channels, dtype=mean.dtype) if needs_input else None for _ in range(2)]
        parameters = [like.new_empty(channels) if needed else None for needed in (needs_weight, needs_bias)]
        return (*sums, *parameters)


_OF_SYNC_BATCH_NORM: dict[OpOverload, Callable[..., Argument]] = {
    aten.batch_norm_stats.default: _batch_norm_stats,
    aten.batch_norm_gather_stats.default: _batch_norm_stats,
    aten.batch_norm_gather_stats_with_counts.default: _batch_norm_stats,
    aten.batch_norm_elemt.default: _batch_norm_elements,
    aten.batch_norm_backward_elemt.default: _batch_norm_elements,
    aten.batch_norm_backward_reduce.default: _batch_norm_backward_reduce,
}


def _lstsq(
    fake: FakeTensorMode,
    func: OpOverload,
    source: Tensor,
    right: Tensor,
    rcond: float | None = None,
    *,
    driver: str | None = None,
) -> tuple[Tensor, ...]:
    """BatchLinearAlgebra.cpp: the card's one driver, `gels`, tells neither rank nor singular values."""
    rows, columns = source.shape[-2:]
    is_vector = right.dim() == 1 or (right.dim() == source.dim() - 1 and right.shape == source.shape[:-1])
    batch = torch.broadcast_shapes(source.shape[:-2], right.shape[: -1 if is_vector else -2])
    behind = () if is_vector else (right.shape[-1],)
    with fake:
        residuals = right.new_empty((*batch, *behind) if rows > columns else (0,))
        empty = right.new_empty((0,))
        return right.new_empty((*batch, columns, *behind)), residuals, empty.long(), empty


_WHOLE = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


def _int_repr(fake: FakeTensorMode, func: OpOverload, source: Tensor) -> Tensor:
    """Return the whole numbers of a quantized tensor."""
    with fake:
        return torch.empty(source.shape, dtype=_WHOLE.get(source.dtype, torch.int8), device=source.device)


def _grid_sampler(fake: FakeTensorMode, func: OpOverload, source: Tensor, grid: Tensor) -> Tensor:
    """GridSampler.cpp of cuDNN, which a build of torch with CUDA takes where corners are aligned."""
    with fake:
        return source.new_empty((*source.shape[:2], *grid.shape[1:3]))


def _grid_sampler_backward(
    fake: FakeTensorMode, func: OpOverload, source: Tensor, grid: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    with fake:
        return source.new_empty(source.shape), grid.new_empty(grid.shape)


_OF_OTHERS: dict[OpOverload, Callable[..., Argument]] = {
    aten.cudnn_grid_sampler.default: _grid_sampler,
    aten.cudnn_grid_sampler_backward.default: _grid_sampler_backward,
    aten.linalg_lstsq.default: _lstsq,
    aten.int_repr.default: _int_repr,
}


_LIKE_FIRST_WITH_MASK = [
    aten.fake_quantize_per_tensor_affine_cachemask.default,
    aten.fake_quantize_per_channel_affine_cachemask.default,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default,
]


def _like_first_with_mask(
    fake: FakeTensorMode, func: OpOverload, source: Tensor, *_: Argument, **__: Argument
) -> tuple[Tensor, Tensor]:
    """FakeQuantizeCore.cu: the rounded values, and a mask of those that were in range."""
    with fake:
        return torch.empty_like(source), torch.empty_like(source, dtype=torch.bool)


_SPARSE_ON_HOST = frozenset((aten.clone.default, aten.add.Tensor, aten.sub.Tensor, aten.t.default, aten.transpose.int))
"""Operators for which fake tensors forget how many elements a sparse tensor has."""


_PRODUCTS = frozenset(
    (aten.mm.default, aten.addmm.default, aten.mv.default, aten.addmv.default, aten._sparse_addmm.default)
)
_COMPRESSED = frozenset((torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc))


def _of_compressed(fake: FakeTensorMode, func: OpOverload, args: Arguments, kwargs: Options) -> Argument:
    """Return the result of an operator on matrices compressed by row or column; a product with a dense one is dense."""
    compressed = [tensor for tensor in fakes(args) if tensor.layout in _COMPRESSED]

    def as_dense(value: Argument) -> Argument:
        if not isinstance(value, Tensor) or value.layout not in _COMPRESSED:
            return value
        return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)

    with fake:
        if func in _PRODUCTS and len(compressed) == 1:
            func = aten.addmm.default if func is aten._sparse_addmm.default else func
            args = tuple(map(as_dense, args))
        try:
            made: Argument = func(*args, **kwargs)
        except RuntimeError as error:
            raise NotImplementedError(str(func)) from error
        return made


def _of_sparse(fake: FakeTensorMode, func: OpOverload, args: Arguments, kwargs: Options) -> Argument:
    """Return the result of an operator on sparse tensors; one that adds to a dense tensor returns that."""
    first = args[0]
    if any(tensor.layout in _COMPRESSED for tensor in fakes(args)):
        return _of_compressed(fake, func, args, kwargs)
    if func is aten.add_.Tensor and isinstance(first, FakeTensor) and first.layout is torch.strided:
        return first
    if func not in _SPARSE_ON_HOST:
        with fake:
            made: Argument = func(*args, **kwargs)
            return made
    flat, spec = tree_flatten((args, kwargs))
    return _run_on_host(fake, func, flat, spec, NotImplementedError(str(func)))


def _run_on_host(
    fake: FakeTensorMode, func: OpOverload, flat_args: Sequence[object], spec: TreeSpec, error: RuntimeError
) -> Argument:
    """Find the results' shapes by the host's kernel on zeros; raise `error` without one or with too much to do."""
    fakes = [each for each in flat_args if isinstance(each, FakeTensor)]
    if torch.Tag.inplace_view in func.tags or sum(map(_bytes_on_host, fakes)) > _MOST_BYTES:
        raise error
    where = next((each.fake_device for each in fakes), torch.device("cpu"))
    given: dict[int, FakeTensor] = {}
    with fake:
        places = {
            id(each): (*each._indices().shape, each.is_coalesced()) for each in fakes if each.layout == torch.sparse_coo
        }

    def on_host(value: object) -> object:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, FakeTensor):
            return value
        zeros = _zeros(value, places.get(id(value)))
        given[id(zeros)] = value
        return zeros

    def as_fake(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if id(value) in given:
            return given[id(value)]
        if value.layout == torch.sparse_coo:
            indices, values = as_fake(value._indices()), as_fake(value._values())
            make: Callable[..., Tensor] = torch.sparse_coo_tensor
            with fake:
                return make(indices, values, value.shape, is_coalesced=value.is_coalesced(), check_invariants=False)
        if value.layout != torch.strided or value.untyped_storage()._cdata in storages:
            raise error  # a view of an argument, whose fake would not be one
        with fake:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=where)

    with no_dispatch():
        hosts = [on_host(each) for each in flat_args]
        storages = {each.untyped_storage()._cdata for each in hosts if _has_storage(each)}
        args, kwargs = tree_unflatten(hosts, spec)
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError):
            raise error from None
    fakes_of_results: Argument = tree_map(as_fake, out)
    return fakes_of_results


def _has_storage(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _bytes_on_host(tensor: Tensor) -> int:
    if tensor.layout == torch.strided:
        return tensor.numel() * tensor.element_size()
    return tensor._nnz() * tensor.element_size() * (1 + tensor.dim())


def _zeros(fake: Tensor, places: tuple[int, int, bool] | None) -> Tensor:
    """Make zeros like a tensor without data; a sparse one has as many different `places`."""
    if places is None:
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="cpu").zero_()
    dims, count, coalesced = places
    sizes = fake.shape[:dims]
    number = torch.arange(count, device="cpu") % max(1, math.prod(sizes))
    indices = torch.stack(torch.unravel_index(number, sizes)) if sizes else number.new_empty((0, len(number)))
    values = torch.zeros((count, *fake.shape[dims:]), dtype=fake.dtype, device="cpu")
    return torch.sparse_coo_tensor(indices, values, fake.shape, is_coalesced=coalesced or None, check_invariants=False)
