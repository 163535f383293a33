"""Single operators on one GPU: what each takes from the allocator besides its inputs and outputs, as JSON.

Run by hidden.py, on the card and under `tightfit.dryrun`. An operator runs once before it is measured, so that what
libraries keep from their first call on (cuBLAS's workspace) does not count. All operators of the table of hidden bytes
are here; a test holds that.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import card

aten = torch.ops.aten
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FLOATS = (F32, BF16)
ROWS = ((64, 1024), (4096, 768), (16384, 50304))
"""Of matrices that are reduced or normalised, small to logits."""
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Probe:
    """An operator, and how its inputs are made for a shape and a dtype."""

    operator: str
    make: Callable[[Sequence[int], torch.dtype], Call]
    shapes: Sequence[Sequence[int]] = ROWS
    dtypes: Sequence[torch.dtype] = FLOATS
    variant: str = ""


def x(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.rand(tuple(shape), device="cuda", dtype=dtype)


def ids(shape: Sequence[int], below: int) -> Tensor:
    return torch.randint(0, below, tuple(shape), device="cuda")


def call(func: Any, *args: Any, **kwargs: Any) -> Call:
    return func, args, kwargs


def probes() -> Iterator[Probe]:
    yield from _products()
    yield from _losses()
    yield from _normalisations()
    yield from _reductions()
    yield from _sorting()
    yield from _attention()
    yield from _copies()


def _products() -> Iterator[Probe]:
    shapes = ((256, 768, 768), (4096, 768, 3072), (8192, 768, 50304))
    kinds = (F32, BF16, F16)
    yield Probe("mm", lambda s, d: call(aten.mm.default, x(s[:2], d), x(s[1:], d)), shapes, kinds)
    strided = shapes[:2]
    yield Probe(
        "mm", lambda s, d: call(aten.mm.default, x((s[0], 2 * s[1]), d)[:, ::2], x(s[1:], d)), strided, kinds, "strided"
    )
    yield Probe("addmm", lambda s, d: call(aten.addmm.default, x(s[2:], d), x(s[:2], d), x(s[1:], d)), shapes, kinds)
    yield Probe(
        "_addmm_activation",
        lambda s, d: call(aten._addmm_activation.default, x(s[2:], d), x(s[:2], d), x(s[1:], d)),
        shapes[:2],
        kinds,
    )
    batched = ((8, 128, 64, 128), (96, 1024, 64, 1024))
    yield Probe("bmm", lambda s, d: call(aten.bmm.default, x(s[:3], d), x((s[0], *s[2:]), d)), batched, kinds)
    yield Probe(
        "baddbmm",
        lambda s, d: call(aten.baddbmm.default, x((s[0], s[1], s[3]), d), x(s[:3], d), x((s[0], *s[2:]), d)),
        batched,
        kinds,
    )


def _losses() -> Iterator[Probe]:
    softmax, log_softmax = aten._softmax.default, aten._log_softmax.default
    yield Probe("_log_softmax", lambda s, d: call(log_softmax, x(s, d), 1, False))
    yield Probe("_log_softmax", lambda s, d: call(log_softmax, x((s[1], s[0]), d).t(), 1, False), variant="transposed")
    yield Probe("_softmax", lambda s, d: call(softmax, x(s, d), 1, False))
    yield Probe(
        "_log_softmax_backward_data",
        lambda s, d: call(aten._log_softmax_backward_data.default, x(s, d), x(s, d), 1, d),
    )
    yield Probe(
        "_softmax_backward_data", lambda s, d: call(aten._softmax_backward_data.default, x(s, d), x(s, d), 1, d)
    )
    yield Probe("_safe_softmax", lambda s, d: call(aten._safe_softmax.default, x(s, d), -1), ROWS[:2])
    images = ((4, 16, 32, 32), (8, 64, 128, 128))
    yield Probe(
        "nll_loss_forward", lambda s, d: call(aten.nll_loss_forward.default, x(s, d), ids(s[:1], s[1]), None, 1, -1)
    )
    yield Probe("nll_loss_backward", lambda s, d: _nll_backward(aten.nll_loss_backward.default, s, d, s[:1]))
    yield Probe(
        "nll_loss2d_forward",
        lambda s, d: call(aten.nll_loss2d_forward.default, x(s, d), ids((s[0], *s[2:]), s[1]), None, 1, -1),
        images,
    )
    yield Probe(
        "nll_loss2d_backward",
        lambda s, d: _nll_backward(aten.nll_loss2d_backward.default, s, d, (s[0], *s[2:])),
        images,
    )
    for name in ("mse_loss", "smooth_l1_loss", "huber_loss"):
        func = getattr(aten, name).default
        yield Probe(name, lambda s, d, func=func: call(func, x(s, d), x(s, d)))


def _nll_backward(func: Any, shape: Sequence[int], dtype: torch.dtype, of_targets: Sequence[int]) -> Call:
    return call(func, x((), dtype), x(shape, dtype), ids(of_targets, shape[1]), None, 1, -1, x((), dtype))


def _normalisations() -> Iterator[Probe]:
    shapes = ((64, 768), (8192, 768), (131072, 768), (131072, 128))

    def layer(s: Sequence[int], d: torch.dtype) -> tuple[Tensor, ...]:
        return x(s, d), x(s, d), x((s[0], 1), F32), x((s[0], 1), F32), x(s[1:], d), x(s[1:], d)

    def layer_backward(s: Sequence[int], d: torch.dtype) -> Call:
        grad, given, mean, rstd, weight, bias = layer(s, d)
        return call(
            aten.native_layer_norm_backward.default, grad, given, s[1:], mean, rstd, weight, bias, [True, True, True]
        )

    def rms_backward(s: Sequence[int], d: torch.dtype) -> Call:
        grad, given, _, rstd, weight, _ = layer(s, d)
        return call(aten._fused_rms_norm_backward.default, grad, given, s[1:], rstd, weight, [True, True])

    yield Probe(
        "native_layer_norm",
        lambda s, d: call(aten.native_layer_norm.default, x(s, d), s[1:], x(s[1:], d), x(s[1:], d), 1e-5),
        shapes,
    )
    yield Probe("native_layer_norm_backward", layer_backward, shapes)
    yield Probe(
        "_fused_rms_norm",
        lambda s, d: call(aten._fused_rms_norm.default, x(s, d), list(s[1:]), x(s[1:], d), 1e-5),
        shapes,
    )
    yield Probe("_fused_rms_norm_backward", rms_backward, shapes)
    images = ((4, 32, 16, 16), (8, 64, 64, 64))

    def group(s: Sequence[int], d: torch.dtype) -> tuple[int, int, int, int]:
        return s[0], s[1], s[2] * s[3], 8

    yield Probe(
        "native_group_norm",
        lambda s, d: call(aten.native_group_norm.default, x(s, d), x(s[1:2], d), x(s[1:2], d), *group(s, d), 1e-5),
        images,
    )
    yield Probe(
        "native_group_norm_backward",
        lambda s, d: call(
            aten.native_group_norm_backward.default, x(s, d), x(s, d), x((s[0], 8), d), x((s[0], 8), d), x(s[1:2], d),
            *group(s, d), [True, True, True],
        ),
        images,
    )  # fmt: skip


def _reductions() -> Iterator[Probe]:
    for operator, func in {
        "sum": aten.sum.dim_IntList, "mean": aten.mean.dim, "nansum": aten.nansum.default, "amax": aten.amax.default,
        "amin": aten.amin.default, "logsumexp": aten.logsumexp.default,
    }.items():  # fmt: skip
        for dim in (0, 1):
            make = lambda s, d, func=func, dim=dim: call(func, x(s, d), [dim])  # noqa: E731
            yield Probe(operator, make, variant=f"dim {dim}")
    for operator, func in {
        "prod": aten.prod.dim_int, "max": aten.max.dim, "min": aten.min.dim, "argmax": aten.argmax.default,
        "argmin": aten.argmin.default, "any": aten.any.dim, "all": aten.all.dim,
    }.items():  # fmt: skip
        for dim in (0, 1):
            make = lambda s, d, func=func, dim=dim: call(func, x(s, d), dim)  # noqa: E731
            yield Probe(operator, make, variant=f"dim {dim}")
    for operator in ("var", "std", "var_mean", "std_mean"):
        func = getattr(aten, operator).correction
        for dim in (0, 1):
            make = lambda s, d, func=func, dim=dim: call(func, x(s, d), [dim])  # noqa: E731
            yield Probe(operator, make, variant=f"dim {dim}")
    for operator in ("sum", "mean", "max", "any"):
        func = getattr(aten, operator).default
        yield Probe(operator, lambda s, d, func=func: call(func, x(s, d)), variant="whole")
    yield Probe(
        "sum", lambda s, d: call(aten.sum.default, x(s, d), dtype=F32), dtypes=(BF16, F16), variant="to float32"
    )
    yield Probe("linalg_vector_norm", lambda s, d: call(aten.linalg_vector_norm.default, x(s, d), 2))
    yield Probe("norm", lambda s, d: call(aten.norm.Scalar, x(s, d), 2))
    lists = ((8, 1000), (148, 70_000), (12, 4_000_000))
    yield Probe("_foreach_norm", lambda s, d: call(aten._foreach_norm.Scalar, _list(s, d), 2), lists)
    yield Probe("_foreach_powsum", lambda s, d: call(aten._foreach_powsum.Scalar, _list(s, d), 2), lists)
    yield Probe("_foreach_max", lambda s, d: call(aten._foreach_max.default, _list(s, d)), lists)


def _list(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    return [x(shape[1:], dtype) for _ in range(shape[0])]


def _sorting() -> Iterator[Probe]:
    vectors = ((1000,), (100_000,), (3_000_000,))
    matrices = ((64, 1024), (8, 50304), (512, 50304))
    yield Probe("sort", lambda s, d: call(aten.sort.default, x(s, d)), (*vectors, *matrices))
    yield Probe("topk", lambda s, d: call(aten.topk.default, x(s, d), 50), (*vectors, *matrices))
    yield Probe("cumsum", lambda s, d: call(aten.cumsum.default, x(s, d), 0), (*vectors, *matrices))
    yield Probe("cumprod", lambda s, d: call(aten.cumprod.default, x(s, d), 0), vectors)
    yield Probe("multinomial", lambda s, d: call(aten.multinomial.default, x(s, d), 1), matrices)
    yield Probe("multinomial", lambda s, d: call(aten.multinomial.default, x(s, d), 5, True), matrices, variant="5")
    tokens = ((1024, 768, 1024), (4096, 768, 50304), (65536, 768, 50304))

    def embedding_backward(s: Sequence[int], d: torch.dtype) -> Call:
        return call(aten.embedding_dense_backward.default, x(s[:2], d), ids(s[:1], s[2]), s[2], -1, False)

    yield Probe("embedding_dense_backward", embedding_backward, tokens)
    for operator in ("index_put", "index_put_", "_index_put_impl_"):
        func = getattr(aten, operator).default
        for adds in (False, True):
            make = partial(_index_put, func, adds)
            yield Probe(operator, make, tokens[:2], variant="adds" if adds else "writes")


def _index_put(func: Any, adds: bool, s: Sequence[int], d: torch.dtype) -> Call:
    return call(func, x((s[2], s[1]), d), [ids(s[:1], s[2])], x(s[:2], d), adds)


def _attention() -> Iterator[Probe]:
    shapes = ((2, 4, 128, 64), (4, 12, 1024, 64), (8, 25, 1024, 64), (2, 16, 2048, 128))
    flash, efficient = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention
    halves = (BF16, F16)

    def forward_flash(s: Sequence[int], d: torch.dtype) -> Call:
        return call(flash.default, *(x(s, d) for _ in range(3)), 0.0, True, False)

    def backward_flash(s: Sequence[int], d: torch.dtype) -> Call:
        q, k, v = (x(s, d) for _ in range(3))
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = flash.default(q, k, v, 0.0, True, False)
        return call(
            aten._scaled_dot_product_flash_attention_backward.default, x(s, d), q, k, v, out, lse, cum_q, cum_k,
            max_q, max_k, 0.0, True, seed, offset,
        )  # fmt: skip

    def forward_efficient(s: Sequence[int], d: torch.dtype) -> Call:
        return call(efficient.default, *(x(s, d) for _ in range(3)), None, True, 0.0, True)

    def backward_efficient(s: Sequence[int], d: torch.dtype) -> Call:
        q, k, v = (x(s, d) for _ in range(3))
        out, lse, seed, offset = efficient.default(q, k, v, None, True, 0.0, True)
        return call(
            aten._scaled_dot_product_efficient_attention_backward.default, x(s, d), q, k, v, None, out, lse, seed,
            offset, 0.0, [True, True, True, False], True,
        )  # fmt: skip

    yield Probe("_scaled_dot_product_flash_attention", forward_flash, shapes, halves)
    yield Probe("_scaled_dot_product_flash_attention_backward", backward_flash, shapes, halves)
    yield Probe("_scaled_dot_product_efficient_attention", forward_efficient, shapes, (F32, BF16))
    yield Probe("_scaled_dot_product_efficient_attention_backward", backward_efficient, shapes, (F32, BF16))


def _copies() -> Iterator[Probe]:
    def host(s: Sequence[int], d: torch.dtype) -> Tensor:
        return torch.rand(tuple(s), dtype=d).pin_memory()

    shapes = ((64, 1024), (4096, 768))
    for waits in (True, False):
        said = "waits" if waits else "does not wait"
        make = lambda s, d, waits=waits: call(aten.copy_.default, x(s, F32), host(s, d), not waits)  # noqa: E731
        yield Probe("copy_", make, shapes, (F32, F16), f"up, {said}")
        make = lambda s, d, waits=waits: call(aten.copy_.default, host(s, F32), x(s, d), not waits)  # noqa: E731
        yield Probe("copy_", make, shapes, (F32, F16), f"down, {said}")
    yield Probe(
        "copy_", lambda s, d: call(aten.copy_.default, host(s[::-1], d), x(s, d).t()), shapes, variant="down, strided"
    )
    yield Probe("_to_copy", lambda s, d: call(aten._to_copy.default, x(s, d).t(), device=torch.device("cpu")), shapes)


def measured(probe: Probe, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Extra bytes (requested) of one call at its peak, bytes of its outputs, and how often it asked the allocator."""
    found: dict[str, Any] = {
        "operator": probe.operator,
        "variant": probe.variant,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "error": "",
    }
    try:
        func, args, kwargs = probe.make(shape, dtype)
        func(*args, **kwargs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()
        out = func(*args, **kwargs)
        after = torch.cuda.memory_stats()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:  # this torch or card has it not
        return {**found, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    del out
    held, peak = after["requested_bytes.all.current"], after["requested_bytes.all.peak"]
    outputs = held - before["requested_bytes.all.current"]
    count = after["allocation.all.allocated"] - before["allocation.all.allocated"]
    return {**found, "extra_bytes": peak - held, "outputs_bytes": outputs, "allocations": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", default=[], help="these alone")
    parser.add_argument("--json", required=True, help="file for the figures")
    options = parser.parse_args()
    card.require()
    found = []
    with torch.no_grad():
        for probe in probes():
            if options.operators and probe.operator not in options.operators:
                continue
            for shape in probe.shapes:
                for dtype in probe.dtypes:
                    found.append(measured(probe, shape, dtype))
    Path(options.json).write_text(json.dumps({**card.facts(), "probes": found}))


if __name__ == "__main__":
    main()
